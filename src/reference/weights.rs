//! Weights from what is left of a softmax.

use super::Real;
use super::query::{self, Row};
use crate::problem::Inputs;
use crate::shape::Shape;

/// `weights[j] = exp(x[j] − m) / l` over keys whose logit is not −inf, `totals` holding for each row its maximum `m` and the sum
/// `l = Σ_j exp(x[j] − m) + exp(sink − m)`, in the order of `lse`. Where `l` is 0, all weights are 0.
///
/// `logits` and weights are dense [batch, heads, seq_q, seq_kv]. What [`super::softmax`] gives, without its sum over the keys.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`], or `logits` or `totals` has another length.
pub fn weights<T: Real>(shape: &Shape, inputs: &Inputs<'_>, logits: &[T], totals: &[[T; 2]]) -> Vec<T> {
    assert_eq!(logits.len() as u64, shape.scores_len(), "length of logits");
    assert_eq!(totals.len() as u64, shape.lse_len(), "length of totals");
    let one = |row: &Row<'_>, (): &()| {
        let [m, l] = totals[row.place()];
        let weight = |&x: &T| if x == T::neg_infinity() || l.is_zero() { T::zero() } else { (x - m).exp() / l };
        logits[row.matrix()..][..row.keys()].iter().map(weight).collect()
    };
    query::matrix(shape, query::map(shape, inputs, |_, _| (), one), T::zero())
}
