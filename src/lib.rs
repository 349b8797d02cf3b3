//! Attention on any GPU that wgpu reaches.
#![warn(missing_docs)]

mod append;
pub mod caps;
mod choose;
mod encode;
mod error;
pub mod gpu;
pub mod kernel;
pub mod layer;
#[cfg(feature = "safetensors")]
pub mod load;
mod merge;
mod multihead;
pub mod operands;
mod operation;
mod options;
mod pipelines;
pub mod plan;
mod planner;
pub mod problem;
mod projection;
pub mod reference;
mod rotation;
mod runner;
pub mod shader;
pub mod shape;
mod step;
mod steps;
mod tuned;
mod walk;

pub use append::Append;
pub use caps::Caps;
pub use encode::{Attention, Buffers, Prepared, Recording};
pub use error::{Error, Result};
pub use gpu::{DeviceOptions, Gpu, Resident};
pub use layer::{Call, Layer, LayerInputs, LayerOutputs, Linear, Sources, Weights};
pub use merge::Merge;
pub use multihead::{CacheBuffers, LayerBuffers, MultiHeadAttention, PreparedLayer};
pub use operands::{HostSlice, Operand, Operands};
pub use operation::Operation;
pub use options::{Form, Kernel, Options};
pub use plan::Plan;
pub use problem::{
    Bias, Broadcast, Causal, Element, Elements, Inputs, Layout, Logits, Outputs, Packed, Paged, Problem, Strides,
    Window,
};
pub use projection::{Order, Projection};
pub use rotation::{Positions, Rotation};
pub use runner::Runner;
pub use shape::Shape;
pub use tuned::{Choice, Class, Queries, Row, Tuning};
pub use wgpu;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
