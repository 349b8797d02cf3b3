//! Host data for every operand of a problem.

use half::{bf16, f16};
use wgpu_attention::{Causal, Element, Elements, HostSlice, Inputs, Operands, Problem, with};

use super::Random;

/// Numbers in one of the element types.
#[derive(Clone, Debug)]
pub enum Tensor {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    pub fn new(element: Element, values: &[f32]) -> Self {
        match element {
            Element::F32 => Tensor::F32(values.to_vec()),
            Element::F16 => Tensor::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Element::Bf16 => Tensor::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        }
    }

    /// From the bytes of a buffer.
    pub fn from_bytes(element: Element, bytes: &[u8]) -> Self {
        match element {
            Element::F32 => Tensor::F32(bytemuck::pod_collect_to_vec(bytes)),
            Element::F16 => Tensor::F16(bytemuck::pod_collect_to_vec(bytes)),
            Element::Bf16 => Tensor::Bf16(bytemuck::pod_collect_to_vec(bytes)),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        }
    }

    /// The same numbers in f32.
    pub fn widened(&self) -> Vec<f32> {
        let elements = self.elements();
        (0..elements.len()).map(|index| elements.get(index) as f32).collect()
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Tensor::F32(x) => Elements::F32(x),
            Tensor::F16(x) => Elements::F16(x),
            Tensor::Bf16(x) => Elements::Bf16(x),
        }
    }

    /// The numbers of a tensor of f32.
    pub fn f32(&self) -> &[f32] {
        let Tensor::F32(x) = self else { panic!("not f32: {:?}", self.elements().element()) };
        x
    }

    pub fn len(&self) -> usize {
        self.elements().len()
    }

    pub fn set(&mut self, index: usize, value: f32) {
        match self {
            Tensor::F32(x) => x[index] = value,
            Tensor::F16(x) => x[index] = f16::from_f32(value),
            Tensor::Bf16(x) => x[index] = bf16::from_f32(value),
        }
    }

    pub fn fill(&mut self, range: std::ops::Range<usize>, value: f32) {
        range.for_each(|index| self.set(index, value));
    }
}

/// Everything that a problem reads.
#[derive(Clone, Debug)]
pub struct Data {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub mask: Option<Vec<u8>>,
    pub bias: Option<Tensor>,
    pub key_lengths: Option<Vec<u32>>,
    pub key_positions: Option<Vec<i32>>,
    pub offsets: Option<Vec<i32>>,
    pub slopes: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    pub cu_q: Option<Vec<u32>>,
    pub cu_kv: Option<Vec<u32>>,
    pub block_table: Option<Vec<u32>>,
}

impl Data {
    /// Signed numbers; masks with holes, a bias with some −inf, lengths from 0 to full, sequences of which some are empty.
    /// `peak` scales q, so that softmax is as peaked as wanted.
    pub fn random(p: &Problem, seed: u64, peak: f32) -> Self {
        let shape = p.check().unwrap();
        let r = &mut Random(seed);
        let batch = p.batch as usize;
        let tensor = |len: u64, spread: f32, r: &mut Random| Tensor::new(p.element, &r.normals(len as usize, spread));
        let (cu_q, cu_kv) = match p.packed {
            None => (None, None),
            Some(packed) => (
                Some(boundaries(batch, packed.total_q, p.seq_q, r)),
                Some(boundaries(batch, packed.total_kv, p.seq_kv, r)),
            ),
        };
        Data {
            q: tensor(shape.q().extent(), peak, r),
            k: tensor(shape.k().extent(), 1.0, r),
            v: tensor(shape.v().extent(), 1.0, r),
            mask: p
                .mask
                .map(|mask| (0..mask.len()).map(|_| if r.once_in(3) { 0 } else { 1 + r.below(255) as u8 }).collect()),
            bias: p.bias.map(|bias| {
                let values = r.normals(bias.shape.len(), 1.5);
                let holes: Vec<f32> =
                    values.iter().map(|&x| if r.once_in(7) { f32::NEG_INFINITY } else { x }).collect();
                Tensor::new(bias.element, &holes)
            }),
            key_lengths: p.key_lengths.then(|| {
                let some = [0, p.seq_kv, (p.seq_kv / 2) | 1, p.seq_kv.saturating_sub(1)];
                (0..batch).map(|b| some[(b + r.below(2) as usize) % some.len()].min(p.seq_kv)).collect()
            }),
            // Any order, with empty slots.
            key_positions: p.key_positions.then(|| {
                let position = |_| if r.once_in(5) { -1 } else { r.below(p.seq_kv + p.seq_q) as i32 };
                (0..batch * p.seq_kv as usize).map(position).collect()
            }),
            offsets: (p.causal == Causal::Offset)
                .then(|| (0..batch).map(|_| r.below(p.seq_kv + p.seq_q) as i32 - p.seq_q as i32).collect()),
            slopes: p.alibi.then(|| (0..p.heads).map(|h| 0.5 / (h + 1) as f32).collect()),
            sinks: p.sinks.then(|| r.normals(p.heads as usize, 1.0)),
            cu_q,
            cu_kv,
            // Any page in any place, also several times.
            block_table: p.paged.map(|paged| (0..shape.block_table_len()).map(|_| r.below(paged.pages)).collect()),
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        with!(Inputs::new(self.q.elements(), self.k.elements(), self.v.elements()), operands: with!(Operands::default(), mask: self.mask.as_ref().map(HostSlice::from), bias: self.bias.as_ref().map(|bias| bias.elements().into()), key_lengths: self.key_lengths.as_ref().map(HostSlice::from), key_positions: self.key_positions.as_ref().map(HostSlice::from), offsets: self.offsets.as_ref().map(HostSlice::from), alibi_slopes: self.slopes.as_ref().map(HostSlice::from), sinks: self.sinks.as_ref().map(HostSlice::from), cu_seqlens_q: self.cu_q.as_ref().map(HostSlice::from), cu_seqlens_kv: self.cu_kv.as_ref().map(HostSlice::from), block_table: self.block_table.as_ref().map(HostSlice::from)))
    }
}

/// Boundaries of sequences, some of them empty, each at most `longest`; tokens may be left that belong to nobody.
fn boundaries(batch: usize, total: u32, longest: u32, r: &mut Random) -> Vec<u32> {
    let mut at = r.below(2);
    let mut bounds = vec![at];
    for _ in 0..batch {
        let room = (total - at).min(longest);
        at += if r.once_in(4) { 0 } else { r.below(room + 1) };
        bounds.push(at);
    }
    bounds
}
