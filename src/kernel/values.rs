//! Host side of `shaders/values.wgsl` and `shaders/values_lanes.wgsl`: out = w v.

use std::fmt;

use minijinja::{Value, context};

use super::body::{Body, Tile, lane_tiles, renders, tiled};
use super::eligibility::{lane_tile as lane_tile_of, largest};
use super::format::Format;
use super::grid::Grid;
use super::params::{At, Keys, Lines, Lists, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::caps::Caps;
use crate::error::Result;
use crate::problem::Element;
use crate::shape::Shape;
use crate::walk::most_keys;

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

impl Shader for Values {
    const NAME: &str = "values";

    fn all() -> impl Iterator<Item = Self> {
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

    fn shader(&self) -> &'static str {
        if self.tile.body == Body::Tiled { Self::NAME } else { "values_lanes" }
    }

    fn takes_group(&self) -> bool {
        self.tile.body != Body::Tiled
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, false), (Slot::V, false), (Slot::Out, true), (Slot::Lists, false)]
    }

    fn threads(&self) -> u32 {
        self.tile.threads(4 * self.tile.cols)
    }

    fn workgroup_bytes(&self) -> u32 {
        let Tile { body, tile_rows, tile_cols, depth, .. } = self.tile;
        match body {
            Body::Tiled => 16 * (tile_rows * (depth / 4 + 1) + depth * tile_cols / 4) + 4 * (depth + 1),
            Body::Lanes { .. } => 0,
        }
    }

    fn needs(&self) -> Needs {
        Needs { f16: self.format.native, ..self.tile.body.needs(true) }
    }

    fn context(&self) -> Value {
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

/// The tile for a problem on a device.
pub(crate) fn tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile_of(lane_tile, body, shape, shape.value_dim, format));
    }
    largest(&TILED, shape.seq_q, caps, |tile| Values { tile, format, out: Element::F32 })
}

/// Keys of one dispatch, of at most `key_step` keys.
pub(crate) fn loop_step(shape: &Shape, caps: &Caps, key_step: u32) -> u32 {
    let most_rows = TILED[0].tile_rows;
    if caps.cpu && most_keys(shape, most_rows) > CPU_KEYS.into() { key_step.min(CPU_KEYS) } else { key_step }
}

impl Values {
    /// How the work is divided into workgroups.
    pub(crate) fn grid(&self, shape: &Shape) -> Grid {
        let columns = shape.value_dim.div_ceil(self.tile.tile_cols).into();
        Grid { tile_rows: self.tile.tile_rows, columns, flops: 2.0 * f64::from(shape.value_dim) }
    }
}
