//! Attention on the CPU as the textbook writes it: what every kernel of this crate is checked against.
//!
//! One function per stage ([`scores`], [`logits`], [`softmax`], [`values`], [`merge`]), [`attention`] for all of them at
//! once, and [`budget`] for the error that f32 arithmetic may make on a given problem. [`compare()`] judges all outputs of a call with both,
//! [`compare_layer`], [`compare_merge`] and [`compare_append`] those of the operations. The rules are those of [`Problem`]. With the GPU
//! path the reference shares the descriptions of what is asked and their checks ([`Problem`], [`Shape`], [`Layer`](crate::multihead::Layer),
//! [`Append`](crate::operations::Append), [`Advance`](crate::operations::Advance), [`Merge`](crate::operations::Merge) and the like), and no arithmetic. Generic over [`Real`]: the f64 instance is the truth, the f32
//! instance shows what plain f32 loses.
//!
//! Below, the *score matrix* is dense [batch, heads, seq_q, seq_kv]. Where packed sequences leave parts of it unused, scores
//! and logits hold −inf and weights 0; query tokens that no sequence owns have 0 in `out` and `lse`.

mod advance;
mod append;
mod average;
mod budget;
mod compare;
mod comparison;
mod extra;
mod layer;
mod logits;
mod merge;
mod project;
mod query;
mod rotary;
mod scores;
mod softmax;
mod values;

use std::fmt::Debug;
use std::iter::Sum;

use num_traits::Float;

pub use advance::advance;
pub use append::append;
pub use average::average;
pub use budget::{Budget, Tolerance, attention_with_budget, attention_with_budget_of_rows, budget, regression_limit};
pub use compare::{compare, compare_append, compare_layer, compare_merge};
pub use comparison::{Comparison, Comparisons, OutputComparison, Worst};
pub use extra::extra;
pub use layer::layer;
pub use logits::logits;
pub use merge::{Partial, merge};
pub use project::project;
pub use rotary::rotary;
pub use scores::scores;
pub use softmax::softmax;
pub use values::values;

use crate::contract::error::{Error, Result};
use crate::contract::problem::{Inputs, Logits, Outputs, Problem};
use crate::contract::shape::Shape;
use query::{Row, Sequence};
use values::Values;

/// The arithmetic of the reference: f64 for the truth, f32 to see what plain f32 loses.
pub trait Real: Float + Sum + Debug + Default + Send + Sync + 'static {
    /// `x` rounded to this type.
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
}

/// Softmax attention, all stages, row by row: memory is that of the inputs and of what `problem` asks for.
///
/// `out` stands in the problem's layout; `lse`, `weights` and `logits` are present if asked for. (Vaswani et al. 2017,
/// eq. 1, with the terms of [`Problem`].)
///
/// # Errors
///
/// Whatever [`Problem::check`] and [`Shape::check_inputs`] find, and [`Error::OutOfMemory`] for results beyond the host's memory.
///
/// ```
/// use wgpu_attention::{Inputs, Problem, reference};
///
/// let (q, k, v) = ([1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]);
/// let inputs = Inputs::new(&q, &k, &v);
/// let out = reference::attention::<f64>(&Problem::new(1, 1, 1, 2, 2), &inputs)?.out;
///
/// let first = 1.0 / (1.0 + (-1.0 / 2f64.sqrt()).exp()); // softmax of (1/√2, 0)
/// assert!((out[0] - (3.0 - 2.0 * first)).abs() < 1e-7);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
pub fn attention<T: Real>(problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs<T>> {
    let shape = problem.check()?;
    shape.check_inputs(inputs)?;
    room::<T>(&shape)?;
    let rows = query::map(&shape, inputs, Head::load, |row, head| evaluate(row, head).keep(&shape));
    Ok(collect(&shape, rows))
}

/// How many pairs of a query row and a key that it sees a problem has, over all heads: what the work of attention is counted by. It looks
/// at every pair, so that masks, lengths and positions count as they are; [`Shape::visible_pairs`] is faster and knows only the problem.
///
/// # Errors
///
/// Whatever [`Problem::check`] and [`Shape::check_inputs`] find.
pub fn visible_pairs(problem: &Problem, inputs: &Inputs<'_>) -> Result<u64> {
    let shape = problem.check()?;
    shape.check_inputs(inputs)?;
    let seen = |row: &Row<'_>, _: &()| (0..row.keys()).filter(|&j| row.visible(j)).count() as u64;
    Ok(query::map(&shape, inputs, |_, _| (), seen).into_iter().map(|(_, pairs)| pairs).sum())
}

/// Refuses results that the host has no memory for, before it works on them for hours.
fn room<T>(shape: &Shape) -> Result<()> {
    let matrices = u64::from(shape.problem.weights) + u64::from(shape.problem.logits.is_some());
    let results = shape.out().extent() + shape.lse_len() + matrices * shape.scores_len();
    let asked = usize::try_from(results).map(|results| Vec::<T>::new().try_reserve_exact(results));
    match asked {
        Ok(Ok(())) => Ok(()),
        _ => Err(Error::OutOfMemory(format!("{results} results of {} bytes on the host", size_of::<T>()))),
    }
}

/// Keys and values of one key/value head of one sequence.
struct Head<T> {
    /// [keys, head_dim].
    keys: Vec<T>,
    values: Values<T>,
}

impl<T: Real> Head<T> {
    fn load(sequence: &Sequence<'_>, kv_head: usize) -> Self {
        Head { keys: sequence.keys(kv_head), values: Values::load(sequence, kv_head) }
    }
}

/// Everything about one query row.
struct Evaluated<T> {
    /// The logits that the problem asks for.
    asked: Vec<T>,
    /// The logits that enter the softmax, −inf where hidden.
    logits: Vec<T>,
    weights: Vec<T>,
    lse: T,
    out: Vec<T>,
}

fn evaluate<T: Real>(row: &Row<'_>, head: &Head<T>) -> Evaluated<T> {
    let mut x = scores::row(row, &head.keys);
    let asked = row.shape.problem.logits.map_or_else(Vec::new, |upto| {
        let mut asked = x.clone();
        logits::row(row, &mut asked, upto);
        asked
    });
    logits::row(row, &mut x, Logits::Masked);
    let (weights, lse) = softmax::row(&x, |j| row.visible(j), row.sink());
    let out = values::row(row, &weights, &head.values);
    Evaluated { asked, logits: x, weights, lse, out }
}

impl<T> Evaluated<T> {
    /// Drops what does not leave, so that memory stays that of the outputs.
    fn keep(mut self, shape: &Shape) -> Self {
        self.logits = Vec::new();
        if !shape.problem.weights {
            self.weights = Vec::new();
        }
        self
    }
}

/// Puts the rows in their places.
fn collect<T: Real>(shape: &Shape, rows: Vec<(Row<'_>, Evaluated<T>)>) -> Outputs<T> {
    let mut out = vec![T::zero(); shape.out().extent() as usize];
    let mut lse = vec![T::zero(); if shape.problem.lse { shape.lse_len() as usize } else { 0 }];
    let matrix = |wanted: bool, fill: T| vec![fill; if wanted { shape.scores_len() as usize } else { 0 }];
    let mut weights = matrix(shape.problem.weights, T::zero());
    let mut logits = matrix(shape.problem.logits.is_some(), T::neg_infinity());
    for (row, of) in rows {
        out[row.out()..][..of.out.len()].copy_from_slice(&of.out);
        if shape.problem.lse {
            lse[row.place()] = of.lse;
        }
        if shape.problem.weights {
            weights[row.matrix()..][..of.weights.len()].copy_from_slice(&of.weights);
        }
        if shape.problem.logits.is_some() {
            logits[row.matrix()..][..of.asked.len()].copy_from_slice(&of.asked);
        }
    }
    Outputs {
        out,
        lse: shape.problem.lse.then_some(lse),
        weights: shape.problem.weights.then_some(weights),
        logits: shape.problem.logits.map(|_| logits),
    }
}
