//! Each stage through its output, at odd sizes, in both forms.

use wgpu_attention::{Causal, Logits, Window};

use crate::support::{Case, gpus, small};
use crate::{everywhere, lean, problem, ways};

/// The sizes at which tiles have a tail, or are missed or filled by one.
const PAIRS: [(u32, u32); 9] = [(1, 1), (1, 257), (7, 1), (7, 63), (63, 65), (65, 7), (65, 127), (127, 65), (257, 63)];

fn pairs(test: &str) -> &'static [(u32, u32)] {
    if small(&format!("{test}, at all sizes but three")) { &PAIRS[3..6] } else { &PAIRS }
}

#[test]
fn scores_softmax_and_values_hold_at_odd_sizes() {
    for &(seq_q, seq_kv) in pairs("scores_softmax_and_values_hold_at_odd_sizes") {
        for logits in [Logits::Raw, Logits::Capped, Logits::Masked] {
            let p = problem([1, 2, seq_q, seq_kv, 37], |p| {
                (p.logits, p.softcap, p.value_dim) = (Some(logits), Some(1.5), 20);
            });
            let case = Case::random(p, u64::from(seq_q * 1000 + seq_kv));
            everywhere(case);
        }
    }
}

#[test]
fn the_whole_holds_at_odd_sizes() {
    for &(seq_q, seq_kv) in pairs("the_whole_holds_at_odd_sizes") {
        for (causal, left) in [(Causal::None, None), (Causal::TopLeft, None), (Causal::BottomRight, Some(40))] {
            let p =
                problem([2, 2, seq_q, seq_kv, 32], |p| (p.causal, p.window) = (causal, Window { left, right: None }));
            let case = Case::random(lean(&p), u64::from(seq_q * 1000 + seq_kv));
            everywhere(case);
        }
    }
}

#[test]
fn a_peaked_softmax_keeps_its_digits() {
    // Logits of some tens to hundreds: most weights underflow, and the rest depend on every bit of the maximum.
    for scale in [3.0, -20.0] {
        let case = Case::random(problem([1, 3, 65, 127, 37], |p| p.scale = Some(scale)), 7);
        everywhere(case);
    }
}

#[test]
fn logits_far_from_zero_do_not_overflow() {
    // All logits near −300 or +300: a running maximum that starts at 0, or none, ends in 0/0 or inf/inf.
    for sign in [-1.0f32, 1.0] {
        let p = problem([1, 2, 9, 70, 8], |p| p.scale = Some(1.0));
        let mut case = Case::random(p.clone(), 3);
        for i in 0..case.operands.q.len() {
            case.operands.q.set(i, 6.0 + 0.01 * (i % 17) as f32);
        }
        for i in 0..case.operands.k.len() {
            case.operands.k.set(i, sign * (6.0 + 0.1 * (i % 13) as f32));
        }
        let case = Case::new(p, case.operands);
        everywhere(case);
    }
}

#[test]
fn the_default_scale_is_that_of_the_head_dim() {
    let case = Case::random(problem([1, 1, 7, 9, 16], |p| p.value_dim = 4), 5);
    assert_eq!(case.problem.check().unwrap().scale(), 0.25);
    everywhere(case);
}

#[test]
fn query_heads_share_key_heads_in_contiguous_groups() {
    for (heads, kv_heads) in [(6, 1), (6, 2), (6, 3)] {
        let case = Case::random(problem([2, heads, 7, 33, 12], |p| p.kv_heads = kv_heads), u64::from(kv_heads));
        everywhere(case);
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let p = problem([2, 3, 65, 257, 37], |p| (p.causal, p.sinks) = (Causal::BottomRight, true));
    for p in [lean(&p), p] {
        let case = Case::random(p, 11);
        for gpu in gpus() {
            for way in ways(gpu, &case.problem) {
                let ((first, _), (second, _)) = (case.check(gpu, &way), case.check(gpu, &way));
                assert_eq!(first, second);
            }
        }
    }
}
