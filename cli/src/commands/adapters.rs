//! `adapters`: lists the adapters.

use serde::Serialize;
use wgpu_attention::Gpu;
use wgpu_attention::internal::matrix_sizes;
use wgpu_attention::wgpu::{Adapter, Features};

use crate::Outcome;
use crate::engine::{self, Label};
use crate::error::Result;
use crate::report::Report;

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
}

impl Row {
    fn new(index: usize, adapter: &Adapter) -> Self {
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
        }
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

pub fn run(report: Report) -> Result<Outcome> {
    Gpu::check_environment()?;
    let rows: Vec<Row> = Gpu::adapters().iter().enumerate().map(|(index, adapter)| Row::new(index, adapter)).collect();
    for row in &rows {
        report.object(row)?;
    }
    if rows.is_empty() {
        report.note(format!("No GPU adapter was found.\n{}", engine::how_to_get_one()))?;
    } else {
        // Adapters are columns, because they have many properties.
        let columns: Vec<_> = rows.iter().map(Row::cells).collect();
        let line = |field: usize| {
            let values = columns.iter().map(|column| column[field].clone());
            std::iter::once(FIELDS[field].to_string()).chain(values).collect()
        };
        let lines: Vec<Vec<String>> = (0..FIELDS.len()).map(line).collect();
        let header: Vec<&str> = lines[0].iter().map(String::as_str).collect();
        report.table(&header, &lines[1..])?;
    }
    Ok(Outcome::Right)
}
