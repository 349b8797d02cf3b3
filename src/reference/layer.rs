//! The whole layer.

use super::scores::dot;
use super::{Real, average, extra, project, rotary};
use crate::error::{Error, Result};
use crate::layer::{Call, Layer, LayerInputs, LayerOutputs, Linear, Weights};
use crate::ops::project::Projection;
use crate::ops::rotary::{Positions, Rotation};
use crate::problem::{Elements, Inputs, Layout, Problem, Strides};

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
    turn::<T>(layer, &mut q, [batch, layer.heads, seq_q])?;
    turn::<T>(layer, &mut k, [batch, layer.kv_heads, seq_kv])?;
    let inputs = Inputs { q: (&q).into(), k: (&k).into(), v: (&v).into(), operands };
    let mut got = super::attention::<T>(&inner, &inputs)?;

    let [heads, key_dim, value_dim] = [layer.heads, layer.key_dim, layer.value_dim].map(|n| n as usize);
    let (rows, keys) = (seq_q as usize, seq_kv as usize);
    let columns = layer.weight_columns(seq_kv) as usize;
    let mut weights = vec![T::zero(); if call.weights.is_some() { batch as usize * heads * rows * columns } else { 0 }];
    let scale = T::of(inner.check()?.scale().into());
    for (n, &lse) in got.lse.iter().flatten().enumerate() {
        let (b, h, row) = (n / (heads * rows), n / rows % heads, n % rows);
        let kv_head = h / (heads / layer.kv_heads as usize);
        let at = (b * rows + row) * heads + h;
        let widened = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::of(x.into())).collect() };
        let added = layer.bias_kv.as_ref().map(|(key, value)| {
            let key = widened(&key[kv_head * key_dim..][..key_dim]);
            let value = widened(&value[kv_head * value_dim..][..value_dim]);
            let score = scale * dot(&widened(&q[at * key_dim..][..key_dim]), &key);
            extra(score, lse, &value, &mut got.out[at * value_dim..][..value_dim])
        });
        if let Some(inner) = &got.weights {
            let keep = T::one() - added.unwrap_or(T::zero());
            let zero = layer.zero_attn.then(|| keep * (-lse).exp());
            let seen = inner[n * keys..][..keys].iter().map(|&w| keep * w);
            for (to, w) in weights[n * columns..].iter_mut().zip(seen.chain(added).chain(zero)) {
                *to = w;
            }
        }
    }
    let context: Vec<f32> = got.out.iter().map(|x| x.to_f32().unwrap_or(f32::NAN)).collect();
    let projection = projection(&layer.out, batch, seq_q, false);
    let (mut out, _) =
        project::<T>(&projection, &context, Elements::F32(&layer.out.weight), layer.out.bias.as_deref())?;
    if call.seq_first {
        let width = layer.out.outputs as usize;
        let place = |row: usize, b: usize| (b * rows + row) * width;
        let order = (0..rows).flat_map(|row| (0..batch as usize).map(move |b| (row, b)));
        out = order.flat_map(|(row, b)| out[place(row, b)..][..width].to_vec()).collect();
    }
    let weights = call.weights.map(|which| match which {
        Weights::Heads => weights,
        Weights::Mean => {
            weights.chunks_exact((heads * rows * columns).max(1)).flat_map(|of| average(of, heads)).collect()
        }
    });
    Ok(LayerOutputs { out, weights })
}

fn projection(linear: &Linear, batch: u32, rows: u32, seq_first: bool) -> Projection {
    let mut p = Projection::new(rows, linear.inputs, linear.outputs, linear.order, crate::Element::F32);
    let width = u64::from(linear.inputs);
    p.batch = batch;
    let (by_batch, by_row) = if seq_first { (1, batch) } else { (rows, 1) };
    p.x = Strides { batch: u64::from(by_batch) * width, row: u64::from(by_row) * width, ..Strides::default() };
    p.bias = linear.bias.as_ref().map(|_| 0);
    p
}

/// [batch, rows, outputs], rounded to f32.
fn linear<T: Real>(linear: &Linear, x: &[f32], batch: u32, rows: u32, seq_first: bool) -> Result<Vec<f32>> {
    let p = projection(linear, batch, rows, seq_first);
    let (y, _) = project::<T>(&p, x, Elements::F32(&linear.weight), linear.bias.as_deref())?;
    Ok(y.into_iter().map(|y| y.to_f32().unwrap_or(f32::NAN)).collect())
}

/// Rotary position embedding of [batch, rows, heads, key_dim], positions from 0 on.
fn turn<T: Real>(layer: &Layer, x: &mut [f32], [batch, heads, rows]: [u32; 3]) -> Result<()> {
    let Some(of) = layer.rotary else { return Ok(()) };
    let mut r = Rotation::new(batch, heads, rows, layer.key_dim, of.positions);
    (r.rotary_dim, r.interleaved, r.positions) = (of.dim, of.interleaved, Positions::Starts);
    let (h, d) = (u64::from(heads), u64::from(layer.key_dim));
    r.x = Strides { offset: 0, batch: u64::from(rows) * h * d, head: d, row: h * d };
    let table = Rotation::table(of.positions, of.dim, of.base);
    let (y, _) = rotary::<T>(&r, Elements::F32(x), &table, &vec![0; batch as usize])?;
    let dim = layer.key_dim as usize;
    let order = (0..batch as usize)
        .flat_map(|b| (0..heads as usize).flat_map(move |h| (0..rows as usize).map(move |row| (b, h, row))));
    for ((b, h, row), turned) in order.zip(y.chunks_exact(dim)) {
        let at = ((b * rows as usize + row) * heads as usize + h) * dim;
        for (x, y) in x[at..at + dim].iter_mut().zip(turned) {
            *x = y.to_f32().unwrap_or(f32::NAN);
        }
    }
    Ok(())
}
