//! Host side of `shaders/split.wgsl`: attention of few queries, with the keys shared out to several workgroups.

use std::fmt;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::flash::Operands;
use super::format::Format;
use super::slot::Slot;
use crate::error::counted;
use crate::tuning;

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

/// Tile parameters of `split`. The table lives in [`crate::tuning`].
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

impl Split {
    pub(crate) fn all() -> impl Iterator<Item = Split> {
        tuning::split_tiles().flat_map(|tile| {
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
        let merge = if streams > 1 { 8 * rows * streams + 4 * streams * dims + dims } else { 0 };
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
