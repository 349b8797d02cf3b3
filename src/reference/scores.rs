//! scale · q·k.

use super::query::{self, Row};
use super::{Real, logits};
use crate::contract::problem::Inputs;
use crate::contract::shape::Shape;

/// The score matrix `s[b,h,i,j] = scale · Σ_d q[b,h,i,d] · k[b, h / (heads / kv_heads), j, d]`, of hidden keys too.
///
/// Dense [batch, heads, seq_q, seq_kv]. A finite sum beyond f32 is clamped to its finite range; a NaN or an infinity in `q` or `k`
/// gives what IEEE arithmetic makes of it.
///
/// # Panics
///
/// If `inputs` do not pass [`Shape::check_inputs`].
pub fn scores<T: Real>(shape: &Shape, inputs: &Inputs<'_>) -> Vec<T> {
    let rows =
        query::map(shape, inputs, |sequence, head| sequence.keys(head), |row, keys: &Vec<T>| self::row(row, keys));
    query::matrix(shape, rows, T::neg_infinity())
}

/// The scores of one row against `keys` [keys, head_dim].
pub(super) fn row<T: Real>(row: &Row<'_>, keys: &[T]) -> Vec<T> {
    let (q, scale) = (row.query(), T::of(row.shape.scale().into()));
    let score = |k: &[T]| {
        let s = scale * dot(&q, k);
        // An f32 instance may overflow: only what the inputs hold is NaN or an infinity.
        if s.is_finite() || q.iter().chain(k).all(|x| x.is_finite()) { logits::finite(s) } else { s }
    };
    keys.chunks_exact(q.len()).map(score).collect()
}

/// Σ a·b in eight partial sums, so that the compiler can use vectors.
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 8];
    let (a, b) = (a.chunks_exact(sums.len()), b.chunks_exact(sums.len()));
    let rest = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| a * b).sum::<T>();
    for (a, b) in a.zip(b) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = *sum + a * b;
        }
    }
    rest + sums.into_iter().sum()
}
