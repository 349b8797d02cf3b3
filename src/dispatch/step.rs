//! One dispatch, as pure data.

use crate::dispatch::part::Part;
use crate::kernel::Variant;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;

/// A storage binding: which operand, and which bytes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The operand.
    pub slot: Slot,
    /// First byte, a multiple of the device's offset alignment.
    pub offset: u64,
    /// Bytes, a multiple of 4.
    pub size: u64,
    /// Whether the kernel writes it.
    pub written: bool,
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The part of the work that it belongs to. Several dispatches may share the workgroups of a part.
    pub(crate) part: Part,
    /// The shader.
    pub variant: Variant,
    /// Its uniform.
    pub uniform: Uniform,
    /// Its storage bindings 1, 2, …
    pub bindings: Vec<Bound>,
    /// Workgroups on the three grid axes: at least `end − first` of the uniform's place.
    pub grid: [u32; 3],
    /// Estimated floating-point operations.
    pub flops: f64,
}
