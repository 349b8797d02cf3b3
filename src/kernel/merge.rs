//! Host side of `shaders/merge.wgsl`: one result from several, each over a part of the keys.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, Merging};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::problem::Element;

/// A variant of `merge`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Merge {
    /// Type of the output.
    pub element: Element,
    /// Whether all rows are whole vectors of four; 16-bit types are written only where they are.
    pub vector: bool,
}

params! {
    /// The parameters of `merge`.
    Merge {
        /// The partial results.
        merging: Merging,
        /// Outputs of partial 0.
        first_out: At,
        /// The output.
        out: At,
        /// Last axis of out.
        value_dim: u32,
        /// One bit a rule that is on.
        flags: u32,
    } reads ADD, TOTALS
}

impl Shader for Merge {
    const NAME: &str = "merge";

    fn all() -> impl Iterator<Item = Self> {
        let outs = [(Element::F32, true), (Element::F32, false), (Element::F16, true), (Element::Bf16, true)];
        outs.into_iter().map(|(element, vector)| Merge { element, vector })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::PartialOut, false), (Slot::PartialLse, false), (Slot::Totals, false), (Slot::Out, true)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { threads => self.threads(), element => self.element.to_string(), vector => self.vector }
    }
}

impl fmt::Display for Merge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "merge[out {}{}]", self.element, if self.vector { "" } else { " unaligned" })
    }
}
