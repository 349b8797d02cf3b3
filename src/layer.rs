//! The multi-head attention layer: projections, heads, attention, output projection, on the GPU from first to last.

pub(crate) mod operation;
pub(crate) mod parameters;
pub(crate) mod plan;
mod planner;
pub(crate) mod projected;
#[cfg(test)]
mod tests;

pub use plan::LayerPlan;

use crate::contract::error::{Error, Result};
use crate::contract::operands::{HostSlice, Operands};
use crate::contract::problem::Problem;
use crate::contract::shape::{MAX_DIM, MAX_SIZE};
use crate::ops::project::Order;

/// A linear map `x w + b` on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Linear {
    /// Columns of x.
    pub inputs: u32,
    /// Columns of the result.
    pub outputs: u32,
    /// The weights, `inputs · outputs` of them.
    pub weight: Vec<f32>,
    /// Their order.
    pub order: Order,
    /// The bias, `outputs` long.
    pub bias: Option<Vec<f32>>,
}

/// Rotary position embedding of queries and keys in the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryEmbedding {
    /// Elements of a head that are rotated, from the first on; even, at most `key_dim`.
    pub dim: u32,
    /// Pairs are neighbours rather than `dim / 2` apart.
    pub interleaved: bool,
    /// Base of the angles, 10000 unless a model says otherwise.
    pub base: f64,
    /// Positions that the table has: as many as a call may have queries or keys, or its cache room.
    pub positions: u32,
}

/// A layer on the host: sizes and weights, from a loader or by hand.
///
/// `out = concat(heads) w_out + b_out` with `head h = attention(query w_q + b_q, key w_k + b_k, value w_v + b_v)` and the
/// attention of [`Problem`]. Query head `h` is columns `h · key_dim ..` of the projected query, and so on.
/// (Vaswani et al. 2017, section 3.2.2.)
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Columns of a head of query and key.
    pub key_dim: u32,
    /// Columns of a head of value.
    pub value_dim: u32,
    /// To `heads · key_dim`.
    pub query: Linear,
    /// To `kv_heads · key_dim`.
    pub key: Linear,
    /// To `kv_heads · value_dim`.
    pub value: Linear,
    /// From `heads · value_dim`.
    pub out: Linear,
    /// A key, `kv_heads · key_dim` long, and a value that stand after the projected ones and that every row sees (PyTorch's
    /// `bias_k` and `bias_v`).
    pub bias_kv: Option<(Vec<f32>, Vec<f32>)>,
    /// A key and a value of zeros that every row sees (PyTorch's `add_zero_attn`).
    pub zero_attn: bool,
    /// Rotary position embedding.
    pub rotary: Option<RotaryEmbedding>,
}

/// Where keys and values come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sources {
    /// The query input is all three.
    #[default]
    Query,
    /// The key input is also the value input.
    Key,
    /// Three inputs.
    Each,
}

/// Which weights leave the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weights {
    /// [batch, heads, seq_q, columns].
    Heads,
    /// Their mean, [batch, seq_q, columns].
    Mean,
}

/// How the layer is called, beside the [`Problem`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Where keys and values come from.
    pub sources: Sources,
    /// Inputs and output are [seq, batch, width] rather than [batch, seq, width].
    pub seq_first: bool,
    /// The weights to give out. Their columns are the keys, then the layer's `bias_kv`, then its `zero_attn`.
    pub weights: Option<Weights>,
    /// Projected keys and values are appended to a cache with room for `seq_kv` rows, `seq_q` of them at a time.
    pub cache: bool,
}

impl Call {
    /// How many keys and values of a batch are projected.
    pub(crate) fn projected_keys(&self, problem: &Problem) -> u32 {
        if self.cache { problem.seq_q } else { problem.seq_kv }
    }
}

impl RotaryEmbedding {
    /// Bytes of the table of cosines and sines.
    pub(crate) fn table_bytes(&self) -> u64 {
        4 * u64::from(self.positions) * u64::from(self.dim)
    }
}

/// Host inputs of a layer.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerInputs<'a> {
    /// Query input.
    pub query: &'a [f32],
    /// Key input; `None` as [`Sources`] says.
    pub key: Option<&'a [f32]>,
    /// Value input.
    pub value: Option<&'a [f32]>,
    /// Mask, bias and the small arrays of the attention inside.
    pub operands: Operands<HostSlice<'a>>,
}

impl<'a> LayerInputs<'a> {
    /// The query input of self-attention.
    pub fn new(query: &'a [f32]) -> Self {
        LayerInputs { query, ..LayerInputs::default() }
    }
}

/// What a layer gives out, on the host.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerOutputs<T = f32> {
    /// [batch, seq_q, out], or [seq_q, batch, out].
    pub out: Vec<T>,
    /// The weights asked for.
    pub weights: Option<Vec<T>>,
}

impl Linear {
    fn check(&self, [weight, bias]: [&'static str; 2], inputs: u32, outputs: u32) -> Result<()> {
        for (field, value) in [("inputs of a projection", self.inputs), ("outputs of a projection", self.outputs)] {
            if value == 0 {
                return Err(Error::Zero { field });
            }
            if value > MAX_SIZE {
                return Err(Error::TooLarge { field, value: value.into(), limit: MAX_SIZE.into() });
            }
        }
        let length = |field, got: usize, want: u64| {
            if got as u64 == want { Ok(()) } else { Err(Error::Length { field, got, want: want as usize }) }
        };
        length(weight, self.weight.len(), u64::from(inputs) * u64::from(outputs))?;
        self.bias.as_ref().map_or(Ok(()), |b| length(bias, b.len(), outputs.into()))
    }
}

impl Layer {
    /// A layer of `heads` heads; `kv_heads`, `key_dim` and `value_dim` follow from the projections.
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] if `heads` or `kv_heads` is 0, and those of [`Layer::check`].
    pub fn new(heads: u32, kv_heads: u32, [query, key, value, out]: [Linear; 4]) -> Result<Self> {
        for (field, count) in [("heads", heads), ("kv_heads", kv_heads)] {
            if count == 0 {
                return Err(Error::Zero { field });
            }
        }
        let layer = Layer {
            heads,
            kv_heads,
            key_dim: query.outputs / heads,
            value_dim: value.outputs / kv_heads,
            query,
            key,
            value,
            out,
            bias_kv: None,
            zero_attn: false,
            rotary: None,
        };
        layer.check()?;
        Ok(layer)
    }

    /// Checks all sizes.
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] or [`Error::TooLarge`] for a size out of range, [`Error::KvHeads`] if `kv_heads` does not divide `heads`,
    /// [`Error::Length`] for weights, a bias or an added key or value of the wrong length, and [`Error::Multiple`] or
    /// [`Error::Number`] for the width or the base of the rotary embedding.
    pub fn check(&self) -> Result<()> {
        let sizes = [("key_dim", self.key_dim, MAX_DIM), ("value_dim", self.value_dim, MAX_DIM)];
        for (field, value, limit) in sizes.into_iter().chain([("heads", self.heads, 1 << 20)]) {
            if value == 0 {
                return Err(Error::Zero { field });
            }
            if value > limit {
                return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
            }
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::KvHeads { heads: self.heads, kv_heads: self.kv_heads });
        }
        let [q, k] = [self.heads * self.key_dim, self.kv_heads * self.key_dim];
        let [v, o] = [self.kv_heads * self.value_dim, self.heads * self.value_dim];
        self.query.check(["query weight", "query bias"], self.query.inputs, q)?;
        self.key.check(["key weight", "key bias"], self.key.inputs, k)?;
        self.value.check(["value weight", "value bias"], self.value.inputs, v)?;
        self.out.check(["out weight", "out bias"], o, self.out.outputs)?;
        if let Some((key, value)) = &self.bias_kv {
            for (field, got, want) in [("bias_k", key.len(), k), ("bias_v", value.len(), v)] {
                if got != want as usize {
                    return Err(Error::Length { field, got, want: want as usize });
                }
            }
        }
        if let Some(rotary) = self.rotary {
            if rotary.dim == 0 || rotary.positions == 0 {
                return Err(Error::Zero { field: "rotary.dim or rotary.positions" });
            }
            if rotary.dim > self.key_dim {
                let (value, limit) = (rotary.dim.into(), self.key_dim.into());
                return Err(Error::TooLarge { field: "rotary.dim", value, limit });
            }
            if !rotary.dim.is_multiple_of(2) {
                return Err(Error::Multiple { field: "rotary.dim", value: rotary.dim.into(), of: 2 });
            }
            if !(rotary.base.is_finite() && rotary.base > 0.0) {
                let value = rotary.base as f32;
                return Err(Error::Number { field: "rotary.base", value, want: "finite and above 0" });
            }
        }
        Ok(())
    }

    /// The attention problem inside the layer: set masks, causal rule, window and the like on it. With a cache, `seq_kv` is the
    /// room of the cache. Element type, layouts, `lse` and `weights` are the layer's own affair.
    pub fn problem(&self, batch: u32, seq_q: u32, seq_kv: u32) -> Problem {
        let mut problem = Problem::new(batch, self.heads, seq_q, seq_kv, self.key_dim);
        (problem.kv_heads, problem.value_dim) = (self.kv_heads, self.value_dim);
        problem
    }

    /// Columns of the weights that leave the layer.
    pub fn weight_columns(&self, seq_kv: u32) -> u32 {
        seq_kv + u32::from(self.bias_kv.is_some()) + u32::from(self.zero_attn)
    }

    /// Checks the layer, and that a call fits it.
    pub(crate) fn check_call(&self, problem: &Problem, call: &Call) -> Result<()> {
        self.check()?;
        self.check_call_sizes(problem, call)
    }

    /// Checks that a call fits the layer, whose weights may be elsewhere.
    pub(crate) fn check_call_sizes(&self, problem: &Problem, call: &Call) -> Result<()> {
        problem.check()?;
        let own = self.problem(problem.batch, problem.seq_q, problem.seq_kv);
        let sizes = [
            ("heads", problem.heads, own.heads),
            ("kv_heads", problem.kv_heads, own.kv_heads),
            ("head_dim", problem.head_dim, own.head_dim),
            ("value_dim", problem.value_dim, own.value_dim),
        ];
        for (field, got, want) in sizes {
            if got != want {
                return Err(Error::LayerSize { field, got, want });
            }
        }
        let conflicts = [
            (problem.packed.is_some(), "packed", "the layer", "its projections read rows of one length"),
            (
                problem.paged.is_some(),
                "paged",
                "the layer",
                "its projections and its cache hold keys in rows, not in pages",
            ),
            (problem.logits.is_some(), "logits", "the layer", "they do not leave it; run the attention alone"),
            (problem.element != own.element, "element", "the layer", "its inputs and its output are f32"),
            (self.zero_attn && problem.sinks, "sinks", "zero_attn", "a key of zeros is a sink of 0 itself"),
            (self.bias_kv.is_some() && problem.softcap.is_some(), "softcap", "bias_kv", "the added key is not capped"),
            (call.cache && self.bias_kv.is_some(), "cache", "bias_kv", "no framework defines it"),
            (call.cache && call.sources != Sources::Query, "cache", "sources", "new rows are keys and queries at once"),
        ];
        if call.cache && problem.seq_q > problem.seq_kv {
            let (value, limit) = (problem.seq_q.into(), problem.seq_kv.into());
            return Err(Error::TooLarge { field: "seq_q of a call with a cache", value, limit });
        }
        let last = problem.seq_q.max(problem.seq_kv);
        if let Some(rotary) = self.rotary.filter(|rotary| last > rotary.positions) {
            let (value, limit) = (last.into(), rotary.positions.into());
            return Err(Error::TooLarge { field: "seq_q or seq_kv, bound by rotary.positions,", value, limit });
        }
        match conflicts.into_iter().find(|(set, ..)| *set) {
            Some((_, left, right, why)) => Err(Error::Conflict { left, right, why }),
            None if call.sources == Sources::Query && !call.cache && problem.seq_q != problem.seq_kv => {
                Err(Error::LayerSize { field: "seq_kv", got: problem.seq_kv, want: problem.seq_q })
            }
            None if call.sources == Sources::Query && self.query.inputs != self.key.inputs => {
                Err(Error::LayerSize { field: "key input width", got: self.key.inputs, want: self.query.inputs })
            }
            None if call.sources != Sources::Each && self.key.inputs != self.value.inputs => {
                Err(Error::LayerSize { field: "value input width", got: self.value.inputs, want: self.key.inputs })
            }
            None => Ok(()),
        }
    }

    /// Checks the lengths of host inputs, and gives the three that are projected.
    pub(crate) fn check_inputs<'a>(
        &self,
        problem: &Problem,
        call: &Call,
        inputs: &LayerInputs<'a>,
    ) -> Result<[&'a [f32]; 3]> {
        let (key, value) = match call.sources {
            Sources::Query => (inputs.query, inputs.query),
            Sources::Key => {
                let key = inputs.key.ok_or(Error::Missing { field: "key" })?;
                (key, key)
            }
            Sources::Each => (
                inputs.key.ok_or(Error::Missing { field: "key" })?,
                inputs.value.ok_or(Error::Missing { field: "value" })?,
            ),
        };
        for (field, given, used) in [
            ("key", inputs.key, call.sources != Sources::Query),
            ("value", inputs.value, call.sources == Sources::Each),
        ] {
            if given.is_some() && !used {
                return Err(Error::Unexpected { field });
            }
        }
        let rows = |seq: u32| problem.batch as usize * seq as usize;
        let keys = call.projected_keys(problem);
        let lengths = [
            ("query", inputs.query.len(), rows(problem.seq_q) * self.query.inputs as usize),
            ("key", key.len(), rows(keys) * self.key.inputs as usize),
            ("value", value.len(), rows(keys) * self.value.inputs as usize),
        ];
        for (field, got, want) in lengths {
            if got != want {
                return Err(Error::Length { field, got, want });
            }
        }
        Ok([inputs.query, key, value])
    }
}
