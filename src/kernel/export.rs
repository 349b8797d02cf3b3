//! Host side of `shaders/export.wgsl`: weights or logits from the scratch to an output.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::body::ELEMENTWISE;
use super::params::{At, Lists, Visible};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::shape::Shape;

/// A variant of `export`: what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    /// [`Slot::Weights`] or [`Slot::Logits`].
    pub to: Slot,
}

params! {
    /// The parameters of `export`.
    Export of attention {
        /// Lengths and positions.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// Scores, or weights.
        s: At,
        /// The output.
        out: At,
    } reads EXPORT_LOGITS
}

impl Shader for Export {
    const NAME: &str = "export";

    fn all() -> impl Iterator<Item = Self> {
        [Slot::Weights, Slot::Logits].map(|to| Export { to }).into_iter()
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, false), (self.to, true), (Slot::Lists, false)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { lists => true, threads => self.threads() }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for Export {
    fn grid(&self, _: &Shape, keys: u64) -> Grid {
        Grid::rows(keys, self.threads())
    }

    fn every_pair(&self) -> bool {
        true
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "export[{}]", self.to.name())
    }
}
