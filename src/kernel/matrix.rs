//! Host side of `shaders/matrix.wgsl`: attention in one kernel, its products by cooperative matrices.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::attention::AttentionKernel;
use super::eligibility::fits;
use super::format::Format;
use super::fused::{Fused, OperandSet, Walk, check_operands, whole_format};
use super::params::{At, LineAt, Lists, Pages, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::{Caps, MATRIX_SIZES};
use crate::contract::obstacle::Obstacle;
use crate::contract::options::{Form, Options, Precision};
use crate::contract::problem::Element;
use crate::contract::shape::Shape;

/// A variant of `matrix`. q, k and v are f16, read with the adapter's own type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// Tile parameters.
    pub tile: Tile,
    /// A subgroup has any number of lanes up to [`MOST_LANES`]; otherwise exactly [`LANES`].
    pub varying: bool,
    /// Matrices are emulated by plain arithmetic, see [`crate::Form::Emulated`].
    pub emulated: bool,
    /// Whether one matrix holds the weights, or two of them.
    pub precision: Precision,
    /// Every row of q, k, v and out starts at a multiple of four elements and has a multiple of four of them.
    pub vector: bool,
    /// OperandSet bound.
    pub operands: OperandSet,
}

/// Tile parameters of `matrix`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tile {
    /// Rows and columns of a matrix, one of `MATRIX_SIZES`.
    pub size: u32,
    /// Value dims of a workgroup.
    pub dims: u32,
    /// Dims of q and k staged at once, at most `dims`.
    pub depth: u32,
    /// q is staged once and stays; head_dim fits `depth`.
    pub resident: bool,
}

/// Invocations of a workgroup.
pub const THREADS: u32 = 128;

/// Keys of a tile.
pub const KEYS: u32 = 32;

/// Matrices below each other in a tile of rows.
const BLOCKS: u32 = 4;

/// Lanes of a subgroup where that is fixed: as many subgroups as blocks.
pub const LANES: u32 = 32;

/// Most lanes of a subgroup.
pub const MOST_LANES: u32 = 64;

/// Most elements of q that a subgroup holds as matrices.
const MOST_HELD: u32 = 1024;

/// Most value dims whose matrices of v a subgroup loads at once for several blocks.
const MOST_TOGETHER: u32 = 64;

/// How far a row's maximum may rise before its sums are rescaled.
const LAZY: f32 = 4.0;

/// Factor of the weights as f16: `exp(LAZY)` times this is below 65504, f16's largest number.
const P_SCALE: f32 = 1024.0;

impl Tile {
    /// Rows of a workgroup.
    pub fn tile_rows(&self) -> u32 {
        BLOCKS * self.size
    }
}

/// The entries of the table, fewest dims first: dims, dims of q and k staged at once, whether q stays. By its place, not
/// measured: q stays where it fits beside the rest; the last row is for devices with 32 KiB of workgroup memory and 16×16 matrices.
const TILES: [(u32, u32, bool); 5] =
    [(32, 32, true), (64, 64, true), (128, 128, true), (128, 64, false), (32, 32, false)];

/// The tiles: for each size of matrices, largest first, those of [`TILES`] in order.
pub(crate) fn tiles() -> impl Iterator<Item = Tile> {
    MATRIX_SIZES.into_iter().flat_map(|size| TILES.map(|(dims, depth, resident)| Tile { size, dims, depth, resident }))
}

/// Whether a tile has an emulated form: those that fit the CPU adapters and compile in seconds there.
pub(crate) fn emulates(tile: &Tile) -> bool {
    tile.dims == TILES[0].0
}

params! {
    /// The parameters of `matrix`.
    Matrix of attention {
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
    } reads SINKS, LSE
}

impl Matrix {
    /// How its operands are read.
    pub fn format(&self) -> Format {
        Format { element: Element::F16, native: true, vector: self.vector }
    }

    /// Type of the output: f16 where whole vectors are written, else f32, scratch for `pack`.
    pub fn out(&self) -> Element {
        if self.vector { Element::F16 } else { Element::F32 }
    }

    /// Matrices that hold the weights of the same rows and keys.
    pub fn weight_matrices(&self) -> u32 {
        if self.precision == Precision::Fast { 1 } else { 2 }
    }

    /// Blocks of rows of a subgroup, at the fewest subgroups that there may be.
    fn per(&self) -> u32 {
        if self.varying { BLOCKS * MOST_LANES / THREADS } else { 1 }
    }

    /// Whether a subgroup holds q of its rows as matrices through the whole walk, instead of loading them for each tile of keys: where
    /// AMD's compiler has the registers for it.
    pub fn holds_q(&self) -> bool {
        self.tile.resident && !self.emulated && self.per() * self.tile.depth * self.tile.size <= MOST_HELD
    }

    /// Matrices of v that a subgroup loads at once for all its blocks: all of them if it has one block, else what fits the registers.
    pub fn together(&self) -> u32 {
        let Tile { size, dims, .. } = self.tile;
        if self.per() == 1 { dims / size } else { dims.min(MOST_TOGETHER) / size }
    }

    /// In the workgroup memory for f16: where k and v begin, where the weights do, and the end. q is first.
    fn places(&self) -> (u32, u32, u32) {
        let Tile { dims, depth, .. } = self.tile;
        let rows = self.tile.tile_rows();
        let q = rows * (depth + 8);
        let kv_at = if self.holds_q() { 0 } else { q };
        let hi_at = kv_at + (KEYS * (depth + 8)).max(dims * (KEYS + 8));
        (kv_at, hi_at, q.max(hi_at + self.weight_matrices() * rows * (KEYS + 8)))
    }

    /// Iterations that the loops of an invocation take together for a tile of keys: of its own text, not of emulated matrices.
    pub(crate) fn iterations(&self, head_dim: u32) -> u32 {
        let Tile { size, dims, depth, .. } = self.tile;
        let staged = self.tile.tile_rows() + 2 * KEYS;
        head_dim.div_ceil(depth) * (2 + depth / size + staged * depth / 4 / THREADS)
            + KEYS * (dims / 4 + 2) / THREADS
            + KEYS
            // Values of NaN and infinities, and very large scores, of all keys that an invocation has.
            + KEYS * self.tile.tile_rows() / THREADS * (dims / 4 + 2 + 5 * head_dim.div_ceil(16))
    }

    /// Invocations that stand for a subgroup: so many that with one size of matrices a subgroup owns two blocks, with the other
    /// some own none.
    fn emulated_lanes(&self) -> u32 {
        match (self.varying, self.tile.size) {
            (false, _) => LANES,
            (true, 16) => MOST_LANES,
            (true, _) => 16,
        }
    }
}

impl Shader for Matrix {
    const NAME: &str = "matrix";

    fn all() -> impl Iterator<Item = Self> {
        let forms = tiles().flat_map(|tile| [true, false].map(|varying| (tile, varying)));
        let forms = forms.flat_map(|(tile, varying)| [false, true].map(|emulated| (tile, varying, emulated)));
        let forms = forms.filter(|&(tile, _, emulated)| !emulated || emulates(&tile));
        let forms = forms.flat_map(|form| Precision::ALL.map(|precision| (form, precision)));
        forms.flat_map(|((tile, varying, emulated), precision)| {
            let vectors = [true, false].into_iter();
            vectors.flat_map(move |vector| {
                OperandSet::all().map(move |operands| Matrix { tile, varying, emulated, precision, vector, operands })
            })
        })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        self.operands.bindings()
    }

    fn threads(&self) -> u32 {
        THREADS
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows(), KEYS])
    }

    fn workgroup_bytes(&self) -> u32 {
        let rows = self.tile.tile_rows();
        2 * self.places().2 + 4 * (rows * (KEYS + 4) + THREADS + 2 * KEYS + rows + 3)
    }

    fn needs(&self) -> Needs {
        let real = !self.emulated;
        Needs { f16: true, subgroups: real, matrices: real.then_some(self.tile.size), ..Needs::default() }
    }

    fn context(&self) -> Value {
        let Tile { size, dims, depth, resident } = self.tile;
        let Format { element, native, vector } = self.format();
        let (rows, lanes) = (self.tile.tile_rows(), self.emulated_lanes());
        let (kv_at, hi_at, halves) = self.places();
        let per_row = THREADS / rows;
        context! {
            element => element.to_string(), native, vector, out => self.out().to_string(),
            lists => self.operands != OperandSet::Bare, full => self.operands == OperandSet::Full,
            size, dims, depth, resident, keys => KEYS, blocks => BLOCKS, threads => THREADS, tile_rows => rows,
            per_row, each => KEYS / per_row, lazy => format!("{LAZY:?}"), p_scale => format!("{P_SCALE:?}"),
            varying => self.varying, per => self.per(), held => self.holds_q(), together => self.together(), kv_at, hi_at, halves,
            fast => self.precision == Precision::Fast, emulated => self.emulated, lanes, own => size * size / lanes,
            workgroup_bytes => self.workgroup_bytes(),
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { size, dims, depth, resident } = self.tile;
        let resident = if resident { ", q resident" } else { "" };
        let lanes = if self.varying { "any lanes" } else { "32 lanes" };
        let emulated = if self.emulated { ", emulated" } else { "" };
        let weights = if self.precision == Precision::Fast { ", f16 weights" } else { "" };
        let operands = match self.operands {
            OperandSet::Bare => " bare",
            OperandSet::Lists => "",
            OperandSet::Full => " full",
        };
        let rows = self.tile.tile_rows();
        write!(
            f,
            "matrix[{rows}×{KEYS}×{depth} by {size}×{size}, {dims} dims{resident}, {lanes}{emulated}{weights}; "
        )?;
        write!(f, "{}{operands}]", self.format())
    }
}

/// What keeps every tile from running.
fn check_device(shape: &Shape, caps: &Caps, emulated: bool) -> Result<(), Obstacle> {
    if shape.problem.element != Element::F16 {
        Err(Obstacle::NotF16 { element: shape.problem.element })
    } else if !caps.f16 {
        Err(Obstacle::NoF16)
    } else if emulated {
        Ok(())
    } else if caps.matrices.is_empty() {
        Err(Obstacle::NoMatrices)
    } else if caps.subgroup_max_size.is_none_or(|most| most > MOST_LANES) {
        Err(Obstacle::SubgroupLanes { limit: MOST_LANES })
    } else {
        Ok(())
    }
}

impl Fused for Matrix {
    fn candidates(shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Matrix>, Obstacle> {
        let operands = OperandSet::of(shape);
        let emulated = options.form == Some(Form::Emulated);
        check_device(shape, caps, emulated)?;
        let vector = whole_format(shape, true).vector;
        let varying = caps.subgroup_size != Some(LANES);
        let has = |tile: &Tile| match emulated {
            true => emulates(tile) && (caps.matrices.is_empty() || caps.matrices.contains(&tile.size)),
            false => caps.matrices.contains(&tile.size),
        };
        let mut found: Vec<_> = tiles()
            .filter(|tile| has(tile) && (shape.problem.head_dim <= tile.depth || !tile.resident))
            .map(|tile| Matrix { tile, varying, emulated, precision: options.precision, vector, operands })
            .filter(|x| fits(caps, x))
            .collect();
        // Tiles that hold the value dims, else those of the most: further dims are further workgroups.
        let most = found.iter().map(|x| x.tile.dims).max();
        let dims = found.iter().map(|x| x.tile.dims).filter(|dims| shape.problem.value_dim <= *dims).min().or(most);
        found.retain(|x| Some(x.tile.dims) == dims);
        if found.is_empty() {
            return Err(Obstacle::NoTile);
        }
        check_operands(shape, caps, operands)?;
        if options.native_f16 == Some(false) {
            return Err(Obstacle::OwnF16);
        }
        Ok(found)
    }

    fn in_several_dispatches(self, _: &Walk<'_>, one: Obstacle) -> Result<Matrix, Obstacle> {
        Err(one)
    }

    fn tile_rows(&self) -> u32 {
        self.tile.tile_rows()
    }

    fn loop_iterations(&self, shape: &Shape, keys: u64) -> u64 {
        // Its own count leaves out the tests.
        (keys.div_ceil(KEYS.into()) + 1) * u64::from(self.iterations(shape.problem.head_dim)) * 3 / 2
    }

    fn value_dims(&self) -> Option<u32> {
        Some(self.tile.dims)
    }

    fn writes_element(&self) -> bool {
        self.vector
    }
}
