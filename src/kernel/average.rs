//! Host side of `shaders/average.wgsl`: the weights that the layer gives out.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::slot::Slot;

/// The only variant of `average`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Average;

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
