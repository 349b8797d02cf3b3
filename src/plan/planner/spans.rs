//! Which elements of each tensor a part touches, and how many bytes its scratch takes.

use std::ops::Range;

use super::Planner;
use crate::contract::problem::Broadcast;
use crate::contract::tensor::Tensor;
use crate::dispatch::part::{Part, count, span};
use crate::dispatch::steps::{self, Span};
use crate::kernel::{Variant, fused};

impl Planner<'_> {
    pub(super) fn score_bytes(&self, part: &Part) -> u64 {
        4 * part.planes() * count(&part.rows) * u64::from(self.shape.score_row())
    }

    /// Of the rows of a fused kernel that wait between dispatches.
    pub(super) fn state_bytes(&self, part: &Part) -> u64 {
        self.route.kernel().map_or(0, |kernel| {
            let grid = fused::grid(kernel, self.shape);
            let tiles = count(&part.rows).div_ceil(grid.tile_rows.into()) * grid.columns;
            part.planes() * tiles * kernel.waiting_bytes()
        })
    }

    pub(super) fn query_span(&self, tensor: &Tensor, part: &Part) -> Span {
        let (batch, rows) = match self.shape.problem.packed {
            None => (part.batch.clone(), part.rows.clone()),
            Some(packed) => (0..1, 0..packed.total_q),
        };
        span(tensor, &batch, &part.heads, &rows)
    }

    pub(super) fn key_span(&self, tensor: &Tensor, part: &Part, keys: &Range<u32>) -> Span {
        let (batch, rows) = match (self.shape.problem.packed, self.shape.problem.paged) {
            (Some(packed), _) => (0..1, 0..packed.total_kv),
            // Any page may hold keys of any sequence.
            (_, Some(paged)) => (0..paged.pages, 0..paged.page_size),
            _ => (part.batch.clone(), keys.clone()),
        };
        let group = self.shape.group;
        let heads = part.heads.start / group..(part.heads.end - 1) / group + 1;
        span(tensor, &batch, &heads, &rows)
    }

    pub(super) fn lse_span(&self, part: &Part) -> Span {
        let s = self.shape;
        let (heads, last) = (u64::from(s.problem.heads), |r: &Range<u32>| u64::from(r.end - 1));
        match s.problem.packed {
            None => {
                let row = |b: u64, h: u64, i: u64| (b * heads + h) * u64::from(s.problem.seq_q) + i;
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
    pub(super) fn dense_span(&self, part: &Part) -> Span {
        let s = self.shape;
        broadcast_span(&Broadcast([s.problem.batch, s.problem.heads, s.problem.seq_q, s.problem.seq_kv]), part)
    }

    pub(super) fn bind(&self, span: Span, bytes: u64, origin: u64) -> (u64, u64, u32) {
        steps::bind(self.caps, span, bytes, origin)
    }

    /// Lines of a part that a kernel's tiles divide: rows, of each head or of all query heads of a key/value head.
    pub(super) fn tile_lines(&self, variant: &Variant, part: &Part) -> u64 {
        count(&part.rows) * if variant.takes_group() { count(&self.group(part)) } else { 1 }
    }

    /// The query heads of a key/value head that a part has: all, unless it lies within one group.
    pub(super) fn group(&self, part: &Part) -> Range<u32> {
        let group = self.shape.group;
        let first = part.heads.start % group;
        first..group.min(first + part.heads.end - part.heads.start)
    }
}

pub(super) fn broadcast_span(Broadcast(shape): &Broadcast, part: &Part) -> Span {
    let [b, h, r] = [&part.batch, &part.heads, &part.rows];
    let pick = |axis: usize, full: u32| if shape[axis] == 1 { 0 } else { u64::from(full) };
    let row = |b: u32, h: u32, r: u32| {
        ((pick(0, b) * u64::from(shape[1]) + pick(1, h)) * u64::from(shape[2]) + pick(2, r)) * u64::from(shape[3])
    };
    (row(b.start, h.start, r.start), row(b.end - 1, h.end - 1, r.end - 1) + u64::from(shape[3]))
}
