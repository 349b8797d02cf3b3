//! Host side of `shaders/scores.wgsl`: s = scale · q kᵀ, in tiles.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::body::{Tile, tiled};
use super::eligibility::largest;
use super::format::Format;
use super::params::{At, Keys, Lists, Transform, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::error::Result;
use crate::contract::shape::Shape;

/// A variant of `scores`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scores {
    /// Tile parameters.
    pub tile: Tile,
    /// q and k.
    pub format: Format,
    /// Whether the whole score transform is applied (soft cap, ALiBi, bias, boolean mask), with its operands bound.
    pub full: bool,
}

/// The tiles, largest first: 8×4 scores per invocation need 0.375 workgroup-memory loads a multiply-add, 4×4 need 0.5.
pub const TILES: [Tile; 2] = [tiled(64, 64, 16, 8, 4), tiled(32, 32, 16, 4, 4)];

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
        TILES.into_iter().flat_map(|tile| {
            Format::all().flat_map(move |format| [false, true].map(|full| Scores { tile, format, full }))
        })
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

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows, self.tile.tile_cols])
    }

    fn workgroup_bytes(&self) -> u32 {
        (self.tile.tile_rows + self.tile.tile_cols) * (16 * (self.tile.depth / 4 + 1) + 4)
    }

    fn needs(&self) -> Needs {
        Needs { f16: self.format.native, ..Needs::default() }
    }

    fn context(&self) -> Value {
        context! {
            lists => true, threads => self.threads(), workgroup_bytes => self.workgroup_bytes(),
            element => self.format.element.to_string(), native => self.format.native, vector => self.format.vector,
            full => self.full,
            ..self.tile.context()
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for Scores {
    fn grid(&self, shape: &Shape, keys: u64) -> Grid {
        let columns = keys.div_ceil(self.tile.tile_cols.into());
        Grid { tile_rows: self.tile.tile_rows, columns, flops: 2.0 * f64::from(shape.problem.head_dim) }
    }
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scores[{}; {}{}]", self.tile, self.format, if self.full { " full" } else { "" })
    }
}

impl Scores {
    /// The variant with the largest tile that suits a problem and a device.
    pub(crate) fn new(shape: &Shape, caps: &Caps, format: Format, full: bool) -> Result<Scores> {
        let tile = largest(&TILES, shape.problem.seq_q, caps, |tile| Scores { tile, format, full })?;
        Ok(Scores { tile, format, full })
    }
}
