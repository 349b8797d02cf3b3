//! One more key that every row of a layer sees.

use crate::contract::error::Result;
use crate::contract::shape::Shape;
use crate::dispatch::part::Part;
use crate::dispatch::steps::{Steps, bound, checked_u32};
use crate::kernel::params::{At, LineAt, Place};
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, extra};

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
    let rows =
        u64::from(attention.problem.batch) * u64::from(attention.problem.heads) * u64::from(attention.problem.seq_q);
    if extra { 2 * rows } else { rows }
}

/// Where the log-sum-exps stand.
pub(crate) fn lse_at(attention: &Shape) -> LineAt {
    LineAt { base: 0, batch: attention.problem.heads * attention.problem.seq_q, head: attention.problem.seq_q }
}

/// From the log-sum-exp of a row to the weight of its extra key.
pub(crate) fn extra_weights(attention: &Shape) -> u32 {
    attention.problem.batch * attention.problem.heads * attention.problem.seq_q
}

impl Extra<'_> {
    /// Adds the dispatches to the steps, one for each batch.
    pub(crate) fn dispatches(&self, steps: &mut Steps<'_>) -> Result<()> {
        let rows = if self.attention.problem.seq_q > 0 { self.attention.problem.batch } else { 0 };
        (0..rows).try_for_each(|batch| self.batch(batch, steps))
    }

    fn batch(&self, batch: u32, steps: &mut Steps<'_>) -> Result<()> {
        let (s, caps, threads) = (self.attention, steps.caps, extra::Extra.threads());
        let part = Part::new(batch..batch + 1, 0..s.problem.heads, 0..s.problem.seq_q);
        let (q, q_base) = bound(caps, Slot::Q, part.span(&s.q), 4, s.q.strides.offset, false)?;
        let (out, out_base) = bound(caps, Slot::Out, part.span(&s.out), 4, s.out.strides.offset, true)?;
        let (lse, _) = bound(caps, Slot::Lse, (0, lse_words(s, true)), 4, 0, true)?;
        let (biases, first) = bound(caps, Slot::Biases, (0, self.biases), 4, 0, false)?;
        let row_tiles = s.problem.seq_q.div_ceil(threads);
        let uniform = Uniform::new(&extra::Params {
            place: Place { row_tiles, col_tiles: 1, ..part.place() },
            q: At::new(q_base, &s.q.strides),
            out: At::new(out_base, &s.out.strides),
            lse: lse_at(s),
            extra_weights: extra_weights(s),
            group: s.group,
            head_dim: s.problem.head_dim,
            value_dim: s.problem.value_dim,
            scale: s.scale,
            key_base: (self.key as u32).wrapping_add(first),
            value_base: (self.value as u32).wrapping_add(first),
        });
        let workgroups = checked_u32("workgroups", u64::from(row_tiles) * u64::from(s.problem.heads))?;
        let flops = 4.0
            * f64::from(s.problem.heads)
            * f64::from(s.problem.seq_q)
            * f64::from(s.problem.head_dim + s.problem.value_dim);
        steps.push(&part, Variant::Extra(extra::Extra), uniform, vec![q, biases, lse, out], workgroups, flops)
    }
}
