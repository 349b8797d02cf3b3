//! Every family and type, to the very number; damaged files.

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
    let file = ["wq.kernel", "wq.bias", "wk.kernel", "wk.bias", "wv.kernel", "wv.bias", "dense.kernel", "dense.bias"];
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
            [1.0, -2.5, 1.0 / 3.0, f64::from(f32::MAX), 2f64.powi(-149)].iter().flat_map(|x| x.to_le_bytes()).collect(),
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
    let dtypes = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16, Dtype::I32, Dtype::BOOL, Dtype::F8_E4M3, Dtype::F4];
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
        (prop::sample::select(names.to_vec()), vec(axis(), 0..4)).prop_map(|(name, shape)| Damage::Add(name, shape)),
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
