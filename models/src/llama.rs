//! A Llama-like decoder from a GGUF file, written out in candle's tensor operations so that attention can be handed in.
//! (Touvron et al. 2023; SmolLM2 is one.)
//!
//! Quantised weights become f32 when they are read. candle's products with packed weights round x to 8 bits in blocks, where a
//! last bit of attention decides between two codes: what differs by 1e-7 in one layer differs visibly after thirty.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::{Device, Module, Tensor};
use candle_nn::Linear;
use candle_nn::ops::{rms_norm, silu};
use indicatif::ProgressBar;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

use crate::attend::{Attend, Heads};
use crate::error::{Error, Result};

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The model with its tokenizer.
pub struct Llama {
    /// Cuts text into tokens and puts them together again.
    pub tokenizer: Tokenizer,
    /// Shape of its attention.
    pub heads: Heads,
    /// Positions that it was made for.
    pub context: usize,
    /// The token that ends an answer.
    pub end: u32,
    epsilon: f32,
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    output: Linear,
}

/// A GGUF file that is being read.
struct Reader<'a> {
    content: Content,
    file: BufReader<File>,
    progress: &'a ProgressBar,
}

impl Reader<'_> {
    fn value(&self, key: &str) -> candle_core::Result<&Value> {
        self.content.metadata.get(key).ok_or_else(|| candle_core::Error::Msg(format!("metadata {key:?} is missing")))
    }

    fn number(&self, key: &str) -> candle_core::Result<usize> {
        Ok(self.value(key)?.to_u32()? as usize)
    }

    fn tensor(&mut self, name: &str) -> candle_core::Result<Tensor> {
        self.progress.inc(1);
        self.content.tensor(&mut self.file, name, &Device::Cpu)?.dequantize(&Device::Cpu)
    }

    fn linear(&mut self, name: &str) -> candle_core::Result<Linear> {
        Ok(Linear::new(self.tensor(name)?, None))
    }

    fn layer(&mut self, index: usize) -> candle_core::Result<Layer> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        Ok(Layer {
            attention_norm: self.tensor(&name("attn_norm"))?,
            q: self.linear(&name("attn_q"))?,
            k: self.linear(&name("attn_k"))?,
            v: self.linear(&name("attn_v"))?,
            out: self.linear(&name("attn_output"))?,
            mlp_norm: self.tensor(&name("ffn_norm"))?,
            gate: self.linear(&name("ffn_gate"))?,
            up: self.linear(&name("ffn_up"))?,
            down: self.linear(&name("ffn_down"))?,
        })
    }

    /// candle's, but for how SmolLM cuts text before it merges: each digit by itself, no space put in front.
    fn tokenizer(&self) -> candle_core::Result<Tokenizer> {
        let pre = self.value("tokenizer.ggml.pre")?.to_string()?;
        if pre != "smollm" {
            candle_core::bail!("metadata \"tokenizer.ggml.pre\" is {pre:?}; only \"smollm\" is known here");
        }
        let mut tokenizer = Tokenizer::from_gguf(&self.content)?;
        let pieces = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
        tokenizer.with_pre_tokenizer(Some(Sequence::new(pieces)));
        Ok(tokenizer)
    }

    fn model(mut self) -> candle_core::Result<Llama> {
        let architecture = self.value("general.architecture")?.to_string()?;
        if architecture != "llama" {
            candle_core::bail!("metadata \"general.architecture\" is {architecture:?}; it must be \"llama\"");
        }
        let (width, heads) = (self.number("llama.embedding_length")?, self.number("llama.attention.head_count")?);
        let heads = Heads {
            layers: self.number("llama.block_count")?,
            heads,
            kv_heads: self.number("llama.attention.head_count_kv")?,
            head_dim: width / heads.max(1),
            base: self.value("llama.rope.freq_base")?.to_f32()?,
        };
        let rotary_dim = self.number("llama.rope.dimension_count")?;
        if rotary_dim != heads.head_dim {
            candle_core::bail!("{rotary_dim} of {} columns of a head are rotated; all of them must be", heads.head_dim);
        }
        self.progress.set_length(self.content.tensor_infos.len() as u64);
        let embeddings = self.tensor("token_embd.weight")?;
        Ok(Llama {
            tokenizer: self.tokenizer()?,
            heads,
            context: self.number("llama.context_length")?,
            end: self.value("tokenizer.ggml.eos_token_id")?.to_u32()?,
            epsilon: self.value("llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
            layers: (0..heads.layers).map(|index| self.layer(index)).collect::<candle_core::Result<_>>()?,
            norm: self.tensor("output_norm.weight")?,
            // A file without a matrix of its own for the output uses the embeddings.
            output: match self.content.tensor_infos.contains_key("output.weight") {
                true => self.linear("output.weight")?,
                false => Linear::new(embeddings.clone(), None),
            },
            embeddings,
        })
    }
}

impl Llama {
    /// Reads a GGUF file; `progress` counts its tensors.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the file cannot be opened, and [`Error::Content`] if it does not hold a model of this kind.
    pub fn load(path: &Path, progress: &ProgressBar) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::File { path: path.into(), source })?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file).map_err(|why| Error::content(path, why))?;
        Reader { content, file, progress }.model().map_err(|why| Error::content(path, why))
    }

    /// The logits of the token after `tokens`, which follow `start` tokens that `attend` has seen already.
    ///
    /// # Errors
    ///
    /// [`Error::Candle`] for a token that the model does not have, and those of `attend`.
    pub fn forward(&self, tokens: &[u32], start: usize, attend: &mut Attend<'_>) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let rows = tokens.len();
        let mut x = self.embeddings.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let h = rms_norm(&x, &layer.attention_norm, self.epsilon)?;
            let q = layer.q.forward(&h)?.reshape((rows, heads, head_dim))?;
            let k = layer.k.forward(&h)?.reshape((rows, kv_heads, head_dim))?;
            let v = layer.v.forward(&h)?.reshape((rows, kv_heads, head_dim))?;
            x = (layer.out.forward(&attend(index, start, [&q, &k, &v])?)? + x)?;
            let h = rms_norm(&x, &layer.mlp_norm, self.epsilon)?;
            let gated = (silu(&layer.gate.forward(&h)?)? * layer.up.forward(&h)?)?;
            x = (layer.down.forward(&gated)? + x)?;
        }
        let last = rms_norm(&x.narrow(0, rows - 1, 1)?, &self.norm, self.epsilon)?;
        Ok(self.output.forward(&last)?.squeeze(0)?)
    }
}
