//! Host side of `shaders/project.wgsl` and `shaders/project_lanes.wgsl`: y = x w + b.

use std::fmt;

use minijinja::{Value, context};

use super::body::{Body, Tile, lane_bodies};
use super::eligibility::largest;
use super::params::{At, Turn};
use super::scores;
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::caps::Caps;
use crate::error::Result;
use crate::options::Options;
use crate::problem::Element;

/// A variant of `project`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Project {
    /// Tile parameters.
    pub tile: Tile,
    /// Type of the weights in memory; 16-bit types are packed in u32.
    pub element: Element,
    /// The weights are [out, in] rather than [in, out].
    pub transposed: bool,
    /// Every row of x, w and y starts at a multiple of four elements and has a multiple of four of them.
    pub vector: bool,
    /// Pairs of columns turn by the position of their row, once they are summed; needs `vector`.
    pub turned: bool,
}

/// Tiled entries, largest first: those of `scores`.
pub const TILED: [Tile; 2] = scores::TILED;

/// Lane-per-row tiles of `project`, many rows first.
pub(crate) fn lane_tiles(body: Body) -> [Tile; 2] {
    let Body::Lanes { lanes, subgroup, .. } = body else { panic!("not a lane body: {body:?}") };
    let cols = if subgroup { 32 } else { 16 };
    ROWS.map(|rows| Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: cols, depth: 4 })
}

/// Rows per lane in `project`.
const ROWS: [u32; 2] = [8, 1];

/// Every tile of `project`.
pub(crate) fn tiles() -> impl Iterator<Item = Tile> {
    lane_bodies().flat_map(lane_tiles).chain(TILED)
}

params! {
    /// The parameters of `project`.
    Project {
        /// Input rows: place of the first.
        x_base: u32,
        /// From one batch of them to the next.
        x_batch: u32,
        /// From one of them to the next.
        x_row: u32,
        /// Place of the first weight.
        w_base: u32,
        /// From one row of the matrix in memory to the next.
        w_row: u32,
        /// Place of the first bias.
        b_base: u32,
        /// Output rows.
        y: At,
        /// First input.
        in0: u32,
        /// End of the inputs.
        in_end: u32,
        /// First output column.
        col0: u32,
        /// End of the output columns.
        col_end: u32,
        /// Output columns of a head.
        head_columns: u32,
        /// What columns turn by.
        turn: Turn,
        /// End of the columns that turn.
        turn_end: u32,
        /// Columns of a head of those.
        turn_head: u32,
        /// Rows of a batch, where those of all batches may be numbered through.
        batch_rows: u32,
        /// One bit a rule that is on.
        flags: u32,
    } reads ADD, SHIFTS, TURN, HALVES
}

impl Shader for Project {
    const NAME: &str = "project";

    fn all() -> impl Iterator<Item = Self> {
        // Transposed, vector, turned.
        let kinds = [(false, false, false), (false, true, false), (true, false, false), (true, true, false)];
        let kinds = kinds.into_iter().chain([(false, true, true), (true, true, true)]);
        tiles().flat_map(move |tile| {
            let kinds = kinds.clone();
            [Element::F32, Element::F16, Element::Bf16].into_iter().flat_map(move |element| {
                kinds.clone().map(move |(transposed, vector, turned)| Project {
                    tile,
                    element,
                    transposed,
                    vector,
                    turned,
                })
            })
        })
    }

    fn shader(&self) -> &'static str {
        if self.tile.body == Body::Tiled { Self::NAME } else { "project_lanes" }
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::X, false), (Slot::Matrix(0), false), (Slot::Shifts, false), (Slot::Y, true)];
        if self.turned {
            slots.extend([(Slot::Angles, false), (Slot::Positions, false)]);
        }
        slots
    }

    fn threads(&self) -> u32 {
        self.tile.threads(self.tile.cols)
    }

    fn workgroup_bytes(&self) -> u32 {
        match self.tile.body {
            Body::Tiled => 16 * (self.tile.tile_rows + self.tile.tile_cols) * (self.tile.depth / 4 + 1),
            Body::Lanes { .. } => 0,
        }
    }

    fn needs(&self) -> Needs {
        self.tile.body.needs(self.vector)
    }

    fn context(&self) -> Value {
        context! {
            element => self.element.to_string(), transposed => self.transposed, vector => self.vector,
            turned => self.turned,
            workgroup_bytes => self.workgroup_bytes(),
            ..self.tile.context(self.threads())
        }
    }
}

impl fmt::Display for Project {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { body, rows, tile_rows, tile_cols, .. } = self.tile;
        let order = if self.transposed { "[out, in]" } else { "[in, out]" };
        let vector = if self.vector { "" } else { " unaligned" };
        let turned = if self.turned { ", turned" } else { "" };
        write!(
            f,
            "project[{body}; {tile_rows}×{tile_cols}, {rows} rows each; {} {order}{vector}{turned}]",
            self.element
        )
    }
}

/// The tile for so many rows on a device.
pub(crate) fn tile(rows: u32, caps: &Caps, options: &Options) -> Result<Tile> {
    let (body, _) = Body::choose(caps, options);
    if let Body::Lanes { lanes, .. } = body {
        let [many, one] = lane_tiles(body);
        return Ok(if rows <= lanes { one } else { many });
    }
    largest(&TILED, rows, caps, |tile| Project {
        tile,
        element: Element::F32,
        transposed: false,
        vector: false,
        turned: false,
    })
}
