//! What hidden keys and values hold reaches nobody, and what lengths on the GPU say leaves no buffer.

use wgpu_attention::{Broadcast, Causal, Element, Layout, Options, Outputs, Packed, Problem};

use crate::support::staged::{Guarded, Staged};
use crate::support::{Adapter, Case, Data, gpus};
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
                    staged.key_lengths = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&lengths)));
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
                        staged.cu_q = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&cu)));
                        let other = [cu[1], cu[0], cu[3], cu[2]];
                        staged.cu_kv = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&other)));
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
                    staged.offsets = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&offsets)));
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
            staged.cu_q = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&[0u32, 17, 17])));
            staged.cu_kv = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&[0u32, 20, 20])));
        });
        // Rows that no sequence reaches keep what they held.
        assert!(got.out[5 * 24..].iter().all(|x| x.is_nan()));
        got.out[5 * 24..].fill(0.0);
        case.compare(&got, &plan);
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
