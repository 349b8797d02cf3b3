//! Rotary position embedding on the GPU.

use std::ops::Range;

use crate::caps::Caps;
use crate::error::{Error, Result};
use crate::kernel::params::Params;
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, rotary};
use crate::problem::{Element, Strides};
use crate::shape::{MAX_DIM, MAX_SIZE};
use crate::step::Bound;
use crate::steps::{Span, Steps, bind, small};

/// Which position a row has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Positions {
    /// u32 [batch, rows]: one for each row.
    Rows,
    /// u32 `[batch]`: row `r` of batch `b` has `positions[b] + r`.
    Starts,
}

/// Rotary position embedding of a [batch, heads, rows, head_dim] tensor.
///
/// The table is f32 [positions, rotary_dim]: a row holds the cosines of its position's angles, then their sines
/// ([`Rotation::table`] makes one). Positions beyond the table take its last row. With 16-bit elements every stride and
/// `head_dim` must be even, and `rotary_dim` a multiple of 4 unless `interleaved`.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// Batches, 0 or more.
    pub batch: u32,
    /// Heads, 1 or more.
    pub heads: u32,
    /// Rows of a head, 0 or more.
    pub rows: u32,
    /// Elements of a row, 1 to 512.
    pub head_dim: u32,
    /// How many of them turn, from the first on; even.
    pub rotary_dim: u32,
    /// Pairs are neighbours (GPT-J, ONNX `interleaved`) rather than `rotary_dim / 2` apart (Llama, GPT-NeoX).
    pub interleaved: bool,
    /// Type of the rows.
    pub element: Element,
    /// Rows of the table, 1 or more unless there is no row to turn.
    pub table_rows: u32,
    /// Where the positions come from.
    pub positions: Positions,
    /// Where the rows stand.
    pub x: Strides,
    /// Where the result goes; `None` turns them in place.
    pub y: Option<Strides>,
    pub(crate) slots: Slots,
}

/// Which buffers a rotation reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    pub(crate) x: Slot,
    pub(crate) y: Slot,
}

#[derive(Clone, Debug)]
struct Part {
    batch: Range<u32>,
    heads: Range<u32>,
    rows: Range<u32>,
}

impl Rotation {
    /// Of a dense f32 [batch, heads, rows, head_dim] tensor in place, all of each row, with a position for each row.
    pub fn new(batch: u32, heads: u32, rows: u32, head_dim: u32, table_rows: u32) -> Self {
        let [h, r, d] = [heads, rows, head_dim].map(u64::from);
        Rotation {
            batch,
            heads,
            rows,
            head_dim,
            rotary_dim: head_dim,
            interleaved: false,
            element: Element::F32,
            table_rows,
            positions: Positions::Rows,
            x: Strides { offset: 0, batch: h * r * d, head: r * d, row: d },
            y: None,
            slots: Slots { x: Slot::Query, y: Slot::Result },
        }
    }

    /// The table of the positions `0..rows`: pair `i` of `n` turns by `position · base^(−i/n)` (base 10000 unless a model says
    /// otherwise), worked out in f64.
    pub fn table(rows: u32, rotary_dim: u32, base: f64) -> Vec<f32> {
        let pairs = rotary_dim / 2;
        let angle = |position: u32, pair: u32| f64::from(position) * base.powf(-f64::from(pair) / f64::from(pairs));
        let row = |position: u32| {
            let cosines = (0..pairs).map(move |pair| angle(position, pair).cos() as f32);
            cosines.chain((0..pairs).map(move |pair| angle(position, pair).sin() as f32))
        };
        (0..rows).flat_map(row).collect()
    }

    /// Elements from the start of x to its last one, that one included; 0 where there is none.
    pub fn extent(&self) -> u64 {
        if [self.batch, self.heads, self.rows].contains(&0) {
            return 0;
        }
        let last = [(self.batch, self.x.batch), (self.heads, self.x.head), (self.rows, self.x.row)];
        let place = |(n, stride): (u32, u64)| u64::from(n - 1) * stride;
        self.x.offset + last.into_iter().map(place).sum::<u64>() + u64::from(self.head_dim)
    }

    /// Words of [`Slot::Positions`].
    pub fn position_count(&self) -> u64 {
        match self.positions {
            Positions::Rows => u64::from(self.batch) * u64::from(self.rows),
            Positions::Starts => self.batch.into(),
        }
    }

    /// Checks every field.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("batch", self.batch, MAX_SIZE),
            ("heads", self.heads, MAX_SIZE),
            ("rows", self.rows, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_DIM),
            ("rotary_dim", self.rotary_dim, self.head_dim),
            ("table_rows", self.table_rows, MAX_SIZE),
        ];
        for (field, value, limit) in sizes {
            // Without a row nothing turns, and no row of the table is read.
            let needed = match field {
                "batch" | "rows" => false,
                "table_rows" => self.batch > 0 && self.rows > 0,
                _ => true,
            };
            if value == 0 && needed {
                return Err(Error::Zero { field });
            }
            if value > limit {
                return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
            }
        }
        let mut places = vec![self.x];
        places.extend(self.y);
        let limit = 1 << 20;
        for s in &places {
            let strides = [
                ("the batch stride of a rotation", s.batch, 20),
                ("the head stride of a rotation", s.head, 8),
                ("the row stride of a rotation", s.row, 0),
                ("the offset of a rotation", s.offset, 20),
            ];
            if let Some((field, value, shift)) = strides.into_iter().find(|&(_, n, shift)| n >> shift > limit) {
                return Err(Error::elements(field, value, limit << shift));
            }
        }
        if !self.rotary_dim.is_multiple_of(2) {
            return Err(Error::Multiple { field: "rotary_dim", value: self.rotary_dim.into(), of: 2 });
        }
        if self.element != Element::F32 {
            if !self.interleaved && !self.rotary_dim.is_multiple_of(4) {
                return Err(Error::Multiple {
                    field: "rotary_dim of 16-bit halves",
                    value: self.rotary_dim.into(),
                    of: 4,
                });
            }
            let strides = places.iter().flat_map(|s| [s.offset, s.batch, s.head, s.row]);
            for value in strides.chain([self.head_dim.into()]) {
                if !value.is_multiple_of(2) {
                    return Err(Error::Multiple { field: "stride of 16-bit rows", value, of: 2 });
                }
            }
        }
        Ok(())
    }

    /// Appends the dispatches.
    pub(crate) fn plan(&self, caps: &Caps, steps: &mut Steps<'_>) -> Result<()> {
        self.check()?;
        if self.batch == 0 || self.rows == 0 {
            return Ok(());
        }
        self.divide(caps, Part { batch: 0..self.batch, heads: 0..self.heads, rows: 0..self.rows }, steps)
    }

    fn divide(&self, caps: &Caps, part: Part, steps: &mut Steps<'_>) -> Result<()> {
        let limit = caps.binding();
        let table = 4 * u64::from(self.table_rows) * u64::from(self.rotary_dim);
        if table > limit {
            return Err(Error::bytes("rotary table", table, limit));
        }
        let size = |strides: &Strides| bind(caps, self.span(strides, &part), self.element.bytes(), 0).1;
        let most = size(&self.x).max(self.y.as_ref().map_or(0, size)).max(4 * self.positions_of(&part));
        if most <= limit {
            return self.part(caps, &part, steps);
        }
        let (mut low, mut high) = (part.clone(), part.clone());
        let half = |range: &Range<u32>| range.start + (range.end - range.start) / 2;
        if part.batch.len() > 1 {
            let at = half(&part.batch);
            (low.batch.end, high.batch.start) = (at, at);
        } else if part.heads.len() > 1 {
            let at = half(&part.heads);
            (low.heads.end, high.heads.start) = (at, at);
        } else if part.rows.len() > 1 {
            let at = half(&part.rows);
            (low.rows.end, high.rows.start) = (at, at);
        } else {
            return Err(Error::bytes("a row of the rotation", most, limit));
        }
        self.divide(caps, low, steps)?;
        self.divide(caps, high, steps)
    }

    fn span(&self, s: &Strides, part: &Part) -> Span {
        let at =
            |b: u32, h: u32, r: u32| s.offset + u64::from(b) * s.batch + u64::from(h) * s.head + u64::from(r) * s.row;
        let last = at(part.batch.end - 1, part.heads.end - 1, part.rows.end - 1);
        (at(part.batch.start, part.heads.start, part.rows.start), last + u64::from(self.head_dim))
    }

    /// Words of the positions that a part reads at most.
    fn positions_of(&self, part: &Part) -> u64 {
        let per_batch = if self.positions == Positions::Rows { self.rows } else { 1 };
        part.batch.len() as u64 * u64::from(per_batch)
    }

    fn part(&self, caps: &Caps, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let variant =
            rotary::Rotary { element: self.element, interleaved: self.interleaved, in_place: self.y.is_none() };
        let packed = self.element != Element::F32;
        let turning = if packed && !self.interleaved { self.rotary_dim / 4 } else { self.rotary_dim / 2 };
        let rest = if packed { (self.head_dim - self.rotary_dim) / 2 } else { self.head_dim - self.rotary_dim };
        let items = if self.y.is_none() { turning } else { turning + rest };
        let row_tiles = (part.rows.len() as u64 * u64::from(items)).div_ceil(variant.threads().into());
        let bytes = self.element.bytes();
        let bound = |s: &Strides| bind(caps, self.span(s, part), bytes, s.offset);
        let (y, y_slot) = match &self.y {
            Some(y) => (*y, self.slots.y),
            None => (self.x, self.slots.y),
        };
        let (x_offset, x_size, x_base) = bound(&self.x);
        let (y_offset, y_size, out_base) = bound(&y);
        let (per_batch, per_row, step) = match self.positions {
            Positions::Rows => (self.rows, 1, 0),
            Positions::Starts => (1, 0, 1),
        };
        let listed = u64::from(part.batch.start) * u64::from(per_batch);
        let (p_offset, p_size, p_base) = bind(caps, (listed, listed + self.positions_of(part)), 4, 0);
        let params = Params {
            row_tiles: small("row tiles", row_tiles)?,
            col_tiles: 1,
            batch0: part.batch.start,
            head0: part.heads.start,
            heads: part.heads.len() as u32,
            row0: part.rows.start,
            row_end: part.rows.end,
            col_end: items,
            head_dim: self.rotary_dim,
            total_kv: self.table_rows,
            x_base: if self.y.is_none() { out_base } else { x_base },
            x_batch: self.x.batch as u32,
            x_head: self.x.head as u32,
            x_row: self.x.row as u32,
            k_base: p_base,
            k_batch: per_batch,
            k_row: per_row,
            k_head: step,
            out_base,
            out_batch: y.batch as u32,
            out_head: y.head as u32,
            out_row: y.row as u32,
            ..Params::default()
        };
        let table = 4 * u64::from(self.table_rows) * u64::from(self.rotary_dim);
        let mut bindings = vec![
            Bound { slot: Slot::Angles, offset: 0, size: table, written: false },
            Bound { slot: Slot::Positions, offset: p_offset, size: p_size, written: false },
            Bound { slot: y_slot, offset: y_offset, size: y_size, written: true },
        ];
        if self.y.is_some() {
            bindings.push(Bound { slot: self.slots.x, offset: x_offset, size: x_size, written: false });
        }
        let planes = (part.batch.len() * part.heads.len()) as u64;
        let workgroups = small("workgroups", row_tiles * planes)?;
        let flops = 32.0 * row_tiles as f64 * f64::from(variant.threads()) * planes as f64;
        steps.push(Variant::Rotary(variant), params, bindings, workgroups, flops)
    }
}
