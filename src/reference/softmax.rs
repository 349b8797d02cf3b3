//! Softmax over the visible keys, and its normaliser.

use super::Real;
use super::query::{self, Row};
use crate::contract::problem::Inputs;
use crate::contract::shape::Shape;

/// `weights[j] = exp(x[j] − lse)` with `lse = ln(Σ_j exp(x[j]) + exp(sink))`, over the visible keys.
///
/// `logits` and weights are dense [batch, heads, seq_q, seq_kv], lse is [batch, heads, seq_q] or, packed, [heads, total_q].
/// A row without visible keys has weights 0 and lse −inf, or the sink. Visible keys have weights of NaN where one of the row's logits
/// is NaN or +∞, or where all of them are −∞; lse is then NaN, +∞ or −∞.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`] or `logits` has another length.
pub fn softmax<T: Real>(shape: &Shape, inputs: &Inputs<'_>, logits: &[T]) -> (Vec<T>, Vec<T>) {
    assert_eq!(logits.len() as u64, shape.scores_len(), "length of logits");
    let one = |row: &Row<'_>, (): &()| self::row(&logits[row.matrix()..][..row.keys()], |j| row.visible(j), row.sink());
    let mut lse = vec![T::zero(); shape.lse_len() as usize];
    let weights = query::map(shape, inputs, |_, _| (), one).into_iter().map(|(row, (weights, sum))| {
        lse[row.place()] = sum;
        (row, weights)
    });
    let weights = query::matrix(shape, weights.collect(), T::zero());
    (weights, lse)
}

/// Weights and lse of one row. The largest logit is subtracted first, so that nothing overflows (Milakov and Gimelshein 2018, alg. 2).
///
/// A finite logit has a weight above 0 in exact arithmetic, and so it has here: 0 is kept for hidden keys and for logits of −∞, with
/// which an infinite value gives NaN.
pub(super) fn row<T: Real>(logits: &[T], visible: impl Fn(usize) -> bool, sink: Option<T>) -> (Vec<T>, T) {
    let infinity = T::infinity();
    let sink = sink.filter(|&sink| sink != -infinity);
    let seen: Vec<bool> = (0..logits.len()).map(visible).collect();
    let entering = || logits.iter().zip(&seen).filter(|&(_, &seen)| seen).map(|(&x, _)| x).chain(sink);
    let all = |weight: T| seen.iter().map(|&seen| if seen { weight } else { T::zero() }).collect();
    let Some(max) = entering().reduce(T::max) else { return (all(T::zero()), -infinity) };
    if entering().any(|x| x.is_nan()) {
        return (all(T::nan()), T::nan());
    }
    if max.is_infinite() {
        return (all(T::nan()), max);
    }
    let sum = entering().map(|x| (x - max).exp()).sum::<T>();
    let weigh = |x: T| if x == -infinity { T::zero() } else { ((x - max).exp() / sum).max(T::min_positive_value()) };
    let weights = logits.iter().zip(&seen).map(|(&x, &seen)| if seen { weigh(x) } else { T::zero() }).collect();
    (weights, max + sum.ln())
}
