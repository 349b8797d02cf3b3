//! Why each kernel was chosen or not, and rows that were measured.

use proptest::prelude::*;
use wgpu_attention::internal::kernel::{flash, matrix, rows, split};
use wgpu_attention::tuning::{Choice, Class, Queries, Row, Tuning};
use wgpu_attention::{Caps, Causal, Element, Form, Kernel, Logits, Options, Plan, Problem, with};

use crate::strategy::{caps, options, problem};
use crate::{check_tuned, gpu};

pub fn every_kernel_has_one_reason(plan: &Plan) {
    let begins = |start: &str| plan.reasons().iter().filter(|reason| reason.starts_with(start)).count();
    for kernel in Kernel::ALL {
        let name = kernel.name();
        let [chosen, not] = [begins(&format!("kernel {name}: ")), begins(&format!("not kernel {name}: "))];
        let want = usize::from(plan.choice().kernel() == kernel);
        assert_eq!([chosen, not], [want, 1 - want], "{name}\n{plan}");
    }
}

/// A GPU with subgroups, f16 and workgroup memory enough for every tile.
fn rich() -> Caps {
    let mut caps = with!(gpu(), f16: true, subgroup_size: Some(32), subgroup_min_size: Some(32));
    caps.limits.max_compute_workgroup_storage_size = 32768;
    caps
}

/// Lavapipe, as the planner sees it.
fn lavapipe() -> Caps {
    with!(rich(), cpu: true, int64: true, subgroup_size: Some(8), subgroup_min_size: Some(8))
}

fn tuning(problem: &Problem, choices: &[Choice]) -> Tuning {
    let class = Class::of(&problem.check().unwrap());
    let row = |&choice| Row { class, choice, ms: 1.25 };
    Tuning { source: "a file".into(), rows: choices.iter().map(row).collect() }
}

fn planned(problem: &Problem, caps: &Caps, options: &Options, tuning: &Tuning) -> Plan {
    Plan::tuned(&problem.check().unwrap(), caps, options, tuning).unwrap()
}

fn reason<'a>(plan: &'a Plan, start: &str) -> &'a str {
    plan.reasons().iter().find(|reason| reason.starts_with(start)).unwrap_or_else(|| panic!("{start:?} in\n{plan}"))
}

#[test]
fn a_tuned_row_chooses_kernel_and_tile_and_the_plan_says_so() {
    let p = Problem::new(1, 8, 512, 512, 64);
    let shape = p.check().unwrap();
    for caps in [rich(), lavapipe()] {
        let own = planned(&p, &caps, &Options::default(), &Tuning::default());
        let candidates = Tuning::candidates(&shape, &caps).unwrap();
        assert_eq!(candidates[0], own.choice());
        assert!(own.reasons().iter().all(|reason| !reason.contains("tuned")), "{own}");
        for choice in candidates {
            let plan = planned(&p, &caps, &Options::default(), &tuning(&p, &[choice]));
            assert_eq!(plan.choice(), choice);
            let why = reason(&plan, &format!("kernel {}: ", choice.kernel().name()));
            assert!(why.contains("1.250 ms") && why.contains("tuned rows of a file"), "{why}");
        }
    }
}

#[test]
fn candidates_are_several_known_tiles_none_twice() {
    let kernels = |p: &Problem, caps: &Caps| {
        let candidates = Tuning::candidates(&p.check().unwrap(), caps).unwrap();
        for (n, choice) in candidates.iter().enumerate() {
            assert!(choice.exists() && !candidates[..n].contains(choice), "{candidates:?}");
        }
        Kernel::ALL.map(|kernel| candidates.iter().filter(|choice| choice.kernel() == kernel).count())
    };
    // Unfused, rows, flash, matrix, split.
    let mut p = Problem::new(1, 8, 512, 512, 64);
    assert_eq!(kernels(&p, &rich()), [1, 1, 2, 0, 4]);
    assert_eq!(kernels(&p, &lavapipe()), [1, 3, 2, 0, 6]);
    assert_eq!(kernels(&p, &gpu()), [1, 1, 1, 0, 2]);
    let four = with!(lavapipe(), subgroup_size: Some(4), subgroup_min_size: Some(4));
    assert_eq!(kernels(&p, &four), [1, 0, 1, 0, 2], "rows takes minutes to compile there");
    let matrices = with!(rich(), matrices: vec![16], subgroup_max_size: Some(32));
    assert_eq!(kernels(&p, &matrices), [1, 1, 2, 0, 4], "matrix takes f16 alone");
    p.element = Element::F16;
    assert_eq!(kernels(&p, &matrices), [1, 1, 2, 1, 4]);
    p.logits = Some(Logits::Raw);
    assert_eq!(kernels(&p, &rich()), [1, 0, 0, 0, 0]);
}

#[test]
fn what_is_asked_for_wins_over_tuned_rows() {
    let p = Problem::new(1, 8, 512, 512, 64);
    let candidates = Tuning::candidates(&p.check().unwrap(), &rich()).unwrap();
    let plain = candidates.into_iter().find(|x| matches!(x, Choice::Flash(tile) if !tile.shuffle)).unwrap();
    let tuning = tuning(&p, &[plain]);
    let forced = |kernel| with!(Options::default(), kernel: Some(kernel));
    let plan = planned(&p, &rich(), &forced(Kernel::Split), &tuning);
    assert_eq!(plan.choice().kernel(), Kernel::Split);
    assert_eq!(reason(&plan, "the tuned row"), "the tuned row for flash is passed over: kernel split is asked for");
    assert_eq!(reason(&plan, "kernel split"), "kernel split: as asked");
    // A row of the kernel itself gives the tile.
    assert_eq!(planned(&p, &rich(), &forced(Kernel::Flash), &tuning).choice(), plain);
    let form = with!(Options::default(), form: Some(Form::Tiled));
    let plan = planned(&p, &rich(), &form, &tuning);
    assert_eq!(plan.choice(), Choice::Unfused);
    assert!(reason(&plan, "the tuned row for flash").contains("a form of scores and values is asked for"));
}

#[test]
fn rows_that_cannot_be_followed_are_passed_over_with_a_reason() {
    let p = Problem::new(1, 8, 512, 512, 64);
    let plan = |caps: &Caps, choices: &[Choice]| planned(&p, caps, &Options::default(), &tuning(&p, choices));
    let candidates = Tuning::candidates(&p.check().unwrap(), &rich()).unwrap();
    let shuffled = candidates.iter().copied().find(|x| matches!(x, Choice::Flash(tile) if tile.shuffle)).unwrap();
    let unknown = flash::Tile { dims: 64, rows: 3, depth: 8, value_keys: 5, resident: false, shuffle: false };
    let unknown = Choice::Flash(unknown);
    // The next row of the class is followed.
    let got = plan(&rich(), &[unknown, Choice::Unfused, shuffled]);
    assert_eq!(got.choice(), Choice::Unfused);
    assert_eq!(reason(&got, "the tuned"), "the tuned row for flash is passed over: there is no such tile");
    assert_eq!(reason(&got, "not kernel flash"), "not kernel flash: a tuned row prefers unfused");
    assert_eq!(tuning(&p, &[unknown, shuffled]).unknown().map(|row| row.choice).collect::<Vec<_>>(), [unknown]);
    // A device without subgroups.
    let got = plan(&gpu(), &[shuffled]);
    assert_eq!(got.choice(), plan(&gpu(), &[]).choice());
    assert!(reason(&got, "the tuned row for flash is passed over").contains("does not suit this device"));
    // A problem that no fused kernel runs, in the same class.
    let mut logits = p.clone();
    logits.logits = Some(Logits::Raw);
    let got = planned(&logits, &rich(), &Options::default(), &tuning(&p, &[shuffled]));
    assert_eq!(got.choice(), Choice::Unfused);
    assert!(reason(&got, "the tuned row for flash is passed over").contains("logits need the score matrix"));
    // Another class.
    let other = Problem::new(1, 8, 512, 512, 128);
    let got = planned(&other, &rich(), &Options::default(), &tuning(&p, &[Choice::Unfused]));
    assert_eq!(got.choice(), planned(&other, &rich(), &Options::default(), &Tuning::default()).choice());
    assert_eq!(reason(&got, "no tuned row"), "no tuned row of a file is for problems of this class");
}

#[test]
fn a_tile_exists_only_as_the_table_has_it() {
    let shape = Problem::new(1, 8, 512, 512, 64).check().unwrap();
    for choice in Tuning::candidates(&shape, &lavapipe()).unwrap() {
        let changed = match choice {
            Choice::Unfused => continue,
            Choice::Rows(tile) => Choice::Rows(rows::Tile { keys: tile.keys + 17, ..tile }),
            Choice::Flash(tile) => Choice::Flash(flash::Tile { depth: tile.depth + 17, ..tile }),
            Choice::Matrix(tile) => Choice::Matrix(matrix::Tile { depth: tile.depth + 17, ..tile }),
            Choice::Split(tile) => Choice::Split(split::Tile { streams: tile.streams + 17, ..tile }),
        };
        assert!(choice.exists() && !changed.exists(), "{choice:?}");
    }
}

#[test]
fn classes_part_problems_by_what_decides_speed() {
    let class = |set: fn(&mut Problem)| {
        let mut p = Problem::new(2, 8, 17, 100, 64);
        set(&mut p);
        Class::of(&p.check().unwrap())
    };
    let many = Class { dims: 64, element: Element::F32, operands: false, queries: Queries::Many, causal: false };
    assert_eq!(class(|_| ()), many);
    assert_eq!(class(|p| (p.batch, p.kv_heads, p.seq_kv, p.lse) = (1, 2, 999, true)), many);
    assert_eq!(class(|p| p.value_dim = 65), Class { dims: 128, ..many });
    assert_eq!(class(|p| p.head_dim = 512), Class { dims: 512, ..many });
    assert_eq!(class(|p| p.element = Element::Bf16), Class { element: Element::Bf16, ..many });
    assert_eq!(class(|p| p.alibi = true), Class { operands: true, ..many });
    assert_eq!(class(|p| p.causal = Causal::TopLeft), Class { causal: true, ..many });
    assert_eq!(class(|p| p.seq_q = 16), Class { queries: Queries::Few, ..many });
    let one = Class { queries: Queries::One, ..many };
    assert_eq!(class(|p| (p.seq_q, p.causal) = (1, Causal::BottomRight)), one);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever may be measured is a plan like any other, and is what is planned.
    #[test]
    fn every_candidate_keeps_to_the_limits(p in problem(), c in caps(), o in options(), n in any::<prop::sample::Index>()) {
        let Ok(candidates) = Tuning::candidates(&p.check().unwrap(), &c) else { return Ok(()) };
        let choice = candidates[n.index(candidates.len())];
        let tuning = tuning(&p, &[choice]);
        check_tuned(&p, &c, &o, &tuning);
        if let Ok(plan) = Plan::tuned(&p.check().unwrap(), &c, &Options::default(), &tuning) {
            prop_assert_eq!(plan.choice(), choice);
        }
    }
}
