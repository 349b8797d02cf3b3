//! What a plan is: which kernels run a problem on a device, over which parts, in which order. Pure data; needs no device.
//! `planner.rs` makes it.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::caps::Caps;
use crate::error::counted;
use crate::kernel::params::Params;
use crate::kernel::{Slot, Variant};
use crate::planner::{Lists, Planner};
use crate::shape::Shape;
use crate::tuned::{Choice, Tuning};
use crate::{Error, Result};

/// How attention is computed, to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// `scores`, `softmax` and `values`, with the score matrix in between; runs every problem on every device.
    Unfused,
    /// `rows`: fused, a query row per lane.
    Rows,
    /// `flash`: fused, tiled in workgroup memory.
    Flash,
    /// `matrix`: fused, products by cooperative matrices. f16 alone, on devices that have such matrices and were opened so that
    /// their sizes are known, see [`crate::Attention::with_adapter`].
    Matrix,
    /// `split`, and `merge` where several workgroups share the keys of a row: fused, for few queries.
    Split,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Kernel; 5] = [Kernel::Unfused, Kernel::Rows, Kernel::Flash, Kernel::Matrix, Kernel::Split];

    /// Its name, as `--kernel` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::Unfused => "unfused",
            Kernel::Rows => "rows",
            Kernel::Flash => "flash",
            Kernel::Matrix => "matrix",
            Kernel::Split => "split",
        }
    }
}

/// Body of a kernel to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Tiles in workgroup memory, for GPUs.
    Tiled,
    /// A row per lane, for CPU adapters.
    Lanes,
    /// `matrix` with plain numbers for matrices: slow, on every device with shader f16. The planner never chooses it by itself; it
    /// proves the rest of the kernel where there is no hardware for it.
    Emulated,
}

/// How to plan. The default lets the planner choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Forces a kernel; planning fails where it cannot run.
    pub kernel: Option<Kernel>,
    /// Forces a body of `scores` and `values`, and thereby these, or [`Form::Emulated`] of `matrix`, which must be forced with it;
    /// planning fails where it cannot run.
    pub form: Option<Form>,
    /// Forces f16 to be read with the adapter's own type (`true`) or unpacked from u32 (`false`).
    pub native_f16: Option<bool>,
    /// How many parts `split` makes of the keys does not depend on the batch size, so that a sequence gives the same bits in any
    /// company.
    pub batch_invariant: bool,
    /// Most bytes of the score scratch, and of what a fused kernel keeps between dispatches over the keys; the rows are chunked under
    /// it. Default 256 MiB.
    pub scratch_budget: u64,
    /// Most estimated work of one dispatch and of one slice, so that no driver's watchdog trips. Default 50 ms.
    pub work_budget: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            kernel: None,
            form: None,
            native_f16: None,
            batch_invariant: false,
            scratch_budget: 256 << 20,
            work_budget: Duration::from_millis(50),
        }
    }
}

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
    /// The shader.
    pub variant: Variant,
    /// Its uniform.
    pub params: Params,
    /// Its storage bindings 1, 2, …
    pub bindings: Vec<Bound>,
    /// Workgroups on the three grid axes: at least `params.end − params.first`.
    pub grid: [u32; 3],
    /// Estimated floating-point operations.
    pub flops: f64,
}

/// What runs: dispatches in order, grouped into slices that each keep to the work budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub(crate) shape: Shape,
    pub(crate) steps: Vec<Step>,
    pub(crate) slices: Vec<Range<usize>>,
    pub(crate) scratch: Vec<(Slot, u64)>,
    pub(crate) choice: Choice,
    pub(crate) lists: Lists,
    pub(crate) alignment: u64,
    pub(crate) flops_per_second: f64,
    pub(crate) reasons: Vec<String>,
}

impl Plan {
    /// Plans a checked problem for a device.
    pub fn new(shape: &Shape, caps: &Caps, options: &Options) -> Result<Plan> {
        Self::tuned(shape, caps, options, &Tuning::default())
    }

    /// The same, with rows that were measured on the device's adapter: the first one for the problem's class that can run chooses
    /// kernel and tile, unless [`Options`] ask for another kernel. The reasons say which row was followed, and why one was not.
    pub fn tuned(shape: &Shape, caps: &Caps, options: &Options, tuning: &Tuning) -> Result<Plan> {
        caps.check()?;
        // What no buffer of the device can hold cannot be there to be bound.
        let limit = caps.limits.max_buffer_size;
        for (field, bytes) in shape.tensor_bytes() {
            if let Some(value) = bytes.filter(|&bytes| bytes > limit) {
                return Err(Error::bytes(field, value, limit));
            }
        }
        Planner::new(shape, caps, options, tuning)?.plan()
    }

    /// The problem.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The dispatches in order. There are none where the problem has no query row: nothing is written then.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How many dispatches there are.
    pub fn dispatches(&self) -> usize {
        self.steps.len()
    }

    /// How many slices there are: parts of the work that may be submitted one by one, in order.
    pub fn slices(&self) -> usize {
        self.slices.len()
    }

    /// The dispatches of a slice.
    ///
    /// # Panics
    ///
    /// If there is no such slice.
    pub fn slice(&self, slice: usize) -> &[Step] {
        &self.steps[self.slices[slice].clone()]
    }

    pub(crate) fn check_slice(&self, slice: usize) -> Result<()> {
        no_more_slices(slice, self.slices())
    }

    pub(crate) fn slice_range(&self, slice: usize) -> Range<usize> {
        self.slices[slice].clone()
    }

    /// Bytes of device memory that `prepare` allocates for intermediate results.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.iter().map(|(_, bytes)| bytes).sum()
    }

    /// The buffers of these bytes.
    pub(crate) fn scratch(&self) -> &[(Slot, u64)] {
        &self.scratch
    }

    pub(crate) fn lists(&self) -> &Lists {
        &self.lists
    }

    pub(crate) fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Estimated time, from a rate that adapters of this class reach easily: submit in between where it exceeds what the
    /// driver's watchdog allows.
    pub fn estimate(&self) -> Duration {
        Duration::from_secs_f64(self.steps.iter().map(|step| step.flops).sum::<f64>() / self.flops_per_second)
    }

    /// The kernels in order, each named once; `none` where nothing runs.
    pub fn kernel(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for step in &self.steps {
            if !names.contains(&step.variant.kernel()) {
                names.push(step.variant.kernel());
            }
        }
        if names.is_empty() { "none".into() } else { names.join("+") }
    }

    /// The kernel with its tile, as a tuned row names it, also where there is no row for it to run on.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Why the plan is as it is, a sentence each: also why each kernel that was not chosen was not.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
}

/// Refuses the number of a slice that is not there. There may be none at all, so that no largest number can be named.
pub(crate) fn no_more_slices(slice: usize, slices: usize) -> Result<()> {
    let (value, limit) = (slice as u64 + 1, slices as u64);
    if value <= limit { Ok(()) } else { Err(Error::TooLarge { field: "slice, counted from 1,", value, limit }) }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.shape;
        writeln!(
            f,
            "attention {}×{}({})×{}×{}×{}({}) {}: {:.3} GFLOP",
            s.batch,
            s.heads,
            s.kv_heads,
            s.seq_q,
            s.seq_kv,
            s.head_dim,
            s.value_dim,
            s.element,
            s.flops() / 1e9
        )?;
        writeln!(
            f,
            "{} in {}, {} of scratch, estimated {:.1} ms",
            counted(self.steps.len(), "dispatch"),
            counted(self.slices.len(), "slice"),
            counted(self.scratch_bytes() as usize, "byte"),
            self.estimate().as_secs_f64() * 1e3
        )?;
        let mut seen: Vec<(Variant, usize)> = Vec::new();
        for step in &self.steps {
            match seen.iter_mut().find(|(variant, _)| *variant == step.variant) {
                Some((_, times)) => *times += 1,
                None => seen.push((step.variant, 1)),
            }
        }
        for (variant, times) in seen {
            writeln!(f, "  {times} × {variant}, {} bytes of workgroup memory", variant.workgroup_bytes())?;
        }
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        Ok(())
    }
}
