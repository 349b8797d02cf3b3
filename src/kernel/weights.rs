//! Host side of `shaders/weights.wgsl`: raw scores to weights in place, after a fused kernel.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;

/// A variant of `weights`; there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weights;

impl Shader for Weights {
    const NAME: &str = "weights";

    fn all() -> impl Iterator<Item = Self> {
        [Weights].into_iter()
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![
            (Slot::Weights, true),
            (Slot::Totals, false),
            (Slot::Lists, false),
            (Slot::Lse, true),
            (Slot::Mask, false),
            (Slot::Bias, false),
        ]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { lists => true, threads => self.threads(), full => true }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weights")
    }
}
