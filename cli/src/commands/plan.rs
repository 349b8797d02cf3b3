//! `plan`: which kernels would run, in which order, and why.

use clap::Args;
use serde_json::json;
use wgpu_attention::{Causal, Element};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, KernelArgs, Label};
use crate::error::Result;
use crate::options::{self, ShapeArg};
use crate::report::Report;

#[derive(Args, Debug)]
pub struct Arguments {
    /// B,H,HKV,SQ,SKV,D: batch, heads, kv_heads, seq_q, seq_kv, head_dim
    #[arg(long)]
    shape: ShapeArg,
    #[arg(long, value_parser = options::causal(), default_value_t)]
    causal: Causal,
    #[arg(long, value_parser = options::element(), default_value_t)]
    dtype: Element,
    /// Return the log-sum-exp of each row
    #[arg(long)]
    lse: bool,
    /// Return the softmax weights
    #[arg(long)]
    weights: bool,
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long)]
    adapter: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let mut problem = arguments.shape.problem();
    problem.causal = arguments.causal;
    problem.element = arguments.dtype;
    (problem.lse, problem.weights) = (arguments.lse, arguments.weights);
    problem.check()?;
    let gpu = engine::one(arguments.adapter.as_deref(), &arguments.device)?;
    let plan = gpu.library().plan_with(&problem, &arguments.kernels.options())?;
    let label = Label::of(gpu.info());
    report.object(&json!({
        "adapter": label.adapter, "backend": label.backend, "driver": label.driver,
        "shape": arguments.shape.to_string(), "dtype": problem.element.to_string(), "causal": problem.causal.name(),
        "kernel": plan.kernel(), "dispatches": plan.dispatches(), "slices": plan.slices(),
        "scratch_bytes": plan.scratch_bytes(), "reasons": plan.reasons(),
    }))?;
    report.line(format!("{label}\n{plan}"))?;
    Ok(Outcome::Right)
}
