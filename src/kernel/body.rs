//! The bodies and tiles that several kernels share.

use std::fmt;

use minijinja::Value;
use serde::{Deserialize, Serialize};

use super::format::Format;
use super::shader::Needs;
use crate::caps::{Caps, SUBGROUP_SIZES};
use crate::options::{Form, Options};

/// Tile parameters of `scores` and `values`. Each kernel has the table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Which body.
    pub body: Body,
    /// Rows per invocation.
    pub rows: u32,
    /// Tiled: columns per invocation (keys in `scores`, vectors of four dims in `values`). Lanes: unused, 1.
    pub cols: u32,
    /// Tiled: rows per workgroup. Lanes: `rows` times the lanes.
    pub tile_rows: u32,
    /// Columns per workgroup: keys in `scores`, value dims in `values`.
    pub tile_cols: u32,
    /// Extent of one step along the summed axis in the tiled body; dims held in registers in the lane body.
    pub depth: u32,
}

/// Body of `scores` and `values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Body {
    /// Tiles in workgroup memory and registers, for GPUs.
    Tiled,
    /// A row per lane, for CPU adapters: keys and values spread by subgroup broadcast.
    Lanes {
        /// Invocations of a workgroup; with `subgroup` also the adapter's subgroup size.
        lanes: u32,
        /// Whether operands are spread by subgroup broadcast. Otherwise every lane loads them.
        subgroup: bool,
        /// Whether whole vectors are loaded by 64 bits: for drivers that load component by component.
        wide: bool,
    },
}

impl Body {
    /// What a shader with this body needs of a device; `vector`: it loads whole vectors of four.
    pub(crate) fn needs(&self, vector: bool) -> Needs {
        match *self {
            Body::Tiled => Needs::default(),
            Body::Lanes { subgroup, wide, .. } => {
                Needs { int64: wide && vector, subgroups: subgroup, ..Needs::default() }
            }
        }
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Body::Tiled => f.pad("tiled"),
            Body::Lanes { lanes, subgroup: true, wide } => {
                write!(f, "lanes, subgroup {lanes}{}", if *wide { ", 64-bit loads" } else { "" })
            }
            Body::Lanes { .. } => f.pad("lanes, no subgroup"),
        }
    }
}

impl Tile {
    /// Invocations of a workgroup, `columns` being what one invocation's columns span of `tile_cols`.
    pub(crate) fn threads(&self, columns: u32) -> u32 {
        match self.body {
            Body::Tiled => (self.tile_rows / self.rows) * (self.tile_cols / columns),
            Body::Lanes { lanes, .. } => lanes,
        }
    }

    pub(crate) fn context(&self, threads: u32) -> Value {
        let (lanes, subgroup, wide) = match self.body {
            Body::Tiled => (0, false, false),
            Body::Lanes { lanes, subgroup, wide } => (lanes, subgroup, wide),
        };
        minijinja::context! {
            lanes, subgroup, wide, threads,
            rows => self.rows, cols => self.cols, tile_rows => self.tile_rows, tile_cols => self.tile_cols, dims => self.depth,
        }
    }
}

/// Invocations of a workgroup in the element-wise kernels.
pub const ELEMENTWISE: u32 = 64;

/// A tile of the tiled body.
pub(crate) const fn tiled(tile_rows: u32, tile_cols: u32, depth: u32, rows: u32, cols: u32) -> Tile {
    Tile { body: Body::Tiled, rows, cols, tile_rows, tile_cols, depth }
}

/// Subgroup size of the CPU adapters that load component by component.
pub const WIDE_LANES: u32 = 8;

/// Every lane-per-row body.
pub(crate) fn lane_bodies() -> impl Iterator<Item = Body> {
    let lanes = |lanes, subgroup, wide| Body::Lanes { lanes, subgroup, wide };
    let spread = SUBGROUP_SIZES.map(|size| lanes(size, true, false));
    spread.into_iter().chain([lanes(WIDE_LANES, true, true), lanes(8, false, false)])
}

/// Dims that a lane keeps in registers: the smallest that holds them all, or several passes of the largest.
pub const LANE_DIMS: [u32; 2] = [32, 64];

/// Rows per lane: one for few queries, else as many as the first-level cache holds of them.
pub const LANE_ROWS: [u32; 2] = [1, 4];

/// Every lane-per-row tile of a kernel.
pub(crate) fn lane_tiles(tile: fn(Body, u32, u32) -> Tile) -> impl Iterator<Item = Tile> {
    lane_bodies().flat_map(move |body| {
        LANE_DIMS.into_iter().flat_map(move |dims| LANE_ROWS.into_iter().map(move |rows| tile(body, rows, dims)))
    })
}

/// Whether a tile is rendered for a format: lane forms read f16 packed (conversion is not their cost), and unaligned rows
/// only with the larger bucket of dims.
pub(crate) fn renders(tile: Tile, format: Format) -> bool {
    match tile.body {
        Body::Tiled => true,
        Body::Lanes { .. } => !format.native && (format.vector || tile.depth == LANE_DIMS[1]),
    }
}

impl Body {
    /// The lane body that suits a device best.
    pub(crate) fn lanes(caps: &Caps) -> Body {
        match caps.lanes() {
            Some(lanes) => Body::Lanes { lanes, subgroup: true, wide: caps.int64 && lanes == WIDE_LANES },
            None => Body::Lanes { lanes: 8, subgroup: false, wide: false },
        }
    }

    /// Whether the device has what a lane body uses.
    pub(crate) fn runs(self, caps: &Caps) -> bool {
        let Body::Lanes { lanes, subgroup, wide } = self else { return false };
        (!subgroup || caps.lanes() == Some(lanes)) && (!wide || caps.int64)
    }

    /// The body of the kernels that have several, with the reason.
    pub(crate) fn choose(caps: &Caps, options: &Options) -> (Body, &'static str) {
        match (options.form, caps.cpu) {
            (Some(Form::Tiled), _) => (Body::Tiled, "as asked"),
            (Some(Form::Lanes), _) => (Body::lanes(caps), "as asked"),
            (None | Some(Form::Emulated), true) => {
                (Body::lanes(caps), "a CPU adapter: loads are the cost, workgroup memory is no faster")
            }
            (None | Some(Form::Emulated), false) => (Body::Tiled, "a GPU: tiles in workgroup memory and registers"),
        }
    }
}
