//! One result from several, each over a part of the keys.

use rayon::prelude::*;

use super::Real;
use super::budget::{FLUSH, U, element_rounding, exp_error, growth};
use crate::contract::error::{Error, Result};
use crate::contract::problem::Element;
use crate::ops::merge::Merge;

/// Attention of some rows over a part of their keys, without sinks.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a, T> {
    /// Output rows, dense [rows, dim].
    pub out: &'a [T],
    /// Log-sum-exp, one a row; −inf where the part holds no visible key.
    pub lse: &'a [T],
}

/// Merges partial results exactly: `lse = ln(Σ_n exp(lse_n) + exp(sink))`, `out = Σ_n exp(lse_n − lse) · out_n`.
///
/// `sinks` holds one logit per row, which joins the denominator once. Gives `(out, lse)`, shaped like a part; a row that no part
/// sees has out 0 and lse −inf, or the sink. (Rabe and Staats 2021.)
///
/// # Errors
///
/// [`Error::Zero`] without a part or with `dim` 0, [`Error::Length`] if slices do not fit together.
pub fn merge<T: Real>(dim: usize, partials: &[Partial<'_, T>], sinks: Option<&[T]>) -> Result<(Vec<T>, Vec<T>)> {
    if dim == 0 {
        return Err(Error::Zero { field: "dim" });
    }
    let rows = partials.first().ok_or(Error::Zero { field: "partials" })?.lse.len();
    let outs = partials.iter().map(|part| ("partial.out", part.out.len(), rows * dim));
    let lses = partials.iter().map(|part| ("partial.lse", part.lse.len(), rows));
    let sink_rows = sinks.map(|sinks| ("sinks", sinks.len(), rows));
    if let Some((field, got, want)) = outs.chain(lses).chain(sink_rows).find(|&(_, got, want)| got != want) {
        return Err(Error::Length { field, got, want });
    }
    let (mut out, mut lse) = (vec![T::zero(); rows * dim], vec![T::neg_infinity(); rows]);
    out.par_chunks_exact_mut(dim).zip(&mut lse).enumerate().for_each(|(row, (out, lse))| {
        // The softmax of the parts, each standing for its keys.
        let parts: Vec<T> = partials.iter().map(|part| part.lse[row]).collect();
        let some = |n: usize| parts[n] != T::neg_infinity();
        let (weights, sum) = super::softmax::row(&parts, some, sinks.map(|sinks| sinks[row]));
        *lse = sum;
        for ((part, weight), part_lse) in partials.iter().zip(weights).zip(parts) {
            if part_lse != T::neg_infinity() {
                let part = &part.out[row * dim..][..dim];
                out.iter_mut().zip(part).for_each(|(out, &x)| *out = *out + weight * x);
            }
        }
    });
    Ok((out, lse))
}

/// A merge in f64, dense [rows, dim] and [rows], with the error budget of each element that [`super::compare_merge`] states.
pub(super) struct Merged {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
    pub out_budget: Vec<f64>,
    pub lse_budget: Vec<f64>,
}

/// Merges operands whose lengths were checked.
pub(super) fn merge_with_budget(
    merge: &Merge,
    partial_out: &[f32],
    partial_lse: &[f32],
    sinks: Option<&[f32]>,
) -> Result<Merged> {
    let (dim, rows) = (merge.value_dim as usize, merge.total_rows() as usize);
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let (outs, lses) = (wide(partial_out), wide(partial_lse));
    // Without a partial the result is that of an empty one.
    let none = (vec![0.0; rows * dim], vec![f64::NEG_INFINITY; rows]);
    let (outs, lses) = if merge.partials == 0 { (&none.0, &none.1) } else { (&outs, &lses) };
    let partials: Vec<Partial<'_, f64>> = (0..merge.partials.max(1) as usize)
        .map(|n| Partial { out: &outs[n * rows * dim..][..rows * dim], lse: &lses[n * rows..][..rows] })
        .collect();
    let head = |row: usize| row / merge.seq_q as usize % merge.heads as usize;
    let sinks: Option<Vec<f64>> = sinks.map(|sinks| (0..rows).map(|row| sinks[head(row)].into()).collect());
    let (out, lse) = self::merge(dim, &partials, sinks.as_deref())?;
    let mut budget = (Vec::with_capacity(out.len()), Vec::with_capacity(rows));
    for row in 0..rows {
        let parts: Vec<(f64, &[f64])> = (partials.iter().map(|part| (part.lse[row], &part.out[row * dim..][..dim])))
            .filter(|(lse, _)| *lse != f64::NEG_INFINITY)
            .collect();
        let sink = sinks.as_ref().map(|sinks| sinks[row]);
        budget.0.extend(out_budget(merge.element, &parts, sink, &out[row * dim..][..dim], lse[row]));
        let count = (parts.len() + usize::from(sink.is_some())) as f64;
        budget.1.push(U * (2.0 * lse[row].abs() + 16.0 + 2.0 * count.sqrt()));
    }
    Ok(Merged { out, lse, out_budget: budget.0, lse_budget: budget.1 })
}

/// The budget of each element of a merged row. `parts` holds lse and out of the partials that are not empty.
fn out_budget(element: Element, parts: &[(f64, &[f64])], sink: Option<f64>, out: &[f64], lse: f64) -> Vec<f64> {
    if parts.is_empty() {
        return vec![0.0; out.len()];
    }
    let max = parts.iter().map(|part| part.0).chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let growth = |x: f64| growth((x - lse).exp(), x - lse, exp_error(max - x));
    let growths: Vec<f64> = parts.iter().map(|part| growth(part.0)).collect();
    let sink_growth = sink.map(growth);
    let g = growths.iter().sum::<f64>() + sink_growth.unwrap_or(0.0);
    let count = (parts.len() + usize::from(sink.is_some())) as f64;
    let (u16, tiny) = element_rounding(element);
    let of = |(d, &o): (usize, &f64)| {
        let values = parts.iter().zip(&growths).map(|(part, &growth)| (part.1[d], growth));
        let terms = values.chain(sink_growth.map(|growth| (0.0, growth)));
        let (mut moved, mut reach, mut peak) = (0.0, 0.0f64, 0.0f64);
        for (value, growth) in terms {
            moved += growth * (value - o).abs();
            reach = reach.max((value - o).abs());
            peak = peak.max(value.abs());
        }
        let moved = if g < 1.0 { reach.min((1.0 + g) * moved) } else { reach };
        moved + (8.0 + count.sqrt()) * U * peak + count * FLUSH + tiny + (4.0 * U + 1.01 * u16) * o.abs()
    };
    out.iter().enumerate().map(of).collect()
}
