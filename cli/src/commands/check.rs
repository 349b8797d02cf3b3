//! `check`: every adapter and the CPU path against the f64 reference, stage by stage.

use std::time::Instant;

use clap::Args;
use serde::Serialize;
use wgpu_attention::{Broadcast, Causal, Element, Error, Gpu, Kernel, Logits, Options, Problem};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, Engine, KernelArgs, Label};
use crate::error::Result;
use crate::operands::Operands;
use crate::oracle::{Judgement, Oracle};
use crate::report::{self, Report};
use crate::sample::Sample;

#[derive(Args, Debug, Default, PartialEq)]
pub struct Arguments {
    /// Adapter to check: index, part of its name, or backend:part (repeatable; default all)
    #[arg(long)]
    adapter: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// How the verdict of a kernel begins that cannot run a problem on an adapter, or is left out there.
const NOT_RUN: &str = "not run";

/// Timed runs after the first.
const RUNS: usize = 3;

/// A problem with everything that is shared between the engines.
struct Subject {
    name: &'static str,
    problem: Problem,
    operands: Operands,
    flops: f64,
    /// Every kernel runs it, not only the planner's choice.
    every_kernel: bool,
}

/// A stage's name and how its result compares.
type Stage = (&'static str, Option<Judgement>);

/// How the problem ran as a whole, without the stages' outputs.
struct Whole {
    out: Vec<f32>,
    ms: f64,
    kernel: String,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    label: Label,
    problem: &'static str,
    shape: String,
    dtype: String,
    stage: &'static str,
    /// What computed the whole.
    kernel: Option<String>,
    max_error: Option<f64>,
    budget: Option<f64>,
    /// Largest error in units of what is allowed where it stands.
    of_budget: Option<f64>,
    ms: Option<f64>,
    gflops: Option<f64>,
    verdict: String,
}

/// The problems: small ones of each kind and one that takes a while.
fn subjects() -> Result<Vec<Subject>> {
    let mut odd = Problem::new(2, 3, 37, 53, 40);
    odd.value_dim = 24;
    let mut causal = Problem::new(1, 4, 128, 192, 64);
    causal.causal = Causal::BottomRight;
    let mut grouped = Problem::new(1, 8, 64, 96, 64);
    grouped.kv_heads = 2;
    let mut half = Problem::new(1, 4, 65, 127, 64);
    half.element = Element::F16;
    let list = [
        ("small", Problem::new(1, 2, 16, 16, 32)),
        ("odd", odd),
        ("long", Problem::new(1, 4, 512, 512, 64)),
        ("causal", causal),
        ("grouped heads", grouped),
        ("masked", Problem::new(2, 2, 33, 65, 32)),
        ("f16", half),
    ];
    let mut sample = Sample(1);
    let subject = |(name, mut problem): (&'static str, Problem)| {
        let mut operands = sample.operands(&problem)?;
        if name == "masked" {
            let shape = [problem.batch, 1, problem.seq_q, problem.seq_kv];
            let mut mask: Vec<u8> =
                (0..Broadcast(shape).len()).map(|_| u8::from(!sample.bits().is_multiple_of(4))).collect();
            // One row sees nothing.
            mask[..problem.seq_kv as usize].fill(0);
            operands.set_mask(&mut problem, Broadcast(shape), mask);
            operands.set_key_lengths(&mut problem, vec![65, 29]);
        }
        let flops = problem.check()?.flops();
        // One without operands beside q, k and v, and one with.
        let every_kernel = ["causal", "masked"].contains(&name);
        Ok(Subject { name, problem, operands, flops, every_kernel })
    };
    list.into_iter().map(subject).collect()
}

impl Subject {
    fn shape(&self) -> String {
        let p = &self.problem;
        format!("{},{},{},{},{},{}", p.batch, p.heads, p.kv_heads, p.seq_q, p.seq_kv, p.head_dim)
    }

    /// The same problem with every stage's result given out.
    fn staged(&self) -> Problem {
        let mut problem = self.problem.clone();
        (problem.lse, problem.weights, problem.logits) = (true, true, Some(Logits::Raw));
        problem
    }

    /// One row for each stage and one for the whole, or the error that stopped it.
    fn rows(&self, engine: &Engine, oracle: &Oracle, kernels: &KernelArgs) -> Vec<Row> {
        match self.judge(engine, oracle, kernels) {
            Ok((stages, whole)) => {
                let mut rows: Vec<Row> =
                    stages.into_iter().map(|(stage, judgement)| self.row(engine, stage, judgement, None)).collect();
                let chosen = whole.kernel.clone();
                rows.push(self.row(engine, "whole", Some(oracle.out(&whole.out)), Some(whole)));
                if let Engine::Gpu(gpu) = engine
                    && self.every_kernel
                    && *kernels == KernelArgs::default()
                {
                    rows.extend(
                        Kernel::ALL.iter().filter_map(|&kernel| self.forced(engine, gpu, oracle, kernel, &chosen)),
                    );
                }
                rows
            }
            Err(error) => {
                let mut row = self.row(engine, "whole", None, None);
                row.verdict = format!("error: {error}");
                vec![row]
            }
        }
    }

    /// The whole by one kernel; `None` if it is the planner's choice, which ran already.
    fn forced(&self, engine: &Engine, gpu: &Gpu, oracle: &Oracle, kernel: Kernel, chosen: &str) -> Option<Row> {
        let not_run = |why: String| {
            let mut row = self.row(engine, kernel.name(), None, None);
            row.verdict = format!("{NOT_RUN}: {why}");
            Some(row)
        };
        if kernel == Kernel::Rows && gpu.library().caps().subgroup_size.is_some_and(|size| size < 8) {
            return not_run("a driver of four lanes takes minutes to compile it".into());
        }
        let options = Options { kernel: Some(kernel), ..Options::default() };
        let plan = match gpu.library().plan_with(&self.problem, &options) {
            Ok(plan) => plan,
            Err(Error::Kernel { why, .. }) => return not_run(why),
            Err(error) => {
                let mut row = self.row(engine, kernel.name(), None, None);
                row.verdict = format!("error: {error}");
                return Some(row);
            }
        };
        (plan.kernel() != chosen).then(|| match self.time_gpu(gpu, &options) {
            Ok(whole) => self.row(engine, kernel.name(), Some(oracle.out(&whole.out)), Some(whole)),
            Err(error) => {
                let mut row = self.row(engine, kernel.name(), None, None);
                row.verdict = format!("error: {error}");
                row
            }
        })
    }

    fn row(&self, engine: &Engine, stage: &'static str, judgement: Option<Judgement>, whole: Option<Whole>) -> Row {
        let passed = judgement.is_some_and(|judgement| judgement.comparison.passed());
        Row {
            label: engine.label(),
            problem: self.name,
            shape: self.shape(),
            dtype: self.problem.element.to_string(),
            stage,
            max_error: judgement.map(|judgement| judgement.comparison.max_error),
            budget: judgement.map(|judgement| judgement.budget),
            of_budget: judgement.map(|judgement| judgement.comparison.worst_ratio),
            ms: whole.as_ref().map(|whole| whole.ms),
            gflops: whole.as_ref().map(|whole| self.flops / whole.ms / 1e6),
            kernel: whole.map(|whole| whole.kernel),
            verdict: if passed { "ok" } else { "DIFFERS" }.into(),
        }
    }

    /// What each stage of the three kernels is worth, and the whole as the planner, or the caller, chooses its kernel.
    fn judge(
        &self,
        engine: &Engine,
        oracle: &Oracle,
        kernels: &KernelArgs,
    ) -> wgpu_attention::Result<(Vec<Stage>, Whole)> {
        let inputs = self.operands.inputs();
        let staged = engine.attention(&self.staged(), &inputs, &kernels.staged())?;
        let stages = vec![
            ("scores", oracle.logits(&staged)),
            ("softmax", oracle.weights(&staged)),
            ("values", Some(oracle.out(&staged.out))),
        ];
        let whole = match engine {
            Engine::Gpu(gpu) => self.time_gpu(gpu, &kernels.options())?,
            Engine::Cpu => {
                let start = Instant::now();
                let out = engine.attention(&self.problem, &inputs, kernels)?.out;
                Whole { out, ms: start.elapsed().as_secs_f64() * 1e3, kernel: "reference".into() }
            }
        };
        Ok((stages, whole))
    }

    /// Median time of warm runs: submission and wait, without upload and read-back.
    fn time_gpu(&self, gpu: &Gpu, options: &Options) -> wgpu_attention::Result<Whole> {
        let plan = gpu.library().plan_with(&self.problem, options)?;
        let prepared = gpu.library().prepare(&plan)?;
        let resident = gpu.upload(&plan, &self.operands.inputs())?;
        gpu.run(&prepared, &resident, &mut |_, _| {})?;
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let start = Instant::now();
            gpu.run(&prepared, &resident, &mut |_, _| {})?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(Whole { out: gpu.download(&plan, &resident)?.out, ms: times[RUNS / 2], kernel: plan.kernel() })
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let number = |x: Option<f64>| x.map_or(String::new(), report::short);
        let small = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.1e}"));
        let percent = self.of_budget.map_or(String::new(), |ratio| format!("{:.0} %", ratio * 100.0));
        vec![
            self.problem.into(),
            self.shape.clone(),
            self.dtype.clone(),
            self.stage.into(),
            self.kernel.clone().unwrap_or_default(),
            small(self.max_error),
            small(self.budget),
            percent,
            number(self.ms),
            number(self.gflops),
            self.verdict.clone(),
        ]
    }
}

const HEADER: [&str; 11] = [
    "problem",
    "B,H,HKV,SQ,SKV,D",
    "type",
    "stage",
    "kernel",
    "max error",
    "budget",
    "used",
    "ms",
    "GFLOP/s",
    "verdict",
];

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let adapters = engine::choose(&arguments.adapter)?;
    let mut broken = 0;
    let mut engines = Vec::new();
    for adapter in &adapters {
        match engine::open(adapter, &arguments.device) {
            Ok(gpu) => engines.push(Engine::Gpu(Box::new(gpu))),
            Err(error) => {
                broken += 1;
                report::complain(format!("{}: {error}", Label::of(&adapter.get_info())));
            }
        }
    }
    engines.push(Engine::Cpu);

    let subjects = subjects()?;
    let bar = report::progress(subjects.len() * engines.len());
    let mut rows = Vec::new();
    for subject in &subjects {
        bar.set_message(subject.name);
        let oracle = Oracle::new(&subject.staged(), &subject.operands.inputs())?;
        for (place, engine) in engines.iter().enumerate() {
            for row in subject.rows(engine, &oracle, &arguments.kernels) {
                report.object(&row)?;
                rows.push((place, row));
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for (place, engine) in engines.iter().enumerate() {
        let label = engine.label();
        let cells: Vec<_> = rows.iter().filter(|(at, _)| *at == place).map(|(_, row)| row.cells()).collect();
        report.line(format!("\n{label} ({})", label.driver))?;
        report.table(&HEADER, &cells)?;
    }

    let left = rows.iter().filter(|(_, row)| row.verdict.starts_with(NOT_RUN)).count();
    let wrong = rows.iter().filter(|(_, row)| row.verdict != "ok").count() - left;
    if adapters.is_empty() {
        report.note(format!(
            "No GPU adapter was found: only the CPU reference ran, nothing was checked on a GPU.\n{}",
            engine::how_to_get_one()
        ))?;
    }
    report.line(format!(
        "{} of {} results within their error budget, on {} adapters and the CPU reference",
        rows.len() - left - wrong,
        rows.len() - left,
        engines.len() - 1
    ))?;
    Ok(if wrong + broken > 0 { Outcome::Differs } else { Outcome::Right })
}
