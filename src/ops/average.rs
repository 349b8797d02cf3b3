//! The weights that a layer gives out.

use crate::error::Result;
use crate::kernel::params::{Params, flags};
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, average};
use crate::ops::extra::{lse_params, lse_words};
use crate::shape::Shape;
use crate::steps::{Steps, bound, checked_u32};

/// Gives out the weights of attention, with those of the keys that the layer adds.
pub(crate) struct Average<'a> {
    pub(crate) attention: &'a Shape,
    /// Keys of attention, and those that the layer adds.
    pub(crate) columns: u32,
    /// The mean over the heads, instead of each head.
    pub(crate) mean: bool,
    /// Whether one of the added keys is that of [`crate::ops::extra`].
    pub(crate) extra: bool,
}

impl Average<'_> {
    /// Adds the dispatches to the steps, one for each batch.
    pub(crate) fn dispatches(&self, steps: &mut Steps<'_>) -> Result<()> {
        (0..self.attention.batch).try_for_each(|batch| self.batch(batch, steps))
    }

    fn batch(&self, batch: u32, steps: &mut Steps<'_>) -> Result<()> {
        let (s, caps, threads) = (self.attention, steps.caps, average::Average.threads());
        let heads = if self.mean { 1 } else { s.heads };
        let [h, rows, keys] = [s.heads, s.seq_q, s.seq_kv].map(u64::from);
        let within = |of: u64| (u64::from(batch) * of, u64::from(batch + 1) * of);
        let (lse, _) = bound(caps, Slot::Lse, (0, lse_words(s, self.extra)), 4, 0, false)?;
        // A binding may not be empty: without a key the kernel reads none of the heads' weights.
        let (weights, s_base) = match keys {
            0 => (lse, 0),
            _ => bound(caps, Slot::Weights, within(h * rows * keys), 4, 0, false)?,
        };
        let per_batch = u64::from(heads) * rows * u64::from(self.columns);
        let (out, out_base) = bound(caps, Slot::Averaged, within(per_batch), 4, 0, true)?;
        let params = Params {
            row_tiles: s.seq_q,
            col_tiles: self.columns.div_ceil(threads),
            batch0: batch,
            heads,
            in_end: if self.mean { s.heads } else { 1 },
            seq_kv: s.seq_kv,
            key_end: self.columns,
            scale: if self.mean { 1.0 / s.heads as f32 } else { 1.0 },
            flags: if self.extra { flags::BIAS } else { 0 },
            s_base,
            s_batch: (h * rows * keys) as u32,
            s_head: (rows * keys) as u32,
            s_row: s.seq_kv,
            out_base,
            out_batch: per_batch as u32,
            out_head: (rows * u64::from(self.columns)) as u32,
            out_row: self.columns,
            ..lse_params(s)
        };
        let workgroups = checked_u32("workgroups", rows * u64::from(params.col_tiles) * u64::from(heads))?;
        let flops = 32.0 * (h * rows) as f64 * f64::from(self.columns);
        steps.push(Variant::Average(average::Average), params, vec![weights, lse, out], workgroups, flops)
    }
}
