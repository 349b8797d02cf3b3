//! A multi-head attention layer with the weights of PyTorch, read from a safetensors file: projections, heads, attention and
//! output projection on the GPU.
//!
//! The file is a test case of this repository. Beside the weights of a `torch.nn.MultiheadAttention` it holds an input and
//! what PyTorch computed from it.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --features safetensors --example layer_from_file
//! ```

use safetensors::SafeTensors;
use wgpu_attention::multihead::{Call, LayerInputs, MultiHeadAttention};
use wgpu_attention::{Element, Gpu, load, reference};

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    // ANCHOR: load
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases/mha/mha_self_basic.safetensors");
    let file = std::fs::read(path)?;
    let layer = load::pytorch(&file, "w.", 4)?; // the prefix of the names of its tensors, and its heads
    // ANCHOR_END: load

    let tensors = SafeTensors::deserialize(&file)?;
    let read = |name: &str| tensors.tensor(name).map(|tensor| bytemuck::pod_collect_to_vec::<u8, f32>(tensor.data()));
    let (query, by_pytorch) = (read("query")?, read("out")?);

    // ANCHOR: forward
    let gpu = Gpu::new()?;
    // Uploads the weights, as f32 or 16-bit.
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32)?;
    let problem = layer.problem(2, 7, 7); // batch, seq_q, seq_kv: set masks and causal rules here
    let mut call = Call::default(); // self-attention
    call.seq_first = true; // [seq, batch, width], as PyTorch has it without `batch_first`
    let inputs = LayerInputs::new(&query);
    let outputs = resident.forward(&gpu, &problem, &call, &inputs)?;
    // ANCHOR_END: forward

    let comparisons = reference::compare_layer(&layer, &problem, &call, &inputs, &outputs)?;
    print!("{comparisons}");
    assert!(comparisons.passed());
    let farthest = outputs.out.iter().zip(&by_pytorch).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
    println!("largest difference from PyTorch: {farthest:e}");
    assert!(farthest <= 3.96e-5, "the file allows 3.96e-5");
    Ok(())
}
