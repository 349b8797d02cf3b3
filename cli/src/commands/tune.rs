//! `tune`: measures which kernel and tile is fastest on an adapter, and stores the result.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use wgpu_attention::tuning::{Choice, Class, Row as TunedRow, Tuning};
use wgpu_attention::{Causal, Element, Gpu, Options, Plan, Precision, Prepared, Problem, Resident};
use wgpu_attention_bench::{Clock, Timer, Times};

use super::bench::{Subject, must_have_work};
use crate::Outcome;
use crate::engine::{self, DeviceArgs, Label};
use crate::error::{Error, Result};
use crate::memory;
use crate::options::ShapeArg;
use crate::problem::{Given, ProblemArgs, terms};
use crate::report::{self, Progress, Report};
use crate::store;

#[derive(Args, Debug)]
pub struct Arguments {
    /// Seconds after which no further candidate is tried or timed
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Timing")]
    seconds: u64,
    /// Each problem is an example of its class; without any, a list of common ones is measured
    #[command(flatten)]
    problem: ProblemArgs,
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long, help_heading = "Adapter")]
    adapter: Option<String>,
    /// File for the rows (default: in the cache folder of the user, or in WGPU_ATTENTION_CACHE)
    #[arg(long, help_heading = "Output")]
    file: Option<PathBuf>,
}

/// The most operations of the f64 reference for a check, whose time counts against the time limit.
const CHECK_FLOPS: f64 = 3e8;
/// The fewest and the most timed rounds of the remaining candidates, and the milliseconds after which only the fewest rounds are run.
const LEAST_ROUNDS: usize = 5;
const MOST_ROUNDS: usize = 20;
const ROUNDS_MS: f64 = 1000.0;
/// A candidate that took this many times as long as the best one is not timed further.
const SLOWER: f64 = 3.0;
/// Another choice replaces the planner's own only if it is faster by more than this share, which is above the noise of timings.
const MARGIN: f64 = 0.03;

/// Examples of common classes of problems, the most common first: many queries, then one and few, of each head dimension.
fn common(cpu: bool) -> Vec<Problem> {
    let [rows, keys] = if cpu { [512, 2048] } else { [2048, 8192] };
    let mut list = Vec::new();
    for operands in [false, true] {
        for element in [Element::F32, Element::F16] {
            for dim in [64, 128, 32] {
                let many = ShapeArg([1, 8, 8, rows, rows, dim]);
                let kinds = [
                    (many, Causal::None),
                    (many, Causal::BottomRight),
                    (ShapeArg([1, 32, 8, 1, keys, dim]), Causal::None),
                    (ShapeArg([1, 8, 8, 8, keys, dim]), Causal::None),
                ];
                for (shape, causal) in kinds {
                    let mut problem = shape.problem();
                    (problem.element, problem.causal) = (element, causal);
                    problem.softcap = operands.then_some(30.0);
                    list.push(problem);
                }
            }
        }
    }
    list
}

/// The result of a candidate.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    label: Label,
    shape: String,
    dtype: String,
    causal: &'static str,
    terms: String,
    candidate: String,
    /// The first call: planning, compiling, running.
    first_ms: Option<f64>,
    /// Median time, or the shorter of two runs for a candidate that was not timed further.
    ms: Option<f64>,
    /// Time of the planner's own choice divided by the time of this candidate.
    speedup: Option<f64>,
    verdict: String,
}

/// The verdict on a candidate without another one to compare it with.
const ALONE: &str = "not compared";

impl Row {
    fn cells(&self) -> Vec<String> {
        let number = |x: Option<f64>| x.map_or(String::new(), report::short);
        vec![
            self.shape.clone(),
            self.dtype.clone(),
            self.causal.into(),
            self.terms.clone(),
            self.candidate.clone(),
            number(self.first_ms),
            number(self.ms),
            number(self.speedup),
            self.verdict.clone(),
        ]
    }
}

const HEADER: [&str; 9] =
    ["B,H,HKV,SQ,SKV,D", "type", "causal", "terms", "candidate", "first ms", "ms", "speedup", "verdict"];

/// A candidate that is right and not far slower than the best.
struct Runner {
    /// Index of its row.
    at: usize,
    choice: Choice,
    prepared: Prepared,
    resident: Resident,
    times: Times,
}

/// The results for one problem.
struct Found {
    rows: Vec<Row>,
    /// The row to store; `None` if time ran out before two candidates were compared, or if no candidate was right.
    best: Option<TunedRow>,
    /// Whether some candidate was wrong or failed.
    failed: bool,
    /// Whether every candidate was measured.
    in_time: bool,
}

struct Tuner<'a> {
    gpu: &'a Gpu,
    timer: Timer<'a>,
    deadline: Instant,
    bar: Progress,
}

/// The plan that follows a choice.
fn plan(gpu: &Gpu, problem: &Problem, choice: Choice) -> wgpu_attention::Result<Plan> {
    let shape = problem.check()?;
    let row = TunedRow { class: Class::of(&shape), choice, ms: 0.0 };
    let tuning = Tuning { source: "tune".into(), rows: vec![row] };
    let plan = Plan::tuned(&shape, gpu.library().caps(), &Options::default(), &tuning)?;
    assert_eq!(plan.choice(), choice, "a candidate can run");
    Ok(plan)
}

impl Tuner<'_> {
    fn tune(&self, given: &Given, choices: &[Choice]) -> Result<Found> {
        // A problem that the device cannot run is refused before its operands are made.
        self.gpu.library().plan(&given.problem)?;
        let subject = Subject::new(given.clone(), Precision::Strict, CHECK_FLOPS)?;
        let mut found = Found { rows: Vec::new(), best: None, failed: false, in_time: true };
        let mut runners: Vec<Runner> = Vec::new();
        for &choice in choices {
            if Instant::now() >= self.deadline {
                found.in_time = false;
                break;
            }
            let mut row = self.row(&subject, choice);
            match self.first(&subject, choice, &mut row) {
                Ok(Some(runner)) => runners.push(Runner { at: found.rows.len(), ..runner }),
                Ok(None) => found.failed = true,
                Err(error) => {
                    found.failed = true;
                    row.verdict = format!("failed: {error}");
                }
            }
            found.rows.push(row);
            self.bar.inc(1);
        }
        // The planner's own choice was the first candidate. A candidate that is faster is worth storing even if time ran out before
        // a still faster one was found.
        if runners.len() < 2 && !found.in_time {
            return Ok(found);
        }
        let best = runners.iter().map(|runner| runner.times.median()).fold(f64::INFINITY, f64::min);
        runners.retain(|runner| runner.times.median() <= SLOWER * best);
        let time = |at: usize| {
            let Runner { prepared, resident, .. } = &runners[at];
            self.timer.call(prepared, resident, &mut |_, _| {})
        };
        match in_turn(runners.len(), || Instant::now() >= self.deadline, time)? {
            Some(all) => {
                runners.iter_mut().zip(all).for_each(|(runner, ms)| runner.times = times(ms));
                self.judge(&subject, choices[0], &runners, &mut found);
            }
            None => found.in_time = false,
        }
        Ok(found)
    }

    fn row(&self, subject: &Subject, choice: Choice) -> Row {
        let candidate = match choice {
            Choice::Unfused => "unfused".into(),
            _ => plan(self.gpu, &subject.given.problem, choice)
                .map_or_else(|_| choice.kernel().name().into(), |plan| plan.steps()[0].variant.to_string()),
        };
        Row {
            label: Label::of(self.gpu.info()),
            shape: ShapeArg::of(&subject.given.problem).to_string(),
            dtype: subject.given.problem.element.to_string(),
            causal: subject.given.problem.causal.name(),
            terms: terms(&subject.given.problem),
            candidate,
            first_ms: None,
            ms: None,
            speedup: None,
            verdict: ALONE.into(),
        }
    }

    /// Compiles, runs and checks a candidate; `None` if its result is wrong.
    fn first(&self, subject: &Subject, choice: Choice, row: &mut Row) -> wgpu_attention::Result<Option<Runner>> {
        let start = Instant::now();
        let plan = plan(self.gpu, &subject.given.problem, choice)?;
        memory::room("the call", memory::of_call(&plan, self.gpu.library().caps().cpu))?;
        let prepared = self.gpu.library().prepare(&plan)?;
        let compiled = start.elapsed();
        // Each candidate has buffers of its own, so that elements that it fails to write do not hold another one's results.
        let resident = self.gpu.upload(&plan, &subject.operands.inputs())?;
        // Some drivers compile a pipeline only when it first runs.
        let start = Instant::now();
        self.gpu.run(&prepared, &resident, &mut |_, _| {})?;
        let ran = start.elapsed();
        row.first_ms = Some((compiled + ran).as_secs_f64() * 1e3);
        let judgement = subject.judge(&self.gpu.download(&plan, &resident)?.out);
        if !judgement.comparison.passed() {
            row.verdict =
                format!("WRONG: error {:.1e}, budget {:.1e}", judgement.comparison.max_error, judgement.budget);
            return Ok(None);
        }
        // The shorter of two runs, because something may have delayed one of them.
        let ms = self.timer.call(&prepared, &resident, &mut |_, _| {})?.min(ran.as_secs_f64() * 1e3);
        row.ms = Some(ms);
        Ok(Some(Runner { at: 0, choice, prepared, resident, times: times(vec![ms]) }))
    }

    /// Chooses the fastest candidate; `own` is the planner's own choice.
    fn judge(&self, subject: &Subject, own: Choice, runners: &[Runner], found: &mut Found) {
        let median = |runner: &Runner| runner.times.median();
        let Some(fastest) = runners.iter().min_by(|a, b| median(a).total_cmp(&median(b))) else { return };
        let stays = |runner: &&Runner| runner.choice == own && median(runner) <= (1.0 + MARGIN) * median(fastest);
        let chosen = runners.iter().find(stays).unwrap_or(fastest);
        for runner in runners {
            found.rows[runner.at].ms = Some(median(runner));
        }
        // Candidates are in the order of their choices, the planner's own first.
        let own_ms = found.rows[0].ms;
        for row in &mut found.rows {
            if row.verdict == ALONE {
                row.verdict = "slower".into();
            }
            row.speedup = own_ms.zip(row.ms).map(|(own, ms)| own / ms);
        }
        found.rows[chosen.at].verdict = "chosen".into();
        let class = Class::of(&subject.given.problem.check().expect("it was planned"));
        found.best = Some(TunedRow { class, choice: chosen.choice, ms: median(chosen) });
    }
}

/// The times of a candidate that was timed at least once.
fn times(ms: Vec<f64>) -> Times {
    Times::new(ms).expect("a timer returns times above 0")
}

/// Times candidates in alternation, so that a busy moment of the machine affects all of them, and returns the times of each. Returns `None`
/// if it is `late` before the fewest rounds are complete. A round that is not complete does not count.
fn in_turn(
    candidates: usize,
    late: impl Fn() -> bool,
    mut time: impl FnMut(usize) -> wgpu_attention::Result<f64>,
) -> wgpu_attention::Result<Option<Vec<Vec<f64>>>> {
    let mut times = vec![Vec::new(); candidates];
    let start = Instant::now();
    for round in 0..MOST_ROUNDS {
        if round >= LEAST_ROUNDS && start.elapsed().as_secs_f64() * 1e3 > ROUNDS_MS {
            break;
        }
        for candidate in 0..candidates {
            if late() {
                times.iter_mut().for_each(|times| times.truncate(round));
                return Ok((round >= LEAST_ROUNDS).then_some(times));
            }
            times[candidate].push(time(candidate)?);
        }
    }
    Ok(Some(times))
}

/// The problems, no class twice.
fn subjects(arguments: &Arguments, cpu: bool) -> Result<Vec<Given>> {
    let given = &arguments.problem;
    if given.shape.is_empty() && given.problem.is_empty() {
        let plain = Problem::new(1, 1, 1, 1, 64);
        if given.with_terms(plain.clone())?.problem != plain || given.save_problem.is_some() {
            return Err(Error::NoShape);
        }
        return Ok(common(cpu).into_iter().map(Given::from).collect());
    }
    let subjects = given.problems(&[])?;
    let mut classes: Vec<Class> = Vec::new();
    for given in &subjects {
        must_have_work(given)?;
        let class = Class::of(&given.problem.check()?);
        if let Some(at) = classes.iter().position(|other| *other == class) {
            return Err(Error::SameClass { left: subjects[at].to_string(), right: given.to_string() });
        }
        classes.push(class);
    }
    Ok(subjects)
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let start = Instant::now();
    // Each candidate is planned by a tuning row of its own, so the stored rows are not loaded.
    let device = DeviceArgs { untuned: true, ..DeviceArgs::default() };
    let gpu = engine::one(arguments.adapter.as_deref(), &device)?;
    let label = Label::of(gpu.info());
    let path = match (&arguments.file, store::folder()) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => store::tuning_file(&folder, gpu.info()),
        (None, None) => return Err(Error::NoFolder { variable: store::FOLDER }),
    };
    let mut work = Vec::new();
    for given in subjects(arguments, gpu.library().caps().cpu)? {
        let choices = Tuning::candidates(&given.problem.check()?, gpu.library().caps())?;
        work.push((given, choices));
    }
    let bar = report::progress(work.iter().map(|(_, choices)| choices.len()).sum());
    let deadline = start + Duration::from_secs(arguments.seconds);
    let tuner = Tuner { gpu: &gpu, timer: Timer::new(&gpu, Clock::Timestamps), deadline, bar };

    let (mut cells, mut best, mut failed, mut late) = (Vec::new(), Vec::new(), false, 0);
    for (given, choices) in &work {
        if Instant::now() >= deadline {
            late += 1;
            continue;
        }
        tuner.bar.set_message(format!("{given} on {label}"));
        let found = match tuner.tune(given, choices) {
            Ok(found) => found,
            Err(error) => {
                failed = true;
                tuner.bar.suspend(|| report.error(format!("problem {given}: {error}")));
                continue;
            }
        };
        late += usize::from(!found.in_time);
        failed |= found.failed;
        best.extend(found.best);
        for row in &found.rows {
            report.object(row)?;
            cells.push(row.cells());
        }
    }
    tuner.bar.finish_and_clear();
    report.line(format!("{label} ({}), timed by {}", label.driver, tuner.timer.name()))?;
    report.table(&HEADER, &cells)?;
    if late > 0 {
        report.note(format!(
            "{late} of {} not measured, or not with every candidate, within {} s",
            report::count(work.len(), "problem was", "problems were"),
            arguments.seconds
        ))?;
    }
    if best.is_empty() {
        let why = if late > 0 { "; --seconds allows more time" } else { "" };
        report::complain(format!("no two candidates of a problem were compared, no rows are stored{why}"));
        return Ok(Outcome::Differs);
    }
    let tuned = best.len();
    // Stored rows of other classes are kept if they are of this driver and version.
    let old = store::read_tuning(&path, gpu.info()).unwrap_or_default().unwrap_or_default();
    let others = old.rows.into_iter().filter(|old| !best.iter().any(|new| new.class == old.class));
    let rows: Vec<TunedRow> = best.iter().copied().chain(others).collect();
    store::write_tuning(&path, gpu.info(), &rows)?;
    report.line(format!("rows measured: {tuned}; stored: {}, in {}", rows.len(), path.display()))?;
    Ok(if failed { Outcome::Differs } else { Outcome::Right })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// The times of three candidates where it is late after `calls` calls, and the number of calls made.
    fn after(calls: usize) -> (Option<Vec<Vec<f64>>>, usize) {
        let made = Cell::new(0);
        let time = |candidate: usize| {
            made.set(made.get() + 1);
            Ok(candidate as f64)
        };
        (in_turn(3, || made.get() >= calls, time).unwrap(), made.get())
    }

    #[test]
    fn no_candidate_is_timed_when_it_is_late_and_no_comparison_comes_of_few_rounds() {
        for calls in [0, 1, 3, 3 * LEAST_ROUNDS - 1] {
            assert_eq!(after(calls), (None, calls));
        }
        let rounds = |n| [0.0, 1.0, 2.0].map(|time| vec![time; n]).to_vec();
        assert_eq!(after(3 * LEAST_ROUNDS), (Some(rounds(LEAST_ROUNDS)), 3 * LEAST_ROUNDS));
        // A round that is not complete does not count.
        assert_eq!(after(3 * LEAST_ROUNDS + 2), (Some(rounds(LEAST_ROUNDS)), 3 * LEAST_ROUNDS + 2));
        assert_eq!(after(usize::MAX), (Some(rounds(MOST_ROUNDS)), 3 * MOST_ROUNDS));
    }
}
