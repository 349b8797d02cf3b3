//! Host side of `shaders/rows.wgsl`: attention in one kernel, a query row per lane.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::attention::AttentionKernel;
use super::format::Format;
use super::fused::{Fused, OperandSet, Walk, check_operands, key_loop, row_loops, whole_format};
use super::lanes::Lanes;
use super::params::{At, Keys, LineAt, Lists, Pages, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::error::counted;
use crate::contract::obstacle::Obstacle;
use crate::contract::options::Options;
use crate::contract::problem::Element;
use crate::contract::shape::Shape;

/// A variant of `rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    /// Tile parameters.
    pub tile: Tile,
    /// q, k, v and out. f16 is read packed.
    pub format: Format,
    /// Whether the whole score transform is applied (soft cap, ALiBi, bias, boolean mask), with its operands bound.
    pub full: bool,
    /// Whether the keys come in several dispatches: maximum, sum and output of each row wait in a scratch in between.
    pub carry: bool,
}

/// Tile parameters of `rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tile {
    /// Lanes, and how keys and values are spread over them.
    pub lanes: Lanes,
    /// Rows per lane.
    pub rows: u32,
    /// Keys per step.
    pub keys: u32,
    /// Dims that a lane keeps in registers: the smallest bucket that holds head_dim and value_dim.
    pub dims: u32,
}

impl Tile {
    /// Rows of a workgroup.
    pub fn tile_rows(&self) -> u32 {
        self.lanes.lanes * self.rows
    }
}

/// The entries of the table: dims, rows per lane and keys per step with subgroups, and without. More rows share each load and
/// broadcast: with subgroups q and o of a workgroup take 32 KiB, and 16 dot products a step are as many as compile in three seconds
/// with 128 dims; without, every load feeds as many rows as compile in three seconds.
const TILES: [(u32, [u32; 2], [u32; 2]); 4] =
    [(32, [8, 4], [8, 2]), (64, [8, 4], [8, 1]), (128, [4, 4], [4, 1]), (256, [2, 2], [2, 1])];

/// The tiles of these lanes, fewest dims first.
pub(crate) fn tiles(lanes: Lanes) -> impl Iterator<Item = Tile> {
    TILES.into_iter().map(move |(dims, spread, alone)| {
        let [rows, keys] = if lanes.subgroup { spread } else { alone };
        Tile { lanes, rows, keys, dims }
    })
}

params! {
    /// The parameters of `rows`.
    Rows of attention {
        /// The keys of the dispatch.
        keys: Keys,
        /// Lengths and positions.
        visible: Visible,
        /// The pages of keys and values.
        pages: Pages,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// Query heads per key/value head.
        group: u32,
        /// Last axis of q and k.
        head_dim: u32,
        /// Last axis of v and out.
        value_dim: u32,
        /// The score transform.
        transform: Transform,
        /// Queries.
        q: At,
        /// Keys.
        k: At,
        /// Values.
        v: At,
        /// The output.
        out: At,
        /// Log-sum-exp.
        lse: LineAt,
    } reads SINKS, LSE, CARRIED
}

impl Rows {
    /// Type of the output: that of the operands where whole vectors are written, else f32 (the caller's, or scratch for `pack`).
    pub fn out(&self) -> Element {
        if self.format.vector { self.format.element } else { Element::F32 }
    }

    /// Bytes of a workgroup's rows between two dispatches.
    pub(crate) fn state_bytes(&self) -> u64 {
        16 * u64::from(self.tile.tile_rows()) * u64::from(1 + self.tile.dims / 4)
    }
}

impl Shader for Rows {
    const NAME: &str = "rows";

    fn all() -> impl Iterator<Item = Self> {
        let formats = || Format::all().filter(|format| !format.native);
        Lanes::all().flat_map(tiles).flat_map(move |tile| {
            let forms = [(false, false), (false, true), (true, false), (true, true)];
            formats().flat_map(move |format| forms.map(|(full, carry)| Rows { tile, format, full, carry }))
        })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = OperandSet::with_lists(self.full).bindings();
        slots.extend(self.carry.then_some((Slot::State, true)));
        slots
    }

    fn threads(&self) -> u32 {
        self.tile.lanes.lanes
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows(), self.tile.keys])
    }

    fn needs(&self) -> Needs {
        self.tile.lanes.needs(self.format.vector)
    }

    fn context(&self) -> Value {
        let Tile { lanes, rows, keys, dims } = self.tile;
        context! {
            lists => true,
            element => self.format.element.to_string(), vector => self.format.vector, out => self.out().to_string(),
            full => self.full, quick => true, carry => self.carry, rows, keys, dims,
            ..lanes.context()
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { lanes, rows, keys, dims } = self.tile;
        let full = if self.full { " full" } else { "" };
        let (rows, keys) = (counted(rows as usize, "row"), counted(keys as usize, "key"));
        let carry = if self.carry { ", carried on" } else { "" };
        write!(f, "rows[{lanes}; {rows} a lane, {keys}, {dims} dims{carry}; {}{full}]", self.format)
    }
}

impl Fused for Rows {
    fn takes_both_ends(&self) -> bool {
        true
    }

    fn candidates(shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Rows>, Obstacle> {
        let full = shape.transforms();
        let dims = shape.problem.head_dim.max(shape.problem.value_dim);
        let own = Lanes::of(caps);
        let others = Lanes::all().filter(|&lanes| lanes != own && lanes.run(caps));
        let tiles = std::iter::once(own).chain(others).filter_map(|lanes| tiles(lanes).find(|tile| dims <= tile.dims));
        let format = whole_format(shape, false);
        let found: Vec<_> = tiles.map(|tile| Rows { tile, format, full, carry: false }).collect();
        if found.is_empty() {
            return Err(Obstacle::LaneDims { dims });
        }
        check_operands(shape, caps, OperandSet::with_lists(full))?;
        if options.native_f16 == Some(true) && shape.problem.element == Element::F16 {
            return Err(Obstacle::PackedF16);
        }
        Ok(found)
    }

    fn in_several_dispatches(self, walk: &Walk<'_>, one: Obstacle) -> Result<Rows, Obstacle> {
        let carried = Rows { carry: true, ..self };
        walk.check_state(one, carried.bindings().len(), self.state_bytes())?;
        Ok(carried)
    }

    fn tile_rows(&self) -> u32 {
        self.tile.tile_rows()
    }

    fn loop_iterations(&self, shape: &Shape, keys: u64) -> u64 {
        // Where there are NaN or infinities, each row walks over the keys once more, a key at a time or a few.
        let Tile { lanes, rows, keys: step, .. } = self.tile;
        let rows = rows.min(shape.problem.seq_q.div_ceil(lanes.lanes));
        let careful = u64::from(rows) * key_loop(shape, keys, 1);
        key_loop(shape, keys, step) * row_loops(self.full, rows) + careful + 3 * u64::from(rows) + 1
    }

    fn writes_element(&self) -> bool {
        self.format.vector
    }

    fn waiting_bytes(&self) -> u64 {
        if self.carry { self.state_bytes() } else { 0 }
    }
}
