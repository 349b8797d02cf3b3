//! Host side of `shaders/export.wgsl`: weights or logits from the scratch to an output.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;

/// A variant of `export`: what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    /// [`Slot::Weights`] or [`Slot::Logits`].
    pub to: Slot,
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
        context! { lists => true, threads => self.threads(), full => false }
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "export[{}]", self.to.name())
    }
}
