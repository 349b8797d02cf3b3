//! Host side of `shaders/project_lanes.wgsl`: y = x w + b, a row per lane.

use std::fmt;

use minijinja::{Value, context};

use super::lanes::Lanes;
use super::project::{Matrix, Params, Project};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::Reads;

/// A variant of `project_lanes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProjectLanes {
    /// The lanes.
    pub lanes: Lanes,
    /// Rows per lane.
    pub rows: u32,
    /// The matrix.
    pub matrix: Matrix,
}

/// Rows per lane: many, and one for few rows.
const ROWS: [u32; 2] = [8, 1];

impl Reads for ProjectLanes {
    type Params = Params;
}

impl Shader for ProjectLanes {
    const NAME: &str = "project_lanes";
    const STAGE: &str = Project::NAME;

    fn all() -> impl Iterator<Item = Self> {
        let tiles = Lanes::all().flat_map(|lanes| ROWS.map(|rows| (lanes, rows)));
        tiles.flat_map(|(lanes, rows)| Matrix::all().map(move |matrix| ProjectLanes { lanes, rows, matrix }))
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        self.matrix.bindings()
    }

    fn threads(&self) -> u32 {
        self.lanes.lanes
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile_rows(), self.tile_cols()])
    }

    fn needs(&self) -> Needs {
        self.lanes.needs(self.matrix.vector)
    }

    fn context(&self) -> Value {
        context! {
            rows => self.rows, tile_cols => self.tile_cols(),
            ..self.matrix.context(self.lanes.context())
        }
    }
}

impl fmt::Display for ProjectLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lanes, tile_rows, tile_cols) = (self.lanes, self.tile_rows(), self.tile_cols());
        write!(f, "project[{lanes}; {tile_rows}×{tile_cols}, {} rows each; {}]", self.rows, self.matrix)
    }
}

impl ProjectLanes {
    /// The variant for so many rows.
    pub(crate) fn new(rows: u32, lanes: Lanes, matrix: Matrix) -> ProjectLanes {
        let [many, one] = ROWS;
        ProjectLanes { lanes, rows: if rows <= lanes.lanes { one } else { many }, matrix }
    }

    /// Rows of a workgroup.
    pub fn tile_rows(&self) -> u32 {
        self.rows * self.lanes.lanes
    }

    /// Columns of a workgroup.
    pub fn tile_cols(&self) -> u32 {
        if self.lanes.subgroup { 32 } else { 16 }
    }
}
