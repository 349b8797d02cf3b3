//! Attention with a growing key/value cache, as a function that a model calls: on the GPU by this crate, or by candle.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{D, DType, Device, Tensor};
use wgpu_attention::operations::{Append, AppendBuffers, Operation, Positions, Rotation, RotationBuffers};
use wgpu_attention::{Buffers, Causal, Gpu, Layout, Options, Prepared, Problem, Strides, wgpu};

use crate::error::Result;
use crate::values;

/// Causal attention of one layer: the layer's index, how many positions it has seen before, and the new rows
/// q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], not rotated yet. Gives [rows, heads · head_dim].
///
/// Each layer is called in turn, with rows that follow those of its last call, or with position 0 to begin anew.
pub type Attend<'a> = dyn FnMut(usize, usize, [&Tensor; 3]) -> Result<Tensor> + 'a;

/// What attention must know of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Layers, each with a cache of its own.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Columns of a head, all of which are rotated with the position, in neighbouring pairs.
    pub head_dim: usize,
    /// Base of the angles.
    pub base: f32,
}

impl Heads {
    /// Cosines and sines of the positions `0..rows`.
    fn table(&self, rows: usize) -> Vec<f32> {
        Rotation::table(rows as u32, self.head_dim as u32, self.base.into())
    }
}

/// Attention by candle's tensor operations on the CPU.
pub struct CpuAttention {
    heads: Heads,
    cosines: Tensor,
    sines: Tensor,
    caches: Vec<Option<[Tensor; 2]>>,
}

impl CpuAttention {
    /// With room for `capacity` positions.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Candle`] for what candle reports.
    pub fn new(heads: Heads, capacity: usize) -> Result<Self> {
        let pairs = heads.head_dim / 2;
        let table = Tensor::from_vec(heads.table(capacity), (capacity, 2 * pairs), &Device::Cpu)?;
        let half = |start| table.narrow(1, start, pairs)?.contiguous();
        Ok(CpuAttention { heads, cosines: half(0)?, sines: half(pairs)?, caches: vec![None; heads.layers] })
    }

    /// See [`Attend`].
    ///
    /// # Errors
    ///
    /// [`crate::Error::Candle`] for tensors that have other shapes than [`Attend`] says, and for positions beyond the room.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn attend(&mut self, layer: usize, start: usize, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let rows = q.dim(0)?;
        let (cosines, sines) = (self.cosines.narrow(0, start, rows)?, self.sines.narrow(0, start, rows)?);
        let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let rotated =
            |x: &Tensor| candle_nn::rotary_emb::rope_i(&by_head(x)?.unsqueeze(0)?, &cosines, &sines)?.squeeze(0);
        let (q, mut k, mut v) = (rotated(q)?, rotated(k)?, by_head(v)?);
        if let Some([old_k, old_v]) = self.caches[layer].take().filter(|_| start > 0) {
            (k, v) = (Tensor::cat(&[&old_k, &k], 1)?, Tensor::cat(&[&old_v, &v], 1)?);
        }
        self.caches[layer] = Some([k.clone(), v.clone()]);
        // The query heads of a group stand below each other, so that each key/value head is multiplied once.
        let group = heads / kv_heads;
        let keys = start + rows;
        let q = q.reshape((kv_heads, group * rows, head_dim))?;
        let scores = (q.matmul(&k.t()?)? * (head_dim as f64).powf(-0.5))?;
        let visible = (0..rows)
            .flat_map(|row| (0..keys).map(move |key| if key <= start + row { 0.0 } else { f32::NEG_INFINITY }));
        let mask = Tensor::from_vec(visible.collect(), (1, 1, rows, keys), &Device::Cpu)?;
        let scores = scores.reshape((kv_heads, group, rows, keys))?.broadcast_add(&mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.reshape((kv_heads, group * rows, keys))?;
        let context = weights.matmul(&v)?.reshape((heads, rows, head_dim))?;
        Ok(context.transpose(0, 1)?.reshape((rows, heads * head_dim))?.to_dtype(DType::F32)?)
    }
}

/// Attention, rotary embedding and cache on the GPU.
///
/// Everything is planned and compiled once for each number of new rows: in a decoding loop that is once for the prompt and
/// once for all single tokens, since the length of the cache is an operand.
pub struct GpuAttention<'a> {
    gpu: &'a Gpu,
    heads: Heads,
    capacity: usize,
    /// Keys and values of each layer side by side, [capacity, 2 · kv_heads, head_dim]: new rows follow the old ones in memory.
    caches: Vec<wgpu::Buffer>,
    table: wgpu::Buffer,
    /// How many keys there are before the new rows, and with them.
    start: wgpu::Buffer,
    length: wgpu::Buffer,
    steps: HashMap<usize, Step>,
}

/// What is prepared for some number of new rows.
struct Step {
    rotate: Operation<Rotation>,
    append: Operation<Append>,
    attention: Prepared,
    /// New rows of query, key and value side by side, [rows, heads + 2 · kv_heads, head_dim].
    rows: wgpu::Buffer,
    /// [rows, heads · head_dim], and where the CPU reads it.
    out: wgpu::Buffer,
    read: wgpu::Buffer,
}

/// A buffer for `len` words.
fn buffer(gpu: &Gpu, label: &str, len: usize, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let (label, size) = (Some(label), 4 * len as u64);
    gpu.device().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
}

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_DST).union(wgpu::BufferUsages::COPY_SRC);

impl Step {
    fn new(gpu: &Gpu, heads: &Heads, rows: usize, capacity: usize) -> Result<Self> {
        let (rows32, capacity) = (rows as u32, capacity as u32);
        let [h, kv_heads, dim] = [heads.heads, heads.kv_heads, heads.head_dim].map(|n| n as u32);
        // From a head on, in rows of so many heads.
        let heads_of = |of: u32, first: u32| {
            let [row, offset] = [of, first].map(|heads| u64::from(heads) * u64::from(dim));
            Strides { offset, batch: 0, head: dim.into(), row }
        };
        let all = h + 2 * kv_heads;
        let mut problem = Problem::new(1, h, rows32, capacity, dim).with_layout(Layout::Bshd);
        (problem.kv_heads, problem.key_lengths, problem.causal) = (kv_heads, true, Causal::BottomRight);
        problem.q = Layout::Strided(heads_of(all, 0));
        problem.k = Layout::Strided(heads_of(2 * kv_heads, 0));
        problem.v = Layout::Strided(heads_of(2 * kv_heads, kv_heads));
        // Queries and keys are rotated alike, in place.
        let mut rotation = Rotation::new(1, h + kv_heads, rows32, dim, capacity);
        (rotation.x, rotation.interleaved, rotation.positions) = (heads_of(all, 0), true, Positions::Starts);
        let mut append = Append::new(1, 2 * kv_heads, rows32, capacity, dim);
        (append.x, append.cache) = (Layout::Strided(heads_of(all, h)), Layout::Bshd);
        let len = rows * heads.heads * heads.head_dim;
        Ok(Step {
            rotate: gpu.library().rotate(&rotation, &Options::default())?,
            append: gpu.library().append(&append, &Options::default())?,
            attention: gpu.library().prepare(&gpu.plan(&problem)?)?,
            rows: buffer(gpu, "new rows", rows * (heads.heads + 2 * heads.kv_heads) * heads.head_dim, STORAGE),
            out: buffer(gpu, "out", len, STORAGE),
            read: buffer(gpu, "read-back", len, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
        })
    }
}

impl<'a> GpuAttention<'a> {
    /// With room for `capacity` positions.
    pub fn new(gpu: &'a Gpu, heads: Heads, capacity: usize) -> Self {
        let len = 2 * capacity * heads.kv_heads * heads.head_dim;
        let table = heads.table(capacity);
        let angles = buffer(gpu, "angles", table.len(), STORAGE);
        gpu.queue().write_buffer(&angles, 0, bytemuck::cast_slice(&table));
        GpuAttention {
            gpu,
            heads,
            capacity,
            caches: (0..heads.layers).map(|_| buffer(gpu, "keys and values", len, STORAGE)).collect(),
            table: angles,
            start: buffer(gpu, "start", 1, STORAGE),
            length: buffer(gpu, "length", 1, STORAGE),
            steps: HashMap::new(),
        }
    }

    /// See [`Attend`].
    ///
    /// # Errors
    ///
    /// [`crate::Error::Candle`] for tensors that have other shapes than [`Attend`] says, and [`crate::Error::Attention`] for more
    /// rows than there is room for and for what the device reports.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn attend(&mut self, layer: usize, start: usize, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let rows = qkv[0].dim(0)?;
        let (gpu, cache) = (self.gpu, self.caches[layer].slice(..));
        let step = match self.steps.entry(rows) {
            Entry::Occupied(step) => step.into_mut(),
            Entry::Vacant(place) => place.insert(Step::new(gpu, &self.heads, rows, self.capacity)?),
        };
        gpu.queue().write_buffer(&step.rows, 0, bytemuck::cast_slice(&values(&Tensor::cat(&qkv, 1)?)?));
        gpu.queue().write_buffer(&self.start, 0, bytemuck::bytes_of(&(start as u32)));
        gpu.queue().write_buffer(&self.length, 0, bytemuck::bytes_of(&((start + rows) as u32)));

        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let (new, starts) = (step.rows.slice(..), self.start.slice(..));
        step.rotate.encode(&mut encoder, &RotationBuffers::new(new, self.table.slice(..), starts))?;
        step.append.encode(&mut encoder, &AppendBuffers::new(new, cache, starts))?;
        let mut buffers = Buffers::new(new, cache, cache, step.out.slice(..));
        buffers.operands.key_lengths = Some(self.length.slice(..));
        // A long prompt has several slices: one submission each, so that none runs into a driver's watchdog.
        let recording = step.attention.begin()?;
        for slice in 0..step.attention.slices() {
            if slice > 0 {
                let next = gpu.device().create_command_encoder(&Default::default());
                gpu.queue().submit([std::mem::replace(&mut encoder, next).finish()]);
            }
            recording.encode_slice(slice, &mut encoder, &buffers)?;
        }
        // The copy back goes along with the last one: each submission costs a wait for the device.
        encoder.copy_buffer_to_buffer(&step.out, 0, &step.read, 0, step.read.size());
        gpu.queue().submit([encoder.finish()]);
        step.read.slice(..).map_async(wgpu::MapMode::Read, |_| ());
        gpu.wait()?;
        let lost = |error: wgpu::MapRangeError| wgpu_attention::Error::DeviceLost(error.to_string());
        let bytes = step.read.slice(..).get_mapped_range().map_err(lost)?;
        let width = self.heads.heads * self.heads.head_dim;
        let out = Tensor::from_slice(&bytemuck::pod_collect_to_vec::<u8, f32>(&bytes), (rows, width), &Device::Cpu)?;
        drop(bytes);
        step.read.unmap();
        Ok(out)
    }
}
