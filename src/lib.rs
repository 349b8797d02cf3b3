//! Attention for transformers on any GPU that [wgpu](https://wgpu.rs) reaches, inside the caller's own device, queue and command
//! encoder, and checked against a CPU reference.
//!
//! Attention lets each query of a sequence read from all keys and values: `out = softmax(scale · q kᵀ) v`. Around this formula models
//! put masks, causal rules, biases and caches. A [`Problem`] describes all of them; its documentation is the contract that
//! every kernel and the reference keep, with the arguments of PyTorch, ONNX, Keras, FlashAttention and Burn beside ours.
//!
//! # A first example
//!
//! [`Gpu`] takes host slices and returns host vectors. [`mod@reference`] computes the same in f64 on the CPU, with a bound for the error that
//! f32 arithmetic may make on these very numbers; [`compare()`] checks every output with it, without a tolerance that somebody picked.
//!
//! ```no_run
//! use wgpu_attention::{Causal, Gpu, Inputs, Problem, compare};
//!
//! # fn main() -> wgpu_attention::Result<()> {
//! let mut problem = Problem::new(1, 8, 77, 77, 64); // batch, heads, seq_q, seq_kv, head_dim
//! problem.causal = Causal::TopLeft;
//! let x: Vec<f32> = (0..8 * 77 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let inputs = Inputs::new(&x, &x, &x);
//!
//! let outputs = Gpu::new()?.attention(&problem, &inputs)?;
//!
//! let comparisons = compare(&problem, &inputs, &outputs)?; // every output with the f64 reference
//! assert!(comparisons.passed());
//! print!("{comparisons}");
//! # Ok(())
//! # }
//! ```
//!
//! # The path of the data
//!
//! ```text
//! Problem ─ check ─▶ Shape ─ plan ─▶ Plan ─ prepare ─▶ Prepared ─ encode ─▶ your CommandEncoder ─▶ outputs
//!                             ▲               compiles pipelines,                                     │ compare
//!              Caps, Options, Tuning          allocates scratch                                       │
//! Problem and inputs ─ reference::attention_with_budget ─▶ expected outputs and error budget ─────────┘
//! ```
//!
//! 1. A [`Problem`] is a plain struct. [`Problem::check`] verifies it once and returns a [`Shape`]; no later step checks shapes again.
//! 2. A [`Plan`] says which kernels run, over which parts of the problem, in which order, with how much scratch, and why. It is pure
//!    data: [`Plan::new`] needs the [`Caps`] of a device, but no device. Print a plan to read it.
//! 3. [`Attention::prepare`] compiles the pipelines and allocates the scratch. No other step compiles or allocates.
//! 4. [`Prepared::encode`] records the dispatches into the caller's command encoder, any number of times. It submits nothing and waits
//!    for nothing. A program with its own device uses steps 1 to 4 directly, as `examples/own_device.rs` does; [`Gpu`] does them, uploads
//!    the inputs and reads the outputs back.
//!
//! A plan can be made and read on a machine without a GPU:
//!
//! ```
//! use wgpu_attention::{Caps, Options, Plan, Problem, wgpu};
//!
//! let caps = Caps::new(wgpu::Limits::default());
//! let plan = Plan::new(&Problem::new(1, 8, 1024, 1024, 64).check()?, &caps, &Options::default())?;
//! assert_eq!(plan.kernel(), "flash");
//! print!("{plan}");
//! # Ok::<(), wgpu_attention::Error>(())
//! ```
//!
//! Where a kernel was forced ([`Options::kernel`]) and cannot run, planning is an error that says why. Nothing falls back in silence.
//!
//! # Beside attention
//!
//! - [`multihead`] is the whole layer: projections, rotary position embedding and a key/value cache.
//! - [`operations`] are what a model needs beside attention: writing new keys or values into a cache, advancing the lengths of
//!   sequences, joining results over parts of the keys, projections and rotary embedding.
//! - [`Runner`] runs problems on the best GPU, or on the CPU reference where there is none and the caller allows that.
//! - [`tuning`] holds what was measured on an adapter, and plans follow it.
//! - [`mod@proof`] is what is known of a driver. A [`Gpu`] tries each kernel on a small problem with stored results before it uses the
//!   kernel for the first time, and plans nothing that gave wrong results.
//!
//! # Cargo features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `reference` | yes | [`mod@reference`], [`compare()`] and [`Runner`]: the CPU path, which needs rayon |
//! | `vulkan`, `metal`, `dx12`, `gles`, `webgpu` | yes | the backends of wgpu; a program needs at least one |
//! | `safetensors` | no | the module `load`, which reads layers from safetensors files of PyTorch, Keras, TensorFlow's tutorial and Hugging Face |
//! | `tracing` | no | spans and events for the subscribers of the crate of that name, all with the target `wgpu_attention`; without the feature there is no code for them |
//!
//! At the level debug, `tracing` has the spans `plan`, `prepare` (inside it one `pipeline` for each pipeline that is compiled, with the field
//! `milliseconds`), `encode` and `run`, and an event for each of the reasons of a plan. A pipeline cache that is ignored is a warning.
//! [`Problem`], [`Options`], [`Caps`] and [`Plan`] implement serde's traits without a feature.
//!
//! # Looking inside
//!
//! - [`Prepared::profile`] measures each step of a plan.
//! - Compute passes, pipelines, bind groups and buffers have labels. Each dispatch is a debug group, such as
//!   `flash[64×32] b0 h0..8`: the kernel with the rows and keys of its tile, the batches, and the heads. Rows, keys and workgroups follow
//!   where a dispatch takes only some of them. RenderDoc, Nsight and PIX show these names. On Vulkan the instance needs
//!   [`wgpu::InstanceFlags::DEBUG`], which `WGPU_DEBUG=1` sets for a [`Gpu`].
//!
//! # Glossary
//!
//! Each word has one meaning in this crate.
//!
//! | word | meaning |
//! |---|---|
//! | *query row* | one query of one head of one batch: a row of q, of the score matrix and of out |
//! | *key/value head* | a head of k and v; in grouped-query attention several query heads share one |
//! | *score* | `scale · q·k` of one query row and one key; the *score matrix* holds the scores of all pairs of a head |
//! | *logit* | a score after soft cap, ALiBi, bias and visibility: what enters the softmax |
//! | *visible*, *hidden* | a key that a query row may attend, and one that mask, length, causal rule, window or a bias of −∞ excludes |
//! | *lse* | log-sum-exp: the natural logarithm of the softmax denominator of a query row |
//! | *operand* | a tensor or a small array that a call reads beside q, k and v: mask, bias, key lengths, key positions, offsets, slopes, sinks, sequence boundaries, block table |
//! | *kernel* | one compute shader with its host code, such as `rows` or `softmax`; [`Kernel`] lists the ways of computing attention that can be forced |
//! | *fused kernel* | a kernel that computes out in one pass over the keys, without a score matrix |
//! | *three kernels* | `scores`, `softmax` and `values` one after the other, with the score matrix in memory between them |
//! | *stage* | what a kernel computes, such as the scores; several kernels may compute the same stage, of which a plan runs one |
//! | *form* | which of the kernels of a stage: *tiled* for GPUs, *lanes* (one row per lane) for CPU adapters; see [`Form`] |
//! | *tile* | the query rows and keys that a workgroup works on at once; also the numbers that fix their sizes |
//! | *variant* | a kernel with its tile, element types and set of operands: what one pipeline is compiled for |
//! | *part* | a range of batches, heads, query rows or keys that is small enough for one binding or for the scratch budget |
//! | *line* | a pair of query row and query head, numbered through where the heads of a group are rows of one tile |
//! | *step* | one dispatch of a plan, as data: variant, uniform, bindings, grid, estimated work |
//! | *slice* | consecutive steps that together keep to the work budget; submit after each slice where a driver has a watchdog |
//! | *obstacle* | why a kernel cannot run a problem on a device; see [`Obstacle`] |
//! | *scratch* | device memory for intermediate results, allocated when a plan is prepared |
//! | *work budget*, *scratch budget* | the most estimated time of one slice, and the most bytes of scratch, in [`Options`] |
//! | *error budget* | how far each element may be from the f64 reference by f32 arithmetic, computed from the same data; see [`reference::Budget`] |
//! | *regression limit* | a bound within the error budget near what kernels reach; beyond it digits were lost, though the result is right |
//! | *trial*, *proof* | a small problem with stored results that shows whether a driver computes a kernel rightly, and what all trials together showed; see [`mod@proof`] |
//! | *tuning row* | the fastest kernel and tile that was measured for a class of problems on one adapter; see [`tuning::Row`] |
//! | *adapter*, *CPU adapter* | what wgpu found to run shaders on, and one that computes on the CPU, such as lavapipe |
//! | *page*, *block table* | a fixed number of cached keys in a pool, and the list that says which pages hold which keys of a batch |
//! | *sink* | a logit per head that joins the softmax denominator and has no value |
//!
//! # Where to read on
//!
//! - [`Problem`]: the contract, and the same arguments in other libraries.
//! - [`Attention`], [`Prepared`] and [`Recording`]: recording into your own encoder, slice by slice where work is long.
//! - [`Gpu`]: blocking and asynchronous calls on host slices.
//! - [`Options`] and [`Kernel`]: what can be asked of the planner.
//! - [`mod@reference`]: the CPU reference and the error budget.
//! - The repository: `docs/book` for a chapter on each of the above, with `examples/` whose programs it explains; `README.md` for
//!   the command line and figures, `shaders/` for the kernels (each begins with its formula),
//!   `docs/experiments.md` for what was tried.
#![warn(missing_docs)]

mod contract;
mod device;
mod dispatch;
#[doc(hidden)]
pub mod kernel;
mod layer;
#[cfg(feature = "safetensors")]
pub mod load;
mod ops;
mod plan;
#[cfg(feature = "reference")]
pub mod reference;
mod trace;

pub use contract::caps::Caps;
pub use contract::error::{Error, Result};
pub use contract::obstacle::Obstacle;
pub use contract::operands::{HostSlice, Operand, Operands};
pub use contract::options::{Form, Kernel, Options, Precision};
pub use contract::problem::{
    Bias, Broadcast, Causal, Element, Elements, Inputs, Layout, Logits, Outputs, Packed, Paged, Problem, Strides,
    Window,
};
pub use contract::shape::Shape;
pub use device::encode::{Attention, Buffers, Prepared, Recording};
pub use device::gpu::{DeviceOptions, Gpu, Resident};
pub use device::profile::{Clock, Profile, StepTime};
#[cfg(feature = "reference")]
pub use device::runner::Runner;
pub use plan::Plan;
#[cfg(feature = "reference")]
pub use reference::compare;
pub use wgpu;

/// The multi-head attention layer: projections, rotary position embedding, key/value cache and attention on the GPU.
///
/// [`Layer`](multihead::Layer) describes a layer, [`LayerPlan`](multihead::LayerPlan) is its plan, and
/// [`MultiHeadAttention`](multihead::MultiHeadAttention) runs it.
pub mod multihead {
    pub use crate::device::layer::{CacheBuffers, LayerBuffers, MultiHeadAttention, PreparedLayer};
    pub use crate::layer::{
        Call, Layer, LayerInputs, LayerOutputs, LayerPlan, Linear, RotaryEmbedding, Sources, Weights,
    };
}

/// What models need beside attention, each as an operation of its own on the GPU.
///
/// [`Append`](operations::Append) writes new keys or values into a cache, [`Advance`](operations::Advance) advances the lengths of
/// sequences, [`Merge`](operations::Merge) joins results over parts of the keys, [`Projection`](operations::Projection) multiplies rows by a weight matrix, and [`Rotation`](operations::Rotation) applies the
/// rotary position embedding. Each is made into an [`Operation`](operations::Operation) that is recorded like
/// [`Prepared`], or runs on host slices by a method of [`Gpu`].
pub mod operations {
    pub use crate::device::operation::{
        AdvanceBuffers, AppendBuffers, Description, MergeBuffers, Operation, ProjectionBuffers, RotationBuffers,
    };
    pub use crate::ops::advance::{Advance, By};
    pub use crate::ops::append::Append;
    pub use crate::ops::merge::Merge;
    pub use crate::ops::project::{Order, Projection};
    pub use crate::ops::rotary::{Positions, Rotation};
}

/// Tuning rows: which kernel and tile were fastest on an adapter, for a class of problems.
pub mod tuning {
    pub use crate::plan::measured::{Choice, Class, Queries, Row, Tuning};
}

/// What is known of a driver: which kernels gave right results on small problems, and what did not.
pub mod proof {
    pub use crate::contract::proof::{Case, Failure, Feature, Proof, Trial};
}

/// What the command line and the tests of this crate look into. No part of it is stable.
#[doc(hidden)]
pub mod internal {
    pub use crate::contract::caps::matrix_sizes;
    pub use crate::contract::operands::{Kind, Scalar};
    pub use crate::contract::shape::{MAX_DIM, MAX_SIZE};
    pub use crate::contract::tensor::Tensor;
    pub use crate::device::gpu::describe;
    pub use crate::device::gpu::proof as trials;
    pub use crate::dispatch::label;
    pub use crate::dispatch::step::{Bound, Step};
    pub use crate::kernel::{self, Slot, Variant};
    pub use crate::plan::model;
}

/// Sets fields of a value of a type that may grow: `with!(Options::default(), kernel: Some(kernel))`.
#[doc(hidden)]
#[macro_export]
macro_rules! with {
    ($value:expr, $($field:ident $(: $new:expr)?),+ $(,)?) => {{
        let mut value = $value;
        $(value.$field = $crate::with!(@ $field $(, $new)?);)+
        value
    }};
    (@ $field:ident) => {
        $field
    };
    (@ $field:ident, $new:expr) => {
        $new
    };
}

/// The documents whose code is tested.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/book/src/batches.md")]
    struct Batches;
    #[doc = include_str!("../docs/book/src/kernels.md")]
    struct Kernels;
    #[doc = include_str!("../docs/book/src/numbers.md")]
    struct Numbers;
    #[doc = include_str!("../docs/book/src/porting.md")]
    struct Porting;
}
