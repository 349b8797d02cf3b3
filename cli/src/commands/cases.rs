//! `cases`: runs case files and tells which pass.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::Outcome;
use crate::cases::{self, Case, Loaded, Verdict, Work};
use crate::engine::{self, DeviceArgs, Engine, KernelArgs};
use crate::error::Result;
use crate::report::{self, Report};

#[derive(Args, Debug)]
pub struct Arguments {
    /// Case files, or folders that are searched for them with their subfolders
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Adapter: index, part of its name, or backend:part (repeatable; default all)
    #[arg(long)]
    adapter: Vec<String>,
    /// Run the CPU reference in f32: together with the adapters that --adapter names, or else without any adapter
    #[arg(long)]
    cpu: bool,
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// The results of one engine.
#[derive(Clone, Debug, Default)]
struct Count {
    passed: usize,
    failed: usize,
    /// Why the forced kernel cannot run cases, and how many.
    refused: BTreeMap<String, usize>,
    /// Largest ratio of an error to its tolerance, over all cases that passed.
    worst: f64,
    worst_case: String,
}

fn engines(arguments: &Arguments) -> Result<Vec<Engine>> {
    let mut engines = Vec::new();
    if arguments.cpu {
        engines.push(Engine::Cpu);
    }
    if !arguments.cpu || !arguments.adapter.is_empty() {
        for adapter in engine::choose(&arguments.adapter)? {
            engines.push(Engine::Gpu(Box::new(engine::open(&adapter, &arguments.device)?)));
        }
    }
    Ok(engines)
}

/// Whether the error says that a forced kernel cannot run the problem. The planner's own choice always can.
fn refuses(error: &wgpu_attention::Error) -> bool {
    matches!(error, wgpu_attention::Error::Kernel { .. })
}

/// Runs all calls of a case.
fn verdicts(case: &Case, engine: &Engine, kernels: &KernelArgs) -> wgpu_attention::Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    for call in &case.calls {
        let outputs = match &call.work {
            Work::Attention { problem, operands } => engine.attention(problem, &operands.inputs(), kernels)?,
            Work::Layer(work) => engine.layer(work, kernels)?,
            Work::Rotation(work) => engine.rotation(work)?,
            Work::Append(work) => engine.append(work)?,
            Work::Scores { problem, operands } => engine.attention(problem, &operands.inputs(), &kernels.staged())?,
        };
        verdicts.extend(call.verdicts(&outputs, &call.rounding(kernels.precision)?));
    }
    Ok(verdicts)
}

/// Reports the result of one case on one engine.
fn tell(report: Report, case: &Case, engine: &Engine, result: &wgpu_attention::Result<Vec<Verdict>>) -> Result<()> {
    let label = engine.label();
    let mut object = json!({
        "adapter": label.adapter, "backend": label.backend, "driver": label.driver, "case": case.name, "notes": case.notes,
    });
    match result {
        Err(error) if refuses(error) => {
            // At the end there is a line for each reason.
            (object["verdict"], object["why"]) = ("skipped".into(), error.to_string().into());
        }
        Err(error) => {
            object["verdict"] = "failed".into();
            object["error"] = error.to_string().into();
            report.line(format!("FAIL {} on {label}: {error}", case.name))?;
        }
        Ok(verdicts) => {
            let passed = verdicts.iter().all(|verdict| verdict.difference.passes());
            object["verdict"] = if passed { "passed" } else { "failed" }.into();
            let tensor = |verdict: &Verdict| {
                let d = &verdict.difference;
                json!({
                    "tensor": verdict.name, "max_error": d.max_error, "of_tolerance": d.worst,
                    "failures": d.failures, "compared": d.compared,
                })
            };
            object["tensors"] = verdicts.iter().map(tensor).collect();
            for verdict in verdicts.iter().filter(|verdict| !verdict.difference.passes()) {
                let d = &verdict.difference;
                let compared = report::count(d.compared, "element", "elements");
                report.line(format!(
                    "FAIL {} on {label}: {}: {} of {compared} beyond the tolerance, by up to {} times; \
                     max error {:.3e}; worst at {}: got {:e}, want {:e}",
                    case.name,
                    verdict.name,
                    d.failures,
                    report::short(d.worst),
                    d.max_error,
                    d.index,
                    d.got,
                    d.want
                ))?;
            }
        }
    }
    report.object(&object)
}

impl Count {
    /// The number of cases that the forced kernel cannot run.
    fn refused(&self) -> usize {
        self.refused.values().sum()
    }

    fn add(&mut self, case: &Case, result: &wgpu_attention::Result<Vec<Verdict>>) {
        let verdicts = match result {
            Ok(verdicts) => verdicts,
            Err(error) if refuses(error) => {
                *self.refused.entry(error.to_string()).or_default() += 1;
                return;
            }
            Err(_) => {
                self.failed += 1;
                return;
            }
        };
        if !verdicts.iter().all(|verdict| verdict.difference.passes()) {
            self.failed += 1;
            return;
        }
        self.passed += 1;
        for verdict in verdicts {
            if verdict.difference.worst > self.worst {
                self.worst = verdict.difference.worst;
                self.worst_case = format!("{}, {}", case.name, verdict.name);
            }
        }
    }
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let sources = cases::sources(&arguments.paths)?;
    let engines = engines(arguments)?;
    let mut counts = vec![Count::default(); engines.len()];
    let mut notes: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut skipped, mut unreadable) = (0, 0);
    let bar = report::progress(sources.len());
    for source in &sources {
        bar.set_message(format!("reading {}", source.path().display()));
        match cases::load(source) {
            Ok(Loaded::Cases(cases)) => {
                for case in &cases {
                    case.notes.iter().for_each(|note| *notes.entry(note).or_default() += 1);
                    for (engine, count) in engines.iter().zip(&mut counts) {
                        bar.set_message(format!("{} on {}", case.name, engine.label()));
                        let result = verdicts(case, engine, &arguments.kernels);
                        count.add(case, &result);
                        bar.suspend(|| tell(report, case, engine, &result))?;
                    }
                }
            }
            Ok(Loaded::Unsupported { name, why }) => {
                skipped += 1;
                bar.suspend(|| {
                    report.object(&json!({"case": name, "verdict": "skipped", "why": why}))?;
                    report.line(format!("skip {name}: {why}"))
                })?;
            }
            Err(error) => {
                unreadable += 1;
                bar.suspend(|| {
                    report::complain(&error);
                    report.object(&json!({
                        "case": source.path().to_string_lossy(), "verdict": "failed", "error": error.to_string(),
                    }))
                })?;
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    for (engine, count) in engines.iter().zip(&counts) {
        for (why, cases) in &count.refused {
            let cases = report::count(*cases, "case", "cases");
            report.line(format!("skip {cases} on {}: {why}", engine.label()))?;
        }
    }
    for (note, cases) in &notes {
        report.line(format!("{}: {note}", report::count(*cases, "case", "cases")))?;
    }
    if engines.is_empty() {
        report.error(format!(
            "no GPU adapter was found, nothing ran; --cpu runs the CPU reference.\n{}",
            engine::how_to_get_one()
        ));
    } else {
        let row = |(engine, count): (&Engine, &Count)| {
            vec![
                engine.label().to_string(),
                count.passed.to_string(),
                count.failed.to_string(),
                count.refused().to_string(),
                format!("{:.0} % ({})", count.worst * 100.0, count.worst_case),
            ]
        };
        let rows: Vec<_> = engines.iter().zip(&counts).map(row).collect();
        report.table(&["adapter", "passed", "failed", "refused", "closest to its tolerance"], &rows)?;
    }
    let passed: usize = counts.iter().map(|count| count.passed).sum();
    skipped += counts.iter().map(Count::refused).sum::<usize>();
    let failed = counts.iter().map(|count| count.failed).sum::<usize>() + unreadable;
    if passed + failed == 0 && !engines.is_empty() {
        report.error("no case ran: all were skipped");
    }
    report.object(&json!({"passed": passed, "failed": failed, "skipped": skipped}))?;
    let skips = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    report.line(format!("{passed} passed, {failed} failed{skips}"))?;
    // It is a failure too if no case ran.
    Ok(if failed > 0 || passed == 0 { Outcome::Differs } else { Outcome::Right })
}

#[cfg(test)]
mod tests {
    use wgpu_attention::{Element, Error, Obstacle};

    use super::*;
    use crate::difference::{Rule, compare};

    fn case() -> Case {
        Case { name: "x".into(), calls: Vec::new(), notes: Vec::new() }
    }

    /// A comparison of `got` with 1, with a tolerance of 0.5.
    fn verdict(got: f32) -> Verdict {
        let difference = compare(&[got], &[1.0], |_| Rule { atol: 0.5, rtol: 0.0 }, |_| true);
        Verdict { name: "out".into(), difference }
    }

    #[test]
    fn a_case_is_counted_once_and_as_what_became_of_it() {
        let kernel = Error::Kernel { kernel: "matrix", why: Obstacle::NotF16 { element: Element::Bf16 } };
        let results = [
            (Ok(vec![verdict(1.25), verdict(1.0)]), [1, 0, 0]),
            (Ok(vec![verdict(1.0), verdict(2.0)]), [0, 1, 0]),
            (Ok(vec![verdict(f32::NAN), verdict(1.0)]), [0, 1, 0]),
            (Err(kernel), [0, 0, 1]),
            (Err(Error::Zero { field: "batch" }), [0, 1, 0]),
            (Err(Error::DeviceLost("gone".into())), [0, 1, 0]),
            (Err(Error::OutOfMemory("none".into())), [0, 1, 0]),
        ];
        let counted = |count: &Count| [count.passed, count.failed, count.refused()];
        let mut all = Count::default();
        for (result, want) in &results {
            let mut count = Count::default();
            count.add(&case(), result);
            assert_eq!(counted(&count), *want, "{result:?}");
            all.add(&case(), result);
        }
        assert_eq!(counted(&all), [1, 5, 1]);
        // Only the case that passed counts.
        assert_eq!((all.worst, all.worst_case.as_str()), (0.5, "x, out"));
    }
}
