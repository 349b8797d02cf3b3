//! Host side of `shaders/split.wgsl`: attention of few queries, with the keys shared out to several workgroups.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::format::Format;
use super::fused::Operands;
use super::params::{At, Keys, LineAt, Lines, Lists, Pages, Partials, Transform, Visible};
use super::slot::Slot;
use super::uniform::params;
use crate::error::counted;

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
    /// Whether whole vectors are loaded by 64 bits, see [`super::Body`].
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
    } reads SINKS, LSE, TOTALS
}

impl Split {
    pub(crate) fn all() -> impl Iterator<Item = Split> {
        tiles().flat_map(|tile| {
            let formats = Format::all().filter(|format| !format.native);
            formats.flat_map(move |format| [false, true].map(|full| Split { tile, format, full }))
        })
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        if self.full { Operands::Full } else { Operands::Lists }.bindings()
    }

    pub(crate) fn threads(&self) -> u32 {
        ACROSS * self.tile.streams
    }

    pub(crate) fn workgroup_bytes(&self) -> u32 {
        let Tile { dims, rows, keys, streams, shuffle } = self.tile;
        let pairs = rows * keys;
        let dots = if shuffle { 0 } else { 4 * streams * (pairs * (ACROSS + 1) + ACROSS) };
        let merge = if streams > 1 { 8 * rows * streams + 4 * streams * dims + rows * dims } else { 0 };
        dots + merge
    }

    pub(crate) fn context(&self) -> Value {
        let Tile { dims, rows, keys, streams, shuffle } = self.tile;
        context! {
            lists => true,
            element => self.format.element.to_string(), vector => self.format.vector, full => self.full,
            wide => self.tile.wide(), across => ACROSS, dims, rows, keys, streams, shuffle, bytes => self.workgroup_bytes(),
        }
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
