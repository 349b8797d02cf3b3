//! The lanes of the kernels for CPU adapters, each of which works on rows of its own, and the tiles that several of these kernels share.

use std::fmt;

use minijinja::Value;
use serde::{Deserialize, Serialize};

use super::eligibility::group_rows;
use super::format::Format;
use super::shader::Needs;
use crate::contract::caps::{Caps, SUBGROUP_SIZES};
use crate::contract::shape::Shape;

/// How many lanes a workgroup has, and how they load what all of them read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lanes {
    /// Invocations of a workgroup; with `subgroup` also the adapter's subgroup size.
    pub lanes: u32,
    /// Whether operands are spread by subgroup broadcast. Otherwise every lane loads them.
    pub subgroup: bool,
    /// Whether whole vectors are loaded by 64 bits: for drivers that load component by component.
    pub wide: bool,
}

/// Subgroup size of the CPU adapters that load component by component.
pub const WIDE_LANES: u32 = 8;

impl Lanes {
    /// All that kernels are rendered for.
    pub(crate) fn all() -> impl Iterator<Item = Lanes> {
        let of = |lanes, subgroup, wide| Lanes { lanes, subgroup, wide };
        let spread = SUBGROUP_SIZES.map(|size| of(size, true, false));
        spread.into_iter().chain([of(WIDE_LANES, true, true), of(8, false, false)])
    }

    /// Those that suit a device best.
    pub(crate) fn of(caps: &Caps) -> Lanes {
        match caps.lanes() {
            Some(lanes) => Lanes { lanes, subgroup: true, wide: caps.int64 && lanes == WIDE_LANES },
            None => Lanes { lanes: 8, subgroup: false, wide: false },
        }
    }

    /// Whether the device has what they use.
    pub(crate) fn run(self, caps: &Caps) -> bool {
        (!self.subgroup || caps.lanes() == Some(self.lanes)) && (!self.wide || caps.int64)
    }

    /// What a shader with these lanes needs of a device; `vector`: it loads whole vectors of four.
    pub(crate) fn needs(self, vector: bool) -> Needs {
        Needs { int64: self.wide && vector, subgroups: self.subgroup, ..Needs::default() }
    }

    pub(crate) fn context(self) -> Value {
        minijinja::context! { lanes => self.lanes, subgroup => self.subgroup, wide => self.wide }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lanes { lanes, subgroup: true, wide } => {
                write!(f, "lanes, subgroup {lanes}{}", if *wide { ", 64-bit loads" } else { "" })
            }
            Lanes { .. } => f.pad("lanes, no subgroup"),
        }
    }
}

/// Tile parameters of `scores_lanes` and `values_lanes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaneTile {
    /// The lanes.
    pub lanes: Lanes,
    /// Rows per lane.
    pub rows: u32,
    /// Dims that a lane keeps in registers.
    pub dims: u32,
}

/// Dims that a lane keeps in registers: the smallest that holds them all, or several passes of the largest.
pub const LANE_DIMS: [u32; 2] = [32, 64];

/// Rows per lane: one for few queries, else as many as the first-level cache holds of them.
pub const LANE_ROWS: [u32; 2] = [1, 4];

impl LaneTile {
    /// Every tile, with the formats that it is rendered for: f16 is read packed, because conversion is not what the time is spent on, and
    /// rows that are not whole vectors only with the larger bucket of dims.
    pub(crate) fn all() -> impl Iterator<Item = (LaneTile, Format)> {
        let tiles = Lanes::all().flat_map(|lanes| {
            let rows = move |dims| LANE_ROWS.into_iter().map(move |rows| LaneTile { lanes, rows, dims });
            LANE_DIMS.into_iter().flat_map(rows)
        });
        tiles.flat_map(|tile| {
            let rendered = move |format: &Format| !format.native && (format.vector || tile.dims == LANE_DIMS[1]);
            Format::all().filter(rendered).map(move |format| (tile, format))
        })
    }

    /// The tile for a problem whose rows have `dim` dims.
    pub(crate) fn new(lanes: Lanes, shape: &Shape, dim: u32, format: Format) -> LaneTile {
        let [one, many] = LANE_ROWS;
        let [narrow, wide] = LANE_DIMS;
        let rows = if group_rows(shape) <= u64::from(lanes.lanes) { one } else { many };
        let dims = if dim <= narrow && format.vector { narrow } else { wide };
        LaneTile { lanes, rows, dims }
    }

    /// Rows of a workgroup.
    pub fn tile_rows(&self) -> u32 {
        self.rows * self.lanes.lanes
    }

    pub(crate) fn context(&self) -> Value {
        minijinja::context! { rows => self.rows, dims => self.dims, ..self.lanes.context() }
    }
}
