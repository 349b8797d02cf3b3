//! x w + b.

use super::Real;
use crate::contract::error::Result;
use crate::contract::problem::Elements;
use crate::ops::project::{Order, Projection};

/// `y[b,r,c] = Σ_i x[b,r,i] · w[i,c] + bias[c]`, dense [batch, rows, outputs], and beside each element the error that f32
/// arithmetic may make: with `n` inputs and unit roundoff `u = 2⁻²⁴`, at most about `(8 + √n) u Σ_i |x_i w_i|` for the sum
/// (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 4: errors of roundings grow like √n), `2u |y|` for
/// adding the bias and storing, and 2⁻¹²⁶ for each product that may be flushed to 0.
///
/// The first bias is at the projection's place for it in `biases`, like the first weight at its offset in `weight`. The weights may be
/// of any type.
///
/// # Errors
///
/// Whatever is wrong with the description, and [`crate::Error::Length`] if a slice has not the length that it says.
pub fn project<T: Real>(
    projection: &Projection,
    x: &[f32],
    weight: Elements<'_>,
    biases: Option<&[f32]>,
) -> Result<(Vec<T>, Vec<f64>)> {
    projection.check_lengths(x.len(), weight.len(), biases.map(<[f32]>::len))?;
    let p = projection;
    let [batch, rows, inputs, outputs] = [p.batch, p.rows, p.inputs, p.outputs].map(|n| n as usize);
    let mut y = Vec::with_capacity(batch * rows * outputs);
    let mut bounds = Vec::with_capacity(y.capacity());
    for b in 0..batch {
        for r in 0..rows {
            let start = (p.x.offset + b as u64 * p.x.batch + r as u64 * p.x.row) as usize;
            for c in 0..outputs {
                let w = |i: usize| {
                    let (major, minor) = match p.order {
                        Order::InOut => (i, c),
                        Order::OutIn => (c, i),
                    };
                    weight.get(p.weight_offset as usize + major * p.weight_row as usize + minor)
                };
                let terms = || (0..inputs).map(|i| (T::of(x[start + i].into()), T::of(w(i))));
                let shift = p.bias.zip(biases).map_or(T::zero(), |(at, biases)| T::of(biases[at as usize + c].into()));
                let sum = terms().map(|(x, w)| x * w).sum::<T>() + shift;
                let size = terms().map(|(x, w)| (x * w).abs().to_f64().unwrap_or(f64::INFINITY)).sum::<f64>();
                let whole = sum.abs().to_f64().unwrap_or(f64::INFINITY);
                let u = f64::from(f32::EPSILON) / 2.0;
                bounds.push(
                    (8.0 + (inputs as f64).sqrt()) * u * size
                        + 2.0 * u * whole
                        + inputs as f64 * f64::from(f32::MIN_POSITIVE),
                );
                y.push(sum);
            }
        }
    }
    Ok((y, bounds))
}
