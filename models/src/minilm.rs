//! all-MiniLM-L6-v2: sentences to vectors of 384 numbers, whose dot product says how alike two sentences are.
//!
//! A BERT encoder of six layers (Wang et al. 2020, "MiniLM"; Reimers & Gurevych 2019, "Sentence-BERT"): the mean of the last
//! layer's rows, scaled to length 1.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use candle_core::{D, DType, Device, IndexOp, Module, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder};
use indicatif::ProgressBar;
use serde::Deserialize;
use tokenizers::{PaddingParams, PaddingStrategy, Tokenizer};
use wgpu_attention::{Gpu, Inputs, Layout, Outputs, Prepared, Problem};

use crate::error::{Error, Result};
use crate::values;

/// Tokens that the model was trained to take in a sentence.
const MOST_TOKENS: usize = 256;

#[derive(Deserialize)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    layer_norm_eps: f64,
    max_position_embeddings: usize,
    num_attention_heads: usize,
    num_hidden_layers: usize,
    type_vocab_size: usize,
    vocab_size: usize,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    out_norm: LayerNorm,
    up: Linear,
    down: Linear,
    down_norm: LayerNorm,
}

impl Layer {
    fn load(vb: &VarBuilder<'_>, config: &Config) -> candle_core::Result<Self> {
        let (width, wide, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let linear = |name: &str, from, to| candle_nn::linear(from, to, vb.pp(name));
        let norm = |name: &str| candle_nn::layer_norm(width, eps, vb.pp(name));
        Ok(Layer {
            query: linear("attention.self.query", width, width)?,
            key: linear("attention.self.key", width, width)?,
            value: linear("attention.self.value", width, width)?,
            out: linear("attention.output.dense", width, width)?,
            out_norm: norm("attention.output.LayerNorm")?,
            up: linear("intermediate.dense", width, wide)?,
            down: linear("output.dense", wide, width)?,
            down_norm: norm("output.LayerNorm")?,
        })
    }
}

/// The model with its tokenizer.
pub struct MiniLm {
    tokenizer: Tokenizer,
    heads: usize,
    words: Embedding,
    positions: Embedding,
    /// What marks a row as part of the first of two texts; there is only one here.
    first: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

/// Sentences as tokens, padded to the longest.
pub struct Batch {
    /// The tokens of each sentence, without padding.
    pub tokens: Vec<Vec<String>>,
    /// [sentences, longest].
    ids: Tensor,
    lengths: Vec<u32>,
}

/// What the model says of sentences.
pub struct Encoded {
    /// [sentences, 384], each row of length 1.
    pub embeddings: Tensor,
    /// The weights of each layer that was asked for, [sentences, heads, longest, longest].
    pub weights: Vec<Vec<f32>>,
    /// The shape of the weights of a layer.
    pub weights_shape: [usize; 4],
}

impl Encoded {
    /// The cosine of each two sentences.
    ///
    /// # Errors
    ///
    /// [`Error::Candle`] for what candle reports.
    pub fn similarity(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.embeddings.matmul(&self.embeddings.t()?)?.to_vec2()?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::File { path: path.into(), source })
}

impl MiniLm {
    /// Reads `config.json`, `tokenizer.json` and `model.safetensors`; `progress` counts the bytes of the weights.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if a file cannot be read, and [`Error::Content`] if it does not hold what it should.
    pub fn load(folder: &Path, progress: &ProgressBar) -> Result<Self> {
        let path = folder.join("config.json");
        let config: Config = serde_json::from_slice(&read(&path)?).map_err(|why| Error::content(&path, why))?;
        let path = folder.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_bytes(read(&path)?).map_err(|why| Error::content(&path, why))?;
        // The file says 128 tokens, always: what is too long shall be an error, and short sentences stay short.
        tokenizer.with_truncation(None).map_err(|why| Error::content(&path, why))?;
        let padding = PaddingParams { strategy: PaddingStrategy::BatchLongest, ..PaddingParams::default() };
        tokenizer.with_padding(Some(padding));

        let path = folder.join("model.safetensors");
        let failed = |source| Error::File { path: path.clone(), source };
        let file = std::fs::File::open(&path).map_err(failed)?;
        progress.set_length(file.metadata().map_err(failed)?.len());
        let mut bytes = Vec::new();
        progress.wrap_read(file).read_to_end(&mut bytes).map_err(failed)?;
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|why| Error::content(&path, why))?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Self::build(tokenizer, &config, &vb).map_err(|why| Error::content(&path, why))
    }

    fn build(tokenizer: Tokenizer, config: &Config, vb: &VarBuilder<'_>) -> candle_core::Result<Self> {
        let width = config.hidden_size;
        let embedding = |name: &str, rows| candle_nn::embedding(rows, width, vb.pp("embeddings").pp(name));
        let layers = (0..config.num_hidden_layers).map(|n| Layer::load(&vb.pp(format!("encoder.layer.{n}")), config));
        Ok(MiniLm {
            tokenizer,
            heads: config.num_attention_heads,
            words: embedding("word_embeddings", config.vocab_size)?,
            positions: embedding("position_embeddings", config.max_position_embeddings)?,
            first: embedding("token_type_embeddings", config.type_vocab_size)?.embeddings().i(0)?,
            norm: candle_nn::layer_norm(width, config.layer_norm_eps, vb.pp("embeddings.LayerNorm"))?,
            layers: layers.collect::<candle_core::Result<_>>()?,
        })
    }

    /// The number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Cuts sentences into tokens.
    ///
    /// # Errors
    ///
    /// [`Error::NoText`] if there is no sentence, [`Error::Tokenizer`] if the tokenizer refuses one, [`Error::TooLong`] if one
    /// has more tokens than the model was made for, and [`Error::Candle`] for what candle reports.
    pub fn tokenize(&self, sentences: &[String]) -> Result<Batch> {
        if sentences.is_empty() {
            return Err(Error::NoText);
        }
        let encodings = self
            .tokenizer
            .encode_batch(sentences.to_vec(), true)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        let (mut tokens, mut ids, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for (index, encoding) in encodings.iter().enumerate() {
            let length: u32 = encoding.get_attention_mask().iter().sum();
            if length as usize > MOST_TOKENS {
                return Err(Error::TooLong { index: index + 1, tokens: length as usize, limit: MOST_TOKENS });
            }
            tokens.push(encoding.get_tokens()[..length as usize].to_vec());
            ids.extend_from_slice(encoding.get_ids());
            lengths.push(length);
        }
        let ids = Tensor::from_vec(ids, (sentences.len(), encodings[0].len()), &Device::Cpu)?;
        Ok(Batch { tokens, ids, lengths })
    }

    /// Runs the encoder, with attention on `gpu`, and gives the weights of the layers `weights_of`, which may be none.
    ///
    /// # Errors
    ///
    /// [`Error::Layer`] if the model does not have the layer that is asked for, [`Error::Attention`] for what wgpu-attention
    /// reports, and [`Error::Candle`] for what candle reports.
    pub fn encode(&self, gpu: &Gpu, batch: &Batch, weights_of: Range<usize>) -> Result<Encoded> {
        if weights_of.end > self.layers.len() {
            return Err(Error::Layer { layer: weights_of.end - 1, last: self.layers.len() - 1 });
        }
        let (sentences, longest) = batch.ids.dims2()?;
        let width = self.words.hidden_size();
        let [b, heads, s, dim] = [sentences, self.heads, longest, width / self.heads].map(|n| n as u32);
        // What a linear layer gives is [batch, seq, heads · dim] already: no transpose on either side.
        let mut problem = Problem::new(b, heads, s, s, dim).with_layout(Layout::Bshd);
        problem.key_lengths = true;
        let prepare = |problem: &Problem| gpu.library().prepare(&gpu.plan(problem)?);
        let plain = prepare(&problem)?;
        problem.weights = true;
        let telling = if weights_of.is_empty() { None } else { Some(prepare(&problem)?) };

        let places = Tensor::arange(0, s, &Device::Cpu)?;
        let x = self.words.forward(&batch.ids)?.broadcast_add(&self.positions.forward(&places)?)?;
        let mut x = self.norm.forward(&x.broadcast_add(&self.first)?)?;
        let mut weights = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let prepared = telling.as_ref().filter(|_| weights_of.contains(&index)).unwrap_or(&plain);
            let outputs = attend(gpu, prepared, &batch.lengths, [&layer.query, &layer.key, &layer.value], &x)?;
            weights.extend(outputs.weights);
            let context = Tensor::from_vec(outputs.out, x.shape(), &Device::Cpu)?;
            x = layer.out_norm.forward(&(layer.out.forward(&context)? + x)?)?;
            let wide = layer.up.forward(&x)?.gelu_erf()?;
            x = layer.down_norm.forward(&(layer.down.forward(&wide)? + x)?)?;
        }
        let weights_shape = [sentences, self.heads, longest, longest];
        Ok(Encoded { embeddings: pooled(&x, &batch.lengths)?, weights, weights_shape })
    }
}

/// Attention of the three projections of x.
fn attend(gpu: &Gpu, prepared: &Prepared, lengths: &[u32], projections: [&Linear; 3], x: &Tensor) -> Result<Outputs> {
    let [q, k, v] = projections.map(|linear| values(&linear.forward(x)?));
    let (q, k, v) = (q?, k?, v?);
    let mut inputs = Inputs::new(&q, &k, &v);
    inputs.operands.key_lengths = Some(lengths.into());
    let resident = gpu.upload(prepared.plan(), &inputs)?;
    gpu.run(prepared, &resident, &mut |_, _| ())?;
    Ok(gpu.download(prepared.plan(), &resident)?)
}

/// The mean of the rows that are no padding, scaled to length 1.
fn pooled(x: &Tensor, lengths: &[u32]) -> Result<Tensor> {
    let rows = lengths.iter().enumerate().map(|(n, &length)| x.i((n, ..length as usize))?.mean(0));
    let means = Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
    Ok(means.broadcast_div(&means.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}
