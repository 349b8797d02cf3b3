//! f32, f16 and bf16, with the adapter's own f16 and without, even and odd rows, and every head dim.

use wgpu_attention::{Causal, Element, Error, Form, Kernel, Options};

use crate::support::{Case, gpus, small};
use crate::{all_everywhere, everywhere, form, lean, problem};

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
        let way = |native_f16| Options { native_f16, kernel: Some(kernel), ..form(Some(Form::Tiled)) };
        for gpu in gpus() {
            case.check(gpu, &way(Some(false)));
            if gpu.library().caps().f16 {
                let (_, plan) = case.check(gpu, &way(Some(true)));
                assert!(plan.steps().iter().any(|step| step.variant.uses_f16()));
            } else {
                let error = gpu.library().plan_with(&case.problem, &way(Some(true))).unwrap_err();
                assert!(matches!(error, Error::Kernel { .. }) && error.to_string().contains("f16"), "{error}");
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
