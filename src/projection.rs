//! `y = x w + b` on the GPU: the linear layers around attention.

use std::ops::Range;

use crate::caps::Caps;
use crate::choose;
use crate::error::{Error, Result};
use crate::kernel::body::{Body, Tile};
use crate::kernel::params::{Params, flags};
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, project};
use crate::options::Options;
use crate::problem::{Element, Strides};
use crate::shape::MAX_SIZE;
use crate::step::Bound;
use crate::steps::{Span, Steps, bind, small};

/// Order of a weight matrix in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// [in, out], as Keras and TensorFlow keep it.
    #[default]
    InOut,
    /// [out, in], as PyTorch keeps it.
    OutIn,
}

/// A product `y[b,r,c] = Σ_i x[b,r,i] · w[i,c] + bias[c]`. x, bias and y are f32.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// Batches of rows, 0 or more.
    pub batch: u32,
    /// Rows of a batch, 0 or more.
    pub rows: u32,
    /// Columns of x, 1 or more.
    pub inputs: u32,
    /// Columns of y, 1 or more.
    pub outputs: u32,
    /// Where element (b, r, i) of x stands; `head` is unused.
    pub x: Strides,
    /// Order of the weights.
    pub order: Order,
    /// Type of the weights.
    pub element: Element,
    /// Place of the first weight, in elements.
    pub weight_offset: u64,
    /// Elements from one row of the matrix in memory to the next; at least `outputs` ([`Order::InOut`]) or `inputs`.
    pub weight_row: u64,
    /// Place of the first bias, if there is one.
    pub bias: Option<u64>,
    /// Columns of a head of y; divides `outputs`.
    pub head_columns: u32,
    /// Where element (b, head, r, c) of y stands.
    pub y: Strides,
    pub(crate) slots: Slots,
    /// Rotary position embedding before y is stored, as [`Projection::turn_obstacle`] allows it.
    pub(crate) turn: Option<Turn>,
}

/// Rotary position embedding of a projection's first columns. Row `r` of batch `b` stands at `positions[b] + r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// End of the columns that belong to turning heads.
    pub(crate) columns: u32,
    /// Columns of such a head.
    pub(crate) head_dim: u32,
    /// How many of them turn, from the first on.
    pub(crate) rotary_dim: u32,
    /// Pairs are neighbours rather than `rotary_dim / 2` apart.
    pub(crate) interleaved: bool,
    /// Rows of the table.
    pub(crate) table_rows: u32,
    /// Batches, and rows of one, whatever the projection makes of them.
    pub(crate) batch: u32,
    pub(crate) rows: u32,
}

/// Which buffers a projection reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    pub(crate) x: Slot,
    pub(crate) matrix: Slot,
    pub(crate) y: Slot,
}

/// A part of a projection that one dispatch may bind.
#[derive(Clone, Debug)]
struct Part {
    batch: Range<u32>,
    rows: Range<u32>,
    inputs: Range<u32>,
    columns: Range<u32>,
}

impl Projection {
    /// Dense rows times a dense matrix, without bias.
    pub fn new(rows: u32, inputs: u32, outputs: u32, order: Order, element: Element) -> Self {
        let weight_row = match order {
            Order::InOut => outputs,
            Order::OutIn => inputs,
        };
        Projection {
            batch: 1,
            rows,
            inputs,
            outputs,
            x: Strides { row: inputs.into(), ..Strides::default() },
            order,
            element,
            weight_offset: 0,
            weight_row: weight_row.into(),
            bias: None,
            head_columns: outputs,
            y: Strides { row: outputs.into(), ..Strides::default() },
            slots: Slots { x: Slot::Query, matrix: Slot::Matrix(0), y: Slot::Result },
            turn: None,
        }
    }

    fn check(&self) -> Result<()> {
        let sizes = [("batch", self.batch), ("rows", self.rows), ("inputs", self.inputs), ("outputs", self.outputs)];
        for (field, value) in sizes {
            if value == 0 && ["inputs", "outputs"].contains(&field) {
                return Err(Error::Zero { field });
            }
            if value > MAX_SIZE {
                return Err(Error::TooLarge { field, value: value.into(), limit: MAX_SIZE.into() });
            }
        }
        if self.head_columns == 0 || !self.outputs.is_multiple_of(self.head_columns) {
            return Err(Error::Divide {
                field: "head_columns",
                value: self.head_columns.into(),
                of: "outputs",
                whole: self.outputs.into(),
            });
        }
        let dense = match self.order {
            Order::InOut => self.outputs,
            Order::OutIn => self.inputs,
        };
        if self.weight_row < dense.into() {
            return Err(Error::Entry {
                field: "weight_row",
                index: 0,
                value: self.weight_row as i64,
                want: "at least",
                limit: dense.into(),
            });
        }
        // Byte counts stay far from u64's end, so that planning adds without checks.
        let limit = 1 << 48;
        let places = [
            ("a stride of x", [self.x.offset, self.x.batch, 0, self.x.row]),
            ("a stride of y", [self.y.offset, self.y.batch, self.y.head, self.y.row]),
            ("a stride of the weights", [self.weight_offset, self.weight_row, self.bias.unwrap_or(0), 0]),
        ];
        for (field, strides) in places {
            if let Some(&value) = strides.iter().find(|&&stride| stride > limit >> 28) {
                return Err(Error::elements(field, value, limit >> 28));
            }
        }
        Ok(())
    }

    /// Rows of all batches as one, where x and y allow that: larger tiles, fewer of them.
    fn flat(&self) -> Self {
        let mut flat = self.clone();
        let rows = u64::from(self.rows);
        let in_line = self.x.batch == rows * self.x.row && self.y.batch == rows * self.y.row;
        if self.batch > 1 && in_line && rows * u64::from(self.batch) <= u64::from(MAX_SIZE) {
            (flat.batch, flat.rows) = (1, self.rows * self.batch);
        }
        flat
    }

    fn vector(&self) -> bool {
        let strides = |s: &Strides, heads: u32| {
            let axes = [(s.batch, self.batch), (s.head, heads), (s.row, self.rows)];
            s.offset.is_multiple_of(4) && axes.iter().all(|&(stride, size)| size == 1 || stride.is_multiple_of(4))
        };
        [self.inputs, self.outputs, self.head_columns].iter().all(|n| n.is_multiple_of(4))
            && strides(&self.x, 1)
            && strides(&self.y, self.outputs / self.head_columns)
            && [self.weight_offset, self.weight_row].iter().all(|n| n.is_multiple_of(4))
    }

    fn tile(&self, caps: &Caps, options: &Options) -> Result<Tile> {
        let (body, _) = choose::choose_body(caps, options);
        if let Body::Lanes { lanes, .. } = body {
            let [many, one] = project::lane_tiles(body);
            return Ok(if self.rows <= lanes { one } else { many });
        }
        let fits = |tile: &Tile| {
            let variant = Variant::Project(self.variant(*tile));
            choose::fits(caps, variant.threads(), variant.workgroup_bytes())
        };
        choose::largest(&project::TILED, self.rows, fits, "project")
    }

    fn variant(&self, tile: Tile) -> project::Project {
        let transposed = self.order == Order::OutIn;
        project::Project { tile, element: self.element, transposed, vector: self.vector(), turned: self.turn.is_some() }
    }

    /// What keeps the columns from turning before they are stored.
    pub(crate) fn turn_obstacle(&self, caps: &Caps, turn: &Turn) -> Option<String> {
        let eights = [self.outputs, turn.columns, turn.head_dim, turn.rotary_dim].iter().all(|n| n.is_multiple_of(8));
        // Parts end where a head does.
        let head = match self.order {
            Order::OutIn => u64::from(turn.head_dim) * self.weight_row * self.element.bytes(),
            Order::InOut => 0,
        };
        let table = 4 * u64::from(turn.table_rows) * u64::from(turn.rotary_dim);
        let largest = head.max(table).max(4 * u64::from(turn.batch)) + caps.alignment();
        if !eights || !self.flat().vector() {
            Some("widths, heads or their turning part are not whole vectors".into())
        } else if self.order == Order::InOut && !turn.interleaved {
            Some("the columns of a pair stand apart in [in, out] weights".into())
        } else if largest > caps.binding() {
            Some("the weights of one head, the table or the positions exceed a binding".into())
        } else {
            choose::too_many_bindings(caps, 6)
        }
    }

    /// Appends the dispatches.
    pub(crate) fn plan(&self, caps: &Caps, options: &Options, steps: &mut Steps<'_>) -> Result<()> {
        self.check()?;
        if self.batch == 0 || self.rows == 0 {
            return Ok(());
        }
        let flat = self.flat();
        let variant = flat.variant(flat.tile(caps, options)?);
        let whole = Part { batch: 0..flat.batch, rows: 0..flat.rows, inputs: 0..flat.inputs, columns: 0..flat.outputs };
        flat.divide(caps, &variant, whole, steps)
    }

    /// Halves a part until each of its operands fits one binding.
    fn divide(&self, caps: &Caps, variant: &project::Project, part: Part, steps: &mut Steps<'_>) -> Result<()> {
        let limit = caps.binding();
        let bytes = |span: Span, bytes: u64| bind(caps, span, bytes, 0).1;
        let [x, w, y] = [
            bytes(self.x_span(&part), 4),
            bytes(self.w_span(&part), self.element.bytes()),
            bytes(self.y_span(&part), 4),
        ];
        if x.max(w).max(y) <= limit {
            return self.part(caps, variant, &part, steps);
        }
        let (mut low, mut high) = (part.clone(), part.clone());
        // Along inputs the halves add up in order, so columns go first wherever they help.
        let columns = |low: &mut Part, high: &mut Part| {
            let [step, least] = match &self.turn {
                Some(turn) => [turn.head_dim; 2],
                None => [variant.tile.tile_cols, if variant.vector { 4 } else { 1 }],
            };
            split(&mut low.columns, &mut high.columns, step, least)
        };
        let inputs = |low: &mut Part, high: &mut Part| split(&mut low.inputs, &mut high.inputs, 4, 4);
        let cut = if w > limit {
            match self.order {
                Order::OutIn => columns(&mut low, &mut high),
                Order::InOut => inputs(&mut low, &mut high),
            }
        } else {
            split(&mut low.batch, &mut high.batch, 1, 1)
                || split(&mut low.rows, &mut high.rows, variant.tile.tile_rows, 1)
                || (y > limit && columns(&mut low, &mut high))
                || (x > limit && inputs(&mut low, &mut high))
        };
        if !cut {
            let named = [("x", x), ("weight", w), ("y", y)];
            let &(field, value) = named.iter().max_by_key(|(_, bytes)| bytes).expect("three operands");
            return Err(Error::bytes(field, value, limit));
        }
        self.divide(caps, variant, low, steps)?;
        self.divide(caps, variant, high, steps)
    }

    fn x_span(&self, part: &Part) -> Span {
        let at = |b: u32, r: u32| self.x.offset + u64::from(b) * self.x.batch + u64::from(r) * self.x.row;
        let first = at(part.batch.start, part.rows.start) + u64::from(part.inputs.start);
        (first, at(part.batch.end - 1, part.rows.end - 1) + u64::from(part.inputs.end))
    }

    fn w_span(&self, part: &Part) -> Span {
        let (major, minor) = match self.order {
            Order::InOut => (&part.inputs, &part.columns),
            Order::OutIn => (&part.columns, &part.inputs),
        };
        let at = |major: u32, minor: u32| self.weight_offset + u64::from(major) * self.weight_row + u64::from(minor);
        (at(major.start, minor.start), at(major.end - 1, minor.end - 1) + 1)
    }

    fn y_span(&self, part: &Part) -> Span {
        let at = |b: u32, h: u32, r: u32| {
            self.y.offset + u64::from(b) * self.y.batch + u64::from(h) * self.y.head + u64::from(r) * self.y.row
        };
        let heads = part.columns.start / self.head_columns..(part.columns.end - 1) / self.head_columns;
        let first = at(part.batch.start, heads.start, part.rows.start);
        (first, at(part.batch.end - 1, heads.end, part.rows.end - 1) + u64::from(self.head_columns))
    }

    fn part(&self, caps: &Caps, variant: &project::Project, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let (rows, columns) = (part.rows.end - part.rows.start, part.columns.end - part.columns.start);
        let (batch, inputs) = (part.batch.end - part.batch.start, part.inputs.end - part.inputs.start);
        let row_tiles = rows.div_ceil(variant.tile.tile_rows);
        let col_tiles = columns.div_ceil(variant.tile.tile_cols);
        let (x_offset, x_size, x_base) = bind(caps, self.x_span(part), 4, self.x.offset);
        let (w_offset, w_size, w_base) = bind(caps, self.w_span(part), self.element.bytes(), self.weight_offset);
        let (y_offset, y_size, out_base) = bind(caps, self.y_span(part), 4, self.y.offset);
        let (first, last) = (part.inputs.start == 0, part.inputs.end == self.inputs);
        // A shader that can take a bias binds something even where there is none.
        let biases = self.bias.map_or((0, 4), |at| (at, at + u64::from(self.outputs)));
        let (b_offset, b_size, b_base) = bind(caps, biases, 4, self.bias.unwrap_or(0));
        let turning = self.turn.map_or(Params::default(), |turn| Params {
            flags: if last { flags::TURN } else { 0 } | if turn.interleaved { 0 } else { flags::HALVES },
            turn_end: turn.columns,
            turn_head: turn.head_dim,
            head_dim: turn.rotary_dim,
            total_kv: turn.table_rows,
            seq_q: turn.rows,
            k_batch: 1,
            k_head: 1,
            ..Params::default()
        });
        let params = Params {
            row_tiles,
            col_tiles,
            batch0: part.batch.start,
            heads: 1,
            row0: part.rows.start,
            row_end: part.rows.end,
            in0: part.inputs.start,
            in_end: part.inputs.end,
            col0: part.columns.start,
            col_end: part.columns.end,
            col_head: self.head_columns,
            flags: turning.flags | if first { self.bias.map_or(0, |_| flags::BIAS) } else { flags::ADD },
            x_base,
            x_batch: self.x.batch as u32,
            x_row: self.x.row as u32,
            w_base,
            w_row: self.weight_row as u32,
            b_base,
            out_base,
            out_batch: self.y.batch as u32,
            out_head: self.y.head as u32,
            out_row: self.y.row as u32,
            ..turning
        };
        let mut bindings = vec![
            Bound { slot: self.slots.x, offset: x_offset, size: x_size, written: false },
            Bound { slot: self.slots.matrix, offset: w_offset, size: w_size, written: false },
            Bound { slot: Slot::Shifts, offset: b_offset, size: b_size, written: false },
            Bound { slot: self.slots.y, offset: y_offset, size: y_size, written: true },
        ];
        if let Some(turn) = &self.turn {
            let table = 4 * u64::from(turn.table_rows) * u64::from(turn.rotary_dim);
            bindings.push(Bound { slot: Slot::Angles, offset: 0, size: table, written: false });
            bindings.push(Bound { slot: Slot::Positions, offset: 0, size: 4 * u64::from(turn.batch), written: false });
        }
        let workgroups = small("workgroups", u64::from(row_tiles) * u64::from(col_tiles) * u64::from(batch))?;
        let flops = 2.0 * f64::from(batch) * f64::from(rows) * f64::from(inputs) * f64::from(columns);
        steps.push(Variant::Project(*variant), params, bindings, workgroups, flops)
    }
}

/// Cuts a range in two, at a multiple of `step` from its start if it is long enough, else of `least`; false where that is all of it.
fn split(low: &mut Range<u32>, high: &mut Range<u32>, step: u32, least: u32) -> bool {
    let half = (low.end - low.start) / 2;
    let whole = [step, least].map(|step| half.next_multiple_of(step)).into_iter().find(|&n| low.start + n < low.end);
    let Some(whole) = whole.filter(|&n| n > 0) else { return false };
    (low.end, high.start) = (low.start + whole, low.start + whole);
    true
}
