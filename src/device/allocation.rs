//! Objects on a device, and what wgpu finds wrong with them. No other file opens error scopes.

use futures::FutureExt;

use crate::contract::error::{Error, Result};

/// Open error scopes of one thread, for all kinds of errors. Fields are dropped in this order, the scope that was opened last first.
pub(crate) struct ErrorScopes {
    validation: wgpu::ErrorScopeGuard,
    internal: wgpu::ErrorScopeGuard,
    memory: wgpu::ErrorScopeGuard,
}

impl ErrorScopes {
    pub(crate) fn open(device: &wgpu::Device) -> Self {
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        ErrorScopes { validation, internal, memory }
    }

    /// Closes the scopes at the call, not when the future is polled: wgpu keeps scopes per thread, and the future may be polled on another
    /// one. The future gives the first error; on native backends it is ready at once.
    pub(crate) fn close(self) -> impl Future<Output = Result<(), wgpu::Error>> {
        let (validation, internal) = (self.validation.pop(), self.internal.pop());
        let memory = self.memory.pop();
        async move {
            // An object that there was no memory for is invalid, so that later errors follow from the first one.
            let errors = [memory.await, internal.await, validation.await];
            errors.into_iter().flatten().next().map_or(Ok(()), Err)
        }
    }
}

/// Creates objects at the call, not when the future is polled. The future gives them, or what wgpu found wrong with them: out of memory,
/// most likely.
pub(crate) fn allocate<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> impl Future<Output = Result<T>> {
    let scopes = ErrorScopes::open(device);
    let created = create();
    let closed = scopes.close();
    async move {
        closed.await?;
        Ok(created)
    }
}

/// The same for functions that record commands, which wait for nothing. Native backends answer at once. A browser answers later, and
/// gives the error to the device's handler of uncaptured errors.
pub(crate) fn allocate_at_once<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> Result<T> {
    if cfg!(target_arch = "wasm32") {
        return Ok(create());
    }
    allocate(device, create).now_or_never().expect("native backends answer at once")
}

/// A buffer that holds these bytes, a multiple of four, and never changes.
pub(crate) async fn constant(
    device: &wgpu::Device,
    label: &str,
    usage: wgpu::BufferUsages,
    bytes: &[u8],
) -> Result<wgpu::Buffer> {
    let descriptor =
        wgpu::BufferDescriptor { label: Some(label), size: bytes.len() as u64, usage, mapped_at_creation: true };
    let buffer = allocate(device, || device.create_buffer(&descriptor)).await?;
    // wgpu tells only the device's owner of a loss, and calls what is made afterwards invalid, without an error.
    let lost = |_| Error::DeviceLost(format!("the buffer {label:?} cannot be made on it any more"));
    buffer.get_mapped_range_mut(..).map_err(lost)?.copy_from_slice(bytes);
    buffer.unmap();
    Ok(buffer)
}

/// A storage buffer with these bytes, padded to whole words.
pub(crate) fn upload_bytes(device: &wgpu::Device, queue: &wgpu::Queue, label: &str, bytes: &[u8]) -> wgpu::Buffer {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4).max(4), 0);
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: padded.len() as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    // Written through the queue: mapping at creation (`create_buffer_init`) panics on a lost device.
    queue.write_buffer(&buffer, 0, &padded);
    buffer
}
