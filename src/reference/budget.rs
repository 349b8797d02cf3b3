//! How far an f32 kernel may be from the f64 reference on the very data at hand.

use std::ops::Range;

use super::query::{self, Row, Sequence};
use super::scores::dot;
use super::values::Values;
use super::{Evaluated, Head, collect, evaluate, logits};
use crate::contract::error::Result;
use crate::contract::options::Precision;
use crate::contract::problem::{Element, Inputs, Logits, Outputs, Problem};

/// Unit roundoff of f32.
pub(super) const U: f64 = 1.0 / (1u32 << 24) as f64;
/// Smallest normal f32: WGSL may flush what is smaller to 0 (WGSL, section "Floating Point Evaluation").
pub(super) const FLUSH: f64 = f32::MIN_POSITIVE as f64;

/// Error that a kernel with f32 arithmetic may make on one problem, from the problem's own data.
///
/// With unit roundoff `u = 2⁻²⁴`, row maximum `m`, logit `x_j`, weight `p_j`, output `o` and, over the visible keys, `vmax = max |v|`:
///
/// - The logit of key `j` sums terms of total magnitude `A_j = |scale| · Σ_d |q_d k_jd| + softcap + slope · |p − j| + |bias|` and is off by
///   `δ_j = 4 u A_j`. (Where the bias is so large that f32 returns it unchanged, `δ_j = |x_j − bias|` exactly.)
/// - WGSL allows exp `3 + 2|x|` ULP and subtraction and division a few more, so the unnormalised weight is off by the
///   factor `exp(±e_j)`, `e_j = δ_j + 2u (4 + 2 (m − x_j))`. A sink counts as one more key with `δ = 0` and value 0.
/// - With `g = Σ_j p_j (exp(e_j) − 1)`, the output is off by at most
///   `|Δo_d| ≤ (1 + g) Σ_j p_j (exp(e_j) − 1) |v_jd − o_d|` and a weight by `|Δp_j| ≤ p_j (exp(e_j) (1 + g) − 1)`: to first order
///   `Σ_j p_j e_j |v_jd − o_d|` and `p_j (e_j + Σ_k p_k e_k)`, but valid for large `e` too. Where f32 cannot tell which key is
///   largest (`g ≥ 1`), the output may be anywhere between the values: `|Δo_d| ≤ max_j |v_jd − o_d|`, `|Δp_j| ≤ 1`.
/// - A sum over keys adds `(8 + √seq_kv) u` of its largest term, and subnormals that are flushed take
///   2⁻¹²⁶ from each weight and from each product. (A weight of 0 may also come out as 2⁻¹²⁶: llvmpipe's exp of −∞ is that.)
/// - The output of a row with no visible key must be exactly 0.
/// - What is NaN or an infinity in the reference must be just that. Elements of `out` that are have no share in the bound of their row.
///
/// | tensor | absolute | relative |
/// |---|---|---|
/// | `out` | max over d of `\|Δo_d\|`, `+ (8 + √seq_kv) u vmax + seq_kv 2⁻¹²⁶ (1 + vmax)`, f16: `+ 2⁻²⁴` | `4u + 1.01 u16` |
/// | `lse` | `ln(1 + Σ_j p_j (exp(δ_j) − 1))`, or `max δ_j` if that is 1 or more, `+ u (2 \|lse\| + 16 + 2 √seq_kv)` | 0 |
/// | `weights` | `\|Δp_j\| + (8 + √seq_kv) u p_j + 2⁻¹²⁶`; hidden: 0 | `4u` |
/// | `logits` | `4u` times the terms of `A_j` that are in so far (masked: `δ_j`) `+ 2⁻¹²⁶`; hidden: 0 | `u` |
///
/// With [`Precision::Fast`], weights that are rounded to f16 add `2⁻¹¹ (1 + g) Σ_j p_j exp(e_j) |v_jd|` to `|Δo_d|`, the maximum over d
/// again, or `2⁻¹¹ vmax` if `g ≥ 1`: [`Budget::fast`].
///
/// `u16` is the unit roundoff of the element type: 2⁻¹¹ for f16, 2⁻⁸ for bf16, 0 for f32.
/// (Sums: Higham, "Accuracy and Stability of Numerical Algorithms", chapter 4; exp: WGSL, section "Floating Point Accuracy".)
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Budget {
    /// Of `out`: one bound per row, in the order of `lse`, whatever the layout. See [`Budget::compare_out`].
    pub out: Tolerance,
    /// Of `lse`, one bound each, whether the problem asks for it or not.
    pub lse: Tolerance,
    /// Of `weights`, one bound each; empty unless the problem asks for them.
    pub weights: Tolerance,
    /// Of `logits`, one bound each; empty unless the problem asks for them.
    pub logits: Tolerance,
    /// What [`Precision::Fast`] may add to each bound of `out`. It is empty unless the element type is f16: nothing is added to others.
    pub fast: Vec<f64>,
}

impl Budget {
    /// The budget of results that were computed with this precision, from that of [`Precision::Strict`], which all functions give.
    pub fn with_precision(mut self, precision: Precision) -> Budget {
        if precision == Precision::Fast {
            for (bound, more) in self.out.atol.iter_mut().zip(std::mem::take(&mut self.fast)) {
                *bound += more;
            }
        }
        self
    }
}

/// `|got − want| ≤ atol + rtol · |want|`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tolerance {
    /// Absolute part: one for each row or for each element of the tensor, in its order; or [`Tolerance::NOT_JUDGED`].
    pub atol: Vec<f64>,
    /// Relative part.
    pub rtol: f64,
}

impl Tolerance {
    /// Stands in place of the bound of what was not computed. A comparison passes over it.
    pub const NOT_JUDGED: f64 = f64::NEG_INFINITY;

    /// How far from `want` an element with this absolute part may be.
    pub(super) fn allowed(&self, at: usize, want: f64) -> f64 {
        match self.atol[at] {
            Self::NOT_JUDGED => Self::NOT_JUDGED,
            atol => atol + self.rtol * want.abs(),
        }
    }
}

/// The error budget of a problem. See [`Budget`] for the formulas.
///
/// # Errors
///
/// Those of [`attention`](super::attention).
pub fn budget(problem: &Problem, inputs: &Inputs<'_>) -> Result<Budget> {
    Ok(attention_with_budget(problem, inputs)?.1)
}

/// The f64 reference and the error budget of a problem in one pass, at two to three times the time of [`attention`](super::attention).
///
/// # Errors
///
/// Those of [`attention`](super::attention).
pub fn attention_with_budget(problem: &Problem, inputs: &Inputs<'_>) -> Result<(Outputs<f64>, Budget)> {
    attention_with_errors(problem, inputs, None, &|_| true)
}

/// The same for some query rows only: where all would take too long, a sample of them. A row is one of `rows` by its number within
/// its batch or sequence, in each head. Of other rows the outputs are as those of rows that nothing was written to, and their
/// bounds are [`Tolerance::NOT_JUDGED`].
///
/// # Errors
///
/// Those of [`attention`](super::attention).
pub fn attention_with_budget_of_rows(
    problem: &Problem,
    inputs: &Inputs<'_>,
    rows: &[Range<u32>],
) -> Result<(Outputs<f64>, Budget)> {
    attention_with_errors(problem, inputs, None, &|row| rows.iter().any(|range| range.contains(&row)))
}

/// The same where q, k and v may be off: `errors` holds, in their layouts and in f32, how far each of their elements may be.
/// The budget then covers what a kernel makes of any q, k and v that near.
pub(super) fn attention_with_errors(
    problem: &Problem,
    inputs: &Inputs<'_>,
    errors: Option<&Inputs<'_>>,
    wanted: &(dyn Fn(u32) -> bool + Sync),
) -> Result<(Outputs<f64>, Budget)> {
    let shape = problem.check()?;
    shape.check_inputs(inputs)?;
    super::room::<f64>(&shape)?;
    let load = |sequence: &Sequence<'_>, kv_head| {
        let head = Head::<f64>::load(sequence, kv_head);
        let (key_magnitudes, errors) =
            (magnitudes(&head.keys), errors.map(|errors| Head::load(&sequence.of(errors), kv_head)));
        Loaded { head, key_magnitudes, errors }
    };
    let rows = query::map_rows(&shape, inputs, wanted, load, |row, loaded| {
        let evaluated = evaluate(row, &loaded.head);
        let query_errors = errors.map(|errors| row.of(errors).query());
        (self::row(row, loaded, query_errors.as_deref(), &evaluated), evaluated.keep(&shape))
    });
    let per_row = || vec![0.0; shape.lse_len() as usize];
    let per_score = |wanted: bool| vec![0.0; if wanted { shape.scores_len() as usize } else { 0 }];
    let (u16, _) = element_rounding(shape.problem.element);
    let mut budget = Budget {
        out: Tolerance { atol: per_row(), rtol: 4.0 * U + 1.01 * u16 },
        lse: Tolerance { atol: per_row(), rtol: 0.0 },
        weights: Tolerance { atol: per_score(shape.problem.weights), rtol: 4.0 * U },
        logits: Tolerance { atol: per_score(shape.problem.logits.is_some()), rtol: U },
        fast: if shape.problem.element == Element::F16 { per_row() } else { Vec::new() },
    };
    for (row, ()) in query::map_rows(&shape, inputs, &|row| !wanted(row), |_, _| (), |_, _| ()) {
        budget.out.atol[row.place()] = Tolerance::NOT_JUDGED;
        budget.lse.atol[row.place()] = Tolerance::NOT_JUDGED;
        if shape.problem.weights {
            budget.weights.atol[row.matrix()..][..row.keys()].fill(Tolerance::NOT_JUDGED);
        }
        if shape.problem.logits.is_some() {
            budget.logits.atol[row.matrix()..][..row.keys()].fill(Tolerance::NOT_JUDGED);
        }
    }
    let mut evaluated = Vec::with_capacity(rows.len());
    for (row, (bounds, of)) in rows {
        budget.out.atol[row.place()] = bounds.out;
        budget.lse.atol[row.place()] = bounds.lse;
        if let Some(fast) = budget.fast.get_mut(row.place()) {
            *fast = bounds.fast;
        }
        if shape.problem.weights {
            budget.weights.atol[row.matrix()..][..bounds.weights.len()].copy_from_slice(&bounds.weights);
        }
        if shape.problem.logits.is_some() {
            budget.logits.atol[row.matrix()..][..bounds.logits.len()].copy_from_slice(&bounds.logits);
        }
        evaluated.push((row, of));
    }
    Ok((collect(&shape, evaluated), budget))
}

/// How far kernels of f32 really come from the reference, for the watch over accuracy: an error beyond it that the [`Budget`] still
/// allows is no wrong answer, but a loss of digits.
///
/// A tensor's limit is four times the largest error of the reference's own f32 instance in it, four units in the last place of its
/// largest value and an eighth of the budget, together, and never more than the budget. (The factors are measured: the kernels come
/// to between one and three times the error of the f32 instance, and to a tenth of the budget where few keys make both small.)
/// What flushing and rounding of subnormals may do is part of every limit in full: where a sink takes nearly all of the weight, all that is
/// left of a row is of their size.
/// What must be exact in the budget must be so here.
///
/// `want` and `budget` are what [`attention_with_budget`] gives; the limits are compared with like those of the budget.
///
/// # Errors
///
/// Those of [`attention`](super::attention).
pub fn regression_limit(
    problem: &Problem,
    inputs: &Inputs<'_>,
    want: &Outputs<f64>,
    budget: &Budget,
) -> Result<Budget> {
    let plain = super::attention::<f32>(problem, inputs)?;
    // What subnormals lose is not the kernel's loss.
    let shape = problem.check()?;
    let mut lost = vec![0.0; shape.lse_len() as usize];
    for (row, bound) in query::map(&shape, inputs, Values::load, subnormals) {
        lost[row.place()] = bound;
    }
    let flushed = |_| FLUSH;
    let limit =
        |budget: &Tolerance, plain: Option<&Vec<f32>>, want: Option<&Vec<f64>>, least: &dyn Fn(usize) -> f64| {
            let (Some(plain), Some(want)) = (plain, want) else { return budget.clone() };
            let finite = || plain.iter().zip(want).filter(|(plain, want)| plain.is_finite() && want.is_finite());
            let error = finite().fold(0.0, |error: f64, (&plain, want)| error.max((f64::from(plain) - want).abs()));
            let largest = finite().fold(0.0, |largest: f64, (_, want)| largest.max(want.abs()));
            let of = |(n, &atol): (usize, &f64)| atol.min(4.0 * error + 4.0 * U * largest + atol / 8.0 + least(n));
            Tolerance { atol: budget.atol.iter().enumerate().map(of).collect(), rtol: budget.rtol }
        };
    Ok(Budget {
        out: limit(&budget.out, Some(&plain.out), Some(&want.out), &|row| lost[row]),
        lse: limit(&budget.lse, plain.lse.as_ref(), want.lse.as_ref(), &flushed),
        weights: limit(&budget.weights, plain.weights.as_ref(), want.weights.as_ref(), &flushed),
        logits: limit(&budget.logits, plain.logits.as_ref(), want.logits.as_ref(), &flushed),
        fast: budget.fast.clone(),
    })
}

/// What the rows of one key/value head share.
struct Loaded {
    head: Head<f64>,
    key_magnitudes: Vec<f64>,
    /// How far keys and values may be off.
    errors: Option<Head<f64>>,
}

/// Bounds of one row.
struct Bounds {
    out: f64,
    lse: f64,
    weights: Vec<f64>,
    logits: Vec<f64>,
    fast: f64,
}

/// Magnitude of the terms of one logit, stage by stage, and what f32 may make of the last.
struct Magnitude {
    raw: f64,
    capped: f64,
    /// How far errors of q and k may move it at every stage.
    moved: f64,
    /// δ of the masked logit.
    delta: f64,
}

fn magnitude(row: &Row<'_>, j: usize, raw: f64, moved: f64, logit: f64) -> Magnitude {
    let capped = raw + f64::from(row.shape.problem.softcap.unwrap_or(0.0));
    let (before, bias) = (capped + row.alibi(j).abs(), row.bias(j));
    // f32 has 24 bits: less than a quarter of the last place is lost in the sum, which is then the bias itself.
    let absorbed = before <= bias.abs() * U / 4.0;
    let delta = if absorbed { (logit - logits::finite(bias)).abs() } else { 4.0 * U * (before + bias.abs()) };
    Magnitude { raw, capped, moved, delta: delta + moved }
}

/// How far errors of a query and a key may move their dot product, the roundings of these errors included.
fn dot_error(q: &[f64], q_errors: &[f64], k: &[f64], k_errors: &[f64]) -> f64 {
    let terms = q.iter().zip(q_errors).zip(k.iter().zip(k_errors));
    1.01 * terms.map(|((q, dq), (k, dk))| q * dk + dq * (k + dk)).sum::<f64>()
}

fn row(row: &Row<'_>, loaded: &Loaded, query_errors: Option<&[f64]>, of: &Evaluated<f64>) -> Bounds {
    let (shape, logits, head) = (row.shape, &of.logits, &loaded.head);
    let (q, scale) = (magnitudes(&row.query()), f64::from(shape.scale()).abs());
    let term = |(j, &x): (usize, &f64)| {
        let k = &loaded.key_magnitudes[j * q.len()..][..q.len()];
        let moved = query_errors.zip(loaded.errors.as_ref()).map_or(0.0, |(query_errors, errors)| {
            scale * dot_error(&q, query_errors, k, &errors.keys[j * q.len()..][..q.len()])
        });
        magnitude(row, j, scale * dot(&q, k), moved, x)
    };
    let terms: Vec<Magnitude> = logits.iter().enumerate().map(term).collect();
    let sink: Option<f64> = row.sink();
    let max = logits.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let error = |j: usize| terms[j].delta + exp_error(max - logits[j]);
    let visible = || (0..row.keys()).filter(|&j| logits[j] != f64::NEG_INFINITY);
    let grown = |j: usize, e: f64| growth(of.weights[j], logits[j] - of.lse, e);

    let growths: Vec<(usize, f64)> = visible().map(|j| (j, grown(j, error(j)))).collect();
    let sink_growth = sink.map_or(0.0, |z| growth((z - of.lse).exp(), z - of.lse, exp_error(max - z)));
    let g = growths.iter().map(|&(_, g)| g).sum::<f64>() + sink_growth;
    // Per element of the row: Σ_j p_j (exp(e_j) − 1) |v_jd − o_d|, and how far the values reach.
    let apart = |value: f64, o: f64, growth: f64| match (value - o).abs() {
        reach if reach.is_finite() => (growth * reach, reach),
        _ => (0.0, 0.0),
    };
    let mut moved: Vec<(f64, f64)> =
        of.out.iter().map(|&o| if sink.is_some() { apart(0.0, o, sink_growth) } else { (0.0, 0.0) }).collect();
    for &(j, g) in &growths {
        let v = &head.values.dense[j * moved.len()..][..moved.len()];
        for ((moved, &v), &o) in moved.iter_mut().zip(v).zip(&of.out) {
            let (more, reach) = apart(v, o, g);
            *moved = (moved.0 + more, moved.1.max(reach));
        }
    }
    let linear = g < 1.0;
    let moved = moved.iter().map(|&(sum, reach)| if linear { reach.min((1.0 + g) * sum) } else { reach });

    let keys = f64::from(shape.problem.seq_kv);
    let sum = (8.0 + keys.sqrt()) * U;
    let peak = peak(visible(), &head.values);
    let carried = loaded.errors.as_ref().map_or(0.0, |errors| carried(&errors.values, &growths, g, &of.weights));
    let out = moved.fold(0.0, f64::max) + sum * peak + subnormals(row, &head.values) + carried;

    let furthest = visible().map(|j| terms[j].delta).fold(0.0, f64::max);
    let shift =
        if furthest < 1.0 { visible().map(|j| grown(j, terms[j].delta)).sum::<f64>().ln_1p() } else { furthest };
    let lse = if of.lse.is_finite() { of.lse.abs() } else { 0.0 };

    let mut weights = vec![0.0; if shape.problem.weights { row.keys() } else { 0 }];
    if shape.problem.weights {
        for j in visible() {
            let moved = if linear { grown(j, error(j) + g.ln_1p()).min(1.0) } else { 1.0 };
            weights[j] = moved + sum * of.weights[j] + FLUSH;
        }
    }
    let logit = |(term, &x): (&Magnitude, &f64)| match shape.problem.logits {
        Some(Logits::Raw) => 4.0 * U * term.raw + term.moved + FLUSH,
        Some(Logits::Capped) => 4.0 * U * term.capped + term.moved + FLUSH,
        Some(Logits::Masked) if x != f64::NEG_INFINITY => term.delta + FLUSH,
        _ => 0.0,
    };
    Bounds {
        out: if (0..row.keys()).any(|j| row.visible(j)) { out } else { 0.0 },
        lse: shift + U * (2.0 * lse + 16.0 + 2.0 * keys.sqrt()),
        weights,
        logits: if shape.problem.logits.is_some() { terms.iter().zip(logits).map(logit).collect() } else { Vec::new() },
        fast: rounded_weights(row, &head.values, &growths, g, &of.weights),
    }
}

/// How far weights that are rounded to f16 move any element of the output; 0 for other types.
fn rounded_weights(row: &Row<'_>, values: &Values<f64>, growths: &[(usize, f64)], g: f64, weights: &[f64]) -> f64 {
    if row.shape.problem.element != Element::F16 {
        return 0.0;
    }
    let (unit, _) = element_rounding(Element::F16);
    if g >= 1.0 {
        return unit * peak(growths.iter().map(|&(j, _)| j), values);
    }
    let mut sums = vec![0.0; row.shape.problem.value_dim as usize];
    for &(j, growth) in growths {
        let weight = weights[j] + growth;
        let v = &values.dense[j * sums.len()..][..sums.len()];
        for (sum, v) in sums.iter_mut().zip(v).filter(|(_, v)| v.is_finite()) {
            *sum += weight * v.abs();
        }
    }
    unit * (1.0 + g) * sums.into_iter().fold(0.0, f64::max)
}

/// How far errors of the values at the visible keys move any element of the output: their mean with weights of at most
/// `p exp(e) (1 + g)`, never more than the largest of them. The roundings of these errors are included.
fn carried(errors: &Values<f64>, growths: &[(usize, f64)], g: f64, weights: &[f64]) -> f64 {
    let largest = peak(growths.iter().map(|&(j, _)| j), errors);
    let mean = growths.iter().map(|&(j, growth)| (weights[j] + growth) * (1.0 + g) * errors.peak[j]).sum::<f64>();
    1.01 * if g < 1.0 { mean.min(largest) } else { largest }
}

/// Largest magnitude of the finite values at some keys.
fn peak(keys: impl Iterator<Item = usize>, values: &Values<f64>) -> f64 {
    keys.map(|j| values.peak[j]).fold(0.0, f64::max)
}

/// How far subnormals may move an output. The weight of each key may be flushed, or be the smallest normal number where it must be 0:
/// llvmpipe's exp of a very low logit is that number. The product of the weight and the value may be flushed, too. An f16 output is
/// rounded to a multiple of the smallest subnormal of f16.
fn subnormals(row: &Row<'_>, values: &Values<f64>) -> f64 {
    let (_, rounded) = element_rounding(row.shape.problem.element);
    let seen = (0..row.keys()).filter(|&j| row.visible(j));
    f64::from(row.shape.problem.seq_kv) * FLUSH * (1.0 + peak(seen, values)) + rounded
}

fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|x| x.abs()).collect()
}

/// Unit roundoff of an element type below that of f32 (0 for f32), and what rounding to its subnormals may take.
pub(super) fn element_rounding(element: Element) -> (f64, f64) {
    match element {
        Element::F32 => (0.0, 0.0),
        Element::F16 => (2f64.powi(-11), 2f64.powi(-24)),
        Element::Bf16 => (2f64.powi(-8), 0.0),
    }
}

/// Exponent by which the exponential of a logit that lies `below` the maximum may be off, with its subtraction and a division: WGSL allows
/// exp `3 + 2|x|` ULP.
pub(super) fn exp_error(below: f64) -> f64 {
    2.0 * U * (4.0 + 2.0 * below)
}

/// `p (exp(e) − 1)`, or for large `e`, where p may have underflowed, the bound `exp(ln p + e)`.
pub(super) fn growth(p: f64, ln_p: f64, e: f64) -> f64 {
    if e < 1.0 { p * e.exp_m1() } else { (ln_p + e).exp() }
}
