//! One attention problem: what is to be computed, independent of any device.

mod host;

use serde::{Deserialize, Serialize};

use crate::contract::error::{Error, Result};

pub(crate) use host::from_host;
pub use host::{Elements, Inputs, Outputs};

use crate::contract::names::names;
use crate::contract::shape::Shape;

/// Element type of a tensor in memory. Arithmetic is always f32.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16. Works on every adapter: packed in pairs where the adapter has no f16.
    F16,
    /// bfloat16, always packed in pairs.
    Bf16,
}

impl Element {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }
}

names! { Element, "element":
    F32 = "f32",
    F16 = "f16",
    Bf16 = "bf16",
}

/// Causal visibility: query row `i` of batch `b` has the position `p = i + offset[b]` and sees keys `j <= p`.
///
/// The position also anchors [`Window`] and ALiBi. With [`Causal::None`] the offset is 0.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Causal {
    /// No causal rule; offset 0.
    #[default]
    None,
    /// `offset = 0`: the first query has the position of the first key (PyTorch `is_causal`, ONNX without cache).
    TopLeft,
    /// `offset[b] = key length of b − query length of b`: the last query has the position of the last key
    /// (FlashAttention ≥ 2.1, ONNX external cache). May be negative: leading rows then see nothing.
    BottomRight,
    /// `offset[b]` is given per batch in the operand `offsets` (i32, any sign), as for a cache of past keys. An offset beyond ±2³⁰
    /// counts as ±2³⁰; no mask or window can tell the difference.
    Offset,
}

names! { Causal, "causal":
    None = "none",
    TopLeft = "top-left",
    BottomRight = "bottom-right",
    Offset = "offset",
}

/// Sliding window around the position `p` of a row: `p − left <= j <= p + right`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Window {
    /// Keys visible before the position; `None` is no bound.
    pub left: Option<u32>,
    /// Keys visible after the position; `None` is no bound.
    pub right: Option<u32>,
}

/// Shape of an operand that broadcasts to [batch, heads, seq_q, seq_kv]: right-aligned, each axis 1 or full.
///
/// The last axis may be shorter than `seq_kv` (but not 1, which broadcasts): keys beyond it are hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Broadcast(pub [u32; 4]);

impl Broadcast {
    /// A shape of rank 1 to 4, filled up with ones at the left. `field` is the operand's name in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] if the rank is 0 or above 4.
    pub fn new(field: &'static str, shape: &[u32]) -> Result<Self> {
        if shape.is_empty() || shape.len() > 4 {
            return Err(Error::Rank { field, rank: shape.len() });
        }
        let mut full = [1; 4];
        full[4 - shape.len()..].copy_from_slice(shape);
        Ok(Broadcast(full))
    }

    /// Number of elements in the operand; `usize::MAX` if there are more.
    pub fn len(&self) -> usize {
        self.0.iter().fold(1, |len: usize, &n| len.saturating_mul(n as usize))
    }

    /// Whether the operand has no element, because an axis is 0. This is valid where the problem has no batch, query or key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Additive bias: its shape and its element type. It may hold −inf, which hides the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bias {
    /// Broadcastable to the score matrix.
    pub shape: Broadcast,
    /// Type in memory.
    pub element: Element,
}

/// Layout of the elements of a [batch, head, row, last] tensor in memory. The last axis is dense.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Dense [batch, heads, seq, dim] (PyTorch, ONNX 4-D).
    #[default]
    Bhsd,
    /// Dense [batch, seq, heads, dim] (FlashAttention; the same memory as 3-D [batch, seq, heads·dim] of ONNX and Keras).
    Bshd,
    /// Any strides, in elements: packed QKV, slices of a larger tensor, a cache with room to grow.
    Strided(Strides),
}

/// Strides of a tensor in elements; element (b, h, s, d) is at `offset + b·batch + h·head + s·row + d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Strides {
    /// Offset of element (0, 0, 0, 0) from the start of the buffer slice.
    pub offset: u64,
    /// Distance from one batch to the next. Unused for packed sequences.
    pub batch: u64,
    /// Distance from one head to the next.
    pub head: u64,
    /// Distance from one row (token) to the next.
    pub row: u64,
}

/// Sequences of different lengths laid end to end ("varlen", "ragged", `thd`), without padding.
///
/// Sequence `b` owns the query tokens `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]` and the keys `cu_seqlens_kv[b] .. cu_seqlens_kv[b + 1]`.
/// `seq_q` and `seq_kv` of the [`Problem`] are then the longest lengths, `batch` the number of sequences,
/// and the layouts' batch stride is unused. Mask, bias, weights and logits index rows and keys within a sequence. Where a sequence is
/// shorter than the longest, weights hold 0 and logits −inf. Tokens of `out` and `lse` that no sequence owns are not written (0 in
/// [`Outputs`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    /// Query tokens of all sequences together.
    pub total_q: u32,
    /// Key tokens of all sequences together.
    pub total_kv: u32,
}

/// Keys and values in pages of a pool; a block table says which pages belong to which batch ("paged attention").
///
/// k and v are [pages, kv_heads, page_size, dim] ([`Layout::Bhsd`]) or [pages, page_size, kv_heads, dim] ([`Layout::Bshd`]), or
/// have any strides, where the page is the batch axis. Key `j` of batch `b` is row `j % page_size` of page
/// `block_table[b, j / page_size]`. The block table is u32 (or i32) [batch, ⌈seq_kv / page_size⌉]. Sequences may share pages,
/// and pages may be in any order. No entry is read for keys beyond `key_lengths[b]`. On the GPU a page number outside the pool, or a
/// negative one, counts as the last page, so that nothing outside the pool is read. On host slices it is an error.
///
/// [`Append`](crate::operations::Append) uses the same table to write new rows to their pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paged {
    /// Number of pages in the pool: 1 or more, or 0 if the sequences have no keys at all.
    pub pages: u32,
    /// Number of keys in a page, 1 or more.
    pub page_size: u32,
}

/// Which logits to return, as ONNX's `qk_matmul_output_mode` 0 to 2 (mode 3 is [`Problem::weights`]).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Logits {
    /// `scale · q·k` (mode 0).
    Raw,
    /// After the soft cap, before mask and bias (mode 1).
    Capped,
    /// After ALiBi, bias and visibility; −inf where a key is hidden (mode 2).
    Masked,
}

/// One attention problem. Start from [`Problem::new`] and set fields. With serde, the seven sizes must be there, other fields that are
/// missing are those of [`Problem::new`], and unknown ones are an error.
///
/// # The contract
///
/// For query row `i` of head `h` in batch `b`, in this order:
///
/// 1. `s[j] = scale · Σ_d q[b,h,i,d] · k[b, h / (heads / kv_heads), j, d]`.
/// 2. With a soft cap: `s[j] = softcap · tanh(s[j] / softcap)`.
/// 3. With ALiBi: `s[j] −= slope[h] · |p − t|`, where `p = i + offset[b]` ([`Causal`]) is the position of the row and `t` that of the
///    key: `j`, or `key_positions[b, j]`. With a bias: `s[j] += bias[b,h,i,j]`.
/// 4. Key `j` is visible when the boolean mask says true **and** `j < key_lengths[b]` **and** `t <= p` (if causal)
///    **and** `p − left <= t <= p + right` (if windowed) **and** `t >= 0` **and** its bias is not −inf. A last axis of mask or bias
///    that is shorter than `seq_kv` hides the rest.
/// 5. `weights = softmax(s)` over the visible keys; a sink `z[h]` adds `exp(z[h])` to the denominator.
/// 6. `out[b,h,i,:] = Σ_j weights[j] · v[b, h / (heads / kv_heads), j, :]`, and
///    `lse[b,h,i] = ln(Σ_j exp(s[j]) + exp(z[h]))`.
///
/// - **Broadcasting.** Shapes of mask and bias are aligned at the right with [batch, heads, seq_q, seq_kv]; each axis is 1 or
///   full ([`Broadcast`]). A last axis of 1 broadcasts, any other one shorter than `seq_kv` hides the keys beyond it.
/// - **Alignment.** [`Causal`] gives the position of the first query. It is 0 unless you say otherwise, also for a window
///   or ALiBi without a causal rule. A negative offset leaves the first rows without a visible key; it is not clamped.
/// - **A row that sees no key** has `weights = 0`, `out = 0`, `lse = −inf` (or `z[h]` with a sink), and masked logits of −inf.
/// - **Sizes of 0.** `batch`, `seq_q`, `seq_kv` and the totals of [`Packed`] may be 0, as in PyTorch. Outputs that have no element
///   are then empty; without a key every row is one that sees no key. `heads`, `kv_heads`, `head_dim` and `value_dim` are 1 or
///   more: less is [`crate::Error::Zero`].
/// - **Hidden is not low.** The contents of hidden keys and values (NaN, infinities, garbage) do not reach the result, except in raw
///   and capped logits, which are taken before any key is hidden. A logit that overflows f32,
///   or whose `q·k` does, is clamped to the largest finite f32 and stays visible, so a row whose logits are all `f32::MIN` by
///   bias is an ordinary row: its output is the mean of the values.
/// - **NaN and infinities** that a row sees change the results that depend on them, as in IEEE arithmetic, and no others. A row that sees
///   a logit of NaN or +∞ has NaN in `out` and in the weights of its visible keys, and NaN or +∞ in `lse`. A row all of whose
///   visible logits are −∞ has NaN in `out` and in those weights, and `lse = −∞`. With a soft cap an infinite score is ± the cap. A NaN
///   or an infinity in a value changes only its own element of `out`.
/// - **Element types.** q, k, v and out are all f32, all f16 or all bf16; the bias has a type of its own; mask: one byte an
///   element; small arrays: u32, i32 and f32; lse, weights and logits: f32. Arithmetic is f32 throughout, softmax included;
///   the result is rounded once to the element type, to nearest, ties to even. Nothing is computed in f16, bf16 or f64.
///
/// (Vaswani et al. 2017, eq. 1; ONNX `Attention` opset 25 and FlashAttention for the terms around it.)
///
/// # From other libraries
///
/// `true` means *may attend* here, as in PyTorch's `scaled_dot_product_attention`, ONNX and Keras. In the rows marked **invert**
/// the other library means the opposite: pass `!mask`, because otherwise the answer is wrong without an error. All rules may be
/// combined; a key must pass each of them.
///
/// | theirs | ours |
/// |---|---|
/// | **PyTorch** `scaled_dot_product_attention` | [`Layout::Bhsd`] |
/// | `attn_mask` of bool | [`Problem::mask`] |
/// | `attn_mask` of floats | [`Problem::bias`] |
/// | `is_causal=True`, `causal_upper_left` | [`Causal::TopLeft`], also where lengths differ |
/// | `causal_lower_right` | [`Causal::BottomRight`] |
/// | `scale` | [`Problem::scale`] |
/// | `enable_gqa=True` | [`Problem::kv_heads`] less than `heads` |
/// | `dropout_p` | none; 0 |
/// | **PyTorch** `nn.MultiheadAttention` | [`Layer`](crate::multihead::Layer), `load::pytorch` (feature `safetensors`) |
/// | `key_padding_mask` of bool [N, S] | **invert**; [`Problem::mask`] of shape [N, 1, 1, S] |
/// | `attn_mask` of bool [L, S] or [N·heads, L, S] | **invert**; [`Problem::mask`] of shape [1, 1, L, S] or [N, heads, L, S] |
/// | either of floats | [`Problem::bias`] of the same shapes; two of them: their sum |
/// | `is_causal` (a hint beside `attn_mask`) | [`Causal::TopLeft`] |
/// | `need_weights`, `average_attn_weights` | [`Weights`](crate::multihead::Weights) |
/// | `add_bias_kv`, `add_zero_attn` | [`Layer`](crate::multihead::Layer)'s `bias_kv`, `zero_attn` |
/// | `batch_first=False` | [`Call`](crate::multihead::Call)'s `seq_first` |
/// | **ONNX** `Attention` 23 to 25 | 4-D: [`Layout::Bhsd`]; 3-D with `q_num_heads`: [`Layout::Bshd`] |
/// | `attn_mask` | [`Problem::mask`] (bool) or [`Problem::bias`] |
/// | `is_causal=1` | [`Causal::TopLeft`]; see the next two rows |
/// | … with `past_key`, `past_value` | the whole cache as k and v ([`Append`](crate::operations::Append)), [`Causal::Offset`] = past length |
/// | … with `nonpad_kv_seqlen` | [`Problem::key_lengths`], [`Causal::BottomRight`] |
/// | `scale`, `softcap` (0 is none) | [`Problem::scale`], [`Problem::softcap`] |
/// | `left_window_size`, `right_window_size` (−1 is none) | [`Problem::window`] |
/// | `qk_matmul_output_mode` 0, 1, 2; 3 | [`Problem::logits`]; [`Problem::weights`] |
/// | `TensorScatter`, `RotaryEmbedding` | [`Append`](crate::operations::Append), [`Rotation`](crate::operations::Rotation) |
/// | **Keras** `MultiHeadAttention`, `GroupQueryAttention` | [`Layout::Bshd`]; [`Layer`](crate::multihead::Layer) |
/// | `attention_mask` [B, T, S] | [`Problem::mask`] of shape [B, 1, T, S] |
/// | `key_mask`, `value_mask` [B, S] | [`Problem::mask`] of shape [B, 1, 1, S]; of several masks their *and* |
/// | `query_mask` [B, T] | [`Problem::mask`] of shape [B, 1, T, 1]; such rows are 0 here, a mean of the values there |
/// | `use_causal_mask=True` | [`Causal::TopLeft`] |
/// | `return_attention_scores=True` | [`Problem::weights`], [`Weights::Heads`](crate::multihead::Weights::Heads) |
/// | `mask` of TensorFlow's tutorial (1 = hidden) | **invert** |
/// | **Hugging Face** `sliding_window = W`, the query's own key included | [`Window::left`] = `W − 1` |
/// | **FlashAttention** from 2.1 on | [`Layout::Bshd`] |
/// | `causal=True` | [`Causal::BottomRight`] |
/// | `softmax_scale`, `softcap` (0 is none), `alibi_slopes` of each head | [`Problem::scale`], [`Problem::softcap`], [`Problem::alibi`] |
/// | `window_size=(left, right)` (−1 is none) | [`Problem::window`] |
/// | `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_*` | [`Problem::packed`], `seq_q` and `seq_kv` |
/// | `cache_seqlens`, `seqused_k` | [`Problem::key_lengths`], the new keys included |
/// | `block_table`, with paged `k_cache` and `v_cache` | [`Problem::paged`], [`Layout::Bshd`]; `seq_kv` = its columns · page size |
/// | `softmax_lse` | [`Problem::lse`] |
/// | **vLLM** `block_tables`, `seq_lens`, `block_size` | [`Problem::paged`], [`Problem::key_lengths`], [`Paged::page_size`] |
/// | `slot_mapping` of new rows | [`Append`](crate::operations::Append) with [`Append::paged`](crate::operations::Append::paged) |
/// | **FlashInfer** `paged_kv_cache` in `NHD`; `HND` | [`Problem::paged`], [`Layout::Bshd`]; [`Layout::Bhsd`] |
/// | … of keys and values in one tensor [pages, 2, …] | [`Layout::Strided`] with the batch stride of both together |
/// | `kv_page_indices` | the rows of the block table, padded to the longest (with anything) |
/// | `kv_page_indptr`, `kv_last_page_len` | [`Problem::key_lengths`] = (pages of the sequence − 1) · page size + last page's length |
/// | **PyTorch** `flex_attention`'s `PagedAttention.page_table` | [`Problem::paged`] |
/// | **Burn** `attention` | [`Layout::Bhsd`] |
/// | `mask` | **invert**; [`Problem::mask`] |
/// | `attn_bias` | [`Problem::bias`] |
/// | `is_causal` | [`Causal::BottomRight`], unless its `causal_alignment` (from 0.23 on) says otherwise |
/// | `scale`, `softcap` | [`Problem::scale`], [`Problem::softcap`] |
///
/// A window without a causal rule has the offset 0 here. FlashAttention and ONNX give it the offset `o` that the causal rule would have.
/// Where `o` is not 0, express such a window as a causal rule at a position moved by `right`: [`Causal::Offset`] with
/// `o + right`, [`Window::left`] = `left + right` and no [`Window::right`]. Without a bound at the right, use `seq_q + seq_kv` for `right`.
/// FlashAttention's ALiBi has the offset `o` too: without a causal rule and with lengths that differ, pass it as a [`Problem::bias`].
///
/// # Where ONNX leaves a choice
///
/// - `softmax_precision` is not followed: softmax is f32 for every value of it, f64 included.
/// - A mask whose last axis is 1 broadcasts, as the operator's text says; ONNX's reference evaluator pads it with −inf, so that
///   only the first key is visible. Other short masks hide the rest, in every opset; the text of opset 23 does not allow them.
/// - `qk_matmul_output_mode` 0 is the product before the soft cap, as the text says; the reference evaluator caps it.
/// - A row without a visible key gives zeros, weights included, in every opset; releases before 1.23 gave NaN.
/// - Modes 1 and 2 are those of release 1.23: after the soft cap, and after mask and bias. Older releases swapped them.
/// - With a window and a past, a position may lie beyond the last key; the causal rule then limits nothing.
/// - 4-D inputs that also say `q_num_heads` are an error from opset 25 on; the case files run them all the same.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem {
    /// Batches, or sequences if `packed`; 0 or more.
    pub batch: u32,
    /// Query heads, 1 or more.
    pub heads: u32,
    /// Key/value heads, 1 or more; divides `heads`. 1 is multi-query, less than `heads` grouped-query attention.
    pub kv_heads: u32,
    /// Query rows of each batch and head, 0 or more.
    pub seq_q: u32,
    /// Keys of each batch and head, 0 or more. With `key_lengths` this is a capacity.
    pub seq_kv: u32,
    /// Last axis of q and k, 1 to 512.
    pub head_dim: u32,
    /// Last axis of v and out, 1 to 512.
    pub value_dim: u32,
    /// Factor of q·k. `None` is `1/√head_dim`.
    #[serde(default)]
    pub scale: Option<f32>,
    /// Soft cap of the scores; `None` is off.
    #[serde(default)]
    pub softcap: Option<f32>,
    /// Causal rule and the offset of positions.
    #[serde(default)]
    pub causal: Causal,
    /// Sliding window.
    #[serde(default)]
    pub window: Window,
    /// Shape of the boolean mask (one byte an element, **true (1) = may attend**).
    #[serde(default)]
    pub mask: Option<Broadcast>,
    /// Additive bias.
    #[serde(default)]
    pub bias: Option<Bias>,
    /// Whether there are `key_lengths`: keys `j >= key_lengths[b]` are hidden.
    #[serde(default)]
    pub key_lengths: bool,
    /// Whether there are `key_positions`, one for each batch and key: keys may stand in any order, and a negative position is an empty
    /// slot, whose key is hidden. So a cache that goes on at its first row after its last one ([`Append`](crate::operations::Append)) is attended to with a
    /// window and without a mask.
    #[serde(default)]
    pub key_positions: bool,
    /// Whether there are ALiBi slopes, one per query head.
    #[serde(default)]
    pub alibi: bool,
    /// Whether there are attention sinks, one logit per query head.
    #[serde(default)]
    pub sinks: bool,
    /// Type of q, k, v and out.
    #[serde(default)]
    pub element: Element,
    /// Layout of q: [batch, heads, seq_q, head_dim].
    #[serde(default)]
    pub q: Layout,
    /// Layout of k: [batch, kv_heads, seq_kv, head_dim]; paged: [pages, kv_heads, page_size, head_dim].
    #[serde(default)]
    pub k: Layout,
    /// Layout of v: [batch, kv_heads, seq_kv, value_dim]; paged: [pages, kv_heads, page_size, value_dim].
    #[serde(default)]
    pub v: Layout,
    /// Layout of out: [batch, heads, seq_q, value_dim].
    #[serde(default)]
    pub out: Layout,
    /// Sequences laid end to end.
    #[serde(default)]
    pub packed: Option<Packed>,
    /// Keys and values in pages of a pool.
    #[serde(default)]
    pub paged: Option<Paged>,
    /// Whether to return the log-sum-exp of each row (natural logarithm), f32: [batch, heads, seq_q], packed: [heads, total_q].
    #[serde(default)]
    pub lse: bool,
    /// Whether to return the weights, f32: dense [batch, heads, seq_q, seq_kv].
    #[serde(default)]
    pub weights: bool,
    /// Which logits to return, if any, f32: dense [batch, heads, seq_q, seq_kv].
    #[serde(default)]
    pub logits: Option<Logits>,
}

impl Problem {
    /// Dense f32 self- or cross-attention with as many key/value heads as query heads and `value_dim = head_dim`.
    pub fn new(batch: u32, heads: u32, seq_q: u32, seq_kv: u32, head_dim: u32) -> Self {
        Problem {
            batch,
            heads,
            kv_heads: heads,
            seq_q,
            seq_kv,
            head_dim,
            value_dim: head_dim,
            scale: None,
            softcap: None,
            causal: Causal::None,
            window: Window::default(),
            mask: None,
            bias: None,
            key_lengths: false,
            key_positions: false,
            alibi: false,
            sinks: false,
            element: Element::F32,
            q: Layout::Bhsd,
            k: Layout::Bhsd,
            v: Layout::Bhsd,
            out: Layout::Bhsd,
            packed: None,
            paged: None,
            lse: false,
            weights: false,
            logits: None,
        }
    }

    /// Sets the layout of q, k, v and out at once.
    pub fn with_layout(mut self, layout: Layout) -> Self {
        (self.q, self.k, self.v, self.out) = (layout, layout, layout, layout);
        self
    }

    /// Checks every field and returns the [`crate::Shape`] that the rest of the crate works with.
    ///
    /// # Errors
    ///
    /// An error that names the field: a size that is 0 or too large, heads that do not divide, a number that is not finite, a mask or
    /// bias that does not broadcast, fields that exclude each other, strides of `out` that overlap.
    pub fn check(&self) -> Result<Shape> {
        Shape::new(self)
    }
}
