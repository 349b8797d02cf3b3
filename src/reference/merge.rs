//! One result from several, each over a part of the keys.

use rayon::prelude::*;

use super::Real;
use crate::error::{Error, Result};

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
