//! Merging of partial results on the GPU, so that a sequence can be split over calls, buffers or devices.

use std::ops::Range;

use crate::caps::Caps;
use crate::choose;
use crate::encode::Attention;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::params::{Params, flags};
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, merge};
use crate::operation::Operation;
use crate::options::Options;
use crate::planner;
use crate::problem::{Element, Elements, Layout, Outputs};
use crate::shape::{MAX_DIM, MAX_SIZE, Tensor};
use crate::step::{Bound, Step};
use crate::steps::{Span, Steps, bind, small};

/// Exact merge of the results of the same query rows over `partials` disjoint parts of the keys.
///
/// `lse = ln(Σ_n exp(lse_n) + exp(sink))` and `out = Σ_n exp(lse_n − lse) · out_n`. The partials are f32 and dense:
///
/// - [`Slot::PartialOut`]: [partials, batch, heads, seq_q, value_dim],
/// - [`Slot::PartialLse`]: [partials, batch, heads, seq_q], natural logarithms.
///
/// They must be made *without* sinks, since a sink joins the denominator once: give it here ([`Slot::Sinks`], f32 `[heads]`).
/// A partial whose lse is −inf is empty and contributes nothing, whatever its `out` holds; where all are empty, or there is none, out
/// is 0 and lse −inf (or the sink). An lse of NaN or +inf makes its row NaN; a NaN or an infinity in out shows in its own element.
/// Packed sequences merge as one batch of `total_q` rows.
///
/// ```
/// use wgpu_attention::{Merge, reference::{self, Partial}};
///
/// // The same two parts that the GPU would merge, on the CPU reference: weights 3/4 and 1/4.
/// let parts = [Partial { out: &[1.0], lse: &[3f64.ln()] }, Partial { out: &[5.0], lse: &[0.0] }];
/// let (out, lse) = reference::merge(1, &parts, None)?;
/// assert!((out[0] - 2.0).abs() < 1e-12 && (lse[0] - 4f64.ln()).abs() < 1e-12);
/// assert!(Merge::new(2, 1, 1, 1, 1).check().is_ok());
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Merge {
    /// How many partial results there are, 0 or more.
    pub partials: u32,
    /// Batches, 0 or more.
    pub batch: u32,
    /// Query heads, 1 or more.
    pub heads: u32,
    /// Query rows per batch and head, 0 or more.
    pub seq_q: u32,
    /// Elements of an output row, 1 to 512.
    pub value_dim: u32,
    /// Type of the merged output, rounded once.
    pub element: Element,
    /// Layout of the merged output: [batch, heads, seq_q, value_dim].
    pub out: Layout,
    /// Give out the merged log-sum-exp too ([`Slot::Lse`], f32 [batch, heads, seq_q]).
    pub lse: bool,
    /// Whether there are attention sinks.
    pub sinks: bool,
}

/// A box of rows that is worked on at once.
#[derive(Clone, Debug)]
struct Part {
    batch: Range<u32>,
    heads: Range<u32>,
    rows: Range<u32>,
}

impl Part {
    fn lines(&self) -> u64 {
        [&self.batch, &self.heads, &self.rows].iter().map(|range| range.len() as u64).product()
    }
}

impl Merge {
    /// Of f32 results to a dense f32 output, with its lse and without sinks.
    pub fn new(partials: u32, batch: u32, heads: u32, seq_q: u32, value_dim: u32) -> Self {
        Merge {
            partials,
            batch,
            heads,
            seq_q,
            value_dim,
            element: Element::F32,
            out: Layout::Bhsd,
            lse: true,
            sinks: false,
        }
    }

    /// Checks every field.
    pub fn check(&self) -> Result<()> {
        self.checked().map(|_| ())
    }

    fn checked(&self) -> Result<Tensor> {
        let sizes = [
            ("partials", self.partials, MAX_SIZE),
            ("batch", self.batch, MAX_SIZE),
            ("heads", self.heads, MAX_SIZE),
            ("seq_q", self.seq_q, MAX_SIZE),
            ("value_dim", self.value_dim, MAX_DIM),
        ];
        for (field, value, limit) in sizes {
            // Without a row there is nothing to do, and without a partial every row is one that sees no key.
            if value == 0 && ["heads", "value_dim"].contains(&field) {
                return Err(Error::Zero { field });
            }
            if value > limit {
                return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
            }
        }
        // Byte counts stay far from u64's end, so that planning adds without checks.
        let limit = u64::MAX / 64;
        let elements = sizes.iter().map(|&(_, n, _)| u128::from(n)).product::<u128>();
        if elements > limit.into() {
            let value = u64::try_from(elements).unwrap_or(u64::MAX);
            return Err(Error::elements("partial_out", value, limit));
        }
        Tensor::output("out", [self.batch, self.heads, self.seq_q], self.value_dim, self.out)
    }

    /// The dispatches on a device, in order: pure data.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        Ok(self.build(caps, options)?.0.finish().0)
    }

    /// The dispatches and the bytes of the two scratch buffers: totals, and `out` in f32.
    fn build<'a>(&self, caps: &'a Caps, options: &Options) -> Result<(Steps<'a>, [u64; 2])> {
        caps.check()?;
        let mut steps = Steps::new(caps, options);
        let scratch = self.append(caps, &mut steps, false)?;
        Ok((steps, scratch))
    }

    /// Adds the dispatches; gives the bytes of the two scratch buffers. With `totals` the maximum and the sum of each row of a partial, two
    /// f32, stand in [`Slot::PartialLse`] in place of its log-sum-exp.
    pub(crate) fn append<'a>(&self, caps: &'a Caps, steps: &mut Steps<'a>, totals: bool) -> Result<[u64; 2]> {
        let out = self.checked()?;
        if out.is_empty() {
            return Ok([0, 0]);
        }
        let words = if totals { 2 } else { 1 };
        let mut planner = Planner { merge: self, caps, out, unpacked: false, words, steps };
        let mut parts = Vec::new();
        planner.divide(Part { batch: 0..self.batch, heads: 0..self.heads, rows: 0..self.seq_q }, &mut parts)?;
        // Whether several dispatches add to one output decides its scratch, whose size may divide parts further.
        let several = parts.iter().any(|part| planner.step(part, planner.out_step()) < self.partials);
        if self.element != Element::F32 && (several || !choose::whole_vectors(&out)) {
            if !out.is_dense() {
                return Err(Error::Conflict {
                    left: "element",
                    right: "out",
                    why: "16-bit rows that are not whole vectors of four, or whose partials are split over dispatches, need a dense out",
                });
            }
            planner.unpacked = true;
            let coarse = std::mem::take(&mut parts);
            coarse.into_iter().try_for_each(|part| planner.divide(part, &mut parts))?;
        }
        for part in &parts {
            planner.part(part)?;
        }
        let unpacked = if planner.unpacked { 4 * out.extent() } else { 0 };
        let scratch = [8 * self.lines(), unpacked];
        for (field, value) in [("totals", scratch[0]), ("out in f32", scratch[1])] {
            let limit = caps.limits.max_buffer_size;
            if value > limit {
                return Err(Error::bytes(field, value, limit));
            }
        }
        if unpacked > 0 {
            planner::pack(caps, self.element, &out, None, steps)?;
        }
        Ok(scratch)
    }

    /// Rows of one partial.
    fn lines(&self) -> u64 {
        u64::from(self.batch) * u64::from(self.heads) * u64::from(self.seq_q)
    }
}

struct Planner<'a, 'b> {
    merge: &'b Merge,
    caps: &'a Caps,
    out: Tensor,
    unpacked: bool,
    /// Words of a row in [`Slot::PartialLse`].
    words: u64,
    steps: &'b mut Steps<'a>,
}

impl Planner<'_, '_> {
    /// Rows of a part within one partial, `[first, end)`.
    fn lines(&self, part: &Part) -> Span {
        let m = self.merge;
        let at = |b: u32, h: u32, i: u32| {
            (u64::from(b) * u64::from(m.heads) + u64::from(h)) * u64::from(m.seq_q) + u64::from(i)
        };
        let last = at(part.batch.end - 1, part.heads.end - 1, part.rows.end - 1);
        (at(part.batch.start, part.heads.start, part.rows.start), last + 1)
    }

    /// The same in units of `each` elements, for the partials of a range.
    fn partial_span(&self, part: &Part, partials: &Range<u32>, each: u64) -> Span {
        let (first, end) = self.lines(part);
        let line = |n: u32, line: u64| (u64::from(n) * self.merge.lines() + line) * each;
        match partials.is_empty() {
            true => (0, 0),
            false => (line(partials.start, first), line(partials.end - 1, end)),
        }
    }

    fn out_span(&self, part: &Part) -> Span {
        let first = self.out.at(part.batch.start, part.heads.start, part.rows.start);
        let last = self.out.at(part.batch.end - 1, part.heads.end - 1, part.rows.end - 1);
        (first, last + u64::from(self.out.dim))
    }

    /// Bytes of a row of the longer of the two operands that each partial has.
    fn out_step(&self) -> u64 {
        4 * self.words.max(self.merge.value_dim.into())
    }

    fn out_bytes(&self) -> u64 {
        if self.unpacked { 4 } else { self.merge.element.bytes() }
    }

    /// Halves a part until each of its operands, with one partial alone, fits a binding.
    fn divide(&self, part: Part, parts: &mut Vec<Part>) -> Result<()> {
        let limit = self.caps.binding();
        let one = |each: u64| self.partial_span(&part, &(0..1), each);
        let operands = [
            ("partial_out", bind(self.caps, one(self.out_step() / 4), 4, 0).1 + self.caps.alignment()),
            ("out", bind(self.caps, self.out_span(&part), self.out_bytes(), 0).1),
            // Twice the binding of lse, see `part`.
            ("totals", 2 * (bind(self.caps, one(1), 4, 0).1 + self.caps.alignment())),
        ];
        let Some(&(field, value)) = operands.iter().find(|&&(_, size)| size > limit) else {
            parts.push(part);
            return Ok(());
        };
        let half = |range: &Range<u32>| range.start + (range.end - range.start) / 2;
        let (mut low, mut high) = (part.clone(), part.clone());
        if part.batch.len() > 1 {
            (low.batch.end, high.batch.start) = (half(&part.batch), half(&part.batch));
        } else if part.heads.len() > 1 {
            (low.heads.end, high.heads.start) = (half(&part.heads), half(&part.heads));
        } else if part.rows.len() > 1 {
            (low.rows.end, high.rows.start) = (half(&part.rows), half(&part.rows));
        } else {
            return Err(Error::bytes(field, value, limit));
        }
        self.divide(low, parts)?;
        self.divide(high, parts)
    }

    /// How many partials of a part one binding holds, each row having `bytes` bytes.
    fn step(&self, part: &Part, bytes: u64) -> u32 {
        let (first, end) = self.lines(part);
        // `divide` left room for one.
        let room = self.caps.binding() - self.caps.alignment() - (end - first) * bytes;
        let more = room / (self.merge.lines() * bytes);
        (more + 1).min(self.merge.partials.into()) as u32
    }

    fn chunks(&self, part: &Part, bytes: u64) -> impl Iterator<Item = Range<u32>> + use<> {
        let (step, partials) = (self.step(part, bytes).max(1), self.merge.partials);
        // Rows without any partial are written all the same.
        (0..partials.max(1)).step_by(step as usize).map(move |first| first..partials.min(first.saturating_add(step)))
    }

    fn part(&mut self, part: &Part) -> Result<()> {
        let m = self.merge;
        for partials in self.chunks(part, 4 * self.words) {
            let lse = m.lse && partials.end == m.partials;
            let sinks = m.sinks && partials.start == 0;
            self.dispatch(merge::Merge::Totals { lse, sinks }, part, &partials, part.lines())?;
        }
        let element = if self.unpacked { Element::F32 } else { m.element };
        let vector = m.value_dim.is_multiple_of(4) && choose::whole_vectors(&self.out);
        let items = part.lines() * u64::from(m.value_dim.div_ceil(4));
        for partials in self.chunks(part, self.out_step()) {
            self.dispatch(merge::Merge::Out { element, vector }, part, &partials, items)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, variant: merge::Merge, part: &Part, partials: &Range<u32>, items: u64) -> Result<()> {
        let (m, caps) = (self.merge, self.caps);
        let dim = u64::from(m.value_dim);
        let plane = u64::from(m.seq_q) * dim;
        let workgroups = small("workgroups", items.div_ceil(variant.threads().into()))?;
        let mut params = Params {
            row_tiles: 1,
            col_tiles: workgroups,
            batch0: part.batch.start,
            head0: part.heads.start,
            heads: part.heads.len() as u32,
            row0: part.rows.start,
            row_end: part.rows.end,
            key0: partials.start,
            key_end: partials.end,
            value_dim: m.value_dim,
            flags: if partials.start > 0 { flags::ADD } else { 0 } | if self.words > 1 { flags::TOTALS } else { 0 },
            x_batch: (u64::from(m.heads) * plane) as u32,
            x_head: plane as u32,
            x_row: m.value_dim,
            out_batch: self.out.strides.batch as u32,
            out_head: self.out.strides.head as u32,
            out_row: self.out.strides.row as u32,
            lse_batch: m.heads.wrapping_mul(m.seq_q),
            lse_head: m.seq_q,
            partial_lse: m.lines() as u32,
            partial_out: (m.lines() * dim) as u32,
            item_count: small("items", items)?,
            ..Params::default()
        };
        let mut bindings = Vec::new();
        for (slot, written) in variant.bindings() {
            let lse = bind(caps, self.lines(part), 4, 0);
            let (slot, (offset, size)) = match slot {
                // A binding may not be empty, and nothing of it is read.
                Slot::PartialOut | Slot::PartialLse if m.partials == 0 => (Slot::Spare, (0, planner::SPARE)),
                Slot::PartialOut => {
                    let (offset, size, base) = bind(caps, self.partial_span(part, partials, dim), 4, 0);
                    params.x_base = base;
                    (slot, (offset, size))
                }
                Slot::PartialLse => {
                    let (offset, size, base) = bind(caps, self.partial_span(part, partials, self.words), 4, 0);
                    params.partial_base = base;
                    (slot, (offset, size))
                }
                // Two numbers where lse has one, so that both have the same base.
                Slot::Totals => (slot, (2 * lse.0, 2 * lse.1)),
                Slot::Lse => (slot, (lse.0, lse.1)),
                Slot::Out => {
                    let (offset, size, base) =
                        bind(caps, self.out_span(part), self.out_bytes(), self.out.strides.offset);
                    params.out_base = base;
                    (if self.unpacked { Slot::Unpacked } else { slot }, (offset, size))
                }
                _ => (slot, (0, 4 * u64::from(m.heads))),
            };
            bindings.push(Bound { slot, offset, size, written });
        }
        params.lse_base = bind(caps, self.lines(part), 4, 0).2;
        if let Some(bound) = bindings.iter().find(|bound| bound.size > caps.binding()) {
            return Err(Error::bytes(bound.slot.name(), bound.size, caps.binding()));
        }
        let flops = 16.0 * items as f64 * partials.len() as f64;
        self.steps.push(Variant::Merge(variant), params, bindings, workgroups, flops)?;
        Ok(())
    }
}

impl Attention {
    /// Prepares a merge. It reads [`Slot::PartialOut`], [`Slot::PartialLse`] and [`Slot::Sinks`] (if there are sinks) and writes
    /// [`Slot::Out`] and [`Slot::Lse`] (if asked for).
    pub fn merge(&self, merge: &Merge, options: &Options) -> Result<Operation> {
        let (steps, [totals, unpacked]) = merge.build(self.caps(), options)?;
        let spare = if merge.partials == 0 { planner::SPARE } else { 0 };
        let scratch = [(Slot::Totals, totals), (Slot::Unpacked, unpacked), (Slot::Spare, spare)];
        Operation::with_scratch(self, steps, &scratch)
    }
}

impl Gpu {
    /// Merges partial results on host slices, dense as [`Merge`] says.
    pub fn merge(
        &self,
        merge: &Merge,
        partial_out: &[f32],
        partial_lse: &[f32],
        sinks: Option<&[f32]>,
    ) -> Result<Outputs> {
        let out = merge.checked()?;
        let lines = u64::from(merge.partials) * merge.lines();
        let lengths = [
            ("partial_out", partial_out.len(), lines * u64::from(merge.value_dim)),
            ("partial_lse", partial_lse.len(), lines),
            ("sinks", sinks.map_or(0, <[f32]>::len), if merge.sinks { merge.heads.into() } else { 0 }),
        ];
        match sinks {
            None if merge.sinks => return Err(Error::Missing { field: "sinks" }),
            Some(_) if !merge.sinks => return Err(Error::Unexpected { field: "sinks" }),
            _ => {}
        }
        if let Some(&(field, got, want)) = lengths.iter().find(|&&(_, got, want)| got as u64 != want) {
            return Err(Error::Length { field, got, want: want as usize });
        }
        let operation = self.library().merge(merge, &Options::default())?;
        let empty = vec![0xff; (out.extent() * merge.element.bytes()) as usize];
        let lse = vec![f32::NAN; merge.lines() as usize];
        let buffers = [
            (Slot::PartialOut, Elements::F32(partial_out).bytes()),
            (Slot::PartialLse, Elements::F32(partial_lse).bytes()),
            (Slot::Sinks, Elements::F32(sinks.unwrap_or(&[])).bytes()),
            (Slot::Lse, Elements::F32(&lse).bytes()),
            (Slot::Out, &empty[..]),
        ];
        let wanted = if merge.lse { &[Slot::Out, Slot::Lse][..] } else { &[Slot::Out] };
        let mut read = self.compute(&operation, &buffers, wanted)?.into_iter();
        let bytes = read.next().unwrap_or_default();
        let mut widened = crate::gpu::widened(merge.element, &bytes);
        widened.truncate(out.extent() as usize);
        Ok(Outputs {
            out: widened,
            lse: read.next().map(|bytes| bytemuck::pod_collect_to_vec(&bytes[..4 * merge.lines() as usize])),
            ..Outputs::default()
        })
    }
}
