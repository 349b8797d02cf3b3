//! Host side of `shaders/values_lanes.wgsl`: out = w v, a query row per lane.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::format::Format;
use super::lanes::{LaneTile, Lanes};
use super::params::{At, Keys, Lines, Lists, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use super::values::{self, Values};
use crate::contract::problem::Element;
use crate::contract::shape::Shape;

/// A variant of `values_lanes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValuesLanes {
    /// Tile parameters.
    pub tile: LaneTile,
    /// v.
    pub format: Format,
    /// Type of the output, see [`Values::out`].
    pub out: Element,
}

params! {
    /// The parameters of `values_lanes`.
    ValuesLanes of attention {
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

impl Shader for ValuesLanes {
    const NAME: &str = "values_lanes";
    const STAGE: &str = Values::NAME;

    fn all() -> impl Iterator<Item = Self> {
        let of = |(tile, format)| values::outs(format).map(move |out| ValuesLanes { tile, format, out });
        LaneTile::all().flat_map(of)
    }

    fn takes_group(&self) -> bool {
        true
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, false), (Slot::V, false), (Slot::Out, true), (Slot::Lists, false)]
    }

    fn threads(&self) -> u32 {
        self.tile.lanes.lanes
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows(), self.tile.dims])
    }

    fn needs(&self) -> Needs {
        // The weights are whole vectors in any case.
        self.tile.lanes.needs(true)
    }

    fn context(&self) -> Value {
        context! {
            lists => true,
            element => self.format.element.to_string(), native => false, vector => self.format.vector,
            out => self.out.to_string(),
            ..self.tile.context()
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for ValuesLanes {
    fn grid(&self, shape: &Shape, _: u64) -> Grid {
        let columns = shape.problem.value_dim.div_ceil(self.tile.dims).into();
        Grid { tile_rows: self.tile.tile_rows(), columns, flops: 2.0 * f64::from(shape.problem.value_dim) }
    }
}

impl fmt::Display for ValuesLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LaneTile { lanes, rows, dims } = self.tile;
        let tile_rows = self.tile.tile_rows();
        write!(f, "values[{lanes}; {tile_rows}×{dims}×{dims} by {rows}×1; {} to {}]", self.format, self.out)
    }
}

impl ValuesLanes {
    /// The variant for a problem.
    pub(crate) fn new(shape: &Shape, lanes: Lanes, format: Format, out: Element) -> ValuesLanes {
        ValuesLanes { tile: LaneTile::new(lanes, shape, shape.problem.value_dim, format), format, out }
    }
}
