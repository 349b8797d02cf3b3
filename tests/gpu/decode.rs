//! Few queries over many keys: `split`, and `merge` where several workgroups share the keys of a row.

use wgpu_attention::{Bias, Broadcast, Causal, Element, Form, Kernel, Options, Window, with};

use crate::support::{Case, Data, Tensor, checked, gpus, is_small};
use crate::{problem, ways};

fn split() -> Options {
    with!(Options::default(), kernel: Some(Kernel::Split))
}

#[test]
fn keys_shared_by_workgroups_are_merged_exactly() {
    // batch, heads, key/value heads, seq_q, head_dim, value_dim
    let shapes = [
        [1, 1, 1, 1, 64, 64],
        [2, 4, 1, 1, 80, 48],
        [1, 6, 2, 3, 128, 128],
        [1, 2, 2, 1, 200, 256],
        [3, 5, 1, 2, 7, 9],
        [1, 2, 1, 9, 33, 66],
    ];
    for element in [Element::F32, Element::F16, Element::Bf16] {
        for [batch, heads, kv_heads, seq_q, head_dim, value_dim] in shapes {
            let p = problem([batch, heads, seq_q, 1601, head_dim], |p| {
                (p.element, p.kv_heads, p.value_dim) = (element, kv_heads, value_dim);
                (p.lse, p.sinks, p.weights, p.logits) = (true, true, false, None);
                p.causal = Causal::BottomRight;
            });
            let case = Case::random(p, 3);
            for gpu in gpus() {
                let (_, plan) = case.check(gpu, &split());
                assert!(plan.kernel().starts_with("split+merge"), "{plan}");
                assert!(plan.steps()[0].uniform.place().col_tiles > 1, "{plan}");
            }
            if is_small() && seq_q == 3 {
                break;
            }
        }
    }
}

#[test]
fn parts_without_a_visible_key_count_nothing() {
    // One sequence sees keys of the last part only, one of the first, one none at all.
    let p = problem([3, 2, 2, 1601, 24], |p| {
        (p.lse, p.weights, p.logits) = (true, false, None);
        (p.key_lengths, p.causal, p.window) = (true, Causal::Offset, Window { left: Some(4), right: None });
    });
    let mut operands = Data::random(&p, 5, 1.0);
    operands.key_lengths = Some(vec![1601, 1601, 0]);
    operands.offsets = Some(vec![1598, 2, 40]);
    let case = Case::new(p, operands);
    for gpu in gpus() {
        case.check(gpu, &split());
    }
}

/// The lowest of all biases at every key: each weighs the same, however many a part has. m + ln l would not tell two parts apart.
#[test]
fn parts_of_large_logits_count_by_the_number_of_their_keys() {
    for (value_dim, lowest) in [(24, f32::MIN), (1, 3e7)] {
        let p = problem([1, 2, 2, 1601, 24], |p| {
            (p.value_dim, p.lse, p.weights, p.logits) = (value_dim, true, false, None);
            p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 1601]), element: Element::F32 });
            p.scale = Some(0.0);
        });
        let mut operands = Data::random(&p, 5, 1.0);
        // Two of three parts have few keys, or none.
        let bias: Vec<f32> =
            (0..1601).map(|key| if key < 600 || key == 900 { lowest } else { f32::NEG_INFINITY }).collect();
        operands.bias = Some(Tensor::new(Element::F32, &bias));
        let case = Case::new(p, operands);
        for gpu in gpus() {
            let (_, plan) = case.check(gpu, &split());
            assert!(plan.steps()[0].uniform.place().col_tiles > 1, "{plan}");
        }
    }
}

/// A part of which every logit is −∞ weighs nothing beside another part or a sink, but 0 · ∞ is NaN in the elements of infinite values.
#[test]
fn infinite_values_show_in_a_part_that_weighs_nothing() {
    for (sinks, keys, nan) in [(true, 1, 2), (true, 600, 2), (false, 600, 2), (false, 1, 2 * 21)] {
        for element in [Element::F32, Element::F16] {
            let p = problem([1, 4, 1, 1601, 24], |p| {
                (p.kv_heads, p.value_dim, p.element, p.lse) = (2, 21, element, true);
                (p.sinks, p.weights, p.logits, p.key_lengths) = (sinks, false, None, true);
            });
            let mut data = Data::random(&p, 5, 1.0);
            data.key_lengths = Some(vec![if keys == 1 { 1 } else { 1601 }]);
            // The queries are positive in their first lane, where the first keys hold −∞.
            for head in 0..4 {
                data.q.set(head * 24, 1.0);
            }
            for key in 0..keys {
                data.k.set(key * 24, f32::NEG_INFINITY);
            }
            data.v.set(20, f32::INFINITY);
            let case = Case::new(p, data);
            assert_eq!(case.want.out.iter().filter(|x| x.is_nan()).count(), nan);
            for gpu in gpus() {
                // With runtime checks, llvmpipe does not unroll the loops of emulated matrices, and ends them before so many keys.
                let runs = |way: &Options| way.form != Some(Form::Emulated) || !checked();
                for way in ways(gpu, &case.problem).into_iter().filter(runs) {
                    case.check(gpu, &way);
                }
            }
        }
    }
}

#[test]
fn a_batch_invariant_plan_gives_a_sequence_the_same_bits_in_any_company() {
    let of = |batch| problem([batch, 4, 1, 1601, 64], |p| (p.kv_heads, p.weights, p.logits) = (2, false, None));
    let options = with!(split(), batch_invariant: true);
    let three = Data::random(&of(3), 8, 1.0);
    let mut one = Data::random(&of(1), 8, 1.0);
    // The sequence on its own is the last of the three.
    for (alone, all) in [(&mut one.q, &three.q), (&mut one.k, &three.k), (&mut one.v, &three.v)] {
        let n = alone.len();
        let last = all.f32()[2 * n..].to_vec();
        last.into_iter().enumerate().for_each(|(i, x)| alone.set(i, x));
    }
    for gpu in gpus() {
        let [alone, all] = [(of(1), &one), (of(3), &three)]
            .map(|(p, operands)| gpu.attention_with(&p, &operands.inputs(), &options).unwrap());
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let n = alone.out.len();
        assert_eq!(bits(&alone.out), bits(&all.out[2 * n..]));
    }
}
