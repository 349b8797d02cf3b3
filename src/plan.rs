//! How a problem runs on a device: which kernels, over which parts, in which order. Pure data; needs no device.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::caps::Caps;
use crate::kernel::params::{Params, flags};
use crate::kernel::{
    Body, Format, Slot, Tile, Variant, export, flash, logits, pack, rows, scores, softmax, split, values,
};
use crate::merge::Merge;
use crate::problem::{Broadcast, Causal, Element, Layout, Logits};
use crate::shape::{Shape, Tensor};
use crate::{Error, Result, tuning};

/// How attention is computed, to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// `scores`, `softmax` and `values`, with the score matrix in between; runs every problem on every device.
    Unfused,
    /// `rows`: fused, a query row per lane.
    Rows,
    /// `flash`: fused, tiled in workgroup memory.
    Flash,
    /// `split`, and `merge` where several workgroups share the keys of a row: fused, for few queries.
    Split,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Kernel; 4] = [Kernel::Unfused, Kernel::Rows, Kernel::Flash, Kernel::Split];

    /// Its name, as `--kernel` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::Unfused => "unfused",
            Kernel::Rows => "rows",
            Kernel::Flash => "flash",
            Kernel::Split => "split",
        }
    }
}

/// Body of `scores` and `values` to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Tiles in workgroup memory, for GPUs.
    Tiled,
    /// A row per lane, for CPU adapters.
    Lanes,
}

/// How to plan. The default lets the planner choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Forces a kernel; planning fails where it cannot run.
    pub kernel: Option<Kernel>,
    /// Forces a body of `scores` and `values`, and thereby these; planning fails where it cannot run.
    pub form: Option<Form>,
    /// Forces f16 to be read with the adapter's own type (`true`) or unpacked from u32 (`false`).
    pub native_f16: Option<bool>,
    /// How many parts `split` makes of the keys does not depend on the batch size, so that a sequence gives the same bits in any
    /// company.
    pub batch_invariant: bool,
    /// Most bytes of the score scratch; the rows are chunked under it. Default 256 MiB.
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
    shape: Shape,
    steps: Vec<Step>,
    slices: Vec<Range<usize>>,
    scratch: Vec<(Slot, u64)>,
    lists: Lists,
    alignment: u64,
    flops_per_second: f64,
    reasons: Vec<String>,
}

/// Places of the small arrays, in u32 words of one buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lists {
    pub(crate) lengths: u32,
    pub(crate) offsets: u32,
    pub(crate) slopes: u32,
    pub(crate) sinks: u32,
    pub(crate) cu_q: u32,
    pub(crate) cu_kv: u32,
    pub(crate) words: u32,
}

impl Lists {
    fn new(shape: &Shape) -> Self {
        // A word of padding stands for no list at all: a binding may not be empty.
        let mut words = 4;
        let mut place = |present: bool, n: u32| {
            let at = words;
            words += if present { n } else { 0 };
            at
        };
        let packed = shape.packed.is_some();
        let mut lists = Lists {
            lengths: place(shape.key_lengths, shape.batch),
            offsets: place(shape.causal == Causal::Offset, shape.batch),
            slopes: place(shape.alibi, shape.heads),
            sinks: 0,
            cu_q: place(packed, shape.batch + 1),
            cu_kv: place(packed, shape.batch + 1),
            words: 0,
        };
        // Where a binding may begin.
        lists.sinks = words.next_multiple_of(64);
        lists.words = if shape.sinks { lists.sinks + shape.heads } else { words };
        lists
    }

    pub(crate) fn bytes(&self) -> u64 {
        4 * u64::from(self.words)
    }
}

/// A box of the score matrix that is worked on at once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    batch: Range<u32>,
    heads: Range<u32>,
    rows: Range<u32>,
}

impl Part {
    fn planes(&self) -> u64 {
        count(&self.batch) * count(&self.heads)
    }
}

fn count(range: &Range<u32>) -> u64 {
    u64::from(range.end - range.start)
}

/// Elements of an operand that a part touches, `[first, end)`.
pub(crate) type Span = (u64, u64);

impl Plan {
    /// Plans a checked problem for a device.
    pub fn new(shape: &Shape, caps: &Caps, options: &Options) -> Result<Plan> {
        caps.check()?;
        Planner::new(shape, caps, options)?.plan()
    }

    /// The problem.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The dispatches in order.
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
    pub fn slice(&self, slice: usize) -> &[Step] {
        &self.steps[self.slices[slice].clone()]
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

    /// The kernels in order, each named once.
    pub fn kernel(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for step in &self.steps {
            if !names.contains(&step.variant.kernel()) {
                names.push(step.variant.kernel());
            }
        }
        names.join("+")
    }

    /// Why the plan is as it is, a sentence each.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
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
            "{} dispatches in {} slices, {} bytes of scratch, estimated {:.1} ms",
            self.steps.len(),
            self.slices.len(),
            self.scratch_bytes(),
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

/// Dispatches in the making, cut to the limits of a device and to the work budget.
pub(crate) struct Steps<'a> {
    caps: &'a Caps,
    flops_per_step: f64,
    list: Vec<Step>,
}

impl<'a> Steps<'a> {
    pub(crate) fn new(caps: &'a Caps, options: &Options) -> Self {
        let flops_per_step = flops_per_second(caps) * options.work_budget.as_secs_f64().max(1e-6);
        Steps { caps, flops_per_step, list: Vec::new() }
    }

    /// Cuts a step's workgroups into dispatches that keep to the work budget and the grid limits.
    pub(crate) fn push(
        &mut self,
        variant: Variant,
        params: Params,
        bindings: Vec<Bound>,
        workgroups: u32,
        flops: f64,
    ) -> Result<()> {
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

fn flops_per_second(caps: &Caps) -> f64 {
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

struct Planner<'a> {
    shape: &'a Shape,
    caps: &'a Caps,
    budget: u64,
    flops_per_second: f64,
    lists: Lists,
    /// The fused kernel; otherwise `scores`, `softmax` and `values`.
    fused: Option<Variant>,
    /// Parts that `split` makes of the keys, 0 where it writes the output itself and leaves nothing to merge.
    partials: u32,
    scores: scores::Scores,
    softmax: softmax::Softmax,
    values: values::Values,
    /// The transform runs as a pass of its own.
    separate: bool,
    /// Keys of one dispatch where a head's keys or values exceed a binding.
    key_step: u32,
    /// `out` is written in f32 and packed afterwards.
    unpacked: bool,
    steps: Steps<'a>,
    scratch: u64,
    reasons: Vec<String>,
}

impl<'a> Planner<'a> {
    fn new(shape: &'a Shape, caps: &'a Caps, options: &Options) -> Result<Self> {
        let mut reasons = Vec::new();
        let key_step = key_step(shape, caps)?;
        let fused = choose_fused(shape, caps, options, key_step, &mut reasons)?;
        let (body, why) = choose_body(caps, options);
        if fused.is_none() {
            reasons.push(format!("scores and values in the form: {body} ({why})"));
        }
        let native = choose_native(shape, caps, body, options)?;
        let format = |tensors: &[&Tensor]| Format {
            element: shape.element,
            native,
            vector: tensors.iter().all(|t| whole_vectors(t)),
        };
        let operands = transforms(shape) || shape.wants(Logits::Masked);
        let room =
            caps.limits.max_storage_buffers_per_shader_stage >= 6 && caps.limits.max_bindings_per_bind_group >= 7;
        let early = shape.wants(Logits::Raw) || shape.wants(Logits::Capped);
        let separate = operands && (early || !room || body != Body::Tiled);
        if separate && fused.is_none() {
            reasons.push(if early {
                "the score transform is a pass of its own, because scores before it are asked for".into()
            } else if room {
                "the score transform is a pass of its own: unrolled in the lane form it would compile for seconds".into()
            } else {
                format!(
                    "the score transform is a pass of its own: scores cannot bind q, k, scores, lists, mask and bias under {} storage buffers",
                    caps.limits.max_storage_buffers_per_shader_stage
                )
            });
        }
        let qk = format(&[&shape.q, &shape.k]);
        let vo = format(&[&shape.v, &shape.out]);
        for (what, format) in [("q or k", qk), ("v or out", vo)] {
            if !format.vector {
                reasons
                    .push(format!("{what} has rows that are not whole vectors of four: elements are read one by one"));
            }
        }
        if key_step < shape.seq_kv {
            reasons.push(format!("keys or values of one head exceed a binding: {key_step} keys a dispatch"));
        }
        let direct = match &fused {
            Some(Variant::Rows(x)) => x.format.vector,
            Some(Variant::Flash(x)) => x.format.vector,
            _ => vo.vector,
        };
        let partials = match &fused {
            Some(Variant::Split(x)) => partials(shape, caps, options, x),
            _ => 0,
        };
        if partials > 0 {
            reasons.push(format!("the keys of a row go to {partials} workgroups, whose results are merged"));
        }
        // `merge` sees to its output itself.
        let unpacked = shape.element != Element::F32 && partials == 0 && (!direct || key_step < shape.seq_kv);
        if unpacked {
            if !shape.out.is_dense() {
                return Err(Error::Conflict {
                    left: "element",
                    right: "out",
                    why: "16-bit rows that are not whole vectors of four, or whose keys are split over dispatches, need a dense out",
                });
            }
            reasons.push("out is summed in an f32 scratch and packed to 16 bits afterwards".into());
        }
        let scores =
            scores::Scores { tile: scores_tile(shape, caps, body, qk)?, format: qk, full: operands && !separate };
        let out = if unpacked { Element::F32 } else { shape.element };
        let values = values::Values { tile: values_tile(shape, caps, body, vo)?, format: vo, out };
        let threads = match (caps.cpu, shape.seq_kv) {
            (true, _) => tuning::SOFTMAX_THREADS[0],
            (false, ..=512) => tuning::SOFTMAX_THREADS[1],
            (false, _) => tuning::SOFTMAX_THREADS[2],
        };
        let threads = threads
            .min(caps.limits.max_compute_invocations_per_workgroup)
            .min(caps.limits.max_compute_workgroup_size_x);
        let threads =
            tuning::SOFTMAX_THREADS.into_iter().rev().find(|&t| t <= threads).expect("8 is below every floor");
        Ok(Planner {
            shape,
            caps,
            budget: caps.binding().min(options.scratch_budget),
            flops_per_second: flops_per_second(caps),
            lists: Lists::new(shape),
            fused,
            partials,
            scores,
            softmax: softmax::Softmax { threads, lse: shape.lse },
            values,
            separate,
            key_step,
            unpacked,
            steps: Steps::new(caps, options),
            scratch: 0,
            reasons,
        })
    }

    fn plan(mut self) -> Result<Plan> {
        if self.lists.bytes() > self.caps.binding() {
            let limit = self.caps.binding();
            return Err(Error::TooLarge { field: "per-batch and per-head arrays", value: self.lists.bytes(), limit });
        }
        let s = self.shape;
        let mut parts = Vec::new();
        self.divide(Part { batch: 0..s.batch, heads: 0..s.heads, rows: 0..s.seq_q }, &mut parts)?;
        if parts.len() > 1 {
            self.reasons.push(format!(
                "the score matrix of {} bytes runs in {} parts under the scratch budget and binding limit of {} bytes",
                4 * s.scores_len(),
                parts.len(),
                self.budget
            ));
        }
        for part in &parts {
            self.part(part)?;
        }
        let mut scratch = vec![(Slot::Scores, self.scratch)];
        if self.partials > 0 {
            let merge = Merge {
                partials: self.partials,
                batch: s.batch,
                heads: s.heads,
                seq_q: s.seq_q,
                value_dim: s.value_dim,
                element: s.element,
                out: Layout::Strided(s.out.strides),
                lse: s.lse,
                sinks: s.sinks,
            };
            let [totals, unpacked] = merge.append(self.caps, &mut self.steps)?;
            let [out, lse] = partial_bytes(s, self.partials);
            scratch.extend([(Slot::PartialOut, out), (Slot::PartialLse, lse)]);
            scratch.extend([(Slot::Totals, totals), (Slot::Unpacked, unpacked)]);
        }
        if self.unpacked {
            let unpacked = 4 * s.out.extent();
            if unpacked > self.caps.limits.max_buffer_size {
                let limit = self.caps.limits.max_buffer_size;
                return Err(Error::TooLarge { field: "out in f32", value: unpacked, limit });
            }
            pack(self.caps, s.element, s.out.extent(), &mut self.steps)?;
            scratch.push((Slot::Unpacked, unpacked));
        }
        let spare = self.steps.list.iter().any(|step| step.bindings.iter().any(|bound| bound.slot == Slot::Spare));
        scratch.push((Slot::Spare, if spare { SPARE } else { 0 }));
        scratch.retain(|(_, bytes)| *bytes > 0);
        let (steps, slices) = self.steps.finish();
        Ok(Plan {
            shape: s.clone(),
            steps,
            slices,
            scratch,
            lists: self.lists,
            alignment: self.caps.alignment(),
            flops_per_second: self.flops_per_second,
            reasons: self.reasons,
        })
    }

    /// Halves a part until each of its operands fits one binding and its scores fit the scratch.
    fn divide(&self, part: Part, parts: &mut Vec<Part>) -> Result<()> {
        let Some((field, value, limit)) = self.excess(&part) else {
            parts.push(part);
            return few(parts.len() as u64);
        };
        let half = |range: &Range<u32>, step: u32| {
            let middle = range.start + ((range.end - range.start) / 2).next_multiple_of(step);
            if middle < range.end { middle } else { range.start + (range.end - range.start) / 2 }
        };
        let s_group = self.shape.group;
        let (mut low, mut high) = (part.clone(), part.clone());
        if count(&part.batch) > 1 {
            let at = half(&part.batch, 1);
            (low.batch.end, high.batch.start) = (at, at);
        } else if count(&part.heads) > 1 {
            // `split` takes the query heads of a key/value head together.
            let at = half(&part.heads, if matches!(self.fused, Some(Variant::Split(_))) { s_group } else { 1 });
            (low.heads.end, high.heads.start) = (at, at);
        } else if count(&part.rows) > 1 {
            let at = half(&part.rows, self.scores.tile.tile_rows.max(self.values.tile.tile_rows));
            (low.rows.end, high.rows.start) = (at, at);
        } else {
            return Err(Error::TooLarge { field, value, limit });
        }
        self.divide(low, parts)?;
        self.divide(high, parts)
    }

    /// The first operand of a part that is too large, with its bytes and the limit.
    fn excess(&self, part: &Part) -> Option<(&'static str, u64, u64)> {
        let s = self.shape;
        let limit = self.caps.binding();
        let scores = self.score_bytes(part);
        if self.fused.is_none() && scores > self.budget {
            return Some(("one row of scores", scores, self.budget));
        }
        let bytes = s.element.bytes();
        let out_bytes = if self.unpacked { 4 } else { bytes };
        let mut operands = vec![("q", self.query_span(&s.q, part), bytes)];
        if self.partials == 0 {
            operands.push(("out", self.query_span(&s.out, part), out_bytes));
        }
        let split = self.key_step < s.seq_kv;
        if !(split && part.planes() == 1) {
            operands.push(("k", self.key_span(&s.k, part, &(0..s.seq_kv)), bytes));
            operands.push(("v", self.key_span(&s.v, part, &(0..s.seq_kv)), bytes));
        }
        if let Some(mask) = s.mask {
            operands.push(("mask", broadcast_span(&mask, part), 1));
        }
        if let Some(bias) = s.bias {
            operands.push(("bias", broadcast_span(&bias.shape, part), bias.element.bytes()));
        }
        if s.lse && self.partials == 0 {
            operands.push(("lse", self.lse_span(part), 4));
        }
        if s.weights || s.logits.is_some() {
            operands.push(("weights or logits", self.dense_span(part), 4));
        }
        operands.into_iter().find_map(|(field, span, bytes)| {
            let (_, size, _) = self.bind(span, bytes, 0);
            (size > limit).then_some((field, size, limit))
        })
    }

    fn score_bytes(&self, part: &Part) -> u64 {
        4 * part.planes() * count(&part.rows) * u64::from(self.shape.score_row())
    }

    fn query_span(&self, tensor: &Tensor, part: &Part) -> Span {
        let (batch, rows) = match self.shape.packed {
            None => (part.batch.clone(), part.rows.clone()),
            Some(packed) => (0..1, 0..packed.total_q),
        };
        span(tensor, &batch, &part.heads, &rows)
    }

    fn key_span(&self, tensor: &Tensor, part: &Part, keys: &Range<u32>) -> Span {
        let (batch, rows) = match self.shape.packed {
            None => (part.batch.clone(), keys.clone()),
            Some(packed) => (0..1, 0..packed.total_kv),
        };
        let group = self.shape.group;
        let heads = part.heads.start / group..(part.heads.end - 1) / group + 1;
        span(tensor, &batch, &heads, &rows)
    }

    fn lse_span(&self, part: &Part) -> Span {
        let s = self.shape;
        let (heads, last) = (u64::from(s.heads), |r: &Range<u32>| u64::from(r.end - 1));
        match s.packed {
            None => {
                let row = |b: u64, h: u64, i: u64| (b * heads + h) * u64::from(s.seq_q) + i;
                let first = row(part.batch.start.into(), part.heads.start.into(), part.rows.start.into());
                (first, row(last(&part.batch), last(&part.heads), last(&part.rows)) + 1)
            }
            Some(packed) => {
                let total = u64::from(packed.total_q);
                (u64::from(part.heads.start) * total, u64::from(part.heads.end) * total)
            }
        }
    }

    /// Of a dense [batch, heads, seq_q, seq_kv] output.
    fn dense_span(&self, part: &Part) -> Span {
        let s = self.shape;
        broadcast_span(&Broadcast([s.batch, s.heads, s.seq_q, s.seq_kv]), part)
    }

    fn bind(&self, span: Span, bytes: u64, origin: u64) -> (u64, u64, u32) {
        bind(self.caps, span, bytes, origin)
    }

    /// The dispatches of one part.
    fn part(&mut self, part: &Part) -> Result<()> {
        let s = self.shape;
        if let Some(fused) = self.fused {
            let lse = if s.lse || self.partials > 0 { flags::LSE } else { 0 };
            return self.step(fused, part, &(0..s.seq_kv), lse);
        }
        self.scratch = self.scratch.max(self.score_bytes(part));
        let ranges: Vec<Range<u32>> = (0..s.seq_kv)
            .step_by(self.key_step as usize)
            .map(|first| first..s.seq_kv.min(first.saturating_add(self.key_step)))
            .collect();
        let every = if s.weights || s.logits.is_some() { flags::EVERY_KEY } else { 0 };
        let capped_first = self.separate && s.wants(Logits::Capped) && s.softcap.is_some();
        for keys in &ranges {
            self.step(Variant::Scores(self.scores), part, keys, every)?;
        }
        let all = 0..s.seq_kv;
        if capped_first {
            // Only the cap: no operand hides a key yet.
            self.transform(part, flags::PACKED | flags::SOFTCAP | flags::EVERY_KEY)?;
        }
        if s.logits.is_some() {
            if self.separate && s.wants(Logits::Masked) {
                self.transform(part, u32::MAX)?;
            }
            self.step(Variant::Export(export::Export { to: Slot::Logits }), part, &all, flags::EXPORT_LOGITS)?;
        }
        if self.separate && !s.wants(Logits::Masked) {
            self.transform(part, if capped_first { !flags::SOFTCAP } else { u32::MAX })?;
        }
        let whole_rows = if s.weights { flags::EVERY_KEY } else { 0 };
        self.step(Variant::Softmax(self.softmax), part, &all, whole_rows)?;
        if s.weights {
            self.step(Variant::Export(export::Export { to: Slot::Weights }), part, &all, 0)?;
        }
        for (i, keys) in ranges.iter().enumerate() {
            self.step(Variant::Values(self.values), part, keys, if i > 0 { flags::ADD } else { 0 })?;
        }
        Ok(())
    }

    /// The score transform as a pass of its own, with only the flags in `keep`.
    fn transform(&mut self, part: &Part, keep: u32) -> Result<()> {
        let from = self.steps.list.len();
        self.step(Variant::Logits(logits::Logits), part, &(0..self.shape.seq_kv), 0)?;
        for step in &mut self.steps.list[from..] {
            step.params.flags &= keep;
        }
        Ok(())
    }

    /// One kernel over a part and a range of keys, in as many dispatches as the limits need.
    fn step(&mut self, variant: Variant, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Result<()> {
        let s = self.shape;
        let (row_tiles, col_tiles, flops_per_score) = match &variant {
            Variant::Scores(x) => (
                count(&part.rows).div_ceil(x.tile.tile_rows.into()),
                count(keys).div_ceil(x.tile.tile_cols.into()),
                2.0 * f64::from(s.head_dim),
            ),
            Variant::Values(x) => (
                count(&part.rows).div_ceil(x.tile.tile_rows.into()),
                u64::from(s.value_dim.div_ceil(x.tile.tile_cols)),
                2.0 * f64::from(s.value_dim),
            ),
            Variant::Softmax(_) => (count(&part.rows), 1, 32.0),
            Variant::Flash(x) => {
                let blocks = s.value_dim.div_ceil(x.tile.dims);
                (
                    count(&part.rows).div_ceil(x.tile.tile_rows().into()),
                    blocks.into(),
                    2.0 * f64::from(blocks * s.head_dim + s.value_dim),
                )
            }
            Variant::Rows(x) => {
                (count(&part.rows).div_ceil(x.tile.tile_rows().into()), 1, 2.0 * f64::from(s.head_dim + s.value_dim))
            }
            Variant::Split(x) => (
                (count(&part.rows) * count(&self.group(part))).div_ceil(x.tile.rows.into()),
                self.partials.max(1).into(),
                2.0 * f64::from(s.head_dim + s.value_dim),
            ),
            _ => (count(&part.rows), count(keys).div_ceil(variant.threads().into()), 32.0),
        };
        let mut params = self.params(part, keys, extra_flags);
        let mut planes = part.planes();
        if matches!(variant, Variant::Split(_)) {
            let group = self.group(part);
            params.head0 = part.heads.start / s.group;
            params.heads = (part.heads.end - 1) / s.group + 1 - params.head0;
            planes = count(&part.batch) * u64::from(params.heads);
            (params.group0, params.group_end) = (group.start, group.end);
            if self.partials > 0 {
                params.flags &= !flags::SINKS;
            }
        }
        params.row_tiles = small("row tiles", row_tiles)?;
        params.col_tiles = small("column tiles", col_tiles)?;
        let bindings = variant
            .bindings()
            .into_iter()
            .map(|(slot, written)| self.bound(slot, written, &variant, part, keys, &mut params))
            .collect::<Vec<_>>();
        let flops = flops_per_score * part.planes() as f64 * count(&part.rows) as f64 * count(keys) as f64;
        let workgroups = small("workgroups", row_tiles * col_tiles * planes)?;
        self.steps.push(variant, params, bindings, workgroups, flops)
    }

    /// The query heads of a key/value head that a part has: all, unless it lies within one group.
    fn group(&self, part: &Part) -> Range<u32> {
        let group = self.shape.group;
        let first = part.heads.start % group;
        first..group.min(first + part.heads.end - part.heads.start)
    }

    fn params(&self, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Params {
        let s = self.shape;
        let l = self.lists;
        let rows = u64::from(part.rows.end - part.rows.start);
        let row = u64::from(s.score_row());
        let s_head = rows * row;
        let s_batch = count(&part.heads) * s_head;
        let origin = u64::from(part.batch.start) * s_batch
            + u64::from(part.heads.start) * s_head
            + u64::from(part.rows.start) * row;
        Params {
            batch0: part.batch.start,
            head0: part.heads.start,
            heads: part.heads.end - part.heads.start,
            row0: part.rows.start,
            row_end: part.rows.end,
            key0: keys.start,
            key_end: keys.end,
            seq_q: s.seq_q,
            seq_kv: s.seq_kv,
            total_q: s.packed.map_or(0, |p| p.total_q),
            total_kv: s.packed.map_or(0, |p| p.total_kv),
            group: s.group,
            head_dim: s.head_dim,
            value_dim: s.value_dim,
            flags: problem_flags(s) | extra_flags,
            scale: s.scale,
            softcap: s.softcap.unwrap_or(0.0),
            window_left: s.window.left.unwrap_or(0),
            window_right: s.window.right.unwrap_or(0),
            values_rows: self.values.tile.tile_rows,
            s_base: 0u64.wrapping_sub(origin) as u32,
            s_batch: s_batch as u32,
            s_head: s_head as u32,
            s_row: s.score_row(),
            list_lengths: l.lengths,
            list_offsets: l.offsets,
            list_slopes: l.slopes,
            list_sinks: l.sinks,
            list_cu_q: l.cu_q,
            list_cu_kv: l.cu_kv,
            ..Params::default()
        }
    }

    /// The binding of a slot, and its base and strides in the uniform. Strides wrap like addresses.
    fn bound(
        &self,
        slot: Slot,
        written: bool,
        variant: &Variant,
        part: &Part,
        keys: &Range<u32>,
        p: &mut Params,
    ) -> Bound {
        let s = self.shape;
        let bytes = s.element.bytes();
        let strides = |t: &Tensor| [t.strides.batch as u32, t.strides.head as u32, t.strides.row as u32];
        let dense =
            [s.heads as u64 * s.seq_q as u64 * s.seq_kv as u64, s.seq_q as u64 * s.seq_kv as u64, s.seq_kv.into()]
                .map(|x| x as u32);
        let unpacked = self.unpacked && matches!(variant, Variant::Values(_) | Variant::Rows(_) | Variant::Flash(_));
        let partial = self.partials > 0;
        let (slot, (offset, size, base)) = match slot {
            Slot::Q => (slot, self.bind(self.query_span(&s.q, part), bytes, s.q.strides.offset)),
            Slot::K => (slot, self.bind(self.key_span(&s.k, part, keys), bytes, s.k.strides.offset)),
            Slot::V => (slot, self.bind(self.key_span(&s.v, part, keys), bytes, s.v.strides.offset)),
            Slot::Out if partial => (Slot::PartialOut, (0, partial_bytes(s, self.partials)[0], 0)),
            Slot::Out if unpacked => {
                (Slot::Unpacked, self.bind(self.query_span(&s.out, part), 4, s.out.strides.offset))
            }
            Slot::Out => (slot, self.bind(self.query_span(&s.out, part), bytes, s.out.strides.offset)),
            Slot::Lse if partial => (Slot::PartialLse, (0, partial_bytes(s, self.partials)[1], 0)),
            Slot::Lse if !s.lse => (Slot::Spare, (0, SPARE, 0)),
            Slot::Lse => (slot, self.bind(self.lse_span(part), 4, 0)),
            Slot::Weights | Slot::Logits => (slot, self.bind(self.dense_span(part), 4, 0)),
            // A shader that can take the operand binds something even where the problem has none.
            Slot::Mask if s.mask.is_none() => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Bias if s.bias.is_none() => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Mask => (slot, self.bind(broadcast_span(&s.mask.expect("matched above"), part), 1, 0)),
            Slot::Bias => {
                let bias = s.bias.expect("matched above");
                (slot, self.bind(broadcast_span(&bias.shape, part), bias.element.bytes(), 0))
            }
            Slot::Lists => (slot, (0, self.lists.bytes(), 0)),
            Slot::Scores => (slot, (0, self.score_bytes(part), p.s_base)),
            _ => unreachable!("attention's kernels bind no such operand"),
        };
        match slot {
            Slot::Q => (p.q_base, [p.q_batch, p.q_head, p.q_row]) = (base, strides(&s.q)),
            Slot::K => (p.k_base, [p.k_batch, p.k_head, p.k_row]) = (base, strides(&s.k)),
            Slot::V => (p.v_base, [p.v_batch, p.v_head, p.v_row]) = (base, strides(&s.v)),
            Slot::Out | Slot::Unpacked => {
                (p.out_base, [p.out_batch, p.out_head, p.out_row]) = (base, strides(&s.out));
            }
            Slot::Weights | Slot::Logits => (p.out_base, [p.out_batch, p.out_head, p.out_row]) = (base, dense),
            Slot::PartialOut => {
                let plane = s.seq_q.wrapping_mul(s.value_dim);
                (p.out_base, [p.out_batch, p.out_head, p.out_row]) =
                    (base, [s.heads.wrapping_mul(plane), plane, s.value_dim]);
                p.partial_out = s.batch.wrapping_mul(p.out_batch);
            }
            Slot::PartialLse => {
                (p.lse_base, p.lse_batch, p.lse_head) = (base, s.heads.wrapping_mul(s.seq_q), s.seq_q);
                p.partial_lse = s.batch.wrapping_mul(p.lse_batch);
            }
            Slot::Lse => {
                let row = s.packed.map_or(s.seq_q, |packed| packed.total_q);
                (p.lse_base, p.lse_batch, p.lse_head) = (base, s.heads.wrapping_mul(row), row);
            }
            Slot::Mask => {
                let shape = s.mask.expect("matched above");
                p.mask_base = base;
                [p.mask_batch, p.mask_head, p.mask_row, p.mask_key] = broadcast_strides(&shape);
                p.mask_keys = covered(&shape, s.seq_kv);
            }
            Slot::Bias => {
                let shape = s.bias.expect("matched above").shape;
                p.bias_base = base;
                [p.bias_batch, p.bias_head, p.bias_row, p.bias_key] = broadcast_strides(&shape);
                p.bias_keys = covered(&shape, s.seq_kv);
            }
            _ => {}
        }
        Bound { slot, offset, size, written }
    }
}

/// Rounds the f32 scratch of an output of `total` elements to its 16-bit type, in dispatches that each fit a binding.
pub(crate) fn pack(caps: &Caps, element: Element, total: u64, steps: &mut Steps<'_>) -> Result<()> {
    let variant = Variant::Pack(pack::Pack { element });
    // Whole alignment steps of the 16-bit side, so that both sides bind aligned and no word is shared.
    let step = (caps.binding() / 4).min(1 << 28) / caps.alignment() * caps.alignment();
    let mut first = 0;
    while first < total {
        let elements = step.min(total - first);
        let words = elements.div_ceil(2);
        let params = Params {
            row_tiles: 1,
            col_tiles: small("words", words.div_ceil(variant.threads().into()))?,
            heads: 1,
            pack_count: small("elements", elements)?,
            ..Params::default()
        };
        let bindings = vec![
            Bound { slot: Slot::Unpacked, offset: 4 * first, size: 4 * elements, written: false },
            Bound { slot: Slot::Out, offset: 2 * first, size: 4 * words, written: true },
        ];
        steps.push(variant, params, bindings, params.col_tiles, 32.0 * elements as f64)?;
        first += elements;
    }
    Ok(())
}

/// Bytes of the scratch that stands for an output which is not asked for.
const SPARE: u64 = 256;

/// Refuses what would take hours on any device, before the plan itself takes minutes and gigabytes. The uniforms of this many
/// dispatches fit the largest buffer that WebGPU guarantees.
fn few(dispatches: u64) -> Result<()> {
    let limit = 1 << 18;
    if dispatches <= limit { Ok(()) } else { Err(Error::TooLarge { field: "dispatches", value: dispatches, limit }) }
}

pub(crate) fn small(field: &'static str, value: u64) -> Result<u32> {
    // Workgroup numbers of a folded grid may overshoot; below 2^30 they cannot wrap.
    let limit = 1 << 30;
    if value <= limit { Ok(value as u32) } else { Err(Error::TooLarge { field, value, limit }) }
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

fn problem_flags(s: &Shape) -> u32 {
    let bias = s.bias.map_or(0, |bias| {
        flags::BIAS
            | match bias.element {
                Element::F32 => flags::BIAS_F32,
                Element::F16 => 0,
                Element::Bf16 => flags::BIAS_BF16,
            }
    });
    let causal = match s.causal {
        Causal::None => 0,
        Causal::TopLeft => flags::CAUSAL,
        Causal::BottomRight => flags::CAUSAL | flags::BOTTOM_RIGHT,
        Causal::Offset => flags::CAUSAL | flags::OFFSETS,
    };
    let set = [
        (s.window.left.is_some(), flags::WINDOW_LEFT),
        (s.window.right.is_some(), flags::WINDOW_RIGHT),
        (s.key_lengths, flags::LENGTHS),
        (s.packed.is_some(), flags::PACKED),
        (s.softcap.is_some(), flags::SOFTCAP),
        (s.alibi, flags::ALIBI),
        (s.sinks, flags::SINKS),
        (s.mask.is_some(), flags::MASK),
    ];
    set.into_iter().filter(|&(on, _)| on).fold(bias | causal, |all, (_, flag)| all | flag)
}

fn lane_body(caps: &Caps) -> Body {
    match caps.lanes() {
        Some(lanes) => Body::Lanes { lanes, subgroup: true, wide: caps.int64 && lanes == tuning::WIDE_LANES },
        None => Body::Lanes { lanes: 8, subgroup: false, wide: false },
    }
}

pub(crate) fn choose_body(caps: &Caps, options: &Options) -> (Body, &'static str) {
    match (options.form, caps.cpu) {
        (Some(Form::Tiled), _) => (Body::Tiled, "as asked"),
        (Some(Form::Lanes), _) => (lane_body(caps), "as asked"),
        (None, true) => (lane_body(caps), "a CPU adapter: loads are the cost, workgroup memory is no faster"),
        (None, false) => (Body::Tiled, "a GPU: tiles in workgroup memory and registers"),
    }
}

/// The fused kernel, if one is asked for, or can run and is expected to be faster; with the reasons.
fn choose_fused(
    shape: &Shape,
    caps: &Caps,
    options: &Options,
    key_step: u32,
    reasons: &mut Vec<String>,
) -> Result<Option<Variant>> {
    let candidates = match options.kernel {
        Some(Kernel::Unfused) => return Ok(None),
        Some(kernel) => vec![kernel],
        None if options.form.is_some() => return Ok(None),
        None => vec![Kernel::Rows, Kernel::Split, Kernel::Flash],
    };
    for kernel in candidates {
        let forced = options.kernel.is_some();
        let found = match kernel {
            Kernel::Rows => rows(shape, caps, options, key_step),
            Kernel::Split => split(shape, caps, options, key_step),
            _ => flash(shape, caps, options, key_step),
        };
        let slower = match kernel {
            _ if forced => None,
            Kernel::Rows if !caps.cpu => Some("a GPU: a row per lane keeps too few lanes busy"),
            Kernel::Rows if caps.lanes().is_some_and(|lanes| lanes < 8) => {
                Some("a driver of four lanes takes minutes to compile it")
            }
            Kernel::Rows if matches!(lane_body(caps), Body::Lanes { lanes, .. } if shape.seq_q <= lanes) => {
                Some("so few queries leave its lanes idle")
            }
            Kernel::Split if caps.cpu && caps.lanes().is_some_and(|lanes| shape.seq_q > lanes) => {
                Some("so many queries would read the keys again and again")
            }
            Kernel::Split if !caps.cpu && lines(shape) > tuning::SPLIT_ROWS.into() => {
                Some("so many rows fill the tiles of flash")
            }
            Kernel::Flash if caps.cpu => Some("a CPU adapter: workgroup memory and barriers are its slowest parts"),
            _ => None,
        };
        match (found, slower) {
            (Err(why), _) if forced => return Err(Error::Kernel { kernel: kernel.name(), why }),
            (Ok(variant), None) => {
                let why = if forced { "as asked" } else { "one pass over the keys, no score matrix" };
                reasons.push(format!("kernel {}: {why}", kernel.name()));
                return Ok(Some(variant));
            }
            (Err(why), _) => reasons.push(format!("not kernel {}: {why}", kernel.name())),
            (Ok(_), Some(why)) => reasons.push(format!("not kernel {}: {why}", kernel.name())),
        }
    }
    Ok(None)
}

/// What keeps any fused kernel with these operands from running.
fn fused_obstacle(shape: &Shape, caps: &Caps, key_step: u32, buffers: u32) -> Option<String> {
    let l = &caps.limits;
    if shape.weights || shape.logits.is_some() {
        Some("weights and logits need the score matrix".into())
    } else if l.max_storage_buffers_per_shader_stage < buffers || l.max_bindings_per_bind_group <= buffers {
        let most = l.max_storage_buffers_per_shader_stage.min(l.max_bindings_per_bind_group.saturating_sub(1));
        Some(format!("it binds {buffers} storage buffers, the device {most}"))
    } else if key_step < shape.seq_kv {
        Some("keys or values of one head exceed a binding".into())
    } else {
        None
    }
}

fn rows(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let full = transforms(shape);
    if let Some(why) = fused_obstacle(shape, caps, key_step, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    let dim = shape.head_dim.max(shape.value_dim);
    let tile = tuning::rows_tiles(lane_body(caps)).find(|tile| dim <= tile.dims);
    let tile = tile.ok_or_else(|| format!("{dim} dims do not fit a lane's registers"))?;
    Ok(Variant::Rows(rows::Rows { tile, format: whole_format(shape, false), full }))
}

fn split(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let full = transforms(shape);
    if let Some(why) = fused_obstacle(shape, caps, key_step, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if shape.packed.is_some() {
        return Err("it takes no packed sequences".into());
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    let dim = shape.head_dim.max(shape.value_dim);
    let shuffle = caps.subgroup_min_size.is_some_and(|size| size >= split::ACROSS);
    let one_stream = caps.cpu && caps.int64 && caps.lanes() == Some(tuning::WIDE_LANES);
    let many_rows = lines(shape) > 2;
    let tiles = tuning::split_tiles()
        .filter(|tile| dim <= tile.dims && tile.shuffle == shuffle && (tile.streams == 1) == one_stream);
    let format = whole_format(shape, false);
    let variants = tiles.map(|tile| split::Split { tile, format, full });
    let fitting: Vec<_> = variants.filter(|x| fits(caps, x.threads(), x.workgroup_bytes())).collect();
    let dims = fitting.first().map(|x| x.tile.dims);
    let best = fitting.iter().filter(|x| Some(x.tile.dims) == dims).min_by_key(|x| (x.tile.rows > 1) != many_rows);
    let variant =
        *best.ok_or_else(|| format!("{dim} dims do not fit its lanes' registers, or its tiles not the device"))?;
    let [out, _] = partial_bytes(shape, 1);
    if shape.element != Element::F32 && out > caps.binding().min(options.scratch_budget) {
        return Err("its results in f32 exceed a binding or the scratch budget".into());
    }
    Ok(Variant::Split(variant))
}

/// Rows that share a key/value head.
fn lines(shape: &Shape) -> u64 {
    u64::from(shape.seq_q) * u64::from(shape.group)
}

/// Into how many parts `split` shares out the keys: enough workgroups to fill the device, few enough that merging costs little;
/// 0 where one part is enough and can be written as it is.
fn partials(shape: &Shape, caps: &Caps, options: &Options, split: &split::Split) -> u32 {
    let class = usize::from(!caps.cpu);
    let tiles = lines(shape).div_ceil(split.tile.rows.into());
    let batch = if options.batch_invariant { 1 } else { shape.batch };
    let workgroups = tiles.saturating_mul(u64::from(shape.kv_heads)).saturating_mul(u64::from(batch));
    let wanted = u64::from(tuning::SPLIT_WORKGROUPS[class]).div_ceil(workgroups);
    let most = u64::from(shape.seq_kv.div_ceil(tuning::SPLIT_KEYS[class]));
    let [one, _] = partial_bytes(shape, 1);
    let room = caps.binding().min(options.scratch_budget) / one;
    match wanted.min(most).min(room) {
        0 | 1 => u32::from(shape.element != Element::F32),
        parts => parts as u32,
    }
}

/// Bytes of the partial outputs and log-sum-exps of `split`.
fn partial_bytes(shape: &Shape, partials: u32) -> [u64; 2] {
    let rows = u64::from(partials) * shape.lse_len();
    [4 * rows * u64::from(shape.value_dim), 4 * rows]
}

fn flash(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let small_arrays =
        shape.lse || shape.sinks || shape.key_lengths || shape.packed.is_some() || shape.causal == Causal::Offset;
    let operands = match (transforms(shape), small_arrays) {
        (true, _) => flash::Operands::Full,
        (false, true) => flash::Operands::Lists,
        (false, false) => flash::Operands::Bare,
    };
    if let Some(why) = fused_obstacle(shape, caps, key_step, operands.buffers()) {
        return Err(why);
    }
    let native = shape.element == Element::F16 && caps.f16 && options.native_f16 != Some(false);
    if options.native_f16 == Some(true) && shape.element == Element::F16 && !caps.f16 {
        return Err("the device has no shader f16".into());
    }
    let format = whole_format(shape, native);
    let shuffles = caps.subgroup_min_size.is_some_and(|size| size >= flash::ACROSS);
    let largest = tuning::FLASH.iter().map(|tile| tile.dims).max().expect("the table has rows");
    let dims = shape.value_dim.min(largest);
    tuning::FLASH
        .into_iter()
        .map(|tile| flash::Flash { tile, format, operands })
        .find(|x| {
            dims <= x.tile.dims
                && (shuffles || !x.tile.shuffle)
                && (shape.head_dim <= x.tile.dims || !x.tile.resident)
                && fits(caps, flash::ACROSS * flash::DOWN, x.workgroup_bytes())
        })
        .map(Variant::Flash)
        .ok_or_else(|| "no tile fits the device's workgroup memory and invocations".into())
}

/// One format for q, k, v and out.
fn whole_format(shape: &Shape, native: bool) -> Format {
    let vector = [&shape.q, &shape.k, &shape.v, &shape.out].into_iter().all(whole_vectors);
    Format { element: shape.element, native, vector }
}

/// Whether the score transform is more than the scale and the key range.
fn transforms(s: &Shape) -> bool {
    s.softcap.is_some() || s.alibi || s.mask.is_some() || s.bias.is_some()
}

fn choose_native(shape: &Shape, caps: &Caps, body: Body, options: &Options) -> Result<bool> {
    let possible = shape.element == Element::F16 && caps.f16 && body == Body::Tiled;
    match options.native_f16 {
        Some(true) if !possible && shape.element == Element::F16 => {
            let why = if caps.f16 { "the lane form reads f16 packed" } else { "the device has no shader f16" };
            Err(Error::Kernel { kernel: "native f16", why: why.into() })
        }
        Some(false) => Ok(false),
        _ => Ok(possible),
    }
}

fn lane_tile(tile: fn(Body, u32, u32) -> Tile, body: Body, shape: &Shape, dim: u32, format: Format) -> Tile {
    let Body::Lanes { lanes, .. } = body else { unreachable!("called for lane bodies") };
    let [one, many] = tuning::LANE_ROWS;
    let [narrow, wide] = tuning::LANE_DIMS;
    let rows = if shape.seq_q <= lanes { one } else { many };
    let dims = if dim <= narrow && format.vector { narrow } else { wide };
    tile(body, rows, dims)
}

fn scores_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(tuning::scores_lanes, body, shape, shape.head_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = scores::Scores { tile: *tile, format, full: false };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&tuning::SCORES_TILED, shape.seq_q, fits, "scores")
}

fn values_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(tuning::values_lanes, body, shape, shape.value_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = values::Values { tile: *tile, format, out: Element::F32 };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&tuning::VALUES_TILED, shape.seq_q, fits, "values")
}

pub(crate) fn fits(caps: &Caps, threads: u32, workgroup_bytes: u32) -> bool {
    let l = &caps.limits;
    workgroup_bytes <= l.max_compute_workgroup_storage_size
        && threads <= l.max_compute_invocations_per_workgroup
        && threads <= l.max_compute_workgroup_size_x
}

/// The largest tile that fits the device and is not mostly empty for so few rows.
pub(crate) fn largest(tiles: &[Tile], rows: u32, fits: impl Fn(&Tile) -> bool, kernel: &'static str) -> Result<Tile> {
    let smallest = tiles.last().expect("the table has rows").tile_rows;
    let found = tiles.iter().find(|tile| fits(tile) && (rows > tile.tile_rows / 2 || tile.tile_rows == smallest));
    found.copied().ok_or_else(|| Error::Kernel {
        kernel,
        why: "no tile fits the device's workgroup memory and invocations".into(),
    })
}

/// Whether every row starts at a multiple of four elements and has a multiple of four of them.
pub(crate) fn whole_vectors(tensor: &Tensor) -> bool {
    let s = &tensor.strides;
    let steps = [s.batch, s.head, s.row];
    let aligned = steps.iter().zip(tensor.sizes).all(|(stride, size)| size == 1 || stride % 4 == 0);
    tensor.dim.is_multiple_of(4) && s.offset.is_multiple_of(4) && aligned
}

/// Keys of one dispatch: all, unless the keys or values of a single head exceed a binding.
fn key_step(shape: &Shape, caps: &Caps) -> Result<u32> {
    if shape.packed.is_some() {
        return Ok(shape.seq_kv);
    }
    let bytes = shape.element.bytes();
    let room = caps.binding() - caps.alignment();
    let mut step = u64::from(shape.seq_kv);
    for (field, tensor) in [("k", &shape.k), ("v", &shape.v)] {
        let dim = u64::from(tensor.dim);
        let keys = match (room / bytes).checked_sub(dim) {
            None => 0,
            Some(rest) => rest / tensor.strides.row.max(1) + 1,
        };
        if keys < u64::from(shape.seq_kv) {
            // Whole vectors of weights.
            let whole = keys / 4 * 4;
            if whole == 0 {
                let value = (tensor.strides.row * 3 + dim) * bytes;
                return Err(Error::TooLarge { field, value, limit: room });
            }
            step = step.min(whole);
        }
    }
    Ok(step as u32)
}

fn span(tensor: &Tensor, batch: &Range<u32>, heads: &Range<u32>, rows: &Range<u32>) -> Span {
    let first = tensor.at(batch.start, heads.start, rows.start);
    (first, tensor.at(batch.end - 1, heads.end - 1, rows.end - 1) + u64::from(tensor.dim))
}

fn broadcast_strides(Broadcast(shape): &Broadcast) -> [u32; 4] {
    let mut strides = [0; 4];
    let mut step = 1u64;
    for axis in (0..4).rev() {
        strides[axis] = if shape[axis] == 1 { 0 } else { step as u32 };
        step *= u64::from(shape[axis]);
    }
    strides
}

fn broadcast_span(Broadcast(shape): &Broadcast, part: &Part) -> Span {
    let [b, h, r] = [&part.batch, &part.heads, &part.rows];
    let pick = |axis: usize, full: u32| if shape[axis] == 1 { 0 } else { u64::from(full) };
    let row = |b: u32, h: u32, r: u32| {
        ((pick(0, b) * u64::from(shape[1]) + pick(1, h)) * u64::from(shape[2]) + pick(2, r)) * u64::from(shape[3])
    };
    (row(b.start, h.start, r.start), row(b.end - 1, h.end - 1, r.end - 1) + u64::from(shape[3]))
}

/// Keys that a broadcast operand covers: all if its last axis is 1.
fn covered(Broadcast(shape): &Broadcast, seq_kv: u32) -> u32 {
    if shape[3] == 1 { seq_kv } else { shape[3] }
}
