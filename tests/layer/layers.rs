//! Layers against their reference.

use wgpu_attention::multihead::RotaryEmbedding;
use wgpu_attention::multihead::{Call, Layer, LayerBuffers, LayerInputs, Linear, MultiHeadAttention, Sources, Weights};
use wgpu_attention::operations::Order;
use wgpu_attention::{Bias, Broadcast, Causal, Element, Gpu, Options, Problem, Window, reference, wgpu, with};

use crate::support::operations::take_turns;
use crate::support::staged::Guarded;
use crate::support::{Data, Random, floor, gpus, small};
use crate::{FORMS, forced, guarded};

fn linear(r: &mut Random, inputs: u32, outputs: u32, order: Order, bias: bool) -> Linear {
    let size = 1.5 / (inputs as f32).sqrt();
    let weight = r.signed_vec((inputs * outputs) as usize, size);
    // Rounded to eight bits, so that f16 or bf16 on the GPU and f32 in the reference are the same weights.
    let weight = weight.into_iter().map(|x| half::bf16::from_f32(half::f16::from_f32(x).to_f32()).to_f32()).collect();
    Linear { inputs, outputs, weight, order, bias: bias.then(|| r.signed_vec(outputs as usize, 0.5)) }
}

/// Heads, key/value heads, columns of a key and a value, width of query, key, value and output.
pub fn layer(r: &mut Random, [heads, kv_heads, dk, dv]: [u32; 4], widths: [u32; 4], order: Order, bias: bool) -> Layer {
    let parts = [
        linear(r, widths[0], heads * dk, order, bias),
        linear(r, widths[1], kv_heads * dk, order, bias),
        linear(r, widths[2], kv_heads * dv, order, bias),
        linear(r, heads * dv, widths[3], order, bias),
    ];
    Layer::new(heads, kv_heads, parts).expect("valid")
}

/// Within what the published cases of this layer allow a plain f32 evaluation.
pub fn assert_close(got: &[f32], want: &[f64], atol: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= atol * size, "{what}: element {i} is {got}, want {want}");
    }
}

/// Runs a layer and its reference on random inputs and operands.
pub fn check_layer(gpu: &Gpu, layer: &Layer, problem: &Problem, call: &Call, element: Element, options: &Options) {
    let mut r = Random(77);
    let mut input = |seq: u32, width: u32| r.signed_vec((problem.batch * seq * width) as usize, 1.0);
    let query = input(problem.seq_q, layer.query.inputs);
    let (key, value) = (input(problem.seq_kv, layer.key.inputs), input(problem.seq_kv, layer.value.inputs));
    let data = Data::random(problem, 5, 1.0);
    let inputs = with!(LayerInputs::new(&query), key: (call.sources != Sources::Query).then_some(&key), value: (call.sources == Sources::Each).then_some(&value), operands: data.inputs().operands);
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
    let got =
        resident.forward_with(gpu, problem, call, &inputs, options).unwrap_or_else(|e| panic!("{e}\n{problem:?}"));
    let want = reference::layer::<f64>(layer, problem, call, &inputs).expect("valid");
    let what = format!("{} {call:?} {problem:?} {options:?}", gpu.info().name);
    assert_close(&got.out, &want.out, 2e-5, &what);
    assert_eq!(got.weights.is_some(), want.weights.is_some());
    if let (Some(got), Some(want)) = (&got.weights, &want.weights) {
        assert_close(got, want, 5e-6, &format!("weights, {what}"));
    }
    let found = reference::compare_layer(layer, problem, call, &inputs, &got).expect("outputs of the call");
    assert!(found.passed(), "{what}\n{found}");
}

#[test]
fn layers_match() {
    for gpu in gpus() {
        let mut r = Random(40);
        for round in 0..if small("24 of the 36 random layers") { 12 } else { 36 } {
            let sources = [Sources::Query, Sources::Key, Sources::Each][round % 3];
            let (heads, kv_heads) = [(4, 4), (6, 2), (3, 1), (1, 1)][r.below(4) as usize];
            let (dk, dv) = [(8, 8), (16, 12), (10, 7), (6, 6)][r.below(4) as usize];
            let wide = 20 + r.below(30);
            let widths = match sources {
                Sources::Query => [wide, wide, wide, 24],
                Sources::Key => [wide, 28, 28, 36],
                Sources::Each => [wide, 20, 27, 25],
            };
            let order = [Order::InOut, Order::OutIn][r.below(2) as usize];
            let mut layer = layer(&mut r, [heads, kv_heads, dk, dv], widths, order, r_bool(round / 2));
            let (seq_q, other) = (1 + r.below(20), 1 + r.below(30));
            let seq_kv = if sources == Sources::Query { seq_q } else { other };
            let mut problem = layer.problem(1 + r.below(3), seq_q, seq_kv);
            layer.rotary = r_bool(r.below(2) as usize).then_some(RotaryEmbedding {
                dim: dk - dk % 4,
                interleaved: r_bool(round),
                base: 100.0,
                positions: 64,
            });
            layer.zero_attn = r.below(3) == 0;
            if r.below(3) == 0 {
                layer.bias_kv =
                    Some((r.signed_vec((kv_heads * dk) as usize, 1.0), r.signed_vec((kv_heads * dv) as usize, 1.0)));
            }
            problem.mask = (r.below(2) == 0).then_some(Broadcast([problem.batch, 1, seq_q, seq_kv]));
            problem.bias =
                (r.below(2) == 0).then_some(Bias { shape: Broadcast([1, heads, 1, seq_kv]), element: Element::F32 });
            let rules = [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset];
            problem.causal = rules[r.below(4) as usize];
            problem.key_lengths = r.below(3) == 0;
            if r.below(3) == 0 {
                problem.window = Window { left: Some(r.below(9)), right: (r.below(2) == 0).then(|| r.below(5)) };
            }
            problem.alibi = r.below(3) == 0;
            problem.sinks = !layer.zero_attn && r.below(2) == 0;
            problem.softcap = (layer.bias_kv.is_none() && r.below(3) == 0).then_some(1.5);
            problem.scale = (r.below(3) == 0).then_some(0.6);
            let mut call = Call::default();
            call.sources = sources;
            call.seq_first = r.below(2) == 0;
            call.weights = [None, Some(Weights::Heads), Some(Weights::Mean)][r.below(3) as usize];
            let element = [Element::F32, Element::F16, Element::Bf16][r.below(3) as usize];
            check_layer(gpu, &layer, &problem, &call, element, &forced(FORMS[round % 2]));
        }
    }
}

/// A key that every row sees and the ordinary key have scores far apart; the value of the lighter one makes up for its weight.
#[test]
fn an_extra_key_keeps_its_weight_however_light_or_heavy_it_is() {
    let dim = 4;
    let identity = |size: f32| Linear {
        inputs: dim,
        outputs: dim,
        weight: (0..dim * dim).map(|n| if n % (dim + 1) == 0 { size } else { 0.0 }).collect(),
        order: Order::InOut,
        bias: None,
    };
    for gpu in gpus() {
        for distance in [-60.0, -30.0, -9.0, 9.0, 30.0, 60.0] {
            // The value of the lighter of the two is as large as its weight is small.
            let (ordinary, added) = if distance > 0.0 { (f32::exp(distance), 1.0) } else { (1.0, f32::exp(-distance)) };
            let mut layer = Layer::new(1, 1, [1.0, 1.0, ordinary, 1.0].map(identity)).expect("valid");
            layer.bias_kv = Some((vec![distance, 0.0, 0.0, 0.0], vec![added; dim as usize]));
            let mut problem = layer.problem(1, 1, 1);
            problem.scale = Some(1.0);
            // q·k is 0 for the ordinary key and `distance` for the other.
            let (query, key, value) = (vec![1.0, 0.0, 0.0, 0.0], vec![0.0; 4], vec![1.0; 4]);
            let inputs = with!(LayerInputs::new(&query), key: Some(&key), value: Some(&value));
            let mut call = Call::default();
            call.sources = Sources::Each;
            let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
            let got = resident.forward_with(gpu, &problem, &call, &inputs, &Options::default()).expect("valid").out;
            // One of the two weighs 1 to all digits, the other e^−|distance|, and both shares are 1.
            for x in got {
                assert!((f64::from(x) - 2.0).abs() < 1e-3, "{x} for scores {distance} apart on {}", gpu.info().name);
            }
        }
    }
}

#[test]
fn calls_of_one_layer_take_turns() {
    let mut r = Random(46);
    let mut layer = layer(&mut r, [4, 2, 8, 8], [24; 4], Order::OutIn, true);
    layer.bias_kv = Some((r.signed_vec(16, 1.0), r.signed_vec(16, 1.0)));
    let problem = layer.problem(2, 19, 19);
    let mut call = Call::default();
    call.weights = Some(Weights::Mean);
    for gpu in gpus() {
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
        let prepared = resident.prepare(gpu.library(), &problem, &call, &options).expect("valid");
        assert!(prepared.slices() > 5);
        let stage = |seed| {
            let x = Random(seed).signed_vec(2 * 19 * 24, 1.0);
            [guarded(gpu, &x), guarded(gpu, &[f32::NAN; 2 * 19 * 24]), guarded(gpu, &[f32::NAN; 2 * 19 * 20])]
        };
        type Staged = [Guarded; 3];
        fn buffers(staged: &Staged) -> LayerBuffers<'_> {
            let mut buffers = LayerBuffers::new(staged[0].slice(), staged[1].slice());
            buffers.weights = Some(staged[2].slice());
            buffers
        }
        let read = |staged: &Staged| [1, 2].map(|n| staged[n].read(gpu.device(), gpu.queue()));
        let calls = [(); 2].map(|()| prepared.begin().expect("fits"));
        let record = calls.each_ref().map(|call| {
            move |slice, encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
                call.encode_slice(slice, encoder, &buffers(staged)).expect("valid");
            }
        });
        let whole = |encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
            prepared.encode(encoder, &buffers(staged)).expect("valid");
        };
        let left = take_turns(gpu, prepared.slices(), &stage, &read, &whole, [&record[0], &record[1]]);
        let finite = |bytes: &[u8]| bytemuck::pod_collect_to_vec::<_, f32>(bytes).iter().all(|x| x.is_finite());
        assert!(left.iter().flatten().all(|bytes| finite(bytes)) && left[0] != left[1]);
    }
}

#[test]
fn layers_without_a_batch_a_query_or_a_key_match() {
    for gpu in gpus() {
        for [batch, seq_q, seq_kv] in [[0, 5, 7], [2, 0, 7], [2, 5, 0], [2, 0, 0], [0, 0, 0]] {
            for (n, which) in [None, Some(Weights::Heads), Some(Weights::Mean)].into_iter().enumerate() {
                for (added, zero_attn) in [(false, false), (true, false), (false, true), (true, true)] {
                    let r = &mut Random(50 + n as u64);
                    let mut layer = layer(r, [4, 2, 8, 8], [24, 20, 20, 12], Order::OutIn, true);
                    layer.zero_attn = zero_attn;
                    layer.bias_kv = added.then(|| (r.signed_vec(16, 1.0), r.signed_vec(16, 1.0)));
                    layer.rotary =
                        (n == 1).then_some(RotaryEmbedding { dim: 8, interleaved: false, base: 100.0, positions: 9 });
                    let mut call = Call::default();
                    (call.sources, call.seq_first, call.weights) = (Sources::Key, n == 2, which);
                    let mut problem = layer.problem(batch, seq_q, seq_kv);
                    problem.mask = (n == 1).then_some(Broadcast([batch, 1, seq_q, seq_kv]));
                    problem.key_lengths = n == 2;
                    check_layer(gpu, &layer, &problem, &call, Element::F32, &forced(FORMS[n % 2]));
                }
            }
        }
    }
}

/// The outputs of a row that sees only what the layer adds, by hand: the added value alone, half of it beside a zero key of the
/// same score, or nothing but the output's bias.
#[test]
fn without_a_key_a_layer_sees_what_it_adds() {
    let linear = |weight: f32, bias: f32| Linear {
        inputs: 1,
        outputs: 1,
        weight: vec![weight],
        order: Order::OutIn,
        bias: Some(vec![bias]),
    };
    let parts = [linear(0.0, 0.0), linear(1.0, 0.0), linear(1.0, 0.0), linear(2.0, 0.5)];
    let mut layer = Layer::new(1, 1, parts).expect("valid");
    let mut call = Call::default();
    (call.sources, call.weights) = (Sources::Key, Some(Weights::Mean));
    for gpu in gpus() {
        for (added, zero_attn, out, weights) in [
            (false, false, 0.5, vec![]),
            (true, false, 8.5, vec![1.0]),
            (false, true, 0.5, vec![1.0]),
            (true, true, 4.5, vec![0.5, 0.5]),
        ] {
            (layer.bias_kv, layer.zero_attn) = (added.then(|| (vec![3.0], vec![4.0])), zero_attn);
            let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
            let options = Options::default();
            let prepared = resident.prepare(gpu.library(), &layer.problem(1, 1, 0), &call, &options).expect("valid");
            // wgpu would take an empty binding for the rest of the buffer.
            assert!(prepared.steps().flat_map(|step| &step.bindings).all(|bound| bound.size > 0));
            let inputs = with!(LayerInputs::new(&[7.0]), key: Some(&[]));
            let got = resident.forward(gpu, &layer.problem(1, 1, 0), &call, &inputs).expect("runs");
            let close = |got: &[f32], want: &[f32]| {
                got.len() == want.len() && got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6)
            };
            assert!(close(&got.out, &[out]) && close(&got.weights.clone().expect("asked for"), &weights), "{got:?}");
        }
    }
}

fn r_bool(n: usize) -> bool {
    n.is_multiple_of(2)
}

#[test]
fn layers_run_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 16 << 10, 3);
        for order in [Order::InOut, Order::OutIn] {
            let mut layer = layer(&mut Random(41), [4, 2, 16, 16], [80; 4], order, true);
            layer.zero_attn = true;
            let mut call = Call::default();
            call.weights = Some(Weights::Mean);
            let problem = layer.problem(2, 30, 30);
            check_layer(gpu, &layer, &problem, &call, Element::F32, &Options::default());
        }
    }
}
