//! Trials: small problems that show whether a driver computes the kernels rightly.

mod support;

use std::path::Path;
use std::time::Instant;

use support::{Adapter, Case, gpus};
use wgpu_attention::internal::Variant;
use wgpu_attention::internal::trials::{Data, Expected, RowSummary, factor};
use wgpu_attention::proof::{Case as TrialCase, Failure, Feature, Proof, Trial};
use wgpu_attention::reference::attention_with_budget;
use wgpu_attention::tuning::{Choice, Class, Row, Tuning};
use wgpu_attention::{
    Attention, Causal, DeviceOptions, Element, Error, Form, Gpu, Inputs, Kernel, Logits, Obstacle, Options, Packed,
    Paged, Plan, Precision, Problem, Runner, compare, wgpu, with,
};

/// The dims and the operands that tell the stored results of trials apart, in their order.
fn stored() -> impl Iterator<Item = Trial> {
    let of = |dims, operands| {
        let mut trial = Trial::all().next().expect("there are trials");
        (trial.dims, trial.operands) = (dims, operands);
        trial
    };
    [32, 64, 128, 256, 512].into_iter().flat_map(move |dims| [false, true].map(move |operands| of(dims, operands)))
}

fn element(trial: Trial, element: Element) -> Data {
    let mut trial = trial;
    trial.element = element;
    Data::of(&trial)
}

/// What the f64 reference makes of a trial, row by row.
fn expected(trial: Trial) -> Vec<Expected> {
    let data = [Element::F32, Element::F16, Element::Bf16].map(|type_| element(trial, type_));
    let computed = data.each_ref().map(|data| attention_with_budget(data.problem(), &data.inputs()).unwrap());
    let [plain, half, bf16] = computed.each_ref().map(|(want, _)| data[0].summaries(want));
    let equal = |other: &[RowSummary]| plain.iter().zip(other).all(|(x, y)| format!("{x:?}") == format!("{y:?}"));
    assert!(equal(&half) && equal(&bf16), "the operands of {trial} are the same numbers in each type");
    let (want, dim) = (&computed[0].0, data[0].problem().value_dim as usize);
    plain
        .iter()
        .enumerate()
        .map(|(row, &summary)| {
            let out = &want.out[row * dim..][..dim];
            // What f32 loses of the stored sum.
            let rounding = f64::from(summary.sum.abs()) * f64::from(f32::EPSILON);
            let sum_budget = computed.each_ref().map(|(_, budget)| {
                let of = |(at, x): (usize, &f64)| factor(at) * (budget.out.atol[row] + budget.out.rtol * x.abs());
                let finite = out.iter().enumerate().filter(|(_, x)| x.is_finite());
                (finite.map(of).sum::<f64>() + rounding) as f32
            });
            let lse_budget = want.lse.as_ref().map_or(0.0, |_| {
                let rounding = if summary.lse.is_finite() { summary.lse.abs() * f32::EPSILON } else { 0.0 };
                computed[0].1.lse.atol[row] as f32 + rounding
            });
            Expected { row: summary, sum_budget, lse_budget }
        })
        .collect()
}

/// With `WGPU_ATTENTION_WRITE_GOLDEN=1` the file is written. The library holds the file, so build it again afterwards.
#[test]
fn the_stored_results_are_those_of_the_reference() {
    let want: Vec<Expected> = stored().flat_map(expected).collect();
    if std::env::var_os("WGPU_ATTENTION_WRITE_GOLDEN").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/gpu/proof/expected.bin");
        std::fs::write(path, want.iter().flat_map(Expected::to_bytes).collect::<Vec<u8>>()).unwrap();
        return;
    }
    let got: Vec<Expected> = stored().flat_map(|trial| Data::of(&trial).expected().collect::<Vec<_>>()).collect();
    assert_eq!(got.len(), want.len());
    let numbers =
        |x: &Expected| x.to_bytes().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    for (row, (got, want)) in got.iter().zip(&want).enumerate() {
        let [got, want]: [Vec<f32>; 2] = [numbers(got), numbers(want)];
        // The exponential of another C library may differ in the last place.
        let near = |(x, y): (&f32, &f32)| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= 1e-6 * y.abs();
        assert!(got.iter().zip(&want).all(near), "row {row}: stored {got:?}, computed {want:?}");
    }
    // Some rows are finite, some hold NaN, some infinities, and some see nothing.
    let kinds = |of: &dyn Fn(&Expected) -> bool| want.iter().filter(|x| of(x)).count();
    assert!(kinds(&|x| x.row.nonfinite == 0.0) > want.len() / 2);
    assert!(kinds(&|x| x.row.nonfinite % 1000.0 > 1.0) > 20 && kinds(&|x| x.row.nonfinite >= 1000.0) > 20);
    // A budget is far below the sum that it is for.
    assert!(kinds(&|x| x.sum_budget[0] < 1e-2 * x.row.sum.abs().max(1.0)) > want.len() * 9 / 10);
}

/// Makes another text of that of a shader.
type Edit = fn(&Variant, String) -> String;

/// A device of its own, on which nothing is known yet.
fn fresh(gpu: &Adapter, edit: Option<Edit>) -> Gpu {
    let mut gpu = gpu.proving(None, |_| ());
    if let Some(edit) = edit {
        gpu.library_mut().edit_shaders(edit);
    }
    gpu
}

/// The same without optional features.
fn plain(gpu: &Adapter, edit: Edit) -> Gpu {
    let mut gpu = gpu.proving(Some(wgpu::Features::empty()), |_| ());
    gpu.library_mut().edit_shaders(edit);
    gpu
}

#[test]
fn every_kernel_passes_on_every_adapter_and_is_not_tried_again() {
    for adapter in gpus() {
        let gpu = fresh(adapter, None);
        let begun = Instant::now();
        let proof = gpu.prove().unwrap();
        let with_compilation = begun.elapsed();
        assert_eq!(proof.failures, [], "on {}", adapter.name);
        // The pipelines stay; the trials run again.
        let mut gpu = gpu;
        gpu.library_mut().set_proof(Proof::default());
        let begun = Instant::now();
        let again = gpu.prove().unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        assert_eq!(again, proof);
        println!(
            "{}: {} trials right, {} cannot run, {seconds:.2} s, with compilation {:.1} s",
            adapter.name,
            proof.right.len(),
            proof.unable.len(),
            with_compilation.as_secs_f64()
        );
        // Half a second on a quiet machine with lavapipe; tests share theirs with up to four others, and SwiftShader is slower.
        assert!(seconds < 20.0, "on {}: {seconds} s", adapter.name);
        let tried =
            |kernel, element| proof.right.iter().any(|trial| trial.kernel == kernel && trial.element == element);
        for kernel in Kernel::ALL.into_iter().filter(|&kernel| !gpu.library().caps().takes_minutes(kernel)) {
            let elements = match kernel {
                Kernel::Matrix if gpu.library().caps().matrices.is_empty() => &[][..],
                Kernel::Matrix => &[Element::F16],
                _ => &[Element::F32, Element::F16, Element::Bf16],
            };
            assert!(elements.iter().all(|&element| tried(kernel, element)), "{kernel} on {}: {proof:?}", adapter.name);
        }
        // What is known is not tried again, also in another process.
        let mut other = fresh(adapter, None);
        other.library_mut().set_proof(proof.clone());
        assert_eq!(other.prove().unwrap(), proof);
        assert_eq!(other.library().compiled_pipelines(), 0);
        // The owner of a device proves it, too.
        other.library_mut().set_proof(with!(Proof::default(), right: proof.right[1..].to_vec(), unable: proof.unable));
        let library: &Attention = other.library();
        assert!(library.prove(other.queue()).unwrap().right.contains(&proof.right[0]));
    }
}

/// What is broken in a shader, and its text afterwards.
const BREAKS: [(&str, &str); 3] = [
    // Scores a hundredth too large.
    ("params.scale", "(1.01 * params.scale)"),
    // A causal rule that lets each query see one key too many.
    ("clamp(position + 1, 0, limit)", "clamp(position + 2, 0, limit)"),
    // No bits are those of an infinity.
    ("0x7f800000u", "0x7f900000u"),
];

/// Kernels that are broken, and the first letters of their shaders.
const KERNELS: [(Kernel, &[&str]); 4] = [
    (Kernel::Rows, &["rows"]),
    (Kernel::Flash, &["flash"]),
    (Kernel::Split, &["split"]),
    (Kernel::Unfused, &["scores", "softmax", "values"]),
];

fn broken<const KERNEL: usize, const BREAK: usize>(variant: &Variant, text: String) -> String {
    let (from, to) = BREAKS[BREAK];
    let of = |shader: &&str| variant.kernel().starts_with(*shader);
    if KERNELS[KERNEL].1.iter().any(of) { text.replace(from, to) } else { text }
}

const EDITS: [[Edit; 3]; 4] = [
    [broken::<0, 0>, broken::<0, 1>, broken::<0, 2>],
    [broken::<1, 0>, broken::<1, 1>, broken::<1, 2>],
    [broken::<2, 0>, broken::<2, 1>, broken::<2, 2>],
    [broken::<3, 0>, broken::<3, 1>, broken::<3, 2>],
];

/// A problem that every kernel runs, and that no trial has the sizes of.
fn problem() -> Problem {
    let mut problem = Problem::new(1, 4, 70, 70, 48);
    problem.causal = Causal::TopLeft;
    problem
}

fn unproved(result: wgpu_attention::Result<Plan>) -> bool {
    matches!(result, Err(Error::Kernel { why: Obstacle::Unproved { .. }, .. }))
}

#[test]
fn a_kernel_that_is_wrong_is_planned_no_more() {
    for adapter in gpus() {
        for ((kernel, _), edits) in KERNELS.into_iter().zip(EDITS) {
            if adapter.library().caps().takes_minutes(kernel) {
                continue;
            }
            for (n, (edit, (from, _))) in edits.into_iter().zip(BREAKS).enumerate() {
                // A kernel that fails is tried without each feature in turn. Once is enough: some drivers compile for seconds.
                let gpu = if n == 0 { fresh(adapter, Some(edit)) } else { plain(adapter, edit) };
                let context = format!("{kernel} without {from} on {}", adapter.name);
                let forced = with!(Options::default(), kernel: Some(kernel));
                let planned = gpu.plan_with(&problem(), &forced);
                assert!(unproved(planned), "{context}: {:?}", gpu.library().proof());
                // The planner goes round it, and says why.
                let plan = gpu.plan(&problem()).unwrap_or_else(|error| panic!("{context}: {error}"));
                assert_ne!(plan.choice().kernel(), kernel, "{context}");
                let said = plan.reasons().iter().any(|why| why.contains("it failed its proof on this driver: the "));
                assert!(said, "{context}: {plan}");
                // The other kernels are not suspected.
                let failures = gpu.library().proof().failures;
                let of = |failure: &Failure| matches!(failure, Failure::Kernel { trial, .. } if trial.kernel == kernel);
                assert!(failures.iter().all(of), "{context}: {failures:?}");
            }
        }
    }
}

/// What is wrong where a problem has more than the usual.
fn broken_case<const CASE: usize>(variant: &Variant, text: String) -> String {
    let of = |shaders: &[&str]| shaders.iter().any(|shader| variant.kernel().starts_with(shader));
    match CASE {
        // A driver that ends loops early.
        0 => text
            .replace("key < end; key +=", "key < min(end, 100000u); key +=")
            .replace("step < end; step +=", "step < min(end, 60000u); step +=")
            .replace("key < key_end; key +=", "key < min(key_end, 20000u); key +="),
        // What the dispatches before left.
        1 if of(&["rows", "flash"]) => text.replace("(state[", "(0u * state["),
        1 if of(&["values"]) => text.replace("& ADD)", "& 0u)"),
        1 if of(&["merge"]) => text.replace("inverse * part", "1.01 * inverse * part"),
        // Other pages.
        2 => text.replace("min(page, params.pages - 1u)", "min(page ^ 1u, params.pages - 1u)"),
        // Sequences that end a key early.
        3 => text.replace("s.stored = s.keys;", "s.stored = s.keys; s.keys = max(s.keys, 1u) - 1u;"),
        4 | 5 if of(&["export"]) => text.replace("= bits;", "= select(bits, bits ^ 65536u, key % 8u == 3u);"),
        4 => text.replace("weigh_codes(x, m) * inverse);", "weigh_codes(x, m) * (1.01 * inverse));"),
        _ => text,
    }
}

/// A problem of each case, an edit that breaks it, and the kernels that have it.
fn cases() -> [(TrialCase, Problem, Edit, &'static [Kernel]); 6] {
    use Kernel::{Flash, Rows, Split, Unfused};
    let many = |keys| Problem::new(2, 2, 9, keys, 48);
    let packed = Some(Packed { total_q: 18, total_kv: 150 });
    [
        (TrialCase::Long, many(5000), broken_case::<0>, &[Rows, Flash, Split, Unfused]),
        (TrialCase::Several, many(2000), broken_case::<1>, &[Rows, Flash, Split, Unfused]),
        (
            TrialCase::Paged,
            with!(many(100), paged: Some(Paged { pages: 14, page_size: 16 })),
            broken_case::<2>,
            &[Rows, Flash, Split],
        ),
        (TrialCase::Packed, with!(many(100), packed), broken_case::<3>, &[Rows, Flash, Unfused]),
        (TrialCase::Weights, with!(many(100), weights: true), broken_case::<4>, &[Rows, Flash, Split, Unfused]),
        (TrialCase::Logits, with!(many(100), logits: Some(Logits::Masked)), broken_case::<5>, &[Unfused]),
    ]
}

#[test]
fn what_is_wrong_beside_the_usual_rules_out_the_problems_that_need_it() {
    for adapter in gpus() {
        for (case, problem, edit, kernels) in cases() {
            for &kernel in kernels.iter().filter(|&&kernel| !adapter.library().caps().takes_minutes(kernel)) {
                let context = format!("{kernel}, {case:?} on {}", adapter.name);
                // Bindings that hold a part of the keys.
                let mut gpu = adapter.proving(Some(wgpu::Features::empty()), |limits| {
                    if case == TrialCase::Several {
                        limits.max_storage_buffer_binding_size = 192 << 10;
                    }
                });
                gpu.library_mut().edit_shaders(edit);
                let forced = with!(Options::default(), kernel: Some(kernel));
                let planned = gpu.plan_with(&problem, &forced);
                let proof = gpu.library().proof();
                assert!(unproved(planned), "{context}: {proof:?}");
                let of = |failure: &Failure| matches!(failure, Failure::Kernel { trial, .. } if trial.case == case);
                assert!(proof.failures.len() == 1 && proof.failures.iter().all(of), "{context}: {proof:?}");
                // Problems without it are computed as before.
                let usual =
                    with!(problem.clone(), seq_kv: 100, paged: None, packed: None, weights: false, logits: None);
                gpu.plan_with(&usual, &forced).unwrap_or_else(|error| panic!("{context}: {error}"));
            }
        }
    }
}

#[test]
fn results_are_right_where_the_first_choice_is_wrong() {
    let case = Case::random(problem(), 7);
    for adapter in gpus() {
        let chosen = adapter.library().plan(&problem()).unwrap().choice().kernel();
        let place = KERNELS.iter().position(|(kernel, _)| *kernel == chosen).unwrap();
        let gpu = fresh(adapter, Some(EDITS[place][0]));
        let (_, plan) = case.check(&gpu, &Options::default());
        // `check` plans before the trial, and runs after it.
        assert_eq!(plan.choice().kernel(), chosen);
        assert_ne!(gpu.library().plan(&problem()).unwrap().choice().kernel(), chosen);
    }
}

/// Takes what another lane holds where a lane asks for that of lane 1.
fn no_broadcast(_: &Variant, text: String) -> String {
    let line =
        |line: &str| if line.contains("subgroupBroadcast(") { line.replace(", 1u)", ", 0u)") } else { line.into() };
    text.lines().map(line).collect::<Vec<String>>().join("\n")
}

#[test]
fn a_feature_that_is_wrong_is_used_no_more() {
    let mut tested = 0;
    for adapter in gpus().iter().filter(|gpu| gpu.library().caps().subgroup_size == Some(8)) {
        let gpu = fresh(adapter, Some(no_broadcast));
        let plan = gpu.plan(&problem()).unwrap();
        assert_eq!(plan.choice().kernel(), Kernel::Rows, "{plan}");
        let said =
            plan.reasons().iter().any(|why| why.starts_with("subgroup operations: not used, because they failed"));
        assert!(said, "{plan}");
        let failures = gpu.library().proof().failures;
        let of = |failure: &Failure| matches!(failure, Failure::Feature { feature: Feature::Subgroups, .. });
        assert!(failures.len() == 1 && of(&failures[0]), "{failures:?}");
        assert!(gpu.library().caps().subgroup_size.is_some() && gpu.library().proven_caps().subgroup_size.is_none());
        Case::random(problem(), 8).check(&gpu, &Options::default());
        tested += 1;
    }
    let able = gpus().iter().filter(|gpu| gpu.library().caps().subgroup_size == Some(8)).count();
    assert_eq!(tested, able);
}

#[test]
fn a_shader_that_does_not_compile_has_failed() {
    fn nonsense(variant: &Variant, text: String) -> String {
        if variant.kernel() == "flash" { "nonsense".into() } else { text }
    }
    for adapter in gpus() {
        let gpu = fresh(adapter, Some(nonsense));
        let error = gpu.plan_with(&problem(), &with!(Options::default(), kernel: Some(Kernel::Flash))).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("kernel flash cannot run here: it failed its proof on this driver: ")
                && text.contains("nonsense"),
            "{text}"
        );
        gpu.plan(&problem()).unwrap();
    }
}

#[test]
fn a_driver_that_computes_nothing_rightly_is_left_for_the_cpu() {
    fn wrong(_: &Variant, text: String) -> String {
        text.replace("params.scale", "(1.01 * params.scale)")
    }
    let case = Case::random(problem(), 10);
    for adapter in gpus() {
        let runner = Runner::proven(plain(adapter, wrong)).unwrap();
        let Runner::Cpu { why } = &runner else { panic!("{}", runner.name()) };
        assert!(
            why.contains("computes nothing rightly") && why.contains("it failed its proof on this driver"),
            "{why}"
        );
        assert_eq!(runner.name(), format!("CPU reference ({why})"));
        let outputs = runner.attention(&case.problem, &case.operands.inputs()).unwrap();
        assert!(compare(&case.problem, &case.operands.inputs(), &outputs).unwrap().passed());
        assert!(matches!(Runner::proven(fresh(adapter, None)).unwrap(), Runner::Gpu(_)));
    }
}

/// A device whose limits are too low for a trial is not refused, and not called proven either.
#[test]
fn what_cannot_be_tried_runs_unproven() {
    for adapter in gpus() {
        let gpu = adapter.proving(Some(wgpu::Features::empty()), |limits| {
            limits.max_storage_buffers_per_shader_stage = 4;
            limits.max_compute_workgroup_storage_size = 16352;
        });
        let mut with_operands = problem();
        with_operands.softcap = Some(3.0);
        let case = Case::random(with_operands, 9);
        case.check(&gpu, &Options::default());
        assert_eq!(gpu.library().proof().failures, []);
    }
}

#[test]
fn forms_that_are_asked_for_are_tried_too() {
    fn tiled(variant: &Variant, text: String) -> String {
        if variant.kernel() == "scores" { text.replace("params.scale", "(1.01 * params.scale)") } else { text }
    }
    for adapter in gpus() {
        let gpu = fresh(adapter, Some(tiled));
        let form = |form| with!(Options::default(), kernel: Some(Kernel::Unfused), form: Some(form));
        assert!(unproved(gpu.plan_with(&problem(), &form(Form::Tiled))), "on {}", adapter.name);
        assert!(gpu.plan_with(&problem(), &form(Form::Lanes)).is_ok(), "on {}", adapter.name);
    }
}

/// Scores a hundredth too large where a workgroup has one row.
fn broken_row(variant: &Variant, text: String) -> String {
    match variant {
        Variant::Split(split) if split.tile.rows == 1 => text.replace("params.scale", "(1.01 * params.scale)"),
        _ => text,
    }
}

#[test]
fn a_tile_that_the_usual_trial_does_not_have_is_tried_by_itself() {
    let decoding = Problem::new(2, 2, 1, 300, 48);
    let forced = with!(Options::default(), kernel: Some(Kernel::Split));
    let rows = |plan: &Plan| match plan.choice() {
        Choice::Split(tile) => tile.rows,
        other => panic!("{other:?}"),
    };
    for adapter in gpus() {
        let gpu = fresh(adapter, None);
        assert_eq!(rows(&gpu.plan_with(&decoding, &forced).unwrap()), 1);
        let tried = gpu.library().proof().right;
        assert!(matches!(tried[..], [Trial { kernel: Kernel::Split, tile: Some(_), .. }]), "{tried:?}");
        // A wrong tile rules out itself, and no other one of the kernel.
        let gpu = plain(adapter, broken_row);
        let plan = gpu.plan_with(&decoding, &forced).unwrap();
        assert_eq!(rows(&plan), 4, "{plan}");
        let failures = gpu.library().proof().failures;
        let of = |failure: &Failure| matches!(failure, Failure::Kernel { trial: Trial { tile: Some(_), .. }, .. });
        assert!(failures.len() == 1 && failures.iter().all(of), "{failures:?}");
        Case::random(decoding.clone(), 11).check(&gpu, &forced);
        // So does one that a tuned row names, for a problem of many queries.
        let mut gpu = plain(adapter, broken_row);
        let class = Class::of(&problem().check().unwrap());
        let choice = gpu.library().plan_with(&decoding, &forced).unwrap().choice();
        let rows = vec![Row { class, choice, ms: 1.0 }];
        gpu.library_mut().set_tuning(Tuning { source: "the test".into(), rows });
        let plan = gpu.plan(&problem()).unwrap();
        assert_ne!(plan.choice(), choice, "{plan}");
        Case::random(problem(), 12).check(&gpu, &Options::default());
    }
}

#[test]
fn precisions_that_are_asked_for_are_tried_too() {
    fn heavy(variant: &Variant, text: String) -> String {
        let fast = matches!(variant, Variant::Matrix(x) if x.precision == Precision::Fast);
        if fast { text.replace("* P_SCALE)", "* 1.05 * P_SCALE)") } else { text }
    }
    let mut p = problem();
    (p.element, p.head_dim, p.value_dim) = (Element::F16, 32, 32);
    let options =
        |precision| with!(Options::default(), kernel: Some(Kernel::Matrix), form: Some(Form::Emulated), precision);
    for adapter in gpus().iter().filter(|adapter| adapter.library().caps().f16) {
        let gpu = fresh(adapter, None);
        gpu.plan_with(&p, &options(Precision::Fast)).unwrap();
        let right = gpu.library().proof().right;
        assert_eq!(right.iter().map(|trial| trial.precision).collect::<Vec<_>>(), [Precision::Fast]);
        assert_eq!(right[0].to_string(), "matrix emulated fast f16, 32 dims");

        let gpu = fresh(adapter, Some(heavy));
        assert!(unproved(gpu.plan_with(&p, &options(Precision::Fast))), "on {}", adapter.name);
        let strict = gpu.library().plan_with(&p, &options(Precision::Strict));
        assert!(strict.is_ok(), "on {}: {strict:?}", adapter.name);
    }
}

#[test]
fn nothing_is_tried_where_the_caller_trusts_the_driver() {
    let adapter = &gpus()[0].adapter();
    let gpu = Gpu::open(adapter, &with!(DeviceOptions::default(), unproven: true)).unwrap();
    gpu.plan(&problem()).unwrap();
    assert_eq!((gpu.library().proof(), gpu.library().compiled_pipelines()), (Proof::default(), 0));
    let inputs = Inputs::default();
    assert!(gpu.attention(&problem(), &inputs).is_err(), "what is wrong with the inputs is said first");
    assert_eq!(gpu.library().compiled_pipelines(), 0);
}
