//! Why a kernel cannot run a problem on a device.

use std::fmt;

use crate::contract::options::Kernel;
use crate::contract::problem::Element;

/// Why a kernel cannot run a problem on a device, or not with what [`crate::Options`] ask for.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Obstacle {
    /// [`crate::Form::Emulated`] is asked for, which only `matrix` has.
    NotEmulated,
    /// The keys are in pages.
    Pages,
    /// The sequences are packed.
    PackedSequences,
    /// A lane of `rows` cannot hold a row in its registers.
    LaneDims {
        /// The larger one of head_dim and value_dim.
        dims: u32,
    },
    /// The lanes of `split` cannot hold a row in their registers, or none of its tiles fits the device.
    SplitDims {
        /// The larger one of head_dim and value_dim.
        dims: u32,
    },
    /// Every tile needs more workgroup memory or more invocations than the device has.
    NoTile,
    /// The kernel binds more storage buffers than a shader of the device may have.
    Bindings {
        /// The storage buffers that the kernel binds.
        needed: u32,
        /// The most that the device binds.
        limit: u32,
    },
    /// Logits are asked for, and the kernel keeps no score matrix.
    Logits,
    /// The adapter's own f16 is asked for, and the kernel reads f16 from u32.
    PackedF16,
    /// The adapter's own f16 is asked for, and the lane form of `scores` and `values` reads f16 from u32.
    LanesPackedF16,
    /// f16 from u32 is asked for, and the kernel reads f16 with the adapter's own type.
    OwnF16,
    /// Shaders of the device may not use f16.
    NoF16,
    /// The kernel takes f16 alone.
    NotF16 {
        /// The element type of the problem.
        element: Element,
    },
    /// The device has no cooperative matrices that the kernel can use, or they are not known.
    NoMatrices,
    /// Subgroups may have more lanes than the kernel can use, or their size is not known.
    SubgroupLanes {
        /// The most lanes that the kernel can use.
        limit: u32,
    },
    /// The lane form of `scores` is asked for and cannot write these weights.
    LanesWeights {
        /// The keys of a row, no multiple of four.
        seq_kv: u32,
    },
    /// A 16-bit output is rounded from an f32 result, which is too large.
    Partials {
        /// The bytes of the larger one of the two buffers of the result.
        bytes: u64,
        /// The most bytes that a binding and the scratch budget allow.
        limit: u64,
    },
    /// The keys or values of a head do not fit one binding, and the kernel cannot walk them in several dispatches.
    LongKeys,
    /// The loops of an invocation have more iterations than a CPU adapter runs, and the kernel cannot divide them into several
    /// dispatches.
    LoopIterations {
        /// The iterations of all loops of an invocation together, at most.
        iterations: u64,
        /// The most iterations that a CPU adapter runs.
        limit: u64,
    },
    /// The problem is too long for one dispatch, and several dispatches are not possible either.
    SeveralDispatches {
        /// Why one dispatch is not enough.
        one: Box<Obstacle>,
        /// Why several dispatches are not possible.
        several: Box<Obstacle>,
    },
    /// The results of the parts of the keys, which are merged afterwards, are too large.
    PartResults {
        /// The bytes of the larger one of the two buffers of the results.
        bytes: u64,
        /// The most bytes that a binding and the scratch budget allow.
        limit: u64,
    },
    /// What a workgroup keeps between two dispatches is too large.
    State {
        /// The bytes of a workgroup.
        bytes: u64,
        /// The most bytes that a binding and the scratch budget allow.
        limit: u64,
    },
    /// The kernel gave wrong results in a trial on the device's driver, see [`crate::Gpu::prove`].
    Unproved {
        /// What was wrong with the results.
        why: String,
    },
    /// No kernel at all can run the problem.
    Every {
        /// Why `scores`, `softmax` and `values` cannot.
        unfused: Box<Obstacle>,
        /// Why each fused kernel cannot.
        fused: Vec<(Kernel, Obstacle)>,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NotEmulated => f.write_str("it has no emulated form; matrix has one"),
            Obstacle::Pages => f.write_str("it reads no keys in pages"),
            Obstacle::PackedSequences => f.write_str("it takes no packed sequences"),
            Obstacle::LaneDims { dims } => write!(f, "{dims} dims do not fit a lane's registers"),
            Obstacle::SplitDims { dims } => {
                write!(f, "{dims} dims do not fit its lanes' registers, or its tiles not the device")
            }
            Obstacle::NoTile => f.write_str("no tile fits the device's workgroup memory and invocations"),
            Obstacle::Bindings { needed, limit } => {
                write!(f, "it binds {needed} storage buffers, the device {limit}")
            }
            Obstacle::Logits => f.write_str("logits need the score matrix"),
            Obstacle::PackedF16 => f.write_str("it reads f16 packed"),
            Obstacle::LanesPackedF16 => f.write_str("the lane form reads f16 packed"),
            Obstacle::OwnF16 => f.write_str("it reads f16 with the adapter's own type"),
            Obstacle::NoF16 => f.write_str("the device has no shader f16"),
            Obstacle::NotF16 { element } => write!(f, "its operands are f16; {element} would lose digits or range"),
            Obstacle::NoMatrices => {
                f.write_str("the device has no cooperative matrices of f16 with f32 sums, or its adapter is not known")
            }
            Obstacle::SubgroupLanes { limit } => write!(f, "subgroups of at most {limit} lanes are needed"),
            Obstacle::LanesWeights { .. } => {
                f.write_str("the lane form of scores writes no rows of weights that are not whole vectors of four")
            }
            Obstacle::Partials { .. } => f.write_str("its results in f32 exceed a binding or the scratch budget"),
            Obstacle::LongKeys => f.write_str("keys or values of one head exceed a binding"),
            Obstacle::LoopIterations { iterations, limit } => {
                write!(f, "its loops take {iterations} iterations, and those of a CPU adapter {limit} at most")
            }
            Obstacle::SeveralDispatches { one, several } => match &**several {
                Obstacle::Bindings { .. } => write!(f, "{one}; in several dispatches {several}"),
                _ => write!(f, "{one}; {several}"),
            },
            Obstacle::PartResults { .. } => {
                f.write_str("the results of its parts exceed a binding or the scratch budget")
            }
            Obstacle::State { .. } => {
                f.write_str("what waits between dispatches exceeds a binding or the scratch budget")
            }
            Obstacle::Unproved { why } => write!(f, "it failed its proof on this driver: {why}"),
            Obstacle::Every { unfused, fused } => {
                write!(f, "{unfused}")?;
                fused.iter().try_for_each(|(kernel, why)| write!(f, "; not kernel {}: {why}", kernel.name()))
            }
        }
    }
}
