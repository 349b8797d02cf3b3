//! Soft cap, ALiBi, bias, visibility.

use super::Real;
use super::query::{self, Row};
use crate::contract::problem::{Inputs, Logits};
use crate::contract::shape::Shape;

/// From scores to logits, in order and as far as `upto` says:
///
/// - [`Logits::Raw`]: the scores themselves.
/// - [`Logits::Capped`]: `softcap · tanh(s / softcap)` if there is a soft cap.
/// - [`Logits::Masked`]: `− slope[h] · |p − j| + bias[b,h,i,j]`, and −inf where the row does not see the key.
///
/// Both matrices are dense [batch, heads, seq_q, seq_kv]. A finite sum that overflows f32 on the way is clamped to its largest finite
/// value and stays visible; only a bias of exactly −inf hides. A NaN or an infinity follows IEEE arithmetic, so that a soft cap makes
/// `± softcap` of an infinite score.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`] or `scores` has another length.
pub fn logits<T: Real>(shape: &Shape, inputs: &Inputs<'_>, scores: &[T], upto: Logits) -> Vec<T> {
    assert_eq!(scores.len() as u64, shape.scores_len(), "length of scores");
    let one = |row: &Row<'_>, (): &()| {
        let mut x = scores[row.matrix()..][..row.keys()].to_vec();
        self::row(row, &mut x, upto);
        x
    };
    query::matrix(shape, query::map(shape, inputs, |_, _| (), one), T::neg_infinity())
}

/// The logits of one row, in place.
pub(super) fn row<T: Real>(row: &Row<'_>, x: &mut [T], upto: Logits) {
    if upto == Logits::Raw {
        return;
    }
    if let Some(cap) = row.shape.problem.softcap {
        let cap = T::of(cap.into());
        x.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
    }
    if upto == Logits::Capped {
        return;
    }
    for (j, x) in x.iter_mut().enumerate() {
        *x = match row.visible(j) {
            true => sum(sum(*x, -T::of(row.alibi(j))), T::of(row.bias(j))),
            false => T::neg_infinity(),
        };
    }
}

/// `a + b`, clamped to the finite range of f32 unless one of them is NaN or an infinity.
fn sum<T: Real>(a: T, b: T) -> T {
    if a.is_finite() && b.is_finite() { finite(a + b) } else { a + b }
}

/// Clamps to the finite range of f32. NaN stays NaN.
pub(super) fn finite<T: Real>(x: T) -> T {
    let largest = T::of(f32::MAX.into());
    num_traits::clamp(x, -largest, largest)
}
