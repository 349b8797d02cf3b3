//! Case files: what other implementations computed, as problems, operands and expectations.

mod case;
mod files;
mod layers;
mod minilm;
mod onnx;
mod rotary;
mod sdpa;

pub use case::{Case, LayerWork, RotationWork, Verdict, Work};
pub use files::{Loaded, load, sources};
