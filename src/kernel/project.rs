//! Host side of `shaders/project.wgsl`: y = x w + b, in tiles.

use std::fmt;

use minijinja::{Value, context};

use super::body::Tile;
use super::eligibility::largest;
use super::params::{At, RotationTable};
use super::scores;
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::error::Result;
use crate::contract::problem::Element;

/// A variant of `project`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Project {
    /// Tile parameters.
    pub tile: Tile,
    /// The matrix.
    pub matrix: Matrix,
}

/// What the text of `project` and `project_lanes` depends on beside tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// Type of the weights in memory; 16-bit types are packed in u32.
    pub element: Element,
    /// The weights are [out, in] rather than [in, out].
    pub transposed: bool,
    /// Every row of x, w and y starts at a multiple of four elements and has a multiple of four of them.
    pub vector: bool,
    /// Pairs of columns are rotated by the position of their row, once they are summed; needs `vector`.
    pub rotated: bool,
}

impl Matrix {
    /// All that kernels are rendered for.
    pub(crate) fn all() -> impl Iterator<Item = Matrix> {
        // Transposed, vector, rotated.
        let kinds = [(false, false, false), (false, true, false), (true, false, false), (true, true, false)];
        let kinds = kinds.into_iter().chain([(false, true, true), (true, true, true)]);
        [Element::F32, Element::F16, Element::Bf16].into_iter().flat_map(move |element| {
            kinds.clone().map(move |(transposed, vector, rotated)| Matrix { element, transposed, vector, rotated })
        })
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::X, false), (Slot::Matrix(0), false), (Slot::Biases, false), (Slot::Y, true)];
        if self.rotated {
            slots.extend([(Slot::Angles, false), (Slot::Positions, false)]);
        }
        slots
    }

    /// What the templates are rendered with, beside the tile.
    pub(crate) fn context(&self, tile: Value) -> Value {
        context! {
            element => self.element.to_string(), transposed => self.transposed, vector => self.vector,
            rotated => self.rotated, ..tile
        }
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = if self.transposed { "[out, in]" } else { "[in, out]" };
        let vector = if self.vector { "" } else { " unaligned" };
        let rotated = if self.rotated { ", rotated" } else { "" };
        write!(f, "{} {order}{vector}{rotated}", self.element)
    }
}

/// The tiles, largest first: those of `scores`.
pub const TILES: [Tile; 2] = scores::TILES;

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
        /// What columns are rotated by.
        rotation: RotationTable,
        /// End of the columns that are rotated.
        rotated_end: u32,
        /// Columns of a head of those.
        rotated_head_dim: u32,
        /// Rows of a batch, where those of all batches may be numbered through.
        batch_rows: u32,
        /// One bit a rule that is on.
        flags: u32,
    } reads ADD, COLUMN_BIAS, ROTATE, HALVES
}

impl Shader for Project {
    const NAME: &str = "project";

    fn all() -> impl Iterator<Item = Self> {
        TILES.into_iter().flat_map(|tile| Matrix::all().map(move |matrix| Project { tile, matrix }))
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        self.matrix.bindings()
    }

    fn threads(&self) -> u32 {
        self.tile.threads(self.tile.cols)
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows, self.tile.tile_cols])
    }

    fn workgroup_bytes(&self) -> u32 {
        16 * (self.tile.tile_rows + self.tile.tile_cols) * (self.tile.depth / 4 + 1)
    }

    fn context(&self) -> Value {
        context! {
            threads => self.threads(), workgroup_bytes => self.workgroup_bytes(),
            ..self.matrix.context(self.tile.context())
        }
    }
}

impl fmt::Display for Project {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { rows, tile_rows, tile_cols, .. } = self.tile;
        write!(f, "project[tiled; {tile_rows}×{tile_cols}, {rows} rows each; {}]", self.matrix)
    }
}

impl Project {
    /// The variant with the largest tile that suits so many rows and a device.
    pub(crate) fn new(rows: u32, caps: &Caps, matrix: Matrix) -> Result<Project> {
        let tile = largest(&TILES, rows, caps, |tile| Project { tile, matrix })?;
        Ok(Project { tile, matrix })
    }
}
