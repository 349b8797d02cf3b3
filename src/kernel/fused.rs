//! What the fused kernels share.

use super::slot::Slot;

/// Which operands a fused kernel binds beside q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operands {
    /// None: four storage buffers.
    Bare,
    /// Log-sum-exp and the small per-batch and per-head arrays: six.
    Lists,
    /// Also mask and bias, and the whole score transform is applied: eight.
    Full,
}

impl Operands {
    /// Storage buffers that a fused kernel binds.
    pub fn buffers(self) -> u32 {
        match self {
            Operands::Bare => 4,
            Operands::Lists => 6,
            Operands::Full => 8,
        }
    }

    pub(crate) fn all() -> [Operands; 3] {
        [Operands::Bare, Operands::Lists, Operands::Full]
    }

    /// The bindings of a fused kernel.
    pub(crate) fn bindings(self) -> Vec<(Slot, bool)> {
        let slots = [
            (Slot::Q, false),
            (Slot::K, false),
            (Slot::V, false),
            (Slot::Out, true),
            (Slot::Lse, true),
            (Slot::Lists, false),
            (Slot::Mask, false),
            (Slot::Bias, false),
        ];
        slots[..self.buffers() as usize].to_vec()
    }
}
