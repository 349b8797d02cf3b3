//! Parameters that several kernels read: blocks of fields, and flags. Every name has one meaning in all kernels.

use super::uniform::{Block, Member, block};
use crate::contract::operands::{Kind, Operand};
use crate::contract::problem::Strides;

block! {
    /// The part of the work of a dispatch, and how its workgroups are numbered: columns run fastest, then rows, then heads.
    plain Place {
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
        /// First head: a key/value head where a kernel takes all query heads of one together.
        head0: u32,
        /// Such heads in this part.
        heads: u32,
        /// First row.
        row0: u32,
        /// End of the rows.
        row_end: u32,
    }
}

block! {
    /// Where the rows of a tensor stand. Addresses are in elements of the bound range and wrap modulo 2³², so that a base may stand
    /// before the range: only the sum counts.
    named At {
        /// Place of element (0, 0, 0, 0).
        base: u32,
        /// From one batch to the next.
        batch: u32,
        /// From one head to the next.
        head: u32,
        /// From one row to the next.
        row: u32,
    }
}

impl At {
    /// Strides wrap like addresses.
    pub(crate) fn new(base: u32, strides: &Strides) -> Self {
        At { base, batch: strides.batch as u32, head: strides.head as u32, row: strides.row as u32 }
    }
}

block! {
    /// Where a tensor of one number for each row stands. Its rows are neighbours.
    named LineAt {
        /// Place of element (0, 0, 0).
        base: u32,
        /// From one batch to the next.
        batch: u32,
        /// From one head to the next.
        head: u32,
    }
}

block! {
    /// Where an operand of one number for each row and key stands. The stride of an axis along which it broadcasts is 0.
    named PairAt {
        /// Place of element (0, 0, 0, 0).
        base: u32,
        /// From one batch to the next.
        batch: u32,
        /// From one head to the next.
        head: u32,
        /// From one row to the next.
        row: u32,
        /// From one key to the next.
        key: u32,
        /// Keys that it covers.
        keys: u32,
    }
}

block! {
    /// The keys of a dispatch.
    plain Keys {
        /// First key.
        key0: u32,
        /// End of the keys.
        key_end: u32,
    }
}

block! {
    /// Lengths, and which keys a row sees by its position; see shaders/shared/visible.wgsl.
    plain Visible {
        /// Longest query length.
        seq_q: u32,
        /// Longest key length.
        seq_kv: u32,
        /// Query tokens of all packed sequences.
        total_q: u32,
        /// Key tokens of all packed sequences.
        total_kv: u32,
        /// Keys visible before the position.
        window_left: u32,
        /// Keys visible after the position.
        window_right: u32,
    } reads CAUSAL, BOTTOM_RIGHT, OFFSETS, WINDOW_LEFT, WINDOW_RIGHT, LENGTHS, POSITIONS, PACKED, EVERY_KEY
}

block! {
    /// The score transform; see shaders/shared/score.wgsl.
    plain Transform {
        /// Factor of q·k.
        scale: f32,
        /// Soft cap.
        softcap: f32,
        /// Boolean mask, in bytes.
        mask: PairAt,
        /// Bias.
        bias: PairAt,
    } reads SOFTCAP, ALIBI, MASK, BIAS, BIAS_F32, BIAS_BF16
}

block! {
    /// A pool of pages in which keys and values, or the rows of a cache, stand; see shaders/shared/pages.wgsl.
    plain Pages {
        /// Pages of the pool.
        pages: u32,
        /// Rows of a page; without pages the most that there are, so that all stand in the first one.
        page_size: u32,
        /// From one row of the block table to the next.
        table_row: u32,
    } reads PAGED
}

block! {
    /// The query heads of a key/value head that a part has: all, unless the part lies within one group. See shaders/shared/lines.wgsl.
    plain Lines {
        /// The first of them.
        group0: u32,
        /// Their end.
        group_end: u32,
    }
}

block! {
    /// Distances between partial results of the same rows, which `merge` reads and `split` writes.
    plain Partials {
        /// From one partial output to the next.
        next_out: u32,
        /// From one partial log-sum-exp to the next, in rows.
        next_lse: u32,
    }
}

block! {
    /// The partial results of a dispatch of either pass of `merge`.
    plain Merging {
        /// First partial that is bound.
        partial0: u32,
        /// End of the partials.
        partial_end: u32,
        /// Place of the log-sum-exps of partial 0.
        first_lse: u32,
        /// Distances between partial results.
        partials: Partials,
        /// Maximum and sum, and log-sum-exp.
        lse: LineAt,
        /// Rows, or vectors of four elements, that are numbered through.
        items: u32,
    }
}

block! {
    /// What rows are rotated by; see shaders/shared/rotate.wgsl.
    plain RotationTable {
        /// Rows of the table.
        table_rows: u32,
        /// Elements of a row of the table, and of a row of a head that are rotated.
        rotary_dim: u32,
        /// Place of the first position.
        positions_base: u32,
        /// Positions from one batch to the next.
        positions_batch: u32,
        /// Positions from one row to the next: 0 where a batch has one for its first row.
        positions_row: u32,
        /// What a row adds to the position that is listed: 1 where a batch has one for its first row.
        position_step: u32,
    }
}

/// How many operands are lists.
const LISTS: usize = {
    let (mut n, mut lists) = (0, 0);
    while n < Operand::ALL.len() {
        lists += matches!(Operand::ALL[n].kind(), Kind::List) as usize;
        n += 1;
    }
    lists
};

/// Places of the small arrays per batch and per head in the buffer of them all, in the order of their operands. In WGSL the names of
/// the operands follow that of the block.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Lists([u32; LISTS]);

impl Lists {
    /// What a function gives for each list.
    pub(crate) fn from_fn(place: impl Fn(Operand) -> u32) -> Self {
        let mut lists = Lists::default();
        lists.0.iter_mut().zip(Operand::of_kind(Kind::List)).for_each(|(to, operand)| *to = place(operand));
        lists
    }
}

impl Block for Lists {
    const READS: u32 = 0;

    fn list(name: &str, members: &mut Vec<Member>) {
        Operand::of_kind(Kind::List).for_each(|operand| u32::list(&format!("{name}_{}", operand.name()), members));
    }
}

/// What the planner knows of a dispatch of attention. Each kernel has the fields of these names that it reads.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    /// The part of the work.
    pub place: Place,
    /// The keys of the dispatch.
    pub keys: Keys,
    /// Lengths and positions.
    pub visible: Visible,
    /// The pages of keys and values.
    pub pages: Pages,
    /// Places of the small arrays.
    pub list: Lists,
    /// One bit a rule or operand that is on.
    pub flags: u32,
    /// Query heads per key/value head.
    pub group: u32,
    /// Those of this part.
    pub lines: Lines,
    /// Last axis of q and k.
    pub head_dim: u32,
    /// Last axis of v and out.
    pub value_dim: u32,
    /// The score transform.
    pub transform: Transform,
    /// Queries.
    pub q: At,
    /// Keys.
    pub k: At,
    /// Values.
    pub v: At,
    /// The output.
    pub out: At,
    /// Scratch of scores, or the weights that are formed from them in place.
    pub s: At,
    /// Log-sum-exp.
    pub lse: LineAt,
    /// Distances between partial results.
    pub partials: Partials,
    /// Lines of a tile of `values`, see shaders/shared/lines.wgsl; where its heads stand apart, rows.
    pub values_rows: u32,
    /// Lines of a row there: query heads that share a tile.
    pub values_each: u32,
}

macro_rules! flags {
    ($($(#[doc = $doc:literal])* $name:ident = $bit:literal,)*) => {
        /// Bits of the field `flags` of a uniform.
        pub(crate) mod flags { $($(#[doc = $doc])* pub(crate) const $name: u32 = 1 << $bit;)* }

        /// Their names and values. A shader gets those that its kernel reads.
        pub(crate) const FLAGS: &[(&str, u32)] = &[$((stringify!($name), flags::$name),)*];
    };
}

flags! {
    /// A row sees no key behind its position.
    CAUSAL = 0,
    /// The last row stands at the last key.
    BOTTOM_RIGHT = 1,
    /// The positions of rows begin at a listed offset.
    OFFSETS = 2,
    /// A window ends what a row sees before its position.
    WINDOW_LEFT = 3,
    /// A window ends what a row sees after its position.
    WINDOW_RIGHT = 4,
    /// Key lengths are listed.
    LENGTHS = 5,
    /// Sequences are packed, and their boundaries listed.
    PACKED = 6,
    /// Scores have a soft cap.
    SOFTCAP = 7,
    /// ALiBi slopes are listed.
    ALIBI = 8,
    /// Attention sinks are listed.
    SINKS = 9,
    /// There is a boolean mask.
    MASK = 10,
    /// An additive bias joins the scores.
    BIAS = 11,
    /// That bias is f32.
    BIAS_F32 = 12,
    /// That bias is bf16.
    BIAS_BF16 = 13,
    /// Keys that no row of a tile sees are worked on too.
    EVERY_KEY = 14,
    /// What is exported are logits; otherwise weights.
    EXPORT_LOGITS = 15,
    /// What dispatches before left in the output is a part of the result.
    ADD = 16,
    /// The log-sum-exp of each row is written.
    LSE = 17,
    /// After its last row a cache goes on at its first.
    CIRCULAR = 18,
    /// The maximum and the sum of each row stand where its log-sum-exp would.
    TOTALS = 19,
    /// Rows stand in pages that a block table names.
    PAGED = 20,
    /// Columns are rotated by the position of their row before they are stored.
    ROTATE = 21,
    /// The columns of a pair that is rotated stand half a rotation apart; otherwise they are neighbours.
    HALVES = 22,
    /// The rows go on from what a dispatch before left in their state.
    CARRIED = 23,
    /// Each output column has a bias of its own.
    COLUMN_BIAS = 24,
    /// Every row sees one key beside those of attention.
    EXTRA_KEY = 25,
    /// The output is a part of the result, which `merge` completes.
    PARTIAL = 26,
    /// The positions of keys are listed.
    POSITIONS = 27,
}
