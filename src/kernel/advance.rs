//! Host side of `shaders/advance.wgsl`: the lengths of sequences grow.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// A variant of `advance`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Advance {
    /// Each batch has a number of its own to grow by.
    pub each: bool,
}

params! {
    /// The parameters of `advance`.
    Advance {
        /// Place of the length of batch 0.
        lengths_base: u32,
        /// Place of the number that batch 0 grows by.
        by_base: u32,
        /// The number that every batch grows by.
        by: u32,
        /// The most that a length becomes.
        limit: u32,
    }
}

impl Shader for Advance {
    const NAME: &str = "advance";

    fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().map(|each| Advance { each })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut bindings = vec![(Slot::Lengths, true)];
        bindings.extend(self.each.then_some((Slot::By, false)));
        bindings
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { threads => self.threads(), each => self.each }
    }
}

impl fmt::Display for Advance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "advance[{}]", if self.each { "by batch" } else { "all alike" })
    }
}
