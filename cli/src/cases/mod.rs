//! Case files: what other implementations computed, as problems, operands and expectations.

mod case;
mod files;
mod minilm;
mod onnx;
mod sdpa;

pub use case::{Case, Verdict};
pub use files::{Loaded, load, sources};
