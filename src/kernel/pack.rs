//! Host side of `shaders/pack.wgsl`: f32 scratch to a 16-bit output whose rows do not fill whole vectors.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{Lists, Visible};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::problem::Element;

/// A variant of `pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    /// Type of the output, 16 bits.
    pub element: Element,
    /// The rows are the tokens of a packed batch: those that no sequence owns keep what they held.
    pub packed: bool,
}

params! {
    /// The parameters of `pack`.
    Pack {
        /// Lengths of a packed batch.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// Elements of the dispatch.
        elements: u32,
        /// Sequences of a packed batch.
        sequences: u32,
        /// Token of the first element, and which element of the token that is.
        token0: u32,
        /// The element.
        element0: u32,
        /// Elements from one token to the next.
        token_elements: u32,
    }
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
