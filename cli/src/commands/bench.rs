//! `bench`: times problems beside what plain shaders reach on the same adapter in the same run.

use std::time::Instant;

use clap::Args;
use serde::Serialize;
use wgpu_attention::{Causal, Element, Gpu, Options, Prepared, Problem, Resident};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, KernelArgs, Label};
use crate::error::Result;
use crate::floats::Floats;
use crate::operands::Operands;
use crate::options::{CausalArg, ElementArg, ShapeArg, causal_name};
use crate::oracle::{Judgement, Oracle};
use crate::probe::{self, Ceilings};
use crate::report::{self, Report};
use crate::sample::Sample;
use crate::timer::Timer;

#[derive(Args, Debug)]
pub struct Arguments {
    /// B,H,HKV,SQ,SKV,D: batch, heads, kv_heads, seq_q, seq_kv, head_dim (repeatable)
    #[arg(long)]
    shape: Vec<ShapeArg>,
    #[arg(long, value_enum, default_value_t)]
    causal: CausalArg,
    #[arg(long, value_enum, default_value_t)]
    dtype: ElementArg,
    /// Timed runs after the first (default: as many as fit in two seconds, 5 to 50)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeats: Option<u32>,
    /// Time by the wall clock around submission and wait, even where the device has timestamps: as programs that have none
    #[arg(long)]
    wall_clock: bool,
    /// Adapter: index, part of its name, or backend:part (repeatable; default all)
    #[arg(long)]
    adapter: Vec<String>,
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What is timed where no shape is given: prefill, the same causal, a sentence encoder, and one step of decoding.
const SHAPES: [([u32; 6], Causal); 5] = [
    ([1, 8, 8, 512, 512, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::BottomRight),
    ([1, 12, 12, 128, 128, 32], Causal::None),
    ([1, 32, 8, 1, 4096, 128], Causal::None),
];

/// Work of the f64 reference that a check may cost. Larger problems are checked on their last rows only.
const CHECK_FLOPS: f64 = 3e9;
/// Seconds of timed runs where their number is not given, and its bounds.
const SECONDS: f64 = 2.0;
const LEAST_RUNS: u32 = 5;
const MOST_RUNS: u32 = 50;

#[derive(Serialize)]
struct Row {
    adapter: String,
    backend: String,
    driver: String,
    kernel: String,
    shape: String,
    dtype: String,
    causal: &'static str,
    median_ms: f64,
    min_ms: f64,
    /// The first call: planning, compiling, running.
    first_ms: f64,
    gflops: f64,
    ceiling_gflops: f64,
    error: f64,
    budget: f64,
    /// Whether each element is within its own budget.
    #[serde(skip)]
    within_budget: bool,
    ceiling_gbs: f64,
    timer: &'static str,
    runs: usize,
    /// (longest − shortest) / median.
    spread: f64,
    version: &'static str,
}

/// A problem to time, with the reference's answer for its last rows.
struct Subject {
    shape: ShapeArg,
    problem: Problem,
    operands: Operands,
    flops: f64,
    oracle: Oracle,
    /// How many rows of each head the oracle knows.
    rows: u32,
}

impl Subject {
    fn new(shape: ShapeArg, causal: Causal, element: Element) -> Result<Self> {
        let mut problem = shape.problem();
        (problem.causal, problem.element) = (causal, element);
        let checked = problem.check()?;
        let flops = checked.flops();
        let operands = Sample(2).operands(&problem)?;
        let all = 4.0 * checked.scores_len() as f64 * f64::from(problem.head_dim);
        let rows = (f64::from(problem.seq_q) * (CHECK_FLOPS / all).min(1.0)).ceil().max(1.0) as u32;
        let (part, part_operands) = last_rows(&problem, &operands, rows);
        let oracle = Oracle::new(&part, &part_operands.inputs())?;
        Ok(Subject { shape, problem, operands, flops, oracle, rows })
    }

    fn judge(&self, out: &[f32]) -> Judgement {
        let p = &self.problem;
        let mut part = Vec::new();
        for head in out.chunks_exact((p.seq_q * p.value_dim) as usize) {
            part.extend_from_slice(&head[((p.seq_q - self.rows) * p.value_dim) as usize..]);
        }
        self.oracle.out(&part)
    }
}

/// The problem of the last query rows of each head: the same keys, the same positions.
fn last_rows(problem: &Problem, operands: &Operands, rows: u32) -> (Problem, Operands) {
    let (mut part, mut operands) = (problem.clone(), operands.clone());
    if rows == problem.seq_q {
        return (part, operands);
    }
    part.seq_q = rows;
    if problem.causal == Causal::TopLeft {
        // The last row stays at the last key for bottom-right; here the first row that is left moves.
        part.causal = Causal::Offset;
        operands.offsets = Some(vec![(problem.seq_q - rows) as i32; problem.batch as usize]);
    }
    let dim = problem.head_dim as usize;
    let (all, kept) = (problem.seq_q as usize * dim, rows as usize * dim);
    fn tail<T: Copy>(x: &[T], all: usize, kept: usize) -> Vec<T> {
        x.chunks_exact(all).flat_map(|head| &head[all - kept..]).copied().collect()
    }
    operands.q = match &operands.q {
        Floats::F32(x) => Floats::F32(tail(x, all, kept)),
        Floats::F16(x) => Floats::F16(tail(x, all, kept)),
        Floats::Bf16(x) => Floats::Bf16(tail(x, all, kept)),
    };
    (part, operands)
}

/// Time of one call in milliseconds, slice by slice as `Gpu::run` submits them.
fn call(timer: &Timer<'_>, prepared: &Prepared, resident: &Resident) -> wgpu_attention::Result<f64> {
    let buffers = resident.buffers();
    (0..prepared.slices()).map(|slice| timer.time(|encoder| prepared.encode_slice(slice, encoder, &buffers))).sum()
}

fn bench(
    gpu: &Gpu,
    timer: &Timer<'_>,
    ceilings: Ceilings,
    subject: &Subject,
    options: &Options,
    repeats: Option<u32>,
) -> wgpu_attention::Result<Row> {
    let start = Instant::now();
    let plan = gpu.library().plan_with(&subject.problem, options)?;
    let prepared = gpu.library().prepare(&plan)?;
    let compiled = start.elapsed();
    let resident = gpu.upload(&plan, &subject.operands.inputs())?;
    let start = Instant::now();
    gpu.run(&prepared, &resident, &mut |_, _| {})?;
    let first_ms = (compiled + start.elapsed()).as_secs_f64() * 1e3;
    // Nothing is timed before it is known to be right; the caller says so when it is not.
    let judgement = subject.judge(&gpu.download(&plan, &resident)?.out);

    let warm = call(timer, &prepared, &resident)?;
    let fitting = (SECONDS * 1e3 / warm.max(0.1)) as u32;
    let runs = repeats.unwrap_or(fitting.clamp(LEAST_RUNS, MOST_RUNS));
    let mut times = (0..runs).map(|_| call(timer, &prepared, &resident)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    let (min, max) = (times[0], times[times.len() - 1]);
    let median = (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0;
    let label = Label::of(gpu.info());
    Ok(Row {
        adapter: label.adapter,
        backend: label.backend,
        driver: label.driver,
        kernel: plan.kernel(),
        shape: subject.shape.to_string(),
        dtype: subject.problem.element.to_string(),
        causal: causal_name(subject.problem.causal),
        median_ms: median,
        min_ms: min,
        first_ms,
        gflops: subject.flops / median / 1e6,
        ceiling_gflops: ceilings.gflops,
        error: judgement.comparison.max_error,
        budget: judgement.budget,
        within_budget: judgement.comparison.passed(),
        ceiling_gbs: ceilings.gbs,
        timer: timer.name(),
        runs: times.len(),
        spread: (max - min) / median,
        version: env!("CARGO_PKG_VERSION"),
    })
}

impl Row {
    fn cells(&self) -> Vec<String> {
        vec![
            self.shape.clone(),
            self.dtype.clone(),
            self.causal.into(),
            self.kernel.clone(),
            report::short(self.median_ms),
            report::short(self.min_ms),
            report::short(self.first_ms),
            report::short(self.gflops),
            format!("{:.1} %", 100.0 * self.gflops / self.ceiling_gflops),
            format!("{:.0} %", self.spread * 100.0),
            format!("{:.1e}", self.error),
            if self.within_budget { format!("{:.1e}", self.budget) } else { format!("{:.1e} EXCEEDED", self.budget) },
        ]
    }
}

const HEADER: [&str; 12] = [
    "B,H,HKV,SQ,SKV,D",
    "type",
    "causal",
    "kernel",
    "median ms",
    "min ms",
    "first ms",
    "GFLOP/s",
    "of ceiling",
    "spread",
    "error",
    "budget",
];

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let given: Vec<(ShapeArg, Causal)> = match &arguments.shape[..] {
        [] => {
            // A causal rule that is given holds for all shapes, so the one that has its own would stand there twice.
            let causal: Causal = arguments.causal.into();
            let own = |&(_, rule): &([u32; 6], Causal)| causal == Causal::None || rule == Causal::None;
            let rule = |rule| if causal == Causal::None { rule } else { causal };
            SHAPES.into_iter().filter(own).map(|(shape, own)| (ShapeArg(shape), rule(own))).collect()
        }
        shapes => shapes.iter().map(|&shape| (shape, arguments.causal.into())).collect(),
    };
    for (shape, _) in &given {
        shape.problem().check()?;
    }
    let mut gpus = Vec::new();
    for adapter in engine::choose(&arguments.adapter)? {
        gpus.push(engine::open(&adapter, &arguments.device)?);
    }
    if gpus.is_empty() {
        report::complain(format!("no GPU adapter was found, there is nothing to time.\n{}", engine::how_to_get_one()));
        return Ok(Outcome::Differs);
    }

    let bar = report::progress(given.len() * (gpus.len() + 1));
    let mut subjects = Vec::new();
    for &(shape, causal) in &given {
        bar.set_message(format!("reference {shape}"));
        subjects.push(Subject::new(shape, causal, arguments.dtype.into())?);
        bar.inc(1);
    }
    let options = arguments.kernels.options();
    let mut failed = false;
    for gpu in &gpus {
        let label = Label::of(gpu.info());
        let timer = Timer::new(gpu, arguments.wall_clock);
        bar.set_message(format!("ceilings of {label}"));
        let ceilings = probe::ceilings(gpu, &timer)?;
        let ceiling = format!(
            "\n{label}: ceilings {} GFLOP/s multiply-add, {} GB/s copy; timed by {}",
            report::short(ceilings.gflops),
            report::short(ceilings.gbs),
            timer.name()
        );
        let mut rows = Vec::new();
        for subject in &subjects {
            bar.set_message(format!("{} on {label}", subject.shape));
            match bench(gpu, &timer, ceilings, subject, &options, arguments.repeats) {
                Ok(row) => {
                    failed |= !row.within_budget;
                    report.object(&row)?;
                    rows.push(row.cells());
                }
                Err(error) => {
                    failed = true;
                    bar.suspend(|| report::complain(format!("{label}, shape {}: {error}", subject.shape)));
                }
            }
            bar.inc(1);
        }
        bar.suspend(|| -> Result<()> {
            report.line(ceiling)?;
            report.table(&HEADER, &rows)
        })?;
    }
    bar.finish_and_clear();
    for subject in subjects.iter().filter(|subject| subject.rows < subject.problem.seq_q) {
        report.line(format!(
            "{}: checked on the last {} of {} query rows",
            subject.shape, subject.rows, subject.problem.seq_q
        ))?;
    }
    Ok(if failed { Outcome::Differs } else { Outcome::Right })
}
