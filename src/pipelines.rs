//! Compiles and caches pipelines: the only file that does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::kernel::Variant;
use crate::{Error, Result, shader};

/// A compiled variant and the layout of its bind group.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) compute: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// Pipelines of one device, each compiled at its first use.
#[derive(Debug)]
pub(crate) struct Pipelines {
    device: wgpu::Device,
    checked: bool,
    compiled: Mutex<HashMap<Variant, Arc<Pipeline>>>,
}

impl Pipelines {
    pub(crate) fn new(device: &wgpu::Device, checked: bool) -> Self {
        Pipelines { device: device.clone(), checked, compiled: Mutex::default() }
    }

    pub(crate) fn get(&self, variant: &Variant) -> Result<Arc<Pipeline>> {
        let mut compiled = self.compiled.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(pipeline) = compiled.get(variant) {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(self.compile(variant)?);
        compiled.insert(*variant, pipeline.clone());
        Ok(pipeline)
    }

    fn compile(&self, variant: &Variant) -> Result<Pipeline> {
        let label = variant.to_string();
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(shader::render(variant).into()),
        };
        let module = if self.checked {
            self.device.create_shader_module(descriptor)
        } else {
            // SAFETY: every index that the shaders form is inside its binding: the plan binds the whole span of each operand
            // (tests/plan), rows, keys and dims are clamped to it in the shader, lengths from the GPU too
            // (shared/visible.wgsl), and loops end. The whole suite also runs with checks on.
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let storage =
            variant.bindings().into_iter().map(|(_, written)| wgpu::BufferBindingType::Storage { read_only: !written });
        let entries: Vec<_> = std::iter::once(wgpu::BufferBindingType::Uniform)
            .chain(storage)
            .zip(0..)
            .map(|(ty, binding)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
                count: None,
            })
            .collect();
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
        let compute = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(&label),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            })),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        // Error scopes resolve at once on native backends.
        let errors = [internal, validation, memory].map(|scope| pollster::block_on(scope.pop()));
        match errors.into_iter().flatten().next() {
            None => Ok(Pipeline { compute, layout }),
            Some(error @ wgpu::Error::OutOfMemory { .. }) => Err(error.into()),
            Some(error) => Err(Error::Pipeline { variant: label, message: error.to_string() }),
        }
    }
}
