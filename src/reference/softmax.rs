//! Softmax over the visible keys, and its normaliser.

use super::Real;
use super::rows::{self, Row};
use crate::Shape;
use crate::problem::Inputs;

/// `weights[j] = exp(x[j] − lse)` with `lse = ln(Σ_j exp(x[j]) + exp(sink))`, over keys whose logit is not −inf.
///
/// `logits` and weights are dense [batch, heads, seq_q, seq_kv], lse is [batch, heads, seq_q] or, packed, [heads, total_q].
/// A row without visible keys has weights 0 and lse −inf, or the sink.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`] or `logits` has another length.
pub fn softmax<T: Real>(shape: &Shape, inputs: &Inputs<'_>, logits: &[T]) -> (Vec<T>, Vec<T>) {
    assert_eq!(logits.len() as u64, shape.scores_len(), "length of logits");
    let one = |row: &Row<'_>, (): &()| self::row(&logits[row.matrix()..][..row.keys()], row.sink());
    let mut lse = vec![T::zero(); shape.lse_len() as usize];
    let weights = rows::map(shape, inputs, |_, _| (), one).into_iter().map(|(row, (weights, sum))| {
        lse[row.place()] = sum;
        (row, weights)
    });
    let weights = rows::matrix(shape, weights.collect(), T::zero());
    (weights, lse)
}

/// Weights and lse of one row. The largest logit is subtracted first, so that nothing overflows (Milakov and Gimelshein 2018, alg. 2).
pub(super) fn row<T: Real>(logits: &[T], sink: Option<T>) -> (Vec<T>, T) {
    let hidden = T::neg_infinity();
    let Some(max) = logits.iter().copied().filter(|&x| x != hidden).chain(sink).reduce(T::max) else {
        return (vec![T::zero(); logits.len()], hidden);
    };
    let exp = |x: T| if x == hidden { T::zero() } else { (x - max).exp() };
    let mut weights: Vec<T> = logits.iter().map(|&x| exp(x)).collect();
    let sum = weights.iter().copied().chain(sink.map(exp)).sum::<T>();
    // A NaN logit makes the sum NaN; hidden keys keep their 0 all the same.
    weights.iter_mut().zip(logits).filter(|&(_, &x)| x != hidden).for_each(|(w, _)| *w = *w / sum);
    (weights, max + sum.ln())
}
