//! Compiles and caches pipelines. No other file does.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::FutureExt;
use futures::future::Shared;

use crate::contract::error::{Error, Result};
use crate::device::allocation::{ErrorScopes, allocate_at_once};
use crate::device::lock;
use crate::kernel::Variant;
use crate::trace::{pipeline_cache_ignored, span};

/// A compiled variant and the layout of its bind group.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) compute: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// A pipeline that wgpu creates, with what it finds wrong.
#[cfg(not(target_arch = "wasm32"))]
type Compilation = Pin<Box<dyn Future<Output = Result<Arc<Pipeline>>> + Send>>;
#[cfg(target_arch = "wasm32")]
type Compilation = Pin<Box<dyn Future<Output = Result<Arc<Pipeline>>>>>;

type Compilations = HashMap<Variant, Shared<Compilation>>;

/// Makes another text of that of a variant's shader.
pub(crate) type Edit = fn(&Variant, String) -> String;

/// Pipelines of one device, each compiled at its first use.
#[derive(Debug)]
pub(crate) struct Pipelines {
    device: wgpu::Device,
    checked: bool,
    /// Changes the text of each shader: tests break shaders with it.
    pub(crate) edit: Option<Edit>,
    /// Shared, so that calls at the same time compile a variant once, and any of them that is polled drives it.
    compiled: Mutex<Compilations>,
    /// The backend's cache of compiled pipelines, if it has one.
    cache: Option<wgpu::PipelineCache>,
}

impl Pipelines {
    pub(crate) fn new(device: &wgpu::Device, checked: bool) -> Self {
        // SAFETY: there is no data that could be wrong.
        let cache = unsafe { create_cache(device, None) };
        Pipelines { device: device.clone(), checked, edit: None, compiled: Mutex::default(), cache }
    }

    /// Starts from data that [`Pipelines::data`] returned earlier. Returns whether the backend accepted the data; if it did not,
    /// everything is compiled again.
    ///
    /// # Safety
    ///
    /// `data` must come from [`Pipelines::data`], or have a wrong checksum.
    pub(crate) unsafe fn load(&mut self, data: &[u8]) -> bool {
        let Some((_, data)) = data.split_first_chunk().filter(|(sum, data)| **sum == checksum(data)) else {
            pipeline_cache_ignored("its data is damaged");
            return false;
        };
        // SAFETY: the caller promises that the data comes from wgpu; the checksum shows that storage did not alter it.
        let Some(cache) = (unsafe { create_cache(&self.device, Some(data)) }) else {
            pipeline_cache_ignored("the device has none, or its data is of another adapter or driver");
            return false;
        };
        self.cache = Some(cache);
        true
    }

    /// Data that a later process can start from, with a checksum before it.
    pub(crate) fn data(&self) -> Option<Vec<u8>> {
        let data = self.cache.as_ref()?.get_data()?;
        Some([&checksum(&data)[..], &data].concat())
    }

    /// The number of compiled variants.
    pub(crate) fn count(&self) -> usize {
        self.lock().values().filter(|compilation| matches!(compilation.peek(), Some(Ok(_)))).count()
    }

    pub(crate) async fn get(&self, variant: &Variant) -> Result<Arc<Pipeline>> {
        let compilation = self.compilation(variant);
        compilation.await
    }

    /// The compilation that an earlier call began, or a new one if there is none, or if that one failed.
    fn compilation(&self, variant: &Variant) -> Shared<Compilation> {
        let mut compiled = self.lock();
        match compiled.get(variant) {
            Some(begun) if !matches!(begun.peek(), Some(Err(_))) => begun.clone(),
            _ => {
                let begun = self.compile(variant).shared();
                compiled.insert(*variant, begun.clone());
                begun
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Compilations> {
        lock(&self.compiled)
    }

    /// Compiles at the call on native backends, which takes this thread: wgpu has no other way there.
    fn compile(&self, variant: &Variant) -> Compilation {
        let span = span!("pipeline", variant = %variant, milliseconds = tracing::field::Empty);
        let created = span.within(|| self.create(variant));
        Box::pin(async move {
            let created = created.await;
            span.time();
            created
        })
    }

    /// Creates a pipeline at the call. The future gives what wgpu finds wrong with it.
    fn create(&self, variant: &Variant) -> impl Future<Output = Result<Arc<Pipeline>>> + use<> {
        let label = variant.to_string();
        let scopes = ErrorScopes::open(&self.device);
        let mut text = variant.wgsl();
        if let Some(edit) = self.edit {
            text = edit(variant, text);
        }
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(text.into()) };
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
            cache: self.cache.as_ref(),
        });
        let closed = scopes.close();
        async move {
            match closed.await {
                Ok(()) => Ok(Arc::new(Pipeline { compute, layout })),
                Err(error @ wgpu::Error::OutOfMemory { .. }) => Err(error.into()),
                Err(error) => Err(Error::Pipeline { variant: label, message: error.to_string() }),
            }
        }
    }
}

/// Bytes of the checksum before the data of a pipeline cache. wgpu checks which adapter and driver the data is for, but not whether it is
/// complete.
const CHECKSUM: usize = 4;

/// The CRC-32 of zip files, which is the same in every build of this crate. It detects damage, not forgery.
fn checksum(data: &[u8]) -> [u8; CHECKSUM] {
    crc32fast::hash(data).to_le_bytes()
}

/// A pipeline cache; `None` if the device has none, or if it does not accept the data.
///
/// # Safety
///
/// `data` must come from [`wgpu::PipelineCache::get_data`].
unsafe fn create_cache(device: &wgpu::Device, data: Option<&[u8]>) -> Option<wgpu::PipelineCache> {
    if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
        return None;
    }
    // Without a fallback, data of another adapter or driver is an error, so that the caller knows.
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("attention"), data, fallback: false };
    // SAFETY: passed on to the caller.
    allocate_at_once(device, || unsafe { device.create_pipeline_cache(&descriptor) }).ok()
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn the_checksum_of_a_stored_pipeline_cache_never_changes() {
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(checksum(b"123456789"), [0x26, 0x39, 0xf4, 0xcb]);
        assert_eq!(checksum(&[]), [0; 4]);
    }
}
