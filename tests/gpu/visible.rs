//! Causal rules, windows, offsets and lengths.

use wgpu_attention::{Causal, Window};

use crate::support::{Case, Data, gpus, small};
use crate::{everywhere, lean, problem, ways};

const WINDOWS: [(Option<u32>, Option<u32>); 6] = [
    (None, None),
    (Some(0), Some(0)),
    (Some(3), None),
    (None, Some(2)),
    (Some(20), Some(1)),
    (Some(1 << 28), Some(1 << 28)),
];

#[test]
fn causal_rules_and_windows_hide_the_same_keys_as_the_reference() {
    let few = small("causal_rules_and_windows_hide_the_same_keys_as_the_reference, wide problems");
    for (seq_q, seq_kv) in [(7, 65), (65, 7), (33, 33)] {
        if few && seq_q != 7 {
            continue;
        }
        for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset] {
            for (left, right) in WINDOWS {
                let p = problem([4, 1, seq_q, seq_kv, 8], |p| {
                    (p.causal, p.window, p.alibi) = (causal, Window { left, right }, true);
                    p.key_lengths = causal != Causal::TopLeft;
                });
                let case = Case::random(p, u64::from(seq_q));
                everywhere(case);
            }
        }
    }
}

#[test]
fn offsets_may_be_negative_and_huge() {
    let p = problem([7, 2, 9, 40, 8], |p| {
        (p.causal, p.window.left) = (Causal::Offset, Some(12));
    });
    for (left, alibi) in [(Some(12), false), (None, false), (None, true)] {
        let mut p = p.clone();
        (p.window.left, p.alibi) = (left, alibi);
        let mut operands = Data::random(&p, 1, 1.0);
        operands.offsets = Some(vec![-3, 0, 30, -9, 1 << 30, i32::MIN, i32::MAX]);
        let case = Case::new(p, operands);
        everywhere(case);
    }
}

#[test]
fn lengths_hide_the_rest_and_move_the_bottom_right() {
    for causal in [Causal::None, Causal::BottomRight] {
        let p = problem([5, 2, 9, 41, 12], |p| (p.key_lengths, p.causal) = (true, causal));
        let mut operands = Data::random(&p, 1, 1.0);
        operands.key_lengths = Some(vec![0, 41, 1, 17, 40]);
        let case = Case::new(p, operands);
        everywhere(case);
    }
}

#[test]
fn rows_that_see_nothing_are_zero_with_no_weight() {
    let p = problem([1, 2, 70, 5, 8], |p| p.causal = Causal::BottomRight);
    for p in [lean(&p), p] {
        let case = Case::random(p, 1);
        assert_eq!((case.want.out[0], case.want.lse.as_ref().unwrap()[0]), (0.0, f64::NEG_INFINITY));
        for gpu in gpus() {
            for way in ways(gpu, &case.problem) {
                let (got, _) = case.check(gpu, &way);
                assert!(got.out[..64 * 8].iter().all(|&x| x.to_bits() << 1 == 0));
                assert_eq!(got.lse.unwrap()[64], f32::NEG_INFINITY);
            }
        }
    }
}

/// A cache of 24 keys that went on at its first row 1000 positions ago, with five slots that are still empty: what its window shows is
/// what a dense problem shows whose keys stand in the order of their positions.
#[test]
fn keys_of_a_circular_cache_are_seen_by_their_positions() {
    let dense = problem([1, 2, 3, 19, 12], |p| {
        (p.causal, p.alibi) = (Causal::BottomRight, true);
        p.window.left = Some(11);
    });
    let straight = Data::random(&dense, 3, 1.0);
    let mut ring = dense.clone();
    (ring.seq_kv, ring.key_positions, ring.causal) = (24, true, Causal::Offset);
    let mut rotated = Data::random(&ring, 3, 1.0);
    (rotated.q, rotated.slopes) = (straight.q.clone(), straight.slopes.clone());
    rotated.offsets = Some(vec![1016]);
    // The key at position 1000 + n stands in slot (7 + n) % 24.
    let mut positions = vec![-1; 24];
    for n in 0..19 {
        positions[(7 + n) % 24] = 1000 + n as i32;
        for head in 0..2 {
            for d in 0..12 {
                let [from, to] = [(head * 19 + n) * 12 + d, (head * 24 + (7 + n) % 24) * 12 + d];
                rotated.k.set(to, straight.k.elements().get(from) as f32);
                rotated.v.set(to, straight.v.elements().get(from) as f32);
            }
        }
    }
    rotated.key_positions = Some(positions);
    let (straight, rotated) = (Case::new(dense, straight), Case::new(ring, rotated));
    for (got, want) in rotated.want.out.iter().zip(&straight.want.out) {
        assert!((got - want).abs() < 1e-12, "{got} {want}");
    }
    everywhere(rotated);
}
