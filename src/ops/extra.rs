//! One more key that every row of a layer sees.

use crate::error::Result;
use crate::kernel::params::Params;
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, extra};
use crate::part::Part;
use crate::shape::Shape;
use crate::steps::{Steps, bound, checked_u32};

/// Joins a key and its value to the result of attention.
pub(crate) struct Extra<'a> {
    pub(crate) attention: &'a Shape,
    /// Place of the key in the buffer of biases.
    pub(crate) key: u64,
    /// Place of its value.
    pub(crate) value: u64,
    /// Elements of that buffer.
    pub(crate) biases: u64,
}

/// Words of the log-sum-exps, one for each row. The weights of an extra key follow them.
pub(crate) fn lse_words(attention: &Shape, extra: bool) -> u64 {
    let rows = u64::from(attention.batch) * u64::from(attention.heads) * u64::from(attention.seq_q);
    if extra { 2 * rows } else { rows }
}

/// What the uniform says of the log-sum-exps.
pub(crate) fn lse_params(attention: &Shape) -> Params {
    let (heads, rows) = (attention.heads, attention.seq_q);
    Params {
        lse_batch: heads * rows,
        lse_head: rows,
        total_q: attention.batch * heads * rows,
        row_end: rows,
        ..Params::default()
    }
}

impl Extra<'_> {
    /// Adds the dispatches to the steps, one for each batch.
    pub(crate) fn dispatches(&self, steps: &mut Steps<'_>) -> Result<()> {
        let rows = if self.attention.seq_q > 0 { self.attention.batch } else { 0 };
        (0..rows).try_for_each(|batch| self.batch(batch, steps))
    }

    fn batch(&self, batch: u32, steps: &mut Steps<'_>) -> Result<()> {
        let (s, caps, threads) = (self.attention, steps.caps, extra::Extra.threads());
        let part = Part::new(batch..batch + 1, 0..s.heads, 0..s.seq_q);
        let (q, q_base) = bound(caps, Slot::Q, part.span(&s.q), 4, s.q.strides.offset, false)?;
        let (out, out_base) = bound(caps, Slot::Out, part.span(&s.out), 4, s.out.strides.offset, true)?;
        let (lse, _) = bound(caps, Slot::Lse, (0, lse_words(s, true)), 4, 0, true)?;
        let (biases, first) = bound(caps, Slot::Shifts, (0, self.biases), 4, 0, false)?;
        let params = Params {
            row_tiles: s.seq_q.div_ceil(threads),
            col_tiles: 1,
            batch0: batch,
            heads: s.heads,
            group: s.group,
            head_dim: s.head_dim,
            value_dim: s.value_dim,
            scale: s.scale,
            q_base,
            q_batch: s.q.strides.batch as u32,
            q_head: s.q.strides.head as u32,
            q_row: s.q.strides.row as u32,
            out_base,
            out_batch: s.out.strides.batch as u32,
            out_head: s.out.strides.head as u32,
            out_row: s.out.strides.row as u32,
            k_base: (self.key as u32).wrapping_add(first),
            v_base: (self.value as u32).wrapping_add(first),
            ..lse_params(s)
        };
        let workgroups = checked_u32("workgroups", u64::from(params.row_tiles) * u64::from(s.heads))?;
        let flops = 4.0 * f64::from(s.heads) * f64::from(s.seq_q) * f64::from(s.head_dim + s.value_dim);
        steps.push(Variant::Extra(extra::Extra), params, vec![q, biases, lse, out], workgroups, flops)
    }
}
