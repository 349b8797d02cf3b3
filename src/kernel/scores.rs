//! Host side of `shaders/scores.wgsl` and `shaders/scores_lanes.wgsl`: s = scale · q kᵀ.

use std::fmt;

use minijinja::{Value, context};

use super::body::{Body, Tile, lane_tiles, renders, tiled};
use super::eligibility::{lane_tile as lane_tile_of, largest};
use super::format::Format;
use super::grid::Grid;
use super::params::{At, Keys, Lines, Lists, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::caps::Caps;
use crate::error::Result;
use crate::shape::Shape;

/// A variant of `scores`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scores {
    /// Tile parameters.
    pub tile: Tile,
    /// q and k.
    pub format: Format,
    /// Whether the whole score transform is applied (soft cap, ALiBi, bias, boolean mask), with its operands bound; in the
    /// tiled form only.
    pub full: bool,
}

/// Tiled entries, largest first: 8×4 scores per invocation need 0.375 workgroup-memory loads a multiply-add, 4×4 need 0.5.
pub const TILED: [Tile; 2] = [tiled(64, 64, 16, 8, 4), tiled(32, 32, 16, 4, 4)];

/// The lane-per-row tile of `scores`: rows per lane and dims in registers.
pub fn lane_tile(body: Body, rows: u32, dims: u32) -> Tile {
    let Body::Lanes { lanes, .. } = body else { panic!("not a lane body: {body:?}") };
    Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: 256, depth: dims }
}

/// Every tile of `scores`.
pub(crate) fn tiles() -> Vec<Tile> {
    lane_tiles(lane_tile).chain(TILED).collect()
}

params! {
    /// The parameters of `scores`.
    Scores of attention {
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
        /// Last axis of q and k.
        head_dim: u32,
        /// The score transform.
        transform: Transform,
        /// Queries.
        q: At,
        /// Keys.
        k: At,
        /// Scores.
        s: At,
    }
}

impl Shader for Scores {
    const NAME: &str = "scores";

    fn all() -> impl Iterator<Item = Self> {
        tiles().into_iter().flat_map(|tile| {
            Format::all()
                .filter(move |format| renders(tile, *format))
                .flat_map(move |format| [false, true].map(|full| Scores { tile, format, full }))
                .filter(|scores| !scores.full || scores.tile.body == Body::Tiled)
        })
    }

    fn shader(&self) -> &'static str {
        if self.tile.body == Body::Tiled { Self::NAME } else { "scores_lanes" }
    }

    fn takes_group(&self) -> bool {
        self.tile.body != Body::Tiled
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::Q, false), (Slot::K, false), (Slot::Scores, true), (Slot::Lists, false)];
        if self.full {
            slots.extend([(Slot::Mask, false), (Slot::Bias, false)]);
        }
        slots
    }

    fn threads(&self) -> u32 {
        self.tile.threads(self.tile.cols)
    }

    fn workgroup_bytes(&self) -> u32 {
        match self.tile.body {
            Body::Tiled => (self.tile.tile_rows + self.tile.tile_cols) * (16 * (self.tile.depth / 4 + 1) + 4),
            Body::Lanes { .. } => 0,
        }
    }

    fn needs(&self) -> Needs {
        Needs { f16: self.format.native, ..self.tile.body.needs(self.format.vector) }
    }

    fn context(&self) -> Value {
        context! {
            lists => true,
            element => self.format.element.to_string(), native => self.format.native, vector => self.format.vector,
            full => self.full, workgroup_bytes => self.workgroup_bytes(),
            ..self.tile.context(self.threads())
        }
    }
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { body, rows, cols, tile_rows, tile_cols, depth } = self.tile;
        let full = if self.full { " full" } else { "" };
        write!(f, "scores[{body}; {tile_rows}×{tile_cols}×{depth} by {rows}×{cols}; {}{full}]", self.format)
    }
}

/// The tile for a problem on a device.
pub(crate) fn tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile_of(lane_tile, body, shape, shape.head_dim, format));
    }
    largest(&TILED, shape.seq_q, caps, |tile| Scores { tile, format, full: false })
}

impl Scores {
    /// How the work on so many keys is divided into workgroups.
    pub(crate) fn grid(&self, shape: &Shape, keys: u64) -> Grid {
        let columns = keys.div_ceil(self.tile.tile_cols.into());
        Grid { tile_rows: self.tile.tile_rows, columns, flops: 2.0 * f64::from(shape.head_dim) }
    }
}
