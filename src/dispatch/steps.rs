//! Dispatches in the making: cut to the limits of a device and to the work budget, and grouped into slices.

use std::ops::Range;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::dispatch::part::Part;
use crate::dispatch::step::{Bound, Step};
use crate::kernel::Variant;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;

/// Elements of an operand that a part touches, `[first, end)`.
pub(crate) type Span = (u64, u64);

/// Bytes of the scratch that stands for an output which is not asked for.
pub(crate) const SPARE: u64 = 256;

/// Dispatches in the making, cut to the limits of a device and to the work budget.
pub(crate) struct Steps<'a> {
    pub(crate) caps: &'a Caps,
    pub(crate) options: Options,
    flops_per_step: f64,
    pub(crate) list: Vec<Step>,
}

impl<'a> Steps<'a> {
    pub(crate) fn new(caps: &'a Caps, options: &Options) -> Self {
        let flops_per_step = caps.flops_per_second() * options.work_budget.as_secs_f64().max(1e-6);
        Steps { caps, options: options.clone(), flops_per_step, list: Vec::new() }
    }

    /// Cuts a step's workgroups, which all take the same time, into dispatches that keep to the work budget and the grid limits. A step
    /// without any workgroup is no dispatch.
    pub(crate) fn push(
        &mut self,
        part: &Part,
        variant: Variant,
        uniform: Uniform,
        bindings: Vec<Bound>,
        workgroups: u32,
        flops: f64,
    ) -> Result<()> {
        if workgroups == 0 {
            return Ok(());
        }
        let pieces = (flops / self.flops_per_step).ceil().clamp(1.0, f64::from(workgroups)) as u64;
        let piece = u64::from(workgroups).div_ceil(pieces).min(self.most()) as u32;
        check_dispatches(self.list.len() as u64 + u64::from(workgroups.div_ceil(piece)))?;
        let each = flops / f64::from(workgroups);
        let end = |first: u32| workgroups.min(first.saturating_add(piece));
        let whole = Step { part: part.clone(), variant, uniform, bindings, grid: [0; 3], flops };
        self.cut(&whole, workgroups, end, |n| each * f64::from(n))
    }

    /// The same where the first `n` workgroups take `flops(n)` operations.
    pub(crate) fn push_uneven(
        &mut self,
        part: &Part,
        variant: Variant,
        uniform: Uniform,
        bindings: Vec<Bound>,
        workgroups: u32,
        flops: impl Fn(u32) -> f64,
    ) -> Result<()> {
        if workgroups == 0 {
            return Ok(());
        }
        let (budget, most) = (self.flops_per_step, self.most());
        let pieces = (flops(workgroups) / budget).ceil().clamp(1.0, f64::from(workgroups)) as u64;
        check_dispatches(self.list.len() as u64 + pieces.max(u64::from(workgroups).div_ceil(most)))?;
        let end = |first: u32| {
            let done = flops(first);
            // The last end that keeps to the budget; one workgroup at least.
            let (mut low, mut high) = (first + 1, (u64::from(first) + most).min(workgroups.into()) as u32);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                (low, high) = if flops(middle) - done <= budget { (middle, high) } else { (low, middle - 1) };
            }
            low
        };
        let whole = Step { part: part.clone(), variant, uniform, bindings, grid: [0; 3], flops: flops(workgroups) };
        self.cut(&whole, workgroups, end, &flops)
    }

    /// How many work budgets so many operations take.
    pub(crate) fn budgets(&self, flops: f64) -> f64 {
        flops / self.flops_per_step
    }

    fn most(&self) -> u64 {
        let side = u64::from(self.caps.limits.max_compute_workgroups_per_dimension);
        side.saturating_mul(side).saturating_mul(side)
    }

    /// Adds the dispatches of a step whose grid is not known yet.
    fn cut(
        &mut self,
        whole: &Step,
        workgroups: u32,
        end: impl Fn(u32) -> u32,
        flops: impl Fn(u32) -> f64,
    ) -> Result<()> {
        assert_eq!(whole.uniform.layout(), whole.variant.layout(), "the uniform is another kernel's");
        let side = self.caps.limits.max_compute_workgroups_per_dimension.into();
        let mut first = 0;
        while first < workgroups {
            let end = end(first);
            check_dispatches(self.list.len() as u64 + 1)?;
            self.list.push(Step {
                uniform: whole.uniform.cut(first, end),
                grid: fold(end - first, side),
                flops: flops(end) - flops(first),
                ..whole.clone()
            });
            first = end;
        }
        Ok(())
    }

    /// The dispatches, and the slices that each keep to the work budget.
    pub(crate) fn finish(self) -> (Vec<Step>, Vec<Range<usize>>) {
        let slices = slices(&self.list, self.flops_per_step);
        (self.list, slices)
    }
}

/// Byte offset and size of the binding of a span, and the base address to use in it, `origin` being the place of
/// element (0, 0, 0, 0).
pub(crate) fn bind(caps: &Caps, (first, end): Span, bytes: u64, origin: u64) -> (u64, u64, u32) {
    let alignment = caps.alignment();
    let offset = first * bytes / alignment * alignment;
    let size = (end * bytes - offset).next_multiple_of(4);
    (offset, size, origin.wrapping_sub(offset / bytes) as u32)
}

/// The binding of a span, which must fit, and the base address to use in it, as [`bind`] gives them.
pub(crate) fn bound(
    caps: &Caps,
    slot: Slot,
    span: Span,
    bytes: u64,
    origin: u64,
    written: bool,
) -> Result<(Bound, u32)> {
    let (offset, size, base) = bind(caps, span, bytes, origin);
    match size <= caps.binding() {
        true => Ok((Bound { slot, offset, size, written }, base)),
        false => Err(Error::bytes(slot.name(), size, caps.binding())),
    }
}

/// Refuses what would take hours on any device, before the plan itself takes minutes and gigabytes. The uniforms of this many
/// dispatches fit the largest buffer that WebGPU guarantees.
pub(crate) fn check_dispatches(dispatches: u64) -> Result<()> {
    let limit = 1 << 18;
    let advice =
        "use a smaller batch or fewer rows in each call, or raise Options::scratch_budget or Options::work_budget";
    match dispatches <= limit {
        true => Ok(()),
        false => Err(Error::Room { field: "the plan", size: dispatches, unit: "dispatches", limit, advice }),
    }
}

/// A number of workgroups, or of what `unit` says, of one step.
pub(crate) fn checked_u32(unit: &'static str, size: u64) -> Result<u32> {
    // Workgroup numbers of a folded grid may overshoot; below 2^30 they cannot wrap.
    let limit = 1 << 30;
    let advice = "use a smaller batch, or give fewer rows or keys in each call";
    match size <= limit {
        true => Ok(size as u32),
        false => Err(Error::Room { field: "one step", size, unit, limit, advice }),
    }
}

/// Folds a number of workgroups into three axes, with little to spare.
fn fold(workgroups: u32, side: u64) -> [u32; 3] {
    let n = u64::from(workgroups);
    let z = n.div_ceil(side * side);
    let y = n.div_ceil(z).div_ceil(side);
    let x = n.div_ceil(y * z);
    [x as u32, y as u32, z as u32]
}

/// Groups steps into slices of at most `budget` operations; a step never exceeds it by more than rounding.
fn slices(steps: &[Step], budget: f64) -> Vec<Range<usize>> {
    let mut slices: Vec<Range<usize>> = Vec::new();
    let mut sum = 0.0;
    for (i, step) in steps.iter().enumerate() {
        match slices.last_mut() {
            Some(slice) if sum + step.flops <= budget => slice.end = i + 1,
            _ => {
                slices.push(i..i + 1);
                sum = 0.0;
            }
        }
        sum += step.flops;
    }
    slices
}
