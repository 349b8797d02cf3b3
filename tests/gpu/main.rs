//! The GPU against the reference, on every adapter: each stage and the whole, within the error budget of the very data.

#[path = "../support/mod.rs"]
mod support;

mod composed;
mod device;
mod hidden;
mod layouts;
mod limits;
mod operands;
mod stages;
mod types;
mod visible;

use support::{Case, adapters, is_small};
use wgpu_attention::{Error, Form, Gpu, Kernel, Logits, Options, Plan, Problem};

/// What the planner chooses, and both bodies of the kernels that have two.
const FORMS: [Option<Form>; 3] = [None, Some(Form::Tiled), Some(Form::Lanes)];

fn form(form: Option<Form>) -> Options {
    Options { form, ..Options::default() }
}

/// A problem with every output.
fn problem(sizes: [u32; 5], set: impl FnOnce(&mut Problem)) -> Problem {
    let [batch, heads, seq_q, seq_kv, head_dim] = sizes;
    let mut p = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
    (p.lse, p.weights, p.logits) = (true, true, Some(Logits::Masked));
    set(&mut p);
    p
}

/// The same problem without the outputs that need the score matrix: kernels without one can run, keys out of range are skipped.
fn lean(p: &Problem) -> Problem {
    let mut p = p.clone();
    (p.weights, p.logits) = (false, None);
    p
}

/// Every way to compute a problem on a device, none twice: the planner's choice, both forms, and the fused kernel wherever it
/// can run.
fn ways(gpu: &Gpu, p: &Problem) -> Vec<Options> {
    let fused = Options { kernel: Some(Kernel::Rows), ..Options::default() };
    let mut plans: Vec<Plan> = Vec::new();
    let mut ways = Vec::new();
    for way in FORMS.map(form).into_iter().chain([fused]) {
        let plan = match gpu.library().plan_with(p, &way) {
            Ok(plan) => plan,
            Err(Error::Kernel { kernel: "rows", why }) if way.kernel == Some(Kernel::Rows) => {
                let limits = why.contains("storage buffers") || why.contains("exceed a binding");
                let needs_scores = p.weights || p.logits.is_some();
                assert!(needs_scores || p.head_dim.max(p.value_dim) > 256 || limits, "{why}\n{p:?}");
                continue;
            }
            Err(error) => panic!("{error}\n{p:?}"),
        };
        if plans.iter().all(|other| other.steps() != plan.steps()) {
            plans.push(plan);
            ways.push(way);
        }
    }
    ways.truncate(if is_small() { 1 } else { ways.len() });
    ways
}

/// Compares on every adapter, in every way.
#[track_caller]
fn everywhere(case: &Case) {
    for gpu in adapters() {
        for way in ways(&gpu, &case.problem) {
            case.check(&gpu, &way);
        }
    }
}
