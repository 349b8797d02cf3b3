//! What one call of a layer runs, as pure data: the operations around attention, attention itself, and the buffers between them.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::contract::caps::Caps;
use crate::contract::error::{Result, counted};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Problem};
use crate::dispatch::step::Step;
use crate::kernel::slot::Slot;
use crate::layer::operation::LayerOperation;
use crate::layer::parameters::Parameters;
use crate::layer::planner::Planner;
use crate::layer::projected::Projected;
use crate::layer::{Call, Layer};
use crate::plan::measured::Tuning;
use crate::plan::{Plan, write_variants};
use crate::trace::{self, span};

/// The operations on one side of attention, and their dispatches.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) operations: Vec<LayerOperation>,
    pub(crate) steps: Vec<Step>,
    pub(crate) slices: Vec<Range<usize>>,
}

impl Stage {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.operations.iter().try_for_each(|operation| writeln!(f, "  {operation}"))?;
        write_variants(f, &self.steps)
    }
}

/// What one call of a [`Layer`] runs on a device, as pure data: the dispatches before attention, its [`Plan`], and the dispatches
/// after it. [`MultiHeadAttention::prepare`](crate::multihead::MultiHeadAttention::prepare) compiles and allocates what the plan says. Print a plan to read it.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    call: Call,
    pub(crate) projected: [Projected; 3],
    pub(crate) before: Stage,
    attention: Plan,
    pub(crate) after: Stage,
    scratch: Vec<(Slot, u64)>,
    zeros: u64,
    zero_attn: bool,
    reasons: Vec<String>,
}

impl LayerPlan {
    /// Plans a call of a layer, whose weights will be of type `element`, for a device. Needs no device.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the layer or the call, and what is too large for the device.
    pub fn new(
        layer: &Layer,
        element: Element,
        problem: &Problem,
        call: &Call,
        caps: &Caps,
        options: &Options,
    ) -> Result<LayerPlan> {
        layer.check()?;
        caps.check()?;
        let parameters = Parameters::new(layer, element, caps)?;
        Self::tuned(layer, &parameters, problem, call, caps, options, &Tuning::default())
    }

    /// The same for a layer whose weights may be elsewhere, with rows that were measured on the device's adapter.
    pub(crate) fn tuned(
        layer: &Layer,
        parameters: &Parameters,
        problem: &Problem,
        call: &Call,
        caps: &Caps,
        options: &Options,
        tuning: &Tuning,
    ) -> Result<LayerPlan> {
        span!("plan", operation = "multi-head attention").within(|| {
            layer.check_call_sizes(problem, call)?;
            let planner = Planner::new(layer, parameters, problem, call, caps)?;
            let (before, reasons) = planner.before();
            let before = planner.stage(before, options)?;
            let after = planner.stage(planner.after(), options)?;
            let attention = Plan::tuned(&planner.attention, caps, options, tuning)?;
            let zeros = 4 * u64::from(problem.batch.max(layer.heads));
            let scratch = planner.scratch(zeros)?;
            let (call, projected, zero_attn) = (*call, planner.projected, layer.zero_attn);
            trace::reasons(&reasons);
            Ok(LayerPlan { call, projected, before, attention, after, scratch, zeros, zero_attn, reasons })
        })
    }

    /// How the layer is called.
    pub fn call(&self) -> &Call {
        &self.call
    }

    /// The plan of the attention inside.
    pub fn attention(&self) -> &Plan {
        &self.attention
    }

    /// The dispatches before attention: projections, rotary embedding, and what goes into the cache.
    pub fn before(&self) -> &[Step] {
        &self.before.steps
    }

    /// The dispatches after attention: the added key, the output projection, and the weights that leave the layer.
    pub fn after(&self) -> &[Step] {
        &self.after.steps
    }

    /// The dispatches of the whole layer in order. Those of attention name its tensors as every [`Plan`] does:
    /// [`LayerPlan::attention_buffer`] says which buffer of the layer each is.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.before.steps.iter().chain(self.attention.steps()).chain(&self.after.steps)
    }

    /// How many slices there are: parts of the work that may be submitted one by one, in order.
    pub fn slices(&self) -> usize {
        self.before.slices.len() + self.attention.slices() + self.after.slices.len()
    }

    /// The buffer of the layer that attention binds as one of its own tensors.
    pub fn attention_buffer(&self, tensor: Slot) -> Slot {
        let [q, k, v] = &self.projected;
        match tensor {
            Slot::Q => q.output,
            Slot::K if self.call.cache => Slot::KeyCache,
            Slot::V if self.call.cache => Slot::ValueCache,
            Slot::K => k.output,
            Slot::V => v.output,
            // Where no kernel changes the weights on their way out, attention writes them into the caller's buffer.
            Slot::Weights if self.scratch.iter().all(|(slot, _)| *slot != Slot::Weights) => Slot::Averaged,
            other => other,
        }
    }

    /// The buffers between the operations with their bytes, without the scratch of attention itself.
    pub fn scratch(&self) -> &[(Slot, u64)] {
        &self.scratch
    }

    /// Bytes of device memory that preparing allocates for intermediate results.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.iter().map(|(_, bytes)| bytes).sum::<u64>() + self.attention.scratch_bytes()
    }

    /// Bytes of zeros that the layer binds for positions and sinks.
    pub(crate) fn zeros(&self) -> u64 {
        self.zeros
    }

    /// Whether zeros are the sinks of attention.
    pub(crate) fn zero_sinks(&self) -> bool {
        self.zero_attn
    }

    /// Why the steps around attention are as they are, a sentence each; [`LayerPlan::attention`] has those of attention.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// Estimated time, as [`Plan::estimate`].
    pub fn estimate(&self) -> Duration {
        let flops = self.steps().map(|step| step.flops).sum::<f64>();
        Duration::from_secs_f64(flops / self.attention.caps.flops_per_second())
    }
}

impl fmt::Display for LayerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "layer: {} in {}, {} of scratch, estimated {:.1} ms",
            counted(self.steps().count(), "dispatch"),
            counted(self.slices(), "slice"),
            counted(self.scratch_bytes() as usize, "byte"),
            self.estimate().as_secs_f64() * 1e3
        )?;
        writeln!(f, "before attention")?;
        self.before.write(f)?;
        write!(f, "{}", self.attention)?;
        writeln!(f, "after attention")?;
        self.after.write(f)?;
        self.reasons.iter().try_for_each(|reason| writeln!(f, "  {reason}"))
    }
}
