//! Host side of `shaders/split.wgsl`: attention of few queries, with the keys shared out to several workgroups.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::attention::AttentionKernel;
use super::eligibility::{fits, group_rows};
use super::format::Format;
use super::fused::{Fused, OperandSet, Walk, check_operands, key_loop, most_loop_keys, row_loops, whole_format};
use super::lanes::WIDE_LANES;
use super::params::{At, Keys, LineAt, Lines, Lists, Pages, Partials, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::error::counted;
use crate::contract::obstacle::Obstacle;
use crate::contract::options::Options;
use crate::contract::problem::Element;
use crate::contract::shape::Shape;
use crate::contract::walk::most_keys;

/// A variant of `split`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    /// Tile parameters.
    pub tile: Tile,
    /// q, k and v; f16 is read packed. The output is f32.
    pub format: Format,
    /// Whether the whole score transform is applied (soft cap, ALiBi, bias, boolean mask), with its operands bound.
    pub full: bool,
}

/// Tile parameters of `split`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tile {
    /// Dims that the lanes of a stream keep in registers: the smallest bucket that holds head_dim and value_dim.
    pub dims: u32,
    /// Rows of a workgroup.
    pub rows: u32,
    /// Keys per step of a stream.
    pub keys: u32,
    /// Streams of a workgroup.
    pub streams: u32,
    /// Dot products are summed by subgroup shuffles.
    pub shuffle: bool,
}

impl Tile {
    /// Whether whole vectors are loaded by 64 bits, see [`super::Lanes`].
    pub fn wide(&self) -> bool {
        self.streams == 1
    }
}

/// Lanes of a stream.
pub const ACROSS: u32 = 8;

/// The entries of the table: dims, rows of a workgroup, keys per step. A lane keeps 1/8 of the dims of q, k and o of each row.
/// Then the streams of a workgroup on GPUs: 128 invocations keep enough loads under way, and their outputs fit any device.
const TILES: [(u32, u32, u32, u32); 5] =
    [(64, 1, 4, 16), (64, 4, 2, 16), (128, 1, 4, 16), (128, 4, 2, 16), (256, 1, 2, 8)];

/// The tiles, fewest dims first and then fewest rows. CPU adapters run the subgroups of a workgroup one after the
/// other: a single stream spares them the merge; it loads by 64 bits.
pub(crate) fn tiles() -> impl Iterator<Item = Tile> {
    TILES.into_iter().flat_map(move |(dims, rows, keys, many)| {
        let forms = [(1, true), (many, true), (many, false)];
        forms.map(|(streams, shuffle)| Tile { dims, rows, keys, streams, shuffle })
    })
}

/// Workgroups that keep every unit of a CPU adapter, and of a GPU, busy: `split` shares out keys until there are as many.
pub const WORKGROUPS: [u32; 2] = [16, 512];

/// Fewest keys of a workgroup of `split`, on CPU adapters and on GPUs: below, starting and merging cost more than they save.
pub const LEAST_KEYS: [u32; 2] = [512, 256];

params! {
    /// The parameters of `split`.
    Split of attention {
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
        /// Those of this part.
        lines: Lines,
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
        /// Distances between partial results.
        partials: Partials,
    } reads SINKS, LSE, PARTIAL
}

impl Shader for Split {
    const NAME: &str = "split";

    fn all() -> impl Iterator<Item = Self> {
        tiles().flat_map(|tile| {
            let formats = Format::all().filter(|format| !format.native);
            formats.flat_map(move |format| [false, true].map(|full| Split { tile, format, full }))
        })
    }

    fn takes_group(&self) -> bool {
        true
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        OperandSet::with_lists(self.full).bindings()
    }

    fn threads(&self) -> u32 {
        ACROSS * self.tile.streams
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.rows, self.tile.streams * self.tile.keys])
    }

    fn workgroup_bytes(&self) -> u32 {
        let Tile { dims, rows, keys, streams, shuffle } = self.tile;
        let pairs = rows * keys;
        let dots = if shuffle { 0 } else { 4 * streams * (pairs * (ACROSS + 1) + ACROSS) };
        let merge = if streams > 1 { 8 * rows * streams + 4 * streams * dims + rows * dims } else { 0 };
        dots + merge
    }

    fn needs(&self) -> Needs {
        Needs { int64: self.tile.wide() && self.format.vector, subgroups: self.tile.shuffle, ..Needs::default() }
    }

    fn context(&self) -> Value {
        let Tile { dims, rows, keys, streams, shuffle } = self.tile;
        context! {
            lists => true,
            element => self.format.element.to_string(), vector => self.format.vector, full => self.full,
            wide => self.tile.wide(), across => ACROSS, dims, rows, keys, streams, shuffle, bytes => self.workgroup_bytes(),
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { dims, rows, keys, streams, shuffle } = self.tile;
        let shuffle = if shuffle { ", shuffles" } else { "" };
        let full = if self.full { " full" } else { "" };
        let (rows, keys) = (counted(rows as usize, "row"), counted(keys as usize, "key"));
        write!(f, "split[{rows}, {streams} × {keys}, {dims} dims{shuffle}; {}{full}]", self.format)
    }
}

impl Split {
    /// Into how many parts the keys are shared out: enough workgroups to fill the device, few enough that merging costs little, but none
    /// longer than a binding or the loops of a CPU adapter take, and as many for each dispatch of `key_step` keys; 0 where one part is
    /// enough and can be written as it is.
    pub(crate) fn partials(&self, walk: &Walk<'_>) -> u32 {
        let Walk { shape, caps, options, key_step } = *walk;
        let class = usize::from(!caps.cpu);
        let tiles = group_rows(shape).div_ceil(self.tile.rows.into());
        let batch = if options.batch_invariant { 1 } else { shape.problem.batch };
        let workgroups = tiles.saturating_mul(u64::from(shape.problem.kv_heads)).saturating_mul(u64::from(batch));
        let wanted = u64::from(WORKGROUPS[class]).div_ceil(workgroups.max(1));
        let most = most_keys(shape, self.tile.rows).div_ceil(LEAST_KEYS[class].into());
        let room = walk.room() / longer_partial_bytes(shape, 1).max(1);
        let dispatches = shape.problem.seq_kv.div_ceil(key_step);
        let each = (wanted.min(most).min(room) as u32 / dispatches.max(1)).max(1) * dispatches;
        match each.max(self.fewest_partials(walk)) {
            0 | 1 => u32::from(shape.problem.element != Element::F32),
            parts => parts,
        }
    }

    /// The fewest parts, so that none is longer than what a binding and the loops of a CPU adapter take.
    fn fewest_partials(&self, walk: &Walk<'_>) -> u32 {
        let Walk { shape, caps, key_step, .. } = *walk;
        let longest = most_keys(shape, self.tile.rows).min(key_step.into());
        let each = longest.div_ceil(most_loop_keys(self, shape, caps).max(1)).max(1) as u32;
        each.saturating_mul(shape.problem.seq_kv.div_ceil(key_step))
    }
}

/// Bytes of the partial outputs, and of the maximum and the sum of each of their rows.
pub(crate) fn partial_bytes(shape: &Shape, partials: u32) -> [u64; 2] {
    let rows = u64::from(partials) * shape.lse_len();
    [4 * rows * u64::from(shape.problem.value_dim), 8 * rows]
}

/// Bytes of the longer of the two buffers that the parts fill.
fn longer_partial_bytes(shape: &Shape, partials: u32) -> u64 {
    let [out, totals] = partial_bytes(shape, partials);
    out.max(totals)
}

impl Fused for Split {
    fn candidates(shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Split>, Obstacle> {
        let full = shape.transforms();
        if shape.problem.packed.is_some() {
            return Err(Obstacle::PackedSequences);
        }
        let dims = shape.problem.head_dim.max(shape.problem.value_dim);
        let shuffle = caps.subgroup_min_size.is_some_and(|size| size >= ACROSS);
        let wide = caps.int64 && caps.lanes() == Some(WIDE_LANES);
        let one_stream = caps.cpu && wide;
        let many_rows = group_rows(shape) > 2;
        let format = whole_format(shape, false);
        let mut found: Vec<_> = tiles()
            .filter(|tile| dims <= tile.dims && (shuffle || !tile.shuffle) && (wide || !tile.wide()))
            .map(|tile| Split { tile, format, full })
            .filter(|x| fits(caps, x))
            .collect();
        found.sort_by_key(|x| {
            let tile = &x.tile;
            (tile.dims, tile.shuffle != shuffle, (tile.streams == 1) != one_stream, (tile.rows > 1) != many_rows)
        });
        let smallest = found.first().map(|x| x.tile.dims);
        found.retain(|x| Some(x.tile.dims) == smallest);
        if found.is_empty() {
            return Err(Obstacle::SplitDims { dims });
        }
        check_operands(shape, caps, OperandSet::with_lists(full))?;
        if options.native_f16 == Some(true) && shape.problem.element == Element::F16 {
            return Err(Obstacle::PackedF16);
        }
        let (bytes, limit) = (longer_partial_bytes(shape, 1), caps.binding().min(options.scratch_budget));
        if shape.problem.element != Element::F32 && bytes > limit {
            return Err(Obstacle::Partials { bytes, limit });
        }
        Ok(found)
    }

    /// Its parts are merged.
    fn in_several_dispatches(self, walk: &Walk<'_>, one: Obstacle) -> Result<Split, Obstacle> {
        let bytes = longer_partial_bytes(walk.shape, self.fewest_partials(walk));
        let limit = walk.room();
        if bytes > limit {
            let several = Box::new(Obstacle::PartResults { bytes, limit });
            return Err(Obstacle::SeveralDispatches { one: Box::new(one), several });
        }
        Ok(self)
    }

    fn tile_rows(&self) -> u32 {
        self.tile.rows
    }

    fn loop_iterations(&self, shape: &Shape, keys: u64) -> u64 {
        let Tile { rows, keys: each, streams, shuffle, .. } = self.tile;
        let sums = if shuffle { 0 } else { 1 + u64::from((rows * each).div_ceil(ACROSS)) };
        let blocks =
            if streams == 1 { key_loop(shape, keys, each) } else { keys.div_ceil((each * streams).into()) + 4 };
        // Two loops that run once where there are NaN or infinities, with the tests that end them.
        let iterations = blocks * (4 + row_loops(self.full, rows) + sums);
        if shuffle { iterations } else { iterations * 5 / 4 }
    }

    /// `merge` rounds what it merges; without a merge the output is f32.
    fn writes_element(&self) -> bool {
        true
    }
}
