//! Mask and bias in every broadcast pattern and type, alone and together; sinks, soft cap, ALiBi.

use wgpu_attention::{Bias, Broadcast, Element};

use crate::support::{Case, Data, Tensor, small};
use crate::{everywhere, problem};

const SIZES: [u32; 4] = [2, 3, 5, 9];

/// Every pattern of full and broadcast axes, and some with a short last axis.
fn patterns() -> Vec<Broadcast> {
    let whole = (0..16).map(|bits| [0, 1, 2, 3].map(|axis| if bits >> axis & 1 == 1 { SIZES[axis] } else { 1 }));
    let short = [[2, 3, 5, 7], [1, 1, 5, 4], [2, 1, 1, 2], [1, 3, 1, 8]];
    whole.chain(short).map(Broadcast).collect()
}

#[test]
fn masks_and_biases_broadcast_along_every_axis() {
    let mut all = patterns();
    if small("masks_and_biases_broadcast_along_every_axis, all patterns but six") {
        all = all.into_iter().step_by(3).collect();
    }
    for (n, shape) in all.into_iter().enumerate() {
        let other = patterns()[(n * 7 + 3) % 20];
        let biases = [Element::F32, Element::F16, Element::Bf16].map(|element| Some(Bias { shape, element }));
        let cases = [
            (Some(shape), None),
            (None, biases[0]),
            (None, biases[1]),
            (None, biases[2]),
            (Some(other), biases[n % 3]),
        ];
        for (mask, bias) in cases {
            let [batch, heads, seq_q, seq_kv] = SIZES;
            let p = problem([batch, heads, seq_q, seq_kv, 8], |p| (p.mask, p.bias) = (mask, bias));
            let case = Case::random(p, n as u64);
            everywhere(case);
        }
    }
}

#[test]
fn mask_and_bias_hold_on_several_tiles() {
    let p = problem([1, 2, 129, 131, 40], |p| {
        p.mask = Some(Broadcast([1, 1, 129, 131]));
        p.bias = Some(Bias { shape: Broadcast([1, 2, 129, 130]), element: Element::F16 });
    });
    let case = Case::random(p, 1);
    everywhere(case);
}

#[test]
fn a_row_of_the_lowest_biases_is_the_mean_of_the_values() {
    for element in [Element::F32, Element::Bf16] {
        let p = problem([1, 1, 3, 5, 4], |p| p.bias = Some(Bias { shape: Broadcast([1, 1, 3, 5]), element }));
        let mut operands = Data::random(&p, 2, 1.0);
        let lowest = if element == Element::F32 { f32::MIN } else { half::bf16::MIN.to_f32() };
        let mut bias = vec![lowest; 15];
        bias[5..10].fill(f32::NEG_INFINITY); // row 1 is hidden
        bias[11] = f32::NEG_INFINITY;
        operands.bias = Some(Tensor::new(element, &bias));
        let case = Case::new(p, operands);
        let mean = (0..5).map(|j| case.operands.v.elements().get(4 * j)).sum::<f64>() / 5.0;
        assert!((case.want.out[0] - mean).abs() < 1e-6 && case.want.out[4] == 0.0);
        assert_eq!(case.want.logits.as_ref().unwrap()[0], f64::from(lowest)); // the kernels write the very bits
        everywhere(case);
    }
}

#[test]
fn a_sum_that_overflows_stays_visible() {
    let p = problem([1, 1, 2, 4, 4], |p| {
        p.scale = Some(1.0);
        p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 4]), element: Element::F32 });
    });
    let mut operands = Data::random(&p, 2, 1.0);
    operands.q.fill(0..8, 1e19);
    operands.k.fill(0..16, -1e19);
    operands.bias = Some(Tensor::new(Element::F32, &[f32::MIN, f32::MIN, f32::NEG_INFINITY, f32::MIN]));
    let case = Case::new(p, operands);
    everywhere(case);
}

#[test]
fn the_cap_comes_before_slopes_and_bias() {
    // Scores well beyond the cap, and a bias well beyond it too.
    for cap in [0.5, 30.0] {
        let p = problem([1, 4, 7, 33, 8], |p| {
            (p.softcap, p.alibi, p.scale) = (Some(cap), true, Some(4.0));
            p.bias = Some(Bias { shape: Broadcast([1, 4, 7, 33]), element: Element::F32 });
        });
        let case = Case::random(p, 3);
        everywhere(case);
    }
}

#[test]
fn sinks_take_weight_and_join_the_lse() {
    for sinks in [[-50.0, 0.3, 50.0], [300.0, -300.0, 2.0]] {
        let p = problem([2, 3, 7, 33, 8], |p| (p.sinks, p.key_lengths) = (true, true));
        let mut operands = Data::random(&p, 3, 1.0);
        operands.sinks = Some(sinks.to_vec());
        operands.key_lengths = Some(vec![0, 31]);
        let case = Case::new(p, operands);
        everywhere(case);
    }
}
