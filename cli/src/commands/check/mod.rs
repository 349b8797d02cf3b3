//! `check`: every adapter and the CPU path against the f64 reference, stage by stage.

mod summary;

use std::time::Instant;

use clap::Args;
use serde::Serialize;
use wgpu_attention::internal::Step;
use wgpu_attention::wgpu::CommandEncoderDescriptor;
use wgpu_attention::{
    Broadcast, Causal, Element, Error, Gpu, Kernel, Logits, Options, Outputs, Prepared, Problem, Resident, reference,
    with,
};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, Engine, KernelArgs, Label};
use crate::error::Result;
use crate::operands::{OwnedInputs, set_key_lengths, set_mask};
use crate::options::ShapeArg;
use crate::oracle::{Judgement, Oracle};
use crate::report::{self, Report};
use crate::sample::Sample;

#[derive(Args, Debug, Default, PartialEq)]
pub struct Arguments {
    /// Show every stage and every kernel, with errors and budgets
    #[arg(long, help_heading = "Output")]
    stages: bool,
    /// Adapter to check: index, part of its name, or backend:part (repeatable; default all)
    #[arg(long, help_heading = "Adapter")]
    adapter: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// The verdict on a result within its error budget.
const OK: &str = "ok";

/// The beginning of the verdict on a kernel that cannot run a problem on an adapter, or is left out there.
const NOT_RUN: &str = "not run";

/// Timed runs after the first.
const RUNS: usize = 3;

/// A problem, with everything that the engines share.
struct Subject {
    name: &'static str,
    problem: Problem,
    operands: OwnedInputs,
    /// Operations of each stage over the visible pairs.
    flops: [f64; 3],
    /// Whether every kernel runs it, not only the planner's choice.
    every_kernel: bool,
}

/// The stages of the three kernels, and the kernels whose dispatches belong to each stage. The score transform belongs to the softmax.
const STAGES: [(&str, &[&str]); 3] =
    [("scores", &["scores"]), ("softmax", &["logits", "softmax"]), ("values", &["values", "pack"])];

/// Operations that count for the softmax of each score: maximum, difference, exponential, sum, quotient.
const SOFTMAX_FLOPS: f64 = 5.0;

/// Every output of a problem, and the milliseconds of each stage.
type Staged = (Outputs, [f64; 3]);

/// The run of a whole problem, without the outputs of the stages.
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
    /// The kernel that computed the whole.
    kernel: Option<String>,
    max_error: Option<f64>,
    budget: Option<f64>,
    /// Largest ratio of an element's error to its error budget.
    of_budget: Option<f64>,
    ms: Option<f64>,
    gflops: Option<f64>,
    verdict: String,
}

/// The problems: small ones of each kind, and a larger one.
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
        ("grouped", grouped),
        ("masked", Problem::new(2, 2, 33, 65, 32)),
        ("f16", half),
    ];
    let mut sample = Sample(1);
    let subject = |(name, mut problem): (&'static str, Problem)| {
        let mut operands = sample.operands(&problem.clone().into())?;
        if name == "masked" {
            let shape = [problem.batch, 1, problem.seq_q, problem.seq_kv];
            let mut mask: Vec<u8> =
                (0..Broadcast(shape).len()).map(|_| u8::from(!sample.bits().is_multiple_of(4))).collect();
            // One row sees no key.
            mask[..problem.seq_kv as usize].fill(0);
            set_mask(&mut problem, &mut operands.operands, Broadcast(shape), mask);
            set_key_lengths(&mut problem, &mut operands.operands, vec![65, 29]);
        }
        let pairs = problem.check()?.visible_pairs() as f64;
        let [head_dim, value_dim] = [problem.head_dim, problem.value_dim].map(f64::from);
        let flops = [2.0 * head_dim, SOFTMAX_FLOPS, 2.0 * value_dim].map(|each| each * pairs);
        // Every kernel runs one problem without operands beside q, k and v, and one with operands.
        let every_kernel = ["causal", "masked"].contains(&name);
        Ok(Subject { name, problem, operands, flops, every_kernel })
    };
    list.into_iter().map(subject).collect()
}

impl Subject {
    /// The same problem with the result of every stage as an output.
    fn staged(&self) -> Problem {
        let mut problem = self.problem.clone();
        (problem.lse, problem.weights, problem.logits) = (true, true, Some(Logits::Raw));
        problem
    }

    /// One table row for each stage and one for the whole, or the error that ended the run.
    fn rows(&self, engine: &Engine, oracle: &Oracle, kernels: &KernelArgs) -> Vec<Row> {
        match self.compute(engine, kernels) {
            Ok((staged, whole)) => {
                let mut rows = self.judged(engine, oracle, &staged, &whole);
                if let Engine::Gpu(gpu) = engine
                    && self.every_kernel
                    && *kernels == KernelArgs::default()
                {
                    let forced = |&kernel: &Kernel| self.forced(engine, gpu, oracle, kernel, &whole.kernel);
                    rows.extend(Kernel::ALL.iter().filter_map(forced));
                }
                rows
            }
            Err(error) => {
                let mut row = self.row(engine, "whole", None, None, None);
                row.verdict = format!("error: {error}");
                vec![row]
            }
        }
    }

    /// One table row for each stage and one for the whole.
    fn judged(&self, engine: &Engine, oracle: &Oracle, (staged, times): &Staged, whole: &Whole) -> Vec<Row> {
        let judgements = [oracle.logits(staged), oracle.weights(staged), Some(oracle.out(&staged.out))];
        let stages = STAGES.iter().zip(judgements).zip(times).zip(self.flops);
        let mut rows: Vec<Row> = stages
            .map(|(((&(stage, _), judgement), &ms), flops)| self.row(engine, stage, judgement, None, Some((ms, flops))))
            .collect();
        rows.push(self.whole(engine, "whole", oracle, whole));
        rows
    }

    /// The table row of one forced kernel; `None` if it is the planner's choice, which ran already.
    fn forced(&self, engine: &Engine, gpu: &Gpu, oracle: &Oracle, kernel: Kernel, chosen: &str) -> Option<Row> {
        let without_result = |verdict: String| {
            let mut row = self.row(engine, kernel.name(), None, None, None);
            row.verdict = verdict;
            Some(row)
        };
        if gpu.library().caps().takes_minutes(kernel) {
            return without_result(format!("{NOT_RUN}: a driver of four lanes takes minutes to compile it"));
        }
        let options = with!(Options::default(), kernel: Some(kernel));
        let ran = match gpu.library().plan_with(&self.problem, &options) {
            Ok(plan) if plan.kernel() == chosen => return None,
            Ok(_) => self.time_gpu(gpu, &options),
            Err(Error::Kernel { why, .. }) => return without_result(format!("{NOT_RUN}: {why}")),
            Err(error) => Err(error),
        };
        match ran {
            Ok(whole) => Some(self.whole(engine, kernel.name(), oracle, &whole)),
            Err(error) => without_result(format!("error: {error}")),
        }
    }

    fn whole(&self, engine: &Engine, stage: &'static str, oracle: &Oracle, whole: &Whole) -> Row {
        let [scores, _, values] = self.flops;
        let speed = Some((whole.ms, scores + values));
        self.row(engine, stage, Some(oracle.out(&whole.out)), Some(whole.kernel.clone()), speed)
    }

    /// `speed`: milliseconds, and operations over the visible pairs.
    fn row(
        &self,
        engine: &Engine,
        stage: &'static str,
        judgement: Option<Judgement>,
        kernel: Option<String>,
        speed: Option<(f64, f64)>,
    ) -> Row {
        let passed = judgement.is_some_and(|judgement| judgement.comparison.passed());
        Row {
            label: engine.label(),
            problem: self.name,
            shape: ShapeArg::of(&self.problem).to_string(),
            dtype: self.problem.element.to_string(),
            stage,
            max_error: judgement.map(|judgement| judgement.comparison.max_error),
            budget: judgement.map(|judgement| judgement.budget),
            of_budget: judgement.map(|judgement| judgement.comparison.worst_ratio),
            ms: speed.map(|(ms, _)| ms),
            gflops: speed.map(|(ms, flops)| flops / ms / 1e6),
            kernel,
            verdict: if passed { OK } else { "DIFFERS" }.into(),
        }
    }

    /// Runs the three kernels stage by stage, and the whole with the kernel that the planner or the caller chooses.
    fn compute(&self, engine: &Engine, kernels: &KernelArgs) -> wgpu_attention::Result<(Staged, Whole)> {
        match engine {
            Engine::Gpu(gpu) => Ok((self.stages_on_gpu(gpu, kernels)?, self.time_gpu(gpu, &kernels.options())?)),
            Engine::Cpu => {
                let inputs = self.operands.inputs();
                let start = Instant::now();
                let out = engine.attention(&self.problem, &inputs, kernels)?.out;
                let ms = milliseconds(start);
                Ok((self.stages_on_cpu()?, Whole { out, ms, kernel: "reference".into() }))
            }
        }
    }

    fn stages_on_gpu(&self, gpu: &Gpu, kernels: &KernelArgs) -> wgpu_attention::Result<Staged> {
        let plan = gpu.library().plan_with(&self.staged(), &kernels.staged().options())?;
        let prepared = gpu.library().prepare(&plan)?;
        let resident = gpu.upload(&plan, &self.operands.inputs())?;
        gpu.run(&prepared, &resident, &mut |_, _| {})?;
        let outputs = gpu.download(&plan, &resident)?;
        let mut times = [0.0; 3];
        for (ms, (_, kernels)) in times.iter_mut().zip(STAGES) {
            *ms = median(|| stage(gpu, &prepared, &resident, kernels))?;
        }
        Ok((outputs, times))
    }

    fn stages_on_cpu(&self) -> wgpu_attention::Result<Staged> {
        let (shape, inputs) = (self.staged().check()?, self.operands.inputs());
        let start = Instant::now();
        let scores = reference::scores::<f32>(&shape, &inputs);
        let scored = milliseconds(start);
        let start = Instant::now();
        let masked = reference::logits(&shape, &inputs, &scores, Logits::Masked);
        let (weights, _) = reference::softmax(&shape, &inputs, &masked);
        let softened = milliseconds(start);
        let start = Instant::now();
        let out = reference::values(&shape, &inputs, &weights);
        let valued = milliseconds(start);
        let outputs = with!(Outputs::new(out), weights: Some(weights), logits: Some(scores));
        Ok((outputs, [scored, softened, valued]))
    }

    /// Median time of warm runs: submission and wait, without upload and read-back.
    fn time_gpu(&self, gpu: &Gpu, options: &Options) -> wgpu_attention::Result<Whole> {
        let plan = gpu.library().plan_with(&self.problem, options)?;
        let prepared = gpu.library().prepare(&plan)?;
        let resident = gpu.upload(&plan, &self.operands.inputs())?;
        gpu.run(&prepared, &resident, &mut |_, _| {})?;
        let ms = median(|| {
            let start = Instant::now();
            gpu.run(&prepared, &resident, &mut |_, _| {})?;
            Ok(milliseconds(start))
        })?;
        Ok(Whole { out: gpu.download(&plan, &resident)?.out, ms, kernel: plan.kernel() })
    }
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn median(mut run: impl FnMut() -> wgpu_attention::Result<f64>) -> wgpu_attention::Result<f64> {
    let mut times = (0..RUNS).map(|_| run()).collect::<wgpu_attention::Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Milliseconds of only the dispatches of some kernels, from submission to the end of the wait. Their inputs are in the buffers since
/// the run before.
fn stage(gpu: &Gpu, prepared: &Prepared, resident: &Resident, kernels: &[&str]) -> wgpu_attention::Result<f64> {
    let mut encoder = gpu.device().create_command_encoder(&CommandEncoderDescriptor { label: Some("stage") });
    let belongs = |step: &Step| kernels.contains(&step.variant.stage());
    let recording = prepared.begin()?;
    let mut first = 0;
    for steps in prepared.plan().steps().chunk_by(|a, b| belongs(a) == belongs(b)) {
        let end = first + steps.len();
        if belongs(&steps[0]) {
            recording.encode_steps(first..end, &mut encoder, &resident.buffers())?;
        }
        first = end;
    }
    let commands = encoder.finish();
    let start = Instant::now();
    gpu.queue().submit([commands]);
    gpu.wait()?;
    Ok(milliseconds(start))
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
                report.error(format!("{}: {error}", Label::of(&adapter.get_info())));
            }
        }
    }
    engines.push(Engine::Cpu);

    let subjects = subjects()?;
    let bar = report::progress(subjects.len() * engines.len());
    let mut rows = Vec::new();
    for subject in &subjects {
        bar.set_message(subject.name);
        let oracle = Oracle::new(&subject.staged(), &subject.operands.inputs(), arguments.kernels.precision)?;
        for (place, engine) in engines.iter().enumerate() {
            for row in subject.rows(engine, &oracle, &arguments.kernels) {
                bar.suspend(|| report.object(&row))?;
                rows.push((place, row));
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for (place, engine) in engines.iter().enumerate() {
        let label = engine.label();
        let rows: Vec<&Row> = rows.iter().filter(|(at, _)| *at == place).map(|(_, row)| row).collect();
        report.line(format!("\n{label}\n{}", label.driver))?;
        if arguments.stages {
            report.table(&HEADER, &rows.iter().map(|row| row.cells()).collect::<Vec<_>>())?;
        } else {
            report.table(&summary::HEADER, &summary::cells(&rows))?;
        }
    }
    report.line(if arguments.stages { summary::ALL_WORDS } else { summary::WORDS })?;

    if adapters.is_empty() {
        report.note(format!(
            "No GPU adapter was found: only the CPU reference ran, nothing was checked on a GPU.\n{}",
            engine::how_to_get_one()
        ))?;
    }
    let (right, ran) = tally(rows.iter().map(|(_, row)| row));
    report.line(format!(
        "{right} of {} within their error budget, on {} and the CPU reference",
        report::count(ran, "result", "results"),
        report::count(engines.len() - 1, "adapter", "adapters")
    ))?;
    Ok(if right < ran || broken > 0 { Outcome::Differs } else { Outcome::Right })
}

/// The number of right results, and of all results.
fn tally<'a>(rows: impl Iterator<Item = &'a Row>) -> (usize, usize) {
    let ran = rows.filter(|row| !row.verdict.starts_with(NOT_RUN));
    ran.fold((0, 0), |(right, ran), row| (right + usize::from(row.verdict == OK), ran + 1))
}

#[cfg(test)]
mod tests {
    use wgpu_attention::Precision;

    use super::*;

    #[test]
    fn a_wrong_result_of_any_stage_differs() {
        let subjects = subjects().unwrap();
        for name in ["small", "masked", "f16"] {
            let subject = subjects.iter().find(|subject| subject.name == name).unwrap();
            let oracle = Oracle::new(&subject.staged(), &subject.operands.inputs(), Precision::Strict).unwrap();
            let computed = || subject.compute(&Engine::Cpu, &KernelArgs::default()).unwrap();
            let verdicts = |(staged, whole): (Staged, Whole)| -> Vec<(&str, String)> {
                let rows = subject.judged(&Engine::Cpu, &oracle, &staged, &whole);
                let right = rows.iter().filter(|row| row.verdict == "ok").count();
                assert_eq!(tally(rows.iter()), (right, 4));
                rows.into_iter().map(|row| (row.stage, row.verdict)).collect()
            };
            let stages = ["scores", "softmax", "values", "whole"];
            assert_eq!(verdicts(computed()), stages.map(|stage| (stage, "ok".into())));
            // Only the last element of one stage is wrong.
            for (at, wrong) in stages.into_iter().enumerate() {
                for error in [0.1, f32::NAN] {
                    let (mut staged, mut whole) = computed();
                    let outputs = &mut staged.0;
                    let tensor = match at {
                        0 => outputs.logits.as_mut().unwrap(),
                        1 => outputs.weights.as_mut().unwrap(),
                        2 => &mut outputs.out,
                        _ => &mut whole.out,
                    };
                    *tensor.last_mut().unwrap() += error;
                    let want = stages.map(|stage| (stage, if stage == wrong { "DIFFERS" } else { "ok" }.into()));
                    assert_eq!(verdicts((staged, whole)), want, "{name}, {error}");
                }
            }
        }
    }

    #[test]
    fn what_did_not_run_is_neither_right_nor_wrong() {
        let subject = &subjects().unwrap()[0];
        let row = |verdict: &str| {
            let mut row = subject.row(&Engine::Cpu, "whole", None, None, None);
            assert_eq!(row.verdict, "DIFFERS", "without a comparison nothing is right");
            row.verdict = verdict.into();
            row
        };
        let rows = ["ok", "not run: why", "DIFFERS", "error: why", "ok"].map(row);
        assert_eq!(tally(rows.iter()), (2, 4));
    }
}
