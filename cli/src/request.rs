//! A problem and its operands from the tensors of a file: `q k v`, and optionally `mask`, `bias`, `kv_lens`, `alibi_slopes`,
//! `sinks`, and `cu_seqlens_q` with `cu_seqlens_k` for sequences laid end to end.

use wgpu_attention::{Layout, Operands, Packed, Problem, Shape};

use crate::archive::Archive;
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::operands::{Array, OwnedInputs, set_bias, set_key_lengths, set_mask};
use crate::options::TermArgs;

/// The problem that a file describes, and the shapes of its results.
#[derive(Debug)]
pub struct Request {
    pub problem: Problem,
    pub operands: OwnedInputs,
    pub out_shape: Vec<usize>,
    pub lse_shape: Vec<usize>,
}

impl Request {
    /// A problem with operands that were made for it.
    pub fn of(shape: &Shape, operands: OwnedInputs) -> Self {
        let problem = shape.problem().clone();
        let Problem { batch, heads, seq_q, value_dim, .. } = problem;
        // Packed sequences have no axis of batches, and all tokens as rows.
        let (batch, rows) = problem.packed.map_or((Some(batch), seq_q), |packed| (None, packed.total_q));
        let axes = |rest: &[u32]| batch.iter().chain(rest).map(|&n| n as usize).collect::<Vec<_>>();
        let out_shape = match problem.out {
            Layout::Bhsd => axes(&[heads, rows, value_dim]),
            Layout::Bshd => axes(&[rows, heads, value_dim]),
            // With strides, what lies between the rows is part of the output.
            _ => vec![shape.out().extent() as usize],
        };
        let lse_shape = axes(&[heads, rows]);
        Request { problem, operands, out_shape, lse_shape }
    }

    /// Sets the terms that follow from no tensor.
    pub fn apply(&mut self, terms: &TermArgs) {
        terms.apply(&mut self.problem);
        if let Some(offset) = terms.causal_offset {
            self.operands.operands.offsets = Some(Array::I32(vec![offset; self.problem.batch as usize]));
        }
    }

    /// Reads the tensors, which have the given layout or, with `cu_seqlens_q`, the layout [tokens, heads, dim].
    pub fn read(archive: &Archive, layout: Layout) -> Result<Self> {
        Self::with_values(archive, layout, "v")
    }

    /// Like [`Request::read`], where only the weights are needed: without a tensor v, the keys are used in its stead.
    pub fn read_for_weights(archive: &Archive, layout: Layout) -> Result<Self> {
        Self::with_values(archive, layout, if archive.has("v") { "v" } else { "k" })
    }

    fn with_values(archive: &Archive, layout: Layout, v: &str) -> Result<Self> {
        let mut inputs =
            OwnedInputs::new(archive.floats("q")?.clone(), archive.floats("k")?.clone(), archive.floats(v)?.clone());
        let operands = &mut inputs.operands;
        let (mut problem, out_shape, lse_shape) = if archive.has("cu_seqlens_q") || archive.has("cu_seqlens_k") {
            packed(archive, operands, v)?
        } else {
            dense(archive, layout, v)?
        };
        problem.element = inputs.q.element();
        if archive.has("mask") {
            let shape = archive.broadcast("mask", "mask")?;
            set_mask(&mut problem, operands, shape, archive.bools("mask")?.to_vec());
        }
        if archive.has("bias") {
            let shape = archive.broadcast("bias", "bias")?;
            set_bias(&mut problem, operands, shape, archive.floats("bias")?.clone());
        }
        if archive.has("kv_lens") {
            set_key_lengths(&mut problem, operands, archive.lengths("kv_lens")?);
        }
        let f32s = |name| Ok::<_, Error>(Some(Array::Float(Floats::F32(archive.f32s(name)?.to_vec()))));
        if archive.has("alibi_slopes") {
            (problem.alibi, operands.alibi_slopes) = (true, f32s("alibi_slopes")?);
        }
        if archive.has("sinks") {
            (problem.sinks, operands.sinks) = (true, f32s("sinks")?);
        }
        Ok(Request { problem, operands: inputs, out_shape, lse_shape })
    }
}

/// A dense problem with the shapes of `out` and `lse`.
fn dense(archive: &Archive, layout: Layout, v: &str) -> Result<(Problem, Vec<usize>, Vec<usize>)> {
    let sizes = |name| -> Result<[u32; 4]> {
        let [batch, b, c, dim] = archive.sizes_of_rank(name)?;
        Ok(if layout == Layout::Bshd { [batch, c, b, dim] } else { [batch, b, c, dim] })
    };
    let [batch, heads, seq_q, head_dim] = sizes("q")?;
    let [k_batch, kv_heads, seq_kv, k_dim] = sizes("k")?;
    let [v_batch, v_heads, v_rows, value_dim] = sizes(v)?;
    if [k_batch, k_dim] != [batch, head_dim] {
        return Err(archive.wrong_shape("k", "of the same batch and head dimension as q"));
    }
    if [v_batch, v_heads, v_rows] != [batch, kv_heads, seq_kv] {
        return Err(archive.wrong_shape(v, "like k but for the last axis"));
    }
    let mut problem = Problem::new(batch, heads, seq_q, seq_kv, head_dim).with_layout(layout);
    (problem.kv_heads, problem.value_dim) = (kv_heads, value_dim);
    let mut out = archive.shape("q")?.to_vec();
    out[3] = value_dim as usize;
    Ok((problem, out, [batch, heads, seq_q].map(|n| n as usize).to_vec()))
}

/// A packed problem, tokens first, with the shapes of `out` and `lse`.
fn packed(archive: &Archive, operands: &mut Operands<Array>, v: &str) -> Result<(Problem, Vec<usize>, Vec<usize>)> {
    let [total_q, heads, head_dim] = archive.sizes_of_rank("q")?;
    let [total_kv, kv_heads, k_dim] = archive.sizes_of_rank("k")?;
    let [v_rows, v_heads, value_dim] = archive.sizes_of_rank(v)?;
    if k_dim != head_dim {
        return Err(archive.wrong_shape("k", "of the same head dimension as q"));
    }
    if [v_rows, v_heads] != [total_kv, kv_heads] {
        return Err(archive.wrong_shape(v, "like k but for the last axis"));
    }
    let bounds_q = archive.lengths("cu_seqlens_q")?;
    let bounds_kv = archive.lengths("cu_seqlens_k")?;
    // Even without any sequence there is one boundary.
    let Some(batch) = bounds_q.len().checked_sub(1) else {
        return Err(archive.wrong_shape("cu_seqlens_q", "of at least one boundary"));
    };
    // The library refuses boundaries that decrease.
    let longest = |bounds: &[u32]| bounds.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0);
    let mut problem =
        Problem::new(batch as u32, heads, longest(&bounds_q), longest(&bounds_kv), head_dim).with_layout(Layout::Bshd);
    (problem.kv_heads, problem.value_dim) = (kv_heads, value_dim);
    problem.packed = Some(Packed { total_q, total_kv });
    (operands.cu_seqlens_q, operands.cu_seqlens_kv) = (Some(Array::U32(bounds_q)), Some(Array::U32(bounds_kv)));
    let out = [total_q, heads, value_dim].map(|n| n as usize).to_vec();
    Ok((problem, out, vec![heads as usize, total_q as usize]))
}
