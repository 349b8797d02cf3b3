//! Rotary position embedding on the GPU.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Strides};
use crate::contract::shape::{MAX_DIM, MAX_SIZE};
use crate::contract::tensor::Tensor;
use crate::dispatch::part::{Cut, Excess, Part, count};
use crate::dispatch::step::{Bound, Step};
use crate::dispatch::steps::{Steps, bind, bound, checked_u32};
use crate::kernel::params::{At, Place, RotationTable};
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, rotary};

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
    /// How many of them are rotated, from the first on; even.
    pub rotary_dim: u32,
    /// Pairs are neighbours (GPT-J, ONNX `interleaved`) rather than `rotary_dim / 2` apart (Llama, GPT-NeoX).
    pub interleaved: bool,
    /// Type of the rows.
    pub element: Element,
    /// Rows of the table, 1 or more unless there is no row to rotate.
    pub table_rows: u32,
    /// Where the positions come from.
    pub positions: Positions,
    /// Where the rows stand.
    pub x: Strides,
    /// Where the result goes; `None` rotates them in place.
    pub y: Option<Strides>,
}

/// Which buffers the dispatches of a rotation bind; one in place binds only `x`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    pub(crate) x: Slot,
    pub(crate) y: Slot,
}

impl Slots {
    /// The buffers of an operation of its own.
    pub(crate) const OWN: Slots = Slots { x: Slot::X, y: Slot::Y };
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
        }
    }

    /// The table of the positions `0..rows`: pair `i` of `n` is rotated by `position · base^(−i/n)` (base 10000 unless a model says
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
        let place = |sum: u64, (n, stride): (u32, u64)| sum.saturating_add(u64::from(n - 1).saturating_mul(stride));
        last.into_iter().fold(self.x.offset, place).saturating_add(u64::from(self.head_dim))
    }

    /// How many positions there are.
    pub fn position_count(&self) -> u64 {
        match self.positions {
            Positions::Rows => u64::from(self.batch) * u64::from(self.rows),
            Positions::Starts => self.batch.into(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] or [`Error::TooLarge`] for a size out of range, [`Error::Room`] for a stride or an offset that is too
    /// large, and [`Error::Multiple`] for an odd `rotary_dim` or for 16-bit rows that do not stand in whole words.
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
            // Without a row nothing is rotated, and no row of the table is read.
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

    /// Checks the lengths of host slices.
    pub(crate) fn check_lengths(&self, x: usize, table: usize, positions: usize) -> Result<()> {
        self.check()?;
        super::check_lengths(&[
            ("x", x, self.extent()),
            ("table", table, u64::from(self.table_rows) * u64::from(self.rotary_dim)),
            ("positions", positions, self.position_count()),
        ])
    }

    /// The dispatches on a device, in order: pure data.
    ///
    /// # Errors
    ///
    /// Those of [`Rotation::check`], [`Error::Device`] if the device is below what every kernel needs, and [`Error::Room`] if an
    /// operand or the plan takes more than the device or the crate allows.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        super::plan(caps, options, |steps| self.dispatches(Slots::OWN, steps))
    }

    /// Adds the dispatches to the steps.
    pub(crate) fn dispatches(&self, slots: Slots, steps: &mut Steps<'_>) -> Result<()> {
        self.check()?;
        if self.batch == 0 || self.rows == 0 {
            return Ok(());
        }
        let (sizes, dim) = ([self.batch, self.heads, self.rows], self.head_dim);
        let tensor = |strides| Tensor { sizes, dim, strides };
        let planner = Planner { rotation: self, slots, caps: steps.caps, x: tensor(self.x), y: self.y.map(tensor) };
        Part::new(0..self.batch, 0..self.heads, 0..self.rows)
            .divide(&|part| planner.excess(part), &mut |part| planner.part(&part, steps))
    }

    fn table_bytes(&self) -> u64 {
        4 * u64::from(self.table_rows) * u64::from(self.rotary_dim)
    }
}

struct Planner<'a> {
    rotation: &'a Rotation,
    slots: Slots,
    caps: &'a Caps,
    x: Tensor,
    y: Option<Tensor>,
}

impl Planner<'_> {
    /// The first operand of a part that exceeds a binding.
    fn excess(&self, part: &Part) -> Option<Excess> {
        let limit = self.caps.binding();
        let table = self.rotation.table_bytes();
        if table > limit {
            return Some(Excess { field: "rotary table", bytes: table, limit, cuts: Vec::new() });
        }
        let size = |tensor: &Tensor| bind(self.caps, part.span(tensor), self.rotation.element.bytes(), 0).1;
        let bytes = size(&self.x).max(self.y.as_ref().map_or(0, size)).max(4 * self.positions(part));
        (bytes > limit).then(|| Excess { field: "a row of the rotation", bytes, limit, cuts: Cut::outermost() })
    }

    /// How many positions a part reads at most.
    fn positions(&self, part: &Part) -> u64 {
        count(&part.batch) * u64::from(self.per_batch())
    }

    /// Positions of one batch.
    fn per_batch(&self) -> u32 {
        if self.rotation.positions == Positions::Rows { self.rotation.rows } else { 1 }
    }

    fn part(&self, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let (r, caps, bytes) = (self.rotation, self.caps, self.rotation.element.bytes());
        let variant = rotary::Rotary { element: r.element, interleaved: r.interleaved, in_place: self.y.is_none() };
        let packed = r.element != Element::F32;
        let pairs = if packed && !r.interleaved { r.rotary_dim / 4 } else { r.rotary_dim / 2 };
        let rest = if packed { (r.head_dim - r.rotary_dim) / 2 } else { r.head_dim - r.rotary_dim };
        let items = if self.y.is_none() { pairs } else { pairs + rest };
        let row_tiles = (count(&part.rows) * u64::from(items)).div_ceil(variant.threads().into());
        let (y, y_slot) = self.y.as_ref().map_or((&self.x, self.slots.x), |y| (y, self.slots.y));
        let (from, x_base) = bound(caps, self.slots.x, part.span(&self.x), bytes, r.x.offset, false)?;
        let (to, y_base) = bound(caps, y_slot, part.span(y), bytes, y.strides.offset, true)?;
        let (positions_row, position_step) = match r.positions {
            Positions::Rows => (1, 0),
            Positions::Starts => (0, 1),
        };
        let first = u64::from(part.batch.start) * u64::from(self.per_batch());
        let (positions, positions_base) =
            bound(caps, Slot::Positions, (first, first + self.positions(part)), 4, 0, false)?;
        let uniform = Uniform::new(&rotary::Params {
            place: Place { row_tiles: checked_u32("row tiles", row_tiles)?, col_tiles: 1, ..part.place() },
            x: At::new(x_base, &r.x),
            y: At::new(y_base, &y.strides),
            rotation: RotationTable {
                table_rows: r.table_rows,
                rotary_dim: r.rotary_dim,
                positions_base,
                positions_batch: self.per_batch(),
                positions_row,
                position_step,
            },
            items,
        });
        let table = Bound { slot: Slot::Angles, offset: 0, size: r.table_bytes(), written: false };
        let mut bindings = vec![table, positions, to];
        if self.y.is_some() {
            bindings.push(from);
        }
        let workgroups = checked_u32("workgroups", row_tiles * part.planes())?;
        let flops = 32.0 * row_tiles as f64 * f64::from(variant.threads()) * part.planes() as f64;
        steps.push(part, Variant::Rotary(variant), uniform, bindings, workgroups, flops)
    }
}
