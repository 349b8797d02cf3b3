//! `heatmap`: a picture of attention weights.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use wgpu_attention_heatmap::{Sequence, draw};

use crate::Outcome;
use crate::archive::Archive;
use crate::engine::{EngineArgs, KernelArgs};
use crate::error::{Error, Result};
use crate::options::TermArgs;
use crate::report::{self, Report};
use crate::request::Request;

#[derive(Args, Debug)]
pub struct Arguments {
    /// Weights as `run --weights` writes them, or q, k and the other tensors that `run` takes, to compute weights from
    #[arg(long)]
    input: PathBuf,
    /// The picture to write, .svg or .png; an existing file is replaced only when the new one is complete
    #[arg(long)]
    output: PathBuf,
    /// Draw this tensor, [batch, heads, queries, keys] (default: weights, if the file has it, else computed from q and k)
    #[arg(long)]
    tensor: Option<String>,
    /// Text file with one token on each line; only as many rows and columns are drawn (default: all, numbered)
    #[arg(long)]
    tokens: Option<PathBuf>,
    /// Text file with the tokens of the keys, if they differ from those of the queries
    #[arg(long, requires = "tokens")]
    key_tokens: Option<PathBuf>,
    /// Index of the batch to draw, from 0
    #[arg(long, default_value_t = 0)]
    batch: usize,
    /// Title above the heads (default: the file's name)
    #[arg(long)]
    title: Option<String>,
    #[command(flatten)]
    terms: TermArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// Weights, their shape, and their origin.
struct Weights {
    values: Vec<f32>,
    shape: [usize; 4],
    source: String,
}

fn stored(archive: &Archive, name: &str) -> Result<Weights> {
    let shape = archive.sizes_of_rank(name)?.map(|n: u32| n as usize);
    Ok(Weights { values: archive.floats(name)?.widened(), shape, source: format!("tensor {name:?}") })
}

fn computed(arguments: &Arguments, archive: &Archive) -> Result<Weights> {
    let Request { mut problem, operands, .. } = Request::read_for_weights(archive, arguments.terms.layout.into())?;
    arguments.terms.apply(&mut problem);
    problem.weights = true;
    let refused = |source| archive.problem(source);
    problem.check().map_err(refused)?.check_inputs(&operands.inputs()).map_err(refused)?;
    let engine = arguments.engine.open()?;
    let outputs = engine.attention(&problem, &operands.inputs(), &arguments.kernels)?;
    let shape = [problem.batch, problem.heads, problem.seq_q, problem.seq_kv].map(|n| n as usize);
    let values = outputs.weights.expect("the problem asks for weights");
    Ok(Weights { values, shape, source: format!("computed by {}", engine.label()) })
}

/// The labels of an axis: the tokens of a file, or the numbers of the rows.
fn labels(path: Option<&Path>, rows: usize) -> Result<Vec<String>> {
    let Some(path) = path else { return Ok((0..rows).map(|row| row.to_string()).collect()) };
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    let tokens: Vec<String> = text.lines().map(String::from).collect();
    if tokens.is_empty() || tokens.len() > rows {
        return Err(Error::Tokens { path: path.into(), got: tokens.len(), limit: rows });
    }
    Ok(tokens)
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let archive = Archive::read(&arguments.input)?;
    let weights = match &arguments.tensor {
        Some(name) => stored(&archive, name)?,
        None if archive.has("weights") => stored(&archive, "weights")?,
        None => computed(arguments, &archive)?,
    };
    let [batches, _, seq_q, seq_kv] = weights.shape;
    if arguments.batch >= batches {
        return Err(Error::Batch { path: arguments.input.clone(), batch: arguments.batch, batches });
    }
    let queries = labels(arguments.tokens.as_deref(), seq_q)?;
    let keys = labels(arguments.key_tokens.as_deref().or(arguments.tokens.as_deref()), seq_kv)?;
    let title = arguments.title.clone().unwrap_or_else(|| archive.stem());
    let sequence = Sequence::cut(title, &weights.values, weights.shape, arguments.batch, queries, keys);
    draw(&arguments.output, std::slice::from_ref(&sequence))?;

    let (heads, rows, columns) = (sequence.heads, sequence.queries.len(), sequence.keys.len());
    report.object(&json!({
        "output": arguments.output.to_string_lossy(), "source": weights.source,
        "heads": heads, "queries": rows, "keys": columns,
    }))?;
    let (source, output) = (weights.source, arguments.output.display());
    let [heads, rows, columns] = [(heads, "head", "heads"), (rows, "query", "queries"), (columns, "key", "keys")]
        .map(|(n, one, many)| report::count(n, one, many));
    report.line(format!("{heads}, {rows} × {columns}, {source}, drawn in {output}"))?;
    Ok(Outcome::Right)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::archive::builder::Builder;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// The SVG that is drawn from a file, with `tokens` in a second file.
    fn draw_of(file: &Builder, tokens: Option<&str>, options: &[&str]) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let [input, output, list] = ["x.safetensors", "y.svg", "tokens.txt"].map(|name| folder.path().join(name));
        std::fs::write(&input, file.bytes()).unwrap();
        let mut line =
            vec!["heatmap", "--cpu", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        if let Some(tokens) = tokens {
            std::fs::write(&list, tokens).unwrap();
            line.extend(["--tokens", list.to_str().unwrap()]);
        }
        line.extend(options);
        run(&Line::parse_from(line).arguments, Report { json: true })?;
        Ok(std::fs::read_to_string(&output).unwrap())
    }

    #[test]
    fn weights_are_computed_from_q_and_k() {
        let file = Builder::default().f32s("q", &[1, 2, 3, 1], &[0.0; 6]).f32s("k", &[1, 2, 3, 1], &[0.0; 6]);
        let svg = draw_of(&file, None, &["--causal", "top-left", "--title", "the title"]).unwrap();
        // The first row sees one key with all its weight, which is the largest.
        for text in ["head 1", "the title", "1.00", "query", "key"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        let plain = draw_of(&file, None, &[]).unwrap();
        assert!(plain.contains("0.33") && !plain.contains("1.00"), "{plain}");
    }

    #[test]
    fn tokens_name_the_axes_and_cut_padding_off() {
        let file = Builder::default().f32s("layer.0.probs", &[2, 1, 3, 3], &[[1.0, 0.0, 0.0]; 6].concat());
        let svg = draw_of(&file, Some("[CLS]\nword\n"), &["--tensor", "layer.0.probs", "--batch", "1"]).unwrap();
        assert_eq!((svg.matches("[CLS]").count(), svg.matches("word").count()), (2, 2), "{svg}");
    }

    #[test]
    fn wrong_input_is_refused() {
        let file = Builder::default().f32s("weights", &[1, 1, 2, 2], &[0.5; 4]);
        let error = |tokens, options: &[&str]| draw_of(&file, tokens, options).unwrap_err().to_string();
        assert!(
            error(Some("a\nb\nc\n"), &[]).contains("tokens.txt: the number of tokens is 3; it must be from 1 to 2")
        );
        assert!(
            error(None, &["--batch", "1"])
                .contains("x.safetensors: batch is 1; it is counted from 0, and must be below 1")
        );
        assert!(error(None, &["--tensor", "probs"]).contains("tensor \"probs\" is missing"));
        let keys = Builder::default().f32s("k", &[1, 1, 1, 1], &[0.0]);
        assert!(draw_of(&keys, None, &[]).unwrap_err().to_string().contains("tensor \"q\" is missing"));
        let flat = Builder::default().f32s("weights", &[2, 2], &[0.5; 4]);
        assert!(draw_of(&flat, None, &[]).unwrap_err().to_string().contains("of rank 4"));
        let scores = Builder::default().f32s("weights", &[1, 1, 1, 1], &[7.0]);
        assert!(draw_of(&scores, None, &[]).unwrap_err().to_string().contains("must be from 0 to 1"));
    }
}
