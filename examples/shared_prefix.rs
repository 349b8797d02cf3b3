//! A prefix that the sequences of a batch share, in two ways: by pages that all block tables name, and by one call for the
//! prefix, one for the suffixes, and a merge of both.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example shared_prefix
//! ```

use wgpu_attention::operations::Merge;
use wgpu_attention::{Gpu, Inputs, Outputs, Paged, Problem, compare};

pub(crate) fn main() -> wgpu_attention::Result<()> {
    let gpu = Gpu::new()?;
    let numbers = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    // A pool of five pages of 16 keys, in one key/value head of 32 elements; three sequences with a query in each of 4 heads.
    let (q, k, v) = (numbers(3 * 4 * 32, 0.37), numbers(5 * 16 * 32, 0.11), numbers(5 * 16 * 32, 0.23));

    // ANCHOR: pages
    // Pages 0 and 1 hold the prefix; each sequence goes on in a page of its own.
    let mut whole = Problem::new(3, 4, 1, 3 * 16, 32);
    (whole.kv_heads, whole.key_lengths) = (1, true);
    whole.paged = Some(Paged { pages: 5, page_size: 16 });
    let (table, lengths) = ([0, 1, 2, /* second */ 0, 1, 3, /* third */ 0, 1, 4u32], [32 + 7, 32 + 16, 32 + 1u32]);
    let mut inputs = Inputs::new(&q, &k, &v);
    inputs.operands.block_table = Some((&table).into());
    inputs.operands.key_lengths = Some((&lengths).into());
    let by_pages = gpu.attention(&whole, &inputs)?;
    assert!(compare(&whole, &inputs, &by_pages)?.passed());
    // ANCHOR_END: pages

    // ANCHOR: parts
    // The prefix is read once: the heads of all sequences are heads of one batch that shares its key/value head.
    let mut prefix = Problem::new(1, 3 * 4, 1, 32, 32);
    (prefix.kv_heads, prefix.lse) = (1, true);
    let first = gpu.attention(&prefix, &Inputs::new(&q, &k[..32 * 32], &v[..32 * 32]))?;
    // The suffixes, one page for each sequence.
    let mut suffix = Problem::new(3, 4, 1, 16, 32);
    (suffix.kv_heads, suffix.key_lengths, suffix.lse) = (1, true, true);
    let mut own = Inputs::new(&q, &k[32 * 32..], &v[32 * 32..]);
    own.operands.key_lengths = Some((&[7, 16, 1u32]).into());
    let second = gpu.attention(&suffix, &own)?;
    // ANCHOR_END: parts

    // ANCHOR: merge
    let [out, lse] = [[first.out, second.out].concat(), [first.lse, second.lse].map(Option::unwrap).concat()];
    let mut merged = Outputs::default();
    merged.out = gpu.merge(&Merge::new(2, 3, 4, 1, 32), &out, &lse, None)?.out;
    assert!(compare(&whole, &inputs, &merged)?.passed());
    // ANCHOR_END: merge
    Ok(())
}
