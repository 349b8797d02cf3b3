//! The choice between the kernels for GPUs and those for CPU adapters, and the tiles that several of the former share.

use std::fmt;

use minijinja::Value;

use super::lanes::Lanes;
use crate::contract::caps::Caps;
use crate::contract::options::{Form, Options};

/// Which of the kernels that compute the same stage: those for GPUs or those for CPU adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Those with tiles in workgroup memory and registers, for GPUs.
    Tiled,
    /// Those with a row per lane, for CPU adapters.
    Lanes(Lanes),
}

impl Body {
    /// The choice for a device, with the reason.
    pub(crate) fn choose(caps: &Caps, options: &Options) -> (Body, &'static str) {
        let lanes = || Body::Lanes(Lanes::of(caps));
        match (options.form, caps.cpu) {
            (Some(Form::Tiled), _) => (Body::Tiled, "as asked"),
            (Some(Form::Lanes), _) => (lanes(), "as asked"),
            (None | Some(Form::Emulated), true) => {
                (lanes(), "a CPU adapter: loads are the cost, workgroup memory is no faster")
            }
            (None | Some(Form::Emulated), false) => (Body::Tiled, "a GPU: tiles in workgroup memory and registers"),
        }
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Body::Tiled => f.pad("tiled"),
            Body::Lanes(lanes) => lanes.fmt(f),
        }
    }
}

/// Tile parameters of `scores`, `values` and `project`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows per invocation.
    pub rows: u32,
    /// Columns per invocation: keys in `scores`, vectors of four dims in `values`.
    pub cols: u32,
    /// Rows per workgroup.
    pub tile_rows: u32,
    /// Columns per workgroup: keys in `scores`, value dims in `values`.
    pub tile_cols: u32,
    /// Extent of one step along the summed axis.
    pub depth: u32,
}

impl Tile {
    /// Invocations of a workgroup, `columns` being what one invocation's columns span of `tile_cols`.
    pub(crate) fn threads(&self, columns: u32) -> u32 {
        (self.tile_rows / self.rows) * (self.tile_cols / columns)
    }

    /// What the templates are rendered with. The text that they share with the kernels for CPU adapters asks for lanes.
    pub(crate) fn context(&self) -> Value {
        minijinja::context! {
            lanes => 0, wide => false,
            rows => self.rows, cols => self.cols, tile_rows => self.tile_rows, tile_cols => self.tile_cols, dims => self.depth,
        }
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { rows, cols, tile_rows, tile_cols, depth } = self;
        write!(f, "tiled; {tile_rows}×{tile_cols}×{depth} by {rows}×{cols}")
    }
}

/// Invocations of a workgroup in the element-wise kernels.
pub const ELEMENTWISE: u32 = 64;

/// A tile of so many rows, columns and steps, and of so many rows and columns of an invocation.
pub(crate) const fn tiled(tile_rows: u32, tile_cols: u32, depth: u32, rows: u32, cols: u32) -> Tile {
    Tile { rows, cols, tile_rows, tile_cols, depth }
}
