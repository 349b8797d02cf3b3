//! The layer on a device.

mod buffers;
mod multihead;
mod prepared;

pub use buffers::{CacheBuffers, LayerBuffers};
pub use multihead::MultiHeadAttention;
pub use prepared::PreparedLayer;
