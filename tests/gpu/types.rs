//! f32, f16 and bf16, with the adapter's own f16 and without, even and odd rows, and every head dim.

use half::{bf16, f16};
use wgpu_attention::{Causal, Element, Error, Form, Gpu, Kernel, Obstacle, Options, Problem, Window, with};

use crate::support::{Case, Data, Tensor, gpus, small};
use crate::{all_everywhere, everywhere, form, lean, problem, ways};

#[test]
fn head_dims_from_1_to_512_hold() {
    let mut dims = vec![(1, 1), (37, 7), (64, 64), (80, 72), (72, 128), (3, 256), (512, 512)];
    if small("head_dims_from_1_to_512_hold, dims beyond 64") {
        dims.truncate(3);
    }
    let case = |(n, (head_dim, value_dim))| {
        Case::random(problem([1, 2, 9, 35, head_dim], |p| p.value_dim = value_dim), n as u64)
    };
    all_everywhere(&dims.into_iter().enumerate().map(case).collect::<Vec<_>>());
}

#[test]
fn sixteen_bit_types_hold_with_even_and_odd_rows() {
    let few = small("sixteen_bit_types_hold_with_even_and_odd_rows, two of the four cases");
    // Whole vectors; even rows that are not; odd ones. f16 and bf16 share all but the conversion.
    let both = [(Element::F16, 32, 32), (Element::Bf16, 28, 32), (Element::F16, 30, 6), (Element::Bf16, 7, 5)];
    let case = |(element, head_dim, value_dim)| {
        let p = problem([2, 3, 33, 35, head_dim], |p| {
            (p.element, p.value_dim, p.causal) = (element, value_dim, Causal::TopLeft);
        });
        Case::random(p, u64::from(head_dim))
    };
    all_everywhere(&both[if few { 1..3 } else { 0..4 }].iter().copied().map(case).collect::<Vec<_>>());
}

#[test]
fn native_f16_and_packed_f16_both_hold() {
    let p = problem([1, 2, 33, 35, 20], |p| p.element = Element::F16);
    for (kernel, p) in [(Kernel::Unfused, p.clone()), (Kernel::Flash, lean(&p))] {
        let case = Case::random(p, 1);
        let way = |native_f16| with!(form(Some(Form::Tiled)), native_f16, kernel: Some(kernel));
        for gpu in gpus() {
            case.check(gpu, &way(Some(false)));
            if gpu.library().caps().f16 {
                let (_, plan) = case.check(gpu, &way(Some(true)));
                assert!(plan.steps().iter().any(|step| step.variant.needs().f16));
            } else {
                let error = gpu.library().plan_with(&case.problem, &way(Some(true))).unwrap_err();
                assert!(matches!(error, Error::Kernel { why: Obstacle::NoF16, .. }), "{error}");
            }
        }
    }
}

#[test]
fn an_odd_number_of_packed_elements_leaves_its_neighbour_alone() {
    // 3 rows of 5: 15 elements, the last one alone in its word; and rows that share words with the next head's.
    for element in [Element::F16, Element::Bf16] {
        let mut p = problem([1, 1, 3, 7, 5], |p| p.element = element);
        for heads in [1, 3] {
            (p.heads, p.kv_heads) = (heads, heads);
            let case = Case::random(p.clone(), 9);
            everywhere(case);
        }
    }
}

#[test]
fn large_and_tiny_sixteen_bit_values_round_as_the_reference_does() {
    // Values among the subnormals of f16, at its largest, and beyond bf16's seven bits.
    for element in [Element::F16, Element::Bf16] {
        for value_dim in [4, 3] {
            let p = problem([1, 1, 1, 2, 4], |p| (p.element, p.value_dim, p.scale) = (element, value_dim, Some(0.0)));
            for (low, high) in [(6e-8, 3e-7), (-65504.0, -65504.0), (1.0, 1.0 + 1.0 / 64.0), (2e-5, -7e-5)] {
                let mut case = Case::random(p.clone(), 4);
                for i in 0..2 * value_dim as usize {
                    case.operands.v.set(i, if i % 2 == 0 { low } else { high });
                }
                let case = Case::new(p.clone(), case.operands);
                everywhere(case);
            }
        }
    }
}

/// Every number of a 16-bit type; 0 in place of those that are not finite and of those that f32 may flush.
fn numbers(element: Element) -> Vec<f32> {
    let widen = |bits| match element {
        Element::F16 => f16::from_bits(bits).to_f32(),
        _ => bf16::from_bits(bits).to_f32(),
    };
    (0..=u16::MAX).map(|bits| Some(widen(bits)).filter(|x| x.is_normal()).unwrap_or(0.0)).collect()
}

/// All ways but emulated matrices, which take a minute for a thousand heads, and load and store by the text of `flash`.
fn quick_ways(gpu: &Gpu, p: &Problem) -> Vec<Options> {
    ways(gpu, p).into_iter().filter(|way| way.form != Some(Form::Emulated)).collect()
}

/// Each row sees the key at its own place and no other, so that its output is that key's value, and its lse the score.
#[test]
fn every_sixteen_bit_number_is_read_and_written_as_itself() {
    // Whole vectors and odd rows.
    for (element, dim) in [(Element::F16, 4), (Element::Bf16, 4), (Element::F16, 3), (Element::Bf16, 3)] {
        let (batch, seq) = (65536u32.div_ceil(64 * dim), 64);
        let mut all = numbers(element);
        all.resize((batch * seq * dim) as usize, 0.0);
        // Head h picks dim h of the rows that hold the numbers: of k, or of q.
        for numbers_in_q in [false, true] {
            let mut p = lean(&problem([batch, dim, seq, seq, dim], |p| (p.element, p.scale) = (element, Some(1.0))));
            p.kv_heads = if numbers_in_q { dim } else { 1 };
            p.window = Window { left: Some(0), right: Some(0) };
            let each = (seq * dim) as usize;
            let repeated: Vec<f32> = all.chunks(each).flat_map(|rows| rows.repeat(dim as usize)).collect();
            let unit = |n: usize| f32::from(u8::from(n % dim as usize == n / each % dim as usize));
            let units: Vec<f32> = (0..repeated.len()).map(unit).collect();
            let mut data = Data::random(&Problem::new(1, 1, 1, 1, 1), 1, 1.0);
            let tensor = |x: &[f32]| Tensor::new(element, x);
            (data.q, data.k, data.v) = match numbers_in_q {
                true => (tensor(&repeated), tensor(&units), tensor(&repeated)),
                false => (tensor(&units), tensor(&all), tensor(&all)),
            };
            for gpu in gpus() {
                for way in quick_ways(gpu, &p) {
                    let got = gpu.attention_with(&p, &data.inputs(), &way).unwrap();
                    let place = |n: usize| format!("number {n}: {way:?} on {}", gpu.name);
                    for (n, (got, want)) in got.out.iter().zip(&repeated).enumerate() {
                        assert_eq!(got, want, "out, {}", place(n));
                    }
                    for (n, got) in got.lse.unwrap().into_iter().enumerate() {
                        let (b, h, i) = (n as u32 / seq / dim, n as u32 / seq % dim, n as u32 % seq);
                        let want = all[((b * seq + i) * dim + h) as usize];
                        assert!(
                            (got - want).abs() <= 1e-6 * want.abs().max(1.0),
                            "lse {got}, not {want}, {}",
                            place(n)
                        );
                    }
                }
            }
        }
    }
}

/// Four keys of equal weight hold neighbours: three of one and one of the other, or two of each, which is a tie.
#[test]
fn outputs_between_two_numbers_round_to_the_nearer_one_and_ties_to_even() {
    for (element, dim) in [(Element::F16, 32), (Element::Bf16, 32), (Element::F16, 31), (Element::Bf16, 31)] {
        // Every fifth number, odd and even ones in turn, and what follows it.
        let lines = (65536usize / 5).div_ceil(dim);
        let numbers = numbers(element);
        // Drivers may flush subnormal numbers of f32, which means near the least normal one would be.
        let usable = |x: &f32| (2f32.powi(-120)..2f32.powi(125)).contains(&x.abs());
        let number = |n: usize| numbers.get(n).copied().filter(usable).unwrap_or(0.0);
        let rounded = |x: f32| match element {
            Element::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        };
        for upper in 1..4 {
            let p = lean(&problem([1, lines as u32, 1, 4, dim as u32], |p| {
                (p.element, p.head_dim, p.scale, p.lse) = (element, 4, Some(0.0), false);
            }));
            let mut data = Data::random(&p, 1, 1.0);
            let value = |line: usize, key: usize, d: usize| number(5 * (line * dim + d) + usize::from(key < upper));
            let values = |line| (0..4 * dim).map(move |n| value(line, n / dim, n % dim));
            data.v = Tensor::new(element, &(0..lines).flat_map(values).collect::<Vec<_>>());
            let sum = |n: usize| (0..4).map(|key| f64::from(value(n / dim, key, n % dim))).sum::<f64>();
            let want: Vec<f32> = (0..lines * dim).map(|n| rounded((sum(n) / 4.0) as f32)).collect();
            for gpu in gpus() {
                for way in quick_ways(gpu, &p) {
                    let got = gpu.attention_with(&p, &data.inputs(), &way).unwrap().out;
                    for (n, (got, want)) in got.iter().zip(&want).enumerate() {
                        let from = [number(5 * n), number(5 * n + 1)];
                        assert_eq!(got, want, "{upper} of four between {from:?}: {way:?} on {}", gpu.name);
                    }
                }
            }
        }
    }
}
