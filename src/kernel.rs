//! The kernels: for each shader under `shaders/` the host's side of it, a module of the same noun.

pub mod append;
pub mod average;
pub(crate) mod body;
pub(crate) mod eligibility;
pub mod export;
pub mod extra;
pub mod flash;
pub(crate) mod format;
pub mod fused;
pub(crate) mod grid;
pub mod logits;
pub mod matrix;
pub mod merge;
pub mod pack;
pub mod params;
pub mod project;
pub mod rotary;
pub mod rows;
pub mod scores;
pub mod shader;
pub(crate) mod slot;
pub mod softmax;
pub mod split;
pub mod uniform;
pub mod values;

use std::fmt;

use minijinja::Value;

pub use body::{Body, Tile};
pub use format::Format;
pub use shader::{Needs, Shader};
pub use slot::Slot;

use params::Attention;
use uniform::{Layout, Reads, Uniform};

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
    /// Tiled QKᵀ.
    scores: Scores,
    /// The score transform in place.
    logits: Logits,
    /// Masked row softmax.
    softmax: Softmax,
    /// Weights × V.
    values: Values,
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
    /// Rows times a weight matrix.
    project: Project,
    /// Rotary position embedding.
    rotary: Rotary,
    /// One more key that every row sees.
    extra: Extra,
    /// The weights that the layer returns.
    average: Average,
    /// One result from several.
    merge: Merge,
    /// New rows of a cache.
    append: Append,
}

impl Variant {
    /// The kernel's noun, see [`Shader::NAME`].
    pub fn kernel(&self) -> &'static str {
        fn name<K: Shader>(_: &K) -> &'static str {
            K::NAME
        }
        each!(self, x => name(x))
    }

    /// See [`Shader::shader`].
    pub fn shader(&self) -> &'static str {
        each!(self, x => x.shader())
    }

    /// See [`Shader::takes_group`].
    pub fn takes_group(&self) -> bool {
        each!(self, x => x.takes_group())
    }

    /// See [`Shader::bindings`].
    pub fn bindings(&self) -> Vec<(Slot, bool)> {
        each!(self, x => x.bindings())
    }

    /// See [`Shader::threads`].
    pub fn threads(&self) -> u32 {
        each!(self, x => x.threads())
    }

    /// See [`Shader::workgroup_bytes`].
    pub fn workgroup_bytes(&self) -> u32 {
        each!(self, x => x.workgroup_bytes())
    }

    /// See [`Shader::needs`].
    pub fn needs(&self) -> Needs {
        each!(self, x => x.needs())
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
            Variant::Rows(_) => Uniform::new(&rows::Params::from(all)),
            Variant::Flash(_) => Uniform::new(&flash::Params::from(all)),
            Variant::Matrix(_) => Uniform::new(&matrix::Params::from(all)),
            Variant::Split(_) => Uniform::new(&split::Params::from(all)),
            other => unreachable!("{other} is no kernel of attention"),
        }
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
