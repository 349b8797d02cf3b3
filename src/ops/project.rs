//! `y = x w + b` on the GPU: the linear layers around attention.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Strides};
use crate::contract::shape::MAX_SIZE;
use crate::dispatch::part::{Axis, Cut, Excess, Part, count};
use crate::dispatch::step::{Bound, Step};
use crate::dispatch::steps::{Span, Steps, bind, bound, checked_u32};
use crate::kernel::Variant;
use crate::kernel::body::Body;
use crate::kernel::eligibility::too_many_bindings;
use crate::kernel::params::{At, Place, RotationTable, flags};
use crate::kernel::project::{self, Matrix};
use crate::kernel::project_lanes::ProjectLanes;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;

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
}

/// Rotary position embedding of a projection's first columns. Row `r` of batch `b` stands at `positions[b] + r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RotatedColumns {
    /// End of the columns that belong to rotated heads.
    pub(crate) columns: u32,
    /// Columns of such a head.
    pub(crate) head_dim: u32,
    /// How many of them are rotated, from the first on.
    pub(crate) rotary_dim: u32,
    /// Pairs are neighbours rather than `rotary_dim / 2` apart.
    pub(crate) interleaved: bool,
    /// Rows of the table.
    pub(crate) table_rows: u32,
    /// Batches, and rows of one, whatever the projection makes of them.
    pub(crate) batch: u32,
    pub(crate) rows: u32,
}

/// Which buffers the dispatches of a projection bind, and what they do beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wiring {
    pub(crate) x: Slot,
    pub(crate) weight: Slot,
    pub(crate) y: Slot,
    /// Rotary position embedding before y is stored, as [`Projection::rotation_obstacle`] allows it.
    pub(crate) rotated: Option<RotatedColumns>,
}

impl Wiring {
    /// An operation of its own.
    pub(crate) const OWN: Wiring = Wiring { x: Slot::X, weight: Slot::Matrix(0), y: Slot::Y, rotated: None };
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
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] or [`Error::TooLarge`] for a size out of range, [`Error::Divide`] if `head_columns` does not divide
    /// `outputs`, [`Error::Entry`] if `weight_row` is shorter than a row, and [`Error::Room`] for a stride or an offset that is
    /// too large.
    pub fn check(&self) -> Result<()> {
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

    /// Elements from the start of x, weights, biases and y to the last one that is read or written, that one included.
    pub(crate) fn extents(&self) -> [u64; 4] {
        if self.batch == 0 || self.rows == 0 {
            return [0; 4];
        }
        let part = self.whole();
        let biases = self.bias.map_or(0, |at| at + u64::from(self.outputs));
        [self.x_span(&part).1, self.weight_span(&part).1, biases, self.y_span(&part).1]
    }

    /// Checks the lengths of host slices. Weights and biases may be those of several projections, so that more than are read may be
    /// given.
    pub(crate) fn check_lengths(&self, x: usize, weight: usize, biases: Option<usize>) -> Result<()> {
        self.check()?;
        let field = "biases";
        match (biases, self.bias) {
            (None, Some(_)) => return Err(Error::Missing { field }),
            (Some(_), None) => return Err(Error::Unexpected { field }),
            _ => {}
        }
        let [x_want, weight_want, biases_want, _] = self.extents();
        super::check_lengths(&[("x", x, x_want)])?;
        let short = [("weight", weight, weight_want), (field, biases.unwrap_or(0), biases_want)];
        let short = short.into_iter().filter(|&(_, got, want)| (got as u64) < want).collect::<Vec<_>>();
        super::check_lengths(&short)
    }

    fn whole(&self) -> Part {
        let mut part = Part::new(0..self.batch, 0..1, 0..self.rows);
        (part.inputs, part.columns) = (0..self.inputs, 0..self.outputs);
        part
    }

    fn x_span(&self, part: &Part) -> Span {
        let at = |b: u32, r: u32| self.x.offset + u64::from(b) * self.x.batch + u64::from(r) * self.x.row;
        let first = at(part.batch.start, part.rows.start) + u64::from(part.inputs.start);
        (first, at(part.batch.end - 1, part.rows.end - 1) + u64::from(part.inputs.end))
    }

    fn weight_span(&self, part: &Part) -> Span {
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

    /// The kernel for a device, with the rows and columns of its tiles.
    fn kernel(&self, rotated: bool, steps: &Steps<'_>) -> Result<(Variant, [u32; 2])> {
        let transposed = self.order == Order::OutIn;
        let matrix = Matrix { element: self.element, transposed, vector: self.vector(), rotated };
        Ok(match Body::choose(steps.caps, &steps.options) {
            (Body::Tiled, _) => {
                let kernel = project::Project::new(self.rows, steps.caps, matrix)?;
                (kernel.into(), [kernel.tile.tile_rows, kernel.tile.tile_cols])
            }
            (Body::Lanes(lanes), _) => {
                let kernel = ProjectLanes::new(self.rows, lanes, matrix);
                (kernel.into(), [kernel.tile_rows(), kernel.tile_cols()])
            }
        })
    }

    /// What keeps the columns from being rotated before they are stored.
    pub(crate) fn rotation_obstacle(&self, caps: &Caps, rotated: &RotatedColumns) -> Option<String> {
        let eights =
            [self.outputs, rotated.columns, rotated.head_dim, rotated.rotary_dim].iter().all(|n| n.is_multiple_of(8));
        // Parts end where a head does.
        let head = match self.order {
            Order::OutIn => u64::from(rotated.head_dim) * self.weight_row * self.element.bytes(),
            Order::InOut => 0,
        };
        let table = 4 * u64::from(rotated.table_rows) * u64::from(rotated.rotary_dim);
        let largest = head.max(table).max(4 * u64::from(rotated.batch)) + caps.alignment();
        if !eights || !self.flat().vector() {
            Some("widths, heads or their rotated part are not whole vectors".into())
        } else if self.order == Order::InOut && !rotated.interleaved {
            Some("the columns of a pair stand apart in [in, out] weights".into())
        } else if largest > caps.binding() {
            Some("the weights of one head, the table or the positions exceed a binding".into())
        } else {
            too_many_bindings(caps, 6).map(|obstacle| obstacle.to_string())
        }
    }

    /// The dispatches on a device, in order: pure data.
    ///
    /// # Errors
    ///
    /// Those of [`Projection::check`], [`Error::Device`] if the device is below what every kernel needs, and [`Error::Room`] if
    /// an operand or the plan takes more than the device or the crate allows.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        super::plan(caps, options, |steps| self.dispatches(Wiring::OWN, steps))
    }

    /// Adds the dispatches to the steps.
    pub(crate) fn dispatches(&self, wiring: Wiring, steps: &mut Steps<'_>) -> Result<()> {
        self.check()?;
        if self.batch == 0 || self.rows == 0 {
            return Ok(());
        }
        let of = self.flat();
        let (variant, [tile_rows, tile_cols]) = of.kernel(wiring.rotated.is_some(), steps)?;
        let planner = Planner { wiring, caps: steps.caps, variant, tile_rows, tile_cols, of };
        planner.of.whole().divide(&|part| planner.excess(part), &mut |part| planner.part(&part, steps))
    }
}

struct Planner<'a> {
    of: Projection,
    wiring: Wiring,
    caps: &'a Caps,
    variant: Variant,
    tile_rows: u32,
    tile_cols: u32,
}

impl Planner<'_> {
    /// The largest operand of a part, if it exceeds a binding.
    fn excess(&self, part: &Part) -> Option<Excess> {
        let (p, limit) = (&self.of, self.caps.binding());
        let bytes = |span: Span, bytes: u64| bind(self.caps, span, bytes, 0).1;
        let [x, weight, y] =
            [bytes(p.x_span(part), 4), bytes(p.weight_span(part), p.element.bytes()), bytes(p.y_span(part), 4)];
        let (field, bytes) = [("x", x), ("weight", weight), ("y", y)].into_iter().max_by_key(|&(_, bytes)| bytes)?;
        if bytes <= limit {
            return None;
        }
        let (step, least) = match &self.wiring.rotated {
            // Parts end where a head does.
            Some(rotated) => (rotated.head_dim, rotated.head_dim),
            None => (self.tile_cols, if p.vector() { 4 } else { 1 }),
        };
        let columns = Cut { axis: Axis::Columns, step, least };
        let inputs = Cut { axis: Axis::Inputs, step: 4, least: 4 };
        let mut cuts = Vec::new();
        if weight > limit {
            cuts.push(if p.order == Order::OutIn { columns } else { inputs });
        } else {
            cuts.extend([Cut::anywhere(Axis::Batch), Cut::at_multiples(Axis::Rows, self.tile_rows)]);
            // Along inputs the halves add up in order, so columns go first wherever they help.
            cuts.extend((y > limit).then_some(columns));
            cuts.extend((x > limit).then_some(inputs));
        }
        Some(Excess { field, bytes, limit, cuts })
    }

    /// What the uniform says of the rotation in the projection.
    fn rotation_params(&self, last: bool) -> project::Params {
        self.wiring.rotated.map_or(project::Params::default(), |rotated| project::Params {
            flags: if last { flags::ROTATE } else { 0 } | if rotated.interleaved { 0 } else { flags::HALVES },
            rotation: RotationTable {
                table_rows: rotated.table_rows,
                rotary_dim: rotated.rotary_dim,
                positions_base: 0,
                positions_batch: 1,
                positions_row: 0,
                position_step: 1,
            },
            rotated_end: rotated.columns,
            rotated_head_dim: rotated.head_dim,
            batch_rows: rotated.rows,
            ..project::Params::default()
        })
    }

    fn part(&self, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let (p, caps, wiring) = (&self.of, self.caps, self.wiring);
        let [rows, columns] = [&part.rows, &part.columns].map(|range| range.end - range.start);
        let row_tiles = rows.div_ceil(self.tile_rows);
        let col_tiles = columns.div_ceil(self.tile_cols);
        let (x, x_base) = bound(caps, wiring.x, p.x_span(part), 4, p.x.offset, false)?;
        let (weight, w_base) =
            bound(caps, wiring.weight, p.weight_span(part), p.element.bytes(), p.weight_offset, false)?;
        let (y, y_base) = bound(caps, wiring.y, p.y_span(part), 4, p.y.offset, true)?;
        let (biases, b_base) = match p.bias {
            Some(at) => bound(caps, Slot::Biases, (at, at + u64::from(p.outputs)), 4, at, false)?,
            // The shader can take biases, so that something must be bound.
            None => (x, 0),
        };
        let (first, last) = (part.inputs.start == 0, part.inputs.end == p.inputs);
        let rotation = self.rotation_params(last);
        let uniform = Uniform::new(&project::Params {
            place: Place { row_tiles, col_tiles, ..part.place() },
            x_base,
            x_batch: p.x.batch as u32,
            x_row: p.x.row as u32,
            w_base,
            w_row: p.weight_row as u32,
            b_base,
            y: At::new(y_base, &p.y),
            in0: part.inputs.start,
            in_end: part.inputs.end,
            col0: part.columns.start,
            col_end: part.columns.end,
            head_columns: p.head_columns,
            flags: rotation.flags | if first { p.bias.map_or(0, |_| flags::COLUMN_BIAS) } else { flags::ADD },
            ..rotation
        });
        let mut bindings = vec![x, weight, biases, y];
        if let Some(rotated) = &wiring.rotated {
            let table = 4 * u64::from(rotated.table_rows) * u64::from(rotated.rotary_dim);
            bindings.push(Bound { slot: Slot::Angles, offset: 0, size: table, written: false });
            bindings.push(Bound {
                slot: Slot::Positions,
                offset: 0,
                size: 4 * u64::from(rotated.batch),
                written: false,
            });
        }
        let batch = count(&part.batch);
        let workgroups = checked_u32("workgroups", u64::from(row_tiles) * u64::from(col_tiles) * batch)?;
        let flops = 2.0 * batch as f64 * f64::from(rows) * count(&part.inputs) as f64 * f64::from(columns);
        steps.push(part, self.variant, uniform, bindings, workgroups, flops)
    }
}
