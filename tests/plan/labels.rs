//! The names of dispatches in debuggers, profiles and traces.

use std::time::Duration;

use wgpu_attention::internal::label::{labels, pass};
use wgpu_attention::operations::{Append, Merge, Order, Projection};
use wgpu_attention::{Caps, Element, Form, Kernel, Options, Plan, Problem, wgpu, with};

use crate::gpu;

fn plan(problem: &Problem, caps: &Caps, options: &Options) -> Plan {
    Plan::new(&problem.check().unwrap(), caps, options).unwrap()
}

fn forced(kernel: Kernel) -> Options {
    with!(Options::default(), kernel: Some(kernel))
}

/// The device whose largest binding has so many bytes.
fn bound(bytes: u64) -> Caps {
    Caps::new(wgpu::Limits { max_storage_buffer_binding_size: bytes, ..wgpu::Limits::default() })
}

#[test]
fn a_dispatch_of_the_whole_has_kernel_tile_batches_and_heads() {
    let label = |problem: &Problem, kernel| labels(plan(problem, &gpu(), &forced(kernel)).steps());
    let mut problem = Problem::new(1, 8, 77, 77, 64);
    assert_eq!(label(&problem, Kernel::Flash), ["flash[64×32] b0 h0..8"]);
    problem.batch = 2;
    let three = ["scores[64×64] b0..2 h0..8", "softmax b0..2 h0..8", "values[64×64] b0..2 h0..8"];
    assert_eq!(label(&problem, Kernel::Unfused), three);
    // One head needs no name.
    assert_eq!(label(&Problem::new(3, 1, 9, 9, 64), Kernel::Flash), ["flash[64×32] b0..3"]);
    assert!(label(&Problem::new(3, 1, 0, 9, 64), Kernel::Flash).is_empty());
}

#[test]
fn a_part_says_what_it_takes() {
    let problem = Problem::new(2, 2, 128, 256, 64);
    // A score matrix has 128 KiB for each head.
    let scratch = |bytes| {
        let options = with!(forced(Kernel::Unfused), scratch_budget: bytes, form: Some(Form::Tiled));
        labels(plan(&problem, &gpu(), &options).steps())
    };
    let heads = scratch(1 << 17);
    assert_eq!(heads[..3], ["scores[64×64] b0 h0", "softmax b0 h0", "values[64×64] b0 h0"]);
    assert_eq!(heads[9..], ["scores[64×64] b1 h1", "softmax b1 h1", "values[64×64] b1 h1"]);
    let rows = scratch(1 << 16);
    assert_eq!(rows[3..5], ["scores[64×64] b0 h0 rows 64..128", "softmax b0 h0 rows 64..128"]);
    // The keys of a head have 64 KiB.
    let problem = Problem::new(1, 2, 64, 256, 64);
    let keys = labels(plan(&problem, &bound(1 << 15), &forced(Kernel::Flash)).steps());
    assert_eq!(keys[..2], ["flash[64×32] b0 h0 keys 0..124", "flash[64×32] b0 h0 keys 124..248"]);
}

#[test]
fn dispatches_that_share_a_part_say_which_workgroups_they_have() {
    let options = with!(forced(Kernel::Flash), work_budget: Duration::from_micros(300));
    let shared = plan(&Problem::new(1, 8, 256, 256, 64), &gpu(), &options);
    let want = ["0..14", "14..28", "28..32"].map(|range| format!("flash[64×32] b0 h0..8 workgroups {range}"));
    assert_eq!(labels(shared.steps()), want);
}

#[test]
fn operations_have_labels_and_a_pass_names_operation_and_kernels() {
    let options = Options::default();
    let append = Append::new(2, 4, 1, 16, 64).plan(&gpu(), &options).unwrap();
    assert_eq!(labels(&append), ["append b0..2 h0..4"]);
    let merge = Merge::new(3, 2, 4, 5, 8).plan(&gpu(), &options).unwrap();
    assert_eq!(labels(&merge), ["merge_totals b0..2 h0..4", "merge b0..2 h0..4"]);
    assert_eq!(pass("merge", &merge), "merge: merge_totals, merge");
    let projection = Projection::new(8, 256, 128, Order::OutIn, Element::F32);
    let project = projection.plan(&bound(1 << 16), &options).unwrap();
    assert_eq!(labels(&project), ["project[32×32] b0 columns 0..64", "project[32×32] b0 columns 64..128"]);
}
