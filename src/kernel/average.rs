//! Host side of `shaders/average.wgsl`: the weights that the layer gives out.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, LineAt};
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

impl Average {
    pub(crate) fn all() -> impl Iterator<Item = Average> {
        std::iter::once(Average)
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Weights, false), (Slot::Lse, false), (Slot::Averaged, true)]
    }

    pub(crate) fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    pub(crate) fn workgroup_bytes(&self) -> u32 {
        0
    }

    pub(crate) fn context(&self) -> Value {
        context! { threads => self.threads() }
    }
}

impl fmt::Display for Average {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad("average")
    }
}
