//! What can be wrong with a picture.

use std::path::PathBuf;

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why no picture was drawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An axis is empty.
    #[error("there are no {what} to draw")]
    Nothing {
        /// Sequences, layers, heads, queries or keys.
        what: &'static str,
    },
    /// The weights do not fill heads × queries × keys.
    #[error("there are {got} weights; heads × queries × keys is {want}")]
    Length {
        /// Weights given.
        got: usize,
        /// Weights needed.
        want: usize,
    },
    /// A weight is no share of 1.
    #[error("weight {index} is {value}; it must be from 0 to 1")]
    Weight {
        /// Its place.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The end of the colour scale is no weight.
    #[error("--max is {value}; it must be above 0 and at most 1, as weights are")]
    Max {
        /// The value given.
        value: f32,
    },
    /// The picture would not fit a viewer's memory.
    #[error(
        "the picture would be {width} × {height} pixels; each side may have {limit}: draw fewer sequences or layers, or \
         choose a smaller --size"
    )]
    TooLarge {
        /// Its width.
        width: usize,
        /// Its height.
        height: usize,
        /// The longest side.
        limit: usize,
    },
    /// The page would not fit a browser's memory.
    #[error("the page would hold {got} weights; it may hold {limit}: draw fewer tokens, or one layer as .svg or .png")]
    TooMany {
        /// Weights of all layers.
        got: usize,
        /// The most there may be.
        limit: usize,
    },
    /// The file's ending names no format.
    #[error("{}: a picture's name must end in .svg, .png or .html", path.display())]
    Ending {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be made.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The picture could not be written.
    #[error("{}: {why}", path.display())]
    Draw {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        why: String,
    },
    /// The font of this crate could not be read.
    #[error("the built-in font could not be read")]
    Font,
}
