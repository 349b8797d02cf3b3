//! One more key that every row sees.

use super::Real;

/// Joins a key with dot product `score` (scaled) and the given value to a finished row of attention with log-sum-exp `lse`
/// (−inf where it saw no key), in place, and gives that key's weight: `w = exp(s) / (exp(lse) + exp(s))`,
/// `out = (1 − w) out + w value`. Where either score is +∞ both weights are NaN.
pub fn extra<T: Real>(score: T, lse: T, value: &[T], out: &mut [T]) -> T {
    let infinite = score == T::infinity() || lse == T::infinity();
    let w = if infinite { T::nan() } else { T::one() / (T::one() + (lse - score).exp()) };
    for (out, &value) in out.iter_mut().zip(value) {
        *out = (T::one() - w) * *out + w * value;
    }
    w
}
