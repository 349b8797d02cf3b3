//! Host side of `shaders/flash.wgsl`: attention in one kernel, tiled in workgroup memory.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::attention::AttentionKernel;
use super::eligibility::fits;
use super::format::Format;
use super::fused::{Fused, OperandSet, Walk, check_operands, whole_format};
use super::params::{At, Keys, LineAt, Lists, Pages, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::obstacle::Obstacle;
use crate::contract::options::Options;
use crate::contract::problem::Element;
use crate::contract::shape::Shape;

/// A variant of `flash`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flash {
    /// Tile parameters.
    pub tile: Tile,
    /// q, k, v and out.
    pub format: Format,
    /// OperandSet bound.
    pub operands: OperandSet,
    /// Whether the keys come in several dispatches: maxima, sums and outputs of each invocation wait in a scratch in between.
    pub carry: bool,
}

/// Tile parameters of `flash`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tile {
    /// Value dims of a workgroup.
    pub dims: u32,
    /// Rows per invocation, at most four.
    pub rows: u32,
    /// Dims of q and k staged at once.
    pub depth: u32,
    /// Keys whose values are staged at once.
    pub value_keys: u32,
    /// q is staged once and stays; head_dim fits `dims`.
    pub resident: bool,
    /// Columns are reduced by subgroup shuffles.
    pub shuffle: bool,
}

/// Invocations of a workgroup: columns, each of four keys, and rows.
pub const ACROSS: u32 = 8;
/// Lines of invocations.
pub const DOWN: u32 = 16;

impl Tile {
    /// Rows of a workgroup.
    pub fn tile_rows(&self) -> u32 {
        DOWN * self.rows
    }

    /// Keys of a tile.
    pub fn tile_keys(&self) -> u32 {
        4 * ACROSS
    }

    /// Vectors of four staged of q.
    fn staged_q(&self) -> u32 {
        self.tile_rows() * if self.resident { self.dims } else { self.depth } / 4
    }

    /// Vectors of four staged of k and then of v, which share a place.
    fn staged_kv(&self) -> u32 {
        (self.tile_keys() * self.depth).max(self.value_keys * self.dims) / 4
    }
}

/// The tiles, fewest dims first: for each bucket of value dims one for devices with subgroups and 32 KiB of workgroup
/// memory, then one that runs on every device. 64 rows × 32 keys, four rows of four keys an invocation: 0.4 to 0.5 loads
/// from workgroup memory a multiply-add. With 256 dims half the rows, so that o stays in 64 registers: 0.64 loads. The book has these
/// numbers of every kernel.
pub const TILES: [Tile; 8] = [
    Tile { dims: 32, rows: 4, depth: 32, value_keys: 32, resident: true, shuffle: true },
    Tile { dims: 32, rows: 4, depth: 16, value_keys: 16, resident: false, shuffle: false },
    Tile { dims: 64, rows: 4, depth: 32, value_keys: 16, resident: true, shuffle: true },
    Tile { dims: 64, rows: 4, depth: 16, value_keys: 8, resident: false, shuffle: false },
    Tile { dims: 128, rows: 4, depth: 32, value_keys: 16, resident: false, shuffle: true },
    Tile { dims: 128, rows: 4, depth: 16, value_keys: 4, resident: false, shuffle: false },
    Tile { dims: 256, rows: 2, depth: 32, value_keys: 8, resident: false, shuffle: true },
    Tile { dims: 256, rows: 2, depth: 16, value_keys: 4, resident: false, shuffle: false },
];

params! {
    /// The parameters of `flash`.
    Flash of attention {
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

impl Flash {
    /// Type of the output: that of the operands where whole vectors are written, else f32 (the caller's, or scratch for `pack`).
    pub fn out(&self) -> Element {
        if self.format.vector { self.format.element } else { Element::F32 }
    }

    /// The same with its keys in several dispatches.
    pub(crate) fn carried(self) -> Flash {
        let operands = if self.operands == OperandSet::Bare { OperandSet::Lists } else { self.operands };
        Flash { operands, carry: true, ..self }
    }

    /// Vectors of four of an invocation between two dispatches: maxima, sums and a flag of its rows, and their outputs.
    fn state_vectors(&self) -> u32 {
        2 + self.tile.rows * self.tile.dims / (4 * ACROSS)
    }

    /// Bytes of a workgroup between two dispatches.
    pub(crate) fn state_bytes(&self) -> u64 {
        16 * u64::from(self.threads()) * u64::from(self.state_vectors())
    }

    /// Iterations that the loops of an invocation take together for a tile of keys, the test that ends each among them.
    pub(crate) fn iterations(&self, head_dim: u32) -> u32 {
        let Tile { dims, rows, depth, value_keys, resident, .. } = self.tile;
        let each = |vectors: u32| vectors.div_ceil(self.threads()) + 1;
        let q = if resident { 0 } else { each(self.tile.tile_rows() * depth / 4) };
        let scores = head_dim.div_ceil(depth) * (1 + q + each(self.tile.tile_keys() * depth / 4)) + 1;
        let values = self.tile.tile_keys() / value_keys * (1 + each(value_keys * dims / 4)) + 1;
        // With NaN and infinities everywhere: a loop for each vector staged, one for the codes, and one over the keys of v.
        let classes =
            self.tile.tile_keys() + self.tile.tile_keys() / value_keys * (1 + 2 * each(value_keys * dims / 4));
        1 + scores + rows + 1 + values + 2 * scores + 2 + classes
    }

    /// The same as [`Tile::staged_kv`], with room for the maxima that share the place.
    fn staged_kv(&self) -> u32 {
        let maxima = if self.format.element == Element::F32 && !self.tile.shuffle { ACROSS * DOWN } else { 0 };
        self.tile.staged_kv().max(maxima)
    }
}

impl Shader for Flash {
    const NAME: &str = "flash";

    fn all() -> impl Iterator<Item = Self> {
        TILES.into_iter().flat_map(|tile| {
            Format::all().flat_map(move |format| {
                let forms = OperandSet::all().map(|operands| (operands, false)).into_iter();
                let forms = forms.chain([(OperandSet::Lists, true), (OperandSet::Full, true)]);
                forms.map(move |(operands, carry)| Flash { tile, format, operands, carry })
            })
        })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = self.operands.bindings();
        slots.extend(self.carry.then_some((Slot::State, true)));
        slots
    }

    fn threads(&self) -> u32 {
        ACROSS * DOWN
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows(), self.tile.tile_keys()])
    }

    fn workgroup_bytes(&self) -> u32 {
        let Tile { value_keys, shuffle, .. } = self.tile;
        let weights = 4 * self.tile.tile_rows() * self.tile.tile_keys();
        // Without shuffles the maxima of the columns, f32, go through the place of k and v, or through one of their own.
        let (bytes, maxima) = match self.format.element {
            Element::F32 => (16, 0),
            _ => (8, if shuffle { 0 } else { 16 * ACROSS * DOWN }),
        };
        bytes * (self.tile.staged_q() + self.staged_kv())
            + maxima
            + weights
            + 4 * (value_keys + self.tile.tile_keys() + self.tile.tile_rows() + 3)
    }

    fn needs(&self) -> Needs {
        Needs { f16: self.format.native, subgroups: self.tile.shuffle, ..Needs::default() }
    }

    fn context(&self) -> Value {
        let Tile { dims, rows, depth, value_keys, resident, shuffle } = self.tile;
        context! {
            element => self.format.element.to_string(), native => self.format.native, vector => self.format.vector,
            out => self.out().to_string(), lists => self.operands != OperandSet::Bare, full => self.operands == OperandSet::Full,
            carry => self.carry, state_vectors => self.state_vectors(),
            dims, rows, depth, value_keys, resident, shuffle, parts => dims / (4 * ACROSS), across => ACROSS, down => DOWN,
            shuffles => (0..ACROSS.ilog2()).map(|bit| 1 << bit).collect::<Vec<u32>>(),
            tile_rows => self.tile.tile_rows(), tile_keys => self.tile.tile_keys(), staged_q => self.tile.staged_q(),
            staged_kv => self.staged_kv(), workgroup_bytes => self.workgroup_bytes(),
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl fmt::Display for Flash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { dims, depth, resident, shuffle, .. } = self.tile;
        let (rows, keys) = (self.tile.tile_rows(), self.tile.tile_keys());
        let resident = if resident { ", q resident" } else { "" };
        let shuffle = if shuffle { ", shuffles" } else { "" };
        let carry = if self.carry { ", carried on" } else { "" };
        let operands = match self.operands {
            OperandSet::Bare => " bare",
            OperandSet::Lists => "",
            OperandSet::Full => " full",
        };
        write!(f, "flash[{rows}×{keys}×{depth}, {dims} dims{resident}{shuffle}{carry}; {}{operands}]", self.format)
    }
}

impl Fused for Flash {
    fn candidates(shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Flash>, Obstacle> {
        let operands = OperandSet::of(shape);
        let native = shape.problem.element == Element::F16 && caps.f16 && options.native_f16 != Some(false);
        let format = whole_format(shape, native);
        let shuffles = caps.subgroup_min_size.is_some_and(|size| size >= ACROSS);
        let largest = TILES.iter().map(|tile| tile.dims).max().expect("the table has rows");
        let dims = shape.problem.value_dim.min(largest);
        let mut found: Vec<_> = TILES
            .into_iter()
            .map(|tile| Flash { tile, format, operands, carry: false })
            .filter(|x| {
                dims <= x.tile.dims
                    && (shuffles || !x.tile.shuffle)
                    && (shape.problem.head_dim <= x.tile.dims || !x.tile.resident)
                    && fits(caps, x)
            })
            .collect();
        let smallest = found.first().map(|x| x.tile.dims);
        found.retain(|x| Some(x.tile.dims) == smallest);
        if found.is_empty() {
            return Err(Obstacle::NoTile);
        }
        check_operands(shape, caps, operands)?;
        if options.native_f16 == Some(true) && shape.problem.element == Element::F16 && !caps.f16 {
            return Err(Obstacle::NoF16);
        }
        Ok(found)
    }

    fn in_several_dispatches(self, walk: &Walk<'_>, one: Obstacle) -> Result<Flash, Obstacle> {
        let carried = self.carried();
        walk.check_state(one, carried.bindings().len(), self.state_bytes())?;
        Ok(carried)
    }

    fn tile_rows(&self) -> u32 {
        self.tile.tile_rows()
    }

    fn loop_iterations(&self, shape: &Shape, keys: u64) -> u64 {
        (keys.div_ceil(self.tile.tile_keys().into()) + 1) * u64::from(self.iterations(shape.problem.head_dim)) * 5 / 4
    }

    fn value_dims(&self) -> Option<u32> {
        Some(self.tile.dims)
    }

    fn writes_element(&self) -> bool {
        self.format.vector
    }

    fn waiting_bytes(&self) -> u64 {
        if self.carry { self.state_bytes() } else { 0 }
    }
}
