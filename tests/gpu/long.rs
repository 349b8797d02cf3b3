//! A long problem: no score matrix, no scratch at all, many slices, and right in rows from the first to the last.

use wgpu_attention::{Causal, Kernel, Options, Problem, Window};

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
        let plan = gpu.library().plan(&p).unwrap();
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
    for (seq_q, seq_kv, alibi) in [(1, 300_000, false), (17, 300_000, false), (17, 40_000, true)] {
        let mut p = Problem::new(1, 1, seq_q, seq_kv, 4);
        (p.alibi, p.scale) = (alibi, Some(0.1));
        let case = Case::random(p.clone(), 4);
        for gpu in gpus() {
            case.check(gpu, &Options::default());
            case.check(gpu, &Options { kernel: Some(Kernel::Unfused), ..Options::default() });
            let rows = Options { kernel: Some(Kernel::Rows), ..Options::default() };
            if gpu.library().caps().cpu {
                let error = gpu.library().plan_with(&p, &rows).unwrap_err().to_string();
                assert!(error.contains("its loops take"), "{error}");
            }
        }
    }
}
