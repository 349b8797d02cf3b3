//! What the planner chooses on GPUs by the model of what a unit does a clock.

use wgpu_attention::proof::{Failure, Feature, Trial};
use wgpu_attention::{Caps, Element, Kernel, Options, Plan, Problem, with};

use crate::{gpu, halves, matrix_gpu, planned, says};

fn chosen(problem: &Problem, caps: &Caps) -> (Kernel, Plan) {
    let plan = planned(problem, caps, &Options::default());
    (plan.choice().kernel(), plan)
}

/// The trial of `matrix` for f16 of so many dims.
fn matrix_trial(dims: u32) -> Trial {
    let mut trial = Trial::all().find(|trial| trial.kernel == Kernel::Matrix && !trial.operands).unwrap();
    (trial.element, trial.dims) = (Element::F16, dims);
    trial
}

#[test]
fn rows_that_do_not_fit_the_registers_of_flash_go_through_a_score_matrix() {
    let square = |dim: u32, element: Element| with!(Problem::new(1, 8, 512, 512, dim), element);
    for caps in [gpu(), matrix_gpu()] {
        // Beyond 128 dims an invocation of `flash` keeps two rows instead of four. In f32 it then loads so much from workgroup memory that
        // the scores may as well go through memory.
        for (dim, element, want) in [
            (64, Element::F32, Kernel::Flash),
            (128, Element::F32, Kernel::Flash),
            (129, Element::F32, Kernel::Unfused),
            (256, Element::F32, Kernel::Unfused),
            (512, Element::F32, Kernel::Unfused),
            (256, Element::F16, Kernel::Flash),
            (256, Element::Bf16, Kernel::Flash),
            // Each 256 value dims form the scores again.
            (512, Element::F16, Kernel::Unfused),
        ] {
            let (got, plan) = chosen(&square(dim, element), &caps);
            assert_eq!(got, want, "{dim} dims {element}: {plan}");
        }
    }
    let (_, plan) = chosen(&square(256, Element::F32), &gpu());
    says(&plan, "kernel unfused: products of tiles of a score matrix");
    says(&plan, "not kernel flash: 11.17 clocks of a unit are expected for each pair of a query and a key, and 9.");
}

#[test]
fn few_rows_go_to_split_as_long_as_reading_the_keys_again_is_cheaper_than_a_tile() {
    // The rows of one workgroup of `split` read the keys once: four rows.
    let last = |dim: u32, element: Element, caps: &Caps| {
        let split = |rows: &u32| chosen(&with!(Problem::new(1, 8, *rows, 512, dim), element), caps).0 == Kernel::Split;
        (1..200).take_while(split).last().unwrap()
    };
    assert_eq!(last(64, Element::F32, &gpu()), 20);
    assert_eq!(last(64, Element::F16, &gpu()), 24);
    assert_eq!(last(128, Element::F16, &gpu()), 24);
    // Tiles of `scores` and `values` have 32 rows for so few, those of `flash` with 128 dims 64.
    assert_eq!(last(128, Element::F32, &gpu()), 12);
    // With 256 dims each row reads the keys by itself.
    assert_eq!(last(256, Element::F32, &gpu()), 3);
    // Faster tiles leave less.
    let proved = with!(matrix_gpu(), proved: vec![matrix_trial(64)]);
    assert_eq!(last(64, Element::F16, &proved), 16);
    let (_, plan) = chosen(&Problem::new(1, 8, 21, 512, 64), &gpu());
    says(
        &plan,
        "not kernel split: 6.65 clocks of a unit are expected for each pair of a query and a key, and 6.02 of flash",
    );
    // Query heads that share a key/value head share the keys of a workgroup, but not a tile of `flash`.
    let grouped = with!(Problem::new(1, 8, 10, 512, 64), kv_heads: 2);
    assert_eq!(chosen(&grouped, &gpu()).0, Kernel::Split);
}

#[test]
fn matrix_is_chosen_where_it_is_proved_and_its_matrices_are_faster_than_plain_arithmetic() {
    for (dim, dims) in [(16, 32), (32, 32), (64, 64), (80, 128), (128, 128), (200, 256)] {
        let problem = halves(512, dim);
        let proved = with!(matrix_gpu(), proved: vec![matrix_trial(dims)]);
        let (got, plan) = chosen(&problem, &proved);
        assert_eq!(got, Kernel::Matrix, "{plan}");
        says(&plan, "kernel matrix: one pass over the keys");
        // On AMD's cards, whose lanes load the operands of matrices again.
        let amd = with!(proved.clone(), subgroup_size: None, subgroup_max_size: Some(64));
        assert_eq!(chosen(&problem, &amd).0, Kernel::Matrix);
        // Another trial proves nothing, and one that failed less.
        let other = with!(matrix_gpu(), proved: vec![matrix_trial(512)]);
        says(&chosen(&problem, &other).1, "not kernel matrix: no trial has proved it on this driver");
        let failure = Failure::Kernel { trial: matrix_trial(dims), why: "the test says so".into() };
        let failed = with!(matrix_gpu(), failures: vec![failure]);
        says(&chosen(&problem, &failed).1, "not kernel matrix: it failed its proof on this driver: the test says so");
        // Apple's matrices, and those of a driver that computes on the CPU.
        let eight = with!(proved.clone(), matrices: vec![8]);
        let (got, plan) = chosen(&problem, &eight);
        assert_ne!(got, Kernel::Matrix, "{plan}");
        says(&plan, "not kernel matrix: matrices of this size are plain arithmetic");
        let (got, plan) = chosen(&problem, &with!(proved, cpu: true));
        assert_ne!(got, Kernel::Matrix, "{plan}");
        says(&plan, "not kernel matrix: a CPU adapter");
    }
    // What needs no proof runs where it is asked for.
    let options = with!(Options::default(), kernel: Some(Kernel::Matrix));
    assert_eq!(planned(&halves(512, 64), &matrix_gpu(), &options).choice().kernel(), Kernel::Matrix);
}

#[test]
fn weights_are_formed_once_unless_the_scores_would_go_through_memory_in_parts() {
    let weights = |rows: u32, dim: u32| with!(Problem::new(1, 8, rows, 512, dim), weights: true);
    for dim in [64, 256] {
        let (got, plan) = chosen(&weights(512, dim), &gpu());
        assert_eq!(got, Kernel::Unfused, "{plan}");
        says(&plan, "not kernel flash: for the weights the scores would be formed twice");
    }
    assert_eq!(chosen(&weights(4, 64), &gpu()).0, Kernel::Split);
    let little = with!(Options::default(), scratch_budget: 1 << 20);
    let plan = planned(&weights(512, 256), &gpu(), &little);
    assert_eq!(plan.choice().kernel(), Kernel::Flash, "{plan}");
    says(&plan, "not kernel unfused: the scores would pass through memory in parts");
}

#[test]
fn a_feature_that_was_dropped_is_named_with_its_trial() {
    for (feature, said) in [
        (Feature::Int64, "64-bit loads: not used, because they failed their proof on this driver"),
        (Feature::F16, "shader f16: not used, because it failed its proof on this driver"),
        (Feature::Subgroups, "subgroup operations: not used, because they failed their proof on this driver"),
    ] {
        let failure = Failure::Feature { feature, trial: matrix_trial(64), why: "the test says so".into() };
        let (_, plan) = chosen(&Problem::new(1, 8, 64, 64, 64), &with!(gpu(), failures: vec![failure]));
        says(&plan, &format!("{said} (matrix f16, 64 dims: the test says so)"));
    }
}
