//! `run`: attention on the tensors of a file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use safetensors::{Dtype, View};
use serde_json::json;
use wgpu_attention::{Element, Outputs, Plan, Problem, compare};
use wgpu_attention_heatmap::replace;

use crate::Outcome;
use crate::archive::Archive;
use crate::commands::plan::read as read_plan;
use crate::engine::{Engine, EngineArgs, KernelArgs, Label, run_plan};
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::problem::{MADE, ProblemArgs, STORED};
use crate::report::{self, Report};
use crate::request::Request;
use crate::sample::Sample;

#[derive(Args, Debug)]
pub struct Arguments {
    /// Safetensors file with q, k, v and optionally mask, bias, kv_lens, alibi_slopes, sinks, cu_seqlens_q and cu_seqlens_k; without
    /// it, operands of the problem are made up
    #[arg(long, value_name = "FILE", conflicts_with_all = MADE, conflicts_with_all = STORED, help_heading = "Problem")]
    input: Option<PathBuf>,
    #[command(flatten)]
    problem: ProblemArgs,
    /// Run the plan of a JSON file, as `plan --save` writes it, on made-up operands of its problem
    #[arg(long, value_name = "FILE", conflicts_with_all = MADE, conflicts_with_all = STORED,
        conflicts_with_all = ["input", "TermArgs", "KernelArgs", "cpu", "weights", "lse"], help_heading = "Problem")]
    plan: Option<PathBuf>,
    /// Also compute the softmax weights, f32
    #[arg(long, help_heading = "Output")]
    weights: bool,
    /// Also compute the log-sum-exp of each row, f32
    #[arg(long, help_heading = "Output")]
    lse: bool,
    /// File for out and the other outputs; an existing file is replaced only when the new one is complete
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Compare every output with the f64 reference on the CPU
    #[arg(long, help_heading = "Output")]
    compare: bool,
    /// Run once more and print how long each dispatch takes, by the device's timestamps if it has them
    #[arg(long, conflicts_with = "cpu", help_heading = "Output")]
    profile: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// A tensor to write.
struct Written {
    shape: Vec<usize>,
    data: Floats,
}

impl View for &Written {
    fn dtype(&self) -> Dtype {
        match self.data.element() {
            Element::F32 => Dtype::F32,
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
            _ => unreachable!("this code knows f32, f16 and bf16"),
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.data.elements().bytes().into()
    }

    fn data_len(&self) -> usize {
        self.data.elements().bytes().len()
    }
}

/// What is asked, from a file or made up; `plan` is the stored one that is to run.
fn request(arguments: &Arguments, plan: Option<&Plan>) -> Result<Request> {
    let Some(input) = &arguments.input else {
        let given = match plan {
            Some(plan) => plan.shape().problem().clone().into(),
            None => arguments.problem.one()?,
        };
        let operands = Sample(1).operands(&given)?;
        return Ok(Request::of(&given.problem.check()?, operands));
    };
    let archive = Archive::read(input)?;
    let mut request = Request::read(&archive, arguments.problem.terms.layout.into())?;
    request.apply(&arguments.problem.terms);
    let refused = |source| archive.problem(source);
    request.problem.check().map_err(refused)?.check_inputs(&request.operands.inputs()).map_err(refused)?;
    Ok(request)
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let stored = arguments.plan.as_deref().map(read_plan).transpose()?;
    let Request { mut problem, operands, out_shape, lse_shape } = request(arguments, stored.as_ref())?;
    problem.weights |= arguments.weights;
    problem.lse |= arguments.lse;
    let engine = arguments.engine.open()?;
    let bar = report::slices();
    let mut progress = |done, of| report::advance(&bar, done, of);
    let inputs = operands.inputs();
    let (outputs, profile) = match &engine {
        Engine::Gpu(gpu) => {
            let plan = match stored {
                Some(plan) => plan,
                None => gpu.plan_with(&problem, &arguments.kernels.options())?,
            };
            run_plan(gpu, &plan, &inputs, arguments.profile, &mut progress)?
        }
        Engine::Cpu => (engine.attention(&problem, &inputs, &arguments.kernels)?, None),
    };
    bar.finish_and_clear();
    let label = engine.label();
    let comparisons = arguments.compare.then(|| compare(&problem, &inputs, &outputs)).transpose()?;
    let tensors = tensors(&problem, outputs, out_shape, lse_shape);
    if let Some(path) = &arguments.output {
        write(path, &label, &tensors)?;
    }
    let written: Vec<_> = tensors
        .iter()
        .map(
            |(name, tensor)| json!({"tensor": name, "dtype": tensor.data.element().to_string(), "shape": tensor.shape}),
        )
        .collect();
    let judged = comparisons.iter().flat_map(|comparisons| &comparisons.outputs).map(|output| {
        json!({"output": output.name, "max_error": output.budget.max_error, "of_budget": output.budget.worst_ratio,
               "passed": output.budget.passed()})
    });
    report.object(&json!({
        "adapter": label.adapter, "backend": label.backend, "driver": label.driver,
        "output": arguments.output.as_ref().map(|path| path.to_string_lossy()), "tensors": written,
        "comparisons": judged.collect::<Vec<_>>(), "profile": profile,
    }))?;
    for (name, tensor) in &tensors {
        report.line(format!("{name} {} {:?}", tensor.data.element(), tensor.shape))?;
    }
    let written = arguments.output.as_ref().map_or(String::new(), |path| format!(", written to {}", path.display()));
    report.line(format!("computed by {label}{written}"))?;
    if let Some(profile) = profile {
        report.line(profile.to_string().trim_end())?;
    }
    let Some(comparisons) = comparisons else { return Ok(Outcome::Right) };
    report.line(&comparisons)?;
    Ok(if comparisons.passed() { Outcome::Right } else { Outcome::Differs })
}

/// The outputs with their names and shapes.
fn tensors(
    problem: &Problem,
    outputs: Outputs,
    out_shape: Vec<usize>,
    lse_shape: Vec<usize>,
) -> Vec<(&'static str, Written)> {
    let mut tensors = vec![("out", Written { shape: out_shape, data: Floats::rounded(&outputs.out, problem.element) })];
    if let Some(weights) = outputs.weights {
        let shape = [problem.batch, problem.heads, problem.seq_q, problem.seq_kv].map(|n| n as usize).to_vec();
        tensors.push(("weights", Written { shape, data: Floats::F32(weights) }));
    }
    if let Some(lse) = outputs.lse {
        tensors.push(("lse", Written { shape: lse_shape, data: Floats::F32(lse) }));
    }
    tensors
}

/// Writes a safetensors file.
fn write(path: &Path, label: &Label, tensors: &[(&'static str, Written)]) -> Result<()> {
    let metadata = HashMap::from([
        ("producer".to_string(), concat!("wgpu-attention ", env!("CARGO_PKG_VERSION")).to_string()),
        ("adapter".to_string(), label.to_string()),
    ]);
    let bytes = safetensors::serialize(tensors.iter().map(|(name, tensor)| (*name, tensor)), Some(metadata))
        .map_err(|source| Error::Safetensors { path: path.into(), source })?;
    replace(path, &bytes).map_err(|source| Error::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::archive::builder::Builder;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn run_on(file: &Builder, options: &[&str]) -> Result<Archive> {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
        std::fs::write(&input, file.bytes()).unwrap();
        let paths = ["run", "--cpu", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        let line = Line::parse_from(paths.iter().chain(options));
        run(&line.arguments, Report { json: true })?;
        Archive::read(&output)
    }

    #[test]
    fn out_has_the_type_of_the_input() {
        let halves = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
        };
        let file = Builder::default()
            .tensor("q", Dtype::BF16, &[1, 1, 1, 2], &halves(&[0.0; 2]))
            .tensor("k", Dtype::BF16, &[1, 2, 1, 2], &halves(&[0.0; 4]))
            .tensor("v", Dtype::BF16, &[1, 2, 1, 1], &halves(&[1.0, 2.0]));
        let archive = run_on(&file, &["--layout", "bshd", "--weights", "--lse"]).unwrap();
        assert_eq!(*archive.floats("out").unwrap(), Floats::Bf16(vec![half::bf16::from_f32(1.5)]));
        assert_eq!(archive.shape("out").unwrap(), [1, 1, 1, 1]);
        assert_eq!(archive.f32s_of("weights", &[1, 1, 1, 2]).unwrap(), [0.5, 0.5]);
        assert_eq!(archive.f32s_of("lse", &[1, 1, 1]).unwrap(), [2f32.ln()]);
        let causal = run_on(&file, &["--layout", "bshd", "--causal", "top-left"]).unwrap();
        assert_eq!(causal.floats("out").unwrap().widened(), [1.0]);
        assert!(!causal.has("weights"));
    }

    #[test]
    fn tensors_may_have_axes_of_zero() {
        let file = |[batch, rows, keys]: [usize; 3]| {
            let zeros = vec![0.0; 1024];
            let tensor = |n: usize| &zeros[..batch * n * 2];
            let file = Builder::default().f32s("q", &[batch, 1, rows, 2], tensor(rows));
            file.f32s("k", &[batch, 1, keys, 2], tensor(keys)).f32s("v", &[batch, 1, keys, 2], tensor(keys))
        };
        for [batch, rows, keys] in [[2, 3, 0], [2, 0, 3], [0, 2, 3], [0, 0, 0]] {
            let written = run_on(&file([batch, rows, keys]), &["--weights", "--lse"]).unwrap();
            assert_eq!(written.f32s_of("out", &[batch, 1, rows, 2]).unwrap(), vec![0.0; batch * rows * 2]);
            assert_eq!(written.f32s_of("lse", &[batch, 1, rows]).unwrap(), vec![f32::NEG_INFINITY; batch * rows]);
            assert!(written.f32s_of("weights", &[batch, 1, rows, keys]).unwrap().is_empty());
        }
        // No sequence, one without a token, and one without a key.
        for (bounds_q, bounds_k) in [(&[0u32][..], &[0u32][..]), (&[0, 0], &[0, 0]), (&[0, 1], &[0, 0])] {
            let [total_q, total_kv] = [bounds_q, bounds_k].map(|bounds| bounds[bounds.len() - 1] as usize);
            let zeros = |n: usize| vec![0.0; 2 * n];
            let file = Builder::default()
                .f32s("q", &[total_q, 1, 2], &zeros(total_q))
                .f32s("k", &[total_kv, 1, 2], &zeros(total_kv))
                .f32s("v", &[total_kv, 1, 2], &zeros(total_kv))
                .tensor("cu_seqlens_q", Dtype::U32, &[bounds_q.len()], bytemuck::cast_slice(bounds_q))
                .tensor("cu_seqlens_k", Dtype::U32, &[bounds_k.len()], bytemuck::cast_slice(bounds_k));
            let written = run_on(&file, &["--lse"]).unwrap();
            assert_eq!(written.f32s_of("out", &[total_q, 1, 2]).unwrap(), zeros(total_q));
            assert_eq!(written.f32s_of("lse", &[1, total_q]).unwrap(), vec![f32::NEG_INFINITY; total_q]);
        }
        let error = run_on(&file([1, 1, 1]).f32s("q", &[1, 0, 1, 2], &[]), &[]).unwrap_err().to_string();
        assert!(error.contains("heads is 0; it must be at least 1"), "{error}");
    }

    #[test]
    fn wrong_input_is_refused() {
        let file = Builder::default().f32s("q", &[1, 1, 1, 2], &[0.0; 2]).f32s("k", &[1, 1, 1, 2], &[0.0; 2]).f32s(
            "v",
            &[1, 1, 1, 2],
            &[0.0; 2],
        );
        let error = run_on(&file, &["--softcap", "-1"]).unwrap_err().to_string();
        assert!(error.contains("x.safetensors: softcap is -1"), "{error}");
        let error = run_on(&file.without("v"), &[]).unwrap_err().to_string();
        assert!(error.contains("tensor \"v\" is missing"), "{error}");
    }
}
