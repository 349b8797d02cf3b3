//! What every kernel tells the host about its shader.

use std::fmt::{Debug, Display};
use std::hash::Hash;

use minijinja::Value;

use super::attention::AttentionKernel;
use super::slot::Slot;
use super::uniform::Reads;

/// One kernel. A value of the type is a variant of the kernel: the numbers that its shader is rendered with.
pub(crate) trait Shader: Reads + Copy + Debug + Display + Eq + Hash {
    /// The kernel's noun: the name of its module, and of its shader.
    const NAME: &'static str;

    /// What the kernel computes: its own noun, that of the kernel that computes the same in another way, or that of the pass after it.
    /// Plans print this name.
    const STAGE: &'static str = Self::NAME;

    /// Every variant that the planner can choose.
    fn all() -> impl Iterator<Item = Self>;

    /// Whether all query heads of a key/value head are rows of one tile, see shaders/shared/lines.wgsl.
    fn takes_group(&self) -> bool {
        false
    }

    /// Storage bindings 1, 2, … in order, and whether the kernel writes them.
    fn bindings(&self) -> Vec<(Slot, bool)>;

    /// Invocations of a workgroup.
    fn threads(&self) -> u32;

    /// Rows, and keys or columns, of the tile of a workgroup, if it has one.
    fn tile(&self) -> Option<[u32; 2]> {
        None
    }

    /// Bytes of workgroup memory.
    fn workgroup_bytes(&self) -> u32 {
        0
    }

    /// What the shader needs of a device beside limits.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// What the template of the shader is rendered with.
    fn context(&self) -> Value;

    /// What the planner asks of the kernel, if it is one of attention.
    fn attention(&self) -> Option<&dyn AttentionKernel> {
        None
    }
}

/// Optional features of a device that a shader uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// The adapter's own f16.
    pub f16: bool,
    /// 64-bit integers.
    pub int64: bool,
    /// Subgroup operations.
    pub subgroups: bool,
    /// Cooperative matrices (f16 operands, f32 sums) of this size.
    pub matrices: Option<u32>,
}
