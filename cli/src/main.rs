//! Command line of `wgpu-attention`: check, bench and run attention on every GPU adapter of the machine.
//!
//! Exit codes: 0 when all is well, 1 when a result differs from what it should be, 2 for usage and input errors.

mod archive;
mod cases;
mod commands;
mod difference;
mod engine;
mod error;
mod floats;
mod memory;
mod operands;
mod options;
mod oracle;
mod probe;
mod problem;
mod report;
mod request;
mod sample;
mod store;
mod timer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use wgpu_attention::Gpu;

use commands::{adapters, bench, cases as case_files, check, heatmap, plan, run, tune};
use error::Error;
use report::Report;

/// Attention on any GPU: checks, benchmarks and runs it on every adapter of this machine.
#[derive(Parser)]
#[command(name = "wgpu-attention", version)]
struct Arguments {
    /// One JSON object a line instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    check: check::Arguments,
}

#[derive(Subcommand)]
enum Command {
    /// Compare every adapter and the CPU path with the f64 reference (what happens without a subcommand)
    Check(check::Arguments),
    /// List the adapters with the features and limits that matter here
    Adapters,
    /// Run attention on the tensors of a safetensors file
    Run(run::Arguments),
    /// Draw attention weights, heads side by side, tokens on the axes
    Heatmap(heatmap::Arguments),
    /// Run case files: what other implementations computed
    Cases(case_files::Arguments),
    /// Time problems beside the adapter's own ceilings
    Bench(bench::Arguments),
    /// Print which kernels would run for a problem, in which order, and why
    Plan(plan::Arguments),
    /// Measure which kernel and tile is fastest on an adapter, and keep that for later plans
    Tune(tune::Arguments),
}

/// Whether everything was as it should be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Right,
    Differs,
}

/// Writes spans and events to standard error where `RUST_LOG` asks for them, as `RUST_LOG=wgpu_attention=debug` does.
fn trace() {
    let Ok(filter) = std::env::var("RUST_LOG") else { return };
    match filter.parse::<Targets>() {
        Ok(targets) => {
            let lines = fmt::layer().with_writer(std::io::stderr).with_span_events(FmtSpan::CLOSE);
            tracing_subscriber::registry().with(lines).with(targets).init();
        }
        Err(error) => report::warn(format!("RUST_LOG: ignored: {error}")),
    }
}

fn main() -> ExitCode {
    trace();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // The arguments could not be parsed, so this searches them for the option.
            if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
                Report { json: true }.error(error.to_string().trim_start_matches("error: ").trim_end());
                return ExitCode::from(2);
            }
            error.exit();
        }
    };
    let report = Report { json: arguments.json };
    if arguments.command.is_some() && arguments.check != check::Arguments::default() {
        // Only --json may come before a subcommand. All other options there belong to `check`, which runs without a subcommand.
        report.error("options of a subcommand must come after it");
        return ExitCode::from(2);
    }
    let outcome = match &arguments.command {
        None => check::run(&arguments.check, report),
        Some(Command::Check(arguments)) => check::run(arguments, report),
        Some(Command::Adapters) => adapters::run(report),
        Some(Command::Run(arguments)) => run::run(arguments, report),
        Some(Command::Heatmap(arguments)) => heatmap::run(arguments, report),
        Some(Command::Cases(arguments)) => case_files::run(arguments, report),
        Some(Command::Bench(arguments)) => bench::run(arguments, report),
        Some(Command::Plan(arguments)) => plan::run(arguments, report),
        Some(Command::Tune(arguments)) => tune::run(arguments, report),
    };
    match outcome {
        Ok(Outcome::Right) => ExitCode::SUCCESS,
        Ok(Outcome::Differs) => ExitCode::from(1),
        // The program that reads the output has closed it, as in `… | head`.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error @ Error::Attention(wgpu_attention::Error::NoAdapter { .. })) => {
            let mut text = error.to_string();
            if Gpu::adapters().is_empty() {
                text += &format!("\n{}", engine::how_to_get_one());
            }
            if matches!(arguments.command, Some(Command::Run(_) | Command::Heatmap(_))) {
                text += "\n--cpu computes on the CPU reference instead.";
            }
            report.error(text);
            ExitCode::from(2)
        }
        Err(error) => {
            report.error(error);
            ExitCode::from(2)
        }
    }
}
