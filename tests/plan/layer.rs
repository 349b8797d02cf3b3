//! Plans of layers: every binding lies inside its buffer, nothing is read before it is written, and nothing is written twice that is
//! not meant to be.

use std::collections::HashMap;
use std::ops::Range;

use proptest::prelude::*;
use wgpu_attention::internal::kernel::{Slot, Variant};
use wgpu_attention::internal::{Bound, Step};
use wgpu_attention::multihead::RotaryEmbedding;
use wgpu_attention::multihead::{Call, Layer, LayerPlan, Linear, Sources, Weights};
use wgpu_attention::operations::Order;
use wgpu_attention::{Broadcast, Caps, Causal, Element, Error, Kernel, Options, Problem, with};

use crate::strategy::{caps, options};
use crate::{gpu, within_limits};

#[derive(Clone, Debug)]
struct Case {
    layer: Layer,
    problem: Problem,
    call: Call,
    element: Element,
}

fn linear(inputs: u32, outputs: u32, order: Order, biased: bool) -> Linear {
    let bias = biased.then(|| vec![0.0; outputs as usize]);
    Linear { inputs, outputs, weight: vec![0.0; (inputs * outputs) as usize], order, bias }
}

prop_compose! {
    fn cases()(
        (heads, kv_heads) in prop::sample::select(vec![(4u32, 4u32), (6, 2), (3, 1), (1, 1)]),
        (key_dim, value_dim) in prop::sample::select(vec![(8u32, 8u32), (16, 12), (10, 7), (40, 16)]),
        sources in prop::sample::select(vec![Sources::Query, Sources::Key, Sources::Each]),
        (wide, key_width, value_width) in (prop::sample::select(vec![24u32, 64, 21]), 20u32..24, 20u32..24),
        (order, other, odd, biases) in (any::<bool>(), any::<bool>(), 0usize..9, any::<[bool; 4]>()),
        rotary in proptest::option::of(any::<bool>()),
        (added, zero_attn, cache, seq_first, mask) in any::<(bool, bool, bool, bool, bool)>(),
        weights in prop::sample::select(vec![None, Some(Weights::Heads), Some(Weights::Mean)]),
        (batch, seq_q, seq_kv) in (0u32..4, 0u32..40, 0u32..70),
        element in prop::sample::select(vec![Element::F32, Element::F16, Element::Bf16]),
    ) -> Case {
        let [order, other] = [order, other].map(|out_in| if out_in { Order::OutIn } else { Order::InOut });
        let widths = match sources {
            Sources::Query => [wide; 3],
            Sources::Key => [wide, key_width, key_width],
            Sources::Each => [wide, key_width, value_width],
        };
        let inputs = [widths[0], widths[1], widths[2], heads * value_dim];
        let outputs = [heads * key_dim, kv_heads * key_dim, kv_heads * value_dim, 25];
        let maps = [0, 1, 2, 3]
            .map(|n| linear(inputs[n], outputs[n], if n == odd { other } else { order }, biases[n]));
        let mut layer = Layer::new(heads, kv_heads, maps).unwrap();
        let dim = key_dim / 4 * 4;
        layer.rotary = rotary.map(|interleaved| RotaryEmbedding { dim, interleaved, base: 100.0, positions: 128 });
        layer.zero_attn = zero_attn;
        let mut call = Call::default();
        (call.sources, call.seq_first, call.weights) = (sources, seq_first, weights);
        call.cache = cache && sources == Sources::Query;
        let zeros = |n: usize| vec![0.0; outputs[n] as usize];
        layer.bias_kv = (added && !call.cache).then(|| (zeros(1), zeros(2)));
        let seq_kv = match (sources, call.cache) {
            (Sources::Query, false) => seq_q,
            (_, true) => seq_q + seq_kv,
            _ => seq_kv,
        };
        let mut problem = layer.problem(batch, seq_q, seq_kv);
        problem.mask = mask.then_some(Broadcast([batch, 1, seq_q, seq_kv]));
        Case { layer, problem, call, element }
    }
}

/// The plan, unless the device or the options refuse it.
fn plan(case: &Case, caps: &Caps, options: &Options) -> Option<LayerPlan> {
    match LayerPlan::new(&case.layer, case.element, &case.problem, &case.call, caps, options) {
        Ok(plan) => Some(plan),
        Err(Error::TooLarge { value, limit, .. }) if value > limit => None,
        Err(Error::Room { size, limit, .. }) if size > limit => None,
        Err(Error::Kernel { kernel: "unfused", .. }) if options.form.is_some() => None,
        Err(Error::Kernel { kernel: "native f16", .. }) if options.native_f16 == Some(true) => None,
        Err(Error::Kernel { kernel, .. }) if options.kernel.is_some_and(|forced| forced.name() == kernel) => None,
        Err(error) => panic!("{error}\n{case:?}\n{caps:?}"),
    }
}

/// Bytes of each buffer that a layer binds around attention, by the layer's own sizes.
struct Sizes(HashMap<Slot, u64>);

impl Sizes {
    fn new(case: &Case, plan: &LayerPlan) -> Self {
        let Case { layer, problem, call, element } = case;
        let [batch, seq_q, seq_kv] = [problem.batch, problem.seq_q, problem.seq_kv].map(u64::from);
        let keys = if call.cache { seq_q } else { seq_kv };
        let input = |linear: &Linear, rows: u64| 4 * batch * rows * u64::from(linear.inputs);
        let cache = |dim: u32| 4 * batch * u64::from(layer.kv_heads) * seq_kv * u64::from(dim);
        let heads = if call.weights == Some(Weights::Heads) { layer.heads } else { 1 };
        let columns = seq_kv + u64::from(layer.bias_kv.is_some()) + u64::from(layer.zero_attn);
        let maps = [&layer.query, &layer.key, &layer.value];
        let biased = |linear: &&Linear| linear.bias.is_some();
        let mut biases = 0;
        if maps.iter().any(|map| map.bias.is_some()) {
            biases += maps.iter().map(|map| u64::from(map.outputs)).sum::<u64>();
        }
        biases += Some(&layer.out).filter(biased).map_or(0, |out| u64::from(out.outputs));
        biases += layer.bias_kv.as_ref().map_or(0, |(key, value)| (key.len() + value.len()) as u64);
        let mut sizes = HashMap::from([
            (Slot::Query, input(&layer.query, seq_q)),
            (Slot::Key, input(&layer.key, keys)),
            (Slot::Value, input(&layer.value, keys)),
            (Slot::Result, 4 * batch * seq_q * u64::from(layer.out.outputs)),
            (Slot::Averaged, 4 * batch * u64::from(heads) * seq_q * columns),
            (Slot::Biases, 4 * biases.max(4)),
            (Slot::KeyCache, cache(layer.key_dim)),
            (Slot::ValueCache, cache(layer.value_dim)),
            (Slot::Starts, 4 * batch),
            (Slot::Positions, 4 * batch),
            (Slot::Angles, layer.rotary.map_or(0, |r| 4 * u64::from(r.positions) * u64::from(r.dim))),
        ]);
        let bytes = |linear: &Linear| u64::from(linear.inputs) * u64::from(linear.outputs) * element.bytes();
        // A matrix that is not bound alone stands in the buffer of the last one before it that is.
        let bound: Vec<Slot> = plan.before().iter().flat_map(|step| &step.bindings).map(|bound| bound.slot).collect();
        let mut buffer = 0;
        for (n, map) in (0..).zip(maps) {
            buffer = if bound.contains(&Slot::Matrix(n)) { n } else { buffer };
            *sizes.entry(Slot::Matrix(buffer)).or_default() += bytes(map);
        }
        sizes.insert(Slot::Matrix(3), bytes(&layer.out));
        for &(slot, bytes) in plan.scratch() {
            assert!(sizes.insert(slot, bytes).is_none(), "{slot:?} is the caller's and the layer's own");
        }
        Sizes(sizes)
    }

    /// Bindings are whole words, the last of which may lie half outside 16-bit weights.
    fn of(&self, slot: Slot) -> u64 {
        self.0.get(&slot).unwrap_or_else(|| panic!("no buffer for {slot:?}")).next_multiple_of(4)
    }
}

/// A step around attention keeps to the device's limits and to the buffers.
fn inside(step: &Step, sizes: &Sizes, caps: &Caps) {
    let (variant, l) = (&step.variant, &caps.limits);
    assert_eq!(variant.bindings().len(), step.bindings.len());
    assert!(step.bindings.len() as u32 <= l.max_storage_buffers_per_shader_stage, "{variant}");
    for ((_, written), bound) in variant.bindings().into_iter().zip(&step.bindings) {
        assert!(bound.offset.is_multiple_of(l.min_storage_buffer_offset_alignment.into()), "{variant} {bound:?}");
        assert!(bound.size > 0 && bound.size.is_multiple_of(4), "{variant} {bound:?}");
        assert!(bound.size <= l.max_storage_buffer_binding_size, "{variant} {bound:?}");
        let size = sizes.of(bound.slot);
        assert!(bound.offset + bound.size <= size, "{variant} {bound:?} of {size}");
        assert_eq!(bound.written, written, "{variant} {bound:?}");
        let same = step.bindings.iter().filter(|other| other.slot == bound.slot).count();
        assert!(!written || same == 1, "{variant} reads what it writes");
    }
    assert!(step.grid.iter().all(|&n| (1..=l.max_compute_workgroups_per_dimension).contains(&n)), "{:?}", step.grid);
    assert!(variant.workgroup_bytes() <= l.max_compute_workgroup_storage_size, "{variant}");
    assert!(variant.threads() <= l.max_compute_invocations_per_workgroup, "{variant}");
}

/// What has been written so far: bytes of buffers, and by which operation.
#[derive(Default)]
struct Written(Vec<(Slot, Range<u64>, String)>);

/// An operation on the buffers, told from others by its kernel and by what it binds.
fn operation(step: &Step) -> String {
    let slots: Vec<_> = step.bindings.iter().map(|bound| bound.slot).collect();
    format!("{} {slots:?}", step.variant.stage())
}

fn range(bound: &Bound) -> Range<u64> {
    bound.offset..bound.offset + bound.size
}

impl Written {
    fn read(&self, slot: Slot, range: Range<u64>, by: &str) {
        let mut ranges: Vec<_> = self.0.iter().filter(|(of, ..)| *of == slot).map(|(_, range, _)| range).collect();
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().fold(range.start, |end, next| if next.start <= end { end.max(next.end) } else { end });
        assert!(end >= range.end, "{by} reads {slot:?} up to byte {}, which is written up to {end}", range.end);
    }

    /// A write: `over` says what is meant to be changed.
    fn write(&mut self, slot: Slot, range: Range<u64>, by: String, over: impl Fn(&str) -> bool) {
        for (_, before, other) in self.0.iter().filter(|(of, ..)| *of == slot) {
            let apart = before.end <= range.start || range.end <= before.start;
            assert!(apart || *other == by || over(other), "{by} writes over {other} in {slot:?}");
        }
        if !self.0.contains(&(slot, range.clone(), by.clone())) {
            self.0.push((slot, range, by));
        }
    }

    fn step(&mut self, step: &Step) {
        let by = operation(step);
        for bound in &step.bindings {
            let given = matches!(
                bound.slot,
                Slot::Query
                    | Slot::Key
                    | Slot::Value
                    | Slot::Matrix(_)
                    | Slot::Biases
                    | Slot::Angles
                    | Slot::Positions
                    | Slot::Starts
            );
            assert!(!(given && bound.written), "{by} writes {:?}", bound.slot);
            if !given && !bound.written {
                self.read(bound.slot, range(bound), &by);
            }
        }
        for bound in step.bindings.iter().filter(|bound| bound.written) {
            // Rows are rotated in place. The added key changes the result of attention and its log-sum-exps.
            let in_place = match step.variant {
                Variant::Rotary(_) => "project",
                Variant::Extra(_) => "attention",
                _ => "nothing",
            };
            if in_place != "nothing" {
                let rows = if bound.slot == Slot::Lse { bound.size / 2 } else { bound.size };
                self.read(bound.slot, bound.offset..bound.offset + rows, &by);
            }
            self.write(bound.slot, range(bound), by.clone(), |other| other.starts_with(in_place));
        }
    }

    /// Attention as a whole; that its own steps fit together is shown elsewhere.
    fn attention(&mut self, case: &Case, plan: &LayerPlan) {
        for bound in plan.attention().steps().iter().flat_map(|step| &step.bindings) {
            let slot = plan.attention_buffer(bound.slot);
            let tensor = matches!(bound.slot, Slot::Q | Slot::K | Slot::V);
            assert!(!(tensor && bound.written), "attention writes {:?}", bound.slot);
            match bound.slot {
                Slot::K | Slot::V if case.call.cache => assert!([Slot::KeyCache, Slot::ValueCache].contains(&slot)),
                Slot::Q | Slot::K | Slot::V => self.read(slot, range(bound), "attention"),
                Slot::Out | Slot::Lse | Slot::Weights if bound.written => {
                    self.write(slot, range(bound), "attention".into(), |_| false);
                }
                _ => {}
            }
        }
    }
}

fn check(case: &Case, caps: &Caps, options: &Options) -> bool {
    let Some(plan) = plan(case, caps, options) else { return false };
    let sizes = Sizes::new(case, &plan);
    plan.before().iter().chain(plan.after()).for_each(|step| inside(step, &sizes, caps));
    plan.attention().steps().iter().for_each(|step| within_limits(step, plan.attention(), caps));
    for tensor in [Slot::Q, Slot::K, Slot::V, Slot::Out, Slot::Lse, Slot::Weights] {
        let bound = plan.attention().steps().iter().flat_map(|step| &step.bindings).filter(|x| x.slot == tensor);
        let end = bound.map(|bound| bound.offset + bound.size).max().unwrap_or(0);
        assert!(end == 0 || end <= sizes.of(plan.attention_buffer(tensor)), "{tensor:?} of {plan}");
    }
    let mut written = Written::default();
    plan.before().iter().for_each(|step| written.step(step));
    written.attention(case, &plan);
    plan.after().iter().for_each(|step| written.step(step));
    if case.problem.batch * case.problem.seq_q > 0 {
        written.read(Slot::Result, 0..sizes.of(Slot::Result), "the caller");
        if case.call.weights.is_some() {
            written.read(Slot::Averaged, 0..sizes.of(Slot::Averaged), "the caller");
        }
    }
    assert_eq!(plan.steps().count(), plan.before().len() + plan.attention().dispatches() + plan.after().len());
    true
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_layer_reads_what_was_written_and_stays_inside_its_buffers(c in cases(), d in caps(), o in options()) {
        check(&c, &d, &o);
    }

    /// The same where neither the device nor an option refuses anything.
    #[test]
    fn every_layer_runs_on_a_common_device(c in cases()) {
        prop_assert!(check(&c, &gpu(), &Options::default()));
    }
}

/// The kernels of the three parts of a plan, each with its number of dispatches.
fn kernels(plan: &LayerPlan) -> String {
    let part = |steps: &[Step]| {
        let mut runs: Vec<(&str, usize)> = Vec::new();
        for step in steps {
            match runs.last_mut() {
                Some((name, count)) if *name == step.variant.stage() => *count += 1,
                _ => runs.push((step.variant.stage(), 1)),
            }
        }
        runs.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    };
    [plan.before(), plan.attention().steps(), plan.after()].map(part).join(" | ")
}

#[test]
fn the_dispatches_of_a_few_calls_are_these() {
    let plan = |sources: Sources, change: &dyn Fn(&mut Layer, &mut Problem, &mut Call)| {
        let maps = [64, 32, 32].map(|outputs| linear(64, outputs, Order::OutIn, true));
        let [query, key, value] = maps;
        let mut layer = Layer::new(4, 2, [query, key, value, linear(64, 64, Order::OutIn, true)]).unwrap();
        let (mut problem, mut call) = (layer.problem(2, 48, 48), Call::default());
        call.sources = sources;
        change(&mut layer, &mut problem, &mut call);
        let options = with!(Options::default(), kernel: problem.mask.map(|_| Kernel::Unfused));
        LayerPlan::new(&layer, Element::F32, &problem, &call, &gpu(), &options).unwrap()
    };
    let rotary = |dim: u32| Some(RotaryEmbedding { dim, interleaved: false, base: 100.0, positions: 64 });
    let none = |_: &mut Layer, _: &mut Problem, _: &mut Call| {};
    let joined = plan(Sources::Query, &none);
    assert_eq!(kernels(&joined), "1 project | 1 flash | 1 project");
    assert_eq!(kernels(&plan(Sources::Key, &none)), "2 project | 1 flash | 1 project");
    assert_eq!(kernels(&plan(Sources::Each, &none)), "3 project | 1 flash | 1 project");
    let orders = plan(Sources::Query, &|layer, _, _| layer.value.order = Order::InOut);
    assert_eq!(kernels(&orders), "3 project | 1 flash | 1 project");
    let rotated = plan(Sources::Query, &|layer, _, _| layer.rotary = rotary(16));
    assert_eq!(kernels(&rotated), "1 project | 1 flash | 1 project");
    assert_eq!(rotated.reasons(), ["rotary embedding of q and k: in the projection, which saves a pass"]);
    // Parts of 12 elements are no whole vectors of eight.
    let apart = plan(Sources::Query, &|layer, _, _| layer.rotary = rotary(12));
    assert_eq!(kernels(&apart), "1 project, 1 rotary | 1 flash | 1 project");
    let apart = plan(Sources::Key, &|layer, _, _| layer.rotary = rotary(12));
    assert_eq!(kernels(&apart), "2 project, 2 rotary | 1 flash | 1 project");
    let cached = plan(Sources::Query, &|layer, problem, call| {
        (layer.rotary, problem.causal, call.cache) = (rotary(12), Causal::Offset, true);
    });
    assert_eq!(kernels(&cached), "1 project, 1 rotary, 2 append | 1 flash | 1 project");
    // The added key and the weights take a dispatch for each batch.
    let added = plan(Sources::Key, &|layer, problem, call| {
        (layer.bias_kv, call.weights) = (Some((vec![0.0; 32], vec![0.0; 32])), Some(Weights::Mean));
        problem.mask = Some(Broadcast([1, 1, 48, 48]));
    });
    assert_eq!(kernels(&added), "2 project | 1 scores, 1 softmax, 1 export, 1 values | 2 extra, 1 project, 2 average");
    // The weights of the heads leave as attention writes them, unless the layer adds a column.
    let heads = |zero_attn: bool| {
        plan(Sources::Query, &|layer, problem, call| {
            (layer.zero_attn, call.weights) = (zero_attn, Some(Weights::Heads));
            problem.mask = Some(Broadcast([1, 1, 48, 48]));
        })
    };
    let (own, wider) = (heads(false), heads(true));
    assert_eq!(kernels(&own), "1 project | 1 scores, 1 softmax, 1 export, 1 values | 1 project");
    assert_eq!(own.attention_buffer(Slot::Weights), Slot::Averaged);
    assert_eq!(kernels(&wider), "1 project | 1 scores, 1 softmax, 1 export, 1 values | 1 project, 2 average");
    assert_eq!(wider.attention_buffer(Slot::Weights), Slot::Weights);

    // 2 batches of 48 rows: of 64 + 32 + 32 columns projected, and of 64 merged.
    assert_eq!(joined.scratch(), [(Slot::Q, 4 * 2 * 48 * 128), (Slot::Out, 4 * 2 * 48 * 64)]);
    assert_eq!([Slot::Q, Slot::K, Slot::V].map(|tensor| joined.attention_buffer(tensor)), [Slot::Q; 3]);
    let text = joined.to_string();
    let lines =
        ["projection of query to q: 2×48×64 to 128 columns", "attention 2×4(2)×48×48×16(16) f32", "after attention"];
    assert!(text.starts_with("layer: 3 dispatches in 3 slices"), "{text}");
    assert!(lines.iter().all(|line| text.contains(line)), "{text}");
}
