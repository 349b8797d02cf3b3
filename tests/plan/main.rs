//! Plans as pure data: no GPU is needed to prove that every row is covered once, no limit is exceeded, and no address leaves
//! its binding.

mod address;
mod coverage;
mod golden;
mod labels;
mod layer;
mod long;
mod model;
mod strategy;
mod tuned;

use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::*;
use wgpu_attention::internal::Step;
use wgpu_attention::internal::kernel::matrix::Matrix;
use wgpu_attention::internal::kernel::{Lanes, Slot, Variant};
use wgpu_attention::tuning::Tuning;
use wgpu_attention::{
    Bias, Broadcast, Caps, Element, Error, Form, Kernel, Logits, Obstacle, Options, Plan, Precision, Problem, wgpu,
    with,
};

use strategy::{caps, options, problem};

fn plan(problem: &Problem, caps: &Caps, options: &Options, tuning: &Tuning) -> Option<Plan> {
    match Plan::tuned(&problem.check().unwrap(), caps, options, tuning) {
        Ok(plan) => Some(plan),
        // What is too large for the device, or excluded, says so; nothing else may go wrong.
        Err(Error::TooLarge { value, limit, .. }) if value > limit => None,
        Err(Error::Room { size, limit, .. }) if size > limit => None,
        Err(Error::Conflict { left: "element", right: "out", .. }) if problem.element != Element::F32 => None,
        Err(Error::Kernel { kernel: "native f16", .. }) if options.native_f16 == Some(true) => None,
        Err(Error::Kernel { kernel: "unfused", .. }) if options.form == Some(Form::Emulated) => None,
        Err(Error::Kernel { kernel, .. }) if options.kernel.is_some_and(|forced| forced.name() == kernel) => None,
        Err(Error::Kernel { kernel: "unfused", why: Obstacle::Pages })
            if problem.paged.is_some() && options.form.is_some() =>
        {
            None
        }
        Err(Error::Kernel { kernel: "unfused", why: Obstacle::Every { unfused, fused } })
            if problem.paged.is_some() && *unfused == Obstacle::Pages =>
        {
            assert!(fused.iter().any(|(kernel, _)| *kernel == Kernel::Flash), "{fused:?}");
            None
        }
        Err(error) => panic!("{error}\n{problem:?}\n{caps:?}"),
    }
}

/// The body of the kernels that have several.
/// The lanes of a kernel whose rows are each a lane's.
fn lanes(variant: &Variant) -> Option<Lanes> {
    match variant {
        Variant::ScoresLanes(x) => Some(x.tile.lanes),
        Variant::ValuesLanes(x) => Some(x.tile.lanes),
        Variant::Rows(x) => Some(x.tile.lanes),
        _ => None,
    }
}

/// Lanes of a subgroup that a shader counts on.
fn subgroup(variant: &Variant) -> Option<u32> {
    match (variant, lanes(variant)) {
        (Variant::Split(x), _) => x.tile.wide().then_some(8),
        (_, Some(Lanes { lanes, subgroup, .. })) => subgroup.then_some(lanes),
        _ => None,
    }
}

fn within_limits(step: &Step, plan: &Plan, caps: &Caps) {
    let l = &caps.limits;
    let variant = &step.variant;
    assert_eq!(variant.bindings().len(), step.bindings.len());
    assert!(step.bindings.len() as u32 <= l.max_storage_buffers_per_shader_stage, "{variant}");
    assert!(step.bindings.len() as u32 + 1 < l.max_bindings_per_bind_group + 1);
    for ((slot, written), bound) in variant.bindings().into_iter().zip(&step.bindings) {
        let size = operand_bytes(plan, bound.slot);
        assert!(bound.offset % u64::from(l.min_storage_buffer_offset_alignment) == 0, "{variant} {bound:?}");
        assert!(bound.size > 0 && bound.size % 4 == 0, "{variant} {bound:?}");
        assert!(bound.size <= l.max_storage_buffer_binding_size, "{variant} {bound:?}");
        assert!(bound.offset + bound.size <= size, "{variant} {bound:?} of {size}");
        assert_eq!(bound.written, written, "{variant} {bound:?}");
        let stands_in = matches!(
            (slot, bound.slot),
            (Slot::Mask | Slot::Bias, Slot::Lists)
                // Where there is no key, see below.
                | (Slot::K | Slot::V, Slot::Lists)
                | (Slot::Out, Slot::Unpacked | Slot::PartialOut)
                | (Slot::Lse, Slot::Spare | Slot::PartialLse)
                | (Slot::Scores, Slot::Weights)
        );
        assert!(slot == bound.slot || stands_in, "{variant} {bound:?}");
        let keys = matches!(slot, Slot::K | Slot::V) && slot != bound.slot;
        assert!(!keys || plan.shape().k().is_empty(), "{variant} {bound:?}");
        let same =
            |other: &&wgpu_attention::internal::Bound| other.slot == bound.slot && (other.written || bound.written);
        assert_eq!(
            step.bindings.iter().filter(same).count(),
            usize::from(bound.written),
            "{variant} reads what it writes"
        );
    }
    let workgroups: u64 = step.grid.iter().map(|&n| u64::from(n)).product();
    assert!(step.grid.iter().all(|&n| (1..=l.max_compute_workgroups_per_dimension).contains(&n)), "{:?}", step.grid);
    let place = step.uniform.place();
    assert!(place.first < place.end && u64::from(place.end - place.first) <= workgroups);
    assert!(u64::from(place.first) + workgroups <= 1 << 31, "workgroup numbers cannot wrap");
    assert!(variant.workgroup_bytes() <= l.max_compute_workgroup_storage_size, "{variant}");
    assert!(
        variant.threads() <= l.max_compute_invocations_per_workgroup.min(l.max_compute_workgroup_size_x),
        "{variant}"
    );
    assert!(!variant.needs().f16 || caps.f16, "{variant}");
    assert!(!variant.needs().int64 || caps.int64, "{variant}");
    if let Variant::Matrix(x) = variant {
        matrices(x, plan, caps);
    }
    match (variant, subgroup(variant)) {
        // Shuffles among eight neighbours: any size from eight on will do.
        (Variant::Flash(_) | Variant::Split(_), None) if variant.needs().subgroups => {
            assert!(caps.subgroup_min_size >= Some(8), "{variant}")
        }
        // Whole subgroups of a size that the text counts on, or of any size up to that which it has blocks for.
        (Variant::Matrix(x), None) if !x.emulated => {
            assert!(variant.needs().subgroups && caps.subgroup_max_size <= Some(64), "{variant}");
            assert!(x.varying || caps.subgroup_size == Some(32), "{variant}");
        }
        (_, Some(lanes)) => {
            assert!(variant.needs().subgroups, "{variant}");
            assert_eq!(Some(lanes), caps.subgroup_size, "{variant}");
        }
        _ => assert!(!variant.needs().subgroups, "{variant}"),
    }
    static RENDERED: LazyLock<HashSet<Variant>> = LazyLock::new(|| Variant::all().into_iter().collect());
    assert!(RENDERED.contains(variant), "{variant} is not rendered by the tests");
}

/// Cooperative matrices are planned where the device has them, in a size that it has, for f16; otherwise only emulated, when asked for.
fn matrices(x: &Matrix, plan: &Plan, caps: &Caps) {
    assert_eq!(plan.shape().problem().element, Element::F16);
    assert!(x.emulated || caps.matrices.contains(&x.tile.size), "{x}");
    assert!(!x.tile.resident || plan.shape().problem().head_dim <= x.tile.depth, "{x}");
}

/// Bytes of an operand as the caller, or `prepare`, allocates it.
fn operand_bytes(plan: &Plan, slot: Slot) -> u64 {
    let s = plan.shape();
    let bytes = s.problem().element.bytes();
    let size = match slot {
        Slot::Q => s.q().extent() * bytes,
        Slot::K => s.k().extent() * bytes,
        Slot::V => s.v().extent() * bytes,
        Slot::Out => s.out().extent() * bytes,
        Slot::Lse => 4 * s.lse_len(),
        Slot::Weights | Slot::Logits => 4 * s.scores_len(),
        Slot::Mask => s.problem().mask.unwrap().len() as u64,
        Slot::Bias => s.problem().bias.map(|bias| bias.shape.len() as u64 * bias.element.bytes()).unwrap(),
        Slot::Sinks => 4 * u64::from(s.problem().heads),
        Slot::Scores
        | Slot::State
        | Slot::Unpacked
        | Slot::Spare
        | Slot::PartialOut
        | Slot::PartialLse
        | Slot::Totals => plan.scratch_bytes(),
        Slot::Lists => u64::MAX - 3,
        _ => unreachable!("attention binds no operand of the layer"),
    };
    size.next_multiple_of(4)
}

fn check(problem: &Problem, caps: &Caps, options: &Options) -> bool {
    check_tuned(problem, caps, options, &Tuning::default())
}

fn check_tuned(problem: &Problem, caps: &Caps, options: &Options, tuning: &Tuning) -> bool {
    let Some(plan) = plan(problem, caps, options, tuning) else { return false };
    tuned::every_kernel_has_one_reason(&plan);
    plan.steps().iter().for_each(|step| within_limits(step, &plan, caps));
    slices_partition_the_steps(&plan, caps, options);
    let largest = |slot| {
        let bound = plan.steps().iter().flat_map(|step| &step.bindings).filter(|bound| bound.slot == slot);
        bound.map(|bound| bound.offset + bound.size).max().unwrap_or(0)
    };
    assert!(largest(Slot::Scores).max(largest(Slot::State)) <= options.scratch_budget, "{plan}");
    let own =
        [Slot::Scores, Slot::State, Slot::Unpacked, Slot::Spare, Slot::PartialOut, Slot::PartialLse, Slot::Totals];
    let scratch = own.map(largest).into_iter().sum::<u64>();
    // `pack` rounds its last word up.
    assert!((scratch..scratch + 4).contains(&plan.scratch_bytes()), "{} of {scratch}: {plan}", plan.scratch_bytes());
    coverage::every_workgroup_once(&plan);
    if plan.shape().scores_len() <= 1 << 15 {
        coverage::every_place_once(&plan);
        address::inside(&plan);
    }
    true
}

/// Plans a problem that has no batch (axis 0), no query (2) or no key (3).
fn empty(mut p: Problem, caps: &Caps, options: &Options, axis: usize) {
    let full = [p.batch, p.heads, p.seq_q, p.seq_kv][axis];
    let none = |shape: &mut Broadcast| {
        if shape.0[axis] != 1 || full == 1 {
            shape.0[axis] = 0;
        }
    };
    p.mask.iter_mut().for_each(none);
    p.bias.iter_mut().for_each(|bias| none(&mut bias.shape));
    *[&mut p.batch, &mut p.heads, &mut p.seq_q, &mut p.seq_kv][axis] = 0;
    let Some(plan) = plan(&p, caps, options, &Tuning::default()) else { return };
    tuned::every_kernel_has_one_reason(&plan);
    slices_partition_the_steps(&plan, caps, options);
    if axis < 3 {
        assert_eq!((plan.dispatches(), plan.slices(), plan.scratch_bytes()), (0, 0, 0), "{plan}");
        return;
    }
    plan.steps().iter().for_each(|step| within_limits(step, &plan, caps));
    let s = plan.shape();
    let (mut out, mut lse) = (0, 0);
    for step in plan.steps() {
        let rows = || -> Vec<coverage::Place> { coverage::places(&plan, step).collect() };
        let bound = |slot| step.bindings.iter().any(|bound| bound.slot == slot);
        match &step.variant {
            Variant::MergeTotals(x) => lse += if x.lse { rows_of(step) } else { 0 },
            Variant::Merge(_) => out += rows_of(step) / u64::from(s.problem().value_dim.div_ceil(4)),
            Variant::Softmax(x) => {
                let place = step.uniform.place();
                lse += if x.lse { u64::from(place.end - place.first) } else { 0 };
            }
            Variant::Pack(_) => {}
            _ if bound(Slot::PartialOut) => {}
            Variant::Values(_)
            | Variant::ValuesLanes(_)
            | Variant::Rows(_)
            | Variant::Flash(_)
            | Variant::Matrix(_)
            | Variant::Split(_) => {
                let first: u64 =
                    rows().iter().filter(|place| place.cols.start == 0).map(|place| place.rows.len() as u64).sum();
                out += first;
                lse += if bound(Slot::Lse) { first } else { 0 };
            }
            other => panic!("{other} has nothing to do without a key\n{plan}"),
        }
    }
    let rows = u64::from(s.problem().batch) * u64::from(s.problem().heads) * u64::from(s.problem().seq_q);
    assert_eq!((out, lse), (rows, if s.problem().lse { rows } else { 0 }), "{plan}");
}

/// Items of a dispatch of `merge`, without those beyond the last.
fn rows_of(step: &Step) -> u64 {
    let threads = step.variant.threads();
    let place = step.uniform.place();
    u64::from((place.end * threads).min(step.uniform["items"]) - place.first * threads)
}

fn slices_partition_the_steps(plan: &Plan, caps: &Caps, options: &Options) {
    let steps: Vec<&Step> = (0..plan.slices()).flat_map(|slice| plan.slice(slice)).collect();
    assert!(steps.iter().copied().eq(plan.steps()) && plan.dispatches() == steps.len());
    let rate = caps.flops_per_second();
    let budget = rate * options.work_budget.as_secs_f64();
    for slice in 0..plan.slices() {
        let steps = plan.slice(slice);
        let flops: f64 = steps.iter().map(|step| step.flops).sum();
        // A dispatch of one workgroup cannot be cut; one of several may be a workgroup too long.
        let place = steps[0].uniform.place();
        let workgroups = u64::from(place.end - place.first);
        let alone = steps.len() == 1 && flops <= budget + flops / workgroups as f64 * 1.0001;
        assert!(
            !steps.is_empty() && (flops <= budget * 1.0001 || alone),
            "slice {slice} of {flops} flops over {budget}"
        );
    }
    let total: f64 = plan.steps().iter().map(|step| step.flops).sum();
    assert!((plan.estimate().as_secs_f64() - total / rate).abs() <= 1e-6 + total / rate * 1e-6);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn without_a_row_nothing_runs_and_without_a_key_every_output_is_written_once(
        p in problem(), c in caps(), o in options(), axis in prop::sample::select(&[0usize, 2, 3])
    ) {
        empty(p, &c, &o, axis);
    }

    #[test]
    fn every_plan_keeps_to_its_limits_and_covers_everything_once(p in problem(), c in caps(), o in options()) {
        check(&p, &c, &o);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same where cooperative matrices are: random devices seldom have all that they take.
    #[test]
    fn every_plan_with_matrices_keeps_to_its_limits_too(p in problem(), c in caps(), o in options()) {
        let (mut p, mut c) = (p, c);
        (p.element, p.weights, p.logits) = (Element::F16, false, None);
        (c.f16, c.limits.max_compute_workgroup_storage_size) = (true, 49_152);
        c.limits.max_storage_buffers_per_shader_stage = 8;
        c.limits.max_compute_invocations_per_workgroup = 128;
        c.limits.max_compute_workgroup_size_x = 128;
        if c.matrices.is_empty() {
            c.matrices = vec![8, 16];
        }
        if c.subgroup_max_size.is_none_or(|most| most > 64) {
            (c.subgroup_size, c.subgroup_min_size, c.subgroup_max_size) = (None, Some(32), Some(64));
        }
        let o = with!(o, kernel: Some(Kernel::Matrix), form: None, native_f16: None);
        check(&p, &c, &o);
    }
}

/// A device with what every WebGPU device has.
fn gpu() -> Caps {
    Caps::new(wgpu::Limits::default())
}

/// The same with buffers that hold any tensor.
fn roomy() -> Caps {
    let mut caps = gpu();
    caps.limits.max_buffer_size = 1 << 60;
    caps
}

#[test]
fn large_problems_keep_to_the_limits() {
    let mut long = Problem::new(1, 1, 1 << 17, 1 << 17, 128);
    long.causal = wgpu_attention::Causal::TopLeft;
    let mut many = Problem::new(1 << 13, 1 << 13, 1, 64, 8);
    many.kv_heads = 1;
    let mut decode = Problem::new(64, 32, 1, 1 << 19, 128);
    decode.kv_heads = 8;
    let mut long_half = Problem::new(4, 1, 64, 1 << 22, 128);
    long_half.element = Element::F16;
    for p in [long, many, decode, long_half] {
        for caps in [roomy(), with!(roomy(), cpu: true, subgroup_size: Some(8))] {
            assert!(check(&p, &caps, &Options::default()), "{p:?}");
        }
    }
}

/// A problem of which one operand alone is larger than a binding: it is cut into parts, whatever the kernel.
#[test]
fn each_operand_is_held_to_the_binding_limit() {
    let mut caps = roomy();
    caps.limits.max_storage_buffer_binding_size = 20_000;
    caps.limits.max_storage_buffers_per_shader_stage = 8;
    let wide = Problem::new(1, 1, 500, 64, 4);
    type Set = fn(&mut Problem);
    let operands: [(Slot, &Problem, Set); 7] = [
        (Slot::Mask, &wide, |p| p.mask = Some(Broadcast([1, 1, 500, 64]))),
        (Slot::Bias, &wide, |p| p.bias = Some(Bias { shape: Broadcast([1, 1, 500, 64]), element: Element::Bf16 })),
        (Slot::Q, &wide, |p| p.head_dim = 16),
        (Slot::Out, &wide, |p| p.value_dim = 16),
        (Slot::Lse, &wide, |p| (p.seq_q, p.head_dim, p.value_dim, p.element, p.lse) = (8000, 1, 1, Element::F16, true)),
        (Slot::Weights, &wide, |p| p.weights = true),
        (Slot::Logits, &wide, |p| p.logits = Some(Logits::Masked)),
    ];
    for (slot, problem, set) in operands {
        let mut p = problem.clone();
        set(&mut p);
        let kernels = [None, Some(Kernel::Unfused), Some(Kernel::Rows), Some(Kernel::Flash)];
        for kernel in kernels {
            let matrix = p.logits.is_some() && !matches!(kernel, None | Some(Kernel::Unfused));
            let options = with!(Options::default(), kernel);
            assert_eq!(check(&p, &caps, &options), !matrix, "{slot:?} by {kernel:?}");
        }
    }
    // One row of a bias that no part holds.
    let mut p = Problem::new(1, 1, 2, 9000, 1);
    (p.element, p.bias) = (Element::F16, Some(Bias { shape: Broadcast([1, 1, 1, 9000]), element: Element::F32 }));
    let options = with!(Options::default(), kernel: Some(Kernel::Rows));
    let error = Plan::new(&p.check().unwrap(), &caps, &options).unwrap_err();
    assert!(matches!(error, Error::Room { field: "bias", size, .. } if size >= 36_000), "{error}");
}

#[test]
fn the_same_problem_gives_the_same_plan() {
    let shape = Problem::new(3, 6, 100, 300, 40).check().unwrap();
    let once = || Plan::new(&shape, &gpu(), &Options::default()).unwrap();
    assert_eq!(once(), once());
}

#[test]
fn forced_forms_are_planned_or_refused_never_replaced() {
    let mut p = Problem::new(1, 2, 33, 65, 64);
    let shape = p.check().unwrap();
    for caps in [gpu(), with!(gpu(), cpu: true, subgroup_size: Some(4), f16: true)] {
        for form in [Form::Tiled, Form::Lanes] {
            let plan = Plan::new(&shape, &caps, &with!(Options::default(), form: Some(form))).unwrap();
            let products: Vec<_> = plan.steps().iter().filter(|step| step.variant.stage() != "softmax").collect();
            assert_eq!(products.len(), 2, "{plan}");
            assert!(products.iter().all(|step| lanes(&step.variant).is_some() == (form == Form::Lanes)), "{plan}");
        }
    }
    let kernel = |p: &Problem, kernel| {
        let options = with!(Options::default(), kernel: Some(kernel));
        Plan::new(&p.check().unwrap(), &gpu(), &options)
    };
    assert_eq!(kernel(&p, Kernel::Rows).unwrap().kernel(), "rows");
    assert_eq!(kernel(&p, Kernel::Unfused).unwrap().kernel(), "scores+softmax+values");
    p.weights = true;
    assert_eq!(kernel(&p, Kernel::Rows).unwrap().kernel(), "rows+scores+softmax");
    assert_eq!(kernel(&p, Kernel::Unfused).unwrap().kernel(), "scores+softmax+export+values");
    p.weights = false;
    p.logits = Some(Logits::Masked);
    let error = kernel(&p, Kernel::Rows).unwrap_err();
    assert!(matches!(&error, Error::Kernel { kernel: "rows", why: Obstacle::Logits }), "{error}");
    p.logits = None;
    p.element = Element::F16;
    let shape = p.check().unwrap();
    let native = |form, f16| {
        let options = with!(Options::default(), form: Some(form), native_f16: Some(true));
        Plan::new(&shape, &with!(gpu(), f16), &options)
    };
    for (form, f16, why) in [(Form::Tiled, false, Obstacle::NoF16), (Form::Lanes, true, Obstacle::LanesPackedF16)] {
        assert_eq!(native(form, f16).unwrap_err(), Error::Kernel { kernel: "native f16", why });
    }
    assert!(native(Form::Tiled, true).unwrap().steps().iter().any(|step| step.variant.needs().f16));
    let packed = with!(Options::default(), native_f16: Some(false));
    let plan = Plan::new(&shape, &with!(gpu(), f16: true), &packed).unwrap();
    assert!(!plan.steps().iter().any(|step| step.variant.needs().f16));
}

#[test]
fn weights_have_no_score_matrix_beside_them_where_it_would_be_large() {
    let mut p = Problem::new(1, 8, 512, 512, 64);
    p.weights = true;
    let plan = |cpu, scratch_budget| {
        let caps = with!(gpu(), cpu, subgroup_size: Some(8), subgroup_min_size: Some(8));
        Plan::new(&p.check().unwrap(), &caps, &with!(Options::default(), scratch_budget)).unwrap()
    };
    let small = plan(false, 256 << 20);
    assert_eq!(small.kernel(), "scores+softmax+export+values");
    assert_eq!(plan(true, 1 << 20).kernel(), "scores+softmax+export+values");
    let large = plan(false, 1 << 20);
    assert_eq!(large.kernel(), "flash+scores+softmax");
    assert_eq!(large.scratch_bytes(), 0);
    let mut decode = Problem::new(1, 32, 1, 4096, 128);
    (decode.kv_heads, decode.weights) = (8, true);
    for caps in [gpu(), with!(gpu(), cpu: true, subgroup_size: Some(8), subgroup_min_size: Some(8))] {
        let plan = Plan::new(&decode.check().unwrap(), &caps, &Options::default()).unwrap();
        assert!(plan.kernel().starts_with("split+") && plan.kernel().contains("+scores+softmax"), "{plan}");
    }
    assert!(large.reasons().iter().any(|reason| reason.contains("no score matrix")), "{large}");
    assert!(small.reasons().iter().any(|reason| reason.contains("formed twice")), "{small}");
}

#[test]
fn flash_has_a_tile_for_each_bucket_of_dims_on_the_smallest_device() {
    let mut caps = gpu();
    caps.limits.max_compute_workgroup_storage_size = 16_352;
    let options = with!(Options::default(), kernel: Some(Kernel::Flash));
    for dims in [32, 64, 128, 256] {
        for element in [Element::F32, Element::F16, Element::Bf16] {
            let mut p = Problem::new(1, 2, 128, 128, dims);
            p.element = element;
            let plan = Plan::new(&p.check().unwrap(), &caps, &options).unwrap();
            let Variant::Flash(x) = plan.steps()[0].variant else { panic!("{plan}") };
            assert_eq!(x.tile.dims, dims, "{plan}");
            assert_eq!(plan.steps()[0].bindings.len(), 4);
        }
    }
}

#[test]
fn devices_below_the_floor_are_refused_by_the_name_of_the_limit() {
    let shape = Problem::new(1, 1, 4, 4, 4).check().unwrap();
    type Lower = fn(&mut wgpu::Limits);
    let lower: [(&str, Lower); 5] = [
        ("max_storage_buffers_per_shader_stage", |l| l.max_storage_buffers_per_shader_stage = 3),
        ("max_compute_workgroup_storage_size", |l| l.max_compute_workgroup_storage_size = 1024),
        ("max_compute_invocations_per_workgroup", |l| l.max_compute_invocations_per_workgroup = 32),
        ("max_compute_workgroups_per_dimension", |l| l.max_compute_workgroups_per_dimension = 0),
        ("max_storage_buffer_binding_size", |l| l.max_storage_buffer_binding_size = 2048),
    ];
    for (name, lower) in lower {
        let mut caps = gpu();
        lower(&mut caps.limits);
        let error = Plan::new(&shape, &caps, &Options::default()).unwrap_err();
        assert!(matches!(error, Error::Device { limit, got, want } if limit == name && got < want), "{error}");
    }
}

#[test]
fn a_short_work_budget_makes_more_and_shorter_slices() {
    let shape = Problem::new(1, 8, 512, 512, 64).check().unwrap();
    let slices = |micros| {
        let options = with!(Options::default(), work_budget: Duration::from_micros(micros));
        Plan::new(&shape, &gpu(), &options).unwrap().slices()
    };
    assert!(slices(1_000_000) == 1 && slices(1000) > 1 && slices(100) > slices(1000));
}

#[test]
fn a_plan_says_what_it_does_and_why() {
    let shape = Problem::new(1, 8, 512, 512, 63).check().unwrap();
    let plan = Plan::new(&shape, &gpu(), &Options::default()).unwrap();
    let text = plan.to_string();
    for part in [plan.kernel().as_str(), "1 dispatch in 1 slice, 0 bytes of scratch", "estimated", "whole vectors"] {
        assert!(part.split('+').all(|part| text.contains(part)), "{part:?} is not in\n{text}");
    }
    assert!(!plan.reasons().is_empty());
    let caps = with!(gpu(), cpu: true, subgroup_size: Some(8));
    let unfused = with!(Options::default(), kernel: Some(Kernel::Unfused));
    let text = Plan::new(&shape, &caps, &unfused).unwrap().to_string();
    assert!(text.contains("3 dispatches in ") && text.contains(" slices, "), "{text}");
    // Of one there is no plural, also in the names of tiles.
    let rows = with!(Options::default(), kernel: Some(Kernel::Rows));
    let caps = with!(caps, subgroup_size: None);
    let text = Plan::new(&shape, &caps, &rows).unwrap().to_string();
    assert!(text.contains("8 rows a lane, 1 key, 64 dims"), "{text}");
}

#[test]
fn work_that_no_device_finishes_is_refused_rather_than_planned_for_ever() {
    let tiny = with!(Options::default(), work_budget: Duration::ZERO);
    let rows = Problem::new(1 << 14, 1 << 14, 1 << 20, 1 << 10, 1);
    let pairs = Problem::new(1, 1, 1 << 24, 1 << 24, 512);
    for (problem, options) in [(&rows, &Options::default()), (&pairs, &Options::default()), (&pairs, &tiny)] {
        for caps in [roomy(), with!(roomy(), cpu: true)] {
            let error = Plan::new(&problem.check().unwrap(), &caps, options).unwrap_err();
            assert!(matches!(error, Error::Room { unit: "dispatches", size, limit, .. } if size > limit), "{error}");
        }
    }
}

fn says(plan: &Plan, start: &str) {
    assert!(plan.reasons().iter().any(|reason| reason.starts_with(start)), "{start:?}\n{plan}");
}

/// A GPU with matrices of f16.
fn matrix_gpu() -> Caps {
    let limits = wgpu::Limits { max_compute_workgroup_storage_size: 49_152, ..wgpu::Limits::default() };
    let some = Some(32);
    with!(gpu(), f16: true, subgroup_size: some, subgroup_min_size: some, subgroup_max_size: some, matrices: vec![16], limits)
}

fn halves(seq_q: u32, dim: u32) -> Problem {
    let mut p = Problem::new(1, 8, seq_q, 512, dim);
    p.element = Element::F16;
    p
}

fn planned(p: &Problem, caps: &Caps, options: &Options) -> Plan {
    Plan::new(&p.check().unwrap(), caps, options).unwrap()
}

#[test]
fn matrix_runs_f16_where_it_is_asked_for_or_proved() {
    let forced = with!(Options::default(), kernel: Some(Kernel::Matrix));
    for dim in [16, 64, 80, 128, 200] {
        let own = planned(&halves(512, dim), &matrix_gpu(), &Options::default());
        assert_eq!(own.kernel(), "flash", "{own}");
        says(&own, "not kernel matrix: no trial has proved it on this driver");
        let plan = planned(&halves(512, dim), &matrix_gpu(), &forced);
        assert_eq!(plan.kernel(), "matrix", "{plan}");
        assert!(plan.steps().iter().all(|step| step.variant.needs().matrices == Some(16)), "{plan}");
    }
    let metal = with!(matrix_gpu(), matrices: vec![8], subgroup_size: None, subgroup_min_size: Some(4), subgroup_max_size: Some(64), limits: wgpu::Limits { max_compute_workgroup_storage_size: 32_768, ..wgpu::Limits::default() });
    assert_eq!(planned(&halves(512, 128), &metal, &forced).steps()[0].variant.needs().matrices, Some(8));

    let mut full = halves(512, 64);
    full.element = Element::F32;
    let mut brain = full.clone();
    brain.element = Element::Bf16;
    let none = with!(matrix_gpu(), matrices: vec![]);
    let wide = with!(matrix_gpu(), subgroup_size: None, subgroup_max_size: Some(128));
    let small = with!(matrix_gpu(), limits: wgpu::Limits::default());
    let no_f16 = with!(matrix_gpu(), f16: false);
    let prefill = halves(512, 64);
    for (p, caps, why) in [
        (&full, &matrix_gpu(), Obstacle::NotF16 { element: Element::F32 }),
        (&brain, &matrix_gpu(), Obstacle::NotF16 { element: Element::Bf16 }),
        (&prefill, &none, Obstacle::NoMatrices),
        (&prefill, &wide, Obstacle::SubgroupLanes { limit: 64 }),
        (&prefill, &small, Obstacle::NoTile),
        (&prefill, &no_f16, Obstacle::NoF16),
    ] {
        let plan = planned(p, caps, &Options::default());
        assert!(plan.steps().iter().all(|step| step.variant.needs().matrices.is_none()), "{plan}");
        assert!(plan.reasons().contains(&format!("not kernel matrix: {why}")), "{why}: {plan}");
        let refused = Plan::new(&p.check().unwrap(), caps, &forced).unwrap_err();
        assert_eq!(refused, Error::Kernel { kernel: "matrix", why });
    }
}

#[test]
fn only_matrix_heeds_the_precision() {
    let p = halves(512, 64);
    let [strict, fast] = [Precision::Strict, Precision::Fast].map(|precision| {
        let of = |kernel| planned(&p, &matrix_gpu(), &with!(Options::default(), kernel, precision));
        let plans = [None, Some(Kernel::Flash), Some(Kernel::Unfused), Some(Kernel::Matrix)].map(of);
        plans.map(|plan| plan.steps().iter().map(|step| step.variant).collect::<Vec<_>>())
    });
    assert_eq!(strict[..3], fast[..3]);
    let bytes = |variants: &[Variant]| variants[0].workgroup_bytes();
    // 64 rows × 32 keys and 8 halves between rows.
    assert_eq!(bytes(&strict[3]) - bytes(&fast[3]), 2 * 64 * 40);
}

#[test]
fn the_emulated_form_runs_only_when_asked_for() {
    let p = halves(64, 32);
    let device = with!(gpu(), f16: true);
    let device = with!(device, limits: matrix_gpu().limits);
    let form = Some(Form::Emulated);
    let plan = planned(&p, &device, &with!(Options::default(), kernel: Some(Kernel::Matrix), form));
    assert!(matches!(plan.steps()[0].variant, Variant::Matrix(x) if x.emulated), "{plan}");
    for kernel in [None, Some(Kernel::Flash), Some(Kernel::Unfused)] {
        let error = Plan::new(&p.check().unwrap(), &device, &with!(Options::default(), kernel, form)).unwrap_err();
        let kernel = kernel.unwrap_or(Kernel::Unfused).name();
        assert_eq!(error, Error::Kernel { kernel, why: Obstacle::NotEmulated });
    }
    for caps in [device, matrix_gpu()] {
        for options in [Options::default(), with!(Options::default(), kernel: Some(Kernel::Matrix))] {
            let Ok(plan) = Plan::new(&p.check().unwrap(), &caps, &options) else { continue };
            let emulated = |step: &Step| matches!(step.variant, Variant::Matrix(x) if x.emulated);
            assert!(!plan.steps().iter().any(emulated), "{plan}");
        }
    }
}
