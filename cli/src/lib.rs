//! The command line `wgpu-attention`. The library that it is built on is [`wgpu_attention`], which this crate hands on.

pub use wgpu_attention;
