//! The kernels: for each shader under `shaders/` the host's side of it, a module of the same noun.

pub mod append;
pub mod average;
pub mod export;
pub mod extra;
pub mod flash;
pub mod logits;
pub mod matrix;
pub mod merge;
pub mod pack;
pub mod params;
pub mod project;
pub mod rotary;
pub mod rows;
pub mod scores;
pub mod softmax;
pub mod split;
pub mod values;
pub mod weights;

use std::fmt;

use minijinja::Value;
use serde::{Deserialize, Serialize};

use crate::problem::Element;

/// What a storage binding holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The output.
    Out,
    /// Log-sum-exp output.
    Lse,
    /// Weights output.
    Weights,
    /// Logits output.
    Logits,
    /// Boolean mask.
    Mask,
    /// Additive bias.
    Bias,
    /// The small per-batch and per-head arrays, a buffer that `Prepared` owns.
    Lists,
    /// Scratch of scores, then weights.
    Scores,
    /// Scratch: `out` in f32 before it is packed.
    Unpacked,
    /// Scratch that stands for an output which a shader can write but the problem does not ask for.
    Spare,
    /// Scratch: how far a fused kernel is that walks the keys in several dispatches.
    State,
    /// The layer's query input, or the rows that one projection reads.
    Query,
    /// The layer's key input.
    Key,
    /// The layer's value input.
    Value,
    /// A weight matrix of the layer: 0 query (or query, key and value together), 1 key (or key and value), 2 value, 3 output.
    Matrix(u8),
    /// The layer's biases, one after the other.
    Shifts,
    /// The layer's output, or the rows that one operation writes.
    Result,
    /// The weights that the layer gives out.
    Averaged,
    /// Cosines and sines of `rotary`.
    Angles,
    /// Positions of rows, for `rotary`.
    Positions,
    /// New rows for a cache.
    Rows,
    /// The cache that they go to.
    Cache,
    /// The row of the cache that each batch's first new row goes to.
    Starts,
    /// Which pages of a cache each batch has.
    BlockTable,
    /// The layer's cache of keys.
    KeyCache,
    /// The layer's cache of values.
    ValueCache,
    /// Outputs to merge.
    PartialOut,
    /// Log-sum-exps to merge.
    PartialLse,
    /// Attention sinks, where a kernel reads them from a buffer of their own.
    Sinks,
    /// Scratch: maximum and sum of each row, for `merge` and `weights`.
    Totals,
}

impl Slot {
    /// The operand's name in errors and labels.
    pub const fn name(self) -> &'static str {
        match self {
            Slot::Q => "q",
            Slot::K => "k",
            Slot::V => "v",
            Slot::Out => "out",
            Slot::Lse => "lse",
            Slot::Weights => "weights",
            Slot::Logits => "logits",
            Slot::Mask => "mask",
            Slot::Bias => "bias",
            Slot::Lists => "lists",
            Slot::Scores => "scores",
            Slot::Unpacked => "unpacked",
            Slot::Spare => "spare",
            Slot::State => "state",
            Slot::Query => "query",
            Slot::Key => "key",
            Slot::Value => "value",
            Slot::Matrix(_) => "weight matrix",
            Slot::Shifts => "biases",
            Slot::Result => "result",
            Slot::Averaged => "layer weights",
            Slot::Angles => "rotary table",
            Slot::Positions => "positions",
            Slot::Rows => "x",
            Slot::Cache => "cache",
            Slot::Starts => "starts",
            Slot::BlockTable => "block_table",
            Slot::KeyCache => "key cache",
            Slot::ValueCache => "value cache",
            Slot::PartialOut => "partial_out",
            Slot::PartialLse => "partial_lse",
            Slot::Sinks => "sinks",
            Slot::Totals => "totals",
        }
    }
}

/// How a kernel reads or writes a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Type in memory.
    pub element: Element,
    /// f16 is read with the adapter's own type rather than unpacked from u32.
    pub native: bool,
    /// Every row starts at a multiple of four elements and has a multiple of four of them.
    pub vector: bool,
}

impl Format {
    fn all() -> impl Iterator<Item = Format> {
        let kinds = [(Element::F32, false), (Element::F16, false), (Element::F16, true), (Element::Bf16, false)];
        kinds.into_iter().flat_map(|(element, native)| [true, false].map(|vector| Format { element, native, vector }))
    }
}

/// Subgroup sizes for which lane-per-row forms are rendered; other sizes take the body without subgroups.
pub const SUBGROUP_SIZES: [u32; 2] = [4, 8];

/// Tile parameters of `scores` and `values`. Rows live in [`crate::tuning`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Which body.
    pub body: Body,
    /// Rows per invocation.
    pub rows: u32,
    /// Tiled: columns per invocation (keys in `scores`, vectors of four dims in `values`). Lanes: unused, 1.
    pub cols: u32,
    /// Tiled: rows per workgroup. Lanes: `rows` times the lanes.
    pub tile_rows: u32,
    /// Columns per workgroup: keys in `scores`, value dims in `values`.
    pub tile_cols: u32,
    /// Extent of one step along the summed axis in the tiled body; dims held in registers in the lane body.
    pub depth: u32,
}

/// Body of `scores` and `values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Body {
    /// Tiles in workgroup memory and registers, for GPUs.
    Tiled,
    /// A row per lane, for CPU adapters: keys and values spread by subgroup broadcast.
    Lanes {
        /// Invocations of a workgroup; with `subgroup` also the adapter's subgroup size.
        lanes: u32,
        /// Whether operands are spread by subgroup broadcast. Otherwise every lane loads them.
        subgroup: bool,
        /// Whether whole vectors are loaded by 64 bits: for drivers that load component by component.
        wide: bool,
    },
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Body::Tiled => f.pad("tiled"),
            Body::Lanes { lanes, subgroup: true, wide } => {
                write!(f, "lanes, subgroup {lanes}{}", if *wide { ", 64-bit loads" } else { "" })
            }
            Body::Lanes { .. } => f.pad("lanes, no subgroup"),
        }
    }
}

impl Tile {
    /// Invocations of a workgroup, `columns` being what one invocation's columns span of `tile_cols`.
    fn threads(&self, columns: u32) -> u32 {
        match self.body {
            Body::Tiled => (self.tile_rows / self.rows) * (self.tile_cols / columns),
            Body::Lanes { lanes, .. } => lanes,
        }
    }

    fn context(&self, threads: u32) -> Value {
        let (lanes, subgroup, wide) = match self.body {
            Body::Tiled => (0, false, false),
            Body::Lanes { lanes, subgroup, wide } => (lanes, subgroup, wide),
        };
        minijinja::context! {
            lanes, subgroup, wide, threads,
            rows => self.rows, cols => self.cols, tile_rows => self.tile_rows, tile_cols => self.tile_cols, dims => self.depth,
        }
    }
}

/// One renderable shader: the key of the pipeline cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Tiled QKᵀ.
    Scores(scores::Scores),
    /// The score transform in place.
    Logits(logits::Logits),
    /// Masked row softmax.
    Softmax(softmax::Softmax),
    /// Weights × V.
    Values(values::Values),
    /// Scores to an output.
    Export(export::Export),
    /// Raw scores to weights in place, after a fused kernel.
    Weights(weights::Weights),
    /// f32 to 16-bit output.
    Pack(pack::Pack),
    /// Fused, a query row per lane.
    Rows(rows::Rows),
    /// Fused, tiled.
    Flash(flash::Flash),
    /// Fused, by cooperative matrices.
    Matrix(matrix::Matrix),
    /// Fused, for few queries: keys shared out to workgroups.
    Split(split::Split),
    /// Rows times a weight matrix.
    Project(project::Project),
    /// Rotary position embedding.
    Rotary(rotary::Rotary),
    /// One more key that every row sees.
    Extra(extra::Extra),
    /// The weights that the layer gives out.
    Average(average::Average),
    /// One result from several.
    Merge(merge::Merge),
    /// New rows of a cache.
    Append(append::Append),
}

macro_rules! each {
    ($variant:expr, $x:ident => $body:expr) => {
        match $variant {
            Variant::Scores($x) => $body,
            Variant::Logits($x) => $body,
            Variant::Softmax($x) => $body,
            Variant::Values($x) => $body,
            Variant::Export($x) => $body,
            Variant::Weights($x) => $body,
            Variant::Pack($x) => $body,
            Variant::Rows($x) => $body,
            Variant::Flash($x) => $body,
            Variant::Matrix($x) => $body,
            Variant::Split($x) => $body,
            Variant::Project($x) => $body,
            Variant::Rotary($x) => $body,
            Variant::Extra($x) => $body,
            Variant::Average($x) => $body,
            Variant::Merge($x) => $body,
            Variant::Append($x) => $body,
        }
    };
}

impl Variant {
    /// Every variant that the planner can choose.
    pub fn all() -> Vec<Variant> {
        let mut all = Vec::new();
        all.extend(scores::Scores::all().map(Variant::Scores));
        all.extend(logits::Logits::all().map(Variant::Logits));
        all.extend(softmax::Softmax::all().map(Variant::Softmax));
        all.extend(values::Values::all().map(Variant::Values));
        all.extend(export::Export::all().map(Variant::Export));
        all.extend(weights::Weights::all().map(Variant::Weights));
        all.extend(pack::Pack::all().map(Variant::Pack));
        all.extend(rows::Rows::all().map(Variant::Rows));
        all.extend(flash::Flash::all().map(Variant::Flash));
        all.extend(matrix::Matrix::all().map(Variant::Matrix));
        all.extend(split::Split::all().map(Variant::Split));
        all.extend(project::Project::all().map(Variant::Project));
        all.extend(rotary::Rotary::all().map(Variant::Rotary));
        all.extend(extra::Extra::all().map(Variant::Extra));
        all.extend(average::Average::all().map(Variant::Average));
        all.extend(merge::Merge::all().map(Variant::Merge));
        all.extend(append::Append::all().map(Variant::Append));
        all
    }

    /// The kernel's noun: its shader, module and reference.
    pub fn kernel(&self) -> &'static str {
        match self {
            Variant::Scores(_) => "scores",
            Variant::Logits(_) => "logits",
            Variant::Softmax(_) => "softmax",
            Variant::Values(_) => "values",
            Variant::Export(_) => "export",
            Variant::Weights(_) => "weights",
            Variant::Pack(_) => "pack",
            Variant::Rows(_) => "rows",
            Variant::Flash(_) => "flash",
            Variant::Matrix(_) => "matrix",
            Variant::Split(_) => "split",
            Variant::Project(_) => "project",
            Variant::Rotary(_) => "rotary",
            Variant::Extra(_) => "extra",
            Variant::Average(_) => "average",
            Variant::Merge(_) => "merge",
            Variant::Append(_) => "append",
        }
    }

    /// Whether all query heads of a key/value head are rows of one tile, see shaders/shared/lines.wgsl.
    pub fn takes_group(&self) -> bool {
        match self {
            Variant::Scores(x) => x.tile.body != Body::Tiled,
            Variant::Values(x) => x.tile.body != Body::Tiled,
            Variant::Split(_) => true,
            _ => false,
        }
    }

    /// Storage bindings 1, 2, … in order, and whether the kernel writes them.
    pub fn bindings(&self) -> Vec<(Slot, bool)> {
        each!(self, x => x.bindings())
    }

    /// Invocations of a workgroup.
    pub fn threads(&self) -> u32 {
        each!(self, x => x.threads())
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_bytes(&self) -> u32 {
        each!(self, x => x.workgroup_bytes())
    }

    /// Whether the shader needs the adapter's f16.
    pub fn uses_f16(&self) -> bool {
        match self {
            Variant::Scores(x) => x.format.native,
            Variant::Values(x) => x.format.native,
            Variant::Flash(x) => x.format.native,
            Variant::Matrix(_) => true,
            _ => false,
        }
    }

    /// Whether the shader needs 64-bit integers.
    pub fn uses_int64(&self) -> bool {
        let wide = |body: &Body| matches!(body, Body::Lanes { wide: true, .. });
        match self {
            Variant::Scores(x) => wide(&x.tile.body) && x.format.vector,
            Variant::Values(x) => wide(&x.tile.body),
            Variant::Rows(x) => wide(&x.tile.body) && x.format.vector,
            Variant::Split(x) => x.tile.wide() && x.format.vector,
            Variant::Project(x) => wide(&x.tile.body) && x.vector,
            _ => false,
        }
    }

    /// Whether the shader needs subgroup operations.
    pub fn uses_subgroups(&self) -> bool {
        match self {
            Variant::Scores(x) => matches!(x.tile.body, Body::Lanes { subgroup: true, .. }),
            Variant::Values(x) => matches!(x.tile.body, Body::Lanes { subgroup: true, .. }),
            Variant::Rows(x) => matches!(x.tile.body, Body::Lanes { subgroup: true, .. }),
            Variant::Flash(x) => x.tile.shuffle,
            Variant::Matrix(x) => !x.emulated,
            Variant::Split(x) => x.tile.shuffle,
            Variant::Project(x) => matches!(x.tile.body, Body::Lanes { subgroup: true, .. }),
            _ => false,
        }
    }

    /// The size of the cooperative matrices (f16 operands, f32 sums) that the shader needs, if it needs any.
    pub fn uses_matrices(&self) -> Option<u32> {
        match self {
            Variant::Matrix(x) if !x.emulated => Some(x.tile.size),
            _ => None,
        }
    }

    /// What the template is rendered with.
    pub(crate) fn context(&self) -> Value {
        each!(self, x => x.context())
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        each!(self, x => x.fmt(f))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let native = if self.native { " native" } else { "" };
        let vector = if self.vector { "" } else { " unaligned" };
        write!(f, "{}{native}{vector}", self.element)
    }
}
