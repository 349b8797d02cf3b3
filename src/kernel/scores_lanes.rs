//! Host side of `shaders/scores_lanes.wgsl`: s = scale · q kᵀ, a query row per lane.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::format::Format;
use super::lanes::{LaneTile, Lanes};
use super::params::{At, Keys, Lines, Lists, Transform, Visible};
use super::scores::Scores;
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::shape::Shape;

/// A variant of `scores_lanes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScoresLanes {
    /// Tile parameters.
    pub tile: LaneTile,
    /// q and k.
    pub format: Format,
}

/// Keys of a workgroup.
pub const TILE_KEYS: u32 = 256;

params! {
    /// The parameters of `scores_lanes`.
    ScoresLanes of attention {
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
        /// The score transform, of which this kernel applies the scale.
        transform: Transform,
        /// Queries.
        q: At,
        /// Keys.
        k: At,
        /// Scores.
        s: At,
    }
}

impl Shader for ScoresLanes {
    const NAME: &str = "scores_lanes";
    const STAGE: &str = Scores::NAME;

    fn all() -> impl Iterator<Item = Self> {
        LaneTile::all().map(|(tile, format)| ScoresLanes { tile, format })
    }

    fn takes_group(&self) -> bool {
        true
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Q, false), (Slot::K, false), (Slot::Scores, true), (Slot::Lists, false)]
    }

    fn threads(&self) -> u32 {
        self.tile.lanes.lanes
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows(), TILE_KEYS])
    }

    fn needs(&self) -> Needs {
        self.tile.lanes.needs(self.format.vector)
    }

    fn context(&self) -> Value {
        context! {
            lists => true, full => false, tile_cols => TILE_KEYS,
            element => self.format.element.to_string(), native => false, vector => self.format.vector,
            ..self.tile.context()
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for ScoresLanes {
    fn grid(&self, shape: &Shape, keys: u64) -> Grid {
        let columns = keys.div_ceil(TILE_KEYS.into());
        Grid { tile_rows: self.tile.tile_rows(), columns, flops: 2.0 * f64::from(shape.problem.head_dim) }
    }
}

impl fmt::Display for ScoresLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LaneTile { lanes, rows, dims } = self.tile;
        write!(f, "scores[{lanes}; {}×{TILE_KEYS}×{dims} by {rows}×1; {}]", self.tile.tile_rows(), self.format)
    }
}

impl ScoresLanes {
    /// The variant for a problem.
    pub(crate) fn new(shape: &Shape, lanes: Lanes, format: Format) -> ScoresLanes {
        ScoresLanes { tile: LaneTile::new(lanes, shape, shape.problem.head_dim, format), format }
    }
}
