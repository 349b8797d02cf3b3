//! The whole layer.

use super::budget::{Budget, FLUSH, Tolerance, U, attention_with_errors, exp_error, growth};
use super::scores::dot;
use super::{Real, average, extra, project, rotary};
use crate::contract::error::{Error, Result};
use crate::contract::problem::{Element, Elements, Inputs, Layout, Outputs, Problem, Strides};
use crate::layer::{Call, Layer, LayerInputs, LayerOutputs, Linear, Weights};
use crate::ops::project::{Order, Projection};
use crate::ops::rotary::{Positions, Rotation};

/// A [`Layer`] as the textbook writes it, without a cache. Between its stages, values are rounded to f32 once: that is what
/// [`Inputs`] holds.
///
/// # Errors
///
/// Whatever is wrong with layer, problem or inputs.
pub fn layer<T: Real>(
    layer: &Layer,
    problem: &Problem,
    call: &Call,
    inputs: &LayerInputs<'_>,
) -> Result<LayerOutputs<T>> {
    let attend = |inner: &Problem, inputs: &Inputs<'_>, _: &Inputs<'_>| {
        Ok((super::attention::<T>(inner, inputs)?, Budget::default()))
    };
    Ok(evaluate(layer, problem, call, inputs, attend)?.0)
}

/// The error budget of a layer, with a bound for each element; [`super::compare_layer`] states the formulas.
pub(super) struct LayerBudget {
    pub out: Tolerance,
    pub weights: Tolerance,
}

/// The layer in f64 with its error budget.
pub(super) fn layer_with_budget(
    layer: &Layer,
    problem: &Problem,
    call: &Call,
    inputs: &LayerInputs<'_>,
) -> Result<(LayerOutputs<f64>, LayerBudget)> {
    let attend = |inner: &Problem, inputs: &Inputs<'_>, errors: &Inputs<'_>| {
        attention_with_errors(inner, inputs, Some(errors), &|_| true)
    };
    let (outputs, [out, weights]) = evaluate(layer, problem, call, inputs, attend)?;
    let tolerance = |atol| Tolerance { atol, rtol: 0.0 };
    Ok((outputs, LayerBudget { out: tolerance(out), weights: tolerance(weights) }))
}

/// Numbers rounded to f32, and how far a kernel may be from each of them.
struct Rounded {
    values: Vec<f32>,
    errors: Vec<f32>,
}

impl Rounded {
    fn new<T: Real>(values: &[T], errors: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f32> = values.iter().map(|x| x.to_f32().unwrap_or(f32::NAN)).collect();
        // What is NaN or an infinity must be just that. The rounding of the values counts as an error of the kernel.
        let bound = |(&value, error): (&f32, f64)| match value.is_finite() {
            true => ((error + U * f64::from(value).abs()) as f32).next_up(),
            false => 0.0,
        };
        Rounded { errors: values.iter().zip(errors).map(bound).collect(), values }
    }
}

/// The layer, with the bounds of `out` and of the weights from the budget that `attend` gives for q, k and v with their errors.
fn evaluate<T: Real>(
    layer: &Layer,
    problem: &Problem,
    call: &Call,
    inputs: &LayerInputs<'_>,
    attend: impl FnOnce(&Problem, &Inputs<'_>, &Inputs<'_>) -> Result<(Outputs<T>, Budget)>,
) -> Result<(LayerOutputs<T>, [Vec<f64>; 2])> {
    layer.check_call(problem, call)?;
    let [query, key, value] = layer.check_inputs(problem, call, inputs)?;
    if call.cache {
        let why = "the reference runs without one: give all keys at once";
        return Err(Error::Conflict { left: "cache", right: "the CPU reference", why });
    }
    let mut inner = problem.clone().with_layout(Layout::Bshd);
    (inner.lse, inner.weights) = (true, call.weights.is_some());
    let zeros = vec![0.0f32; layer.heads as usize];
    let mut operands = inputs.operands;
    if layer.zero_attn {
        (inner.sinks, operands.sinks) = (true, Some((&zeros).into()));
    }
    let [batch, seq_q, seq_kv] = [problem.batch, problem.seq_q, problem.seq_kv];
    let mut q = linear::<T>(&layer.query, query, batch, seq_q, call.seq_first)?;
    let mut k = linear::<T>(&layer.key, key, batch, seq_kv, call.seq_first)?;
    let v = linear::<T>(&layer.value, value, batch, seq_kv, call.seq_first)?;
    rotate::<T>(layer, &mut q, [batch, layer.heads, seq_q])?;
    rotate::<T>(layer, &mut k, [batch, layer.kv_heads, seq_kv])?;
    let given = Inputs { q: (&q.values).into(), k: (&k.values).into(), v: (&v.values).into(), operands };
    let errors = Inputs { q: (&q.errors).into(), k: (&k.errors).into(), v: (&v.errors).into(), operands };
    let (got, budget) = attend(&inner, &given, &errors)?;
    let joined = Heads { layer, inner: &inner, q, got, budget }.join()?;

    let context = Rounded::new(&joined.out, joined.out_errors.into_iter());
    let projection = projection(&layer.out, batch, seq_q, false);
    let bias = layer.out.bias.as_deref();
    let (mut out, mut bounds) = project::<T>(&projection, &context.values, Elements::F32(&layer.out.weight), bias)?;
    carry(&layer.out, &context.errors, &mut bounds);
    if call.seq_first {
        (out, bounds) = (seq_first(&out, problem, &layer.out), seq_first(&bounds, problem, &layer.out));
    }
    let per_head = seq_q as usize * layer.weight_columns(seq_kv) as usize;
    let (weights, weight_bounds) = match call.weights {
        None => (None, Vec::new()),
        Some(Weights::Heads) => (Some(joined.weights), joined.weight_errors),
        Some(Weights::Mean) => {
            let (mean, bounds) = mean(&joined.weights, &joined.weight_errors, layer.heads as usize, per_head);
            (Some(mean), bounds)
        }
    };
    Ok((LayerOutputs { out, weights }, [bounds, weight_bounds]))
}

/// The finished attention inside a layer.
struct Heads<'a, T> {
    layer: &'a Layer,
    inner: &'a Problem,
    q: Rounded,
    got: Outputs<T>,
    budget: Budget,
}

/// `out` [batch, seq_q, heads, value_dim] and the weights [batch, heads, seq_q, columns] with the keys that the layer adds; empty without
/// weights. Beside them their errors.
struct Joined<T> {
    out: Vec<T>,
    out_errors: Vec<f64>,
    weights: Vec<T>,
    weight_errors: Vec<f64>,
}

/// The weight of an added key, and how far it may be off.
#[derive(Clone, Copy, Default)]
struct Added {
    weight: f64,
    /// How far the scores' errors move it, and the weight of the rest the other way.
    moved: f64,
    /// What the rounding of either weight adds.
    rounding: f64,
}

impl<T: Real> Heads<'_, T> {
    /// Joins the keys that the layer adds.
    fn join(mut self) -> Result<Joined<T>> {
        let (layer, inner) = (self.layer, self.inner);
        let [heads, rows, keys] = [inner.heads, inner.seq_q, inner.seq_kv].map(|n| n as usize);
        let value_dim = layer.value_dim as usize;
        let columns = layer.weight_columns(inner.seq_kv) as usize;
        let matrix = if inner.weights { inner.batch as usize * heads * rows * columns } else { 0 };
        let mut joined = Joined {
            out: std::mem::take(&mut self.got.out),
            out_errors: Vec::new(),
            weights: vec![T::zero(); matrix],
            weight_errors: vec![0.0; matrix],
        };
        joined.out_errors = vec![0.0; joined.out.len()];
        let (lses, inner_weights) = (self.got.lse.take().expect("asked for"), self.got.weights.take());
        for (n, &lse) in lses.iter().enumerate() {
            let (b, h, row) = (n / (heads * rows), n / rows % heads, n % rows);
            let at = (b * rows + row) * heads + h;
            let place = at * value_dim..(at + 1) * value_dim;
            let (out, out_errors) = (&mut joined.out[place.clone()], &mut joined.out_errors[place]);
            let tolerance = |tolerance: &Tolerance, at: usize, x: T| {
                tolerance.atol.get(at).copied().unwrap_or(0.0) + tolerance.rtol * wide(x.abs())
            };
            for (error, &x) in out_errors.iter_mut().zip(out.iter()) {
                *error = tolerance(&self.budget.out, n, x);
            }
            let lse_error = tolerance(&self.budget.lse, n, T::zero());
            let added = self.extra(at, h, lse, lse_error, out, out_errors)?;
            let Some(inner_weights) = &inner_weights else { continue };
            let (added_weight, added) = added.unzip();
            let (keep, of) = (T::one() - added_weight.unwrap_or(T::zero()), added.unwrap_or_default());
            let zero = layer.zero_attn.then(|| (keep * (-lse).exp(), zero_error(wide(lse), lse_error)));
            let seen = (n * keys..(n + 1) * keys).map(|key| {
                let weight = inner_weights[key];
                (keep * weight, of.of_rest(wide(weight), tolerance(&self.budget.weights, key, weight)))
            });
            let added = added_weight.map(|weight| (weight, of.moved + of.rounding));
            let zero = zero.map(|(weight, error)| (weight, of.of_rest((-wide(lse)).exp(), error)));
            for (column, (weight, error)) in seen.chain(added).chain(zero).enumerate() {
                joined.weights[n * columns + column] = weight;
                joined.weight_errors[n * columns + column] = error;
            }
        }
        Ok(joined)
    }

    /// Joins the key of `bias_kv` to a row, and gives its weight.
    fn extra(
        &self,
        at: usize,
        head: usize,
        lse: T,
        lse_error: f64,
        out: &mut [T],
        out_errors: &mut [f64],
    ) -> Result<Option<(T, Added)>> {
        let (layer, dim) = (self.layer, self.layer.key_dim as usize);
        let Some((key, value)) = &layer.bias_kv else { return Ok(None) };
        let kv_head = head / (layer.heads / layer.kv_heads) as usize;
        let widened = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::of(x.into())).collect() };
        let scale = self.inner.check()?.scale();
        let (q, errors) = (&self.q.values[at * dim..][..dim], &self.q.errors[at * dim..][..dim]);
        let key = &key[kv_head * dim..][..dim];
        let value = widened(&value[kv_head * out.len()..][..out.len()]);
        let score = T::of(scale.into()) * dot(&widened(q), &widened(key));
        let sum = |terms: &[f32]| -> f64 {
            terms.iter().zip(key).map(|(&x, &k)| f64::from(x).abs() * f64::from(k).abs()).sum::<f64>()
        };
        let score_error = f64::from(scale).abs() * (1.01 * sum(errors) + (8.0 + (dim as f64).sqrt()) * U * sum(q))
            + 2.0 * U * wide(score.abs());
        let before: Vec<f64> = out.iter().map(|&x| wide(x)).collect();
        let weight = extra(score, lse, &value, out);
        let added = Added::new(wide(weight), wide(lse) - wide(score), score_error + lse_error);
        for ((error, o), value) in out_errors.iter_mut().zip(before).zip(value) {
            *error = added.of_out(o, *error, wide(value));
        }
        Ok(Some((weight, added)))
    }
}

impl Added {
    /// `distance` is lse − score, and `error` how far that may be off.
    fn new(weight: f64, distance: f64, error: f64) -> Self {
        let rounding = 4.0 * U + (-80f64).exp() + FLUSH;
        if distance == f64::NEG_INFINITY {
            return Added { weight, moved: 0.0, rounding };
        }
        let product = weight * (1.0 - weight);
        let moved = growth(product, -distance.abs(), error + exp_error(distance.abs())).min(1.0);
        Added { weight, moved, rounding }
    }

    /// The error of an output with the added value, from that of the output before.
    fn of_out(&self, before: f64, error: f64, value: f64) -> f64 {
        let size = (1.0 - self.weight) * before.abs() + self.weight * value.abs();
        let apart = (value - before).abs();
        self.moved * apart
            + self.rounding * (before.abs() + value.abs())
            + 3.0 * U * size
            + 1.01 * (1.0 - self.weight + self.moved) * error
            + 3.0 * FLUSH
    }

    /// The error of another key's weight, from that without the added key.
    fn of_rest(&self, weight: f64, error: f64) -> f64 {
        let rounding = if self.rounding > 0.0 { (self.rounding + U) * weight + FLUSH } else { 0.0 };
        1.01 * (1.0 - self.weight + self.moved) * error + self.moved * weight + rounding
    }
}

/// The error of exp(−lse).
fn zero_error(lse: f64, lse_error: f64) -> f64 {
    growth((-lse).exp(), -lse, lse_error + exp_error(lse.abs())) + FLUSH
}

fn wide<T: Real>(x: T) -> f64 {
    x.to_f64().unwrap_or(f64::NAN)
}

/// Adds what errors of the inputs of a projection do to its results, the roundings of these errors included.
fn carry(linear: &Linear, errors: &[f32], bounds: &mut [f64]) {
    let [inputs, outputs] = [linear.inputs, linear.outputs].map(|n| n as usize);
    for (errors, bounds) in errors.chunks_exact(inputs).zip(bounds.chunks_exact_mut(outputs)) {
        for (c, bound) in bounds.iter_mut().enumerate() {
            let weight = |i: usize| match linear.order {
                Order::InOut => linear.weight[i * outputs + c],
                Order::OutIn => linear.weight[c * inputs + i],
            };
            let terms = errors.iter().enumerate().map(|(i, &error)| f64::from(error) * f64::from(weight(i)).abs());
            *bound += 1.01 * terms.sum::<f64>();
        }
    }
}

/// [batch, seq, width] as [seq, batch, width].
fn seq_first<T: Clone>(x: &[T], problem: &Problem, linear: &Linear) -> Vec<T> {
    let [batch, rows, width] = [problem.batch, problem.seq_q, linear.outputs].map(|n| n as usize);
    let order = (0..rows).flat_map(|row| (0..batch).map(move |b| (b * rows + row) * width));
    order.flat_map(|start| x[start..start + width].to_vec()).collect()
}

/// The mean of the weights over the heads of each batch, and its errors. A head has `per_head` weights.
fn mean<T: Real>(weights: &[T], errors: &[f64], heads: usize, per_head: usize) -> (Vec<T>, Vec<f64>) {
    let batch = (heads * per_head).max(1);
    let mean: Vec<T> = weights.chunks_exact(batch).flat_map(|of| average(of, heads)).collect();
    let bounds = errors.chunks_exact(batch).flat_map(|of| average(of, heads));
    let rounding = (10.0 + (heads as f64).sqrt()) * U;
    let bounds = bounds.zip(&mean).map(|(bound, mean)| bound + rounding * wide(mean.abs()) + FLUSH).collect();
    (mean, bounds)
}

fn projection(linear: &Linear, batch: u32, rows: u32, seq_first: bool) -> Projection {
    let mut p = Projection::new(rows, linear.inputs, linear.outputs, linear.order, Element::F32);
    let width = u64::from(linear.inputs);
    p.batch = batch;
    let (by_batch, by_row) = if seq_first { (1, batch) } else { (rows, 1) };
    p.x = Strides { batch: u64::from(by_batch) * width, row: u64::from(by_row) * width, ..Strides::default() };
    p.bias = linear.bias.as_ref().map(|_| 0);
    p
}

/// [batch, rows, outputs], rounded to f32.
fn linear<T: Real>(linear: &Linear, x: &[f32], batch: u32, rows: u32, seq_first: bool) -> Result<Rounded> {
    let p = projection(linear, batch, rows, seq_first);
    let (y, bounds) = project::<T>(&p, x, Elements::F32(&linear.weight), linear.bias.as_deref())?;
    Ok(Rounded::new(&y, bounds.into_iter()))
}

/// Rotary position embedding of [batch, rows, heads, key_dim], positions from 0 on.
fn rotate<T: Real>(layer: &Layer, x: &mut Rounded, [batch, heads, rows]: [u32; 3]) -> Result<()> {
    let Some(of) = layer.rotary else { return Ok(()) };
    let mut r = Rotation::new(batch, heads, rows, layer.key_dim, of.positions);
    (r.rotary_dim, r.interleaved, r.positions) = (of.dim, of.interleaved, Positions::Starts);
    let (h, d) = (u64::from(heads), u64::from(layer.key_dim));
    r.x = Strides { offset: 0, batch: u64::from(rows) * h * d, head: d, row: h * d };
    let table = Rotation::table(of.positions, of.dim, of.base);
    let (y, bounds) = rotary::<T>(&r, Elements::F32(&x.values), &table, &vec![0; batch as usize])?;
    let (dim, rotary_dim) = (layer.key_dim as usize, of.dim as usize);
    let order = (0..batch as usize)
        .flat_map(|b| (0..heads as usize).flat_map(move |h| (0..rows as usize).map(move |row| (b, h, row))));
    for ((b, h, row), (rotated, bounds)) in order.zip(y.chunks_exact(dim).zip(bounds.chunks_exact(dim))) {
        let at = ((b * rows as usize + row) * heads as usize + h) * dim;
        let before = x.errors[at..at + dim].to_vec();
        let error = |d: usize| match d < rotary_dim {
            true => 1.01 * f64::from(before[d]).hypot(f64::from(before[partner(d, rotary_dim, of.interleaved)])),
            false => f64::from(before[d]),
        };
        let rounded = Rounded::new(rotated, bounds.iter().enumerate().map(|(d, bound)| bound + error(d)));
        x.values[at..at + dim].copy_from_slice(&rounded.values);
        x.errors[at..at + dim].copy_from_slice(&rounded.errors);
    }
    Ok(())
}

/// The element that is rotated together with element `d`.
fn partner(d: usize, rotary_dim: usize, interleaved: bool) -> usize {
    if interleaved { d ^ 1 } else { (d + rotary_dim / 2) % rotary_dim }
}
