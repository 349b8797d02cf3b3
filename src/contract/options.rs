//! What a caller may ask of the planner beside the problem.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::contract::names::names;

/// How attention is computed, to force.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// `scores`, `softmax` and `values`, with the score matrix in between: the only kernel that gives logits. It runs on every device, and
    /// every problem but one whose keys are in pages.
    Unfused,
    /// `rows`: fused, a query row per lane.
    Rows,
    /// `flash`: fused, tiled in workgroup memory.
    Flash,
    /// `matrix`: fused, products by cooperative matrices. f16 alone, on devices that have such matrices and were opened so that
    /// their sizes are known, see [`crate::Attention::with_adapter`].
    Matrix,
    /// `split`, and `merge` where several workgroups share the keys of a row: fused, for few queries.
    Split,
}

names! { Kernel, "kernel":
    Unfused = "unfused",
    Rows = "rows",
    Flash = "flash",
    Matrix = "matrix",
    Split = "split",
}

/// Body of a kernel to force.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Tiles in workgroup memory, for GPUs.
    Tiled,
    /// A row per lane, for CPU adapters.
    Lanes,
    /// `matrix` with plain numbers for matrices: slow, on every device with shader f16. The planner never chooses it by itself; it
    /// proves the rest of the kernel where there is no hardware for it.
    Emulated,
}

names! { Form, "form":
    Tiled = "tiled",
    Lanes = "lanes",
    Emulated = "emulated",
}

/// How exact the weights are with which `matrix` sums the values of f16. Other kernels and element types are always [`Precision::Strict`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// The sum has the digits of f32: two f16 matrices hold each weight, and are multiplied one after the other.
    #[default]
    Strict,
    /// Each weight may be rounded to f16 once, so that one matrix holds it. An output may then be off by 2⁻¹¹ Σ_j p_j |v_j| more, as in
    /// most other libraries; see [`crate::reference::Budget::fast`]. The log-sum-exp stays as it is.
    Fast,
}

names! { Precision, "precision":
    Strict = "strict",
    Fast = "fast",
}

/// How to plan. The default lets the planner choose.
///
/// With serde, fields that are missing have their defaults, and unknown ones are an error.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Forces a kernel; planning fails where it cannot run.
    pub kernel: Option<Kernel>,
    /// Forces a body: [`Form::Tiled`] or [`Form::Lanes`] of `scores` and `values`, for which the planner takes the three kernels unless
    /// another kernel is forced, or [`Form::Emulated`] of `matrix`, which must be forced too. Planning fails where the body cannot run.
    pub form: Option<Form>,
    /// Forces f16 to be read with the adapter's own type (`true`) or unpacked from u32 (`false`).
    pub native_f16: Option<bool>,
    /// How exact weights of f16 are. It is not part of how a kernel is chosen.
    pub precision: Precision,
    /// How many parts `split` makes of the keys does not depend on the batch size, so that a sequence gives the same bits in any
    /// company.
    pub batch_invariant: bool,
    /// Most bytes of the score scratch, and of what a fused kernel keeps between dispatches over the keys; the rows are chunked under
    /// it. Default 256 MiB.
    pub scratch_budget: u64,
    /// Most estimated work of one dispatch and of one slice, so that no driver's watchdog trips. Default 50 ms.
    pub work_budget: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            kernel: None,
            form: None,
            native_f16: None,
            precision: Precision::default(),
            batch_invariant: false,
            scratch_budget: 256 << 20,
            work_budget: Duration::from_millis(50),
        }
    }
}
