//! Compiled steps, and their recording into the caller's command encoder: no other file records dispatches.

use std::num::NonZero;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::contract::caps::UNIFORM_STRIDE;
use crate::contract::error::{Error, Result};
use crate::device::allocation::{allocate_at_once, constant};
use crate::device::pipelines::{Pipeline, Pipelines};
use crate::dispatch::label;
use crate::dispatch::step::Step;
use crate::kernel::slot::Slot;
use crate::trace::span;

/// Compiled steps and their uniforms: what every operation on the GPU records.
#[derive(Debug)]
pub(crate) struct Program {
    device: wgpu::Device,
    steps: Vec<(Step, Arc<Pipeline>)>,
    /// The name of each step, for debuggers. Names are made once: recording is where time counts.
    labels: Vec<String>,
    /// The name of a compute pass.
    pass: String,
    params: wgpu::Buffer,
}

impl Program {
    /// Compiles the pipelines that are not cached yet and writes the uniforms.
    pub(crate) async fn new(
        device: &wgpu::Device,
        pipelines: &Pipelines,
        operation: &str,
        steps: &[Step],
    ) -> Result<Self> {
        let mut compiled = Vec::with_capacity(steps.len());
        for step in steps {
            compiled.push((step.clone(), pipelines.get(&step.variant).await?));
        }
        let mut bytes = vec![0; steps.len().max(1) * UNIFORM_STRIDE as usize];
        for (place, step) in bytes.chunks_exact_mut(UNIFORM_STRIDE as usize).zip(steps) {
            let source = step.uniform.bytes();
            place[..source.len()].copy_from_slice(source);
        }
        let uniforms = format!("{operation}: uniforms");
        let params = constant(device, &uniforms, wgpu::BufferUsages::UNIFORM, &bytes).await?;
        let (labels, pass) = (label::labels(steps), label::pass(operation, steps));
        Ok(Program { device: device.clone(), steps: compiled, labels, pass, params })
    }

    pub(crate) fn steps(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().map(|(step, _)| step)
    }

    /// The name of each step.
    pub(crate) fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Records copies, and a range of the steps in one compute pass. `buffer` gives the buffer of a slot, and where the operand starts
    /// in it. Buffers of another device are an error, and then nothing is recorded.
    pub(crate) fn record<'a>(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffer: impl Fn(Slot) -> (&'a wgpu::Buffer, u64),
        copies: &[Copy<'_>],
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let span = span!("encode", pass = self.pass.as_str(), dispatches = steps.len());
        span.within(|| self.record_pass(steps, encoder, buffer, copies, timestamps))
    }

    fn record_pass<'a>(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffer: impl Fn(Slot) -> (&'a wgpu::Buffer, u64),
        copies: &[Copy<'_>],
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let bind = || {
            // An encoder says what is wrong with a copy when it is finished, and to its own device: this one is only for that.
            if !copies.is_empty() {
                let mut probe = self.device.create_command_encoder(&Default::default());
                copies.iter().for_each(|copy| copy.record(&mut probe));
                drop(probe.finish());
            }
            steps.clone().map(|i| self.bind(i, &buffer)).collect::<Vec<_>>()
        };
        let groups = attempt(&self.device, bind).map_err(|error| {
            let bound = self.steps[steps.clone()].iter().flat_map(|(step, _)| &step.bindings);
            let bound = bound.map(|bound| (bound.slot.name(), buffer(bound.slot).0));
            let copied = copies.iter().map(|copy| (copy.field, copy.from.buffer()));
            match copied.chain(bound).find(|(_, buffer)| attempt(&self.device, || touch(&self.device, buffer)).is_err())
            {
                Some((field, _)) => Error::OtherDevice { field },
                None => error,
            }
        })?;
        let record = || {
            copies.iter().for_each(|copy| copy.record(encoder));
            let label = Some(self.pass.as_str());
            let mut pass =
                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: timestamps });
            let labels = &self.labels[steps.clone()];
            for (((step, pipeline), group), label) in self.steps[steps].iter().zip(&groups).zip(labels) {
                let [x, y, z] = step.grid;
                pass.push_debug_group(label);
                pass.set_pipeline(&pipeline.compute);
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(x, y, z);
                pass.pop_debug_group();
            }
        };
        // No encoder tells its device. One of another instance of wgpu panics where it does not know this one's objects.
        catch_unwind(AssertUnwindSafe(record)).map_err(|_| Error::OtherDevice { field: "encoder" })
    }

    fn bind<'a>(&self, index: usize, buffer: &impl Fn(Slot) -> (&'a wgpu::Buffer, u64)) -> wgpu::BindGroup {
        let (step, pipeline) = &self.steps[index];
        let range = |buffer, offset, size| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: NonZero::new(size) })
        };
        let uniform = range(&self.params, index as u64 * UNIFORM_STRIDE, UNIFORM_STRIDE);
        let storage = step.bindings.iter().map(|bound| {
            let (buffer, start) = buffer(bound.slot);
            range(buffer, start + bound.offset, bound.size)
        });
        let entries: Vec<_> = std::iter::once(uniform)
            .chain(storage)
            .zip(0..)
            .map(|(resource, binding)| wgpu::BindGroupEntry { binding, resource })
            .collect();
        self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(&self.labels[index]),
            layout: &pipeline.layout,
            entries: &entries,
        })
    }
}

/// A copy of a small array into the lists.
pub(crate) struct Copy<'a> {
    pub(super) field: &'static str,
    pub(super) from: wgpu::BufferSlice<'a>,
    pub(super) to: &'a wgpu::Buffer,
    pub(super) place: u64,
    pub(super) size: u64,
}

impl Copy<'_> {
    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.copy_buffer_to_buffer(self.from.buffer(), self.from.offset(), self.to, self.place, self.size);
    }
}

/// Creates objects with buffers of the caller's. wgpu panics where one comes from another instance and it has none of that number.
fn attempt<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> Result<T> {
    let created = allocate_at_once(device, || catch_unwind(AssertUnwindSafe(create)))?;
    created.map_err(|_| Error::Validation("a buffer does not belong to the device".into()))
}

/// Uses a buffer alone, in the one way that wgpu checks at once.
fn touch(device: &wgpu::Device, buffer: &wgpu::Buffer) {
    if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
        let mut probe = device.create_command_encoder(&Default::default());
        let usage = wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
        probe.copy_buffer_to_buffer(buffer, 0, &device.create_buffer(&descriptor), 0, 4);
        drop(probe.finish());
        return;
    }
    let ty = wgpu::BufferBindingType::Storage { read_only: true };
    let entry = wgpu::BindGroupLayoutEntry {
        binding: 0,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &[entry] });
    let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset: 0, size: NonZero::new(4) });
    let entries = &[wgpu::BindGroupEntry { binding: 0, resource }];
    drop(device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries }));
}
