//! Owned operands of one problem; [`Operands::inputs`] lends them to the library.

use wgpu_attention::{Bias, Broadcast, Inputs, Problem};

use crate::floats::Floats;

/// What [`Inputs`] borrows.
#[derive(Clone, Debug, PartialEq)]
pub struct Operands {
    pub q: Floats,
    pub k: Floats,
    pub v: Floats,
    pub mask: Option<Vec<u8>>,
    pub bias: Option<Floats>,
    pub key_lengths: Option<Vec<u32>>,
    pub offsets: Option<Vec<i32>>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    pub cu_seqlens_q: Option<Vec<u32>>,
    pub cu_seqlens_kv: Option<Vec<u32>>,
    pub block_table: Option<Vec<u32>>,
}

impl Operands {
    pub fn new(q: Floats, k: Floats, v: Floats) -> Self {
        Operands {
            q,
            k,
            v,
            mask: None,
            bias: None,
            key_lengths: None,
            offsets: None,
            alibi_slopes: None,
            sinks: None,
            cu_seqlens_q: None,
            cu_seqlens_kv: None,
            block_table: None,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: self.q.elements(),
            k: self.k.elements(),
            v: self.v.elements(),
            mask: self.mask.as_deref(),
            bias: self.bias.as_ref().map(Floats::elements),
            key_lengths: self.key_lengths.as_deref(),
            offsets: self.offsets.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            cu_seqlens_q: self.cu_seqlens_q.as_deref(),
            cu_seqlens_kv: self.cu_seqlens_kv.as_deref(),
            block_table: self.block_table.as_deref(),
        }
    }

    pub fn set_mask(&mut self, problem: &mut Problem, shape: Broadcast, mask: Vec<u8>) {
        problem.mask = Some(shape);
        self.mask = Some(mask);
    }

    pub fn set_bias(&mut self, problem: &mut Problem, shape: Broadcast, bias: Floats) {
        problem.bias = Some(Bias { shape, element: bias.element() });
        self.bias = Some(bias);
    }

    pub fn set_key_lengths(&mut self, problem: &mut Problem, lengths: Vec<u32>) {
        problem.key_lengths = true;
        self.key_lengths = Some(lengths);
    }

    pub fn set_alibi(&mut self, problem: &mut Problem, slopes: Vec<f32>) {
        problem.alibi = true;
        self.alibi_slopes = Some(slopes);
    }

    pub fn set_sinks(&mut self, problem: &mut Problem, sinks: Vec<f32>) {
        problem.sinks = true;
        self.sinks = Some(sinks);
    }
}
