//! `adapters`: lists the adapters, and what trials showed of their drivers.

use clap::Args;
use serde::Serialize;
use wgpu_attention::internal::matrix_sizes;
use wgpu_attention::proof::{Failure, Proof, Trial};
use wgpu_attention::wgpu::{Adapter, Features};
use wgpu_attention::{Gpu, Kernel};

use crate::Outcome;
use crate::engine::{self, DeviceArgs, Label};
use crate::error::Result;
use crate::report::Report;
use crate::store;

/// Arguments of `adapters`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Try every kernel on every adapter: small problems whose results are known. A driver that computes on the CPU may compile for a
    /// minute
    #[arg(long)]
    prove: bool,
}

#[derive(Serialize)]
struct Row {
    index: usize,
    #[serde(flatten)]
    label: Label,
    device_type: String,
    f16: bool,
    int64: bool,
    /// Smallest and largest subgroup size; `None` where shaders cannot use subgroups.
    subgroups: Option<[u32; 2]>,
    /// Sizes of cooperative matrices (f16 operands, f32 sums); rows, columns and summed axis have the same size.
    matrices: Vec<u32>,
    timestamps: bool,
    storage_buffers_per_stage: u32,
    storage_binding_bytes: u64,
    workgroup_bytes: u32,
    workgroup_invocations: u32,
    /// What trials showed of the driver.
    proof: Proof,
}

impl Row {
    fn new(index: usize, adapter: &Adapter, proof: Proof) -> Self {
        let (info, features, limits) = (adapter.get_info(), adapter.features(), adapter.limits());
        Row {
            index,
            label: Label::of(&info),
            device_type: format!("{:?}", info.device_type),
            f16: features.contains(Features::SHADER_F16),
            int64: features.contains(Features::SHADER_INT64),
            subgroups: features
                .contains(Features::SUBGROUP)
                .then_some([info.subgroup_min_size, info.subgroup_max_size]),
            matrices: matrix_sizes(adapter),
            timestamps: features.contains(Features::TIMESTAMP_QUERY_INSIDE_ENCODERS),
            storage_buffers_per_stage: limits.max_storage_buffers_per_shader_stage,
            storage_binding_bytes: limits.max_storage_buffer_binding_size,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            proof,
        }
    }

    /// How the trials of a kernel ended.
    fn trials(&self, kernel: Kernel) -> String {
        let of = |trials: &[Trial]| trials.iter().filter(|trial| trial.kernel == kernel).count();
        let failed = |failure: &&Failure| matches!(failure, Failure::Kernel { trial, .. } if trial.kernel == kernel);
        let wrong = self.proof.failures.iter().filter(failed).count();
        let counts = [(of(&self.proof.right), "right"), (wrong, "wrong"), (of(&self.proof.unable), "cannot run")];
        let said: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if said.is_empty() { "not tried".into() } else { said.join(", ") }
    }

    fn cells(&self) -> Vec<String> {
        let yes = |x: bool| if x { "yes" } else { "no" }.to_string();
        let subgroups = self
            .subgroups
            .map_or("no".into(), |[min, max]| if min == max { min.to_string() } else { format!("{min}..{max}") });
        let matrices: Vec<_> = self.matrices.iter().map(|size| format!("{size}×{size}")).collect();
        vec![
            self.index.to_string(),
            self.label.adapter.clone(),
            self.label.backend.clone(),
            self.label.driver.clone(),
            self.device_type.clone(),
            yes(self.f16),
            yes(self.int64),
            subgroups,
            if matrices.is_empty() { "no".into() } else { matrices.join(", ") },
            yes(self.timestamps),
            self.storage_buffers_per_stage.to_string(),
            format!("{} MiB", self.storage_binding_bytes >> 20),
            self.workgroup_bytes.to_string(),
            self.workgroup_invocations.to_string(),
        ]
    }
}

const FIELDS: [&str; 14] = [
    "",
    "name",
    "backend",
    "driver",
    "type",
    "f16",
    "64-bit integers",
    "subgroup size",
    "matrices, f16 to f32",
    "timestamps",
    "storage buffers per stage",
    "storage buffer binding",
    "workgroup memory, bytes",
    "workgroup invocations",
];

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    Gpu::check_environment()?;
    let adapters = Gpu::adapters();
    let rows = adapters.iter().enumerate().map(|(index, adapter)| {
        let proof = match arguments.prove {
            true => engine::open(adapter, &DeviceArgs::default())?.prove()?,
            false => store::proof(&adapter.get_info()),
        };
        Ok(Row::new(index, adapter, proof))
    });
    let rows = rows.collect::<Result<Vec<Row>>>()?;
    for row in &rows {
        report.object(row)?;
    }
    if rows.is_empty() {
        report.note(format!("No GPU adapter was found.\n{}", engine::how_to_get_one()))?;
        return Ok(Outcome::Right);
    }
    // Adapters are columns, because they have many properties.
    let columns: Vec<_> = rows.iter().map(Row::cells).collect();
    let line = |field: usize| {
        let values = columns.iter().map(|column| column[field].clone());
        std::iter::once(FIELDS[field].to_string()).chain(values).collect()
    };
    let mut lines: Vec<Vec<String>> = (0..FIELDS.len()).map(line).collect();
    lines.extend(Kernel::ALL.map(|kernel| {
        let cells = rows.iter().map(|row| row.trials(kernel));
        std::iter::once(format!("trials of {kernel}")).chain(cells).collect()
    }));
    let header: Vec<&str> = lines[0].iter().map(String::as_str).collect();
    report.table(&header, &lines[1..])?;
    for (row, failure) in rows.iter().flat_map(|row| row.proof.failures.iter().map(move |failure| (row, failure))) {
        report.line(format!("{} {} failed its proof: {failure}", row.index, row.label))?;
    }
    if rows.iter().all(|row| row.proof == Proof::default()) {
        report.note("No kernel was tried on these drivers yet; `wgpu-attention adapters --prove` tries all.")?;
    }
    let wrong = arguments.prove && rows.iter().any(|row| !row.proof.failures.is_empty());
    Ok(if wrong { Outcome::Differs } else { Outcome::Right })
}
