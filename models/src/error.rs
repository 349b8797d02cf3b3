//! What can go wrong with a model. Each message names the file or the text.

use std::path::PathBuf;

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model could not be read.
    #[error("{}: {source} (scripts/models fetches the models)", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the model does not hold what it should.
    #[error("{}: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The tokenizer refused a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A text has more tokens than the model was made for.
    #[error("text {index} has {tokens} tokens; the model takes {limit}")]
    TooLong {
        /// Which text, from 1 on.
        index: usize,
        /// Its tokens, with those to be generated.
        tokens: usize,
        /// The most there may be.
        limit: usize,
    },
    /// There is no text.
    #[error("there is no text")]
    NoText,
    /// A layer that the model does not have.
    #[error("layer is {layer}; the model has the layers 0 to {last}")]
    Layer {
        /// The layer asked for.
        layer: usize,
        /// The last one.
        last: usize,
    },
    /// candle reported an error.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    /// wgpu-attention reported an error.
    #[error("{0}")]
    Attention(#[from] wgpu_attention::Error),
    /// The picture could not be drawn.
    #[error("{0}")]
    Picture(#[from] wgpu_attention_heatmap::Error),
    /// Standard output is closed.
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl Error {
    pub(crate) fn content(path: &std::path::Path, why: impl ToString) -> Self {
        Error::Content { path: path.into(), why: why.to_string() }
    }
}
