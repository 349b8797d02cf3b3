//! Merging of partial results on the GPU, so that a sequence can be split over calls, buffers or devices.

use std::ops::Range;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Layout};
use crate::contract::shape::{MAX_DIM, MAX_SIZE};
use crate::contract::tensor::Tensor;
use crate::dispatch::part::{Cut, Excess, Part, count};
use crate::dispatch::step::{Bound, Step};
use crate::dispatch::steps::{SPARE, Span, Steps, bind, checked_u32};
use crate::kernel::eligibility::whole_vectors;
use crate::kernel::merge_totals::{self, MergeTotals};
use crate::kernel::params::{self, At, LineAt, Merging, Place, flags};
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{self, Variant};
use crate::ops::pack::pack;

/// Exact merge of the results of the same query rows over `partials` disjoint parts of the keys.
///
/// `lse = ln(Σ_n exp(lse_n) + exp(sink))` and `out = Σ_n exp(lse_n − lse) · out_n`. The partials are f32 and dense:
///
/// - `partial_out`: [partials, batch, heads, seq_q, value_dim],
/// - `partial_lse`: [partials, batch, heads, seq_q], natural logarithms.
///
/// They must be made *without* sinks, since a sink joins the denominator once: give it here (`sinks`, f32 `[heads]`).
/// A partial whose lse is −inf is empty and contributes nothing, whatever its `out` holds; where all are empty, or there is none, out
/// is 0 and lse −inf (or the sink). An lse of NaN or +inf makes its row NaN; a NaN or an infinity in out shows in its own element.
/// Packed sequences merge as one batch of `total_q` rows.
///
/// ```
/// use wgpu_attention::operations::Merge;
/// use wgpu_attention::reference::{self, Partial};
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
    /// Give out the merged log-sum-exp too (`lse`, f32 [batch, heads, seq_q]).
    pub lse: bool,
    /// Whether there are attention sinks.
    pub sinks: bool,
}

/// What `partial_lse` holds for each row of a partial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Partials {
    /// Its log-sum-exp.
    LogSumExp,
    /// The maximum of its logits and the sum of their exponentials, two f32: the logarithm would lose the sum beside a large maximum.
    Totals,
}

/// Scratch that a merge needs, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scratch {
    /// Maximum and sum of each merged row.
    pub(crate) totals: u64,
    /// `out` in f32.
    pub(crate) unpacked: u64,
    /// What is bound in place of partials where there are none.
    pub(crate) spare: u64,
}

impl Scratch {
    pub(crate) fn sizes(self) -> [(Slot, u64); 3] {
        [(Slot::Totals, self.totals), (Slot::Unpacked, self.unpacked), (Slot::Spare, self.spare)]
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
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] or [`Error::TooLarge`] for a size out of range, [`Error::Overlap`] if two elements of the output have the
    /// same address, and [`Error::Room`] if the partials have too many elements or those of the output are too far apart.
    pub fn check(&self) -> Result<()> {
        self.checked().map(|_| ())
    }

    /// The output, if every field is right.
    pub(crate) fn checked(&self) -> Result<Tensor> {
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

    /// Checks the lengths of host slices.
    pub(crate) fn check_lengths(&self, partial_out: usize, partial_lse: usize, sinks: Option<usize>) -> Result<()> {
        self.check()?;
        let all_rows = u64::from(self.partials) * self.total_rows();
        let field = "sinks";
        let heads = match (sinks, self.sinks) {
            (None, true) => return Err(Error::Missing { field }),
            (Some(_), false) => return Err(Error::Unexpected { field }),
            (_, sinks) => u64::from(sinks) * u64::from(self.heads),
        };
        super::check_lengths(&[
            ("partial_out", partial_out, all_rows * u64::from(self.value_dim)),
            ("partial_lse", partial_lse, all_rows),
            (field, sinks.unwrap_or(0), heads),
        ])
    }

    /// The dispatches on a device, in order: pure data.
    ///
    /// # Errors
    ///
    /// Those of [`Merge::check`], [`Error::Device`] if the device is below what every kernel needs, and [`Error::Room`] if an
    /// operand or the plan takes more than the device or the crate allows. [`Error::Conflict`] if a 16-bit output must be summed
    /// in f32 scratch first and is not dense.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        super::plan(caps, options, |steps| self.dispatches(Partials::LogSumExp, steps).map(drop))
    }

    /// Adds the dispatches to the steps, and gives the scratch that they need.
    pub(crate) fn dispatches(&self, partials: Partials, steps: &mut Steps<'_>) -> Result<Scratch> {
        let (out, caps) = (self.checked()?, steps.caps);
        if out.is_empty() {
            return Ok(Scratch::default());
        }
        let words = if partials == Partials::Totals { 2 } else { 1 };
        let mut planner = Planner { merge: self, caps, out, unpacked: false, words, steps };
        let mut parts = planner.divide(Part::new(0..self.batch, 0..self.heads, 0..self.seq_q))?;
        // Whether several dispatches add to one output decides its scratch, whose size may divide parts further.
        let several = parts.iter().any(|part| planner.step(part, planner.out_step()) < self.partials);
        if self.element != Element::F32 && (several || !whole_vectors(&out)) {
            if !out.is_dense() {
                return Err(Error::Conflict {
                    left: "element",
                    right: "out",
                    why: "16-bit rows that are not whole vectors of four, or whose partials are split over dispatches, need a dense out",
                });
            }
            planner.unpacked = true;
            let finer = parts.into_iter().map(|part| planner.divide(part)).collect::<Result<Vec<_>>>()?;
            parts = finer.concat();
        }
        for part in &parts {
            planner.part(part)?;
        }
        let unpacked = if planner.unpacked { 4 * out.extent() } else { 0 };
        let spare = if self.partials == 0 { SPARE } else { 0 };
        let scratch = Scratch { totals: 8 * self.total_rows(), unpacked, spare };
        for (field, value) in [("totals", scratch.totals), ("out in f32", scratch.unpacked)] {
            let limit = caps.limits.max_buffer_size;
            if value > limit {
                return Err(Error::bytes(field, value, limit));
            }
        }
        if unpacked > 0 {
            pack(caps, self.element, &out, None, steps)?;
        }
        Ok(scratch)
    }

    /// Rows of one partial.
    pub(crate) fn total_rows(&self) -> u64 {
        u64::from(self.batch) * u64::from(self.heads) * u64::from(self.seq_q)
    }
}

struct Planner<'a, 'b> {
    merge: &'b Merge,
    caps: &'a Caps,
    out: Tensor,
    unpacked: bool,
    /// Words of a row in `partial_lse`.
    words: u64,
    steps: &'b mut Steps<'a>,
}

impl Planner<'_, '_> {
    /// Rows of a part within one partial, `[first, end)`.
    fn row_numbers(&self, part: &Part) -> Span {
        let m = self.merge;
        let at = |b: u32, h: u32, i: u32| {
            (u64::from(b) * u64::from(m.heads) + u64::from(h)) * u64::from(m.seq_q) + u64::from(i)
        };
        let last = at(part.batch.end - 1, part.heads.end - 1, part.rows.end - 1);
        (at(part.batch.start, part.heads.start, part.rows.start), last + 1)
    }

    /// The same in units of `each` elements, for the partials of a range.
    fn partial_span(&self, part: &Part, partials: &Range<u32>, each: u64) -> Span {
        let (first, end) = self.row_numbers(part);
        let number = |n: u32, row: u64| (u64::from(n) * self.merge.total_rows() + row) * each;
        match partials.is_empty() {
            true => (0, 0),
            false => (number(partials.start, first), number(partials.end - 1, end)),
        }
    }

    /// Bytes of a row of the longer of the two operands that each partial has.
    fn out_step(&self) -> u64 {
        4 * self.words.max(self.merge.value_dim.into())
    }

    fn out_bytes(&self) -> u64 {
        if self.unpacked { 4 } else { self.merge.element.bytes() }
    }

    fn divide(&self, part: Part) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        part.divide(&|part| self.excess(part), &mut |part| {
            parts.push(part);
            Ok(())
        })?;
        Ok(parts)
    }

    /// The first operand of a part, with one partial alone, that exceeds a binding.
    fn excess(&self, part: &Part) -> Option<Excess> {
        let limit = self.caps.binding();
        let one = |each: u64| self.partial_span(part, &(0..1), each);
        let operands = [
            ("partial_out", bind(self.caps, one(self.out_step() / 4), 4, 0).1 + self.caps.alignment()),
            ("out", bind(self.caps, part.span(&self.out), self.out_bytes(), 0).1),
            // Twice the binding of lse, see `part`.
            ("totals", 2 * (bind(self.caps, one(1), 4, 0).1 + self.caps.alignment())),
        ];
        let (field, bytes) = operands.into_iter().find(|&(_, bytes)| bytes > limit)?;
        Some(Excess { field, bytes, limit, cuts: Cut::outermost() })
    }

    /// How many partials of a part one binding holds, each row having `bytes` bytes.
    fn step(&self, part: &Part, bytes: u64) -> u32 {
        let (first, end) = self.row_numbers(part);
        // `divide` left room for one.
        let room = self.caps.binding() - self.caps.alignment() - (end - first) * bytes;
        let more = room / (self.merge.total_rows() * bytes);
        (more + 1).min(self.merge.partials.into()) as u32
    }

    fn chunks(&self, part: &Part, bytes: u64) -> impl Iterator<Item = Range<u32>> + use<> {
        let (step, partials) = (self.step(part, bytes).max(1), self.merge.partials);
        // Rows without any partial are written all the same.
        (0..partials.max(1)).step_by(step as usize).map(move |first| first..partials.min(first.saturating_add(step)))
    }

    fn part(&mut self, part: &Part) -> Result<()> {
        let (m, rows) = (self.merge, part.planes() * count(&part.rows));
        for partials in self.chunks(part, 4 * self.words) {
            let (lse, sinks) = (m.lse && partials.end == m.partials, m.sinks && partials.start == 0);
            self.dispatch(MergeTotals { lse, sinks }.into(), part, &partials, rows)?;
        }
        let element = if self.unpacked { Element::F32 } else { m.element };
        let vector = m.value_dim.is_multiple_of(4) && whole_vectors(&self.out);
        let items = rows * u64::from(m.value_dim.div_ceil(4));
        for partials in self.chunks(part, self.out_step()) {
            self.dispatch(kernel::merge::Merge { element, vector }.into(), part, &partials, items)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, variant: Variant, part: &Part, partials: &Range<u32>, items: u64) -> Result<()> {
        let (m, caps) = (self.merge, self.caps);
        let dim = u64::from(m.value_dim);
        let plane = u64::from(m.seq_q) * dim;
        let lse = bind(caps, self.row_numbers(part), 4, 0);
        let [mut first_out, mut first_lse, mut out] = [0; 3];
        let mut bindings = Vec::new();
        for (slot, written) in variant.bindings() {
            let (slot, (offset, size, base)) = match slot {
                // A binding may not be empty, and nothing of it is read.
                Slot::PartialOut | Slot::PartialLse if m.partials == 0 => (Slot::Spare, (0, SPARE, 0)),
                Slot::PartialOut => (slot, bind(caps, self.partial_span(part, partials, dim), 4, 0)),
                Slot::PartialLse => (slot, bind(caps, self.partial_span(part, partials, self.words), 4, 0)),
                // Two numbers where lse has one, so that both have the same base.
                Slot::Totals => (slot, (2 * lse.0, 2 * lse.1, lse.2)),
                Slot::Lse => (slot, lse),
                Slot::Out => {
                    let bound = bind(caps, part.span(&self.out), self.out_bytes(), self.out.strides.offset);
                    (if self.unpacked { Slot::Unpacked } else { slot }, bound)
                }
                _ => (slot, (0, 4 * u64::from(m.heads), 0)),
            };
            match slot {
                Slot::PartialOut => first_out = base,
                Slot::PartialLse => first_lse = base,
                Slot::Out | Slot::Unpacked => out = base,
                _ => {}
            }
            bindings.push(Bound { slot, offset, size, written });
        }
        if let Some(bound) = bindings.iter().find(|bound| bound.size > caps.binding()) {
            return Err(Error::bytes(bound.slot.name(), bound.size, caps.binding()));
        }
        let workgroups = checked_u32("workgroups", items.div_ceil(variant.threads().into()))?;
        let place = Place { row_tiles: 1, col_tiles: workgroups, ..part.place() };
        let merging = Merging {
            partial0: partials.start,
            partial_end: partials.end,
            first_lse,
            partials: params::Partials { next_out: (m.total_rows() * dim) as u32, next_lse: m.total_rows() as u32 },
            lse: LineAt { base: lse.2, batch: m.heads.wrapping_mul(m.seq_q), head: m.seq_q },
            items: checked_u32("items", items)?,
        };
        let flags = if partials.start > 0 { flags::ADD } else { 0 } | if self.words > 1 { flags::TOTALS } else { 0 };
        let uniform = match variant {
            Variant::MergeTotals(_) => Uniform::new(&merge_totals::Params { place, merging, flags }),
            _ => Uniform::new(&kernel::merge::Params {
                place,
                merging,
                first_out: At {
                    base: first_out,
                    batch: (u64::from(m.heads) * plane) as u32,
                    head: plane as u32,
                    row: m.value_dim,
                },
                out: At::new(out, &self.out.strides),
                value_dim: m.value_dim,
                flags,
            }),
        };
        let flops = 16.0 * items as f64 * partials.len() as f64;
        self.steps.push(part, variant, uniform, bindings, workgroups, flops)?;
        Ok(())
    }
}
