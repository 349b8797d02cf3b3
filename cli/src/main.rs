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
mod json;
mod memory;
mod operands;
mod options;
mod oracle;
mod problem;
mod report;
mod request;
mod sample;
mod store;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use wgpu_attention::Gpu;

use commands::{adapters, bench, cases as case_files, check, heatmap, plan, run, tune};
use error::{Error, Result};
use report::{Color, Report};

/// Attention on any GPU: checks, benchmarks and runs it on every adapter of this machine.
#[derive(Parser)]
#[command(name = "wgpu-attention", version, after_help = EXAMPLES)]
struct Arguments {
    /// One JSON object a line instead of tables
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,
    /// Colours of tables
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Output")]
    color: Color,
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    check: check::Arguments,
}

const EXAMPLES: &str = "\
Examples:
  wgpu-attention                                     check every adapter
  wgpu-attention run --shape 1,8,8,77,77,64 --compare
  wgpu-attention bench --shape 1,8,8,1024,1024,64 --causal top-left
  wgpu-attention bench --report bench.html           a page with charts
  wgpu-attention plan --shape 1,32,8,1,4096,128      which kernels, and why";

#[derive(Subcommand)]
enum Command {
    /// Compare every adapter and the CPU path with the f64 reference (what happens without a subcommand)
    Check(check::Arguments),
    /// List the adapters with the features and limits that matter here, and what trials showed of their drivers
    Adapters(adapters::Arguments),
    /// Run attention on the tensors of a safetensors file, or on made-up ones
    #[command(after_help = "\
Examples:
  wgpu-attention run --input qkv.safetensors --output out.safetensors --causal top-left
  wgpu-attention run --shape 2,8,2,1,4096,128 --page-size 16 --compare
  wgpu-attention run --shape 1,8,8,77,77,64 --softcap 30 --save-problem problem.json
  wgpu-attention run --problem problem.json --kernel flash --compare")]
    Run(run::Arguments),
    /// Draw attention weights, heads side by side, tokens on the axes
    #[command(after_help = "\
Examples:
  wgpu-attention heatmap --input weights.safetensors --output heads.svg
  wgpu-attention heatmap --input qkv.safetensors --output page.html --tokens words.txt")]
    Heatmap(heatmap::Arguments),
    /// Run case files: what other implementations computed
    #[command(after_help = "\
Examples:
  wgpu-attention cases tests/cases/*/
  wgpu-attention cases --kernel flash --adapter vulkan: tests/cases/onnx_attention")]
    Cases(case_files::Arguments),
    /// Time problems beside the adapter's own ceilings
    #[command(after_help = "\
Examples:
  wgpu-attention bench --shape 1,8,8,1024,1024,64 --causal top-left --alibi
  wgpu-attention bench --report bench.html --shape 1,8,8,512,512,64 --shape 1,8,8,1024,1024,64
  wgpu-attention bench --json > old.jsonl
  wgpu-attention bench --compare old.jsonl")]
    Bench(bench::Arguments),
    /// Print which kernels would run for a problem, in which order, and why
    #[command(after_help = "\
Examples:
  wgpu-attention plan --shape 1,32,8,1,8192,128 --dtype f16
  wgpu-attention plan --shape 1,8,8,1024,1024,64 --alibi --save plan.json
  wgpu-attention plan --read plan.json")]
    Plan(plan::Arguments),
    /// Measure which kernel and tile is fastest on an adapter, and keep that for later plans
    #[command(after_help = "\
Examples:
  wgpu-attention tune
  wgpu-attention tune --shape 1,32,8,1,8192,128 --dtype f16 --seconds 300")]
    Tune(tune::Arguments),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Write the manual pages, one for each command, to a folder
    Man { folder: PathBuf },
}

/// Writes the completion script to standard output.
fn complete(shell: clap_complete::Shell) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "wgpu-attention", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(Outcome::Right)
}

/// Writes the manual pages.
fn man(folder: &Path, report: Report) -> Result<Outcome> {
    let file = |source| Error::File { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(file)?;
    clap_mangen::generate_to(Arguments::command(), folder).map_err(file)?;
    report.line(format!(
        "manual pages are in {}; read one with man {}/wgpu-attention.1",
        folder.display(),
        folder.display()
    ))?;
    Ok(Outcome::Right)
}

/// Whether everything was as it should be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Right,
    Differs,
}

/// Gives EGL a folder for run-time files where the session has none: Mesa complains on standard error otherwise, and uses none.
fn quiet_egl() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the program has one thread yet, so that nothing reads the environment at the same time.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
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
    quiet_egl();
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
    arguments.color.apply();
    let report = Report { json: arguments.json };
    if arguments.command.is_some() && arguments.check != check::Arguments::default() {
        // Only --json may come before a subcommand. All other options there belong to `check`, which runs without a subcommand.
        report.error("options of a subcommand must come after it");
        return ExitCode::from(2);
    }
    let outcome = match &arguments.command {
        None => check::run(&arguments.check, report),
        Some(Command::Check(arguments)) => check::run(arguments, report),
        Some(Command::Adapters(arguments)) => adapters::run(arguments, report),
        Some(Command::Run(arguments)) => run::run(arguments, report),
        Some(Command::Heatmap(arguments)) => heatmap::run(arguments, report),
        Some(Command::Cases(arguments)) => case_files::run(arguments, report),
        Some(Command::Bench(arguments)) => bench::run(arguments, report),
        Some(Command::Plan(arguments)) => plan::run(arguments, report),
        Some(Command::Tune(arguments)) => tune::run(arguments, report),
        Some(Command::Completions { shell }) => complete(*shell),
        Some(Command::Man { folder }) => man(folder, report),
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
