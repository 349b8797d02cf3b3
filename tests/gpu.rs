//! Every stage and the whole on real drivers, against the f64 reference under the budget derived from the same data.

mod support;

use support::{Data, Random, check, floor, gpus, small};
use wgpu_attention::{
    Attention, Bias, Broadcast, Causal, Element, Elements, Error, Form, Inputs, Layout, Logits, Options, Packed,
    Problem, Strides, Window, reference, wgpu,
};

const FORMS: [Option<Form>; 2] = [Some(Form::Tiled), Some(Form::Lanes)];

fn forced(form: Option<Form>) -> Options {
    Options { form, ..Options::default() }
}

/// Every stage is an output: scores as logits, softmax as weights and lse, values as out.
fn stages(batch: u32, heads: u32, seq_q: u32, seq_kv: u32, dim: u32) -> Problem {
    let mut problem = Problem::new(batch, heads, seq_q, seq_kv, dim);
    (problem.lse, problem.weights, problem.logits) = (true, true, Some(Logits::Raw));
    problem
}

#[test]
fn stages_match_on_odd_sizes() {
    let sizes = [(1, 7), (7, 1), (63, 65), (65, 63), (127, 257), (257, 127)];
    let sizes = if small("sizes 127 and 257") { &sizes[..4] } else { &sizes[..] };
    for gpu in gpus() {
        for &(seq_q, seq_kv) in sizes {
            for form in FORMS {
                let problem = stages(2, 2, seq_q, seq_kv, 64);
                let data = Data::random(&problem, 1, 3.0);
                check(gpu, &problem, &data.inputs(), &forced(form));
            }
        }
    }
}

#[test]
fn any_head_and_value_dim_works() {
    let dims = [(64, 64), (37, 37), (1, 7), (72, 128), (128, 64), (32, 32), (80, 5), (256, 40), (512, 512)];
    let dims = if small("dims beyond 128") { &dims[..5] } else { &dims[..] };
    for gpu in gpus() {
        for &(head_dim, value_dim) in dims {
            for form in FORMS {
                let mut problem = stages(1, 2, 33, 35, head_dim);
                problem.value_dim = value_dim;
                let data = Data::random(&problem, 2, 3.0);
                check(gpu, &problem, &data.inputs(), &forced(form));
            }
        }
    }
}

#[test]
fn grouped_heads_causal_rules_and_masks_compose() {
    let causals = [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset];
    let masks = [
        None,
        Some([2, 4, 33, 47]),
        Some([1, 1, 33, 47]),
        Some([2, 1, 1, 47]),
        Some([1, 4, 33, 1]),
        Some([1, 1, 1, 20]),
    ];
    for gpu in gpus() {
        for (i, causal) in causals.into_iter().enumerate() {
            for (j, mask) in masks.into_iter().enumerate() {
                let mut problem = stages(2, 4, 33, 47, 32);
                problem.kv_heads = [4, 2, 1][(i + j) % 3];
                problem.causal = causal;
                problem.mask = mask.map(Broadcast);
                problem.logits = Some(Logits::Masked);
                let data = Data::random(&problem, 3, 8.0);
                check(gpu, &problem, &data.inputs(), &forced(FORMS[j % 2]));
            }
        }
    }
}

#[test]
fn a_row_that_sees_no_key_gives_zero() {
    for gpu in gpus() {
        for form in FORMS {
            let mut problem = stages(1, 2, 9, 5, 16);
            problem.causal = Causal::BottomRight;
            problem.mask = Some(Broadcast([1, 1, 9, 5]));
            let mut data = Data::random(&problem, 4, 1.0);
            let mask = data.mask.as_mut().expect("asked for");
            mask[8 * 5..].fill(0);
            check(gpu, &problem, &data.inputs(), &forced(form));
            let got = gpu.attention_with(&problem, &data.inputs(), &forced(form)).expect("valid");
            // Rows 0 to 3 stand before the first key, the last one is masked out.
            for row in [0, 1, 2, 3, 8] {
                assert_eq!(got.out[row * 16..][..16], [0.0; 16]);
                assert_eq!(got.lse.as_ref().expect("asked for")[row], f32::NEG_INFINITY);
            }
        }
    }
}

#[test]
fn everything_at_once_matches() {
    let rounds: u32 = if small("30 of the 36 random compositions") { 6 } else { 36 };
    let mut r = Random(5);
    for round in 0..rounds {
        let (seq_q, seq_kv) = (1 + r.below(40), 1 + r.below(70));
        let mut problem = Problem::new(1 + r.below(3), 4, seq_q, seq_kv, [16, 24, 40, 64][r.below(4) as usize]);
        problem.kv_heads = [1, 2, 4][r.below(3) as usize];
        problem.causal = [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset][r.below(4) as usize];
        problem.softcap = (r.below(2) == 0).then_some(2.5);
        problem.window =
            Window { left: (r.below(3) == 0).then(|| r.below(20)), right: (r.below(3) == 0).then(|| r.below(20)) };
        problem.mask = (r.below(2) == 0).then_some(Broadcast([1, 1, seq_q, seq_kv]));
        problem.bias = (r.below(2) == 0).then_some(Bias { shape: Broadcast([1, 4, 1, seq_kv]), element: Element::F32 });
        problem.key_lengths = r.below(2) == 0;
        problem.alibi = r.below(2) == 0;
        problem.sinks = r.below(2) == 0;
        problem.lse = true;
        problem.weights = r.below(2) == 0;
        problem.logits = [None, Some(Logits::Raw), Some(Logits::Capped), Some(Logits::Masked)][r.below(4) as usize];
        problem = problem.with_layout([Layout::Bhsd, Layout::Bshd][r.below(2) as usize]);
        let data = Data::random(&problem, 100 + u64::from(round), 2.0);
        for gpu in gpus() {
            check(gpu, &problem, &data.inputs(), &forced(FORMS[round as usize % 2]));
        }
    }
}

#[test]
fn sixteen_bit_elements_round_once() {
    for gpu in gpus() {
        for dim in [32, 7] {
            for element in [Element::F16, Element::Bf16] {
                for native in [Some(false), None] {
                    let mut problem = Problem::new(1, 3, 17, 19, dim);
                    (problem.element, problem.lse) = (element, true);
                    let data = Data::random(&problem, 6, 4.0);
                    let narrow = |x: &[f32]| -> Vec<u16> {
                        let bits = |&x: &f32| match element {
                            Element::F16 => half::f16::from_f32(x).to_bits(),
                            _ => half::bf16::from_f32(x).to_bits(),
                        };
                        x.iter().map(bits).collect()
                    };
                    fn elements(bits: &[u16], element: Element) -> Elements<'_> {
                        match element {
                            Element::F16 => Elements::F16(bytemuck::cast_slice(bits)),
                            _ => Elements::Bf16(bytemuck::cast_slice(bits)),
                        }
                    }
                    let (q, k, v) = (narrow(&data.q), narrow(&data.k), narrow(&data.v));
                    let inputs = Inputs {
                        q: elements(&q, element),
                        k: elements(&k, element),
                        v: elements(&v, element),
                        ..Inputs::default()
                    };
                    for form in FORMS {
                        check(gpu, &problem, &inputs, &Options { form, native_f16: native, ..Options::default() });
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_leaks_from_hidden_keys_and_visible_nan_stays_in_its_row() {
    for gpu in gpus() {
        for form in FORMS {
            let mut problem = Problem::new(1, 1, 20, 30, 32);
            (problem.causal, problem.key_lengths, problem.lse) = (Causal::TopLeft, true, true);
            let mut data = Data::random(&problem, 7, 1.0);
            data.key_lengths = Some(vec![18]);
            for (key, garbage) in [(17, f32::NAN), (19, f32::INFINITY), (25, 1e30), (29, f32::NAN)] {
                data.v[key * 32..][..32].fill(garbage);
            }
            for key in 18..30 {
                data.k[key * 32..][..32].fill(f32::NAN);
            }
            let got = gpu.attention_with(&problem, &data.inputs(), &forced(form)).expect("valid");
            // Key 17 is visible from row 17 on; keys from 18 on never are.
            assert!(got.out[..17 * 32].iter().all(|x| x.is_finite()));
            assert!(got.out[17 * 32..].iter().all(|x| x.is_nan()));
            check(gpu, &problem, &data.inputs(), &forced(form));
        }
    }
}

#[test]
fn packed_sequences_match_and_garbage_lengths_stay_inside() {
    for gpu in gpus() {
        for form in FORMS {
            let mut problem = Problem::new(4, 2, 20, 30, 16).with_layout(Layout::Bshd);
            problem.packed = Some(Packed { total_q: 40, total_kv: 60 });
            (problem.causal, problem.lse) = (Causal::BottomRight, true);
            let mut data = Data::random(&problem, 8, 2.0);
            data.cu_seqlens_q = Some(vec![0, 20, 20, 33, 40]);
            data.cu_seqlens_kv = Some(vec![0, 30, 35, 35, 60]);
            check(gpu, &problem, &data.inputs(), &forced(form));

            let plan = gpu.library().plan_with(&problem, &forced(form)).expect("valid");
            let prepared = gpu.library().prepare(&plan).expect("compiles");
            let resident = gpu.upload(&plan, &data.inputs()).expect("fits");
            let wild: Vec<u8> = [u32::MAX, 7, 1 << 31, 3, u32::MAX - 1].iter().flat_map(|x| x.to_ne_bytes()).collect();
            for list in [resident.buffers().cu_seqlens_q, resident.buffers().cu_seqlens_kv] {
                gpu.queue().write_buffer(list.expect("uploaded").buffer(), 0, &wild);
            }
            gpu.run(&prepared, &resident, &mut |_, _| ()).expect("no lost device");
            gpu.download(&plan, &resident).expect("no lost device");
            gpu.attention_with(&problem, &data.inputs(), &forced(form)).expect("the device still works");
        }
    }
}

#[test]
fn strided_operands_share_a_buffer() {
    for gpu in gpus() {
        let (batch, heads, seq, dim) = (2u32, 3u32, 21u32, 20u32);
        let mut problem = Problem::new(batch, heads, seq, seq, dim);
        let width = u64::from(heads * dim);
        let part = |offset| {
            Layout::Strided(Strides { offset, batch: u64::from(seq) * 3 * width, head: dim.into(), row: 3 * width })
        };
        (problem.q, problem.k, problem.v, problem.out) = (part(0), part(width), part(2 * width), Layout::Bshd);
        let shape = problem.check().expect("valid");
        let qkv = Random(9).signed_vec(shape.v().extent() as usize, 2.0);
        let cut = |extent: u64| Elements::F32(&qkv[..extent as usize]);
        let inputs = Inputs {
            q: cut(shape.q().extent()),
            k: cut(shape.k().extent()),
            v: cut(shape.v().extent()),
            ..Inputs::default()
        };
        check(gpu, &problem, &inputs, &Options::default());
    }
}

#[test]
fn every_split_happens_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 16 << 10, 3);
        for form in FORMS {
            // 300 keys × 16 dims × 4 bytes exceed the binding: keys are split; so are batches, heads and rows.
            let mut problem = stages(2, 2, 70, 300, 16);
            problem.mask = Some(Broadcast([1, 2, 70, 300]));
            problem.bias = Some(Bias { shape: Broadcast([2, 1, 1, 300]), element: Element::F32 });
            let data = Data::random(&problem, 10, 2.0);
            let options = Options { form, scratch_budget: 12 << 10, ..Options::default() };
            let plan = gpu.library().plan_with(&problem, &options).expect("splits");
            let told = plan.reasons().join("\n");
            for word in ["keys a dispatch", "parts under the scratch", "pass of its own"] {
                assert!(told.contains(word), "{word:?} is not among\n{told}");
            }
            assert!(plan.steps().iter().all(|step| step.grid.iter().all(|&side| side <= 3)));
            assert!(plan.steps().iter().all(|step| step.bindings.iter().all(|bound| bound.size <= 16 << 10)));
            check(gpu, &problem, &data.inputs(), &options);
        }
    }
}

#[test]
fn more_heads_than_a_grid_axis_fold() {
    for gpu in gpus() {
        let mut problem = Problem::new(300, 250, 1, 2, 4);
        problem.kv_heads = 1;
        let data = Data::random(&problem, 11, 2.0);
        check(gpu, &problem, &data.inputs(), &Options::default());
    }
}

#[test]
fn a_plan_gives_the_same_bits_whole_or_in_slices_in_the_callers_encoder() {
    for gpu in gpus() {
        let problem = Problem::new(1, 2, 70, 90, 32);
        let data = Data::random(&problem, 12, 2.0);
        let options = Options { work_budget: std::time::Duration::from_nanos(1000), ..Options::default() };
        let attention = Attention::with_checks(gpu.device(), support::checked());
        let whole = attention.prepare(&attention.plan(&problem).expect("valid")).expect("compiles");
        let sliced = attention.prepare(&attention.plan_with(&problem, &options).expect("valid")).expect("compiles");
        assert!(sliced.slices() > 3);
        let results: Vec<_> = [&whole, &whole, &sliced]
            .map(|prepared| {
                let resident = gpu.upload(prepared.plan(), &data.inputs()).expect("fits");
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                if prepared.slices() > 1 {
                    for slice in 0..prepared.slices() {
                        prepared.encode_slice(slice, &mut encoder, &resident.buffers()).expect("valid");
                    }
                } else {
                    prepared.encode(&mut encoder, &resident.buffers()).expect("valid");
                    prepared.encode(&mut encoder, &resident.buffers()).expect("any number of times");
                }
                gpu.queue().submit([encoder.finish()]);
                gpu.download(prepared.plan(), &resident).expect("read").out
            })
            .into();
        assert_eq!(results[0], results[1]);
        assert_eq!(results[0], results[2]);
        let want = reference::attention::<f64>(&problem, &data.inputs()).expect("valid");
        assert!(results[0].iter().zip(&want.out).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5));
    }
}

#[test]
fn wrong_buffers_are_errors() {
    let gpu = &gpus()[0];
    let problem = Problem::new(1, 1, 4, 4, 4);
    let plan = gpu.library().plan(&problem).expect("valid");
    let prepared = gpu.library().prepare(&plan).expect("compiles");
    let make = |size, usage| {
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let storage = wgpu::BufferUsages::STORAGE;
    let (good, out, tiny, plain) =
        (make(1024, storage), make(64, storage), make(60, storage), make(64, wgpu::BufferUsages::COPY_SRC));
    let encode = |buffers: &wgpu_attention::Buffers<'_>| {
        prepared.encode(&mut gpu.device().create_command_encoder(&Default::default()), buffers)
    };
    let buffers = wgpu_attention::Buffers::new(good.slice(..), good.slice(..), good.slice(..), out.slice(..));
    assert_eq!(encode(&buffers), Ok(()));
    let mut wrong = buffers;
    wrong.k = tiny.slice(..);
    assert_eq!(encode(&wrong), Err(Error::BufferSize { field: "k", got: 60, want: 64 }));
    let mut wrong = buffers;
    wrong.v = plain.slice(..);
    assert_eq!(encode(&wrong), Err(Error::BufferUsage { field: "v", usage: "STORAGE" }));
    let mut wrong = buffers;
    wrong.q = good.slice(4..);
    assert!(matches!(encode(&wrong), Err(Error::BufferOffset { field: "q", offset: 4, .. })));
    let mut wrong = buffers;
    wrong.out = good.slice(..);
    assert_eq!(encode(&wrong), Err(Error::Aliased { output: "out", other: "q" }));
    let mut wrong = buffers;
    wrong.lse = Some(tiny.slice(..));
    assert_eq!(encode(&wrong), Err(Error::Unexpected { field: "lse" }));
}

#[test]
fn a_lost_device_is_an_error() {
    for gpu in gpus() {
        let gpu = floor(gpu, 1 << 20, 1000);
        gpu.device().destroy();
        let problem = Problem::new(1, 1, 4, 4, 4);
        let data = Data::random(&problem, 13, 1.0);
        assert!(gpu.attention(&problem, &data.inputs()).is_err());
    }
}
