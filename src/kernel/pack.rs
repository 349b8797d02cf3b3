//! Host side of `shaders/pack.wgsl`: f32 scratch to a 16-bit output whose rows do not fill whole vectors.

use std::fmt;

use minijinja::{Value, context};

use super::Slot;
use crate::problem::Element;
use crate::tuning::ELEMENTWISE;

/// A variant of `pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    /// Type of the output, 16 bits.
    pub element: Element,
}

impl Pack {
    pub(crate) fn all() -> impl Iterator<Item = Pack> {
        [Element::F16, Element::Bf16].map(|element| Pack { element }).into_iter()
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Unpacked, false), (Slot::Out, true)]
    }

    pub(crate) fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    pub(crate) fn workgroup_bytes(&self) -> u32 {
        0
    }

    pub(crate) fn context(&self) -> Value {
        context! { threads => self.threads(), element => self.element.to_string() }
    }
}

impl fmt::Display for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack[{}]", self.element)
    }
}
