//! How alike sentences are: all-MiniLM-L6-v2 with its attention on the GPU.
//!
//! ```sh
//! scripts/models # fetches the model, once
//! cargo run --release -p wgpu-attention-models --bin sentence_similarity -- "The cat sits outside" "A man plays the guitar"
//! ```

use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use wgpu_attention::internal::describe;
use wgpu_attention_heatmap::{Layer, Sequence, Style, draw, is_page};
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
    /// Draw the attention weights of a layer into this file, .svg or .png, or those of all layers into a page, .html
    #[arg(long)]
    heatmap: Option<PathBuf>,
    /// The layer that is drawn, 0 to 5; a page shows it first
    #[arg(long, default_value_t = 5, requires = "heatmap")]
    layer: usize,
    #[command(flatten)]
    style: Style,
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
    let layers = match &arguments.heatmap {
        None => 0..0,
        // A layer that the model does not have is an error of its own.
        Some(path) if is_page(path)? && arguments.layer < model.layers() => 0..model.layers(),
        Some(_) => arguments.layer..arguments.layer + 1,
    };
    let encoded = model.encode(&gpu, &batch, layers.clone())?;
    let similarity = encoded.similarity()?;
    print_table(&arguments.sentences, &similarity);
    println!("attention by {}", describe(gpu.info()));
    if let Some(path) = &arguments.heatmap {
        let of = if layers.len() == 1 { format!("layer {}", layers.start) } else { "all layers".into() };
        draw(path, &sequences(arguments, batch, &encoded, layers), &arguments.style)?;
        println!("weights of {of} are drawn in {}", path.display());
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
fn sequences(arguments: &Arguments, batch: Batch, encoded: &Encoded, layers: Range<usize>) -> Vec<Sequence> {
    let cut = |(index, (title, tokens)): (usize, (&String, Vec<String>))| {
        let layer = |(layer, weights): (usize, &Vec<f32>)| {
            let size = [tokens.len(); 2];
            Layer::cut(format!("layer {layer}"), weights, encoded.weights_shape, index, size)
        };
        Sequence {
            title: title.clone(),
            layers: layers.clone().zip(&encoded.weights).map(layer).collect(),
            shown: arguments.layer - layers.start,
            queries: tokens.clone(),
            keys: tokens,
        }
    };
    arguments.sentences.iter().zip(batch.tokens).enumerate().map(cut).collect()
}
