//! A problem in buffers of the test's own making, each operand between margins that nobody may write.

use wgpu::util::DeviceExt;
use wgpu_attention::{Buffers, Outputs, Plan, wgpu};

use super::Data;

const MARGIN: u64 = 256;
const MARK: u8 = 0xa5;

/// A buffer with a margin on both sides.
pub struct Guarded {
    buffer: wgpu::Buffer,
    size: u64,
}

impl Guarded {
    pub fn new(device: &wgpu::Device, bytes: &[u8]) -> Self {
        let size = (bytes.len() as u64).next_multiple_of(4);
        let mut contents = vec![MARK; MARGIN as usize];
        contents.extend_from_slice(bytes);
        contents.resize((size + 2 * MARGIN) as usize, MARK);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer =
            device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents: &contents, usage });
        Guarded { buffer, size }
    }

    pub fn slice(&self) -> wgpu::BufferSlice<'_> {
        self.buffer.slice(MARGIN..MARGIN + self.size)
    }

    /// The contents, after a look at the margins.
    pub fn read(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Vec<u8> {
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let size = self.buffer.size();
        let staging =
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.buffer, 0, &staging, 0, size);
        queue.submit([encoder.finish()]);
        staging.slice(..).map_async(wgpu::MapMode::Read, Result::unwrap);
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        let bytes = staging.slice(..).get_mapped_range().unwrap().to_vec();
        let (before, rest) = bytes.split_at(MARGIN as usize);
        let (inside, after) = rest.split_at(self.size as usize);
        assert!(before.iter().chain(after).all(|&byte| byte == MARK), "bytes beside an operand were written");
        inside.to_vec()
    }
}

/// Every operand and output of a problem; outputs start as NaN.
pub struct Staged {
    q: Guarded,
    k: Guarded,
    v: Guarded,
    mask: Option<Guarded>,
    bias: Option<Guarded>,
    pub key_lengths: Option<Guarded>,
    pub offsets: Option<Guarded>,
    pub slopes: Option<Guarded>,
    pub sinks: Option<Guarded>,
    pub cu_q: Option<Guarded>,
    pub cu_kv: Option<Guarded>,
    pub block_table: Option<Guarded>,
    out: Guarded,
    lse: Option<Guarded>,
    weights: Option<Guarded>,
    logits: Option<Guarded>,
}

impl Staged {
    pub fn new(device: &wgpu::Device, plan: &Plan, operands: &Data) -> Self {
        let s = plan.shape();
        let make = |bytes: &[u8]| Guarded::new(device, bytes);
        let nan = |wanted: bool, len: u64| wanted.then(|| make(bytemuck::cast_slice(&vec![f32::NAN; len as usize])));
        Staged {
            q: make(operands.q.elements().bytes()),
            k: make(operands.k.elements().bytes()),
            v: make(operands.v.elements().bytes()),
            mask: operands.mask.as_ref().map(|x| make(x)),
            bias: operands.bias.as_ref().map(|x| make(x.elements().bytes())),
            key_lengths: operands.key_lengths.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            offsets: operands.offsets.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            slopes: operands.slopes.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            sinks: operands.sinks.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            cu_q: operands.cu_q.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            cu_kv: operands.cu_kv.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            block_table: operands.block_table.as_ref().map(|x| make(bytemuck::cast_slice(x))),
            out: make(&vec![0xff; (s.out().extent() * s.element.bytes()) as usize]),
            lse: nan(s.lse, s.lse_len()),
            weights: nan(s.weights, s.scores_len()),
            logits: nan(s.logits.is_some(), s.scores_len()),
        }
    }

    pub fn buffers(&self) -> Buffers<'_> {
        fn slice(guarded: &Option<Guarded>) -> Option<wgpu::BufferSlice<'_>> {
            guarded.as_ref().map(Guarded::slice)
        }
        let mut buffers = Buffers::new(self.q.slice(), self.k.slice(), self.v.slice(), self.out.slice());
        buffers.mask = slice(&self.mask);
        buffers.bias = slice(&self.bias);
        buffers.key_lengths = slice(&self.key_lengths);
        buffers.offsets = slice(&self.offsets);
        buffers.alibi_slopes = slice(&self.slopes);
        buffers.sinks = slice(&self.sinks);
        buffers.cu_seqlens_q = slice(&self.cu_q);
        buffers.cu_seqlens_kv = slice(&self.cu_kv);
        buffers.block_table = slice(&self.block_table);
        buffers.lse = slice(&self.lse);
        buffers.weights = slice(&self.weights);
        buffers.logits = slice(&self.logits);
        buffers
    }

    /// The bytes of out, lse, weights and logits.
    pub fn bytes(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> [Option<Vec<u8>>; 4] {
        let rest = [&self.lse, &self.weights, &self.logits].map(|x| x.as_ref().map(|x| x.read(device, queue)));
        let [lse, weights, logits] = rest;
        [Some(self.out.read(device, queue)), lse, weights, logits]
    }

    /// Outputs of an f32 problem.
    pub fn outputs(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Outputs {
        let read = |guarded: &Guarded| bytemuck::pod_collect_to_vec::<u8, f32>(&guarded.read(device, queue));
        Outputs {
            out: read(&self.out),
            lse: self.lse.as_ref().map(read),
            weights: self.weights.as_ref().map(read),
            logits: self.logits.as_ref().map(read),
        }
    }
}
