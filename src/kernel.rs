//! The kernels: for each shader under `shaders/` the host's side of it, a module of the same noun.

pub mod advance;
pub mod append;
pub(crate) mod attention;
pub mod average;
pub(crate) mod body;
pub(crate) mod eligibility;
pub mod export;
pub mod extra;
pub mod flash;
pub(crate) mod format;
pub mod fused;
pub mod lanes;
pub mod logits;
pub mod matrix;
pub mod merge;
pub mod merge_totals;
pub mod pack;
pub mod params;
pub mod project;
pub mod project_lanes;
mod render;
pub mod rotary;
pub mod rows;
pub mod scores;
pub mod scores_lanes;
pub(crate) mod shader;
pub(crate) mod slot;
pub mod softmax;
pub mod split;
pub mod uniform;
pub mod values;
pub mod values_lanes;

use std::fmt;

use minijinja::Value;

pub use body::Tile;
pub use format::Format;
pub use lanes::{LaneTile, Lanes};
pub use shader::Needs;
pub use slot::Slot;

use attention::AttentionKernel;
use fused::Fused;
use shader::Shader;
use uniform::{Layout, Reads};

/// Writes [`Variant`] from the list of kernels: what is known of any kernel stands in its own module.
macro_rules! kernels {
    ($($(#[$doc:meta])* $module:ident: $kernel:ident,)*) => {
        /// One renderable shader: the key of the pipeline cache.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Variant {
            $($(#[$doc])* $kernel($module::$kernel),)*
        }

        macro_rules! each {
            ($variant:expr, $x:ident => $body:expr) => {
                match $variant {
                    $(Variant::$kernel($x) => $body,)*
                }
            };
        }

        impl Variant {
            /// Every variant that the planner can choose.
            pub fn all() -> Vec<Variant> {
                let mut all = Vec::new();
                $(all.extend(<$module::$kernel as Shader>::all().map(Variant::$kernel));)*
                all
            }
        }

        $(impl From<$module::$kernel> for Variant {
            fn from(variant: $module::$kernel) -> Variant {
                Variant::$kernel(variant)
            }
        })*
    };
}

kernels! {
    /// QKᵀ in tiles.
    scores: Scores,
    /// QKᵀ, a query row per lane.
    scores_lanes: ScoresLanes,
    /// The score transform in place.
    logits: Logits,
    /// Masked row softmax.
    softmax: Softmax,
    /// Weights × V in tiles.
    values: Values,
    /// Weights × V, a query row per lane.
    values_lanes: ValuesLanes,
    /// Scores to an output.
    export: Export,
    /// f32 to 16-bit output.
    pack: Pack,
    /// Fused, a query row per lane.
    rows: Rows,
    /// Fused, tiled.
    flash: Flash,
    /// Fused, by cooperative matrices.
    matrix: Matrix,
    /// Fused, for few queries: keys shared out to workgroups.
    split: Split,
    /// Rows times a weight matrix in tiles.
    project: Project,
    /// Rows times a weight matrix, a row per lane.
    project_lanes: ProjectLanes,
    /// Rotary position embedding.
    rotary: Rotary,
    /// One more key that every row sees.
    extra: Extra,
    /// The weights that the layer returns.
    average: Average,
    /// Maximum and sum of each row, from several results.
    merge_totals: MergeTotals,
    /// One result from several.
    merge: Merge,
    /// New rows of a cache.
    append: Append,
    /// Lengths that grow.
    advance: Advance,
}

impl Variant {
    /// The kernel's noun: the name of its module and of its shader.
    pub fn kernel(&self) -> &'static str {
        fn name<K: Shader>(_: &K) -> &'static str {
            K::NAME
        }
        each!(self, x => name(x))
    }

    /// What the kernel computes: a noun that several kernels may share, of which a plan runs one.
    pub fn stage(&self) -> &'static str {
        fn stage<K: Shader>(_: &K) -> &'static str {
            K::STAGE
        }
        each!(self, x => stage(x))
    }

    /// Whether all query heads of a key/value head are rows of one tile, see shaders/shared/lines.wgsl.
    pub fn takes_group(&self) -> bool {
        each!(self, x => x.takes_group())
    }

    /// Storage bindings 1, 2, … in order, and whether the kernel writes them.
    pub fn bindings(&self) -> Vec<(Slot, bool)> {
        each!(self, x => x.bindings())
    }

    /// Invocations of a workgroup.
    pub fn threads(&self) -> u32 {
        each!(self, x => x.threads())
    }

    /// Rows, and keys or columns, of the tile of a workgroup, if it has one.
    pub fn tile(&self) -> Option<[u32; 2]> {
        each!(self, x => x.tile())
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_bytes(&self) -> u32 {
        each!(self, x => x.workgroup_bytes())
    }

    /// What the shader needs of a device beside limits.
    pub fn needs(&self) -> Needs {
        each!(self, x => x.needs())
    }

    /// The fields of the uniform.
    pub fn layout(&self) -> &'static Layout {
        each!(self, x => x.layout())
    }

    /// See [`Shader::attention`].
    pub(crate) fn attention(&self) -> Option<&dyn AttentionKernel> {
        each!(self, x => x.attention())
    }

    /// The kernel, if it is fused.
    pub(crate) fn fused(&self) -> Option<&dyn Fused> {
        self.attention().and_then(|kernel| kernel.fused())
    }

    /// See [`Shader::context`].
    pub(crate) fn context(&self) -> Value {
        each!(self, x => x.context())
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        each!(self, x => x.fmt(f))
    }
}
