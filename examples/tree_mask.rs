//! Speculative decoding: a tree of drafted tokens after a prefix that all of them share, in one call with a tree mask.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example tree_mask
//! ```

use wgpu_attention::{Broadcast, Causal, Gpu, Inputs, Outputs, Problem, compare};

const PREFIX: usize = 40;
const HEADS: usize = 4;
const DIM: usize = 32;

/// Some rows of each head of a [1, heads, rows, dim] tensor.
fn select(x: &[f32], rows: &[usize]) -> Vec<f32> {
    let head = |head: &[f32]| rows.iter().flat_map(|row| head[row * DIM..][..DIM].to_vec()).collect::<Vec<f32>>();
    x.chunks_exact(x.len() / HEADS).flat_map(head).collect()
}

pub(crate) fn main() -> wgpu_attention::Result<()> {
    // ANCHOR: mask
    // The parent of each drafted token; the first follows the prefix.
    let parents = [None, Some(0), Some(0), Some(1), Some(1), Some(2), Some(5)];
    let path = |node: usize| {
        let mut path: Vec<usize> = std::iter::successors(Some(node), |&node| parents[node]).collect();
        path.reverse();
        path
    };
    // A drafted token sees the prefix, its ancestors and itself.
    let keys = PREFIX + parents.len();
    let sees = |node: usize, key: usize| key < PREFIX || path(node).contains(&(key - PREFIX));
    let mask: Vec<u8> = (0..parents.len() * keys).map(|i| u8::from(sees(i / keys, i % keys))).collect();
    let mut problem = Problem::new(1, HEADS as u32, parents.len() as u32, keys as u32, DIM as u32);
    problem.mask = Some(Broadcast([1, 1, parents.len() as u32, keys as u32]));
    // ANCHOR_END: mask

    let numbers = |n: usize, step: f32| (0..n * HEADS * DIM).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let (q, k, v) = (numbers(parents.len(), 0.37), numbers(keys, 0.11), numbers(keys, 0.23));
    let mut inputs = Inputs::new(&q, &k, &v);
    inputs.operands.mask = Some((&mask).into());
    let out = Gpu::new()?.attention(&problem, &inputs)?.out;

    // Each way from the root to a leaf gives what a causal call over that way alone gives.
    for leaf in [3, 4, 6] {
        let path = path(leaf);
        let seen: Vec<usize> = (0..PREFIX).chain(path.iter().map(|node| PREFIX + node)).collect();
        let mut alone = Problem::new(1, HEADS as u32, path.len() as u32, seen.len() as u32, DIM as u32);
        alone.causal = Causal::BottomRight;
        let [q, k, v] = [(&q, &path), (&k, &seen), (&v, &seen)].map(|(x, rows)| select(x, rows));
        let mut outputs = Outputs::default();
        outputs.out = select(&out, &path);
        assert!(compare(&alone, &Inputs::new(&q, &k, &v), &outputs)?.passed(), "the way {path:?}");
    }
    Ok(())
}
