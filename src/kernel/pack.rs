//! Host side of `shaders/pack.wgsl`: f32 scratch to a 16-bit output whose rows do not fill whole vectors.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;
use crate::problem::Element;

/// A variant of `pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    /// Type of the output, 16 bits.
    pub element: Element,
    /// The rows are the tokens of a packed batch: those that no sequence owns keep what they held.
    pub packed: bool,
}

impl Shader for Pack {
    const NAME: &str = "pack";

    fn all() -> impl Iterator<Item = Self> {
        let each = |element| [false, true].map(|packed| Pack { element, packed });
        [Element::F16, Element::Bf16].into_iter().flat_map(each)
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut bindings = vec![(Slot::Unpacked, false), (Slot::Out, true)];
        bindings.extend(self.packed.then_some((Slot::Lists, false)));
        bindings
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { lists => self.packed, threads => self.threads(), element => self.element.to_string() }
    }
}

impl fmt::Display for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack[{}{}]", self.element, if self.packed { ", packed batch" } else { "" })
    }
}
