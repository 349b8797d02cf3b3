//! Host slices in, host vectors out: the shortest way to attention on a GPU.
//!
//! Two sequences of different lengths; eight query heads share two key/value heads.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example slices
//! ```

use wgpu_attention::{Causal, Gpu, Inputs, Problem};

pub(crate) fn main() -> wgpu_attention::Result<()> {
    // ANCHOR: problem
    let mut problem = Problem::new(2, 8, 5, 9, 64); // batch, heads, seq_q, seq_kv, head_dim
    problem.kv_heads = 2;
    problem.key_lengths = true; // there is a number of keys for each batch
    problem.causal = Causal::BottomRight; // the last query stands at the last key
    problem.lse = true; // give out the log-sum-exp of each row, too
    // ANCHOR_END: problem

    // ANCHOR: call
    let numbers = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
    let (q, k, v) = (numbers(2 * 8 * 5 * 64), numbers(2 * 2 * 9 * 64), numbers(2 * 2 * 9 * 64));
    let lengths = [9u32, 5];
    let mut inputs = Inputs::new(&q, &k, &v);
    inputs.operands.key_lengths = Some((&lengths).into());

    let gpu = Gpu::new()?; // once: it keeps the device and the compiled pipelines
    let outputs = gpu.attention(&problem, &inputs)?;
    println!("{}: {} numbers", gpu.info().name, outputs.out.len());
    // ANCHOR_END: call

    // The second sequence has five queries and five keys. Its first query sees the first key only, so that its output in every
    // head is the first value of the key/value head: four query heads have the first one.
    let [second, second_v] = [8 * 5 * 64, 2 * 9 * 64];
    for head in 0..8 {
        let out = &outputs.out[second + head * 5 * 64..][..64];
        let value = &v[second_v + head / 4 * 9 * 64..][..64];
        assert!(out.iter().zip(value).all(|(got, want)| (got - want).abs() < 1e-6), "head {head}");
    }
    assert_eq!(outputs.lse.map(|lse| lse.len()), Some(2 * 8 * 5));
    Ok(())
}
