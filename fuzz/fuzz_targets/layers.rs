//! The loaders of layers, on any bytes: each gives a layer that the library takes, or an error.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use wgpu_attention::load;
use wgpu_attention::multihead::Layer;
use wgpu_attention_fuzz::mutate_safetensors;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate_safetensors(data, size, max_size, seed)
});

fuzz_target!(|data: &[u8]| {
    // The heads are a caller's, not the file's; the last byte of the data chooses them.
    let last = data.last().copied().unwrap_or_default();
    let (heads, kv_heads) = (u32::from(last & 7), u32::from(last >> 3 & 7));
    // Case files name their weights so.
    for prefix in ["", "w."] {
        let layers = [
            load::pytorch(data, prefix, heads),
            load::keras(data, prefix),
            load::tensorflow_tutorial(data, prefix, heads),
            load::bert(data, prefix, heads),
            load::llama(data, prefix, heads, kv_heads),
        ];
        layers.iter().flatten().for_each(check);
    }
});

fn check(layer: &Layer) {
    layer.check().expect("a loader gives out what the library takes");
    for linear in [&layer.query, &layer.key, &layer.value, &layer.out] {
        assert_eq!(linear.weight.len() as u64, u64::from(linear.inputs) * u64::from(linear.outputs));
        assert!(linear.bias.as_ref().is_none_or(|bias| bias.len() == linear.outputs as usize));
    }
    if let Some((key, value)) = &layer.bias_kv {
        assert_eq!((key.len(), value.len()), (layer.key.outputs as usize, layer.value.outputs as usize));
    }
}
