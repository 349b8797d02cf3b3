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

use std::collections::BTreeSet;

use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;
    use safetensors::tensor::TensorView;

    use super::*;

    type File = BTreeMap<&'static str, (Dtype, Vec<usize>)>;

    fn bytes(file: &File) -> Vec<u8> {
        let data = vec![0u8; 1 << 16];
        let views = file.iter().map(|(name, (dtype, shape))| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (*name, TensorView::new(*dtype, shape.clone(), &data[..bytes]).expect("fits"))
        });
        safetensors::serialize(views, None).expect("valid")
    }

    fn file(tensors: &[(&'static str, &[usize])]) -> File {
        tensors.iter().map(|&(name, shape)| (name, (Dtype::F32, shape.to_vec()))).collect()
    }

    fn torch() -> File {
        file(&[
            ("a.in_proj_weight", &[24, 8]),
            ("a.in_proj_bias", &[24]),
            ("a.out_proj.weight", &[8, 8]),
            ("a.out_proj.bias", &[8]),
            ("a.bias_k", &[1, 1, 8]),
            ("a.bias_v", &[1, 1, 8]),
            ("b.other", &[3]),
        ])
    }

    fn changed(mut file: File, name: &'static str, shape: Option<&[usize]>) -> File {
        match shape {
            Some(shape) => file.insert(name, (Dtype::F32, shape.to_vec())),
            None => file.remove(name),
        };
        file
    }

    fn text(result: Result<Layer>) -> String {
        result.expect_err("must fail").to_string()
    }

    #[test]
    fn each_family_is_read() {
        let layer = pytorch(&bytes(&torch()), "a.", 2).expect("valid");
        assert_eq!((layer.heads, layer.key_dim, layer.key.inputs), (2, 4, 8));
        assert!(layer.bias_kv.is_some() && layer.value.bias.is_some());
        let apart = file(&[
            ("q_proj_weight", &[8, 8]),
            ("k_proj_weight", &[8, 5]),
            ("v_proj_weight", &[8, 7]),
            ("out_proj.weight", &[8, 8]),
        ]);
        let layer = pytorch(&bytes(&apart), "", 4).expect("valid");
        assert_eq!((layer.key.inputs, layer.value.inputs, layer.key.bias), (5, 7, None));
        let grouped = file(&[
            ("query/kernel", &[9, 6, 4]),
            ("key/kernel", &[9, 3, 4]),
            ("key/bias", &[3, 4]),
            ("value/kernel", &[9, 3, 5]),
            ("attention_output/kernel", &[6, 5, 11]),
        ]);
        let layer = keras(&bytes(&grouped), "").expect("valid");
        assert_eq!((layer.heads, layer.kv_heads, layer.value_dim, layer.out.outputs), (6, 3, 5, 11));
        let tutorial =
            file(&[("wq.kernel", &[6, 8]), ("wk.kernel", &[6, 8]), ("wv.kernel", &[6, 8]), ("dense.kernel", &[8, 8])]);
        assert_eq!(tensorflow_tutorial(&bytes(&tutorial), "", 2).expect("valid").query.order, Order::InOut);
        let names = ["l.self.query.weight", "l.self.key.weight", "l.self.value.weight", "l.output.dense.weight"];
        let mut hidden = file(&names.map(|name| (name, &[8usize, 8][..])));
        hidden.insert("l.output.LayerNorm.weight", (Dtype::F32, vec![8]));
        assert_eq!(bert(&bytes(&hidden), "l.", 2).expect("valid").key_dim, 4);
        let mut llamas = file(&[
            ("q_proj.weight", &[12, 10]),
            ("k_proj.weight", &[6, 10]),
            ("v_proj.weight", &[6, 10]),
            ("o_proj.weight", &[10, 12]),
        ]);
        for (dtype, _) in llamas.values_mut() {
            *dtype = Dtype::BF16;
        }
        assert_eq!(llama(&bytes(&llamas), "", 4, 2).expect("valid").key_dim, 3);
    }

    #[test]
    fn values_keep_their_order() {
        let values: Vec<u8> = (0..24 * 8).flat_map(|i| half::f16::from_f32(i as f32).to_le_bytes()).collect();
        let rest = vec![0u8; 256];
        let packed = TensorView::new(Dtype::F16, vec![24, 8], &values).expect("fits");
        let out = TensorView::new(Dtype::F32, vec![8, 8], &rest).expect("fits");
        let file = safetensors::serialize([("in_proj_weight", packed), ("out_proj.weight", out)], None).expect("valid");
        let layer = pytorch(&file, "", 2).expect("valid");
        let first = |linear: &Linear| linear.weight[..2].to_vec();
        assert_eq!(
            [first(&layer.query), first(&layer.key), first(&layer.value)],
            [[0.0, 1.0], [64.0, 65.0], [128.0, 129.0]]
        );
    }

    /// A file of f32 tensors of which tensor `n` holds 1000·n, 1000·n + 1, …
    fn numbered(tensors: &[(&'static str, &[usize])]) -> Vec<u8> {
        let data: Vec<Vec<u8>> = (tensors.iter().enumerate())
            .map(|(n, (_, shape))| {
                (0..shape.iter().product()).flat_map(|i| (1000.0 * n as f32 + i as f32).to_le_bytes()).collect()
            })
            .collect();
        let view = |((name, shape), data)| (name, TensorView::new(Dtype::F32, shape, data).expect("fits"));
        let views = tensors.iter().map(|&(name, shape)| (name, shape.to_vec()));
        let views = views.zip(data.iter().map(Vec::as_slice)).map(view);
        safetensors::serialize(views, None).expect("valid")
    }

    fn counting(first: u32, len: usize) -> Vec<f32> {
        (0..len).map(|i| (first as usize + i) as f32).collect()
    }

    /// Asserts that the four parts of a layer, in its order, hold the numbers from these on: of the weight and of the bias.
    #[track_caller]
    fn holds(layer: &Layer, order: Order, parts: [(u32, Option<u32>); 4]) {
        let names = ["query", "key", "value", "out"];
        let linears = [&layer.query, &layer.key, &layer.value, &layer.out];
        for ((name, linear), (weight, bias)) in names.into_iter().zip(linears).zip(parts) {
            assert_eq!(linear.order, order, "{name}");
            assert_eq!(linear.weight, counting(weight, (linear.inputs * linear.outputs) as usize), "{name}.weight");
            assert_eq!(linear.bias, bias.map(|bias| counting(bias, linear.outputs as usize)), "{name}.bias");
        }
    }

    #[test]
    fn every_tensor_of_every_family_lands_in_its_place() {
        let together = numbered(&[
            ("in_proj_weight", &[12, 4]),
            ("in_proj_bias", &[12]),
            ("out_proj.weight", &[4, 4]),
            ("out_proj.bias", &[4]),
            ("bias_k", &[1, 1, 4]),
            ("bias_v", &[1, 1, 4]),
        ]);
        let layer = pytorch(&together, "", 2).expect("valid");
        holds(&layer, Order::OutIn, [(0, Some(1000)), (16, Some(1004)), (32, Some(1008)), (2000, Some(3000))]);
        assert_eq!(layer.bias_kv, Some((counting(4000, 4), counting(5000, 4))));
        let apart = numbered(&[
            ("q_proj_weight", &[4, 4]),
            ("k_proj_weight", &[4, 3]),
            ("v_proj_weight", &[4, 5]),
            ("out_proj.weight", &[4, 4]),
            ("in_proj_bias", &[12]),
        ]);
        let layer = pytorch(&apart, "", 2).expect("valid");
        holds(&layer, Order::OutIn, [(0, Some(4000)), (1000, Some(4004)), (2000, Some(4008)), (3000, None)]);

        let layer = keras(
            &numbered(&[
                ("query/kernel", &[5, 4, 2]),
                ("query/bias", &[4, 2]),
                ("key/kernel", &[6, 2, 2]),
                ("key/bias", &[2, 2]),
                ("value/kernel", &[7, 2, 3]),
                ("value/bias", &[2, 3]),
                ("attention_output/kernel", &[4, 3, 8]),
                ("attention_output/bias", &[8]),
            ]),
            "",
        )
        .expect("valid");
        let pairs = [(0, Some(1000)), (2000, Some(3000)), (4000, Some(5000)), (6000, Some(7000))];
        holds(&layer, Order::InOut, pairs);
        assert_eq!([layer.query.inputs, layer.key.inputs, layer.value.inputs, layer.out.outputs], [5, 6, 7, 8]);

        let square = |names: [&'static str; 8]| {
            let shapes: [&[usize]; 2] = [&[4, 4], &[4]];
            numbered(&names.into_iter().zip(shapes.into_iter().cycle()).collect::<Vec<_>>())
        };
        let file =
            ["wq.kernel", "wq.bias", "wk.kernel", "wk.bias", "wv.kernel", "wv.bias", "dense.kernel", "dense.bias"];
        holds(&tensorflow_tutorial(&square(file), "", 2).expect("valid"), Order::InOut, pairs);
        let file = [
            "self.query.weight",
            "self.query.bias",
            "self.key.weight",
            "self.key.bias",
            "self.value.weight",
            "self.value.bias",
            "output.dense.weight",
            "output.dense.bias",
        ];
        holds(&bert(&square(file), "", 2).expect("valid"), Order::OutIn, pairs);
        let file = [
            "q_proj.weight",
            "q_proj.bias",
            "k_proj.weight",
            "k_proj.bias",
            "v_proj.weight",
            "v_proj.bias",
            "o_proj.weight",
            "o_proj.bias",
        ];
        holds(&llama(&square(file), "", 2, 2).expect("valid"), Order::OutIn, pairs);
    }

    #[test]
    fn every_type_is_read_to_the_very_number() {
        // 1, −2.5, the type's neighbour of a third, its largest number and its smallest above 0.
        let halves = |bits: [u16; 5]| bits.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let third = 1.0 / 3.0;
        let cases = [
            (Dtype::F16, halves([0x3c00, 0xc100, 0x3555, 0x7bff, 0x0001]), [0.333_251_95, 65504.0, 2f32.powi(-24)]),
            (
                Dtype::BF16,
                halves([0x3f80, 0xc020, 0x3eab, 0x7f7f, 0x0001]),
                [0.333_984_38, f32::from_bits(0x7f7f_0000), f32::from_bits(0x0001_0000)],
            ),
            (
                Dtype::F32,
                [1.0, -2.5, third, f32::MAX, f32::from_bits(1)].iter().flat_map(|x| x.to_le_bytes()).collect(),
                [third, f32::MAX, f32::from_bits(1)],
            ),
            (
                Dtype::F64,
                [1.0, -2.5, 1.0 / 3.0, f64::from(f32::MAX), 2f64.powi(-149)]
                    .iter()
                    .flat_map(|x| x.to_le_bytes())
                    .collect(),
                [third, f32::MAX, f32::from_bits(1)],
            ),
        ];
        for (dtype, bytes, [third, largest, least]) in cases {
            let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"];
            let shapes = [[1, 5], [1, 5], [1, 5], [5, 1]];
            let views = names
                .into_iter()
                .zip(shapes)
                .map(|(name, shape)| (name, TensorView::new(dtype, shape.to_vec(), &bytes).expect("fits")));
            let layer = llama(&safetensors::serialize(views, None).expect("valid"), "", 1, 1).expect("valid");
            for part in [&layer.query, &layer.key, &layer.value, &layer.out] {
                assert_eq!(part.weight, [1.0, -2.5, third, largest, least], "{dtype:?}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let load = |file: File| pytorch(&bytes(&file), "a.", 2);
        assert!(text(load(changed(torch(), "a.in_proj_weight", None))).contains("\"a.q_proj_weight\" is missing"));
        assert!(text(load(changed(torch(), "a.out_proj.weight", None))).contains("\"a.out_proj.weight\" is missing"));
        assert!(text(load(changed(torch(), "a.bias_v", None))).contains("\"a.bias_v\" is missing"));
        assert!(text(load(changed(torch(), "a.q_norm", Some(&[8])))).contains("\"a.q_norm\" is not part of the layer"));
        let error = text(load(changed(torch(), "a.in_proj_bias", Some(&[23]))));
        assert!(error.contains("\"a.in_proj_bias\" has shape [23]; it must be [24]"), "{error}");
        assert!(text(load(changed(torch(), "a.out_proj.weight", Some(&[0, 8])))).contains("it must be [any, any]"));
        let mut integers = torch();
        integers.insert("a.in_proj_weight", (Dtype::I32, vec![24, 8]));
        assert!(text(load(integers)).contains("\"a.in_proj_weight\" has type I32"));
        assert!(text(pytorch(&bytes(&torch()), "a.", 3)).contains("heads is 3; it must divide embed_dim"));
        assert!(text(pytorch(&bytes(&torch()), "a.", 0)).contains("heads is 0"));
    }

    /// What a stranger does to a valid file, or to its tensors before they are written.
    #[derive(Clone, Debug)]
    enum Damage {
        Flip {
            byte: prop::sample::Index,
            mask: u8,
        },
        /// Only in the part that says names, types, shapes and places.
        FlipHeader {
            byte: prop::sample::Index,
            mask: u8,
        },
        HeaderSize(u64),
        Cut(prop::sample::Index),
        Append(Vec<u8>),
        Reshape(prop::sample::Index, Vec<usize>),
        Retype(prop::sample::Index, Dtype),
        Remove(prop::sample::Index),
        Add(&'static str, Vec<usize>),
    }

    fn damage() -> impl Strategy<Value = Damage> {
        use prop::collection::vec;
        let at = any::<prop::sample::Index>;
        // Sizes that fit each other now and then, none, and such that no product fits 64 bits.
        let axis = || prop::sample::select(vec![0, 1, 2, 3, 4, 6, 8, 8, 8, 12, 16, 24, 1 << 20, 1 << 33, usize::MAX]);
        let dtypes =
            [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16, Dtype::I32, Dtype::BOOL, Dtype::F8_E4M3, Dtype::F4];
        let names = ["q_norm", "in_proj_weight", "q_proj_weight", "bias_k", "q_proj.bias", "key/bias", "", "wq.bias"];
        prop_oneof![
            (at(), 1u8..).prop_map(|(byte, mask)| Damage::Flip { byte, mask }),
            (at(), 1u8..).prop_map(|(byte, mask)| Damage::FlipHeader { byte, mask }),
            prop_oneof![any::<u64>(), 0u64..2000, Just(u64::MAX), Just(100_000_001)].prop_map(Damage::HeaderSize),
            at().prop_map(Damage::Cut),
            vec(any::<u8>(), 1..9).prop_map(Damage::Append),
            (at(), vec(axis(), 0..5)).prop_map(|(which, shape)| Damage::Reshape(which, shape)),
            (at(), prop::sample::select(dtypes.to_vec())).prop_map(|(which, dtype)| Damage::Retype(which, dtype)),
            at().prop_map(Damage::Remove),
            (prop::sample::select(names.to_vec()), vec(axis(), 0..4))
                .prop_map(|(name, shape)| Damage::Add(name, shape)),
        ]
    }

    /// A valid file of each family; its tensors begin with no prefix.
    fn families() -> Vec<File> {
        let linear = |names: [&'static str; 4]| file(&names.map(|name| (name, &[8usize, 8][..])));
        vec![
            file(&[("in_proj_weight", &[24, 8]), ("in_proj_bias", &[24]), ("out_proj.weight", &[8, 8])]),
            linear(["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
            file(&[
                ("query/kernel", &[8, 4, 2]),
                ("key/kernel", &[8, 2, 2]),
                ("key/bias", &[2, 2]),
                ("value/kernel", &[8, 2, 4]),
                ("attention_output/kernel", &[4, 4, 8]),
            ]),
            linear(["wq.kernel", "wk.kernel", "wv.kernel", "dense.kernel"]),
            linear(["self.query.weight", "self.key.weight", "self.value.weight", "output.dense.weight"]),
            linear(["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]),
        ]
    }

    /// The bytes of a damaged file, or nothing where the damage is such that no file can be written.
    fn damaged(mut file: File, damages: &[Damage]) -> Option<Vec<u8>> {
        let name = |file: &File, which: &prop::sample::Index| {
            (!file.is_empty()).then(|| *file.keys().nth(which.index(file.len())).expect("in it"))
        };
        for damage in damages {
            match damage {
                Damage::Reshape(which, shape) => file.get_mut(name(&file, which)?)?.1 = shape.clone(),
                Damage::Retype(which, dtype) => file.get_mut(name(&file, which)?)?.0 = *dtype,
                Damage::Remove(which) => drop(file.remove(name(&file, which)?)),
                Damage::Add(name, shape) => drop(file.insert(name, (Dtype::F32, shape.clone()))),
                _ => {}
            }
        }
        let data: Vec<u8> = (0..1u32 << 14).map(|n| n as u8).collect();
        let views = file.iter().map(|(name, (dtype, shape))| {
            let bits = shape.iter().try_fold(dtype.bitsize(), |n, &axis| n.checked_mul(axis))?;
            Some((*name, TensorView::new(*dtype, shape.clone(), data.get(..bits / 8)?).ok()?))
        });
        let mut bytes = safetensors::serialize(views.collect::<Option<Vec<_>>>()?, None).ok()?;
        for damage in damages {
            let header = bytes.len().min(8 + usize::from(bytes[0]) + 256 * usize::from(bytes[1]));
            match damage {
                Damage::Flip { byte, mask } => {
                    let at = byte.index(bytes.len());
                    bytes[at] ^= mask;
                }
                Damage::FlipHeader { byte, mask } => bytes[byte.index(header)] ^= mask,
                Damage::HeaderSize(size) => bytes[..8].copy_from_slice(&size.to_le_bytes()),
                Damage::Cut(keep) => bytes.truncate(keep.index(bytes.len()).max(8)),
                Damage::Append(more) => bytes.extend(more),
                _ => {}
            }
        }
        Some(bytes)
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            // PROPTEST_CASES asks for more.
            cases: ProptestConfig::default().cases.max(2000),
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(7),
            ..ProptestConfig::default()
        })]

        /// No panic, and a layer that is given out is whole and no larger than its file. What is wrong with a file that can be
        /// read at all is told with the tensor's name.
        #[test]
        fn damaged_files_are_layers_or_errors(
            family in 0usize..6,
            damages in prop::collection::vec(damage(), 0..4),
            heads in prop_oneof![Just(4u32), 0u32..9, any::<u32>()],
            kv_heads in prop_oneof![Just(4u32), 0u32..9, any::<u32>()],
        ) {
            let Some(bytes) = damaged(families().swap_remove(family), &damages) else { return Ok(()) };
            let loaded = [
                pytorch(&bytes, "", heads),
                keras(&bytes, ""),
                tensorflow_tutorial(&bytes, "", heads),
                bert(&bytes, "", heads),
                llama(&bytes, "", heads, kv_heads),
            ];
            prop_assert!(!damages.is_empty() || heads != 4 || kv_heads != 4 || loaded.iter().any(Result::is_ok));
            for layer in loaded {
                match layer {
                    Ok(layer) => {
                        prop_assert_eq!(layer.check(), Ok(()));
                        let weights = [&layer.query, &layer.key, &layer.value, &layer.out].map(|part| part.weight.len());
                        prop_assert!(2 * weights.iter().sum::<usize>() <= bytes.len());
                    }
                    Err(
                        error @ (Error::MissingTensor { .. }
                        | Error::ExtraTensor { .. }
                        | Error::TensorShape { .. }
                        | Error::TensorType { .. }),
                    ) => prop_assert!(error.to_string().starts_with("tensor \""), "{}", error),
                    Err(Error::File(_)) => prop_assert!(SafeTensors::deserialize(&bytes).is_err()),
                    // The caller's number of heads does not go with the file.
                    Err(Error::Divide { .. } | Error::KvHeads { .. } | Error::Zero { .. } | Error::TooLarge { .. }) => {}
                    Err(error) => prop_assert!(false, "{}", error),
                }
            }
        }
    }

    #[test]
    fn truncated_files_are_errors() {
        let whole = bytes(&torch());
        for keep in (0..whole.len()).step_by(7) {
            assert!(matches!(pytorch(&whole[..keep], "a.", 2), Err(Error::File(_))), "{keep}");
        }
    }
}
