//! Read-back of buffers and outputs.

use futures::channel::oneshot;

use crate::contract::error::{Error, Result};
use crate::contract::problem::{Element, Outputs};
use crate::device::allocation::allocate;
use crate::device::gpu::{Gpu, Resident};
use crate::plan::Plan;

impl Gpu {
    /// Reads the outputs back.
    ///
    /// # Errors
    ///
    /// [`Error::OtherDevice`] if `resident` belongs to another device; [`Error::Missing`], [`Error::Unexpected`] or
    /// [`Error::BufferSize`] if it was uploaded for another plan whose buffers do not fit this one; and those of [`Gpu::read`].
    pub fn download(&self, plan: &Plan, resident: &Resident) -> Result<Outputs> {
        self.block_on(self.download_async(plan, resident))
    }

    /// [`Gpu::download`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::download`].
    pub async fn download_async(&self, plan: &Plan, resident: &Resident) -> Result<Outputs> {
        self.check_home("resident", &resident.home)?;
        resident.buffers().check(plan)?;
        let shape = plan.shape();
        let scores = shape.scores_len();
        Ok(Outputs {
            lse: self.read_f32s(&resident.lse, shape.lse_len()).await?,
            weights: self.read_f32s(&resident.weights, scores).await?,
            logits: self.read_f32s(&resident.logits, scores).await?,
            out: self.read_widened(&resident.out, shape.problem.element, shape.out().extent()).await?,
        })
    }

    /// The first `len` elements of a buffer of f32, if there is one.
    pub(crate) async fn read_f32s(&self, buffer: &Option<wgpu::Buffer>, len: u64) -> Result<Option<Vec<f32>>> {
        match buffer {
            Some(buffer) => self.read_widened(buffer, Element::F32, len).await.map(Some),
            None => Ok(None),
        }
    }

    /// The first `len` elements of a buffer, widened to f32. Buffers end at whole words and are never empty, tensors need not.
    pub(crate) async fn read_widened(&self, buffer: &wgpu::Buffer, element: Element, len: u64) -> Result<Vec<f32>> {
        let mut read = widened(element, &self.read_async(buffer.slice(..)).await?);
        read.truncate(len as usize);
        Ok(read)
    }

    /// Bytes of a buffer slice with usage `COPY_SRC`; offset and size are multiples of 4. Blocks.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if there is no memory for a copy of the slice, [`Error::Validation`] if the buffer lacks the usage
    /// or the slice has another offset or size, and those of [`Gpu::wait`].
    pub fn read(&self, slice: wgpu::BufferSlice<'_>) -> Result<Vec<u8>> {
        self.block_on(self.read_async(slice))
    }

    /// [`Gpu::read`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::read`].
    pub async fn read_async(&self, slice: wgpu::BufferSlice<'_>) -> Result<Vec<u8>> {
        if slice.size() == 0 {
            return self.fault().map(|()| Vec::new());
        }
        let descriptor = wgpu::BufferDescriptor {
            label: Some("read-back"),
            size: slice.size(),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        };
        let staging = allocate(&self.device, || self.device.create_buffer(&descriptor)).await?;
        let mut encoder = self
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("wgpu-attention: read-back") });
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &staging, 0, slice.size());
        self.queue.submit([encoder.finish()]);
        let (send, ready) = oneshot::channel();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            // The receiver may be gone if the caller dropped the future.
            let _ = send.send(result);
        });
        // What is wrong with the copy is known to the thread that records it.
        self.fault()?;
        self.answer(ready).await?.map_err(|error| Error::DeviceLost(error.to_string()))?;
        let view = staging.slice(..).get_mapped_range().map_err(|error| Error::DeviceLost(error.to_string()))?;
        Ok(view.to_vec())
    }
}

/// The elements of a tensor's bytes, widened to f32, which is exact.
fn widened(element: Element, bytes: &[u8]) -> Vec<f32> {
    let words = bytemuck::pod_collect_to_vec::<u8, u16>;
    match element {
        Element::F32 => bytemuck::pod_collect_to_vec(bytes),
        Element::F16 => words(bytes).into_iter().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
        Element::Bf16 => words(bytes).into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
    }
}
