//! `bench`: times problems, and plain shaders on the same adapter in the same run.

use std::ops::Range;
use std::time::Instant;

use clap::Args;
use indicatif::MultiProgress;
use serde::Serialize;
use wgpu_attention::{Causal, Element, Gpu, Options, Prepared, Problem, Resident, Shape};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, KernelArgs, Label};
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::memory;
use crate::operands::{Array, OwnedInputs};
use crate::options::{self, ShapeArg};
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
    #[arg(long, value_parser = options::causal(), default_value_t)]
    causal: Causal,
    #[arg(long, value_parser = options::element(), default_value_t)]
    dtype: Element,
    /// Timed runs after the first (default: as many as fit in two seconds, 5 to 50)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeats: Option<u32>,
    /// Time by the wall clock around submission and wait even where the device has timestamps, to compare with programs without them
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

/// The shapes that are timed where none is given: prefill, prefill with a causal rule, a sentence encoder, one step of decoding.
const SHAPES: [([u32; 6], Causal); 5] = [
    ([1, 8, 8, 512, 512, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::BottomRight),
    ([1, 12, 12, 128, 128, 32], Causal::None),
    ([1, 32, 8, 1, 4096, 128], Causal::None),
];

/// The most operations of the f64 reference for a check. Of larger problems only some rows are checked.
const CHECK_FLOPS: f64 = 3e9;
/// The number of runs of neighbouring rows that are checked then: the first rows, the last rows, and runs at equal distances between.
const CHECK_RUNS: u32 = 5;
/// Seconds of timed runs where their number is not given, and the bounds of that number.
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
    /// Whether each element is within its own error budget.
    #[serde(skip)]
    within_budget: bool,
    ceiling_gbs: f64,
    timer: &'static str,
    runs: usize,
    /// (longest − shortest) / median.
    spread: f64,
    version: &'static str,
}

/// A problem to time, with the reference's results for all or some of its rows.
pub struct Subject {
    pub shape: ShapeArg,
    pub problem: Problem,
    pub operands: OwnedInputs,
    flops: f64,
    /// Ranges of rows of each head, and their expected results.
    checked: Vec<(Range<u32>, Oracle)>,
}

fn problem(shape: ShapeArg, causal: Causal, element: Element) -> Problem {
    let mut problem = shape.problem();
    (problem.causal, problem.element) = (causal, element);
    problem
}

/// Refuses problems without work: their times would mean nothing, and their rates would be 0 divided by a time.
pub fn must_have_work(shape: ShapeArg, problem: &Problem) -> Result<()> {
    match problem.check()?.visible_pairs() {
        0 => Err(Error::NoWork { shape: shape.to_string() }),
        _ => Ok(()),
    }
}

impl Subject {
    /// Prepares a problem without operands beside q, k and v. The check may take at most `check_flops` operations.
    pub fn new(shape: ShapeArg, problem: Problem, check_flops: f64) -> Result<Self> {
        let checked = problem.check()?;
        let flops = checked.flops();
        let all = 4.0 * checked.scores_len() as f64 * f64::from(problem.head_dim);
        let rows = (f64::from(problem.seq_q) * (check_flops / all).min(1.0)).ceil().max(1.0) as u32;
        memory::room("the problem with its reference", Self::bytes(&checked, rows)?)?;
        let operands = Sample(2).operands(&problem.clone().into())?;
        let oracle = |rows: Range<u32>| -> Result<(Range<u32>, Oracle)> {
            let (part, operands) = only(&problem, &operands, &rows);
            Ok((rows, Oracle::new(&part, &operands.inputs())?))
        };
        let checked = runs(problem.seq_q, rows).into_iter().map(oracle).collect::<Result<_>>()?;
        Ok(Subject { shape, problem, operands, flops, checked })
    }

    /// Bytes on the host for the operands, a copy of them for a run of rows, and the reference for `rows` rows of each head.
    fn bytes(shape: &Shape, rows: u32) -> Result<u64> {
        let [q, k, v] = [shape.q(), shape.k(), shape.v()].map(|tensor| tensor.extent());
        let mut part: Problem = shape.problem().clone();
        part.seq_q = rows;
        let reference = memory::of_reference(&part.check()?, 8, true);
        // Random numbers are made in f32 and rounded afterwards.
        Ok(2 * shape.problem().element.bytes() * (q + k + v) + 4 * q.max(k).max(v) + reference)
    }

    /// The judgement of the run of rows that uses most of its error budget.
    pub fn judge(&self, out: &[f32]) -> Judgement {
        let p = &self.problem;
        let one = |(rows, oracle): &(Range<u32>, Oracle)| {
            let heads = out.chunks_exact((p.seq_q * p.value_dim) as usize);
            let range = (rows.start * p.value_dim) as usize..(rows.end * p.value_dim) as usize;
            oracle.out(&heads.flat_map(|head| &head[range.clone()]).copied().collect::<Vec<_>>())
        };
        let worse = |a: Judgement, b: Judgement| {
            if b.comparison.worst_ratio > a.comparison.worst_ratio { b } else { a }
        };
        self.checked.iter().map(one).reduce(worse).expect("at least one run of rows")
    }

    /// Tells which rows are checked; `None` if all are.
    fn sampled(&self) -> Option<String> {
        let names: Vec<String> =
            self.checked.iter().map(|(rows, _)| format!("{} to {}", rows.start, rows.end - 1)).collect();
        let count: u32 = self.checked.iter().map(|(rows, _)| rows.len() as u32).sum();
        (count < self.problem.seq_q).then(|| {
            let all = self.problem.seq_q;
            format!("{}: checked on {count} of {all} query rows: {}", self.shape, names.join(", "))
        })
    }
}

/// At most `rows` of `seq_q` rows, as runs at equal distances. The first run begins with the first row, and the last one ends with the last
/// row.
fn runs(seq_q: u32, rows: u32) -> Vec<Range<u32>> {
    if rows >= seq_q {
        return std::iter::once(0..seq_q).collect();
    }
    let count = CHECK_RUNS.min(rows);
    let each = rows / count;
    let start = |n: u32| match count {
        // A single row: the last one, which sees the most keys under a causal rule.
        1 => seq_q - each,
        _ => (u64::from(seq_q - each) * u64::from(n) / u64::from(count - 1)) as u32,
    };
    (0..count).map(|n| start(n)..start(n) + each).collect()
}

/// The problem of some query rows of each head, with the same keys and positions.
fn only(problem: &Problem, inputs: &OwnedInputs, rows: &Range<u32>) -> (Problem, OwnedInputs) {
    let (mut part, mut inputs) = (problem.clone(), inputs.clone());
    if rows.len() as u32 == problem.seq_q {
        return (part, inputs);
    }
    part.seq_q = rows.len() as u32;
    let first = match problem.causal {
        Causal::TopLeft => Some(0),
        Causal::BottomRight => Some(problem.seq_kv as i32 - problem.seq_q as i32),
        _ => None,
    };
    if let Some(first) = first {
        part.causal = Causal::Offset;
        inputs.operands.offsets = Some(Array::I32(vec![first + rows.start as i32; problem.batch as usize]));
    }
    let dim = problem.head_dim as usize;
    let (all, kept) = (problem.seq_q as usize * dim, rows.start as usize * dim..rows.end as usize * dim);
    fn pick<T: Copy>(x: &[T], all: usize, kept: &Range<usize>) -> Vec<T> {
        x.chunks_exact(all).flat_map(|head| &head[kept.clone()]).copied().collect()
    }
    inputs.q = match &inputs.q {
        Floats::F32(x) => Floats::F32(pick(x, all, &kept)),
        Floats::F16(x) => Floats::F16(pick(x, all, &kept)),
        Floats::Bf16(x) => Floats::Bf16(pick(x, all, &kept)),
    };
    (part, inputs)
}

/// Time of one call in milliseconds, slice by slice as `Gpu::run` submits them.
pub fn call(
    timer: &Timer<'_>,
    prepared: &Prepared,
    resident: &Resident,
    progress: &mut dyn FnMut(usize, usize),
) -> wgpu_attention::Result<f64> {
    let buffers = resident.buffers();
    let recording = prepared.begin()?;
    let slices = 0..prepared.slices();
    let time = |slice| {
        let ms = timer.time(|encoder| recording.encode_slice(slice, encoder, &buffers));
        progress(slice + 1, prepared.slices());
        ms
    };
    // A clock that is too coarse may return 0; rates must stay finite.
    slices.map(time).sum::<wgpu_attention::Result<f64>>().map(|ms| ms.max(1e-6))
}

fn bench(
    gpu: &Gpu,
    timer: &Timer<'_>,
    ceilings: Ceilings,
    subject: &Subject,
    options: &Options,
    repeats: Option<u32>,
    progress: &mut dyn FnMut(usize, usize),
) -> wgpu_attention::Result<Row> {
    let start = Instant::now();
    let plan = gpu.library().plan_with(&subject.problem, options)?;
    memory::room("the call", memory::of_call(&plan, gpu.library().caps().cpu))?;
    let prepared = gpu.library().prepare(&plan)?;
    let compiled = start.elapsed();
    let resident = gpu.upload(&plan, &subject.operands.inputs())?;
    let start = Instant::now();
    gpu.run(&prepared, &resident, progress)?;
    let first_ms = (compiled + start.elapsed()).as_secs_f64() * 1e3;
    // Results are checked before they are timed. The caller reports a wrong result.
    let judgement = subject.judge(&gpu.download(&plan, &resident)?.out);

    let mut timed = || call(timer, &prepared, &resident, progress);
    let runs = match repeats {
        Some(repeats) => repeats,
        None => ((SECONDS * 1e3 / timed()?.max(0.1)) as u32).clamp(LEAST_RUNS, MOST_RUNS),
    };
    let mut times = (0..runs).map(|_| timed()).collect::<Result<Vec<_>, _>>()?;
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
        causal: subject.problem.causal.name(),
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
            // A given causal rule holds for all shapes, so the shape with a causal rule of its own would be listed twice.
            let causal = arguments.causal;
            let own = |&(_, rule): &([u32; 6], Causal)| causal == Causal::None || rule == Causal::None;
            let rule = |rule| if causal == Causal::None { rule } else { causal };
            SHAPES.into_iter().filter(own).map(|(shape, own)| (ShapeArg(shape), rule(own))).collect()
        }
        shapes => shapes.iter().map(|&shape| (shape, arguments.causal)).collect(),
    };
    for &(shape, causal) in &given {
        must_have_work(shape, &problem(shape, causal, arguments.dtype))?;
    }
    let mut gpus = Vec::new();
    for adapter in engine::choose(&arguments.adapter)? {
        gpus.push(engine::open(&adapter, &arguments.device)?);
    }
    if gpus.is_empty() {
        report.error(format!("no GPU adapter was found, there is nothing to time.\n{}", engine::how_to_get_one()));
        return Ok(Outcome::Differs);
    }

    let bars = MultiProgress::new();
    let bar = report::progress(given.len() * (gpus.len() + 1));
    bars.add(bar.clone());
    let options = arguments.kernels.options();
    let element: Element = arguments.dtype;
    let mut subjects = Vec::new();
    let mut failed = false;
    for &(shape, causal) in &given {
        bar.set_message(format!("reference {shape}"));
        // A problem that no adapter can run is refused before operands are made and the reference runs.
        let problem = problem(shape, causal, element);
        let refused: Vec<_> = gpus.iter().filter_map(|gpu| gpu.library().plan_with(&problem, &options).err()).collect();
        let subject = match &refused[..] {
            [error, ..] if refused.len() == gpus.len() => Err(error.clone().into()),
            _ => Subject::new(shape, problem, CHECK_FLOPS),
        };
        match subject {
            Ok(subject) => subjects.push(subject),
            Err(error) => {
                failed = true;
                bar.suspend(|| report.error(format!("shape {shape}: {error}")));
                bar.inc(gpus.len() as u64);
            }
        }
        bar.inc(1);
    }
    for gpu in gpus.iter().filter(|_| !subjects.is_empty()) {
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
            let slices = bars.add(report::slices());
            let mut progress = |done, of| report::advance(&slices, done, of);
            let row = bench(gpu, &timer, ceilings, subject, &options, arguments.repeats, &mut progress);
            slices.finish_and_clear();
            match row {
                Ok(row) => {
                    failed |= !row.within_budget;
                    bar.suspend(|| report.object(&row))?;
                    rows.push(row.cells());
                }
                Err(error) => {
                    failed = true;
                    bar.suspend(|| report.error(format!("{label}, shape {}: {error}", subject.shape)));
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
    for sampled in subjects.iter().filter_map(Subject::sampled) {
        report.line(sampled)?;
    }
    Ok(if failed { Outcome::Differs } else { Outcome::Right })
}

#[cfg(test)]
mod tests {
    use wgpu_attention::reference;

    use super::*;

    #[test]
    fn rows_are_sampled_from_the_first_to_the_last() {
        let of = |seq_q, rows| runs(seq_q, rows).into_iter().map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert_eq!(of(10, 10), [(0, 10)]);
        let long = [(0, 17), (32763, 32780), (65527, 65544), (98291, 98308), (131055, 131072)];
        assert_eq!(of(1 << 17, 89), long);
        assert_eq!(of(100, 3), [(0, 1), (49, 50), (99, 100)]);
        assert_eq!(of(100, 1), [(99, 100)]);
        for rows in 1..40 {
            let runs = runs(40, rows);
            assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start) && runs.last().unwrap().end == 40);
        }
    }

    #[test]
    fn sampled_rows_are_judged_as_those_of_the_whole() {
        for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight] {
            let mut subject = {
                let shape: ShapeArg = "2,4,2,33,47,8".parse().unwrap();
                Subject::new(shape, problem(shape, causal, Element::F16), CHECK_FLOPS).unwrap()
            };
            let oracle = |rows| {
                let (part, operands) = only(&subject.problem, &subject.operands, &rows);
                (rows, Oracle::new(&part, &operands.inputs()).unwrap())
            };
            subject.checked = runs(33, 12).into_iter().map(oracle).collect();
            assert!(subject.sampled().unwrap().contains("10 of 33 query rows: 0 to 1, 7 to 8,"));
            let right = reference::attention::<f32>(&subject.problem, &subject.operands.inputs()).unwrap().out;
            assert!(subject.judge(&right).comparison.passed());
            for row in [0, 1, 8, 32] {
                let mut wrong = right.clone();
                wrong[(33 * 5 + row) * 8 + 3] += 0.1;
                assert!(!subject.judge(&wrong).comparison.passed(), "row {row}");
            }
        }
    }
}
