//! What can be wrong with a measurement.

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why there is no measurement.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The GPU, or the library that was measured, refused.
    #[error(transparent)]
    Attention(#[from] wgpu_attention::Error),
    /// Statistics need at least one time.
    #[error("there are no times; statistics need at least one")]
    NoTimes,
    /// A time that no clock gives.
    #[error("time {index} is {ms} ms; it must be finite and above 0")]
    Time {
        /// The index of the time, from 0.
        index: usize,
        /// The time in milliseconds.
        ms: f64,
    },
}
