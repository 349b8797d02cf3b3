//! How alike sentences are: all-MiniLM-L6-v2 with its attention on the GPU.
//!
//! ```sh
//! scripts/models # fetches the model, once
//! cargo run --release -p wgpu-attention-models --bin sentence_similarity -- "The cat sits outside" "A man plays the guitar"
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use wgpu_attention::internal::describe;
use wgpu_attention_heatmap::{Sequence, draw};
use wgpu_attention_models::minilm::{Batch, Encoded, MiniLm};
use wgpu_attention_models::{Result, bytes_bar, folder, open};

/// Prints how alike sentences are, each with each: 1 is the same, 0 unrelated.
#[derive(Parser)]
struct Arguments {
    /// The sentences
    #[arg(required = true)]
    sentences: Vec<String>,
    /// Folder of the model's files (default: where scripts/models puts them)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long)]
    adapter: Option<String>,
    /// Draw the attention weights of a layer into this file, .svg or .png
    #[arg(long)]
    heatmap: Option<PathBuf>,
    /// The layer that is drawn, 0 to 5
    #[arg(long, default_value_t = 5, requires = "heatmap")]
    layer: usize,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let gpu = open(arguments.adapter.as_deref())?;
    let bar = bytes_bar("loading all-MiniLM-L6-v2");
    let model = MiniLm::load(&arguments.model.clone().unwrap_or_else(|| folder("minilm")), &bar)?;
    bar.finish_and_clear();

    let batch = model.tokenize(&arguments.sentences)?;
    let encoded = model.encode(&gpu, &batch, arguments.heatmap.as_ref().map(|_| arguments.layer))?;
    let similarity = encoded.similarity()?;
    print_table(&arguments.sentences, &similarity);
    println!("attention by {}", describe(gpu.info()));
    if let Some(path) = &arguments.heatmap {
        draw(path, &sequences(arguments, batch, &encoded))?;
        println!("weights of layer {} are drawn in {}", arguments.layer, path.display());
    }
    Ok(())
}

fn print_table(sentences: &[String], similarity: &[Vec<f32>]) {
    let mut table = Table::new();
    let numbers = (1..=sentences.len()).map(|n| n.to_string());
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_header(["".into(), "sentence".into()].into_iter().chain(numbers));
    for (index, (sentence, row)) in sentences.iter().zip(similarity).enumerate() {
        let scores = row.iter().map(|score| format!("{score:.4}"));
        table.add_row([(index + 1).to_string(), sentence.clone()].into_iter().chain(scores));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{}", table.trim_fmt());
}

/// The weights of each sentence, without its padding.
fn sequences(arguments: &Arguments, batch: Batch, encoded: &Encoded) -> Vec<Sequence> {
    let Some((weights, shape)) = &encoded.weights else { return Vec::new() };
    let cut = |(index, (sentence, tokens)): (usize, (&String, Vec<String>))| {
        let title = format!("layer {}: {sentence}", arguments.layer);
        Sequence::cut(title, weights, *shape, index, tokens.clone(), tokens)
    };
    arguments.sentences.iter().zip(batch.tokens).enumerate().map(cut).collect()
}
