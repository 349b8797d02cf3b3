//! Measures the ceilings of an adapter: the multiply-add rate and the copy bandwidth of plain shaders.

use wgpu_attention::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, Buffer, BufferDescriptor, BufferUsages, CommandEncoder,
    ComputePassDescriptor, ComputePipeline, ComputePipelineDescriptor, ErrorFilter, PipelineCompilationOptions,
    ShaderModule, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource,
};
use wgpu_attention::{Gpu, Result};

use crate::timer::{LEAST_MS, Timer};

/// Operations of one round of either multiply-add probe: 48 multiply-adds of 4 lanes.
const FLOPS_A_ROUND: f64 = 48.0 * 4.0 * 2.0;
/// Few dependent chains fit the registers of a CPU adapter, and many hide the latency of a GPU. The faster probe is the ceiling.
const MULTIPLY_ADD: [&str; 2] = ["few_chains", "many_chains"];
/// Workgroups of 64 invocations: enough to fill any GPU.
const GROUPS: u32 = 1024;
/// A measurement takes at least this long, so that the cost of a submission is negligible.
const LONG_MS: f64 = 20.0;
/// The most rounds. The shader's data holds their number as a float, which is exact up to here, and no GPU needs more.
const MOST_ROUNDS: u32 = 1 << 23;
/// Bytes to copy, or less if the device cannot bind as much. They exceed every cache.
const COPY_BYTES: u64 = 128 << 20;
/// Bytes that a workgroup of `copy` moves: 256 invocations of 4 vec4.
const GROUP_BYTES: u64 = 256 * 4 * 16;
const REPEATS: usize = 5;

/// What plain shaders reach on an adapter, in f32.
///
/// Measure them in the same run as what is compared with them: a busy machine or a hot card lowers both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Multiply-adds, in 10⁹ operations per second; a multiply-add counts as two.
    pub gflops: f64,
    /// Bytes read plus bytes written by a copy, in 10⁹ bytes per second.
    pub gbs: f64,
}

impl Ceilings {
    /// Runs both probes, which takes less than a second on most adapters.
    ///
    /// # Errors
    ///
    /// What the device reports.
    pub fn measure(gpu: &Gpu, timer: &Timer<'_>) -> Result<Self> {
        let device = gpu.device();
        // The error scope returns wgpu's errors; its default handler would panic.
        let scopes = [ErrorFilter::Validation, ErrorFilter::OutOfMemory].map(|filter| device.push_error_scope(filter));
        let measured = measure(gpu, timer);
        for scope in scopes.into_iter().rev() {
            if let Some(error) = pollster::block_on(scope.pop()) {
                return Err(error.into());
            }
        }
        measured
    }

    /// The rate in 10⁹ operations per second that the roofline model (Williams, Waterman and Patterson 2009) allows for work of
    /// `intensity` operations per byte of memory traffic.
    pub fn attainable(&self, intensity: f64) -> f64 {
        self.gflops.min(self.gbs * intensity)
    }
}

fn measure(gpu: &Gpu, timer: &Timer<'_>) -> Result<Ceilings> {
    let description = ShaderModuleDescriptor {
        label: Some("probe"),
        source: ShaderSource::Wgsl(include_str!("ceilings.wgsl").into()),
    };
    // SAFETY: every index of ceilings.wgsl is below the length of its buffer: `Probe::new` sizes both by the dispatch.
    let module = unsafe { gpu.device().create_shader_module_trusted(description, ShaderRuntimeChecks::unchecked()) };
    let [few, many] = MULTIPLY_ADD.map(|entry| multiply_add(gpu, timer, &module, entry));
    Ok(Ceilings { gflops: few?.max(many?), gbs: copy(gpu, timer, &module)? })
}

fn multiply_add(gpu: &Gpu, timer: &Timer<'_>, module: &ShaderModule, entry: &'static str) -> Result<f64> {
    let invocations = u64::from(GROUPS) * 64;
    let probe = Probe::new(gpu, module, entry, 48, invocations * 16, GROUPS);
    let mut rounds = 8;
    loop {
        let data = [[0.5f32; 4], [0.5; 4], [rounds as f32, 0.0, 0.0, 0.0]];
        gpu.queue().write_buffer(&probe.source, 0, bytemuck::cast_slice(&data));
        let ms = probe.best(timer, if rounds == 8 { 1 } else { 2 })?;
        if ms >= LONG_MS || rounds >= MOST_ROUNDS {
            let ms = ms.min(probe.best(timer, REPEATS)?);
            return Ok(invocations as f64 * f64::from(rounds) * FLOPS_A_ROUND / ms / 1e6);
        }
        // At most eight times as long as a short run, so that no dispatch runs into a watchdog.
        rounds = if ms * 8.0 < LONG_MS { rounds * 8 } else { rounds * 2 };
    }
}

fn copy(gpu: &Gpu, timer: &Timer<'_>, module: &ShaderModule) -> Result<f64> {
    let limits = gpu.device().limits();
    let most = COPY_BYTES.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size);
    let groups = (most / GROUP_BYTES).clamp(1, limits.max_compute_workgroups_per_dimension.into());
    let bytes = groups * GROUP_BYTES;
    let probe = Probe::new(gpu, module, "copy", bytes, bytes, groups as u32);
    probe.best(timer, 1)?;
    Ok(2.0 * bytes as f64 / probe.best(timer, REPEATS)? / 1e6)
}

/// One entry point with its buffers.
struct Probe {
    source: Buffer,
    pipeline: ComputePipeline,
    bindings: BindGroup,
    groups: u32,
}

impl Probe {
    fn new(gpu: &Gpu, module: &ShaderModule, entry: &'static str, source: u64, sink: u64, groups: u32) -> Self {
        let device = gpu.device();
        let pipeline = device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: Some(entry),
            layout: None,
            module,
            entry_point: Some(entry),
            compilation_options: PipelineCompilationOptions::default(),
            cache: None,
        });
        let buffer = |size| {
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
            device.create_buffer(&BufferDescriptor { label: Some(entry), size, usage, mapped_at_creation: false })
        };
        let (source, sink) = (buffer(source), buffer(sink));
        let bindings = device.create_bind_group(&BindGroupDescriptor {
            label: Some(entry),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[
                BindGroupEntry { binding: 0, resource: source.as_entire_binding() },
                BindGroupEntry { binding: 1, resource: sink.as_entire_binding() },
            ],
        });
        Probe { source, pipeline, bindings, groups }
    }

    fn record(&self, encoder: &mut CommandEncoder) {
        let mut pass =
            encoder.begin_compute_pass(&ComputePassDescriptor { label: Some("probe"), timestamp_writes: None });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        pass.dispatch_workgroups(self.groups, 1, 1);
    }

    /// Shortest time of some runs in milliseconds: a ceiling is a run that nothing disturbed.
    fn best(&self, timer: &Timer<'_>, runs: usize) -> Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..runs {
            best = best.min(timer.time(|encoder| {
                self.record(encoder);
                Ok(())
            })?);
        }
        // A clock that is too coarse may return 0; the rate must stay finite.
        Ok(best.max(LEAST_MS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roof_is_flat_right_of_the_ridge_and_falls_with_the_bandwidth_left_of_it() {
        let ceilings = Ceilings { gflops: 100.0, gbs: 10.0 };
        assert_eq!([1.0, 5.0, 10.0, 1e6].map(|x| ceilings.attainable(x)), [10.0, 50.0, 100.0, 100.0]);
    }
}
