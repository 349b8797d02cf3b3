//! The weights that a layer gives out.

use crate::contract::error::Result;
use crate::contract::shape::Shape;
use crate::dispatch::part::Part;
use crate::dispatch::steps::{Steps, bound, checked_u32};
use crate::kernel::params::{At, Place, flags};
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, average};
use crate::ops::extra::{extra_weights, lse_at, lse_words};

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
        (0..self.attention.problem.batch).try_for_each(|batch| self.batch(batch, steps))
    }

    fn batch(&self, batch: u32, steps: &mut Steps<'_>) -> Result<()> {
        let (s, caps, threads) = (self.attention, steps.caps, average::Average.threads());
        let heads = if self.mean { 1 } else { s.problem.heads };
        let part = Part::new(batch..batch + 1, 0..heads, 0..s.problem.seq_q);
        let [h, rows, keys] = [s.problem.heads, s.problem.seq_q, s.problem.seq_kv].map(u64::from);
        let within = |of: u64| (u64::from(batch) * of, u64::from(batch + 1) * of);
        let (lse, _) = bound(caps, Slot::Lse, (0, lse_words(s, self.extra)), 4, 0, false)?;
        // A binding may not be empty: without a key the kernel reads none of the heads' weights.
        let (weights, w_base) = match keys {
            0 => (lse, 0),
            _ => bound(caps, Slot::Weights, within(h * rows * keys), 4, 0, false)?,
        };
        let per_batch = u64::from(heads) * rows * u64::from(self.columns);
        let (out, y_base) = bound(caps, Slot::Averaged, within(per_batch), 4, 0, true)?;
        let col_tiles = self.columns.div_ceil(threads);
        let uniform = Uniform::new(&average::Params {
            place: Place { row_tiles: s.problem.seq_q, col_tiles, ..part.place() },
            w: At { base: w_base, batch: (h * rows * keys) as u32, head: (rows * keys) as u32, row: s.problem.seq_kv },
            y: At {
                base: y_base,
                batch: per_batch as u32,
                head: (rows * u64::from(self.columns)) as u32,
                row: self.columns,
            },
            lse: lse_at(s),
            extra_weights: extra_weights(s),
            mean_heads: if self.mean { s.problem.heads } else { 1 },
            factor: if self.mean { 1.0 / s.problem.heads as f32 } else { 1.0 },
            keys: s.problem.seq_kv,
            columns: self.columns,
            flags: if self.extra { flags::EXTRA_KEY } else { 0 },
        });
        let workgroups = checked_u32("workgroups", rows * u64::from(col_tiles) * u64::from(heads))?;
        let flops = 32.0 * (h * rows) as f64 * f64::from(self.columns);
        steps.push(&part, Variant::Average(average::Average), uniform, vec![weights, lse, out], workgroups, flops)
    }
}
