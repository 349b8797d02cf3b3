//! A NaN or an infinity that a row sees shows in what depends on it, as IEEE arithmetic has it, and nowhere else.

use half::{bf16, f16};
use wgpu_attention::{Bias, Broadcast, Causal, Element, Problem};

use crate::support::staged::{Guarded, Staged};
use crate::support::{Case, Data, Tensor, gpus};
use crate::{everywhere, lean, problem, ways};

const KINDS: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// 37 rows and keys, so that tiles have tails, and two query heads to a key/value head.
fn causal(element: Element, dims: u32, set: impl FnOnce(&mut Problem)) -> Problem {
    problem([1, 4, 37, 41, dims], |p| {
        (p.element, p.kv_heads, p.causal) = (element, 2, Causal::TopLeft);
        set(p);
    })
}

/// Puts a number into an element of q, k or v.
fn put(p: &Problem, data: &mut Data, operand: &str, head: u32, row: u32, dim: u32, x: f32) {
    let shape = p.check().unwrap();
    let (tensor, of) = match operand {
        "q" => (&mut data.q, shape.q()),
        "k" => (&mut data.k, shape.k()),
        _ => (&mut data.v, shape.v()),
    };
    tensor.set((of.at(0, head, row) + u64::from(dim)) as usize, x);
}

/// The outputs that are not finite, so that a test knows that there are some.
fn shows(case: &Case) -> usize {
    case.want.out.iter().filter(|x| !x.is_finite()).count()
}

#[test]
fn one_element_of_q_k_or_v_shows_in_its_rows() {
    for softcap in [None, Some(2.0)] {
        let p = causal(Element::F32, 20, |p| p.softcap = softcap);
        for (operand, row, dim) in [("q", 5, 19), ("q", 36, 0), ("k", 0, 3), ("k", 20, 18), ("v", 9, 0), ("v", 33, 19)]
        {
            for x in KINDS {
                let mut data = Data::random(&p, 3, 1.0);
                put(&p, &mut data, operand, 1, row, dim, x);
                let case = Case::new(p.clone(), data);
                // A soft cap makes finite scores of infinite ones.
                let capped = softcap.is_some() && x.is_infinite() && operand != "v";
                assert_eq!(shows(&case) == 0, capped, "{operand} {row} {x}");
                everywhere(case);
            }
        }
    }
}

#[test]
fn elements_of_sixteen_bits_show_too() {
    for element in [Element::F16, Element::Bf16] {
        let p = lean(&causal(element, 18, |p| p.value_dim = 36));
        for x in KINDS {
            let mut data = Data::random(&p, 4, 1.0);
            put(&p, &mut data, "q", 0, 7, 17, x);
            put(&p, &mut data, "k", 1, 11, 1, x);
            put(&p, &mut data, "v", 0, 2, 35, x);
            let case = Case::new(p.clone(), data);
            assert!(shows(&case) > 0);
            everywhere(case);
        }
    }
}

#[test]
fn many_dims_and_many_bad_elements_show() {
    for (dims, softcap) in [(64, None), (100, Some(3.0))] {
        let p = lean(&causal(Element::F32, dims, |p| p.softcap = softcap));
        let mut data = Data::random(&p, 5, 1.0);
        for n in 0..6 {
            put(&p, &mut data, "v", n % 2, 5 * n + 3, (n * 37 + 11) % dims, KINDS[n as usize % 3]);
        }
        put(&p, &mut data, "k", 0, 30, dims - 1, f32::INFINITY);
        put(&p, &mut data, "q", 3, 12, dims / 2, f32::NEG_INFINITY);
        put(&p, &mut data, "v", 0, 30, 2, f32::INFINITY);
        let case = Case::new(p, data);
        assert!(shows(&case) > 20);
        everywhere(case);
    }
}

#[test]
fn rows_of_infinities_alone_have_no_result() {
    // All products are −∞: every logit is, and 0 / 0 is NaN. With a sink, its weight is all there is.
    for sinks in [false, true] {
        let p = causal(Element::F32, 8, |p| p.sinks = sinks);
        let mut data = Data::random(&p, 6, 1.0);
        let shape = p.check().unwrap();
        for key in 0..41 {
            let at = shape.k().at(0, 0, key) as usize;
            data.k.fill(at..at + 8, -1.0);
        }
        put(&p, &mut data, "q", 1, 20, 3, f32::INFINITY);
        let case = Case::new(p, data);
        assert_eq!(shows(&case), if sinks { 0 } else { 8 });
        everywhere(case);
    }
}

#[test]
fn a_bias_shows_unless_it_is_minus_infinity() {
    for element in [Element::F32, Element::F16, Element::Bf16] {
        for (softcap, x) in [(None, f32::NAN), (Some(2.0), f32::INFINITY)] {
            let bias = Bias { shape: Broadcast([1, 1, 37, 41]), element };
            let p = causal(Element::F32, 12, |p| (p.bias, p.softcap) = (Some(bias), softcap));
            let mut data = Data::random(&p, 7, 1.0);
            data.bias.as_mut().unwrap().set(17 * 41 + 11, x);
            // Hidden by the causal rule.
            data.bias.as_mut().unwrap().set(18 * 41 + 40, x);
            let case = Case::new(p, data);
            assert_eq!(shows(&case), 4 * 12);
            everywhere(case);
        }
    }
}

#[test]
fn sinks_and_slopes_on_the_gpu_show() {
    // Host slices of them must be finite; buffers are not looked at. One head each: the others keep their numbers.
    let p = lean(&problem([1, 3, 9, 13, 12], |p| (p.sinks, p.alibi) = (true, true)));
    let data = Data::random(&p, 8, 1.0);
    for (x, minus) in [(f32::NAN, false), (f32::INFINITY, false), (f32::NEG_INFINITY, true)] {
        for slopes in [false, true] {
            // A sink of −∞ is none: as low as this, it weighs nothing either.
            let mut clean = data.clone();
            if minus && !slopes {
                clean.sinks.as_mut().unwrap()[1] = -1e30;
            }
            let case = Case::new(p.clone(), clean);
            for gpu in gpus() {
                for way in ways(gpu, &p) {
                    let plan = gpu.library().plan_with(&p, &way).unwrap();
                    let mut staged = Staged::new(gpu.device(), &plan, &data);
                    let mut values = if slopes { &data.slopes } else { &data.sinks }.clone().unwrap();
                    values[1] = x;
                    let buffer = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&values)));
                    if slopes {
                        staged.operands.alibi_slopes = buffer
                    } else {
                        staged.operands.sinks = buffer
                    }
                    let mut encoder = gpu.device().create_command_encoder(&Default::default());
                    gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &staged.buffers()).unwrap();
                    gpu.queue().submit([encoder.finish()]);
                    gpu.wait().unwrap();
                    let mut got = staged.outputs(gpu.device(), gpu.queue());
                    if slopes || !minus {
                        // 0 · ∞ at distance 0, which every row but those beyond the keys has, is NaN.
                        for row in 9..18 {
                            assert!(got.out[row * 12..][..12].iter().all(|x| x.is_nan()), "{x} {row}\n{plan}");
                            let lse = got.lse.as_mut().unwrap();
                            assert_eq!(lse[row].is_nan(), slopes || x.is_nan(), "{x} {} {row}\n{plan}", lse[row]);
                            lse[row] = case.want.lse.as_ref().unwrap()[row] as f32;
                        }
                        (108..216).for_each(|n| got.out[n] = case.want.out[n] as f32);
                    }
                    case.compare(&got, &plan);
                }
            }
        }
    }
}

#[test]
fn infinities_keep_their_sign_in_sixteen_bits() {
    for element in [Element::F16, Element::Bf16] {
        // One key: the output is its value.
        let p = lean(&problem([1, 1, 3, 1, 4], |p| (p.element, p.value_dim) = (element, 5)));
        let mut data = Data::random(&p, 9, 1.0);
        for (n, x) in KINDS.into_iter().enumerate() {
            data.v.set(n, x);
        }
        let case = Case::new(p.clone(), data);
        let largest = if element == Element::F16 { f16::INFINITY.to_f64() } else { bf16::INFINITY.to_f64() };
        assert!(case.want.out[0].is_nan() && case.want.out[1] == largest && case.want.out[2] == -largest);
        everywhere(case);
    }
}

/// The lowest finite logit is no logit of −∞, and one of −∞ is not the lowest finite one, beside each other and each alone: an infinite
/// value at the first keeps its sign however little it weighs, and at the second it is 0 · ∞.
#[test]
fn the_lowest_logit_is_not_minus_infinity() {
    for (with_infinite_k, softcap) in [(false, None), (false, Some(3.0)), (true, None)] {
        let p = problem([1, 2, 3, 9, 8], |p| {
            (p.softcap, p.lse, p.weights, p.logits) = (softcap, true, false, None);
            p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 9]), element: Element::F32 });
        });
        let mut data = Data::random(&p, 5, 1.0);
        let bias = |high: bool| (0..9).map(|key| if high && key > 5 { 1.0 } else { f32::MIN }).collect::<Vec<_>>();
        for high in [false, true] {
            data.bias = Some(Tensor::new(Element::F32, &bias(high)));
            let mut case = data.clone();
            // Key 2 has a finite logit; of key 4, −∞ in some rows.
            put(&p, &mut case, "v", 0, 2, 1, f32::NEG_INFINITY);
            put(&p, &mut case, "v", 1, 2, 3, f32::INFINITY);
            if with_infinite_k {
                put(&p, &mut case, "k", 0, 4, 0, f32::NEG_INFINITY);
                put(&p, &mut case, "v", 0, 4, 5, f32::INFINITY);
            }
            everywhere(Case::new(p.clone(), case));
        }
    }
}
