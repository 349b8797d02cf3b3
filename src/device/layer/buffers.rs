//! The buffers of one call of a layer.

use crate::contract::operands::Operands;
use crate::device::gpu::whole;

/// Buffers of one call of a layer. Tensors are f32 and need usage `STORAGE`. Of one without elements any slice may be given, as
/// for [`crate::Buffers`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct LayerBuffers<'a> {
    /// Query input.
    pub query: wgpu::BufferSlice<'a>,
    /// Key input, where [`Sources`](crate::multihead::Sources) has one.
    pub key: Option<wgpu::BufferSlice<'a>>,
    /// Value input, where [`Sources`](crate::multihead::Sources) has one.
    pub value: Option<wgpu::BufferSlice<'a>>,
    /// The layer's output.
    pub result: wgpu::BufferSlice<'a>,
    /// The weights, if the call asks for them.
    pub weights: Option<wgpu::BufferSlice<'a>>,
    /// The key/value cache, if the call has one.
    pub cache: Option<CacheBuffers<'a>>,
    /// Mask, bias and the small arrays of the attention inside.
    pub operands: Operands<wgpu::BufferSlice<'a>>,
}

/// A key/value cache on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct CacheBuffers<'a> {
    /// [batch, kv_heads, seq_kv, key_dim], changed in place.
    pub k: wgpu::BufferSlice<'a>,
    /// [batch, kv_heads, seq_kv, value_dim], changed in place.
    pub v: wgpu::BufferSlice<'a>,
    /// Keys that each batch has already: u32 `[batch]`, usages `STORAGE` and `COPY_SRC`. Not written: add `seq_q` for the next
    /// call. New rows go there as [`Append`](crate::operations::Append) says.
    pub starts: wgpu::BufferSlice<'a>,
}

impl<'a> LayerBuffers<'a> {
    /// Self-attention without further operands.
    pub fn new(query: wgpu::BufferSlice<'a>, result: wgpu::BufferSlice<'a>) -> Self {
        let operands = Operands::default();
        LayerBuffers { query, key: None, value: None, result, weights: None, cache: None, operands }
    }
}

/// What one call on host slices has on the device.
pub(crate) struct Uploaded {
    pub(crate) query: wgpu::Buffer,
    pub(crate) key: Option<wgpu::Buffer>,
    pub(crate) value: Option<wgpu::Buffer>,
    pub(crate) result: wgpu::Buffer,
    pub(crate) weights: Option<wgpu::Buffer>,
    pub(crate) operands: Operands<wgpu::Buffer>,
}

impl Uploaded {
    pub(crate) fn buffers(&self) -> LayerBuffers<'_> {
        LayerBuffers {
            query: self.query.slice(..),
            key: whole(&self.key),
            value: whole(&self.value),
            result: self.result.slice(..),
            weights: whole(&self.weights),
            cache: None,
            operands: self.operands.as_ref().map(|_, buffer| buffer.slice(..)),
        }
    }
}
