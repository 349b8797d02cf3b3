//! One call that compares everything that a kernel computed with the reference.

use super::budget::{Budget, Tolerance, attention_with_budget, regression_limit};
use super::comparison::{Comparison, Comparisons};
use super::{append, layer, merge};
use crate::contract::error::{Error, Result};
use crate::contract::problem::{Element, Elements, Inputs, Outputs, Problem};
use crate::contract::shape::Shape;
use crate::contract::tensor::Tensor;
use crate::layer::{Call, Layer, LayerInputs, LayerOutputs};
use crate::ops::append::Append;
use crate::ops::merge::Merge;

impl Tolerance {
    /// Compares a dense tensor. NaN equals NaN and an infinity equals itself; either is a failure against anything else.
    ///
    /// # Panics
    ///
    /// If `got` and `want` differ in length, or are not a whole number of elements per entry of `atol`.
    pub fn check(&self, got: &[f32], want: &[f64]) -> Comparison {
        assert_eq!(got.len(), want.len(), "elements to compare");
        let row = if want.is_empty() { 1 } else { want.len() / self.atol.len() };
        assert_eq!(want.len(), row * self.atol.len(), "elements of whole rows");
        let mut comparison = Comparison::default();
        for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
            comparison.add(index, got.into(), want, self.allowed(index / row, want));
        }
        comparison
    }
}

impl Budget {
    /// Compares `out` in the layout of `shape`; places between rows are not looked at, tokens that no sequence owns must hold 0.
    ///
    /// # Panics
    ///
    /// If `shape` is not the problem's, or `got` or `want` is shorter than its `out`.
    pub fn compare_out(&self, shape: &Shape, got: &[f32], want: &[f64]) -> Comparison {
        let tensor = shape.out();
        assert_eq!(self.out.atol.len() as u64, shape.lse_len(), "rows of the budget");
        let mut comparison = Comparison::default();
        for (row, start) in starts(tensor).enumerate() {
            for index in start..start + tensor.dim as usize {
                comparison.add(index, got[index].into(), want[index], self.out.allowed(row, want[index]));
            }
        }
        comparison
    }

    /// Compares every output of a call. Places between the rows of `out` must hold 0, as [`Outputs`] says.
    ///
    /// `want` is what [`attention_with_budget`] gives with this budget. [`compare`] does all of it at once; this is for
    /// several results of one problem.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::Unexpected`] and [`Error::Length`] where `got` does not have the outputs of the problem.
    ///
    /// # Panics
    ///
    /// If the budget or `want` is not that of `shape`.
    pub fn compare(&self, shape: &Shape, got: &Outputs, want: &Outputs<f64>) -> Result<Comparisons> {
        check_outputs(shape, got)?;
        let mut out = self.compare_out(shape, &got.out, &want.out);
        for index in gaps(shape.out()) {
            out.add(index, got.out[index].into(), 0.0, 0.0);
        }
        let mut all = Comparisons::default();
        all.push("out", out);
        let rest = [
            ("lse", &got.lse, &want.lse, &self.lse),
            ("weights", &got.weights, &want.weights, &self.weights),
            ("logits", &got.logits, &want.logits, &self.logits),
        ];
        for (name, got, want, tolerance) in rest {
            if let Some(got) = got {
                all.push(name, tolerance.check(got, want.as_ref().expect("the problem's own reference")));
            }
        }
        Ok(all)
    }
}

/// Compares every output of a call with the f64 reference: each element with its own error budget ([`Budget`]), and with the regression
/// limit below it ([`regression_limit`]). Results of [`crate::Precision::Fast`] have a larger budget, see [`Budget::with_precision`].
///
/// ```
/// use wgpu_attention::{Inputs, Problem, compare, reference};
///
/// let problem = Problem::new(1, 2, 3, 5, 8);
/// let x: Vec<f32> = (0..80).map(|i| (i as f32).sin()).collect();
/// let inputs = Inputs::new(&x[..48], &x, &x);
///
/// // Here the CPU path computes; the outputs of `Gpu::attention` are compared in the same way.
/// let mut outputs = reference::attention::<f32>(&problem, &inputs)?;
/// let comparisons = compare(&problem, &inputs, &outputs)?;
/// assert!(comparisons.passed() && !comparisons.regressed());
/// print!("{comparisons}"); // a table with a line for each output
///
/// outputs.out[7] += 1e-3;
/// let comparisons = compare(&problem, &inputs, &outputs)?;
/// assert!(!comparisons.passed());
/// assert_eq!(comparisons.get("out").and_then(|out| out.budget.worst).map(|worst| worst.index), Some(7));
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
///
/// Those of [`attention`](super::attention), and those of [`Budget::compare`] where the outputs are not those of the problem.
pub fn compare(problem: &Problem, inputs: &Inputs<'_>, outputs: &Outputs) -> Result<Comparisons> {
    let shape = problem.check()?;
    // What is wrong with the outputs shows before the reference works for long.
    check_outputs(&shape, outputs)?;
    let (want, budget) = attention_with_budget(problem, inputs)?;
    let mut all = budget.compare(&shape, outputs, &want)?;
    let limits = regression_limit(problem, inputs, &want, &budget)?.compare(&shape, outputs, &want)?;
    for (output, limit) in all.outputs.iter_mut().zip(limits.outputs) {
        output.limit = Some(limit.budget);
    }
    Ok(all)
}

/// Compares the outputs of a layer, called without a cache, with the f64 reference.
///
/// Each element has an error budget of its own. It follows the layer's data from stage to stage (a running error analysis: Higham,
/// "Accuracy and Stability of Numerical Algorithms", section 3.3), with unit roundoff `u = 2⁻²⁴` and `Δx` for the bound of what `x` is off:
///
/// - A projection adds the bound of [`project`](super::project) to the error of its input: `Δy_c = Σ_i Δx_i |w_ic| + …`. The reference
///   rounds between its stages, which adds `u |y|`.
/// - The rotary embedding rotates a pair: `Δ = √(Δa² + Δb²)`, and the bound of [`rotary`](super::rotary).
/// - Attention has the [`Budget`] with `δ_j` larger by `|scale| Σ_d (|q_d| Δk_jd + Δq_d |k_jd| + Δq_d Δk_jd)`, and
///   `out` also moves by the weighted mean of `Δv_jd` over the visible keys.
/// - The added key of `bias_kv` has the weight `w = 1 / (1 + exp(lse − s))`, and `exp(±e)` with
///   `e = Δs + Δlse + 2u (4 + 2 |lse − s|)` moves it by at most `w (1 − w) (exp(e) − 1)`. Exponents beyond ±80 are cut, which takes `exp(−80)`.
/// - The key of `zero_attn` has the weight `exp(−lse)`, off by the factor `exp(±(Δlse + 2u (4 + 2 |lse|)))`.
/// - A mean of weights is off by the mean of their errors, and `(8 + √heads) u` of itself.
///
/// There is no regression limit. A layer whose weights are f16 or bf16 on the GPU is compared as the layer with the rounded weights.
///
/// ```
/// use wgpu_attention::reference::{self, compare_layer};
/// use wgpu_attention::multihead::{Call, Layer, LayerInputs, Linear};
///
/// let linear = || Linear { inputs: 4, outputs: 4, weight: (0..16).map(|i| (i as f32).cos()).collect(), ..Linear::default() };
/// let layer = Layer::new(2, 2, [linear(), linear(), linear(), linear()])?;
/// let (problem, call) = (layer.problem(1, 3, 3), Call::default());
/// let query: Vec<f32> = (0..12).map(|i| (i as f32).sin()).collect();
/// let inputs = LayerInputs::new(&query);
///
/// let mut outputs = reference::layer::<f32>(&layer, &problem, &call, &inputs)?;
/// assert!(compare_layer(&layer, &problem, &call, &inputs, &outputs)?.passed());
/// outputs.out[3] = f32::NAN;
/// assert!(!compare_layer(&layer, &problem, &call, &inputs, &outputs)?.passed());
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
///
/// Those of [`layer`](super::layer()), and [`Error::Missing`], [`Error::Unexpected`] and [`Error::Length`] where the outputs are not those
/// of the call.
pub fn compare_layer(
    layer: &Layer,
    problem: &Problem,
    call: &Call,
    inputs: &LayerInputs<'_>,
    outputs: &LayerOutputs,
) -> Result<Comparisons> {
    let (want, budget) = layer::layer_with_budget(layer, problem, call, inputs)?;
    check_output("out", Some(outputs.out.len()), Some(want.out.len()))?;
    check_output("weights", outputs.weights.as_ref().map(Vec::len), want.weights.as_ref().map(Vec::len))?;
    let mut all = Comparisons::default();
    all.push("out", budget.out.check(&outputs.out, &want.out));
    if let (Some(got), Some(want)) = (&outputs.weights, &want.weights) {
        all.push("weights", budget.weights.check(got, want));
    }
    Ok(all)
}

/// Compares a merged result with the f64 reference. What lies between the rows of a strided `out` is not looked at.
///
/// The merge is a mean of the partials with the weights `p_n = exp(lse_n − lse)`. Its error budget is that of attention over as many keys
/// as there are partials, which have the logits `lse_n` exactly and the values `out_n` ([`Budget`] with `δ = 0`), for each element by itself:
/// with `m = max lse_n`, `e_n = 2u (4 + 2 (m − lse_n))`, `g = Σ_n p_n (exp(e_n) − 1)` and `N` partials that are not empty,
///
/// - `out`: `(1 + g) Σ_n p_n (exp(e_n) − 1) |out_n − out|`, at most `max |out_n − out|`, `+ (8 + √N) u max |out_n| + N 2⁻¹²⁶`, f16:
///   `+ 2⁻²⁴`, relative `4u + 1.01 u16`;
/// - `lse`: `u (2 |lse| + 16 + 2 √N)`.
///
/// A sink counts as a partial with the value 0. Rows that no partial sees must hold exactly 0.
///
/// ```
/// use wgpu_attention::reference::compare_merge;
/// use wgpu_attention::Outputs;
/// use wgpu_attention::operations::Merge;
///
/// // Two partials with the weights 3/4 and 1/4.
/// let (merge, out, lse) = (Merge::new(2, 1, 1, 1, 1), [1.0, 5.0], [3f32.ln(), 0.0]);
/// let merged = |out: f32| {
///     let mut merged = Outputs::new(vec![out]);
///     merged.lse = Some(vec![4f32.ln()]);
///     merged
/// };
/// assert!(compare_merge(&merge, &out, &lse, None, &merged(2.0))?.passed());
/// assert!(!compare_merge(&merge, &out, &lse, None, &merged(2.00001))?.passed());
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
///
/// Whatever is wrong with the description or an operand, and [`Error::Missing`], [`Error::Unexpected`] and [`Error::Length`] where the
/// outputs are not those of the merge.
pub fn compare_merge(
    merge: &Merge,
    partial_out: &[f32],
    partial_lse: &[f32],
    sinks: Option<&[f32]>,
    outputs: &Outputs,
) -> Result<Comparisons> {
    merge.check_lengths(partial_out.len(), partial_lse.len(), sinks.map(<[f32]>::len))?;
    let (tensor, rows) = (merge.checked()?, merge.total_rows() as usize);
    check_output("out", Some(outputs.out.len()), Some(tensor.extent() as usize))?;
    check_output("lse", outputs.lse.as_ref().map(Vec::len), merge.lse.then_some(rows))?;
    check_output("weights", outputs.weights.as_ref().map(Vec::len), None)?;
    check_output("logits", outputs.logits.as_ref().map(Vec::len), None)?;
    let want = merge::merge_with_budget(merge, partial_out, partial_lse, sinks)?;
    let (mut out, dim) = (Comparison::default(), tensor.dim as usize);
    for (row, start) in starts(&tensor).enumerate() {
        for (index, at) in (start..start + dim).zip(row * dim..) {
            out.add(index, outputs.out[index].into(), want.out[at], want.out_budget[at]);
        }
    }
    let mut all = Comparisons::default();
    all.push("out", out);
    if let Some(lse) = &outputs.lse {
        all.push("lse", Tolerance { atol: want.lse_budget, rtol: 0.0 }.check(lse, &want.lse));
    }
    Ok(all)
}

/// Compares a cache after an append with the reference, bit for bit: the new rows, and everything that must stay.
///
/// `before` is the cache before the append and `after` the one after it, either in the element type of the append or, as
/// [`crate::Gpu::append`] gives it, widened to f32.
///
/// ```
/// use wgpu_attention::operations::Append;
/// use wgpu_attention::reference::compare_append;
///
/// // One new key of two elements in a cache with room for three.
/// let append = Append::new(1, 1, 1, 3, 2);
/// let (x, before) = ([1.0, 2.0], [0.0; 6]);
/// let compare = |after: &[f32; 6]| compare_append(&append, (&x).into(), (&before).into(), &[1], None, after.into());
/// assert!(compare(&[0.0, 0.0, 1.0, 2.0, 0.0, 0.0])?.passed());
/// assert!(!compare(&[0.0, 0.0, 1.0, 2.0, 0.0, -0.0])?.passed());
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
///
/// Whatever is wrong with the description, [`Error::Element`] and [`Error::Length`] if a slice has not the type or the length that it says.
pub fn compare_append(
    append: &Append,
    x: Elements<'_>,
    before: Elements<'_>,
    starts: &[u32],
    block_table: Option<&[u32]>,
    after: Elements<'_>,
) -> Result<Comparisons> {
    let want = append.element;
    for (field, got) in [("x", x.element()), ("cache", before.element()), ("cache after", after.element())] {
        if got != want && !(field == "cache after" && got == Element::F32) {
            return Err(Error::Element { field, got, want });
        }
    }
    let mut cache = before.bits();
    append::append(append, &x.bits(), &mut cache, starts, block_table)?;
    check_output("cache after", Some(after.len()), Some(cache.len()))?;
    let mut comparison = Comparison::default();
    for (index, (got, want)) in after.bits().into_iter().zip(cache).enumerate() {
        let want = if after.element() == append.element { want } else { widened(append.element, want).to_bits() };
        let [number, wanted] = [got, want].map(|bits| widened(after.element(), bits).into());
        comparison.add_unless(got == want, index, number, wanted, 0.0);
    }
    let mut all = Comparisons::default();
    all.push("cache", comparison);
    Ok(all)
}

/// The number that these bits of an element type are.
fn widened(element: Element, bits: u32) -> f32 {
    match element {
        Element::F32 => f32::from_bits(bits),
        Element::F16 => half::f16::from_bits(bits as u16).to_f32(),
        Element::Bf16 => half::bf16::from_bits(bits as u16).to_f32(),
    }
}

impl Elements<'_> {
    /// The bits of each element.
    fn bits(&self) -> Vec<u32> {
        match self {
            Elements::F32(x) => x.iter().map(|x| x.to_bits()).collect(),
            Elements::F16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
            Elements::Bf16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
        }
    }
}

/// Where each row of a tensor begins, in the order of `lse`.
fn starts(tensor: &Tensor) -> impl Iterator<Item = usize> {
    let [batch, heads, rows] = tensor.sizes;
    let places = (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..rows).map(move |row| (b, h, row))));
    places.map(|(b, h, row)| tensor.at(b, h, row) as usize)
}

/// The places of a tensor that lie between its rows.
fn gaps(tensor: &Tensor) -> impl Iterator<Item = usize> {
    let extent = if tensor.is_dense() { 0 } else { tensor.extent() as usize };
    let mut is_gap = vec![true; extent];
    if extent > 0 {
        starts(tensor).for_each(|start| is_gap[start..start + tensor.dim as usize].fill(false));
    }
    (0..extent).filter(move |&index| is_gap[index])
}

fn check_outputs(shape: &Shape, got: &Outputs) -> Result<()> {
    let matrix = shape.scores_len() as usize;
    check_output("out", Some(got.out.len()), Some(shape.out().extent() as usize))?;
    check_output("lse", got.lse.as_ref().map(Vec::len), shape.problem.lse.then_some(shape.lse_len() as usize))?;
    check_output("weights", got.weights.as_ref().map(Vec::len), shape.problem.weights.then_some(matrix))?;
    check_output("logits", got.logits.as_ref().map(Vec::len), shape.problem.logits.map(|_| matrix))
}

/// Checks that an output is there if it is asked for, and that it has the length that it must have.
fn check_output(field: &'static str, got: Option<usize>, want: Option<usize>) -> Result<()> {
    match (got, want) {
        (None, Some(_)) => Err(Error::Missing { field }),
        (Some(_), None) => Err(Error::Unexpected { field }),
        (Some(got), Some(want)) if got != want => Err(Error::Length { field, got, want }),
        _ => Ok(()),
    }
}
