//! `matrix`: by cooperative matrices where an adapter has them, and everywhere else by the same text with plain numbers for matrices.

use wgpu_attention::{
    Attention, Bias, Broadcast, Caps, Causal, Element, Error, Form, Gpu, Kernel, Layout, Obstacle, Options, Outputs,
    Packed, Plan, Precision, Problem, Window, wgpu, with,
};

use crate::support::staged::Staged;
use crate::support::{Adapter, Case, Data, gpus, small};
use crate::{lean, problem};

fn emulated() -> Options {
    with!(Options::default(), kernel: Some(Kernel::Matrix), form: Some(Form::Emulated))
}

/// Size of the matrices, and lanes of a subgroup where they are fixed: with 16 and any number a subgroup owns two blocks, with 8 and
/// any number some own none.
const FORMS: [(u32, Option<u32>); 4] = [(16, None), (8, Some(32)), (16, Some(32)), (8, None)];

/// A device of made-up abilities whose plans this one can run.
fn device(gpu: &Gpu, (size, lanes): (u32, Option<u32>)) -> Caps {
    with!(gpu.library().caps().clone(), matrices: vec![size], subgroup_size: lanes)
}

/// Runs a case on an adapter by a plan and compares.
#[track_caller]
fn check(gpu: &Gpu, case: &Case, plan: &Plan) -> Outputs {
    let prepared = gpu.library().prepare(plan).unwrap();
    let resident = gpu.upload(plan, &case.operands.inputs()).unwrap();
    gpu.run(&prepared, &resident, &mut |_, _| ()).unwrap();
    let got = gpu.download(plan, &resident).unwrap();
    case.compare(&got, plan);
    got
}

/// The adapters that can read f16; without one nothing of the kernel is tested.
fn able() -> Vec<&'static Adapter> {
    let able: Vec<&Adapter> = gpus().iter().filter(|gpu| gpu.library().caps().f16).collect();
    assert!(!able.is_empty() || small("all of matrix, because no adapter has shader f16"), "no adapter has shader f16");
    able
}

/// Runs a case of f16 in both sizes of matrices on every adapter that can read f16; the others must say that they cannot.
#[track_caller]
fn everywhere(case: &Case) {
    in_forms(case, &FORMS[..2]);
}

#[track_caller]
fn in_forms(case: &Case, forms: &[(u32, Option<u32>)]) {
    let shape = case.problem.check().unwrap();
    assert!(shape.problem().element == Element::F16 && !case.problem.weights);
    able();
    for gpu in gpus() {
        if !gpu.library().caps().f16 {
            let error = gpu.library().plan_with(&case.problem, &emulated()).unwrap_err();
            assert!(matches!(&error, Error::Kernel { kernel: "matrix", why: Obstacle::NoF16 }), "{error}");
            continue;
        }
        for &form in forms {
            let plan = Plan::new(&shape, &device(gpu, form), &emulated())
                .unwrap_or_else(|error| panic!("{error}\n{:?}", case.problem));
            assert!(plan.steps().iter().all(|step| ["matrix", "pack"].contains(&step.variant.kernel())), "{plan}");
            check(gpu, case, &plan);
        }
        if !gpu.library().caps().matrices.is_empty() {
            let options = with!(emulated(), form: None);
            let (_, plan) = case.check(gpu, &options);
            assert!(plan.steps()[0].variant.needs().matrices.is_some(), "{plan}");
        }
    }
}

/// A problem of f16 without the outputs that need the score matrix.
fn halves(sizes: [u32; 5], set: impl FnOnce(&mut Problem)) -> Problem {
    let mut p = lean(&problem(sizes, |_| ()));
    p.element = Element::F16;
    set(&mut p);
    p
}

#[test]
fn tiles_with_tails_hold() {
    // Rows and keys at, below and above whole tiles of 32 and 64; head and value dims that fill the matrices and that do not.
    for [seq_q, seq_kv, head_dim, value_dim] in
        [[1, 1, 1, 1], [64, 32, 32, 32], [33, 65, 32, 8], [65, 31, 20, 28], [31, 130, 12, 36], [129, 67, 7, 5]]
    {
        let p = halves([2, 2, seq_q, seq_kv, head_dim], |p| p.value_dim = value_dim);
        in_forms(&Case::random(p, 3), &FORMS);
    }
}

#[test]
fn head_dims_to_512_hold() {
    let mut dims = vec![(33, 7), (64, 64), (80, 96), (128, 128), (3, 200), (512, 512)];
    if small("matrix::head_dims_to_512_hold, dims beyond 64") {
        dims.truncate(2);
    }
    for (head_dim, value_dim) in dims {
        let p = halves([1, 2, 35, 70, head_dim], |p| (p.value_dim, p.causal) = (value_dim, Causal::BottomRight));
        everywhere(&Case::random(p, 4));
    }
}

#[test]
fn ranges_of_keys_hold() {
    let window = |left, right| Window { left, right };
    for (causal, window) in [
        (Causal::TopLeft, window(None, None)),
        (Causal::BottomRight, window(Some(9), None)),
        (Causal::None, window(Some(40), Some(3))),
        (Causal::Offset, window(None, Some(2))),
    ] {
        for [seq_q, seq_kv] in [[70, 131], [131, 70]] {
            let p = halves([2, 2, seq_q, seq_kv, 16], |p| (p.causal, p.window, p.key_lengths) = (causal, window, true));
            everywhere(&Case::random(p, 5));
        }
    }
}

#[test]
fn every_term_of_the_score_holds() {
    let p = halves([2, 4, 67, 70, 20], |p| {
        (p.kv_heads, p.causal, p.sinks, p.key_lengths, p.alibi) = (2, Causal::BottomRight, true, true, true);
        (p.softcap, p.scale) = (Some(2.0), Some(-0.7));
        p.mask = Some(Broadcast([1, 4, 67, 69]));
        p.bias = Some(Bias { shape: Broadcast([2, 1, 67, 70]), element: Element::Bf16 });
    });
    everywhere(&Case::random(p.clone(), 6));
    // Each of them alone, where others could cover for it.
    let alone: [fn(&mut Problem); 5] = [
        |p| p.softcap = Some(0.5),
        |p| p.alibi = true,
        |p| p.mask = Some(Broadcast([1, 1, 67, 1])),
        |p| p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 70]), element: Element::F16 }),
        |p| p.sinks = true,
    ];
    for set in alone {
        everywhere(&Case::random(halves([1, 2, 67, 70, 20], set), 7));
    }
}

#[test]
fn packed_sequences_and_strides_hold() {
    let p = halves([3, 2, 70, 90, 12], |p| {
        (p.packed, p.causal) = (Some(Packed { total_q: 150, total_kv: 200 }), Causal::BottomRight);
    });
    everywhere(&Case::random(p.with_layout(Layout::Bshd), 8));
    for dim in [12, 5] {
        everywhere(&Case::random(halves([2, 3, 35, 40, dim], |p| p.value_dim = 8).with_layout(Layout::Bshd), 9));
    }
}

#[test]
fn a_maximum_that_rises_is_rescaled_exactly() {
    // Logits that climb by some tens over the keys, by a little more or less than the threshold at each tile, or fall; and rows of one
    // tile that do each: whatever m the sums refer to, the result is the same.
    for steps in [[30.0, 30.0], [3.9, 4.1], [1.0, -30.0], [-50.0, 8.0]] {
        let p = halves([1, 1, 70, 256, 8], |p| p.scale = Some(1.0));
        let mut operands = Data::random(&p, 10, 0.05);
        for i in 0..70 {
            operands.q.set(i * 8, steps[i % 2] / 8.0);
        }
        for j in 0..256 {
            operands.k.set(j * 8, (j / 32 * 8) as f32);
        }
        everywhere(&Case::new(p, operands));
    }
}

#[test]
fn values_that_cancel_keep_the_digits_of_f32() {
    // One heavy key of value 0, and hundreds that weigh less than f16's last place: their sum is all that is left of them. lavapipe
    // ends all loops of an invocation after 2^16 iterations together, which emulated matrices reach with a thousand keys when checks
    // keep their loops from being unrolled.
    let p = halves([1, 1, 33, 400, 8], |p| p.scale = Some(1.0));
    for depth in [9.0, 12.0, 16.0] {
        let mut operands = Data::random(&p, 11, 1.0);
        let (rows, keys) = (33 * 8, 400 * 8);
        (0..rows).for_each(|n| operands.q.set(n, if n % 8 == 0 { 1.0 } else { 0.0 }));
        (0..keys).for_each(|n| operands.k.set(n, if n % 8 == 0 && n > 0 { -depth } else { 0.0 }));
        (0..keys).for_each(|n| operands.v.set(n, if n < 8 { 0.0 } else { 1.0 }));
        everywhere(&Case::new(p.clone(), operands));
    }
    // Weights that are all alike, and values of both signs.
    let p = halves([1, 2, 40, 500, 16], |p| p.scale = Some(0.01));
    everywhere(&Case::random(p, 12));
}

#[test]
fn weights_of_f16_cost_no_more_than_their_own_budget() {
    // Weights that are all alike, values of both signs: the sum is small, and the roundings of the weights are not.
    let p = halves([1, 2, 40, 500, 16], |p| (p.scale, p.lse) = (Some(0.01), true));
    let case = Case::random(p, 12);
    let shape = case.problem.check().unwrap();
    for gpu in able() {
        for form in FORMS {
            let [strict, fast] = Precision::ALL.map(|precision| {
                let plan = Plan::new(&shape, &device(gpu, form), &with!(emulated(), precision)).unwrap();
                check(gpu, &case, &plan)
            });
            let beyond = case.budget.compare(&shape, &fast, &case.want).unwrap();
            assert!(
                beyond.get("out").unwrap().budget.failures > 20,
                "the rounding does not show on {}: {beyond}",
                gpu.name
            );
            assert_eq!(strict.lse, fast.lse);
        }
        if !gpu.library().caps().matrices.is_empty() {
            let (_, plan) = case.check(gpu, &with!(emulated(), form: None, precision: Precision::Fast));
            assert!(plan.steps()[0].variant.needs().matrices.is_some(), "{plan}");
        }
    }
    // What is not finite, a maximum that moves, and every operand.
    let mut problems = vec![halves([2, 2, 65, 130, 20], |p| p.causal = Causal::BottomRight)];
    problems.push(halves([2, 4, 67, 70, 20], |p| {
        (p.kv_heads, p.sinks, p.alibi, p.softcap, p.scale) = (2, true, true, Some(9.0), Some(3.0));
        p.bias = Some(Bias { shape: Broadcast([2, 1, 67, 70]), element: Element::Bf16 });
    }));
    for (n, p) in problems.into_iter().enumerate() {
        let mut operands = Data::random(&p, 17, 1.0);
        operands.v.set(p.check().unwrap().v().at(0, 0, 69) as usize, [f32::NAN, f32::INFINITY][n]);
        let case = Case::new(p, operands);
        for gpu in able() {
            let plan = case.problem.check().unwrap();
            let plan =
                Plan::new(&plan, &device(gpu, FORMS[n]), &with!(emulated(), precision: Precision::Fast)).unwrap();
            check(gpu, &case, &plan);
        }
    }
}

#[test]
fn what_hidden_values_hold_reaches_nobody() {
    for (masked, garbage) in [(false, f32::NAN), (true, f32::INFINITY), (true, f32::NAN)] {
        let p = halves([1, 2, 70, 70, 12], |p| {
            p.mask = masked.then_some(Broadcast([1, 1, 70, 70]));
            p.causal = if masked { Causal::None } else { Causal::TopLeft };
        });
        let mut operands = Data::random(&p, 13, 1.0);
        operands.mask = operands.mask.map(|_| (0..70 * 70).map(|n| u8::from(n / 70 % 3 != 0)).collect());
        for (head, key) in [(0, 40), (1, 3)] {
            operands.v.set(p.check().unwrap().v().at(0, head, key) as usize + 7, garbage);
        }
        let case = Case::new(p, operands);
        let bad = case.want.out.iter().filter(|x| !x.is_finite()).count();
        assert!(bad > 0 && bad < case.want.out.len(), "{bad}");
        everywhere(&case);
    }
    // Keys, too: those beyond the lengths.
    let p = halves([1, 2, 35, 70, 12], |p| p.key_lengths = true);
    let mut operands = Data::random(&p, 14, 1.0);
    operands.key_lengths = Some(vec![37]);
    let case = Case::new(p.clone(), operands.clone());
    for h in 0..2 {
        for j in 37..70 {
            let at = p.check().unwrap().k().at(0, h, j) as usize;
            operands.k.fill(at..at + 12, f32::NAN);
            operands.v.fill(at..at + 12, f32::INFINITY);
        }
    }
    everywhere(&Case { operands, ..case });
}

#[test]
fn plans_cut_by_limits_hold() {
    for gpu in able() {
        let case = Case::random(halves([2, 3, 70, 67, 20], |p| p.key_lengths = true), 15);
        let options = with!(emulated(), work_budget: std::time::Duration::from_nanos(2000));
        let (_, plan) = case.check(gpu, &options);
        assert!(plan.dispatches() > 3, "{plan}");
    }
}

/// A device of the test's own with all that the adapter has for matrices.
fn own(gpu: &Adapter) -> wgpu::Device {
    let wanted =
        wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP;
    let descriptor = wgpu::DeviceDescriptor {
        required_features: gpu.adapter().features() & wanted,
        required_limits: gpu.adapter().limits(),
        // SAFETY: as in src/device/gpu/open.rs.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    pollster::block_on(gpu.adapter().request_device(&descriptor)).unwrap().0
}

#[test]
fn the_sizes_of_matrices_come_with_the_adapter_or_not_at_all() {
    let p = halves([1, 2, 35, 70, 16], |_| ());
    let options = with!(Options::default(), kernel: Some(Kernel::Matrix));
    for gpu in gpus() {
        let device = own(gpu);
        let (with, without) = (Attention::with_adapter(&device, gpu.adapter()).unwrap(), Attention::new(&device));
        assert_eq!(with.caps().matrices, gpu.library().caps().matrices);
        assert!(without.caps().matrices.is_empty());
        let error = without.plan_with(&p, &options).unwrap_err();
        let why = if without.caps().f16 { Obstacle::NoMatrices } else { Obstacle::NoF16 };
        assert_eq!(error, Error::Kernel { kernel: "matrix", why });
        for other in gpus().iter().filter(|other| other.name != gpu.name) {
            let error = Attention::with_adapter(&device, other.adapter()).unwrap_err();
            assert!(matches!(error, Error::Conflict { left: "device", right: "adapter", .. }), "{error}");
        }
    }
}

#[test]
fn prepared_plans_run_in_the_callers_buffers() {
    let case = Case::random(halves([1, 2, 35, 40, 12], |p| (p.lse, p.value_dim) = (true, 7)), 16);
    for gpu in able() {
        let plan = gpu.library().plan_with(&case.problem, &emulated()).unwrap();
        let staged = Staged::new(gpu.device(), &plan, &case.operands);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &staged.buffers()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        // Looks at the margins of every buffer; what is in them is compared elsewhere.
        staged.outputs(gpu.device(), gpu.queue());
    }
}
