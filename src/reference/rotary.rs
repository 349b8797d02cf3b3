//! Rotary position embedding.

use super::Real;
use crate::contract::error::Result;
use crate::contract::problem::{Element, Elements, Strides};
use crate::ops::rotary::{Positions, Rotation};

/// The rotated tensor, dense [batch, heads, rows, head_dim], and beside each element the error that f32 arithmetic and one
/// rounding to the element type may make: two products and a sum of unit roundoff `u = 2⁻²⁴` are off by at most
/// `3u (|cos · a| + |sin · b|)`, the rounding by `u16 |y|` (f16: at least 2⁻²⁵), and WGSL may flush what is below 2⁻¹²⁶.
///
/// (Su et al., "RoFormer", 2021, eq. 34.)
///
/// The elements of `x` may be of any type.
///
/// # Errors
///
/// Whatever is wrong with the description, and [`crate::Error::Length`] if a slice has not the length that it says.
pub fn rotary<T: Real>(
    rotation: &Rotation,
    x: Elements<'_>,
    table: &[f32],
    positions: &[u32],
) -> Result<(Vec<T>, Vec<f64>)> {
    rotation.check_lengths(x.len(), table.len(), positions.len())?;
    let r = rotation;
    let [batch, heads, rows, dim, rotary_dim] =
        [r.batch, r.heads, r.rows, r.head_dim, r.rotary_dim].map(|n| n as usize);
    let half = rotary_dim / 2;
    let Strides { offset, batch: by_batch, head: by_head, row: by_row } = r.x;
    let (mut y, mut bounds) = (Vec::new(), Vec::new());
    let (rounding, smallest) = match r.element {
        Element::F32 => (0.0, 0.0),
        Element::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        Element::Bf16 => (2f64.powi(-8), 0.0),
    };
    for (b, h, row) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..rows).map(move |row| (b, h, row)))) {
        let at = (offset + b as u64 * by_batch + h as u64 * by_head + row as u64 * by_row) as usize;
        let position = match r.positions {
            Positions::Rows => positions[b * rows + row] as usize,
            Positions::Starts => positions[b] as usize + row,
        };
        let angles = &table[position.min(r.table_rows as usize - 1) * rotary_dim..][..rotary_dim];
        for d in 0..dim {
            if d >= rotary_dim {
                y.push(T::of(x.get(at + d)));
                bounds.push(0.0);
                continue;
            }
            let (pair, second) = if r.interleaved { (d / 2, d % 2 == 1) } else { (d % half, d >= half) };
            let (first, other) = if r.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
            let (a, b) = (T::of(x.get(at + first)), T::of(x.get(at + other)));
            let (cos, sin) = (T::of(angles[pair].into()), T::of(angles[half + pair].into()));
            let (one, two) = if second { (sin * a, cos * b) } else { (cos * a, -sin * b) };
            let size = (one.abs() + two.abs()).to_f64().unwrap_or(f64::INFINITY);
            let whole = (one + two).abs().to_f64().unwrap_or(f64::INFINITY);
            let u = f64::from(f32::EPSILON) / 2.0;
            bounds.push(3.0 * u * size + (1.01 * rounding * whole).max(smallest) + 3.0 * f64::from(f32::MIN_POSITIVE));
            y.push(one + two);
        }
    }
    Ok((y, bounds))
}
