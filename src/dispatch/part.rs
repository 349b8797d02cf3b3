//! Parts of the work: what one dispatch may bind.

use std::cmp::Reverse;
use std::ops::Range;

use crate::contract::error::{Error, Result};
use crate::contract::problem::Strides;
use crate::contract::tensor::Tensor;
use crate::dispatch::steps::Span;
use crate::kernel::params::Place;

/// A box of the work that is dispatched at once. An axis that an operation does not have is `0..1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) batch: Range<u32>,
    pub(crate) heads: Range<u32>,
    pub(crate) rows: Range<u32>,
    /// Rows of a cache, of which only these are written.
    pub(crate) cache_rows: Range<u32>,
    /// Inputs of a projection, over which it sums.
    pub(crate) inputs: Range<u32>,
    /// Columns of a projection's output.
    pub(crate) columns: Range<u32>,
}

/// An axis of a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    Batch,
    Heads,
    Rows,
    CacheRows,
    Inputs,
    Columns,
}

/// How a part may be cut in two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) axis: Axis,
    /// The first half has a multiple of so many places, if the axis is long enough.
    pub(crate) step: u32,
    /// Otherwise it has a multiple of so many.
    pub(crate) least: u32,
}

impl Cut {
    pub(crate) fn at_multiples(axis: Axis, step: u32) -> Self {
        Cut { axis, step, least: 1 }
    }

    pub(crate) fn anywhere(axis: Axis) -> Self {
        Cut::at_multiples(axis, 1)
    }

    /// Batches first, then heads, then rows: the halves are then as few pieces of memory as they can be.
    pub(crate) fn outermost() -> Vec<Cut> {
        [Axis::Batch, Axis::Heads, Axis::Rows].map(Cut::anywhere).to_vec()
    }

    /// First the axis that takes up most of a tensor with these strides; `rows` is the axis of the part that its rows belong to.
    pub(crate) fn widest(strides: &Strides, rows: Axis) -> Vec<Cut> {
        let mut axes = [(strides.row, rows), (strides.head, Axis::Heads), (strides.batch, Axis::Batch)];
        axes.sort_by_key(|&(stride, _)| Reverse(stride));
        axes.map(|(_, axis)| Cut::anywhere(axis)).to_vec()
    }
}

/// An operand of a part that is larger than its limit.
#[derive(Clone, Debug)]
pub(crate) struct Excess {
    /// The operand's name in an error.
    pub(crate) field: &'static str,
    pub(crate) bytes: u64,
    pub(crate) limit: u64,
    /// What makes it smaller; the first cut that is possible is made.
    pub(crate) cuts: Vec<Cut>,
}

impl Part {
    /// The batches, heads and rows as a uniform has them.
    pub(crate) fn place(&self) -> Place {
        Place {
            batch0: self.batch.start,
            head0: self.heads.start,
            heads: self.heads.end - self.heads.start,
            row0: self.rows.start,
            row_end: self.rows.end,
            ..Place::default()
        }
    }

    pub(crate) fn new(batch: Range<u32>, heads: Range<u32>, rows: Range<u32>) -> Self {
        Part { batch, heads, rows, cache_rows: 0..1, inputs: 0..1, columns: 0..1 }
    }

    fn axis(&mut self, axis: Axis) -> &mut Range<u32> {
        match axis {
            Axis::Batch => &mut self.batch,
            Axis::Heads => &mut self.heads,
            Axis::Rows => &mut self.rows,
            Axis::CacheRows => &mut self.cache_rows,
            Axis::Inputs => &mut self.inputs,
            Axis::Columns => &mut self.columns,
        }
    }

    /// Pairs of a batch and a head.
    pub(crate) fn planes(&self) -> u64 {
        count(&self.batch) * count(&self.heads)
    }

    /// Elements of a [batch, heads, rows, dim] tensor from the first to the last one that the part touches.
    pub(crate) fn span(&self, tensor: &Tensor) -> Span {
        span(tensor, &self.batch, &self.heads, &self.rows)
    }

    fn halves(&self, cut: &Cut) -> Option<[Part; 2]> {
        let (mut low, mut high) = (self.clone(), self.clone());
        let Range { start, end } = low.axis(cut.axis).clone();
        let half = (end - start) / 2;
        let first =
            [cut.step, cut.least].map(|step| half.next_multiple_of(step)).into_iter().find(|&n| n < end - start);
        let middle = start + first.filter(|&n| n > 0)?;
        (low.axis(cut.axis).end, high.axis(cut.axis).start) = (middle, middle);
        Some([low, high])
    }

    /// Halves the part until `excess` finds nothing that is too large, and gives the pieces in order.
    ///
    /// # Errors
    ///
    /// [`Error::Room`] where no cut helps.
    pub(crate) fn divide(
        self,
        excess: &impl Fn(&Part) -> Option<Excess>,
        piece: &mut impl FnMut(Part) -> Result<()>,
    ) -> Result<()> {
        let Some(Excess { field, bytes, limit, cuts }) = excess(&self) else { return piece(self) };
        let halves = cuts.iter().find_map(|cut| self.halves(cut)).ok_or_else(|| Error::bytes(field, bytes, limit))?;
        halves.into_iter().try_for_each(|half| half.divide(excess, piece))
    }
}

pub(crate) fn count(range: &Range<u32>) -> u64 {
    u64::from(range.end - range.start)
}

/// Elements of a tensor from the first to the last one in these ranges.
pub(crate) fn span(tensor: &Tensor, batch: &Range<u32>, heads: &Range<u32>, rows: &Range<u32>) -> Span {
    if tensor.is_empty() {
        return (0, 0);
    }
    let first = tensor.at(batch.start, heads.start, rows.start);
    (first, tensor.at(batch.end - 1, heads.end - 1, rows.end - 1) + u64::from(tensor.dim))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(part: Part, excess: impl Fn(&Part) -> Option<Excess>) -> Result<Vec<Part>> {
        let mut pieces = Vec::new();
        let piece = |part| {
            pieces.push(part);
            Ok(())
        };
        part.divide(&excess, &mut { piece }).map(|()| pieces)
    }

    #[test]
    fn the_first_axis_that_can_be_cut_is_cut_at_a_multiple_of_its_step() {
        let excess = |most: u64, cuts: &[Cut]| {
            let cuts = cuts.to_vec();
            move |part: &Part| {
                let bytes = part.planes() * count(&part.rows);
                (bytes > most).then(|| Excess { field: "q", bytes, limit: most, cuts: cuts.clone() })
            }
        };
        let part = Part::new(0..1, 2..4, 0..10);
        let rows = |heads: Range<u32>, rows: Range<u32>| Part::new(0..1, heads, rows);
        let cuts = [Cut::anywhere(Axis::Batch), Cut::anywhere(Axis::Heads), Cut::at_multiples(Axis::Rows, 4)];
        let want = [rows(2..3, 0..8), rows(2..3, 8..10), rows(3..4, 0..8), rows(3..4, 8..10)];
        assert_eq!(pieces(part.clone(), excess(8, &cuts)), Ok(want.to_vec()));
        // A step that does not fit gives way to the least one.
        let cuts = [Cut { axis: Axis::Rows, step: 16, least: 2 }];
        let want = [rows(2..4, 0..6), rows(2..4, 6..10)];
        assert_eq!(pieces(part.clone(), excess(12, &cuts)), Ok(want.to_vec()));
        // Two rows cannot be cut where the least piece is two rows.
        let refused = Error::bytes("q", 4, 3);
        assert_eq!(pieces(part, excess(3, &cuts)), Err(refused));
    }

    #[test]
    fn the_widest_axis_of_a_tensor_is_cut_first() {
        let axes = |strides, rows| Cut::widest(&strides, rows).into_iter().map(|cut| cut.axis).collect::<Vec<_>>();
        let strides = Strides { offset: 0, batch: 60, head: 4, row: 12 };
        assert_eq!(axes(strides, Axis::Rows), [Axis::Batch, Axis::Rows, Axis::Heads]);
        let alike = Strides { offset: 0, batch: 4, head: 4, row: 4 };
        assert_eq!(axes(alike, Axis::CacheRows), [Axis::CacheRows, Axis::Heads, Axis::Batch]);
    }
}
