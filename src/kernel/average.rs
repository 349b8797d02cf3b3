//! Host side of `shaders/average.wgsl`: the weights that the layer gives out.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;

/// The only variant of `average`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Average;

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
