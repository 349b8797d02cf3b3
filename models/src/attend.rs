//! Attention with a growing key/value cache, as a function that a model calls: on the GPU by this crate, or by candle.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{D, DType, Device, Tensor};
use wgpu_attention::kernel::Slot;
use wgpu_attention::{
    Append, Buffers, Causal, Gpu, Layout, Operation, Options, Positions, Prepared, Problem, Rotation, Strides, wgpu,
};

use crate::error::Result;
use crate::values;

/// Causal attention of one layer: the layer's index, how many positions it has seen before, and the new rows
/// q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], not turned yet. Gives [rows, heads · head_dim].
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
    /// Columns of a head, all of which turn with the position, in neighbouring pairs.
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
    pub fn new(heads: Heads, capacity: usize) -> Result<Self> {
        let pairs = heads.head_dim / 2;
        let table = Tensor::from_vec(heads.table(capacity), (capacity, 2 * pairs), &Device::Cpu)?;
        let half = |start| table.narrow(1, start, pairs)?.contiguous();
        Ok(CpuAttention { heads, cosines: half(0)?, sines: half(pairs)?, caches: vec![None; heads.layers] })
    }

    /// See [`Attend`].
    pub fn attend(&mut self, layer: usize, start: usize, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let rows = q.dim(0)?;
        let (cosines, sines) = (self.cosines.narrow(0, start, rows)?, self.sines.narrow(0, start, rows)?);
        let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let turned =
            |x: &Tensor| candle_nn::rotary_emb::rope_i(&by_head(x)?.unsqueeze(0)?, &cosines, &sines)?.squeeze(0);
        let (q, mut k, mut v) = (turned(q)?, turned(k)?, by_head(v)?);
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
    /// Keys and values of each layer, [capacity, kv_heads, head_dim]: new rows follow the old ones in memory.
    caches: Vec<[wgpu::Buffer; 2]>,
    table: wgpu::Buffer,
    /// How many keys there are before the new rows, and with them.
    start: wgpu::Buffer,
    length: wgpu::Buffer,
    steps: HashMap<usize, Step>,
}

/// What is prepared for some number of new rows.
struct Step {
    turn_q: Operation,
    turn_k: Operation,
    append: Operation,
    attention: Prepared,
    /// [rows, heads, head_dim].
    q: wgpu::Buffer,
    /// New keys and values, [rows, kv_heads, head_dim].
    kv: [wgpu::Buffer; 2],
    out: wgpu::Buffer,
}

/// A storage buffer for `len` words.
fn buffer(gpu: &Gpu, label: &str, len: usize) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: 4 * len as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    })
}

impl Step {
    fn new(gpu: &Gpu, heads: &Heads, rows: usize, capacity: usize) -> Result<Self> {
        let [h, kv_heads, dim] = [heads.heads, heads.kv_heads, heads.head_dim].map(|n| n as u32);
        let mut problem = Problem::new(1, h, rows as u32, capacity as u32, dim).with_layout(Layout::Bshd);
        (problem.kv_heads, problem.key_lengths, problem.causal) = (kv_heads, true, Causal::BottomRight);
        let attention = gpu.library().prepare(&gpu.library().plan(&problem)?)?;
        let turn = |heads: u32| {
            let mut rotation = Rotation::new(1, heads, rows as u32, dim, capacity as u32);
            rotation.x = Strides { offset: 0, batch: 0, head: dim.into(), row: (heads * dim).into() };
            (rotation.interleaved, rotation.positions) = (true, Positions::Starts);
            gpu.library().rotate(&rotation, &Options::default())
        };
        let mut append = Append::new(1, kv_heads, rows as u32, capacity as u32, dim);
        (append.x, append.cache) = (Layout::Bshd, Layout::Bshd);
        let [len, kv_len] = [heads.heads, heads.kv_heads].map(|n| rows * n * heads.head_dim);
        Ok(Step {
            turn_q: turn(h)?,
            turn_k: turn(kv_heads)?,
            append: gpu.library().append(&append, &Options::default())?,
            attention,
            q: buffer(gpu, "q", len),
            kv: ["k", "v"].map(|label| buffer(gpu, label, kv_len)),
            out: buffer(gpu, "out", len),
        })
    }
}

impl<'a> GpuAttention<'a> {
    /// With room for `capacity` positions.
    pub fn new(gpu: &'a Gpu, heads: Heads, capacity: usize) -> Self {
        let len = capacity * heads.kv_heads * heads.head_dim;
        let table = heads.table(capacity);
        let angles = buffer(gpu, "angles", table.len());
        gpu.queue().write_buffer(&angles, 0, bytemuck::cast_slice(&table));
        GpuAttention {
            gpu,
            heads,
            capacity,
            caches: (0..heads.layers).map(|_| ["keys", "values"].map(|label| buffer(gpu, label, len))).collect(),
            table: angles,
            start: buffer(gpu, "start", 1),
            length: buffer(gpu, "length", 1),
            steps: HashMap::new(),
        }
    }

    /// See [`Attend`].
    pub fn attend(&mut self, layer: usize, start: usize, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let rows = q.dim(0)?;
        let (gpu, [keys, cached_values]) = (self.gpu, &self.caches[layer]);
        let step = match self.steps.entry(rows) {
            Entry::Occupied(step) => step.into_mut(),
            Entry::Vacant(place) => place.insert(Step::new(gpu, &self.heads, rows, self.capacity)?),
        };
        let [new_k, new_v] = &step.kv;
        for (buffer, x) in [(&step.q, q), (new_k, k), (new_v, v)] {
            gpu.queue().write_buffer(buffer, 0, bytemuck::cast_slice(&values(x)?));
        }
        gpu.queue().write_buffer(&self.start, 0, bytemuck::bytes_of(&(start as u32)));
        gpu.queue().write_buffer(&self.length, 0, bytemuck::bytes_of(&((start + rows) as u32)));

        let mut buffers = Buffers::new(step.q.slice(..), keys.slice(..), cached_values.slice(..), step.out.slice(..));
        buffers.key_lengths = Some(self.length.slice(..));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        for (turn, x) in [(&step.turn_q, &step.q), (&step.turn_k, new_k)] {
            let angles = [(Slot::Angles, self.table.slice(..)), (Slot::Positions, self.start.slice(..))];
            turn.encode(&mut encoder, &[&[(Slot::Result, x.slice(..))], &angles[..]].concat())?;
        }
        for (rows, cache) in [(new_k, keys), (new_v, cached_values)] {
            let slots = [(Slot::Rows, rows), (Slot::Cache, cache), (Slot::Starts, &self.start)];
            step.append.encode(&mut encoder, &slots.map(|(slot, buffer)| (slot, buffer.slice(..))))?;
        }
        // A long prompt has several slices: one submission each, so that none runs into a driver's watchdog.
        for slice in 0..step.attention.slices() {
            step.attention.encode_slice(slice, &mut encoder, &buffers)?;
            let next = gpu.device().create_command_encoder(&Default::default());
            gpu.queue().submit([std::mem::replace(&mut encoder, next).finish()]);
        }
        let bytes = gpu.read(step.out.slice(..))?;
        let width = self.heads.heads * self.heads.head_dim;
        Ok(Tensor::from_vec(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes), (rows, width), &Device::Cpu)?)
    }
}
