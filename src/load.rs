//! Layers from safetensors files of PyTorch, Keras, TensorFlow and Hugging Face (cargo feature `safetensors`).
//!
//! Each loader takes the bytes of a file and the prefix that the names of the layer's tensors share in it. Files are not trusted: a
//! tensor that is missing, that the layer does not have, or that has a wrong shape or type is an error that names it. The types F32,
//! F16, BF16 and F64 are read.
//!
//! # Errors
//!
//! Every loader returns [`Error::File`] for bytes that are not a safetensors file, [`Error::MissingTensor`], [`Error::ExtraTensor`],
//! [`Error::TensorShape`] and [`Error::TensorType`] for tensors that do not fit, [`Error::TooLarge`] for
//! sizes beyond u32, and what [`Layer::new`] finds.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use safetensors::{Dtype, SafeTensors};

use crate::contract::error::{Error, Result};
use crate::layer::{Layer, Linear};
use crate::ops::project::Order;

/// The tensors of one layer, and the names of those that were read.
struct Tensors<'a> {
    file: SafeTensors<'a>,
    prefix: &'a str,
    read: BTreeSet<String>,
}

impl<'a> Tensors<'a> {
    fn new(bytes: &'a [u8], prefix: &'a str) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| Error::File(error.to_string()))?;
        Ok(Tensors { file, prefix, read: BTreeSet::new() })
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(&format!("{}{name}", self.prefix)).is_ok()
    }

    /// Shape and values of a tensor. `None` in `want` accepts an axis of any length but 0.
    fn take<const N: usize>(&mut self, name: &str, want: [Option<u32>; N]) -> Result<([u32; N], Vec<f32>)> {
        let tensor = format!("{}{name}", self.prefix);
        let Ok(view) = self.file.tensor(&tensor) else { return Err(Error::MissingTensor { tensor }) };
        let sizes: Option<Vec<u32>> = view.shape().iter().map(|&n| u32::try_from(n).ok().filter(|&n| n > 0)).collect();
        let fits = |got: &[u32; N]| got.iter().zip(want).all(|(&got, want)| want.is_none_or(|want| want == got));
        let shape = sizes.and_then(|sizes| <[u32; N]>::try_from(sizes).ok()).filter(fits);
        let Some(shape) = shape else {
            let axis = |n: Option<u32>| n.map_or("any".to_owned(), |n| n.to_string());
            let want = format!("[{}]", want.map(axis).join(", "));
            return Err(Error::TensorShape { tensor, got: view.shape().to_vec(), want });
        };
        fn decoded<const B: usize>(bytes: &[u8], read: impl Fn([u8; B]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<B>().0.iter().map(|&chunk| read(chunk)).collect()
        }
        let values = match view.dtype() {
            Dtype::F32 => decoded(view.data(), f32::from_le_bytes),
            Dtype::F64 => decoded(view.data(), |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => decoded(view.data(), |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => decoded(view.data(), |b| half::bf16::from_le_bytes(b).to_f32()),
            other => return Err(Error::TensorType { tensor, got: format!("{other:?}") }),
        };
        self.read.insert(tensor);
        Ok((shape, values))
    }

    fn bias(&mut self, name: &str, outputs: u32) -> Result<Option<Vec<f32>>> {
        if self.has(name) { Ok(Some(self.take(name, [Some(outputs)])?.1)) } else { Ok(None) }
    }

    /// `{name}.weight` [out, in] with an optional `{name}.bias`.
    fn torch(&mut self, name: &str, outputs: Option<u32>, inputs: Option<u32>) -> Result<Linear> {
        let ([outputs, inputs], weight) = self.take(&format!("{name}.weight"), [outputs, inputs])?;
        let bias = self.bias(&format!("{name}.bias"), outputs)?;
        Ok(Linear { inputs, outputs, weight, order: Order::OutIn, bias })
    }

    /// Checks that every tensor under the prefix was read or is one of `others`.
    fn finish(self, layer: Layer, others: &[&str]) -> Result<Layer> {
        let known = |name: &str| self.read.contains(name) || others.contains(&&name[self.prefix.len()..]);
        let extra =
            self.file.names().into_iter().filter(|name| name.starts_with(self.prefix)).find(|name| !known(name));
        match extra {
            Some(tensor) => Err(Error::ExtraTensor { tensor: tensor.to_string() }),
            None => Ok(layer),
        }
    }
}

/// `torch.nn.MultiheadAttention`: `in_proj_weight` or `q_proj_weight`, `k_proj_weight` and `v_proj_weight`; `in_proj_bias`,
/// `out_proj.weight`, `out_proj.bias`, `bias_k`, `bias_v`. A state dict does not tell `add_zero_attn`: set [`Layer::zero_attn`].
///
/// # Errors
///
/// Those of the [module](self), and [`Error::Divide`] if `heads` does not divide the width.
pub fn pytorch(file: &[u8], prefix: &str, heads: u32) -> Result<Layer> {
    let mut tensors = Tensors::new(file, prefix)?;
    let ([width, inner], out) = tensors.take("out_proj.weight", [None, None])?;
    let out_bias = tensors.bias("out_proj.bias", width)?;
    let out = Linear { inputs: inner, outputs: width, weight: out, order: Order::OutIn, bias: out_bias };
    divides(heads, width, "embed_dim")?;
    let mut parts = if tensors.has("in_proj_weight") {
        let rows = width.checked_mul(3).ok_or(Error::TooLarge {
            field: "embed_dim",
            value: width.into(),
            limit: (u32::MAX / 3).into(),
        })?;
        let (_, all) = tensors.take("in_proj_weight", [Some(rows), Some(width)])?;
        let third = all.len() / 3;
        [0, 1, 2].map(|n| (width, all[n * third..][..third].to_vec()))
    } else {
        let mut part = |name: &str, inputs| -> Result<_> {
            let ([_, inputs], weight) = tensors.take(name, [Some(width), inputs])?;
            Ok((inputs, weight))
        };
        [part("q_proj_weight", Some(width))?, part("k_proj_weight", None)?, part("v_proj_weight", None)?]
    }
    .map(|(inputs, weight)| Linear { inputs, outputs: width, weight, order: Order::OutIn, bias: None });
    if tensors.has("in_proj_bias") {
        let (_, all) = tensors.take("in_proj_bias", [width.checked_mul(3)])?;
        for (part, bias) in parts.iter_mut().zip(all.chunks_exact(width as usize)) {
            part.bias = Some(bias.to_vec());
        }
    }
    let [query, key, value] = parts;
    let mut layer = Layer::new(heads, heads, [query, key, value, out])?;
    if tensors.has("bias_k") || tensors.has("bias_v") {
        let mut added = |name| Ok::<_, Error>(tensors.take(name, [Some(1), Some(1), Some(width)])?.1);
        layer.bias_kv = Some((added("bias_k")?, added("bias_v")?));
    }
    tensors.finish(layer, &[])
}

/// Keras 3 `MultiHeadAttention` and `GroupQueryAttention`: `query/kernel` [in, heads, key_dim], `key/kernel`, `value/kernel`,
/// `attention_output/kernel` [heads, value_dim, out], each with an optional `/bias`. The numbers of heads follow from the
/// shapes.
///
/// # Errors
///
/// Those of the [module](self).
pub fn keras(file: &[u8], prefix: &str) -> Result<Layer> {
    let mut tensors = Tensors::new(file, prefix)?;
    let mut part = |name: &str, heads: Option<u32>, dim: Option<u32>| -> Result<(u32, u32, Linear)> {
        let ([inputs, heads, dim], weight) = tensors.take(&format!("{name}/kernel"), [None, heads, dim])?;
        let outputs = product(heads, dim)?;
        let bias = format!("{name}/bias");
        let bias = if tensors.has(&bias) { Some(tensors.take(&bias, [Some(heads), Some(dim)])?.1) } else { None };
        Ok((heads, dim, Linear { inputs, outputs, weight, order: Order::InOut, bias }))
    };
    let (heads, dim, query) = part("query", None, None)?;
    let (kv_heads, _, key) = part("key", None, Some(dim))?;
    let (_, value_dim, value) = part("value", Some(kv_heads), None)?;
    let ([_, _, outputs], weight) = tensors.take("attention_output/kernel", [Some(heads), Some(value_dim), None])?;
    let bias = tensors.bias("attention_output/bias", outputs)?;
    let out = Linear { inputs: product(heads, value_dim)?, outputs, weight, order: Order::InOut, bias };
    let layer = Layer::new(heads, kv_heads, [query, key, value, out])?;
    tensors.finish(layer, &[])
}

/// The layer of the TensorFlow transformer tutorial: `wq.kernel` [in, d_model] and `wq.bias`, likewise `wk`, `wv`, `dense`.
///
/// # Errors
///
/// Those of the [module](self), and [`Error::Divide`] if `heads` does not divide the width.
pub fn tensorflow_tutorial(file: &[u8], prefix: &str, heads: u32) -> Result<Layer> {
    let mut tensors = Tensors::new(file, prefix)?;
    let mut part = |name: &str, inputs: Option<u32>, outputs: Option<u32>| -> Result<Linear> {
        let ([inputs, outputs], weight) = tensors.take(&format!("{name}.kernel"), [inputs, outputs])?;
        let bias = tensors.bias(&format!("{name}.bias"), outputs)?;
        Ok(Linear { inputs, outputs, weight, order: Order::InOut, bias })
    };
    let query = part("wq", None, None)?;
    let width = Some(query.outputs);
    divides(heads, query.outputs, "d_model")?;
    let parts = [part("wk", None, width)?, part("wv", None, width)?, part("dense", width, None)?];
    let [key, value, out] = parts;
    let layer = Layer::new(heads, heads, [query, key, value, out])?;
    tensors.finish(layer, &[])
}

/// The names that Hugging Face uses for BERT and similar models: `self.query`, `self.key`, `self.value`, `output.dense`, each `.weight` and `.bias`.
/// The normalisation beside them (`output.LayerNorm`) is not part of the layer.
///
/// # Errors
///
/// Those of the [module](self), and [`Error::Divide`] if `heads` does not divide the width.
pub fn bert(file: &[u8], prefix: &str, heads: u32) -> Result<Layer> {
    let mut tensors = Tensors::new(file, prefix)?;
    let query = tensors.torch("self.query", None, None)?;
    divides(heads, query.outputs, "hidden_size")?;
    let (outputs, inputs) = (Some(query.outputs), Some(query.inputs));
    let key = tensors.torch("self.key", outputs, inputs)?;
    let value = tensors.torch("self.value", outputs, inputs)?;
    let out = tensors.torch("output.dense", None, outputs)?;
    let layer = Layer::new(heads, heads, [query, key, value, out])?;
    let norm = ["weight", "bias", "gamma", "beta"].map(|name| format!("output.LayerNorm.{name}"));
    tensors.finish(layer, &norm.each_ref().map(String::as_str))
}

/// The names that Hugging Face uses for Llama and similar models: `q_proj`, `k_proj`, `v_proj`, `o_proj`, each with `.weight` and an
/// optional `.bias`. The file does not hold the rotary embedding: set [`Layer::rotary`].
///
/// # Errors
///
/// Those of the [module](self), and [`Error::Divide`] if `heads` does not divide the width of the queries.
pub fn llama(file: &[u8], prefix: &str, heads: u32, kv_heads: u32) -> Result<Layer> {
    let mut tensors = Tensors::new(file, prefix)?;
    let query = tensors.torch("q_proj", None, None)?;
    divides(heads, query.outputs, "q_proj")?;
    let wide = product(query.outputs / heads, kv_heads)?;
    let key = tensors.torch("k_proj", Some(wide), Some(query.inputs))?;
    let value = tensors.torch("v_proj", Some(wide), Some(query.inputs))?;
    let out = tensors.torch("o_proj", None, Some(query.outputs))?;
    let layer = Layer::new(heads, kv_heads, [query, key, value, out])?;
    tensors.finish(layer, &["rotary_emb.inv_freq"])
}

fn divides(heads: u32, whole: u32, of: &'static str) -> Result<()> {
    if heads > 0 && whole.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Error::Divide { field: "heads", value: heads.into(), of, whole: whole.into() })
}

fn product(a: u32, b: u32) -> Result<u32> {
    let value = u64::from(a) * u64::from(b);
    u32::try_from(value).map_err(|_| Error::TooLarge { field: "heads·dim", value, limit: u32::MAX.into() })
}
