//! A problem in buffers of the test's own making, each operand between margins that nobody may write.

use std::ops::Range;

use wgpu::util::DeviceExt;
use wgpu_attention::{Buffers, Element, Operands, Outputs, Plan, wgpu, with};

use super::Data;

const MARGIN: u64 = 256;
/// NaN in every element type, so that whatever is read from a margin shows.
const MARK: u8 = 0xff;

/// A buffer with a margin on both sides, or on those that are wanted.
pub struct Guarded {
    buffer: wgpu::Buffer,
    contents: Vec<u8>,
    inside: Range<usize>,
    /// Bytes up to the end of the operand's last word, which nobody may write either.
    padding: usize,
}

impl Guarded {
    pub fn new(device: &wgpu::Device, bytes: &[u8]) -> Self {
        Self::between(device, bytes, [true, true])
    }

    /// Without a margin the operand begins where the buffer does, or ends there.
    pub fn between(device: &wgpu::Device, bytes: &[u8], margins: [bool; 2]) -> Self {
        let [before, after] = margins.map(|wanted| if wanted { MARGIN as usize } else { 0 });
        let inside = before..before + bytes.len().next_multiple_of(4);
        let mut contents = vec![MARK; before];
        contents.extend_from_slice(bytes);
        contents.resize(inside.end + after, MARK);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer =
            device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents: &contents, usage });
        Guarded { buffer, contents, padding: inside.len() - bytes.len(), inside }
    }

    pub fn slice(&self) -> wgpu::BufferSlice<'_> {
        self.buffer.slice(self.inside.start as u64..self.inside.end as u64)
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
        let (before, rest) = bytes.split_at(self.inside.start);
        let (inside, after) = rest.split_at(self.inside.len());
        let padding = &inside[inside.len() - self.padding..];
        assert!(padding.iter().all(|&byte| byte == MARK), "the other half of an operand's last word was written");
        assert!(before.iter().chain(after).all(|&byte| byte == MARK), "bytes beside an operand were written");
        inside.to_vec()
    }

    /// Whether the buffer holds what it began with.
    pub fn is_unchanged(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> bool {
        self.read(device, queue) == self.contents[self.inside.clone()]
    }
}

/// Every operand and output of a problem; outputs start as NaN.
pub struct Staged {
    element: Element,
    q: Guarded,
    k: Guarded,
    v: Guarded,
    pub operands: Operands<Guarded>,
    out: Guarded,
    lse: Option<Guarded>,
    weights: Option<Guarded>,
    logits: Option<Guarded>,
}

impl Staged {
    pub fn new(device: &wgpu::Device, plan: &Plan, operands: &Data) -> Self {
        Self::between(device, plan, operands, || [true, true])
    }

    /// The same with the margins that `margins` wants for each buffer in turn.
    pub fn between(
        device: &wgpu::Device,
        plan: &Plan,
        operands: &Data,
        mut margins: impl FnMut() -> [bool; 2],
    ) -> Self {
        let (s, inputs) = (plan.shape(), operands.inputs());
        let mut make = |bytes: &[u8]| Guarded::between(device, bytes, margins());
        Staged {
            element: s.problem().element,
            q: make(inputs.q.bytes()),
            k: make(inputs.k.bytes()),
            v: make(inputs.v.bytes()),
            operands: inputs.operands.map(|_, data| make(data.bytes())),
            out: make(&vec![MARK; (s.out().extent() * s.problem().element.bytes()) as usize]),
            lse: s.problem().lse.then(|| make(&unwritten(s.lse_len()))),
            weights: s.problem().weights.then(|| make(&unwritten(s.scores_len()))),
            logits: s.problem().logits.map(|_| make(&unwritten(s.scores_len()))),
        }
    }

    pub fn buffers(&self) -> Buffers<'_> {
        fn slice(guarded: &Option<Guarded>) -> Option<wgpu::BufferSlice<'_>> {
            guarded.as_ref().map(Guarded::slice)
        }
        let mut buffers = Buffers::new(self.q.slice(), self.k.slice(), self.v.slice(), self.out.slice());
        buffers.operands = self.operands.as_ref().map(|_, guarded| guarded.slice());
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

    /// Asserts that nobody wrote to an operand.
    pub fn assert_operands_stay(&self, device: &wgpu::Device, queue: &wgpu::Queue) {
        let operands = self.operands.iter().map(|(_, operand)| operand);
        let mut all = operands.chain([&self.q, &self.k, &self.v]);
        assert!(all.all(|operand| operand.is_unchanged(device, queue)), "an operand was written");
    }

    /// The outputs; NaN where nothing was written.
    pub fn outputs(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Outputs {
        let bytes = |guarded: &Guarded| guarded.read(device, queue);
        let read = |guarded: &Guarded| bytemuck::pod_collect_to_vec::<u8, f32>(&bytes(guarded));
        let halves = |guarded: &Guarded| bytemuck::pod_collect_to_vec::<u8, u16>(&bytes(guarded)).into_iter();
        with!(Outputs::new(match self.element {
                Element::F32 => read(&self.out),
                Element::F16 => halves(&self.out).map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
                Element::Bf16 => halves(&self.out).map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
                _ => unreachable!("this code knows f32, f16 and bf16"),
            }), lse: self.lse.as_ref().map(read), weights: self.weights.as_ref().map(read), logits: self.logits.as_ref().map(read))
    }
}

/// The bytes of f32 places that nobody has written.
fn unwritten(len: u64) -> Vec<u8> {
    vec![MARK; 4 * len as usize]
}
