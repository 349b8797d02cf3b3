//! A decoding loop of 32 tokens in one submission. The caches and the lengths of the sequences stay on the GPU.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example decoding
//! ```

use wgpu_attention::operations::{Advance, AdvanceBuffers, Append, AppendBuffers};
use wgpu_attention::wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_attention::{Buffers, Gpu, Inputs, Options, Outputs, Problem, compare, reference, wgpu};

pub(crate) fn main() -> wgpu_attention::Result<()> {
    let (gpu, options) = (Gpu::new()?, Options::default());
    // ANCHOR: prepare
    // Two sequences, four query heads, one query at a time; caches with room for 64 keys of 32 elements in two heads.
    let mut problem = Problem::new(2, 4, 1, 64, 32);
    (problem.kv_heads, problem.key_lengths) = (2, true);
    let (append, advance) = (Append::new(2, 2, 1, 64, 32), Advance::new(2, 1, 64));
    let attention = gpu.library().prepare(&gpu.plan(&problem)?)?;
    let (appending, advancing) = (gpu.library().append(&append, &options)?, gpu.library().advance(&advance, &options)?);
    // ANCHOR_END: prepare
    // Stands for what a model computes: queries, keys and values of each token; and caches of prompts with 5 and 9 keys.
    let numbers = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let (q, new_k, new_v) = (numbers(32 * 256, 0.37), numbers(32 * 128, 0.11), numbers(32 * 128, 0.23));
    let (mut k, mut v, mut lengths) = (numbers(2 * 2 * 64 * 32, 0.7), numbers(2 * 2 * 64 * 32, 0.9), vec![5u32, 9]);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer =
        |contents: &[u8]| gpu.device().create_buffer_init(&BufferInitDescriptor { label: None, contents, usage });
    let [queries, k_rows, v_rows, k_cache, v_cache, out] =
        [&q, &new_k, &new_v, &k, &v, &vec![f32::NAN; q.len()]].map(|numbers| buffer(bytemuck::cast_slice(numbers)));
    let counts = buffer(bytemuck::cast_slice(&lengths));
    // ANCHOR: record
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    for token in 0..32 {
        let [many, few] = [1024, 512].map(|bytes| token * bytes..(token + 1) * bytes); // of queries, of keys
        let (lengths, keys, values) = (counts.slice(..), k_cache.slice(..), v_cache.slice(..));
        appending.encode(&mut encoder, &AppendBuffers::new(k_rows.slice(few.clone()), keys, lengths))?;
        appending.encode(&mut encoder, &AppendBuffers::new(v_rows.slice(few), values, lengths))?;
        advancing.encode(&mut encoder, &AdvanceBuffers::new(lengths))?;
        let mut buffers = Buffers::new(queries.slice(many.clone()), keys, values, out.slice(many));
        buffers.operands.key_lengths = Some(lengths);
        attention.encode(&mut encoder, &buffers)?;
    }
    gpu.queue().submit([encoder.finish()]);
    // ANCHOR_END: record

    // The same on the host, token by token: every output is compared with the reference.
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.read(out.slice(..))?);
    for token in 0..32 {
        reference::append(&append, &new_k[token * 128..][..128], &mut k, &lengths, None)?;
        reference::append(&append, &new_v[token * 128..][..128], &mut v, &lengths, None)?;
        reference::advance(&advance, &mut lengths, None)?;
        let mut inputs = Inputs::new(&q[token * 256..][..256], &k, &v);
        inputs.operands.key_lengths = Some((&lengths).into());
        let mut outputs = Outputs::default();
        outputs.out = got[token * 256..][..256].to_vec();
        assert!(compare(&problem, &inputs, &outputs)?.passed(), "token {token}");
    }
    Ok(())
}
