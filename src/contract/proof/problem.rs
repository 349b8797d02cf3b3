//! The problems of trials.

use super::{Case, Trial};
use crate::contract::problem::{Bias, Broadcast, Causal, Layout, Logits, Packed, Paged, Problem, Strides, Window};

pub(crate) const BATCH: u32 = 2;
pub(crate) const HEADS: u32 = 2;
/// More than the lanes of a CPU adapter, and odd.
pub(crate) const SEQ_Q: u32 = 33;
/// Several tiles of keys of every kernel, and a part of one.
pub(crate) const SEQ_KV: u32 = 130;

pub(crate) const PAGE_SIZE: u32 = 16;
/// A prime number, and more than the pages of all batches.
pub(crate) const PAGES: u32 = 19;

/// The keys of packed sequences; with operands the second one lacks the key that key lengths hide elsewhere.
pub(crate) fn total_keys(operands: bool) -> u32 {
    BATCH * SEQ_KV - u32::from(operands)
}

impl Trial {
    /// The problem of a trial, unless it is one of [`Case::Long`].
    pub(crate) fn problem(&self) -> Problem {
        // The last vector of four of the dims holds no value.
        let mut p = Problem::new(BATCH, HEADS, SEQ_Q, SEQ_KV, self.dims);
        (p.kv_heads, p.value_dim, p.element) = (1, self.dims - 4, self.element);
        p.causal = Causal::BottomRight;
        if self.operands {
            p.mask = Some(Broadcast([BATCH, 1, SEQ_Q, SEQ_KV]));
            p.bias = Some(Bias { shape: Broadcast([1, HEADS, SEQ_Q, SEQ_KV]), element: self.element });
            p.causal = Causal::Offset;
            p.window = Window { left: Some(100), right: None };
            p.softcap = Some(5.0);
            (p.key_lengths, p.alibi, p.sinks, p.lse) = (true, true, true, true);
        }
        match self.case {
            Case::Usual | Case::Long => {}
            Case::Several => {
                // Rows so far apart that all other bindings, also those of partial results, are no larger than those of the keys.
                let row = u64::from(32 * self.dims) / p.element.bytes();
                let apart = Layout::Strided(Strides { offset: 0, batch: u64::from(SEQ_KV) * row, head: 0, row });
                (p.k, p.v) = (apart, apart);
            }
            Case::Paged => p.paged = Some(Paged { pages: PAGES, page_size: PAGE_SIZE }),
            Case::Packed => {
                p.packed = Some(Packed { total_q: BATCH * SEQ_Q, total_kv: total_keys(self.operands) });
                p.key_lengths = false;
            }
            Case::Weights => p.weights = true,
            Case::Logits => p.logits = Some(Logits::Masked),
        }
        p
    }
}
