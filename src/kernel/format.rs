//! How kernels read and write the elements of tensors.

use std::fmt;

use crate::contract::problem::Element;

/// How a kernel reads or writes a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Type in memory.
    pub element: Element,
    /// f16 is read with the adapter's own type rather than unpacked from u32.
    pub native: bool,
    /// Every row starts at a multiple of four elements and has a multiple of four of them.
    pub vector: bool,
}

impl Format {
    pub(crate) fn all() -> impl Iterator<Item = Format> {
        let kinds = [(Element::F32, false), (Element::F16, false), (Element::F16, true), (Element::Bf16, false)];
        kinds.into_iter().flat_map(|(element, native)| [true, false].map(|vector| Format { element, native, vector }))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let native = if self.native { " native" } else { "" };
        let vector = if self.vector { "" } else { " unaligned" };
        write!(f, "{}{native}{vector}", self.element)
    }
}
