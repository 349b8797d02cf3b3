//! The errors of the command line. Each message names the file, the tensor or the option.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensorError};

/// Shorthand for a result with this package's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Usage and input errors. The process ends with code 2 on any of them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: not a {what} of this program: {source}", path.display())]
    Json { path: PathBuf, what: &'static str, source: serde_json::Error },
    #[error("options describe a problem, but neither --shape nor --problem gives its sizes")]
    NoShape,
    #[error("{got} problems are given, and this takes one: give one --shape or one --problem")]
    OneProblem { got: usize },
    #[error("--key-lengths has {got} lengths; it must have one, or one for each of the {batch} batches")]
    KeyLengths { got: usize, batch: usize },
    #[error("{}: not a safetensors file: {source}", path.display())]
    Safetensors { path: PathBuf, source: SafeTensorError },
    #[error("{}: tensor {tensor:?} is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor {tensor:?} is missing{}", path.display(), listed(tensors))]
    NoWeights { path: PathBuf, tensor: String, tensors: Vec<Listed> },
    #[error("{}: tensor {tensor:?} has type {got:?}; it must be {want}", path.display())]
    TensorType { path: PathBuf, tensor: String, got: Dtype, want: &'static str },
    #[error("{}: tensor {tensor:?} has shape {got:?}; it must be {want}", path.display())]
    TensorShape { path: PathBuf, tensor: String, got: Vec<usize>, want: String },
    #[error("{}: tensor {tensor:?} holds {value} at index {index}; it must be {want}", path.display())]
    TensorValue { path: PathBuf, tensor: String, index: usize, value: i64, want: String },
    #[error("{}: metadata {key:?} is missing", path.display())]
    MissingMetadata { path: PathBuf, key: String },
    #[error("{}: metadata {key:?} is {value:?}; it must be {want}", path.display())]
    Metadata { path: PathBuf, key: String, value: String, want: String },
    #[error(
        "{}: this folder has no case files; a case file ends in .safetensors, holds the inputs of a call and what another \
         implementation computed from them, and names its format or operator in its metadata",
        path.display()
    )]
    NoCases { path: PathBuf },
    #[error("{}: the number of tokens is {got}; it must be from 1 to {limit}, one a line or as a JSON array", path.display())]
    Tokens { path: PathBuf, got: usize, limit: usize },
    #[error("{}: batch is {batch}; it is counted from 0, and must be below {batches}", path.display())]
    Batch { path: PathBuf, batch: usize, batches: usize },
    #[error("{}: {source}", path.display())]
    Problem { path: PathBuf, source: wgpu_attention::Error },
    #[error("problems {left} and {right} are of one class, which has one row: choose one of them")]
    SameClass { left: String, right: String },
    #[error("problem {problem}: no query sees a key, so that there is nothing to time")]
    NoWork { problem: String },
    #[error("{}: line {line}: {why}", path.display())]
    Record { path: PathBuf, line: usize, why: String },
    #[error("{}: no line is a measurement with its single times, as `bench --json` of this version writes it", path.display())]
    NoRecords { path: PathBuf },
    #[error("--json asks for the format jsonl, and --format for {format}: give one of them")]
    TwoFormats { format: String },
    #[error("the report could not be made: {why}")]
    Page { why: String },
    #[error("this system has no cache folder: give --file, or set {variable}")]
    NoFolder { variable: &'static str },
    #[error("{0}")]
    Attention(#[from] wgpu_attention::Error),
    #[error("{0}")]
    Bench(#[from] wgpu_attention_bench::Error),
    #[error("{0}")]
    Picture(#[from] wgpu_attention_heatmap::Error),
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

/// A tensor of a file in which another was not found.
#[derive(Debug)]
pub struct Listed {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Whether it has the type, the rank and the values of weights.
    pub weights: bool,
}

/// The tensors of a file, one a line, and which of them can be drawn.
fn listed(tensors: &[Listed]) -> String {
    let width = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
    let lines = tensors.iter().map(|Listed { name, dtype, shape, weights }| {
        let mark = if *weights { "  can be drawn: --tensor " } else { "" };
        format!("\n  {name:width$}  {:4}  {shape:?}{mark}{}", format!("{dtype:?}"), if *weights { name } else { "" })
    });
    let verdict = match tensors.iter().filter(|tensor| tensor.weights).count() {
        0 => {
            "; the file has no weights, which are F32, F16 or BF16 from 0 to 1, [batch, heads, queries, keys] or \
              [heads, queries, keys]; it has"
        }
        _ => "; the file has",
    };
    [verdict.into()].into_iter().chain(lines).collect()
}
