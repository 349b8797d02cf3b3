//! Weights after a fused kernel: formed in place, from scores.

use std::time::Duration;

use wgpu_attention::internal::Step;
use wgpu_attention::internal::kernel::Variant;
use wgpu_attention::{Bias, Broadcast, Causal, Element, Kernel, Layout, Options, Packed, Problem, Window, with};

use crate::support::staged::Staged;
use crate::support::{Case, Data, Tensor, gpus, small};
use crate::{lean, problem, ways};

/// The same problem without logits: what fused kernels give out.
fn weighed(p: &Problem) -> Problem {
    let mut p = p.clone();
    p.logits = None;
    p
}

/// In every way on every adapter; at least one of them must form weights in place on those that run all kernels.
fn check(case: &Case, options: impl Fn(Options) -> Options) {
    for gpu in gpus() {
        let ways = ways(gpu, &case.problem);
        let many = ways.len() > 1;
        let mut formed = false;
        for way in ways {
            let (got, plan) = case.check(gpu, &options(way));
            let in_place = |step: &Step| matches!(step.variant, Variant::Softmax(x) if x.output);
            formed |= plan.steps().iter().any(in_place);
            assert!(got.weights.unwrap().iter().all(|x| !x.is_nan()));
        }
        assert!(formed || !many, "no fused kernel ran {:?}", case.problem);
    }
}

#[test]
fn weights_hold_with_every_rule_and_term() {
    // Whole vectors of four keys, which the lane form of scores writes, and not.
    for seq_kv in [68, 65] {
        for causal in [Causal::None, Causal::BottomRight, Causal::Offset] {
            let p = problem([2, 4, 33, seq_kv, 24], |p| {
                (p.causal, p.kv_heads, p.sinks, p.key_lengths) = (causal, 2, true, true);
                p.window = Window { left: Some(20), right: None };
            });
            check(&Case::random(weighed(&p), 3), |way| way);
        }
        let p = problem([2, 2, 9, seq_kv, 24], |p| {
            (p.softcap, p.alibi, p.causal) = (Some(1.5), true, Causal::TopLeft);
            p.mask = Some(Broadcast([1, 2, 9, seq_kv]));
            p.bias = Some(Bias { shape: Broadcast([2, 1, 9, seq_kv - 1]), element: Element::F16 });
        });
        check(&Case::random(weighed(&p), 4), |way| way);
    }
}

#[test]
fn weights_of_rows_that_see_nothing_and_of_packed_sequences_are_written_everywhere() {
    let p = problem([1, 2, 70, 8, 8], |p| p.causal = Causal::BottomRight);
    check(&Case::random(weighed(&p), 1), |way| way);
    let p = problem([3, 2, 8, 12, 12], |p| {
        (p.packed, p.causal) = (Some(Packed { total_q: 17, total_kv: 20 }), Causal::BottomRight);
        (p.element, p.value_dim) = (Element::Bf16, 7);
    });
    check(&Case::random(weighed(&p).with_layout(Layout::Bshd), 5), |way| way);
}

#[test]
fn weights_of_logits_far_from_zero_keep_their_sum() {
    // m + ln l is m here: l would be lost.
    let p = problem([1, 1, 3, 8, 4], |p| {
        p.bias = Some(Bias { shape: Broadcast([1, 1, 3, 8]), element: Element::F32 });
    });
    let p = weighed(&p);
    let mut operands = Data::random(&p, 2, 1.0);
    let mut bias = vec![f32::MIN; 24];
    bias[8..12].fill(f32::NEG_INFINITY);
    bias[16..24].fill(1e9);
    operands.bias = Some(Tensor::new(Element::F32, &bias));
    let case = Case::new(p, operands);
    assert_eq!(case.want.weights.as_ref().unwrap()[7..14], [0.125, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]);
    check(&case, |way| way);
}

/// Kernels round large logits differently. A key that a row sees alone weighs 1 all the same, because its logit and the maximum of the
/// row are the same number: both come from one kernel.
#[test]
fn a_key_that_a_row_sees_alone_weighs_one_however_large_its_logit_is() {
    for element in [Element::F32, Element::F16] {
        let p = weighed(&problem([1, 2, 40, 40, 64], |p| {
            (p.element, p.scale) = (element, Some(3.0));
            p.window = Window { left: Some(0), right: Some(0) };
        }));
        let case = Case::random(p, 8);
        for gpu in gpus() {
            for way in ways(gpu, &case.problem) {
                let (got, plan) = case.check(gpu, &way);
                for (place, weight) in got.weights.unwrap().into_iter().enumerate() {
                    let alone = f32::from(u8::from(place % 40 == place / 40 % 40));
                    assert!((weight - alone).abs() <= alone * f32::EPSILON, "{weight} at {place}: {plan}");
                }
            }
        }
    }
}

#[test]
fn weights_hold_in_parts_and_in_slices() {
    let p = problem([2, 4, 33, 68, 20], |p| (p.kv_heads, p.causal) = (2, Causal::BottomRight));
    let case = Case::random(weighed(&p), 3);
    check(&case, |way| with!(way, work_budget: Duration::from_nanos(2000)));
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 8192);
        for way in ways(&device, &case.problem) {
            let (_, plan) = case.check(&device, &way);
            assert!(plan.steps().iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 8192));
        }
    }
}

#[test]
fn weights_hold_after_a_merge_and_write_nothing_beside_them() {
    let p = weighed(&problem([1, 4, 2, 1604, 24], |p| (p.kv_heads, p.sinks) = (2, true)));
    let case = Case::random(p.clone(), 3);
    let split = with!(Options::default(), kernel: Some(Kernel::Split));
    if small("weights_hold_after_a_merge_and_write_nothing_beside_them") {
        return;
    }
    for gpu in gpus() {
        let plan = gpu.library().plan_with(&p, &split).unwrap();
        assert_eq!(plan.kernel(), "split+scores+softmax+merge");
        let staged = Staged::new(gpu.device(), &plan, &case.operands);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &staged.buffers()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        gpu.wait().unwrap();
        case.compare(&staged.outputs(gpu.device(), gpu.queue()), &plan);
        // Without weights the same problem has no second product.
        assert_eq!(gpu.library().plan_with(&lean(&p), &split).unwrap().kernel(), "split+merge");
    }
}
