//! Attention on any GPU that wgpu reaches.
#![warn(missing_docs)]

pub mod caps;
mod choose;
mod encode;
mod error;
pub mod gpu;
pub mod kernel;
pub mod layer;
#[cfg(feature = "safetensors")]
pub mod load;
mod multihead;
mod operation;
mod ops;
mod options;
mod part;
mod pipelines;
pub mod plan;
mod planner;
pub mod problem;
pub mod reference;
mod runner;
pub mod shader;
pub mod shape;
mod step;
mod steps;
mod tuned;
mod walk;

pub use caps::Caps;
pub use encode::{Attention, Buffers, Prepared, Recording};
pub use error::{Error, Result};
pub use gpu::{DeviceOptions, Gpu, Resident};
pub use layer::{Call, Layer, LayerInputs, LayerOutputs, Linear, Sources, Weights};
pub use multihead::{CacheBuffers, LayerBuffers, MultiHeadAttention, PreparedLayer};
pub use operation::{AppendBuffers, Description, MergeBuffers, Operation, ProjectionBuffers, RotationBuffers};
pub use ops::append::Append;
pub use ops::merge::Merge;
pub use ops::project::{Order, Projection};
pub use ops::rotary::{Positions, Rotation};
pub use options::{Form, Kernel, Options};
pub use plan::Plan;
pub use problem::{
    Bias, Broadcast, Causal, Element, Elements, Inputs, Layout, Logits, Outputs, Packed, Paged, Problem, Strides,
    Window,
};
pub use runner::Runner;
pub use shape::Shape;
pub use tuned::{Choice, Class, Queries, Row, Tuning};
pub use wgpu;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
