//! Host side of `shaders/average.wgsl`: the weights that the layer gives out.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, LineAt};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// The only variant of `average`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Average;

params! {
    /// The parameters of `average`.
    Average {
        /// Weights of the heads of attention.
        w: At,
        /// The weights that are given out.
        y: At,
        /// Log-sum-exp.
        lse: LineAt,
        /// From the log-sum-exp of a row to the weight of its extra key.
        extra_weights: u32,
        /// Heads of which the mean is taken.
        mean_heads: u32,
        /// One over them.
        factor: f32,
        /// Keys of attention.
        keys: u32,
        /// Columns of y: these keys, and those that the layer adds.
        columns: u32,
        /// Whether there is an extra key.
        flags: u32,
    } reads EXTRA_KEY
}

impl Shader for Average {
    const NAME: &str = "average";

    fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Average)
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Weights, false), (Slot::Lse, false), (Slot::Averaged, true)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { threads => self.threads() }
    }
}

impl fmt::Display for Average {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad("average")
    }
}
