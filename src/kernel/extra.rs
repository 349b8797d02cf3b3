//! Host side of `shaders/extra.wgsl`: one more key that every row sees.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::shader::Shader;
use super::slot::Slot;

/// The only variant of `extra`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extra;

impl Shader for Extra {
    const NAME: &str = "extra";

    fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Extra)
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Q, false), (Slot::Shifts, false), (Slot::Lse, true), (Slot::Out, true)]
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
