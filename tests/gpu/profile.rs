//! The time of each step, by timestamps and by the wall clock.

use std::time::Duration;

use wgpu_attention::{Clock, Error, Gpu, Kernel, Options, Profile, wgpu, with};

use crate::support::{Case, gpus};
use crate::{lean, problem};

/// Profiles a case whose outputs must be right afterwards.
fn profile(gpu: &Gpu, case: &Case, options: &Options) -> Profile {
    let plan = gpu.library().plan_with(&case.problem, options).unwrap();
    let prepared = gpu.library().prepare(&plan).unwrap();
    let resident = gpu.upload(&plan, &case.operands.inputs()).unwrap();
    let profile = prepared.profile(gpu, &resident.buffers()).unwrap();
    case.compare(&gpu.download(&plan, &resident).unwrap(), &plan);
    let stamped = gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY);
    assert_eq!(profile.clock, if stamped { Clock::Timestamps } else { Clock::Wall });
    assert_eq!(profile.steps.len(), plan.dispatches());
    for (step, of) in profile.steps.iter().zip(plan.steps()) {
        assert!(step.label.starts_with(of.variant.kernel()), "{} of {}", step.label, of.variant);
        assert_eq!(step.flops, of.flops);
        assert!(step.milliseconds >= 0.0 && step.milliseconds < 60e3, "{step:?}");
    }
    assert!(profile.milliseconds() > 0.0, "{profile}");
    assert_eq!(profile.to_string().lines().count(), plan.dispatches() + 3, "{profile}");
    profile
}

#[test]
fn a_profile_times_each_step_and_leaves_the_outputs() {
    let chosen = Case::random(lean(&problem([2, 3, 33, 35, 20], |p| p.key_lengths = true)), 1);
    let three = with!(Options::default(), kernel: Some(Kernel::Unfused), work_budget: Duration::from_micros(1));
    for gpu in gpus() {
        profile(gpu, &chosen, &Options::default());
        let steps = profile(gpu, &chosen, &three).steps;
        assert!(steps.iter().any(|step| step.label.contains("softmax b0")), "{steps:?}");
        let without = gpu.limited_to(Some(wgpu::Features::empty()), |_| ());
        profile(&without, &chosen, &Options::default());
    }
}

#[test]
fn a_profile_may_need_more_timestamps_than_a_query_set_has() {
    let case = Case::random(lean(&problem([26, 30, 2, 4, 4], |_| ())), 2);
    let options = with!(Options::default(), kernel: Some(Kernel::Unfused), scratch_budget: 32, work_budget: Duration::from_secs(3600));
    for gpu in gpus() {
        let profile = profile(gpu, &case, &options);
        assert!(2 * profile.steps.len() > wgpu::QUERY_SET_MAX_QUERIES as usize, "{}", profile.steps.len());
        let plan = gpu.library().plan_with(&case.problem, &options).unwrap();
        assert_eq!(plan.slices(), 1, "the steps of a slice share a submission");
    }
}

#[test]
fn a_plan_of_another_device_is_not_profiled() {
    let case = Case::random(lean(&problem([1, 1, 3, 5, 4], |_| ())), 3);
    let gpu = &gpus()[0];
    let other = gpu.limited(|_| ());
    let plan = other.library().plan(&case.problem).unwrap();
    let prepared = other.library().prepare(&plan).unwrap();
    let resident = other.upload(&plan, &case.operands.inputs()).unwrap();
    let error = prepared.profile(gpu, &resident.buffers()).unwrap_err();
    assert!(matches!(error, Error::OtherDevice { field: "prepared" }), "{error}");
}
