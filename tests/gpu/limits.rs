//! Small devices and small budgets: every way in which work is split really happens, and the result still holds.

use std::time::Duration;

use wgpu_attention::{Bias, Broadcast, Causal, Element, Error, Kernel, Logits, Options, Plan, Problem, wgpu, with};

use crate::support::{Case, gpus, is_small, small};
use crate::{form, lean, problem, ways};

fn count(plan: &Plan, kernel: &str) -> usize {
    plan.steps().iter().filter(|step| step.variant.stage() == kernel).count()
}

#[track_caller]
fn says(plan: &Plan, text: &str) {
    assert!(plan.reasons().iter().any(|reason| reason.contains(text)), "{text:?} is no reason of\n{plan}");
}

/// Mask, bias, causal rule: everything that a device with four storage buffers cannot bind at once.
fn many(p: &mut Problem) {
    (p.softcap, p.alibi, p.sinks, p.key_lengths, p.causal) = (Some(2.0), true, true, true, Causal::BottomRight);
    p.mask = Some(Broadcast([1, 1, 33, 67]));
    p.bias = Some(Bias { shape: Broadcast([1, 4, 1, 66]), element: Element::Bf16 });
}

#[test]
fn four_storage_buffers_are_enough() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffers_per_shader_stage = 4);
        for logits in [None, Some(Logits::Raw), Some(Logits::Capped), Some(Logits::Masked)] {
            let p = problem([2, 4, 33, 67, 20], |p| {
                many(p);
                p.logits = logits;
            });
            let case = Case::random(p, 1);
            for way in ways(&device, &case.problem) {
                let (_, plan) = case.check(&device, &way);
                assert!(count(&plan, "logits") > 0, "{plan}");
                assert!(plan.steps().iter().all(|step| step.bindings.len() <= 4), "{plan}");
            }
        }
        let capped_alone = problem([1, 2, 9, 35, 8], |p| (p.softcap, p.logits) = (Some(0.7), Some(Logits::Capped)));
        Case::random(capped_alone, 2).check(&device, &form(None));
    }
}

#[test]
fn a_small_binding_limit_splits_batches_heads_rows_and_keys() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 8192);
        for (sizes, element, split) in [
            ([3, 4, 33, 67, 20], Element::F32, "parts"),
            ([1, 1, 129, 257, 20], Element::F32, "a dispatch"),
            ([1, 2, 65, 257, 20], Element::Bf16, "a dispatch"),
            ([1, 2, 9, 131, 37], Element::F16, "a dispatch"),
        ] {
            let p = problem(sizes, |p| (p.element, p.causal) = (element, Causal::BottomRight));
            for p in [lean(&p), p] {
                let case = Case::random(p, 3);
                for way in ways(&device, &case.problem) {
                    let (_, plan) = case.check(&device, &way);
                    says(&plan, split);
                    assert!(plan.steps().iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 8192));
                }
            }
        }
        let p = problem([2, 4, 33, 67, 20], many);
        let (_, plan) = Case::random(p, 4).check(&device, &form(None));
        says(&plan, "parts");
    }
}

#[test]
fn values_at_keys_of_several_dispatches_are_summed_and_stay_spoilt() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 8192);
        for dim in [20, 7] {
            let p = lean(&problem([1, 1, 17, 1031, dim], |p| p.causal = Causal::BottomRight));
            let mut case = Case::random(p.clone(), 3);
            case.operands.v.set(3 * dim as usize + 1, f32::NAN);
            let shape = p.check().unwrap();
            case.operands.v.set(shape.v().at(0, 0, 1020) as usize, f32::INFINITY);
            for case in [Case::new(p.clone(), case.operands), Case::random(p, 3)] {
                for way in ways(&device, &case.problem) {
                    let (_, plan) = case.check(&device, &way);
                    // Or in parts, some for each dispatch over the keys.
                    assert!(count(&plan, "values") > 1 || count(&plan, "split") > 1, "{plan}");
                }
            }
        }
    }
}

#[test]
fn fused_kernels_carry_on_where_the_keys_exceed_a_binding() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 32_768);
        for (element, seed) in [(Element::F32, 1), (Element::F16, 2), (Element::Bf16, 3)] {
            // Windows that begin in the middle of a step, and sums in which a few keys more would show.
            let mut p = lean(&problem([2, 4, 70, 1131, 20], |p| (p.causal, p.sinks) = (Causal::BottomRight, true)));
            (p.kv_heads, p.element, p.window.left) = (2, element, Some(901));
            if element != Element::F32 {
                (p.alibi, p.key_lengths) = (true, true);
            }
            let case = Case::random(p, seed);
            let mut carried = 0;
            for way in ways(&device, &case.problem) {
                let (_, plan) = case.check(&device, &way);
                carried += usize::from(
                    count(&plan, "rows").max(count(&plan, "flash")) > 1 && {
                        plan.steps().iter().any(|step| step.uniform.get("key0").is_some_and(|key| key > 0))
                    },
                );
            }
            let slow = device.library().caps().takes_minutes(Kernel::Rows);
            assert!(carried >= if gpu.info().backend == wgpu::Backend::Gl || is_small() { 1 } else { 2 } || slow);
        }
    }
}

#[test]
fn a_small_scratch_budget_splits_into_parts() {
    let case = Case::random(problem([2, 4, 33, 67, 20], many), 1);
    for gpu in gpus() {
        for way in ways(gpu, &case.problem) {
            // One row of scores is 272 bytes: parts of a few rows.
            let (_, plan) = case.check(gpu, &with!(way, scratch_budget: 1024));
            says(&plan, "parts");
            assert!(plan.scratch_bytes() <= 1024 && count(&plan, "softmax") >= 2 * 4 * 11, "{plan}");
        }
    }
}

#[test]
fn a_small_work_budget_slices_and_the_slices_make_the_whole() {
    let case = Case::random(problem([2, 4, 33, 67, 20], many), 1);
    for gpu in gpus() {
        for way in ways(gpu, &case.problem) {
            let (_, plan) = case.check(gpu, &with!(way, work_budget: Duration::from_nanos(2000)));
            assert!(plan.slices() > 10 && plan.dispatches() > 10, "{plan}");
        }
    }
}

#[test]
fn few_workgroups_per_dimension_fold_and_split() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_compute_workgroups_per_dimension = 3);
        let case = Case::random(problem([2, 4, 33, 67, 20], many), 1);
        for way in ways(&device, &case.problem) {
            let (_, plan) = case.check(&device, &way);
            assert!(count(&plan, "softmax") >= (2 * 4 * 33usize).div_ceil(27), "{plan}");
            assert!(plan.steps().iter().all(|step| step.grid.iter().all(|&n| n <= 3)));
        }
    }
}

#[test]
fn small_workgroups_and_no_features_are_enough() {
    let p = problem([2, 4, 65, 67, 20], |p| p.element = Element::F16);
    let case = Case::random(p, 1);
    for gpu in gpus() {
        for bytes in [16_352, 8192] {
            let device = gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
                limits.max_compute_workgroup_storage_size = bytes;
                limits.max_compute_invocations_per_workgroup = 64;
                limits.max_compute_workgroup_size_x = 64;
            });
            for way in ways(&device, &case.problem) {
                let (_, plan) = case.check(&device, &way);
                for step in plan.steps() {
                    let variant = &step.variant;
                    assert!(!variant.needs().f16 && !variant.needs().subgroups, "{plan}");
                    assert!(variant.workgroup_bytes() <= bytes && variant.threads() <= 64, "{plan}");
                }
            }
        }
    }
}

#[test]
fn all_limits_at_once_hold() {
    for gpu in gpus() {
        let device = gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
            limits.max_storage_buffers_per_shader_stage = 4;
            limits.max_storage_buffer_binding_size = 8192;
            limits.max_compute_workgroups_per_dimension = 4;
            limits.max_compute_workgroup_storage_size = 8192;
            limits.max_compute_invocations_per_workgroup = 64;
        });
        for element in [Element::F32, Element::F16, Element::Bf16] {
            let mut p = problem([2, 4, 33, 67, 20], many);
            (p.element, p.kv_heads) = (element, 2);
            let options = with!(form(None), scratch_budget: 4096, work_budget: Duration::from_micros(20));
            Case::random(p, 5).check(&device, &options);
        }
    }
}

#[test]
fn more_rows_than_one_grid_axis_holds() {
    if small("more_rows_than_one_grid_axis_holds") {
        return;
    }
    let case = Case::random(lean(&problem([300, 300, 1, 3, 4], |_| ())), 1);
    for gpu in gpus() {
        let side = gpu.library().caps().limits.max_compute_workgroups_per_dimension;
        // A tile of `flash` would hold one row, and 90,000 of them take minutes on a CPU.
        for way in ways(gpu, &case.problem).into_iter().filter(|way| way.kernel != Some(Kernel::Flash)) {
            let (_, plan) = case.check(gpu, &way);
            let folds = plan.steps().iter().any(|step| {
                let place = step.uniform.place();
                place.end - place.first > side && step.grid[1] > 1
            });
            assert!(folds || side > 90_000 || plan.slices() > 1, "{plan}");
        }
    }
}

#[test]
fn what_fits_no_binding_is_an_error_that_says_so() {
    for gpu in gpus() {
        let device = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 4096);
        let p = Problem::new(1, 1, 1, 2000, 4);
        let unfused = with!(Options::default(), kernel: Some(Kernel::Unfused));
        let long = device.library().plan_with(&p, &unfused).unwrap_err();
        assert!(matches!(long, Error::Room { field: "one row of scores", size: 8000, limit: 4096, .. }), "{long:?}");
        assert!(
            long.to_string().contains("8000 bytes; the limit is 4096 bytes: raise Options::scratch_budget"),
            "{long}"
        );
        // No row of scores is needed where the keys come in several dispatches, but one key is.
        let (_, plan) = Case::random(p, 7).check(&device, &form(None));
        assert!(count(&plan, "split") > 1, "{plan}");
        let wide = device.library().plan(&Problem::new(1, 1, 1, 4, 512)).unwrap_err();
        assert!(matches!(wide, Error::Room { field: "k", limit: ..4096, .. }), "{wide}");
    }
}

#[test]
fn flash_holds_without_features_in_the_least_workgroup_memory() {
    if small("flash_holds_without_features_in_the_least_workgroup_memory") {
        return;
    }
    let options = with!(Options::default(), kernel: Some(Kernel::Flash));
    let dims = [(32, Element::F32), (64, Element::F32), (64, Element::F16), (128, Element::Bf16), (256, Element::F32)];
    let able: Vec<_> = gpus().iter().filter(|gpu| gpu.info().backend != wgpu::Backend::Gl).collect();
    assert!(!able.is_empty(), "OpenGL takes minutes to compile these; another adapter must be there");
    for gpu in able {
        let device = gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
            limits.max_compute_workgroup_storage_size = 16_352;
            limits.max_storage_buffers_per_shader_stage = 4;
            limits.max_compute_invocations_per_workgroup = 128;
        });
        for (dim, element) in dims {
            let mut p = lean(&problem([1, 2, 67, 69, dim], |p| (p.element, p.causal) = (element, Causal::BottomRight)));
            p.lse = false;
            let (_, plan) = Case::random(p, 6).check(&device, &options);
            assert_eq!(plan.kernel(), "flash");
            assert!(
                plan.steps().iter().all(|step| step.bindings.len() == 4 && !step.variant.needs().subgroups),
                "{plan}"
            );
        }
    }
}
