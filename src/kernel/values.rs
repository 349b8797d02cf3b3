//! Host side of `shaders/values.wgsl`: out = w v.

use std::fmt;

use minijinja::{Value, context};

use super::body::{Body, Tile};
use super::format::Format;
use super::slot::Slot;
use crate::problem::Element;
use crate::tuning;

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

impl Values {
    pub(crate) fn all() -> impl Iterator<Item = Values> {
        tuning::values_tiles().into_iter().flat_map(|tile| {
            Format::all().filter(move |format| tuning::renders(tile, *format)).flat_map(move |format| {
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
