//! `plan`: which kernels would run, in which order, and why.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use wgpu_attention::Plan;

use crate::Outcome;
use crate::engine::{self, DeviceArgs, KernelArgs, Label};
use crate::error::Result;
use crate::json;
use crate::options::ShapeArg;
use crate::problem::{MADE, ProblemArgs, STORED, terms};
use crate::report::Report;

#[derive(Args, Debug)]
pub struct Arguments {
    #[command(flatten)]
    problem: ProblemArgs,
    /// Return the log-sum-exp of each row
    #[arg(long, help_heading = "Problem")]
    lse: bool,
    /// Return the softmax weights
    #[arg(long, help_heading = "Problem")]
    weights: bool,
    /// Read the plan from a JSON file, as --save writes it, instead of making one; this needs no adapter
    #[arg(long, value_name = "FILE", conflicts_with_all = MADE, conflicts_with_all = STORED, conflicts_with_all = ["TermArgs", "KernelArgs", "DeviceArgs",
        "lse", "weights", "save", "adapter"], help_heading = "Output")]
    read: Option<PathBuf>,
    /// Write the plan to a JSON file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    save: Option<PathBuf>,
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long, help_heading = "Adapter")]
    adapter: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// Reads a plan that was saved.
pub fn read(path: &Path) -> Result<Plan> {
    json::read(path, "plan")
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    if let Some(path) = &arguments.read {
        let plan = read(path)?;
        report.object(&plan)?;
        report.line(plan)?;
        return Ok(Outcome::Right);
    }
    let mut problem = arguments.problem.one()?.problem;
    (problem.lse, problem.weights) = (arguments.lse, arguments.weights);
    problem.check()?;
    let gpu = engine::one(arguments.adapter.as_deref(), &arguments.device)?;
    let plan = gpu.library().plan_with(&problem, &arguments.kernels.options())?;
    if let Some(path) = &arguments.save {
        json::write(path, &plan)?;
    }
    let label = Label::of(gpu.info());
    report.object(&json!({
        "adapter": label.adapter, "backend": label.backend, "driver": label.driver,
        "shape": ShapeArg::of(&problem).to_string(), "terms": terms(&problem), "dtype": problem.element.to_string(),
        "causal": problem.causal.name(), "kernel": plan.kernel(), "dispatches": plan.dispatches(), "slices": plan.slices(),
        "scratch_bytes": plan.scratch_bytes(), "reasons": plan.reasons(),
    }))?;
    report.line(format!("{label}\n{plan}"))?;
    Ok(Outcome::Right)
}
