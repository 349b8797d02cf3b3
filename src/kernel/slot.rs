//! What the storage bindings of kernels hold.

use crate::contract::operands::Operand;

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
    /// The rows that one operation reads.
    X,
    /// The rows that one operation writes.
    Y,
    /// The layer's query input.
    Query,
    /// The layer's key input.
    Key,
    /// The layer's value input.
    Value,
    /// A weight matrix, of the layer: 0 query (or query, key and value together), 1 key (or key and value), 2 value, 3 output.
    Matrix(u8),
    /// Biases, those of the layer one after the other.
    Biases,
    /// The layer's output.
    Result,
    /// The weights that the layer gives out.
    Averaged,
    /// Cosines and sines of `rotary`.
    Angles,
    /// Positions of rows, for `rotary`.
    Positions,
    /// The cache that new rows go to.
    Cache,
    /// The row of the cache that each batch's first new row goes to.
    Starts,
    /// Which pages of a cache each batch has.
    BlockTable,
    /// Lengths of sequences that grow.
    Lengths,
    /// What is added to each of them.
    By,
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
    /// Scratch: maximum and sum of each row, for `merge`.
    Totals,
}

impl Slot {
    /// The operand of a call of attention that it binds by itself.
    pub(crate) const fn operand(self) -> Option<Operand> {
        match self {
            Slot::Mask => Some(Operand::Mask),
            Slot::Bias => Some(Operand::Bias),
            _ => None,
        }
    }

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
            Slot::Mask => Operand::Mask.name(),
            Slot::Bias => Operand::Bias.name(),
            Slot::Lists => "lists",
            Slot::Scores => "scores",
            Slot::Unpacked => "unpacked",
            Slot::Spare => "spare",
            Slot::State => "state",
            Slot::X => "x",
            Slot::Y => "y",
            Slot::Query => "query",
            Slot::Key => "key",
            Slot::Value => "value",
            Slot::Matrix(_) => "weight",
            Slot::Biases => "biases",
            Slot::Result => "result",
            Slot::Averaged => "layer weights",
            Slot::Angles => "table",
            Slot::Positions => "positions",
            Slot::Cache => "cache",
            Slot::Starts => "starts",
            Slot::BlockTable => Operand::BlockTable.name(),
            Slot::Lengths => "lengths",
            Slot::By => "by",
            Slot::KeyCache => "key cache",
            Slot::ValueCache => "value cache",
            Slot::PartialOut => "partial_out",
            Slot::PartialLse => "partial_lse",
            Slot::Sinks => Operand::Sinks.name(),
            Slot::Totals => "totals",
        }
    }
}
