//! What hidden keys and values hold reaches nobody, and what lengths on the GPU say leaves no buffer.

use wgpu_attention::{Broadcast, Causal, Element, Gpu, Layout, Options, Outputs, Packed, Problem};

use crate::support::staged::{Guarded, Staged};
use crate::support::{Adapter, Case, Data, floor, gpus};
use crate::{everywhere, lean, problem, ways};

const GARBAGE: [f32; 4] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30];

/// Fills keys and values of all heads and batches at key `j`.
fn soil(p: &Problem, operands: &mut Data, j: u32, key: Option<f32>, value: Option<f32>) {
    let shape = p.check().unwrap();
    for b in 0..p.batch {
        for h in 0..p.kv_heads {
            for (tensor, of, garbage) in [(&mut operands.k, shape.k(), key), (&mut operands.v, shape.v(), value)] {
                let at = of.at(b, h, j) as usize;
                if let Some(garbage) = garbage {
                    tensor.fill(at..at + of.dim as usize, garbage);
                }
            }
        }
    }
}

#[test]
fn garbage_in_keys_hidden_from_all_rows_reaches_none() {
    let hide: [fn(&mut Problem); 3] =
        [|p| p.key_lengths = true, |p| p.mask = Some(Broadcast([1, 1, 1, 37])), |p| p.causal = Causal::TopLeft];
    for hide in hide {
        let p = problem([1, 2, 17, 37, 12], hide);
        let mut clean = Data::random(&p, 5, 1.0);
        clean.key_lengths = clean.key_lengths.map(|_| vec![18]);
        clean.mask = clean.mask.map(|_| (0..37).map(|j| u8::from(j < 18)).collect());
        for p in [lean(&p), p] {
            let case = Case::new(p.clone(), clean.clone());
            for garbage in GARBAGE {
                let mut dirty = clean.clone();
                (18..37).for_each(|j| soil(&p, &mut dirty, j, Some(garbage), Some(garbage)));
                for gpu in gpus() {
                    for way in ways(gpu, &p) {
                        let plan = gpu.library().plan_with(&p, &way).unwrap();
                        case.compare(&gpu.attention_with(&p, &dirty.inputs(), &way).unwrap(), &plan);
                    }
                }
            }
        }
    }
}

#[test]
fn bad_values_show_in_the_rows_that_see_them_and_nowhere_else() {
    // Causal: key 9 is hidden from rows 0 to 8. Mask: from every third row. The reference shows it in element 7 of the others.
    for masked in [false, true] {
        let p = problem([1, 2, 37, 37, 12], |p| {
            p.mask = masked.then_some(Broadcast([1, 1, 37, 37]));
            p.causal = if masked { Causal::None } else { Causal::TopLeft };
        });
        for p in [lean(&p), p] {
            for garbage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut operands = Data::random(&p, 5, 1.0);
                operands.mask = operands.mask.map(|_| (0..37 * 37).map(|n| u8::from(n / 37 % 3 != 0)).collect());
                let shape = p.check().unwrap();
                operands.v.set(shape.v().at(0, 1, 9) as usize + 7, garbage);
                let case = Case::new(p.clone(), operands);
                let bad = case.want.out.iter().filter(|x| !x.is_finite()).count();
                assert_eq!(bad, if masked { 24 } else { 28 });
                everywhere(case);
            }
        }
    }
}

#[test]
fn bad_keys_spoil_no_row_that_does_not_see_them() {
    for masked in [false, true] {
        let p = problem([1, 2, 37, 37, 12], |p| {
            p.mask = masked.then_some(Broadcast([1, 1, 37, 37]));
            p.causal = if masked { Causal::None } else { Causal::TopLeft };
        });
        let mut p = lean(&p);
        p.lse = false; // a row that sees the key has none to compare
        let sees = |row: usize| if masked { !row.is_multiple_of(3) } else { row >= 9 };
        let mut clean = Data::random(&p, 5, 1.0);
        clean.mask = clean.mask.map(|_| (0..37 * 37).map(|n| u8::from(sees(n / 37))).collect());
        let want = Case::new(p.clone(), clean.clone());
        for garbage in GARBAGE {
            let mut dirty = clean.clone();
            soil(&p, &mut dirty, 9, Some(garbage), None);
            for gpu in gpus() {
                for way in ways(gpu, &p) {
                    let plan = gpu.library().plan_with(&p, &way).unwrap();
                    let mut got = gpu.attention_with(&p, &dirty.inputs(), &way).unwrap();
                    let spoilt = (0..got.out.len()).filter(|n| sees(n / 12 % 37));
                    spoilt.for_each(|n| got.out[n] = want.want.out[n] as f32);
                    want.compare(&got, &plan);
                }
            }
        }
    }
}

#[test]
fn a_bad_value_does_not_cross_heads_batches_or_sequences() {
    let mut p = problem([3, 2, 8, 9, 12], |p| p.packed = Some(Packed { total_q: 17, total_kv: 20 }));
    p = lean(&p).with_layout(Layout::Bshd);
    let mut operands = Data::random(&p, 5, 1.0);
    (operands.cu_q, operands.cu_kv) = (Some(vec![0, 8, 13, 17]), Some(vec![0, 9, 13, 20]));
    let shape = p.check().unwrap();
    operands.v.set(shape.v().at(0, 0, 10) as usize, f32::NAN);
    let case = Case::new(p, operands);
    assert_eq!(case.want.out.iter().filter(|x| x.is_nan()).count(), 5);
    everywhere(case);
}

/// Runs with buffers of the test's own; looks at the margins of all of them.
fn run(gpu: &Adapter, p: &Problem, options: &Options, operands: &Data, change: impl FnOnce(&mut Staged)) -> Outputs {
    let plan = gpu.library().plan_with(p, options).unwrap();
    let mut staged = Staged::new(gpu.device(), &plan, operands);
    change(&mut staged);
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &staged.buffers()).unwrap();
    gpu.queue().submit([encoder.finish()]);
    gpu.wait().unwrap();
    staged.outputs(gpu.device(), gpu.queue())
}

#[test]
fn key_lengths_on_the_gpu_beyond_the_capacity_count_as_the_capacity() {
    for causal in [Causal::None, Causal::BottomRight] {
        let p = lean(&problem([4, 2, 7, 37, 12], |p| (p.key_lengths, p.causal) = (true, causal)));
        let mut operands = Data::random(&p, 5, 1.0);
        operands.key_lengths = Some(vec![37, 37, 5, 37]);
        let case = Case::new(p.clone(), operands);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                let plan = gpu.library().plan_with(&p, &way).unwrap();
                let got = run(gpu, &p, &way, &case.operands, |staged| {
                    let lengths = [u32::MAX, 38, 5, 1 << 31];
                    staged.operands.key_lengths = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&lengths)));
                });
                case.compare(&got, &plan);
            }
        }
    }
}

#[test]
fn garbage_boundaries_and_offsets_on_the_gpu_stay_inside_the_buffers() {
    let garbage: [[u32; 4]; 4] =
        [[u32::MAX; 4], [0, u32::MAX, 0, u32::MAX], [1 << 31, 5, 17, 3], [16, 15, 1 << 30, 1 << 31]];
    let packed = Packed { total_q: 17, total_kv: 20 };
    let p = problem([3, 2, 8, 9, 12], |p| (p.packed, p.causal) = (Some(packed), Causal::BottomRight));
    let p = p.with_layout(Layout::Bshd);
    for p in [lean(&p), p] {
        let operands = Data::random(&p, 5, 1.0);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                for cu in garbage {
                    run(gpu, &p, &way, &operands, |staged| {
                        staged.operands.cu_seqlens_q = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&cu)));
                        let other = [cu[1], cu[0], cu[3], cu[2]];
                        staged.operands.cu_seqlens_kv = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&other)));
                    });
                }
            }
        }
    }
    let p = problem([4, 2, 7, 37, 12], |p| (p.causal, p.window.left) = (Causal::Offset, Some(3)));
    for p in [lean(&p), p] {
        let operands = Data::random(&p, 5, 1.0);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                run(gpu, &p, &way, &operands, |staged| {
                    let offsets = [i32::MIN, i32::MAX, 0x7fc0_0000, -1];
                    staged.operands.offsets = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&offsets)));
                });
            }
        }
    }
}

#[test]
fn sequences_longer_than_promised_are_cut_at_the_promise() {
    let packed = Packed { total_q: 17, total_kv: 20 };
    let mut p = lean(&problem([2, 2, 5, 9, 12], |p| p.packed = Some(packed))).with_layout(Layout::Bshd);
    p.lse = false;
    let mut operands = Data::random(&p, 5, 1.0);
    (operands.cu_q, operands.cu_kv) = (Some(vec![0, 5, 5]), Some(vec![0, 9, 9]));
    let case = Case::new(p.clone(), operands);
    for gpu in gpus() {
        let plan = gpu.library().plan(&p).unwrap();
        let mut got = run(gpu, &p, &Options::default(), &case.operands, |staged| {
            staged.operands.cu_seqlens_q = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&[0u32, 17, 17])));
            staged.operands.cu_seqlens_kv = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&[0u32, 20, 20])));
        });
        // Rows that no sequence reaches keep what they held.
        assert!(got.out[5 * 24..].iter().all(|x| x.is_nan()));
        got.out[5 * 24..].fill(0.0);
        case.compare(&got, &plan);
    }
}

/// One `Prepared`, first with 7.0 in every token, then with 1.0 in those that the sequences own: the others keep what they held.
#[test]
fn tokens_that_no_sequence_owns_keep_what_they_held() {
    // Boundaries, and the tokens that they own where a sequence has at most 4: gaps before, between and after, sequences without
    // tokens, one that is too long, one that ends beyond the buffer.
    let calls: [([u32; 4], &[u32]); 5] = [
        ([0, 2, 2, 2], &[0, 1]),
        ([1, 3, 3, 6], &[1, 2, 3, 4, 5]),
        ([3, 3, 4, 4], &[3]),
        ([0, 7, 7, 7], &[0, 1, 2, 3]),
        ([6, 6, 6, u32::MAX], &[6]),
    ];
    let layouts = [Layout::Bhsd, Layout::Bshd];
    // Whole vectors, whole words, and rows that share a word with the next token's or head's.
    let kinds = [
        (Element::F32, 8, 0),
        (Element::F32, 5, 1),
        (Element::F16, 8, 0),
        (Element::F16, 6, 1),
        (Element::F16, 5, 0),
        (Element::F16, 3, 1),
        (Element::Bf16, 5, 1),
        (Element::Bf16, 1, 0),
    ];
    for (element, dim, layout) in kinds {
        let mut p = lean(&problem([3, 3, 4, 4, 8], |p| (p.element, p.value_dim) = (element, dim)));
        (p.packed, p.weights) = (Some(Packed { total_q: 7, total_kv: 7 }), dim == 5);
        p = p.with_layout(layouts[layout]);
        tokens_keep_what_they_held(&p, &calls);
        p.out = layouts[1 - layout];
        tokens_keep_what_they_held(&p, &calls);
    }
    // Enough for several dispatches of `pack`, each of which begins at a token of its own.
    let cu = [0, 4, 5, 9, 9, 12];
    let owned: Vec<u32> = (0..12).collect();
    let mut p = lean(&problem([5, 40, 4, 4, 4], |p| (p.element, p.value_dim) = (Element::F16, 5)));
    p.packed = Some(Packed { total_q: 25, total_kv: 25 });
    for gpu in gpus() {
        let gpu = &floor(gpu, 8192, 65535);
        let plan = gpu.library().plan(&p).unwrap();
        assert!(plan.steps().iter().filter(|step| step.variant.kernel() == "pack").count() > 2);
        keep_what_they_held(gpu, &p, &Options::default(), &[(&cu, &owned)]);
    }
}

fn tokens_keep_what_they_held(p: &Problem, calls: &[([u32; 4], &[u32])]) {
    let calls: Vec<_> = calls.iter().map(|(cu, owned)| (&cu[..], *owned)).collect();
    for gpu in gpus() {
        for way in ways(gpu, p) {
            keep_what_they_held(gpu, p, &way, &calls);
        }
    }
}

fn keep_what_they_held(gpu: &Gpu, p: &Problem, way: &Options, calls: &[(&[u32], &[u32])]) {
    let (device, queue) = (gpu.device(), gpu.queue());
    let plan = gpu.library().plan_with(p, way).unwrap();
    let prepared = gpu.library().prepare(&plan).unwrap();
    let shape = p.check().unwrap();
    let tokens = p.packed.unwrap().total_q;
    let call = |value: f32, cu: &[u32]| {
        let mut operands = Data::random(p, 5, 1.0);
        operands.v.fill(0..operands.v.len(), value);
        (operands.cu_q, operands.cu_kv) = (Some(cu.to_vec()), Some(cu.to_vec()));
        let staged = Staged::new(device, &plan, &operands);
        let mut encoder = device.create_command_encoder(&Default::default());
        prepared.encode(&mut encoder, &staged.buffers()).unwrap();
        queue.submit([encoder.finish()]);
        let [out, lse, ..] = staged.bytes(device, queue);
        (out.unwrap(), lse.map(|lse| bytemuck::pod_collect_to_vec::<u8, f32>(&lse)))
    };
    let full: Vec<u32> = (0..=p.batch).map(|b| (b * tokens).div_ceil(p.batch)).collect();
    for &(cu, owned) in calls {
        call(7.0, &full);
        let (out, lse) = call(1.0, cu);
        let size = p.element.bytes() as usize;
        let one: &[u8] = match p.element {
            Element::F32 => &1f32.to_ne_bytes(),
            Element::F16 => &half::f16::ONE.to_ne_bytes(),
            Element::Bf16 => &half::bf16::ONE.to_ne_bytes(),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        };
        for (h, t) in (0..p.heads).flat_map(|h| (0..tokens).map(move |t| (h, t))) {
            let at = shape.out().at(0, h, t) as usize;
            for d in 0..p.value_dim as usize {
                let got = &out[(at + d) * size..][..size];
                let near = |got: &[u8]| match p.element {
                    Element::F32 => (f32::from_ne_bytes(got.try_into().unwrap()) - 1.0).abs() < 1e-6,
                    _ => got == one,
                };
                let ok = if owned.contains(&t) { near(got) } else { got.iter().all(|&byte| byte == 0xff) };
                assert!(ok, "head {h}, token {t}, element {d} is {got:x?} under {cu:?}\n{p:?}\n{plan}");
            }
            if let Some(lse) = &lse {
                let got = lse[(h * tokens + t) as usize];
                assert_eq!(got.is_nan(), !owned.contains(&t), "lse of head {h}, token {t}: {got}\n{plan}");
            }
        }
    }
}

#[test]
fn outputs_of_sixteen_bits_stay_inside_their_buffer() {
    for (element, dim) in [(Element::F16, 5), (Element::Bf16, 12)] {
        let mut p = lean(&problem([1, 3, 5, 9, 8], |p| (p.element, p.value_dim) = (element, dim)));
        p.lse = true;
        let operands = Data::random(&p, 5, 1.0);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                run(gpu, &p, &way, &operands, |_| ());
            }
        }
    }
}
