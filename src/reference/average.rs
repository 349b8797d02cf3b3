//! The weights that the layer gives out.

use super::Real;

/// Mean over `heads` of [heads, elements].
pub fn average<T: Real>(weights: &[T], heads: usize) -> Vec<T> {
    let elements = weights.len() / heads;
    let mean = |i: usize| (0..heads).map(|h| weights[h * elements + i]).sum::<T>() / T::of(heads as f64);
    (0..elements).map(mean).collect()
}
