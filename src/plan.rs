//! What a plan is: which kernels run a problem on a device, over which parts, in which order. Pure data; needs no device.
//! The module `planner` makes it.

pub(crate) mod choose;
pub(crate) mod lists;
pub(crate) mod measured;
pub mod model;
pub(crate) mod planner;
pub(crate) mod route;
mod stored;
pub mod work;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::contract::caps::Caps;
use crate::contract::error::counted;
use crate::contract::error::{Error, Result};
use crate::contract::options::{Kernel, Options};
use crate::contract::proof::Trial;
use crate::contract::shape::Shape;
use crate::contract::tensor::Tensor;
use crate::kernel::Variant;
use crate::kernel::slot::Slot;

use crate::dispatch::label::distinct;
use crate::dispatch::step::Step;
use crate::trace::{reasons, span};
use lists::Lists;
use measured::{Choice, Tuning};
use planner::Planner;

/// What runs: dispatches in order, grouped into slices that each keep to the work budget.
///
/// With serde, a plan is written with everything that it was made from, and is made anew when it is read:
/// [`Attention::prepare`](crate::Attention::prepare) trusts what a plan says about buffers. Where this version of the crate makes
/// another plan than the one that was written, reading it is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "stored::Stored", try_from = "stored::Stored")]
pub struct Plan {
    pub(crate) shape: Shape,
    pub(crate) caps: Caps,
    pub(crate) options: Options,
    pub(crate) steps: Vec<Step>,
    pub(crate) slices: Vec<Range<usize>>,
    pub(crate) scratch: Vec<(Slot, u64)>,
    pub(crate) choice: Choice,
    /// The trials that tell whether the driver computes the plan rightly; none where nothing runs.
    pub(crate) trials: Vec<Trial>,
    pub(crate) lists: Lists,
    pub(crate) reasons: Vec<String>,
}

impl Plan {
    /// Plans a checked problem for a device.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] if the device is below what every kernel needs, [`Error::Kernel`] if no kernel that [`Options`] allow can
    /// run the problem, [`Error::Room`] if a tensor, the scratch or the plan takes more than the device or the crate allows, and
    /// [`Error::Conflict`] if a 16-bit output must be summed in f32 scratch first and is not dense.
    pub fn new(shape: &Shape, caps: &Caps, options: &Options) -> Result<Plan> {
        Self::tuned(shape, caps, options, &Tuning::default())
    }

    /// The same, with rows that were measured on the device's adapter: the first one for the problem's class that can run chooses
    /// kernel and tile, unless [`Options`] ask for another kernel. The reasons say which row was followed, and why one was not.
    ///
    /// # Errors
    ///
    /// Those of [`Plan::new`].
    pub fn tuned(shape: &Shape, caps: &Caps, options: &Options, tuning: &Tuning) -> Result<Plan> {
        let span = span!(
            "plan",
            operation = "attention",
            batch = shape.problem.batch,
            heads = shape.problem.heads,
            kv_heads = shape.problem.kv_heads,
            seq_q = shape.problem.seq_q,
            seq_kv = shape.problem.seq_kv,
            head_dim = shape.problem.head_dim,
            element = %shape.problem.element,
        );
        span.within(|| {
            let plan = Self::planned(shape, caps, options, tuning)?;
            reasons(&plan.reasons);
            Ok(plan)
        })
    }

    fn planned(shape: &Shape, caps: &Caps, options: &Options, tuning: &Tuning) -> Result<Plan> {
        caps.check()?;
        // What no buffer of the device can hold cannot be there to be bound.
        let limit = caps.limits.max_buffer_size;
        for (slot, bytes) in tensors(shape) {
            if let Some(value) = bytes.filter(|&bytes| bytes > limit) {
                return Err(Error::bytes(slot.name(), value, limit));
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
        self.caps.alignment()
    }

    /// Estimated time, from a rate that adapters of this class reach easily: submit in between where it exceeds what the
    /// driver's watchdog allows.
    pub fn estimate(&self) -> Duration {
        Duration::from_secs_f64(self.steps.iter().map(|step| step.flops).sum::<f64>() / self.caps.flops_per_second())
    }

    /// The stages in order, each named once, see [`crate::kernel::Variant::stage`]; `none` where nothing runs.
    pub fn kernel(&self) -> String {
        let names = distinct(&self.steps, Variant::stage);
        if names.is_empty() { "none".into() } else { names.join("+") }
    }

    /// The kernel with its tile, as a tuned row names it, also where there is no row for it to run on.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// The trials of `matrix`, if the planner would take that kernel for this problem once they have proved it.
    pub(crate) fn hoped(&self, tuning: &Tuning) -> Vec<Trial> {
        let taken = self.choice.kernel() == Kernel::Matrix;
        if taken || self.caps.matrices.is_empty() || self.options.kernel.is_some() {
            return Vec::new();
        }
        let trials_of_matrix = |caps: &Caps, options: &Options| {
            let plan = Plan::planned(&self.shape, caps, options, tuning).ok();
            plan.filter(|plan| plan.choice.kernel() == Kernel::Matrix).map_or(Vec::new(), |plan| plan.trials)
        };
        let asked = Options { kernel: Some(Kernel::Matrix), ..self.options.clone() };
        let proved = trials_of_matrix(&self.caps, &asked);
        // Either `matrix` cannot run the problem, or it was proved, and the planner preferred another kernel.
        if proved.iter().all(|trial| self.caps.proved.contains(trial)) {
            return Vec::new();
        }
        trials_of_matrix(&Caps { proved, ..self.caps.clone() }, &self.options)
    }

    /// Why the plan is as it is, a sentence each: also why each kernel that was not chosen was not.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
}

/// Each tensor that a call binds, with its bytes: `None` where the problem has none of it.
pub(crate) fn tensors(shape: &Shape) -> [(Slot, Option<u64>); 9] {
    let tensor = |tensor: &Tensor| Some(tensor.extent() * shape.problem.element.bytes());
    let operand = |slot: Slot| (slot, slot.operand().and_then(|operand| operand.bytes(shape)));
    [
        (Slot::Q, tensor(&shape.q)),
        (Slot::K, tensor(&shape.k)),
        (Slot::V, tensor(&shape.v)),
        operand(Slot::Mask),
        operand(Slot::Bias),
        (Slot::Out, tensor(&shape.out)),
        (Slot::Lse, shape.problem.lse.then(|| 4 * shape.lse_len())),
        (Slot::Weights, shape.problem.weights.then(|| 4 * shape.scores_len())),
        (Slot::Logits, shape.problem.logits.map(|_| 4 * shape.scores_len())),
    ]
}

/// Refuses the number of a slice that is not there. There may be none at all, so that no largest number can be named.
pub(crate) fn no_more_slices(slice: usize, slices: usize) -> Result<()> {
    let (value, limit) = (slice as u64 + 1, slices as u64);
    if value <= limit { Ok(()) } else { Err(Error::TooLarge { field: "slice, counted from 1,", value, limit }) }
}

/// Writes each variant of the steps on a line of its own, with the number of its dispatches.
pub(crate) fn write_variants(f: &mut fmt::Formatter<'_>, steps: &[Step]) -> fmt::Result {
    let mut seen: Vec<(Variant, usize)> = Vec::new();
    for step in steps {
        match seen.iter_mut().find(|(variant, _)| *variant == step.variant) {
            Some((_, times)) => *times += 1,
            None => seen.push((step.variant, 1)),
        }
    }
    for (variant, times) in seen {
        writeln!(f, "  {times} × {variant}, {} bytes of workgroup memory", variant.workgroup_bytes())?;
    }
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.shape;
        writeln!(
            f,
            "attention {}×{}({})×{}×{}×{}({}) {}: {:.3} GFLOP",
            s.problem.batch,
            s.problem.heads,
            s.problem.kv_heads,
            s.problem.seq_q,
            s.problem.seq_kv,
            s.problem.head_dim,
            s.problem.value_dim,
            s.problem.element,
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
        write_variants(f, &self.steps)?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::operands::{Kind, Operand};
    use crate::contract::problem::{Element, Problem};
    use crate::contract::proof::{Failure, Proof};
    use crate::plan::measured::{Class, Row};

    /// A GPU with matrices that are faster than plain arithmetic.
    fn matrix_gpu() -> Caps {
        let lanes = Some(32);
        let limits = wgpu::Limits { max_compute_workgroup_storage_size: 49_152, ..wgpu::Limits::default() };
        let sizes =
            Caps { subgroup_size: lanes, subgroup_min_size: lanes, subgroup_max_size: lanes, ..Caps::new(limits) };
        Caps { f16: true, matrices: vec![16], ..sizes }
    }

    #[test]
    fn matrix_is_tried_before_the_first_plan_that_would_take_it() {
        let problem = Problem { element: Element::F16, ..Problem::new(1, 8, 512, 512, 64) };
        let shape = problem.check().unwrap();
        let plan =
            |caps: &Caps, options: &Options, tuning: &Tuning| Plan::tuned(&shape, caps, options, tuning).unwrap();
        let (own, none) = (Options::default(), Tuning::default());
        let trial = Trial::of(Kernel::Matrix, &shape, &own);
        let caps = matrix_gpu();
        let first = plan(&caps, &own, &none);
        assert_eq!((first.choice.kernel(), first.hoped(&none)), (Kernel::Flash, vec![trial]));
        // Proved, it is taken, and relied on.
        let proved = caps.after(&Proof { right: vec![trial], ..Proof::default() });
        let second = plan(&proved, &own, &none);
        assert_eq!((second.choice.kernel(), &second.trials), (Kernel::Matrix, &vec![trial]));
        // Where it failed, where another kernel is tuned or asked for, and where it would lose, nobody hopes for it.
        let failure = Failure::Kernel { trial, why: "the test says so".into() };
        let failed = plan(&caps.after(&Proof { failures: vec![failure], ..Proof::default() }), &own, &none);
        assert_eq!((failed.choice.kernel(), failed.hoped(&none)), (Kernel::Flash, Vec::new()));
        let row = Row { class: Class::of(&shape), choice: first.choice, ms: 1.0 };
        let tuning = Tuning { source: "a file".into(), rows: vec![row] };
        assert_eq!(plan(&caps, &own, &tuning).hoped(&tuning), []);
        let forced = Options { kernel: Some(Kernel::Flash), ..Options::default() };
        assert_eq!(plan(&caps, &forced, &none).hoped(&none), []);
        for other in [Caps { matrices: vec![8], ..matrix_gpu() }, Caps { cpu: true, ..matrix_gpu() }] {
            assert_eq!(plan(&other, &own, &none).hoped(&none), []);
        }
    }

    #[test]
    fn every_operand_that_is_a_tensor_is_bound() {
        let shape = Problem::new(1, 1, 1, 1, 1).check().unwrap();
        let bound: Vec<Operand> = tensors(&shape).into_iter().filter_map(|(slot, _)| slot.operand()).collect();
        assert_eq!(bound, Operand::of_kind(Kind::Tensor).collect::<Vec<_>>());
    }
}
