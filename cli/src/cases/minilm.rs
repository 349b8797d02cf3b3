//! `conf-minilm/1`: the attention layers of a sentence encoder, from the hidden state before each layer to the one after its
//! attention block.
//!
//! A folder holds `attention_weights.safetensors` (some or all layers) and `sentences.safetensors` (hidden states and what is expected).
//! The linear layers and the normalisation run on the host in f32; only attention itself is under test. Each layer is one case
//! with two calls: padding given as key lengths, and the same as a boolean mask.

use std::path::Path;
use std::sync::Arc;

use wgpu_attention::{Broadcast, Layout, Operands, Problem};

use super::case::{Call, Case, Expectation, Quantity, Rows, Work};
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::Result;
use crate::floats::Floats;
use crate::operands::{Array, OwnedInputs, set_key_lengths, set_mask};

pub const FORMAT: &str = "conf-minilm/1";

const WEIGHTS: &str = "attention_weights.safetensors";
const SENTENCES: &str = "sentences.safetensors";

/// Attention heads where the weights file does not say.
const HEADS: u32 = 12;
const CTX: Rule = Rule { atol: 2e-5, rtol: 0.0 };
const PROBS: Rule = Rule { atol: 5e-6, rtol: 0.0 };
const ATTN_OUT: Rule = Rule { atol: 5e-5, rtol: 0.0 };

/// Whether `file` is one of the two files of such a folder and the other one is there too.
pub fn is_part(file: &Path, folder: &Path) -> bool {
    let named = |name: &str| file.file_name().is_some_and(|file| file == name);
    (named(WEIGHTS) && folder.join(SENTENCES).is_file()) || (named(SENTENCES) && folder.join(WEIGHTS).is_file())
}

/// `x · Wᵀ + b` with W of [outputs, inputs].
#[derive(Debug)]
struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Linear {
    fn read(archive: &Archive, name: &str, width: usize) -> Result<Self> {
        let weight = archive.f32s_of(&format!("{name}.weight"), &[width, width])?.to_vec();
        let bias = archive.f32s_of(&format!("{name}.bias"), &[width])?.to_vec();
        Ok(Linear { weight, bias })
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let width = self.bias.len();
        let row = |row: &[f32]| -> Vec<f32> {
            self.weight.chunks_exact(width).zip(&self.bias).map(|(w, b)| dot(row, w) + b).collect()
        };
        x.chunks_exact(width).flat_map(row).collect()
    }
}

/// Sixteen running sums, so that the compiler can keep them in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// What follows attention in the layer: output projection, residual and layer normalisation.
#[derive(Clone, Debug)]
pub struct Projection(Arc<Block>);

#[derive(Debug)]
struct Block {
    dense: Linear,
    residual: Vec<f32>,
    gain: Vec<f32>,
    shift: Vec<f32>,
    epsilon: f64,
}

impl Projection {
    pub fn apply(&self, ctx: &[f32]) -> Vec<f32> {
        let block = &*self.0;
        let mut x = block.dense.apply(ctx);
        for (x, residual) in x.iter_mut().zip(&block.residual) {
            *x += residual;
        }
        for row in x.chunks_exact_mut(block.gain.len()) {
            let count = row.len() as f64;
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
            let factor = 1.0 / (variance + block.epsilon).sqrt();
            for ((x, gain), shift) in row.iter_mut().zip(&block.gain).zip(&block.shift) {
                *x = ((f64::from(*x) - mean) * factor) as f32 * gain + shift;
            }
        }
        x
    }
}

pub fn load(folder: &Path) -> Result<Vec<Case>> {
    let weights = Archive::read(&folder.join(WEIGHTS))?;
    let sentences = Archive::read(&folder.join(SENTENCES))?;
    let layer = |name: &str| -> Option<u32> {
        name.strip_prefix("encoder.layer.")?.strip_suffix(".attention.self.query.weight")?.parse().ok()
    };
    let mut layers: Vec<u32> = weights.names().filter_map(layer).collect();
    layers.sort_unstable();
    layers.into_iter().map(|layer| case(&weights, &sentences, layer)).collect()
}

fn case(weights: &Archive, sentences: &Archive, layer: u32) -> Result<Case> {
    let hidden = format!("hidden.{layer}");
    let [batch_u32, seq_u32, width_u32] = sentences.sizes_of_rank(&hidden)?;
    let [batch, seq, width] = [batch_u32, seq_u32, width_u32].map(|n| n as usize);
    let x = sentences.f32s(&hidden)?;
    let heads: u32 = weights.json_or("heads", "an integer", HEADS)?;
    if heads == 0 || width == 0 || !width_u32.is_multiple_of(heads) {
        return Err(sentences.wrong_shape(
            &hidden,
            format!("[batch, tokens, width], the width a multiple of {heads} heads, neither of them 0"),
        ));
    }
    let linear = |name: &str| Linear::read(weights, &format!("encoder.layer.{layer}.attention.{name}"), width);
    let operands = OwnedInputs::new(
        Floats::F32(linear("self.query")?.apply(x)),
        Floats::F32(linear("self.key")?.apply(x)),
        Floats::F32(linear("self.value")?.apply(x)),
    );
    let norm = format!("encoder.layer.{layer}.attention.output.LayerNorm");
    let projection = Projection(Arc::new(Block {
        dense: linear("output.dense")?,
        residual: x.to_vec(),
        gain: weights.f32s_of(&format!("{norm}.weight"), &[width])?.to_vec(),
        shift: weights.f32s_of(&format!("{norm}.bias"), &[width])?.to_vec(),
        epsilon: sentences.json_or("layer_norm_eps", "a number", 1e-12)?,
    }));

    sentences.expect_shape("attention_mask", &[batch, seq])?;
    let mask = sentences.bools("attention_mask")?;
    let real: Vec<bool> = mask.iter().map(|&token| token != 0).collect();
    let per_head = || real.chunks(seq.max(1)).flat_map(|rows| rows.repeat(heads as usize)).collect();
    let probs = format!("layer.{layer}.probs");
    let expectations = || -> Result<Vec<Expectation>> {
        let want = |name: &str| -> Result<_> { Ok(sentences.f32s_of(name, &[batch, seq, width])?.to_vec()) };
        let rows = || Some(Rows { keep: real.clone(), width });
        let (ctx, attn_out) = (format!("layer.{layer}.ctx"), format!("layer.{layer}.attn_out"));
        let projected = Quantity::Projected(projection.clone());
        let mut list = vec![
            Expectation { rows: rows(), ..Expectation::new(&ctx, Quantity::Out, want(&ctx)?, CTX) },
            Expectation { rows: rows(), ..Expectation::new(&attn_out, projected, want(&attn_out)?, ATTN_OUT) },
        ];
        if sentences.has(&probs) {
            let want = sentences.f32s_of(&probs, &[batch, heads as usize, seq, seq])?.to_vec();
            let rows = Some(Rows { keep: per_head(), width: seq });
            list.push(Expectation { rows, ..Expectation::new(&probs, Quantity::Weights, want, PROBS) });
        }
        Ok(list)
    };

    let mut problem = Problem::new(batch_u32, heads, seq_u32, seq_u32, width_u32 / heads).with_layout(Layout::Bshd);
    problem.weights = sentences.has(&probs);
    let call = |label, change: &dyn Fn(&mut Problem, &mut Operands<Array>) -> Result<()>| {
        let (mut problem, mut operands) = (problem.clone(), operands.clone());
        change(&mut problem, &mut operands.operands)?;
        Ok::<_, crate::error::Error>(Call {
            label,
            work: Work::Attention { problem: problem.into(), operands: operands.into() },
            expectations: expectations()?,
        })
    };
    let lengths = call("key lengths", &|problem, operands| {
        set_key_lengths(problem, operands, sentences.lengths("kv_lens")?);
        Ok(())
    })?;
    let masked = call("mask", &|problem, operands| {
        set_mask(problem, operands, Broadcast([batch_u32, 1, 1, seq_u32]), mask.to_vec());
        Ok(())
    })?;
    Ok(Case { name: format!("minilm layer {layer}"), calls: vec![lengths, masked], notes: Vec::new() })
}
