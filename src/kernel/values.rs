//! Host side of `shaders/values.wgsl`: out = w v, in tiles.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::body::{Tile, tiled};
use super::eligibility::largest;
use super::format::Format;
use super::params::{At, Keys, Lists, Visible};
use super::shader::{Needs, Shader};
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::Caps;
use crate::contract::error::Result;
use crate::contract::problem::Element;
use crate::contract::shape::Shape;
use crate::contract::walk::most_keys;

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

/// The tiles, largest first: 8 rows × 4 dims per invocation.
pub const TILES: [Tile; 2] = [tiled(64, 64, 16, 8, 1), tiled(32, 32, 16, 4, 1)];

/// Most keys of a dispatch of `values` on a CPU adapter, so that its loops stay below that.
pub const CPU_KEYS: u32 = 1 << 15;

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
        TILES.into_iter().flat_map(|tile| {
            Format::all().flat_map(move |format| outs(format).map(move |out| Values { tile, format, out }))
        })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::Scores, false), (Slot::V, false), (Slot::Out, true), (Slot::Lists, false)]
    }

    fn threads(&self) -> u32 {
        self.tile.threads(4 * self.tile.cols)
    }

    fn tile(&self) -> Option<[u32; 2]> {
        Some([self.tile.tile_rows, self.tile.tile_cols])
    }

    fn workgroup_bytes(&self) -> u32 {
        let Tile { tile_rows, tile_cols, depth, .. } = self.tile;
        16 * (tile_rows * (depth / 4 + 1) + depth * tile_cols / 4) + 4 * (depth + 1)
    }

    fn needs(&self) -> Needs {
        Needs { f16: self.format.native, ..Needs::default() }
    }

    fn context(&self) -> Value {
        context! {
            lists => true, threads => self.threads(), workgroup_bytes => self.workgroup_bytes(),
            element => self.format.element.to_string(), native => self.format.native, vector => self.format.vector,
            out => self.out.to_string(),
            ..self.tile.context()
        }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for Values {
    fn grid(&self, shape: &Shape, _: u64) -> Grid {
        let columns = shape.problem.value_dim.div_ceil(self.tile.tile_cols).into();
        Grid { tile_rows: self.tile.tile_rows, columns, flops: 2.0 * f64::from(shape.problem.value_dim) }
    }
}

impl fmt::Display for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "values[{}; {} to {}]", self.tile, self.format, self.out)
    }
}

impl Values {
    /// The variant with the largest tile that suits a problem and a device.
    pub(crate) fn new(shape: &Shape, caps: &Caps, format: Format, out: Element) -> Result<Values> {
        let tile = largest(&TILES, shape.problem.seq_q, caps, |tile| Values { tile, format, out })?;
        Ok(Values { tile, format, out })
    }
}

/// Types of the output for a format of the values: that of v only where whole vectors are written.
pub(crate) fn outs(format: Format) -> impl Iterator<Item = Element> {
    let direct = format.vector && format.element != Element::F32;
    std::iter::once(Element::F32).chain(direct.then_some(format.element))
}

/// Keys of one dispatch, of at most `key_step` keys.
pub(crate) fn loop_step(shape: &Shape, caps: &Caps, key_step: u32) -> u32 {
    let most_rows = TILES[0].tile_rows;
    if caps.cpu && most_keys(shape, most_rows) > CPU_KEYS.into() { key_step.min(CPU_KEYS) } else { key_step }
}
