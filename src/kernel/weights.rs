//! Host side of `shaders/weights.wgsl`: raw scores to weights in place, after a fused kernel.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, LineAt, Lists, Transform, Visible};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// A variant of `weights`; there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weights;

params! {
    /// The parameters of `weights`.
    Weights of attention {
        /// Lengths and positions.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// The score transform.
        transform: Transform,
        /// Scores that become weights in place.
        s: At,
        /// Log-sum-exp, and maximum and sum.
        lse: LineAt,
    } reads LSE
}

impl Shader for Weights {
    const NAME: &str = "weights";

    fn all() -> impl Iterator<Item = Self> {
        [Weights].into_iter()
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![
            (Slot::Weights, true),
            (Slot::Totals, false),
            (Slot::Lists, false),
            (Slot::Lse, true),
            (Slot::Mask, false),
            (Slot::Bias, false),
        ]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { lists => true, threads => self.threads(), full => true }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weights")
    }
}
