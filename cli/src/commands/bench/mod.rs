//! `bench`: times problems, and plain shaders on the same adapter in the same run; compares measurements, and makes a page of them.

use std::path::PathBuf;

use clap::Args;
use wgpu_attention_heatmap::replace;

use crate::Outcome;
use crate::engine::{DeviceArgs, KernelArgs};
use crate::error::{Error, Result};
use crate::problem::{MADE, ProblemArgs, STORED};
use crate::report::Report;

mod canvas;
mod charts;
mod compare;
mod measure;
mod output;
mod page;
mod record;
mod subject;

use output::Format;
use record::Record;
pub use subject::{Subject, must_have_work};

#[derive(Args, Debug)]
pub struct Arguments {
    #[command(flatten)]
    problem: ProblemArgs,
    /// Timed runs after the first (default: as many as fit in two seconds, 5 to 50)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Timing")]
    repeats: Option<u32>,
    /// Time by the wall clock around submission and wait even where the device has timestamps, to compare with programs without them
    #[arg(long, help_heading = "Timing")]
    wall_clock: bool,
    /// Time every kernel that can run, beside the planner's choice; --report does this too unless a kernel is forced
    #[arg(long, conflicts_with_all = ["kernel", "form"], help_heading = "Kernel")]
    all_kernels: bool,
    /// Adapter: index, part of its name, or backend:part (repeatable; default all)
    #[arg(long, help_heading = "Adapter")]
    adapter: Vec<String>,
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    results: ResultArgs,
}

/// What becomes of the measurements.
#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
struct ResultArgs {
    /// How measurements are written to standard output (default: table, or jsonl with --json)
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Write a page with charts to this file, .html
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Put the measurements beside those of this file, which `bench --json` wrote, and say which differences are real
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Measure nothing: take the measurements of this file, which `bench --json` wrote
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = MADE,
        conflicts_with_all = STORED,
        conflicts_with_all = [
            "TermArgs", "KernelArgs", "DeviceArgs", "repeats", "wall_clock", "all_kernels", "adapter",
        ]
    )]
    from: Option<PathBuf>,
}

impl ResultArgs {
    fn format(&self, json: bool) -> Result<Format> {
        match (self.format, json) {
            (None, false) => Ok(Format::Table),
            (None | Some(Format::Jsonl), true) => Ok(Format::Jsonl),
            (Some(format), false) => Ok(format),
            (Some(format), true) => Err(Error::TwoFormats { format: format!("{format:?}").to_lowercase() }),
        }
    }
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let results = &arguments.results;
    let format = results.format(report.json)?;
    let report = Report { json: format == Format::Jsonl };
    let old = results.compare.as_deref().map(record::read).transpose()?;
    let old = old.as_deref();
    let (records, outcome) = match &results.from {
        Some(path) => {
            let records = record::read(path)?;
            output::write(&output::text(format, &records, old)?)?;
            (records, Outcome::Right)
        }
        None => measured(arguments, report, format, old)?,
    };
    match &results.report {
        Some(path) if !records.is_empty() => {
            let page = page::page(&records, old)?;
            replace(path, page.as_bytes()).map_err(|source| Error::File { path: path.clone(), source })?;
        }
        _ => (),
    }
    Ok(outcome)
}

fn measured(
    arguments: &Arguments,
    report: Report,
    format: Format,
    old: Option<&[Record]>,
) -> Result<(Vec<Record>, Outcome)> {
    // Lines of JSON are written as soon as they are known, the other formats when all is measured.
    let mut each = |record: &Record| match format {
        Format::Jsonl => output::write(&format!("{}\n", output::line(record, old)?)),
        _ => Ok(()),
    };
    let measured = measure::measure(arguments, report, &mut each)?;
    if format != Format::Jsonl && !measured.records.is_empty() {
        output::write(&output::text(format, &measured.records, old)?)?;
    }
    if format == Format::Table {
        for remark in &measured.remarks {
            report.line(remark)?;
        }
    }
    Ok((measured.records, measured.outcome))
}
