//! Host side of `shaders/logits.wgsl`: the score transform in place.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::body::ELEMENTWISE;
use super::params::{At, Keys, Lists, Transform, Visible};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::shape::Shape;

/// A variant of `logits`; there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Logits;

params! {
    /// The parameters of `logits`.
    Logits of attention {
        /// The keys of the dispatch.
        keys: Keys,
        /// Lengths and positions.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// The score transform.
        transform: Transform,
        /// Scores.
        s: At,
    }
}

impl Shader for Logits {
    const NAME: &str = "logits";

    fn all() -> impl Iterator<Item = Self> {
        [Logits].into_iter()
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, true), (Slot::Lists, false), (Slot::Mask, false), (Slot::Bias, false)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { lists => true, threads => self.threads(), full => true }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for Logits {
    fn grid(&self, _: &Shape, keys: u64) -> Grid {
        Grid::rows(keys, self.threads())
    }

    fn every_pair(&self) -> bool {
        true
    }
}

impl fmt::Display for Logits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("logits")
    }
}
