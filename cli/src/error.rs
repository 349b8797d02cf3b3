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
    #[error("{}: not a safetensors file: {source}", path.display())]
    Safetensors { path: PathBuf, source: SafeTensorError },
    #[error("{}: tensor {tensor:?} is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
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
    #[error("{}: the number of tokens is {got}; it must be from 1 to {limit}, one a line", path.display())]
    Tokens { path: PathBuf, got: usize, limit: usize },
    #[error("{}: batch is {batch}; it is counted from 0, and must be below {batches}", path.display())]
    Batch { path: PathBuf, batch: usize, batches: usize },
    #[error("{}: {source}", path.display())]
    Problem { path: PathBuf, source: wgpu_attention::Error },
    #[error("shapes {left} and {right} are of one class of problems, which has one row: choose one of them")]
    SameClass { left: String, right: String },
    #[error("shape {shape}: no query sees a key, so that there is nothing to time")]
    NoWork { shape: String },
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
