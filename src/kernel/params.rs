//! The uniform that every kernel reads. Its fields stand here once; the WGSL struct is written from them.

macro_rules! params {
    ($($(#[doc = $doc:literal])* $name:ident: $kind:ident,)*) => {
        /// The uniform of one dispatch. Addresses are in elements of the bound range and wrap modulo 2³², so that a base may
        /// stand before the range: only the sum counts.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct Params { $($(#[doc = $doc])* pub $name: $kind,)* }

        /// The same fields as WGSL struct members.
        pub(crate) const WGSL: &str = concat!($("    ", stringify!($name), ": ", stringify!($kind), ",\n",)*);
    };
}

params! {
    /// First workgroup of this dispatch in the step's numbering.
    first: u32,
    /// End of the workgroups of this dispatch.
    end: u32,
    /// Tiles along rows.
    row_tiles: u32,
    /// Tiles along columns.
    col_tiles: u32,
    /// First batch.
    batch0: u32,
    /// First head.
    head0: u32,
    /// Heads in this part.
    heads: u32,
    /// First query row.
    row0: u32,
    /// End of the query rows.
    row_end: u32,
    /// First key.
    key0: u32,
    /// End of the keys.
    key_end: u32,
    /// Longest query length.
    seq_q: u32,
    /// Longest key length.
    seq_kv: u32,
    /// Query tokens of all packed sequences.
    total_q: u32,
    /// Key tokens of all packed sequences.
    total_kv: u32,
    /// Pages of the pool of keys and values, if they stand in pages.
    pages: u32,
    /// Keys of a page; without pages the longest key length, so that all stand in the first one.
    page_size: u32,
    /// From one row of the block table to the next.
    table_row: u32,
    /// Query heads per key/value head.
    group: u32,
    /// Of a key/value head's query heads the first in this part, where a kernel takes them together.
    group0: u32,
    /// Their end.
    group_end: u32,
    /// Last axis of q and k.
    head_dim: u32,
    /// Last axis of v and out.
    value_dim: u32,
    /// One bit a rule or operand that is on.
    flags: u32,
    /// Factor of q·k.
    scale: f32,
    /// Soft cap.
    softcap: f32,
    /// Keys visible before the position.
    window_left: u32,
    /// Keys visible after the position.
    window_right: u32,
    /// Lines of a tile of `values`, see shaders/shared/lines.wgsl; where its heads stand apart, rows.
    values_rows: u32,
    /// Lines of a row there: query heads that share a tile.
    values_each: u32,
    /// q: base and strides.
    q_base: u32,
    /// Stride.
    q_batch: u32,
    /// Stride.
    q_head: u32,
    /// Stride.
    q_row: u32,
    /// k: base and strides.
    k_base: u32,
    /// Stride.
    k_batch: u32,
    /// Stride.
    k_head: u32,
    /// Stride.
    k_row: u32,
    /// v: base and strides.
    v_base: u32,
    /// Stride.
    v_batch: u32,
    /// Stride.
    v_head: u32,
    /// Stride.
    v_row: u32,
    /// The step's output: base and strides.
    out_base: u32,
    /// Stride.
    out_batch: u32,
    /// Stride.
    out_head: u32,
    /// Stride.
    out_row: u32,
    /// Score scratch: base and strides.
    s_base: u32,
    /// Stride.
    s_batch: u32,
    /// Stride.
    s_head: u32,
    /// Stride.
    s_row: u32,
    /// Boolean mask, in bytes: base and strides, 0 where it broadcasts.
    mask_base: u32,
    /// Stride.
    mask_batch: u32,
    /// Stride.
    mask_head: u32,
    /// Stride.
    mask_row: u32,
    /// Stride.
    mask_key: u32,
    /// Keys that the mask covers.
    mask_keys: u32,
    /// Bias: base and strides, 0 where it broadcasts.
    bias_base: u32,
    /// Stride.
    bias_batch: u32,
    /// Stride.
    bias_head: u32,
    /// Stride.
    bias_row: u32,
    /// Stride.
    bias_key: u32,
    /// Keys that the bias covers.
    bias_keys: u32,
    /// Log-sum-exp: base and strides.
    lse_base: u32,
    /// Stride.
    lse_batch: u32,
    /// Stride.
    lse_head: u32,
    /// Place of the key lengths in `lists`.
    list_lengths: u32,
    /// Place of the offsets.
    list_offsets: u32,
    /// Place of the ALiBi slopes.
    list_slopes: u32,
    /// Place of the sinks.
    list_sinks: u32,
    /// Place of the query boundaries.
    list_cu_q: u32,
    /// Place of the key boundaries.
    list_cu_kv: u32,
    /// Place of the block table.
    list_pages: u32,
    /// Elements that `pack` writes.
    pack_count: u32,
    /// Input rows of `project` and `rotary`: base and strides.
    x_base: u32,
    /// Stride.
    x_batch: u32,
    /// Stride.
    x_head: u32,
    /// Stride.
    x_row: u32,
    /// Weights: base, and from one row of the matrix in memory to the next.
    w_base: u32,
    /// Stride.
    w_row: u32,
    /// Bias of the projection: base.
    b_base: u32,
    /// First input.
    in0: u32,
    /// End of the inputs.
    in_end: u32,
    /// First output column.
    col0: u32,
    /// End of the output columns.
    col_end: u32,
    /// Output columns of a head.
    col_head: u32,
    /// End of the columns that turn in `project`.
    turn_end: u32,
    /// Columns of a head of those.
    turn_head: u32,
    /// Partial log-sum-exps of `merge`: base; other strides are those of `lse`.
    partial_base: u32,
    /// From one partial log-sum-exp to the next.
    partial_lse: u32,
    /// From one partial output to the next.
    partial_out: u32,
    /// Items that `merge` numbers through; in `pack` the sequences of a packed batch.
    item_count: u32,
}

/// Bytes from one dispatch's uniform to the next: every adapter can bind multiples of 256.
pub(crate) const STRIDE: u64 = (size_of::<Params>() as u64).next_multiple_of(256);

macro_rules! flags {
    ($($name:ident = $bit:literal,)*) => {
        /// Bits of [`Params::flags`].
        pub(crate) mod flags { $(pub(crate) const $name: u32 = 1 << $bit;)* }

        /// Their names and values for the shaders.
        pub(crate) const FLAGS: &[(&str, u32)] = &[$((stringify!($name), flags::$name),)*];
    };
}

flags! {
    CAUSAL = 0,
    BOTTOM_RIGHT = 1,
    OFFSETS = 2,
    WINDOW_LEFT = 3,
    WINDOW_RIGHT = 4,
    LENGTHS = 5,
    PACKED = 6,
    SOFTCAP = 7,
    ALIBI = 8,
    SINKS = 9,
    MASK = 10,
    BIAS = 11,
    BIAS_F32 = 12,
    BIAS_BF16 = 13,
    EVERY_KEY = 14,
    EXPORT_LOGITS = 15,
    ADD = 16,
    LSE = 17,
    CIRCULAR = 18,
    TOTALS = 19,
    PAGED = 20,
    TURN = 21,
    HALVES = 22,
    PARTIAL = 23,
}
