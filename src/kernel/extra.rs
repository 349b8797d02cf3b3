//! Host side of `shaders/extra.wgsl`: one more key that every row sees.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, LineAt};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// The only variant of `extra`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extra;

params! {
    /// The parameters of `extra`.
    Extra {
        /// Queries.
        q: At,
        /// The output.
        out: At,
        /// Log-sum-exp.
        lse: LineAt,
        /// From the log-sum-exp of a row to the weight of its extra key.
        extra_weights: u32,
        /// Query heads per key/value head.
        group: u32,
        /// Last axis of q and k.
        head_dim: u32,
        /// Last axis of out.
        value_dim: u32,
        /// Factor of q·k.
        scale: f32,
        /// Place of the key in the buffer of biases.
        key_base: u32,
        /// Place of its value.
        value_base: u32,
    }
}

impl Shader for Extra {
    const NAME: &str = "extra";

    fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Extra)
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Q, false), (Slot::Biases, false), (Slot::Lse, true), (Slot::Out, true)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { threads => self.threads() }
    }
}

impl fmt::Display for Extra {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad("extra")
    }
}
