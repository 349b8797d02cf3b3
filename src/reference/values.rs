//! weights × v.

use super::Real;
use super::query::{self, Row, Sequence};
use crate::contract::problem::Inputs;
use crate::contract::shape::Shape;

/// `out[b,h,i,:] = Σ_j weights[b,h,i,j] · v[b, h / (heads / kv_heads), j, :]` over the visible keys, in the layout of `out`.
///
/// What stands at hidden keys is not looked at. A NaN or an infinity at a visible key shows in its own element of `out`, as IEEE
/// arithmetic has it. Places that no row owns hold 0.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`] or `weights` (dense [batch, heads, seq_q, seq_kv]) has another length.
pub fn values<T: Real>(shape: &Shape, inputs: &Inputs<'_>, weights: &[T]) -> Vec<T> {
    assert_eq!(weights.len() as u64, shape.scores_len(), "length of weights");
    let one = |row: &Row<'_>, values: &Values<T>| self::row(row, &weights[row.matrix()..][..row.keys()], values);
    let mut out = vec![T::zero(); shape.out().extent() as usize];
    for (row, x) in query::map(shape, inputs, Values::load, one) {
        out[row.out()..][..x.len()].copy_from_slice(&x);
    }
    out
}

/// Values of one head of one sequence.
pub(super) struct Values<T> {
    /// [keys, value_dim].
    pub dense: Vec<T>,
    /// Largest magnitude of the finite values at each key.
    pub peak: Vec<T>,
}

impl<T: Real> Values<T> {
    pub fn load(sequence: &Sequence<'_>, kv_head: usize) -> Self {
        let dense: Vec<T> = sequence.values(kv_head);
        let peak = |v: &[T]| v.iter().filter(|x| x.is_finite()).fold(T::zero(), |peak, x| peak.max(x.abs()));
        let peak = dense.chunks_exact(sequence.shape.problem.value_dim as usize).map(peak).collect();
        Values { dense, peak }
    }
}

/// The output of one row.
pub(super) fn row<T: Real>(row: &Row<'_>, weights: &[T], values: &Values<T>) -> Vec<T> {
    let dim = row.shape.problem.value_dim as usize;
    let mut out = vec![T::zero(); dim];
    for (j, (&weight, v)) in weights.iter().zip(values.dense.chunks_exact(dim)).enumerate() {
        if !row.visible(j) {
            continue;
        }
        out.iter_mut().zip(v).for_each(|(out, &v)| *out = *out + weight * v);
    }
    out
}
