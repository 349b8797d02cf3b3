//! A long problem: no score matrix, no scratch at all, many slices, and right in rows from the first to the last.

use std::time::Duration;

use wgpu_attention::{Broadcast, Causal, Element, Gpu, Kernel, Options, Packed, Problem, Window, wgpu, with};

use crate::support::{Case, Data, Tensor, gpus, small};
use crate::ways;

/// The case of some neighbouring rows of a causal problem of one head: the same keys at the same positions.
fn rows(p: &Problem, operands: &Data, first: u32, count: u32) -> Case {
    let (mut part, mut operands) = (p.clone(), operands.clone());
    (part.seq_q, part.causal) = (count, Causal::Offset);
    let dim = p.head_dim as usize;
    let of_rows = first as usize * dim..(first + count) as usize * dim;
    operands.q = Tensor::F32(operands.q.f32()[of_rows].to_vec());
    operands.offsets = Some(vec![first as i32]);
    Case::new(part, operands)
}

#[test]
fn long_causal_problems_need_no_scratch_and_run_in_slices() {
    if small(
        "long_causal_problems_need_no_scratch_and_run_in_slices, whose kernel takes minutes to compile for four lanes",
    ) {
        return;
    }
    let length = 16_384;
    let mut p = Problem::new(1, 1, length, length, 64);
    (p.causal, p.window) = (Causal::TopLeft, Window { left: Some(1023), right: None });
    let operands = Data::random(&p, 9, 1.0);
    let starts = [0, 1020, length / 2 - 3, length - 7];
    let parts = starts.map(|first| rows(&p, &operands, first, 7));
    for gpu in gpus() {
        let options = with!(Options::default(), work_budget: Duration::from_millis(5));
        let plan = gpu.library().plan_with(&p, &options).unwrap();
        assert!(plan.scratch_bytes() <= 256, "nothing but what stands for the log-sum-exp\n{plan}");
        assert!(plan.slices() > 50, "{plan}");
        let prepared = gpu.library().prepare(&plan).unwrap();
        let resident = gpu.upload(&plan, &operands.inputs()).unwrap();
        let mut seen = 0;
        gpu.run(&prepared, &resident, &mut |done, of| {
            assert_eq!((done, of), (seen + 1, plan.slices()));
            seen = done;
        })
        .unwrap();
        assert_eq!(seen, plan.slices());
        let out = gpu.download(&plan, &resident).unwrap().out;
        assert!(out.iter().all(|x| x.is_finite()), "rows that were not written\n{plan}");
        for (first, part) in starts.iter().zip(&parts) {
            let got = &out[*first as usize * 64..][..7 * 64];
            let found = part.budget.compare_out(&part.problem.check().unwrap(), got, &part.want.out);
            assert!(found.passed(), "rows from {first} on: {found}\n{plan}");
        }
    }
}

/// Weights of half the digits would still be within the error budget of so many keys.
#[test]
fn weights_of_many_keys_keep_the_digits_of_f32() {
    let case = Case::random(Problem::new(1, 2, 3, 8192, 32), 6);
    let loose = case.want.out.iter().map(|x| x.abs()).fold(0.0, f64::max) * 2f64.powi(-11);
    let widest = |x: &[f64]| x.iter().copied().fold(0.0, f64::max);
    assert!(widest(&case.limit.out.atol) < loose / 4.0, "{:?} of {loose}", case.limit.out.atol);
    for gpu in gpus() {
        for way in ways(gpu, &case.problem) {
            case.check(gpu, &way);
        }
    }
}

#[test]
fn more_keys_than_the_loops_of_a_cpu_driver_take_are_not_dropped() {
    if small("more_keys_than_the_loops_of_a_cpu_driver_take_are_not_dropped, which are llvmpipe's") {
        return;
    }
    // With one query row a lane and several; with a term that gives each step loops of its own.
    let (unfused, split, flash) = (Some(Kernel::Unfused), Some(Kernel::Split), Some(Kernel::Flash));
    for (seq_q, seq_kv, alibi, kernels) in [
        (1, 300_000, false, vec![None, unfused, flash]),
        (17, 300_000, false, vec![None, unfused]),
        (17, 40_000, true, vec![None, split]),
    ] {
        let mut p = Problem::new(1, 1, seq_q, seq_kv, 4);
        (p.alibi, p.scale) = (alibi, Some(0.1));
        let case = Case::random(p.clone(), 4);
        for gpu in gpus() {
            for &kernel in &kernels {
                // On OpenGL, where it takes seconds to compile, Vulkan's word is taken for it.
                if kernel == flash && gpu.info().backend == wgpu::Backend::Gl {
                    continue;
                }
                case.check(gpu, &with!(Options::default(), kernel));
            }
        }
    }
}

#[test]
fn dispatches_that_carry_on_over_the_keys_give_every_output() {
    if small("dispatches_that_carry_on_over_the_keys_give_every_output, whose loops are llvmpipe's") {
        return;
    }
    let problem = |seq_q, seq_kv, set: fn(&mut Problem)| {
        let mut p = Problem::new(1, 2, seq_q, seq_kv, 4);
        (p.kv_heads, p.lse, p.scale) = (1, true, Some(0.1));
        set(&mut p);
        p
    };
    let cases = [
        // A window that one walk holds, however many keys there are, and one that it does not.
        problem(20, 270_000, |p| (p.causal, p.window.left) = (Causal::BottomRight, Some(1023))),
        problem(20, 300_000, |p| {
            (p.causal, p.window.left) = (Causal::Offset, Some(280_000));
            p.sinks = true;
        }),
        problem(70, 40_000, |p| p.mask = Some(Broadcast([1, 1, 1, 40_000]))),
        // Results that are rounded at the end, through a scratch and at once.
        problem(17, 40_000, |p| (p.alibi, p.element, p.sinks) = (true, Element::F16, true)),
        problem(17, 40_000, |p| (p.softcap, p.element, p.value_dim) = (Some(1.0), Element::Bf16, 7)),
        // Sequences of which the second ends before the second dispatch begins.
        problem(12, 290_000, |p| {
            (p.batch, p.packed) = (2, Some(Packed { total_q: 20, total_kv: 291_000 }));
        }),
    ];
    for (seed, p) in (0..).zip(cases) {
        let mut operands = Data::random(&p, seed, 1.0);
        if p.packed.is_some() {
            operands.cu_q = Some(vec![0, 12, 20]);
            operands.cu_kv = Some(vec![0, 290_000, 291_000]);
        }
        if p.causal == Causal::Offset {
            operands.offsets = Some(vec![p.seq_kv as i32 - 3000]);
        }
        let case = Case::new(p, operands);
        for gpu in gpus() {
            // Steps of `flash` are long: here they begin in the middle of one. On OpenGL it takes seconds to compile.
            let flash = case.problem.sinks && case.problem.causal == Causal::Offset;
            let flash = (flash && gpu.info().backend != wgpu::Backend::Gl).then_some(Kernel::Flash);
            for kernel in [Some(Kernel::Rows), flash].into_iter().flatten() {
                let (_, plan) = case.check(gpu, &with!(Options::default(), kernel: Some(kernel)));
                let carried = plan.steps().iter().any(|step| step.uniform.get("key0").is_some_and(|key| key > 0));
                assert_eq!(carried, gpu.library().caps().cpu && case.problem.window.left != Some(1023), "{plan}");
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_shows_in_whatever_dispatch_it_is_seen() {
    if small("a_value_that_is_not_finite_shows_in_whatever_dispatch_it_is_seen, whose loops are llvmpipe's") {
        return;
    }
    let mut p = Problem::new(1, 1, 40, 40_000, 4);
    (p.alibi, p.causal) = (true, Causal::BottomRight);
    let mut operands = Data::random(&p, 3, 1.0);
    operands.slopes = Some(vec![0.0]);
    for (key, rows) in [(39_985, 25..40), (100, 0..40)] {
        let mut operands = operands.clone();
        operands.v.set(4 * key, f32::NAN);
        for gpu in gpus() {
            let options = with!(Options::default(), kernel: Some(Kernel::Rows));
            let out = gpu.attention_with(&p, &operands.inputs(), &options).unwrap().out;
            for row in 0..40 {
                assert_eq!(out[4 * row].is_nan(), rows.contains(&row), "row {row}, key {key}");
                assert!(out[4 * row + 1..4 * row + 4].iter().all(|x| x.is_finite()), "row {row}, key {key}");
            }
        }
    }
}

#[test]
fn the_longest_walk_of_one_workgroup_drops_no_key() {
    if small("the_longest_walk_of_one_workgroup_drops_no_key, whose loops are llvmpipe's") {
        return;
    }
    for gpu in gpus().iter().filter(|gpu| gpu.library().caps().cpu) {
        walks_every_key(gpu, Kernel::Rows, 4, false);
        walks_every_key(gpu, Kernel::Rows, 4, true);
        // On OpenGL the others take seconds to compile.
        if gpu.info().backend != wgpu::Backend::Gl {
            walks_every_key(gpu, Kernel::Split, 4, true);
            walks_every_key(gpu, Kernel::Flash, 4, true);
            let plain = gpu.limited_to(Some(wgpu::Features::empty()), |_| ());
            walks_every_key(&plain, Kernel::Flash, 64, true);
        }
    }
}

/// As many keys as one dispatch walks, and one workgroup; all weigh the same.
fn walks_every_key(gpu: &Gpu, kernel: Kernel, dim: u32, full: bool) {
    let options = with!(Options::default(), kernel: Some(kernel));
    let (heads, rows) = if kernel == Kernel::Split { (16, 4) } else { (1, 64) };
    let problem = |keys: u32| {
        let mut p = Problem::new(1, heads, rows, keys, 4);
        (p.head_dim, p.value_dim, p.kv_heads) = (dim, dim, 1);
        p.mask = full.then_some(Broadcast([1, 1, 1, keys]));
        p
    };
    let one = |keys: u32| {
        let plan = gpu.library().plan_with(&problem(keys), &options).unwrap();
        plan.steps()[0].uniform.place().col_tiles == 1
            && plan.steps().iter().all(|step| step.uniform.get("key0").is_none_or(|key| key == 0))
    };
    let (mut low, mut high) = (500, 600_000);
    while low + 1 < high {
        let middle = (low + high) / 2;
        (low, high) = if one(middle) { (middle, high) } else { (low, middle) };
    }
    let p = problem(low);
    let mut operands = Data::random(&p, 8, 1.0);
    operands.q.fill(0..operands.q.len(), 0.0);
    operands.mask = full.then(|| vec![1; low as usize]);
    // The mean of these tells how many keys were seen.
    operands.v = Tensor::F32((0..low * dim).map(|n| (n / dim) as f32 / low as f32).collect());
    // NaN and infinities cost loops, too: in one row, and in an element of every value.
    for bad in [false, true] {
        if bad {
            operands.q.set(5 * dim as usize + 1, f32::NAN);
            (0..low).for_each(|key| operands.v.set((key * dim + 2) as usize, f32::INFINITY));
        }
        let out = gpu.attention_with(&p, &operands.inputs(), &options).unwrap().out;
        for (n, x) in out.into_iter().enumerate() {
            let (row, element) = (n / dim as usize, n % dim as usize);
            let right = match bad {
                true if row == 5 => x.is_nan(),
                true if element == 2 => x == f32::INFINITY,
                _ => (x - 0.5).abs() < 1e-3,
            };
            let seen = 2.0 * x * low as f32;
            assert!(right, "{kernel:?}, {dim} dims, full: {full}, bad: {bad}: {x} or {seen} of {low} keys");
        }
    }
}
