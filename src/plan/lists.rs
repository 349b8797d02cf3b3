//! The small per-batch and per-head arrays of a call, which share one buffer.

use crate::contract::operands::{Kind, Operand, Operands};
use crate::contract::shape::Shape;

/// Places of the small arrays, in u32 words of one buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Lists {
    /// Where each list begins, also one that the problem does not have.
    places: Operands<u64>,
    words: u64,
}

impl Lists {
    pub(crate) fn new(shape: &Shape) -> Self {
        // A word of padding stands for no list at all: a binding may not be empty.
        let mut words = 4u64;
        let places = Operands::from_fn(|operand| {
            if operand.kind() != Kind::List {
                return None;
            }
            // `merge` binds the sinks alone, and a binding begins at a multiple of 256 bytes.
            let place = if operand == Operand::Sinks { words.next_multiple_of(64) } else { words };
            if let Some(len) = operand.len(shape) {
                words = place + len;
            }
            Some(place)
        });
        Lists { places, words }
    }

    /// Where a list begins. A plan is made only where all lists together fit a binding, so that the place fits a word.
    pub(crate) fn place(&self, list: Operand) -> u32 {
        *self.places.get(list).expect("every list has a place") as u32
    }

    pub(crate) fn bytes(&self) -> u64 {
        4 * self.words
    }
}
