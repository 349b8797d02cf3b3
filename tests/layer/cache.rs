//! Layers with a key/value cache.

use wgpu_attention::multihead::RotaryEmbedding;
use wgpu_attention::multihead::{CacheBuffers, Call, LayerBuffers, LayerInputs, MultiHeadAttention};
use wgpu_attention::operations::Order;
use wgpu_attention::{Causal, Element, Error, Options, reference};

use crate::fused_rotation::rotated;
use crate::layers::{assert_close, layer};
use crate::support::operations::{nothing, submit};
use crate::support::{Random, gpus};
use crate::{guarded, read};

/// Prompts of different lengths into the cache, then token by token; each output as if everything had been given at once.
#[test]
fn decoding_with_a_cache_matches_whole_sequences() {
    // One projection for query, key and value together, and one for each; columns of a value and those of a key that are rotated, and
    // whether that is in the projection.
    let kinds = [(true, 6, 4, [0, 1]), (false, 6, 4, [0, 2]), (true, 8, 8, [1, 0]), (false, 8, 8, [2, 0])];
    for (gpu, (alike, dv, dim, rotations)) in gpus().iter().flat_map(|gpu| kinds.map(|kind| (gpu, kind))) {
        let (lengths, room, width, new) = ([5u32, 2, 7], 12u32, 20u32, 3u32);
        let mut layer = layer(&mut Random(42), [4, 2, 8, dv], [width; 4], Order::OutIn, true);
        if !alike {
            // The same numbers as the weights of another matrix: three matrices that cannot be one.
            layer.value.order = Order::InOut;
        }
        layer.rotary = Some(RotaryEmbedding { dim, interleaved: false, base: 100.0, positions: 32 });
        let mut r = Random(43);
        let sequences: Vec<Vec<f32>> =
            lengths.iter().map(|n| r.signed_vec(((n + new) * width) as usize, 1.0)).collect();
        let mut causal = Call::default();
        let whole: Vec<Vec<f64>> = (sequences.iter().zip(lengths))
            .map(|(x, n)| {
                let mut problem = layer.problem(1, n + new, n + new);
                problem.causal = Causal::TopLeft;
                let inputs = LayerInputs::new(x);
                reference::layer::<f64>(&layer, &problem, &causal, &inputs).expect("valid").out
            })
            .collect();
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        causal.cache = true;
        let nan = |n: u32| guarded(gpu, &vec![f32::NAN; n as usize]);
        let (k, v) = (nan(3 * 2 * room * 8), nan(3 * 2 * room * dv));
        let mut have = [0u32; 3];
        // The prompt padded to 7 rows, of which only the first count; then one row a step.
        for step in 0..=new {
            let rows = if step == 0 { 7 } else { 1 };
            let prepared = resident
                .prepare(gpu.library(), &layer.problem(3, rows, room), &causal, &Options::default())
                .expect("valid");
            assert_eq!(rotated(&prepared), rotations, "{:?}", prepared.reasons());
            let mut x = vec![0.5f32; (3 * rows * width) as usize];
            for (b, sequence) in sequences.iter().enumerate() {
                let n = (if step == 0 { lengths[b] } else { 1 } * width) as usize;
                let at = (have[b] * width) as usize;
                x[b * (rows * width) as usize..][..n].copy_from_slice(&sequence[at..at + n]);
            }
            let (x, y, starts) = (guarded(gpu, &x), nan(3 * rows * width), guarded(gpu, &have));
            let mut buffers = LayerBuffers::new(x.slice(), y.slice());
            buffers.cache = Some(CacheBuffers { k: k.slice(), v: v.slice(), starts: starts.slice() });
            submit(gpu, |encoder| prepared.encode(encoder, &buffers).expect("valid"));
            let got: Vec<f32> = read(gpu, &y);
            for b in 0..3 {
                let n = if step == 0 { lengths[b] } else { 1 };
                let (at, count) = ((have[b] * width) as usize, (n * width) as usize);
                let got = &got[b * (rows * width) as usize..][..count];
                assert_close(got, &whole[b][at..at + count], 2e-5, &format!("batch {b} step {step}"));
                have[b] += n;
            }
        }
    }
}

/// A cache without a batch, without room, and of a call without a new row: nothing changes, and what cannot be bound may be given.
#[test]
fn caches_of_layers_may_be_empty_too() {
    for gpu in gpus() {
        let layer = layer(&mut Random(51), [4, 2, 8, 8], [24; 4], Order::OutIn, true);
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let mut call = Call::default();
        call.cache = true;
        for [batch, rows, room] in [[0, 3, 6], [2, 0, 6], [2, 0, 0]] {
            let problem = layer.problem(batch, rows, room);
            let prepared = resident.prepare(gpu.library(), &problem, &call, &Options::default()).expect("valid");
            assert_eq!(prepared.slices(), 0);
            let none = nothing(gpu);
            let [filled, v] = [(); 2].map(|()| guarded(gpu, &[1u8; 2 * 2 * 6 * 8 * 4]));
            let starts = guarded(gpu, &[0u32; 2]);
            let (query, result) = (guarded(gpu, &[1u8; 16]), guarded(gpu, &[2u8; 16]));
            let mut buffers = LayerBuffers::new(query.slice(), result.slice());
            let k = if batch * room == 0 { none.slice(..) } else { filled.slice() };
            let starts = if batch == 0 { none.slice(..) } else { starts.slice() };
            buffers.cache = Some(CacheBuffers { k, v: v.slice(), starts });
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            prepared.encode(&mut encoder, &buffers).expect("valid");
            let none = Error::TooLarge { field: "slice, counted from 1,", value: 1, limit: 0 };
            assert_eq!(prepared.begin().unwrap().encode_slice(0, &mut encoder, &buffers), Err(none));
            // A plan without a dispatch looks at what is given all the same.
            buffers.cache = None;
            assert_eq!(prepared.encode(&mut encoder, &buffers), Err(Error::Missing { field: "cache" }));
            gpu.queue().submit([encoder.finish()]);
            gpu.wait().expect("nothing ran");
            assert_eq!(read::<u8>(gpu, &filled), [1; 2 * 2 * 6 * 8 * 4]);
            assert_eq!(read::<u8>(gpu, &result), [2; 16]);
        }
    }
}
