//! Host side of `shaders/values.wgsl` and `shaders/values_lanes.wgsl`: out = w v.

use std::fmt;

use minijinja::{Value, context};

use super::body::{Body, Tile, lane_tiles, renders, tiled};
use super::format::Format;
use super::params::{At, Keys, Lines, Lists, Visible};
use super::slot::Slot;
use super::uniform::params;
use crate::problem::Element;

/// A variant of `values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Values {
    /// Tile parameters.
    pub tile: Tile,
    /// v.
    pub format: Format,
    /// Type of the output: that of v where whole vectors are written, else f32 (the caller's, or scratch for `pack`).
    pub out: Element,
}

/// Tiled entries, largest first: 8 rows × 4 dims per invocation.
pub const TILED: [Tile; 2] = [tiled(64, 64, 16, 8, 1), tiled(32, 32, 16, 4, 1)];

/// Most keys of a dispatch of `values` on a CPU adapter, so that its loops stay below that.
pub const CPU_KEYS: u32 = 1 << 15;

/// The lane-per-row tile of `values`: rows per lane and dims in registers.
pub fn lane_tile(body: Body, rows: u32, dims: u32) -> Tile {
    let Body::Lanes { lanes, .. } = body else { panic!("not a lane body: {body:?}") };
    Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: dims, depth: dims }
}

/// Every tile of `values`.
pub(crate) fn tiles() -> Vec<Tile> {
    lane_tiles(lane_tile).chain(TILED).collect()
}

params! {
    /// The parameters of `values`.
    Values of attention {
        /// The keys of the dispatch.
        keys: Keys,
        /// Lengths and positions.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// Query heads per key/value head.
        group: u32,
        /// Those of this part.
        lines: Lines,
        /// Last axis of v and out.
        value_dim: u32,
        /// Weights.
        s: At,
        /// Values.
        v: At,
        /// The output.
        out: At,
    } reads ADD
}

impl Values {
    pub(crate) fn all() -> impl Iterator<Item = Values> {
        tiles().into_iter().flat_map(|tile| {
            Format::all().filter(move |format| renders(tile, *format)).flat_map(move |format| {
                let direct = format.vector && format.element != Element::F32;
                [Some(Element::F32), direct.then_some(format.element)].into_iter().flatten().map(move |out| Values {
                    tile,
                    format,
                    out,
                })
            })
        })
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, false), (Slot::V, false), (Slot::Out, true), (Slot::Lists, false)]
    }

    pub(crate) fn threads(&self) -> u32 {
        self.tile.threads(4 * self.tile.cols)
    }

    pub(crate) fn workgroup_bytes(&self) -> u32 {
        let Tile { body, tile_rows, tile_cols, depth, .. } = self.tile;
        match body {
            Body::Tiled => 16 * (tile_rows * (depth / 4 + 1) + depth * tile_cols / 4) + 4 * (depth + 1),
            Body::Lanes { .. } => 0,
        }
    }

    pub(crate) fn context(&self) -> Value {
        context! {
            lists => true,
            element => self.format.element.to_string(), native => self.format.native, vector => self.format.vector,
            out => self.out.to_string(), workgroup_bytes => self.workgroup_bytes(),
            ..self.tile.context(self.threads())
        }
    }
}

impl fmt::Display for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { body, rows, cols, tile_rows, tile_cols, depth } = self.tile;
        write!(f, "values[{body}; {tile_rows}×{tile_cols}×{depth} by {rows}×{cols}; {} to {}]", self.format, self.out)
    }
}
