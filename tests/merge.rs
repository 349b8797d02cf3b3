//! Merging partial results on real drivers, against the f64 reference under a bound derived from the same data.

mod support;

use half::{bf16, f16};
use support::operations::take_turns;
use support::staged::Guarded;
use support::{Data, Random, floor, gpus};
use wgpu_attention::operations::{Merge, MergeBuffers, Operation};
use wgpu_attention::reference::{self, Comparisons};
use wgpu_attention::{
    Broadcast, Causal, Element, Elements, Error, Gpu, Inputs, Layout, Operands, Options, Problem, Strides, wgpu, with,
};

/// Partial results as other kernels would leave them.
struct Parts {
    out: Vec<f32>,
    lse: Vec<f32>,
    sinks: Option<Vec<f32>>,
}

impl Parts {
    /// One in five rows of a partial is empty and holds garbage; row 0 is empty in all of them.
    fn random(merge: &Merge, seed: u64, spread: f32) -> Parts {
        let mut r = Random(seed);
        let rows = (merge.batch * merge.heads * merge.seq_q) as usize;
        let dim = merge.value_dim as usize;
        let mut lse = r.signed_vec(merge.partials as usize * rows, spread);
        let mut out = r.signed_vec(lse.len() * dim, 2.0);
        for (place, lse) in lse.iter_mut().enumerate() {
            if place % rows == 0 || r.below(5) == 0 {
                *lse = f32::NEG_INFINITY;
                out[place * dim..][..dim].fill(if place % 2 == 0 { f32::NAN } else { f32::INFINITY });
            }
        }
        Parts { out, lse, sinks: merge.sinks.then(|| r.signed_vec(merge.heads as usize, spread)) }
    }

    fn run(&self, gpu: &Gpu, merge: &Merge) -> wgpu_attention::Result<wgpu_attention::Outputs> {
        gpu.merge(merge, &self.out, &self.lse, self.sinks.as_deref())
    }
}

/// Every finite number of a 16-bit type and those halfway to the next one away from 0, each with its neighbours in f32, both signs.
fn roundable(largest: u16, widen: impl Fn(u16) -> f32) -> Vec<f32> {
    let around = |x: f32| [x.to_bits().saturating_sub(1), x.to_bits(), x.to_bits() + 1].map(f32::from_bits);
    let both = |bits: u16| {
        // What comes after the largest one is as far from it as the one before.
        let next = if bits == largest { 2.0 * widen(bits) - widen(bits - 1) } else { widen(bits + 1) };
        [around(widen(bits)), around((widen(bits) + next.min(f32::MAX)) / 2.0)].concat()
    };
    // Numbers below the normal ones of f32 may be flushed to 0.
    let numbers = (0..=largest).flat_map(both).filter(|&x| x == 0.0 || x.is_normal());
    numbers.flat_map(|x| [x, -x]).collect()
}

#[test]
fn sixteen_bit_outputs_are_rounded_to_the_nearest_and_ties_to_even_bit_for_bit() {
    for element in [Element::F16, Element::Bf16] {
        let mut numbers = match element {
            Element::F16 => roundable(f16::MAX.to_bits(), |bits| f16::from_bits(bits).to_f32()),
            _ => roundable(bf16::MAX.to_bits(), |bits| bf16::from_bits(bits).to_f32()),
        };
        // Every size, far beyond the type's own on both sides.
        numbers.extend((-126..128).flat_map(|e| [2f32.powi(e), -1.75 * 2f32.powi(e)]));
        let rows = numbers.len().div_ceil(64) as u32;
        numbers.resize(64 * rows as usize, 0.0);
        // A single partial of lse 0 has a weight of 1: the output is its rounded self.
        let mut merge = Merge::new(1, 1, 1, rows, 64);
        merge.element = element;
        let rounded = |&x: &f32| match element {
            Element::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        };
        let parts = Parts { lse: vec![0.0; rows as usize], out: numbers, sinks: None };
        for gpu in gpus() {
            let got = parts.run(gpu, &merge).unwrap().out;
            for (x, got) in parts.out.iter().zip(got) {
                assert_eq!(got, rounded(x), "{x:e} ({:#010x}) as {element} on {}", x.to_bits(), gpu.name);
            }
        }
    }
}

fn check(gpu: &Gpu, merge: &Merge, parts: &Parts) -> Comparisons {
    let got = parts.run(gpu, merge).unwrap_or_else(|error| panic!("{error}: {merge:?}"));
    let found = reference::compare_merge(merge, &parts.out, &parts.lse, parts.sinks.as_deref(), &got);
    let found = found.unwrap_or_else(|error| panic!("{error}: {merge:?}"));
    assert!(found.passed(), "on {}: {merge:?}\n{found}", gpu.info().name);
    found
}

#[test]
fn parts_merge_as_the_reference_merges_them() {
    for gpu in gpus() {
        for (i, (partials, seq_q, dim)) in
            [(1, 5, 8), (2, 1, 128), (3, 33, 7), (5, 13, 20), (17, 3, 1), (4, 2, 512)].into_iter().enumerate()
        {
            for element in [Element::F32, Element::F16, Element::Bf16] {
                for layout in [Layout::Bhsd, Layout::Bshd] {
                    let mut merge = Merge::new(partials, 2, 3, seq_q, dim);
                    (merge.element, merge.out, merge.sinks) = (element, layout, i % 2 == 1);
                    merge.lse = i != 2;
                    check(gpu, &merge, &Parts::random(&merge, i as u64, 4.0));
                }
            }
        }
    }
}

#[test]
fn far_apart_and_far_out_sums_stay_exact() {
    for gpu in gpus() {
        for spread in [1e-3, 200.0, 1e5, 3e38] {
            let mut merge = Merge::new(4, 1, 2, 20, 16);
            merge.sinks = spread < 1e6;
            let found = check(gpu, &merge, &Parts::random(&merge, 40, spread));
            if spread > 1e30 {
                // One partial has all the weight.
                assert_eq!(found.get("out").expect("always there").budget.max_error, 0.0, "{found}");
            }
        }
        // Rows that are all low by bias are ordinary rows: their partials weigh alike.
        let merge = Merge::new(3, 1, 1, 1, 4);
        let parts = Parts { out: (0..12).map(|x| x as f32).collect(), lse: vec![f32::MIN; 3], sinks: None };
        check(gpu, &merge, &parts);
    }
}

#[test]
fn between_strided_rows_the_output_is_zero() {
    for gpu in gpus() {
        let mut merge = Merge::new(2, 2, 3, 5, 4);
        merge.out = Layout::Strided(Strides { offset: 8, batch: 200, head: 8, row: 32 });
        let parts = Parts::random(&merge, 50, 2.0);
        check(gpu, &merge, &parts);
        let got = parts.run(gpu, &merge).expect("valid").out;
        assert_eq!([&got[..8], &got[12..16]].concat(), [0.0; 12], "written between the rows");
    }
}

#[test]
fn empty_rows_are_zero_and_a_nan_stays_in_its_row() {
    for gpu in gpus() {
        let merge = Merge::new(2, 1, 1, 3, 4);
        let (inf, nan) = (f32::NEG_INFINITY, f32::NAN);
        let parts = Parts {
            out: [[nan; 4], [1.0; 4], [2.0; 4], [nan; 4], [nan; 4], [4.0; 4]].concat(),
            lse: vec![inf, 0.5, nan, inf, inf, 0.0],
            sinks: None,
        };
        let got = parts.run(gpu, &merge).expect("valid");
        let lse = got.lse.expect("asked for");
        assert_eq!((&got.out[..4], lse[0]), (&[0.0; 4][..], inf));
        assert_eq!((&got.out[4..8], lse[1]), (&[1.0; 4][..], 0.5));
        assert!(got.out[8..].iter().all(|x| x.is_nan()) && lse[2].is_nan());
    }
}

#[test]
fn every_split_happens_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 4096, 3);
        for (element, dim) in [(Element::F32, 20), (Element::F32, 7), (Element::F16, 20), (Element::Bf16, 9)] {
            // A partial is 2·3·70 rows: neither its outputs nor its log-sum-exps of one head fit a binding with the next one's.
            let mut merge = Merge::new(5, 2, 3, 70, dim);
            (merge.element, merge.sinks) = (element, true);
            let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
            let steps = merge.plan(gpu.library().caps(), &options).expect("splits");
            assert!(steps.iter().all(|step| step.grid.iter().all(|&side| side <= 3)));
            assert!(steps.iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 4096));
            for first in 0..5 {
                assert!(steps.iter().any(|step| step.uniform["partial0"] == first), "partials are split");
            }
            let rows_split = steps.iter().any(|step| step.uniform.place().row0 > 0);
            assert_eq!(rows_split, 4 * 70 * dim > 4096, "rows are split where those of one head exceed a binding");
            assert!(steps.iter().any(|step| step.uniform.place().head0 > 0), "heads are split");
            check(gpu, &merge, &Parts::random(&merge, 60, 3.0));
        }
    }
}

/// Attention over parts of the keys, merged, is attention over all of them: with sinks and a causal rule whose offset moves.
#[test]
fn parts_of_the_keys_merge_into_the_whole() {
    for gpu in gpus() {
        let mut whole = Problem::new(2, 4, 19, 50, 16);
        (whole.kv_heads, whole.causal, whole.sinks, whole.lse) = (2, Causal::BottomRight, true, true);
        whole.mask = Some(Broadcast([1, 1, 1, 50]));
        let data = Data::random(&whole, 70, 3.0);
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        let bounds = [0usize, 7, 7 + 24, 50];
        for part in bounds.windows(2) {
            let keys = part[1] - part[0];
            let rows = |x: &[f32]| -> Vec<f32> {
                x.chunks_exact(50 * 16).flat_map(|head| &head[part[0] * 16..part[1] * 16]).copied().collect()
            };
            let (k, v) = (rows(data.k.f32()), rows(data.v.f32()));
            let mut problem = Problem::new(2, 4, 19, keys as u32, 16);
            (problem.kv_heads, problem.causal, problem.lse) = (2, Causal::Offset, true);
            problem.mask = Some(Broadcast([1, 1, 1, keys as u32]));
            let mask = data.mask.as_ref().expect("asked for");
            let offsets = [50 - 19 - part[0] as i32; 2];
            let operands =
                with!(Operands::default(), mask: Some(mask[part[0]..part[1]].into()), offsets: Some((&offsets).into()));
            let inputs = with!(Inputs::new(data.q.elements(), Elements::F32(&k), Elements::F32(&v)), operands);
            let got = gpu.attention(&problem, &inputs).expect("valid");
            out.extend(got.out);
            lse.extend(got.lse.expect("asked for"));
        }
        let mut merge = Merge::new(3, 2, 4, 19, 16);
        merge.sinks = true;
        let got = gpu.merge(&merge, &out, &lse, data.sinks.as_deref()).expect("valid");
        let (want, budget) = reference::attention_with_budget(&whole, &data.inputs()).expect("valid");
        let shape = whole.check().expect("valid");
        // Each partial may use the whole problem's budget, the merge as much again.
        let double = |mut tolerance: reference::Tolerance| {
            tolerance.atol.iter_mut().for_each(|atol| *atol *= 2.0);
            tolerance
        };
        let budget = reference::Budget { out: double(budget.out), lse: double(budget.lse), ..budget };
        let compared = budget.compare_out(&shape, &got.out, &want.out);
        assert!(compared.passed(), "out: {compared}");
        let compared = budget.lse.check(&got.lse.expect("asked for"), &want.lse.expect("asked for"));
        assert!(compared.passed(), "lse: {compared}");
    }
}

#[test]
fn calls_of_one_merge_take_turns() {
    let mut merge = Merge::new(4, 2, 3, 33, 7);
    (merge.element, merge.sinks) = (Element::Bf16, true);
    let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
    for gpu in gpus() {
        let operation = gpu.library().merge(&merge, &options).expect("compiles");
        assert!(operation.slices() > 2);
        let stage = |seed| {
            let parts = Parts::random(&merge, seed, 4.0);
            let sinks = parts.sinks.expect("asked for");
            let operands = [&parts.out, &parts.lse, &sinks].map(|x| bytemuck::cast_slice(x));
            let outputs = [&[0xff; 2 * 2 * 3 * 33 * 7][..], &[0xff; 4 * 2 * 3 * 33]];
            let staged = |bytes: &[u8]| Guarded::new(gpu.device(), bytes);
            (operands.map(staged), outputs.map(staged))
        };
        type Staged = ([Guarded; 3], [Guarded; 2]);
        fn buffers(([partial_out, partial_lse, sinks], [out, lse]): &Staged) -> MergeBuffers<'_> {
            let mut buffers = MergeBuffers::new(partial_out.slice(), partial_lse.slice(), out.slice());
            (buffers.sinks, buffers.lse) = (Some(sinks.slice()), Some(lse.slice()));
            buffers
        }
        let read = |(_, outputs): &Staged| outputs.each_ref().map(|output| output.read(gpu.device(), gpu.queue()));
        let calls = [(); 2].map(|()| operation.begin().expect("fits"));
        let record = calls.each_ref().map(|call| {
            move |slice, encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
                call.encode_slice(slice, encoder, &buffers(staged)).expect("valid");
            }
        });
        let whole = |encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
            operation.encode(encoder, &buffers(staged)).expect("valid");
        };
        take_turns(gpu, operation.slices(), &stage, &read, &whole, [&record[0], &record[1]]);
    }
}

#[test]
fn without_a_partial_rows_are_empty_and_without_a_row_so_are_the_outputs() {
    for gpu in gpus() {
        let small = floor(gpu, 4096, 3);
        for gpu in [&**gpu, &small] {
            for [partials, batch, seq_q] in [[0, 2, 3], [0, 2, 170], [2, 0, 3], [2, 2, 0], [0, 0, 0]] {
                for (element, value_dim) in
                    [(Element::F32, 4), (Element::F32, 5), (Element::F16, 8), (Element::Bf16, 5)]
                {
                    for sinks in [false, true] {
                        let mut merge = Merge::new(partials, batch, 2, seq_q, value_dim);
                        (merge.element, merge.sinks) = (element, sinks);
                        let rows = (batch * 2 * seq_q) as usize;
                        let all = partials as usize * rows;
                        let (out, lse) = (vec![f32::NAN; all * value_dim as usize], vec![f32::NAN; all]);
                        let given = [1.5, -2.0];
                        let got = gpu.merge(&merge, &out, &lse, sinks.then_some(&given)).expect("valid");
                        assert_eq!(got.out, vec![0.0; rows * value_dim as usize], "{merge:?}");
                        let head = |line: usize| line / seq_q as usize % 2;
                        let each = |line| if sinks { given[head(line)] } else { f32::NEG_INFINITY };
                        let want: Vec<f32> = (0..rows).map(each).collect();
                        assert_eq!(got.lse, Some(want), "{merge:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn descriptions_that_cannot_be_are_errors() {
    let check = |set: fn(&mut Merge)| {
        let mut merge = Merge::new(2, 2, 2, 2, 4);
        set(&mut merge);
        merge.check()
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert_eq!(check(|m| m.heads = 0), Err(Error::Zero { field: "heads" }));
    assert_eq!(check(|m| m.value_dim = 0), Err(Error::Zero { field: "value_dim" }));
    assert_eq!(check(|m| m.value_dim = 513), Err(Error::TooLarge { field: "value_dim", value: 513, limit: 512 }));
    let error = check(|m| (m.partials, m.batch, m.heads) = (1 << 28, 1 << 28, 1 << 28));
    assert!(matches!(error, Err(Error::Room { field: "partial_out", unit: "elements", .. })), "{error:?}");
    let error = check(|m| m.out = Layout::Strided(Strides { offset: 0, batch: 16, head: 3, row: 8 }));
    assert_eq!(error, Err(Error::Overlap { field: "out", strides: [16, 3, 8], sizes: [2, 2, 2, 4] }));
    let gpu = &gpus()[0];
    let mut odd = Merge::new(1, 1, 1, 3, 5);
    (odd.element, odd.out) = (Element::F16, Layout::Strided(Strides { offset: 0, batch: 0, head: 0, row: 7 }));
    let error = gpu.library().merge(&odd, &Options::default()).map(|_| ());
    assert!(matches!(error, Err(Error::Conflict { left: "element", right: "out", .. })), "{error:?}");
}

#[test]
fn wrong_operands_and_buffers_are_errors() {
    let gpu = &gpus()[0];
    let mut merge = Merge::new(2, 1, 1, 4, 4);
    let run = |merge: &Merge, out: usize, lse: usize, sinks: Option<&[f32]>| {
        gpu.merge(merge, &vec![0.0; out], &vec![0.0; lse], sinks).map(|_| ())
    };
    assert_eq!(run(&merge, 32, 8, None), Ok(()));
    assert_eq!(run(&merge, 31, 8, None), Err(Error::Length { field: "partial_out", got: 31, want: 32 }));
    assert_eq!(run(&merge, 32, 4, None), Err(Error::Length { field: "partial_lse", got: 4, want: 8 }));
    assert_eq!(run(&merge, 32, 8, Some(&[0.0])), Err(Error::Unexpected { field: "sinks" }));
    merge.sinks = true;
    assert_eq!(run(&merge, 32, 8, None), Err(Error::Missing { field: "sinks" }));
    assert_eq!(run(&merge, 32, 8, Some(&[0.0; 2])), Err(Error::Length { field: "sinks", got: 2, want: 1 }));

    merge.sinks = false;
    let operation = gpu.library().merge(&merge, &Options::default()).expect("compiles");
    let make = |size, usage| {
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let storage = wgpu::BufferUsages::STORAGE;
    let buffers = [make(128, storage), make(1024, storage), make(64, storage), make(16, storage)];
    let [out, lse] = [buffers[2].slice(..), buffers[3].slice(..)];
    let mut good = MergeBuffers::new(buffers[0].slice(..), buffers[1].slice(..), out);
    let encode = |operation: &Operation<Merge>, given: &MergeBuffers<'_>| {
        operation.encode(&mut gpu.device().create_command_encoder(&Default::default()), given)
    };
    assert_eq!(encode(&operation, &good), Err(Error::Missing { field: "lse" }));
    good.lse = Some(lse);
    assert_eq!(encode(&operation, &good), Ok(()));
    let with_out = |buffer: &wgpu::Buffer| {
        let mut wrong = MergeBuffers::new(good.partial_out, good.partial_lse, buffer.slice(..));
        wrong.lse = good.lse;
        encode(&operation, &wrong)
    };
    let (short, plain) = (make(60, storage), make(64, wgpu::BufferUsages::COPY_SRC));
    assert_eq!(with_out(&short), Err(Error::BufferSize { field: "out", got: 60, want: 64 }));
    assert_eq!(with_out(&plain), Err(Error::BufferUsage { field: "out", usage: "STORAGE" }));
    assert_eq!(with_out(&buffers[0]), Err(Error::Aliased { output: "out", other: "partial_out" }));
    let mut odd = good;
    odd.partial_lse = buffers[1].slice(4..);
    assert!(matches!(encode(&operation, &odd), Err(Error::BufferOffset { field: "partial_lse", offset: 4, .. })));
    merge.sinks = true;
    let with_sinks = gpu.library().merge(&merge, &Options::default()).expect("compiles");
    assert_eq!(encode(&with_sinks, &good), Err(Error::Missing { field: "sinks" }));
}
