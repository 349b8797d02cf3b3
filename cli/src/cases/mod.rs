//! Case files: results of other implementations, as problems, operands and expected outputs.

mod append;
mod case;
mod files;
mod layers;
mod minilm;
mod onnx;
mod rotary;
mod sdpa;
mod softmax;

pub use case::{AppendWork, Case, LayerWork, RotationWork, Verdict, Work};
pub use files::{Loaded, load, sources};
