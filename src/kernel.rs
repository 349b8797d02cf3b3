//! The kernels: for each shader under `shaders/` the host's side of it, a module of the same noun.

pub mod append;
pub mod average;
pub(crate) mod body;
pub mod export;
pub mod extra;
pub mod flash;
pub(crate) mod format;
pub mod fused;
pub mod logits;
pub mod matrix;
pub mod merge;
pub mod pack;
pub mod params;
pub mod project;
pub mod rotary;
pub mod rows;
pub mod scores;
pub(crate) mod slot;
pub mod softmax;
pub mod split;
pub mod uniform;
pub mod values;
pub mod weights;

use std::fmt;

use minijinja::Value;

pub use body::{Body, SUBGROUP_SIZES, Tile};
pub use format::Format;
pub use slot::Slot;

use params::Attention;
use uniform::{Layout, Reads, Uniform};

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

    /// The file of the shader under `shaders/`, without its ending: that of the kernel, or that of its second body or pass.
    pub fn shader(&self) -> &'static str {
        let lanes = |tile: &Tile| tile.body != Body::Tiled;
        match self {
            Variant::Scores(x) if lanes(&x.tile) => "scores_lanes",
            Variant::Values(x) if lanes(&x.tile) => "values_lanes",
            Variant::Project(x) if lanes(&x.tile) => "project_lanes",
            Variant::Merge(merge::Merge::Totals { .. }) => "merge_totals",
            _ => self.kernel(),
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

    /// The fields of the uniform.
    pub fn layout(&self) -> &'static Layout {
        each!(self, x => x.layout())
    }

    /// The uniform of a kernel of attention.
    pub(crate) fn attention(&self, all: &Attention) -> Uniform {
        match self {
            Variant::Scores(_) => Uniform::new(&scores::Params::from(all)),
            Variant::Logits(_) => Uniform::new(&logits::Params::from(all)),
            Variant::Softmax(_) => Uniform::new(&softmax::Params::from(all)),
            Variant::Values(_) => Uniform::new(&values::Params::from(all)),
            Variant::Export(_) => Uniform::new(&export::Params::from(all)),
            Variant::Weights(_) => Uniform::new(&weights::Params::from(all)),
            Variant::Rows(_) => Uniform::new(&rows::Params::from(all)),
            Variant::Flash(_) => Uniform::new(&flash::Params::from(all)),
            Variant::Matrix(_) => Uniform::new(&matrix::Params::from(all)),
            Variant::Split(_) => Uniform::new(&split::Params::from(all)),
            other => unreachable!("{other} is no kernel of attention"),
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
