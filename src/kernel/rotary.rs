//! Host side of `shaders/rotary.wgsl`: pairs of a row are rotated by the angle of its position.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, RotationTable};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::problem::Element;

/// A variant of `rotary`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rotary {
    /// Type of the rows in memory; 16-bit types are packed in u32.
    pub element: Element,
    /// Pairs are neighbours rather than half a rotation apart.
    pub interleaved: bool,
    /// The result replaces the input.
    pub in_place: bool,
}

params! {
    /// The parameters of `rotary`.
    Rotary {
        /// Input rows.
        x: At,
        /// Output rows.
        y: At,
        /// What rows are rotated by.
        rotation: RotationTable,
        /// Items of a row: words or elements that an invocation sees to.
        items: u32,
    }
}

impl Shader for Rotary {
    const NAME: &str = "rotary";

    fn all() -> impl Iterator<Item = Self> {
        [Element::F32, Element::F16, Element::Bf16].into_iter().flat_map(|element| {
            [(false, false), (false, true), (true, false), (true, true)].map(|(interleaved, in_place)| Rotary {
                element,
                interleaved,
                in_place,
            })
        })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::Angles, false), (Slot::Positions, false), (Slot::Y, true)];
        if !self.in_place {
            slots.push((Slot::X, false));
        }
        slots
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! {
            threads => self.threads(), element => self.element.to_string(), packed => self.element != Element::F32,
            interleaved => self.interleaved, in_place => self.in_place,
        }
    }
}

impl fmt::Display for Rotary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = if self.interleaved { "interleaved" } else { "halves" };
        let place = if self.in_place { " in place" } else { "" };
        write!(f, "rotary[{}, {pairs}{place}]", self.element)
    }
}
