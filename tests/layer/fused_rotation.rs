//! Which projections of a layer run at once, and where its rotary embedding runs.

use wgpu_attention::internal::kernel::Variant;
use wgpu_attention::multihead::RotaryEmbedding;
use wgpu_attention::multihead::{CacheBuffers, Call, Layer, LayerBuffers, MultiHeadAttention, PreparedLayer, Sources};
use wgpu_attention::operations::{Order, Positions, Projection, Rotation};
use wgpu_attention::{Causal, Element, Elements, Gpu, Options, Strides, reference, wgpu};

use crate::layers::{assert_close, check_layer, layer};
use crate::support::operations::submit;
use crate::support::{Random, floor, gpus, small};
use crate::{FORMS, forced, guarded, read};

/// Dispatches of projections that are rotated, and of rotations of their own.
pub fn rotated(prepared: &PreparedLayer) -> [usize; 2] {
    let count = |wanted: fn(&Variant) -> bool| prepared.steps().filter(|step| wanted(&step.variant)).count();
    let rotated = |v: &Variant| match v {
        Variant::Project(x) => x.matrix.rotated,
        Variant::ProjectLanes(x) => x.matrix.rotated,
        _ => false,
    };
    [count(rotated), count(|v| matches!(v, Variant::Rotary(_)))]
}

/// Runs a layer on two batches of odd length and two of one row, and gives what is rotated in it, and why.
fn check_turning(
    gpu: &Gpu,
    layer: &Layer,
    element: Element,
    options: &Options,
    sources: Sources,
) -> ([usize; 2], String) {
    let mut call = Call::default();
    call.sources = sources;
    let mut found = ([0, 0], String::new());
    for rows in [1, 19] {
        let mut problem = layer.problem(2, rows, if sources == Sources::Query { rows } else { 11 });
        problem.causal = Causal::TopLeft;
        check_layer(gpu, layer, &problem, &call, element, options);
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
        let prepared = resident.prepare(gpu.library(), &problem, &call, options).expect("valid");
        found = (rotated(&prepared), prepared.reasons().join("; "));
    }
    found
}

/// The keys that a layer of self-attention puts into its cache, element by element: attention would not see the columns of
/// queries and keys change places alike.
fn check_cached_keys(gpu: &Gpu, layer: &Layer, element: Element, options: &Options) {
    let (starts, rows, room, width) = ([3u32, 0], 19, 24, layer.query.inputs);
    let (kv_heads, dk, dv) = (layer.kv_heads, layer.key_dim, layer.value_dim);
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
    let mut call = Call::default();
    call.cache = true;
    let prepared = resident.prepare(gpu.library(), &layer.problem(2, rows, room), &call, options).expect("valid");
    let x = Random(47).signed_vec((2 * rows * width) as usize, 1.0);
    let nan = |n: u32| guarded(gpu, &vec![f32::NAN; n as usize]);
    let (query, result) = (guarded(gpu, &x), nan(2 * rows * layer.out.outputs));
    let (k, v) = (nan(2 * kv_heads * room * dk), nan(2 * kv_heads * room * dv));
    let starts_buffer = guarded(gpu, &starts);
    let mut buffers = LayerBuffers::new(query.slice(), result.slice());
    buffers.cache = Some(CacheBuffers { k: k.slice(), v: v.slice(), starts: starts_buffer.slice() });
    submit(gpu, |encoder| prepared.encode(encoder, &buffers).expect("valid"));
    let got: Vec<f32> = read(gpu, &k);

    let (linear, rotary) = (&layer.key, layer.rotary.expect("rotated"));
    let mut p = Projection::new(2 * rows, width, linear.outputs, linear.order, Element::F32);
    p.bias = linear.bias.as_ref().map(|_| 0);
    let keys = reference::project::<f64>(&p, &x, Elements::F32(&linear.weight), linear.bias.as_deref());
    let (keys, _) = keys.expect("valid");
    let keys: Vec<f32> = keys.into_iter().map(|x| x as f32).collect();
    let mut rotation = Rotation::new(2, kv_heads, rows, dk, rotary.positions);
    (rotation.rotary_dim, rotation.interleaved, rotation.positions) =
        (rotary.dim, rotary.interleaved, Positions::Starts);
    rotation.x =
        Strides { offset: 0, batch: (rows * kv_heads * dk).into(), head: dk.into(), row: (kv_heads * dk).into() };
    let table = Rotation::table(rotary.positions, rotary.dim, rotary.base);
    let (want, _) = reference::rotary::<f64>(&rotation, Elements::F32(&keys), &table, &starts).expect("valid");
    let line = (rows * dk) as usize;
    for (n, want) in want.chunks_exact(line).enumerate() {
        let at = (n * room as usize + starts[n / kv_heads as usize] as usize) * dk as usize;
        assert_close(&got[at..][..line], want, 2e-5, &format!("keys of batch and head {n}, {element} {options:?}"));
    }
}

#[test]
fn rotary_embedding_takes_no_pass_of_its_own_where_pairs_are_whole_vectors() {
    // Columns of a key and a value, elements that are rotated, width, order, interleaved, sources; then what rotates the rows.
    let (halves, pairs) = (false, true);
    let cases = [
        ((16, 16, 16), 20, Order::OutIn, halves, Sources::Query, [1, 0], "which saves a pass"),
        ((24, 8, 8), 20, Order::OutIn, halves, Sources::Query, [1, 0], "which saves a pass"),
        ((32, 16, 32), 20, Order::OutIn, halves, Sources::Key, [2, 0], "which saves a pass"),
        ((72, 16, 48), 36, Order::OutIn, halves, Sources::Each, [2, 0], "which saves a pass"),
        ((24, 16, 16), 20, Order::OutIn, pairs, Sources::Query, [1, 0], "which saves a pass"),
        ((24, 8, 16), 20, Order::InOut, pairs, Sources::Query, [1, 0], "which saves a pass"),
        ((40, 16, 40), 36, Order::InOut, pairs, Sources::Each, [2, 0], "which saves a pass"),
        ((16, 16, 16), 20, Order::InOut, halves, Sources::Query, [0, 1], "stand apart in [in, out] weights"),
        ((16, 16, 16), 22, Order::OutIn, halves, Sources::Query, [0, 1], "not whole vectors"),
        ((16, 16, 12), 20, Order::OutIn, pairs, Sources::Query, [0, 1], "not whole vectors"),
        ((12, 16, 8), 20, Order::OutIn, pairs, Sources::Each, [0, 2], "not whole vectors"),
    ];
    let all = [Element::F32, Element::F16, Element::Bf16];
    let elements = if small("rotary embedding in the projection with 16-bit weights") { &all[..1] } else { &all[..] };
    for gpu in gpus() {
        let floor = &floor(gpu, 128 << 10, 64);
        for (n, ((dk, dv, dim), width, order, interleaved, sources, want, why)) in cases.into_iter().enumerate() {
            let mut layer = layer(&mut Random(45 + n as u64), [6, 2, dk, dv], [width; 4], order, n % 2 == 0);
            layer.rotary = Some(RotaryEmbedding { dim, interleaved, base: 100.0, positions: 30 });
            for form in FORMS {
                for &element in elements {
                    let (found, reasons) = check_turning(gpu, &layer, element, &forced(form), sources);
                    assert!(found == want && reasons.contains(why), "{n} {form:?} {element}: {found:?}, {reasons}");
                    if sources == Sources::Query {
                        check_cached_keys(gpu, &layer, element, &forced(form));
                    }
                }
                // Four bindings do not hold table and positions.
                let (found, reasons) = check_turning(floor, &layer, Element::F32, &forced(form), sources);
                let passes = [0, want[0] + want[1]];
                assert_eq!(found, passes, "{n} {form:?} {reasons}");
                assert!(want[0] == 0 || reasons.contains("it binds 6 storage buffers, the device 4"), "{reasons}");
            }
        }
    }
}

#[test]
fn inputs_that_are_shared_are_projected_at_once() {
    let gpu = &gpus()[0];
    let projections = |sources, widths, change: &dyn Fn(&mut Layer)| {
        let mut layer = layer(&mut Random(48), [4, 2, 8, 6], widths, Order::OutIn, true);
        change(&mut layer);
        let (problem, mut call) = (layer.problem(2, 9, 9), Call::default());
        call.sources = sources;
        check_layer(gpu, &layer, &problem, &call, Element::F32, &Options::default());
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let prepared = resident.prepare(gpu.library(), &problem, &call, &Options::default()).expect("valid");
        prepared.steps().filter(|step| step.variant.stage() == "project").count()
    };
    // Each with the one of the output.
    for order in [Order::InOut, Order::OutIn] {
        let alike = |layer: &mut Layer| {
            let parts = [&mut layer.query, &mut layer.key, &mut layer.value];
            parts.into_iter().for_each(|linear| linear.order = order);
        };
        assert_eq!(projections(Sources::Query, [20; 4], &alike), 2);
        assert_eq!(projections(Sources::Key, [20; 4], &alike), 3);
        assert_eq!(projections(Sources::Key, [24, 20, 20, 20], &alike), 3);
        assert_eq!(projections(Sources::Each, [20; 4], &alike), 4);
    }
    assert_eq!(projections(Sources::Query, [20; 4], &|layer| layer.query.order = Order::InOut), 3);
    assert_eq!(projections(Sources::Key, [20; 4], &|layer| layer.value.order = Order::InOut), 4);
}

#[test]
fn projections_that_turn_are_split_under_small_limits() {
    for gpu in gpus() {
        let gpu = &gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
            limits.max_compute_workgroups_per_dimension = 3;
            limits.max_storage_buffer_binding_size = 12 << 10;
        });
        // Columns in two orders, and inputs: then the last part rotates what the others have summed.
        for (order, interleaved) in [(Order::OutIn, false), (Order::OutIn, true), (Order::InOut, true)] {
            let mut layer = layer(&mut Random(46), [4, 2, 40, 16], [68; 4], order, true);
            layer.rotary = Some(RotaryEmbedding { dim: 40, interleaved, base: 100.0, positions: 30 });
            for form in FORMS {
                let problem = layer.problem(2, 25, 25);
                check_layer(gpu, &layer, &problem, &Call::default(), Element::F32, &forced(form));
                let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
                let prepared = resident.prepare(gpu.library(), &problem, &Call::default(), &forced(form));
                let [rotated, apart] = rotated(&prepared.expect("valid"));
                assert!(rotated > 5 && apart == 0, "{rotated} {apart}");
            }
        }
    }
}
