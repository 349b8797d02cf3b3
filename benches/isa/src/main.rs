//! Compiles every shader variant meant for GPUs by the Vulkan driver's own compiler and prints what it made of it: registers,
//! spills, workgroup memory, occupancy. Nothing runs, so RADV's null device will do: AMD's compiler on a machine without a GPU
//! (`benches/isa/run`). Ends with 1 if a variant spills vector registers, is not compiled, or takes other workgroup memory than
//! stated. From the records of such runs it writes the table of `docs/book/src/gpu-kernels.md`.

mod compiler;
mod numbers;
#[cfg(test)]
mod work;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use comfy_table::{Table, presets};
use rayon::prelude::*;
use serde::Serialize;
use wgpu_attention::internal::kernel::Variant;

use compiler::{Compiler, Statistics};

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Write one JSON object a variant to this file
    #[arg(long)]
    record: Option<PathBuf>,
    /// Only variants whose name has this part
    #[arg(long, default_value = "")]
    only: String,
    /// No table, only the summary and what is wrong
    #[arg(long)]
    quiet: bool,
    /// Compile nothing: print loads, barriers and bounds of each kernel, with registers and occupancy from these records
    #[arg(long, num_args = 1.., value_name = "RECORD", conflicts_with_all = ["record", "only", "quiet"])]
    numbers: Vec<PathBuf>,
}

/// A row of the record.
#[derive(Serialize)]
struct Row {
    adapter: String,
    driver: String,
    variant: String,
    threads: u32,
    #[serde(flatten)]
    statistics: Statistics,
}

/// Whether the planner has this variant run on GPUs: the others are for adapters that compute on the CPU.
fn for_gpus(variant: &Variant) -> bool {
    match variant {
        Variant::ScoresLanes(_) | Variant::ValuesLanes(_) | Variant::ProjectLanes(_) | Variant::Rows(_) => false,
        // Emulated matrices are for tests.
        Variant::Matrix(x) => !x.emulated,
        Variant::Split(x) => !x.tile.wide(),
        _ => true,
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool, Box<dyn std::error::Error>> {
    if !arguments.numbers.is_empty() {
        io::stdout().lock().write_all(numbers::document(&arguments.numbers)?.as_bytes())?;
        return Ok(true);
    }
    let compiler = Compiler::new()?;
    let asked = |variant: &Variant| for_gpus(variant) && variant.to_string().contains(&arguments.only);
    let asked: Vec<Variant> = Variant::all().into_iter().filter(asked).collect();
    if asked.is_empty() {
        return Err(format!("no variant for GPUs has {:?} in its name", arguments.only).into());
    }
    let (variants, left_out): (Vec<_>, Vec<_>) = asked.into_iter().partition(|variant| compiler.has_matrices(variant));
    let compiled: Vec<_> = variants.par_iter().map(|variant| compiler.compile(variant)).collect();

    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let unit = ["", "", "", "", "SGPR VGPR", "bytes", "bytes", "bytes", "a SIMD", ""];
    let head = [
        "variant",
        "subgroup",
        "SGPRs",
        "VGPRs",
        "spilled",
        "scratch",
        "workgroup",
        "code",
        "subgroups",
        "instructions",
    ];
    table.set_header(head.iter().zip(unit).map(|(name, unit)| format!("{name}\n{unit}")));
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (variant, result) in variants.iter().zip(compiled) {
        let statistics = match result {
            Ok(statistics) => statistics,
            Err(error) => {
                wrong.push(format!("{variant}: {error}"));
                continue;
            }
        };
        wrong.extend(
            statistics.faults(variant.workgroup_bytes()).into_iter().map(|fault| format!("{variant}: {fault}")),
        );
        let name = variant.to_string();
        table.add_row(std::iter::once(name.clone()).chain(statistics.cells()));
        let (adapter, driver) = (compiler.adapter.clone(), compiler.driver.clone());
        rows.push(Row { adapter, driver, variant: name, threads: variant.threads(), statistics });
    }
    let mut out = io::stdout().lock();
    if !arguments.quiet {
        writeln!(out, "{}", table.trim_fmt())?;
    }
    writeln!(out, "{}, {}: {} variants", compiler.adapter, compiler.driver, variants.len())?;
    if !left_out.is_empty() {
        let mut sizes: Vec<_> = left_out.iter().filter_map(|variant| variant.needs().matrices).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let sizes = sizes.iter().map(|size| format!("{size}×{size}")).collect::<Vec<_>>().join(" and ");
        writeln!(out, "{} left out: this driver has no cooperative matrices of {sizes}", left_out.len())?;
    }
    let scalar = rows.iter().filter(|row| row.statistics.spilled_sgprs > 0).count();
    writeln!(out, "{scalar} keep scalar registers in lanes of vector registers; {} faults", wrong.len())?;
    for fault in &wrong {
        writeln!(out, "WRONG {fault}")?;
    }
    if let Some(path) = &arguments.record {
        let lines = rows.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, lines.join("\n") + "\n")?;
    }
    Ok(wrong.is_empty())
}
