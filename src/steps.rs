//! Dispatches in the making: cut to the limits of a device and to the work budget, and grouped into slices.

use std::ops::Range;

use crate::caps::Caps;
use crate::kernel::Variant;
use crate::kernel::params::Params;
use crate::plan::{Bound, Options, Step};
use crate::{Error, Result, tuning};

/// Elements of an operand that a part touches, `[first, end)`.
pub(crate) type Span = (u64, u64);

/// Dispatches in the making, cut to the limits of a device and to the work budget.
pub(crate) struct Steps<'a> {
    caps: &'a Caps,
    flops_per_step: f64,
    pub(crate) list: Vec<Step>,
}

impl<'a> Steps<'a> {
    pub(crate) fn new(caps: &'a Caps, options: &Options) -> Self {
        let flops_per_step = flops_per_second(caps) * options.work_budget.as_secs_f64().max(1e-6);
        Steps { caps, flops_per_step, list: Vec::new() }
    }

    /// Cuts a step's workgroups into dispatches that keep to the work budget and the grid limits. A step without any is none.
    pub(crate) fn push(
        &mut self,
        variant: Variant,
        params: Params,
        bindings: Vec<Bound>,
        workgroups: u32,
        flops: f64,
    ) -> Result<()> {
        if workgroups == 0 {
            return Ok(());
        }
        let side = u64::from(self.caps.limits.max_compute_workgroups_per_dimension);
        let most = side.saturating_mul(side).saturating_mul(side).min(u64::from(workgroups));
        let pieces = (flops / self.flops_per_step).ceil().clamp(1.0, f64::from(workgroups)) as u64;
        let piece = u64::from(workgroups).div_ceil(pieces).min(most) as u32;
        few(self.list.len() as u64 + u64::from(workgroups.div_ceil(piece)))?;
        let mut first = 0;
        while first < workgroups {
            let end = workgroups.min(first + piece);
            self.list.push(Step {
                variant,
                params: Params { first, end, ..params },
                bindings: bindings.clone(),
                grid: fold(end - first, side),
                flops: flops * f64::from(end - first) / f64::from(workgroups),
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

pub(crate) fn flops_per_second(caps: &Caps) -> f64 {
    if caps.cpu { tuning::CPU_FLOPS } else { tuning::GPU_FLOPS }
}

/// Byte offset and size of the binding of a span, and the base address to use in it, `origin` being the place of
/// element (0, 0, 0, 0).
pub(crate) fn bind(caps: &Caps, (first, end): Span, bytes: u64, origin: u64) -> (u64, u64, u32) {
    let alignment = caps.alignment();
    let offset = first * bytes / alignment * alignment;
    let size = (end * bytes - offset).next_multiple_of(4);
    (offset, size, origin.wrapping_sub(offset / bytes) as u32)
}

/// Refuses what would take hours on any device, before the plan itself takes minutes and gigabytes. The uniforms of this many
/// dispatches fit the largest buffer that WebGPU guarantees.
pub(crate) fn few(dispatches: u64) -> Result<()> {
    let limit = 1 << 18;
    let advice =
        "use a smaller batch or fewer rows in each call, or raise Options::scratch_budget or Options::work_budget";
    match dispatches <= limit {
        true => Ok(()),
        false => Err(Error::Room { field: "the plan", size: dispatches, unit: "dispatches", limit, advice }),
    }
}

/// A number of workgroups, or of what `unit` says, of one step.
pub(crate) fn small(unit: &'static str, size: u64) -> Result<u32> {
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
