//! The measuring itself.

use std::time::{Instant, SystemTime};

use indicatif::MultiProgress;
use wgpu_attention::{Causal, Error as Refusal, Kernel, Options, Plan, Problem, with};
use wgpu_attention_bench::{Ceilings, Clock, Repeats, Timer};

use super::Arguments;
use super::record::{Case, Machine, Record};
use super::subject::{Subject, must_have_work};
use crate::Outcome;
use crate::engine::{self, Label};
use crate::error::Result;
use crate::memory;
use crate::options::ShapeArg;
use crate::problem::Given;
use crate::report::{self, Progress, Report};
use crate::store::Device;

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

/// All measurements of a run.
pub struct Measured {
    pub records: Vec<Record>,
    /// Sentences about what was not measured, or not checked as a whole.
    pub remarks: Vec<String>,
    pub outcome: Outcome,
}

/// The problems that are asked for.
fn problems(arguments: &Arguments) -> Result<Vec<Given>> {
    // A given causal rule holds for all shapes, so the shape with a causal rule of its own would be listed twice.
    let terms = &arguments.problem.terms;
    let ruled = terms.causal != Causal::None || terms.causal_offset.is_some();
    let own = |&(_, rule): &([u32; 6], Causal)| !ruled || rule == Causal::None;
    let problem = |(shape, causal)| with!(ShapeArg(shape).problem(), causal);
    let default: Vec<Problem> = SHAPES.into_iter().filter(own).map(problem).collect();
    arguments.problem.problems(&default)
}

/// Measures what the arguments ask for; `each` is called after each measurement.
pub fn measure(arguments: &Arguments, report: Report, each: &mut dyn FnMut(&Record) -> Result<()>) -> Result<Measured> {
    let problems = problems(arguments)?;
    problems.iter().try_for_each(must_have_work)?;
    let mut gpus = Vec::new();
    for adapter in engine::choose(&arguments.adapter)? {
        gpus.push(engine::open(&adapter, &arguments.device)?);
    }
    let mut measured = Measured { records: Vec::new(), remarks: Vec::new(), outcome: Outcome::Right };
    if gpus.is_empty() {
        report.error(format!("no GPU adapter was found, there is nothing to time.\n{}", engine::how_to_get_one()));
        measured.outcome = Outcome::Differs;
        return Ok(measured);
    }

    let bars = MultiProgress::new();
    let bar = report::progress(problems.len() * (gpus.len() + 1));
    bars.add(bar.clone());
    let mut subjects = Vec::new();
    for given in problems {
        let name = given.to_string();
        bar.set_message(format!("reference of {name}"));
        match subject(&gpus, &arguments.kernels.options(), given) {
            Ok(subject) => subjects.push(subject),
            Err(error) => {
                measured.outcome = Outcome::Differs;
                bar.suspend(|| report.error(format!("problem {name}: {error}")));
                bar.inc(gpus.len() as u64);
            }
        }
        bar.inc(1);
    }
    for gpu in gpus.iter().filter(|_| !subjects.is_empty()) {
        Bench::new(arguments, report, gpu, &bars, &bar)?.all(&subjects, each, &mut measured)?;
    }
    bar.finish_and_clear();
    measured.remarks.extend(subjects.iter().filter_map(Subject::sampled));
    Ok(measured)
}

/// A problem with its reference. A problem that no adapter can run is refused before operands are made and the reference runs.
fn subject(gpus: &[Device], options: &Options, given: Given) -> Result<Subject> {
    let plan = |gpu: &Device| gpu.library().plan_with(&given.problem, options);
    let refused: Vec<_> = gpus.iter().filter_map(|gpu| plan(gpu).err()).collect();
    match &refused[..] {
        [error, ..] if refused.len() == gpus.len() => Err(error.clone().into()),
        _ => Subject::new(given, options.precision, CHECK_FLOPS),
    }
}

/// The measurements on one adapter.
struct Bench<'a> {
    gpu: &'a Device,
    label: Label,
    timer: Timer<'a>,
    ceilings: Ceilings,
    machine: Machine,
    repeats: Repeats,
    options: Options,
    all_kernels: bool,
    /// Whether the planner is free to choose.
    free: bool,
    report: Report,
    bars: &'a MultiProgress,
    bar: &'a Progress,
}

impl<'a> Bench<'a> {
    fn new(
        arguments: &Arguments,
        report: Report,
        gpu: &'a Device,
        bars: &'a MultiProgress,
        bar: &'a Progress,
    ) -> Result<Self> {
        let label = Label::of(gpu.info());
        let timer = Timer::new(gpu, if arguments.wall_clock { Clock::Wall } else { Clock::Timestamps });
        bar.set_message(format!("ceilings of {label}"));
        let ceilings = Ceilings::measure(gpu, &timer)?;
        let free = arguments.kernels.kernel.is_none() && arguments.kernels.form.is_none();
        Ok(Bench {
            gpu,
            label,
            timer,
            ceilings,
            machine: Machine::this(),
            repeats: arguments.repeats.map_or_else(Repeats::default, Repeats::exactly),
            options: arguments.kernels.options(),
            all_kernels: free && (arguments.all_kernels || arguments.results.report.is_some()),
            free,
            report,
            bars,
            bar,
        })
    }

    fn all(
        &self,
        subjects: &[Subject],
        each: &mut dyn FnMut(&Record) -> Result<()>,
        measured: &mut Measured,
    ) -> Result<()> {
        for subject in subjects {
            let plans = self.plans(subject, &mut measured.remarks);
            for (plan, planned) in plans.unwrap_or_else(|error| vec![(Err(error), true)]) {
                let kernel = plan.as_ref().map_or_else(|_| String::new(), |plan| format!(" with {}", plan.kernel()));
                self.bar.set_message(format!("{}{kernel} on {}", subject.given, self.label));
                let slices = self.bars.add(report::slices());
                let mut progress = |done, of| report::advance(&slices, done, of);
                let result = plan.map_err(Into::into).and_then(|plan| self.one(subject, &plan, planned, &mut progress));
                slices.finish_and_clear();
                match result {
                    Ok(record) => {
                        if !record.within_budget() {
                            measured.outcome = Outcome::Differs;
                        }
                        self.bar.suspend(|| each(&record))?;
                        measured.records.push(record);
                    }
                    Err(error) => {
                        measured.outcome = Outcome::Differs;
                        let text = format!("{}, problem {}: {error}", self.label, subject.given);
                        self.bar.suspend(|| self.report.error(text));
                    }
                }
            }
            self.bar.inc(1);
        }
        Ok(())
    }

    /// The plan by the options and, if all kernels are measured, a plan for each other kernel; and whether the planner chose it. A kernel
    /// that cannot run is a remark; other refusals are results.
    fn plans(
        &self,
        subject: &Subject,
        remarks: &mut Vec<String>,
    ) -> wgpu_attention::Result<Vec<(wgpu_attention::Result<Plan>, bool)>> {
        let plan = |options: &Options| self.gpu.library().plan_with(&subject.given.problem, options);
        let own = plan(&self.options)?;
        let others = Kernel::ALL.into_iter().filter(|kernel| self.all_kernels && *kernel != own.choice().kernel());
        let mut plans = vec![(Ok(own.clone()), self.free)];
        for kernel in others {
            match plan(&with!(self.options.clone(), kernel: Some(kernel))) {
                Err(error @ Refusal::Kernel { .. }) => {
                    let remark = format!("{}: {error}", self.label);
                    if !remarks.contains(&remark) {
                        remarks.push(remark);
                    }
                }
                plan => plans.push((plan, false)),
            }
        }
        Ok(plans)
    }

    fn one(
        &self,
        subject: &Subject,
        plan: &Plan,
        planned: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Record> {
        let gpu = self.gpu;
        memory::room("the call", memory::of_call(plan, gpu.library().caps().cpu))?;
        let start = Instant::now();
        let prepared = gpu.library().prepare(plan)?;
        let compiled = start.elapsed();
        let resident = gpu.upload(plan, &subject.operands.inputs())?;
        let start = Instant::now();
        gpu.run(&prepared, &resident, progress)?;
        let first_ms = (compiled + start.elapsed()).as_secs_f64() * 1e3;
        // Results are checked before they are timed. The caller reports a wrong result.
        let judgement = subject.judge(&gpu.download(plan, &resident)?.out);
        let times_ms = self.repeats.measure(|| self.timer.call(&prepared, &resident, progress))?;
        Ok(Record {
            label: self.label.clone(),
            kernel: plan.kernel(),
            choice: plan.choice().kernel().name().into(),
            planned,
            precision: self.options.precision,
            case: Case::of(&subject.given.problem),
            flops: subject.flops,
            bytes: memory::of_tensors(plan.shape()),
            first_ms,
            ceiling_gflops: self.ceilings.gflops,
            ceiling_gbs: self.ceilings.gbs,
            error: judgement.comparison.max_error,
            budget: judgement.budget,
            budget_used: judgement.comparison.worst_ratio,
            timer: self.timer.name().into(),
            version: env!("CARGO_PKG_VERSION").into(),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            machine: self.machine.clone(),
            times_ms,
        })
    }
}
