//! Follows every number through the operations of a layer's plan, without a device: weights, biases, inputs and results are names
//! rather than numbers, and each operation must find the names that it needs where it reads.

use std::collections::HashMap;

use proptest::prelude::*;

use super::operation::LayerOperation;
use super::parameters::Parameters;
use super::plan::LayerPlan;
use super::{Call, Layer, Linear, RotaryEmbedding, Sources, Weights};
use crate::contract::caps::Caps;
use crate::contract::error::Error;
use crate::contract::options::Options;
use crate::contract::problem::{Element, Layout, Problem, Strides};
use crate::contract::tensor::Tensor;
use crate::kernel::slot::Slot;
use crate::ops::append::Append;
use crate::ops::project::{Order, Projection, Wiring};
use crate::ops::rotary::Rotation;

/// Numbers of biases begin here, those of weights end below.
const BIASES: u32 = 1 << 22;
/// Numbers of the added key and value.
const ADDED: [u32; 2] = [1 << 23, (1 << 23) + (1 << 22)];

fn weight(map: u32, place: u32) -> f32 {
    ((map << 20) + place + 1) as f32
}

fn bias(map: u32, column: u32) -> f32 {
    (BIASES + (map << 12) + column) as f32
}

/// What an element of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell {
    /// Of an input of the layer.
    Input { batch: u32, row: u32, column: u32 },
    /// Of a product with one of the four maps; `rotated` by the rotary embedding.
    Product { map: u32, batch: u32, row: u32, column: u32, rotated: bool },
    /// Of the result of attention, `joined` with the added key.
    Merged { batch: u32, row: u32, column: u32, joined: bool },
}

#[derive(Clone, Debug)]
struct Case {
    layer: Layer,
    problem: Problem,
    call: Call,
    element: Element,
    caps: Caps,
}

fn linear(map: u32, inputs: u32, outputs: u32, order: Order, biased: bool) -> Linear {
    let weight = (0..inputs * outputs).map(|place| weight(map, place)).collect();
    Linear { inputs, outputs, weight, order, bias: biased.then(|| (0..outputs).map(|c| bias(map, c)).collect()) }
}

prop_compose! {
    fn cases()(
        (heads, kv_heads) in prop::sample::select(vec![(4u32, 4u32), (6, 2), (3, 1), (1, 1)]),
        (key_dim, value_dim) in prop::sample::select(vec![(8u32, 8u32), (16, 12), (10, 7), (6, 6)]),
        sources in prop::sample::select(vec![Sources::Query, Sources::Key, Sources::Each]),
        (wide, key_width, value_width) in (prop::sample::select(vec![12u32, 9]), 8u32..10, 8u32..10),
        (order, other, odd) in (any::<bool>(), any::<bool>(), 0usize..9),
        biases in any::<[bool; 4]>(),
        rotary in proptest::option::of(any::<bool>()),
        (added, zero_attn, cache, seq_first) in any::<(bool, bool, bool, bool)>(),
        weights in prop::sample::select(vec![None, Some(Weights::Heads), Some(Weights::Mean)]),
        (batch, seq_q, seq_kv) in (0u32..4, 0u32..9, 0u32..12),
        element in prop::sample::select(vec![Element::F32, Element::F16]),
        max_buffer_size in prop::sample::select(vec![4096u64, 6000, 1 << 20]),
        buffers in prop::sample::select(vec![4u32, 8]),
    ) -> Case {
        let [order, other] = [order, other].map(|out_in| if out_in { Order::OutIn } else { Order::InOut });
        let widths = match sources {
            Sources::Query => [wide; 3],
            Sources::Key => [wide, key_width, key_width],
            Sources::Each => [wide, key_width, value_width],
        };
        let outputs = [heads * key_dim, kv_heads * key_dim, kv_heads * value_dim, 5];
        let inputs = [widths[0], widths[1], widths[2], heads * value_dim];
        let maps = [0, 1, 2, 3].map(|n| {
            linear(n as u32, inputs[n], outputs[n], if n == odd { other } else { order }, biases[n])
        });
        let mut layer = Layer::new(heads, kv_heads, maps).unwrap();
        let dim = key_dim / 4 * 4;
        layer.rotary = rotary.map(|interleaved| RotaryEmbedding { dim, interleaved, base: 100.0, positions: 32 });
        layer.zero_attn = zero_attn;
        let cache = cache && sources == Sources::Query;
        let numbers = |from: u32, len: u32| (from..from + len).map(|n| n as f32).collect::<Vec<_>>();
        layer.bias_kv = (added && !cache).then(|| (numbers(ADDED[0], outputs[1]), numbers(ADDED[1], outputs[2])));
        let seq_kv = match (sources, cache) {
            (Sources::Query, false) => seq_q,
            (_, true) => seq_q + seq_kv,
            _ => seq_kv,
        };
        let problem = layer.problem(batch, seq_q, seq_kv);
        let call = Call { sources, seq_first, weights, cache };
        let limits = wgpu::Limits {
            max_buffer_size, max_storage_buffers_per_shader_stage: buffers, ..wgpu::Limits::default()
        };
        Case { layer, problem, call, element, caps: Caps::new(limits) }
    }
}

/// The buffers of a call, as far as the operations have come.
struct Machine<'a> {
    case: &'a Case,
    plan: &'a LayerPlan,
    weights: Vec<(Slot, Vec<f32>)>,
    biases: Vec<f32>,
    cells: HashMap<(Slot, u64), Cell>,
}

impl Machine<'_> {
    fn map(&self, map: u32) -> &Linear {
        let layer = &self.case.layer;
        [&layer.query, &layer.key, &layer.value, &layer.out][map as usize]
    }

    /// Rows of a batch that come out of a map.
    fn rows(&self, map: u32) -> u32 {
        let (p, call) = (&self.case.problem, self.case.call);
        if [1, 2].contains(&map) && !call.cache { p.seq_kv } else { p.seq_q }
    }

    /// The place of an element of an input, or of the result.
    fn outer(&self, [batch, row, column]: [u32; 3], rows: u32, width: u32) -> u64 {
        let line = if self.case.call.seq_first { row * self.case.problem.batch + batch } else { batch * rows + row };
        u64::from(line * width + column)
    }

    fn fill_inputs(&mut self) {
        let given = match self.case.call.sources {
            Sources::Query => vec![(Slot::Query, 0)],
            Sources::Key => vec![(Slot::Query, 0), (Slot::Key, 1)],
            Sources::Each => vec![(Slot::Query, 0), (Slot::Key, 1), (Slot::Value, 2)],
        };
        for (slot, map) in given {
            let (rows, width) = (self.rows(map), self.map(map).inputs);
            for [batch, row, column] in places([self.case.problem.batch, rows, width]) {
                let place = self.outer([batch, row, column], rows, width);
                self.cells.insert((slot, place), Cell::Input { batch, row, column });
            }
        }
    }

    /// The input that a map reads.
    fn source(&self, map: u32) -> Slot {
        match (map, self.case.call.sources) {
            (0, _) | (_, Sources::Query) => Slot::Query,
            (1, _) | (_, Sources::Key) => Slot::Key,
            _ => Slot::Value,
        }
    }

    fn write(&mut self, slot: Slot, place: u64, cell: Cell) {
        let room = self.plan.scratch().iter().find(|(own, _)| *own == slot).map_or(u64::MAX, |(_, bytes)| bytes / 4);
        assert!(place < room, "{cell:?} is beyond the end of {slot:?}");
        let before = self.cells.insert((slot, place), cell);
        assert_eq!(before, None, "{slot:?} {place} held something when {cell:?} was written");
    }

    /// The map and column whose weights and bias a column of a product reads.
    fn column(&self, p: &Projection, wiring: &Wiring, column: u32) -> (u32, u32) {
        let (_, weights) = self.weights.iter().find(|(slot, _)| *slot == wiring.weight).expect("a weight buffer");
        let at = |input: u32| {
            let (major, minor) = if p.order == Order::InOut { (input, column) } else { (column, input) };
            weights[(p.weight_offset + u64::from(major) * p.weight_row + u64::from(minor)) as usize]
        };
        let first = at(0) as u32 - 1;
        let (map, place) = (first >> 20, first & ((1 << 20) - 1));
        let linear = self.map(map);
        let own = if linear.order == Order::InOut { place } else { place / linear.inputs };
        assert_eq!((linear.inputs, linear.order), (p.inputs, p.order));
        for input in 0..p.inputs {
            let place =
                if p.order == Order::InOut { input * linear.outputs + own } else { own * linear.inputs + input };
            assert_eq!(at(input), weight(map, place), "weight {input} of column {column}: {p:?}");
        }
        let read = p.bias.map_or(0.0, |offset| self.biases[(offset + u64::from(column)) as usize]);
        assert_eq!(read, linear.bias.as_ref().map_or(0.0, |_| bias(map, own)), "bias of column {column}: {p:?}");
        (map, own)
    }

    fn project(&mut self, p: &Projection, wiring: &Wiring) {
        let origins: Vec<_> = (0..p.outputs).map(|column| self.column(p, wiring, column)).collect();
        for [batch, row, c] in places([p.batch, p.rows, p.outputs]) {
            let (map, column) = origins[c as usize];
            for input in (0..p.inputs).filter(|_| map < 3) {
                let place = p.x.offset + u64::from(batch) * p.x.batch + u64::from(row) * p.x.row + u64::from(input);
                let want = Cell::Input { batch, row, column: input };
                assert_eq!((wiring.x, self.cells.get(&(wiring.x, place))), (self.source(map), Some(&want)));
            }
            for input in (0..p.inputs).filter(|_| map == 3) {
                let place = p.x.offset + u64::from(batch) * p.x.batch + u64::from(row) * p.x.row + u64::from(input);
                let joined = self.case.layer.bias_kv.is_some();
                let want = Cell::Merged { batch, row, column: input, joined };
                assert_eq!(self.cells.get(&(wiring.x, place)), Some(&want));
            }
            let rotated = wiring.rotated.is_some_and(|rotated| c < rotated.columns);
            if let Some(rotated) = wiring.rotated.filter(|_| rotated) {
                assert!(map < 2, "columns of {map} are rotated");
                assert_eq!(c % rotated.head_dim, column % self.case.layer.key_dim);
                self.assert_rotation(rotated.rotary_dim, rotated.interleaved, rotated.table_rows);
                assert_eq!((rotated.batch, rotated.rows), (p.batch, p.rows));
            }
            let place = place(&p.y, [batch, c / p.head_columns, row]) + u64::from(c % p.head_columns);
            self.write(wiring.y, place, Cell::Product { map, batch, row, column, rotated });
        }
    }

    fn assert_rotation(&self, dim: u32, interleaved: bool, positions: u32) {
        let rotary = self.case.layer.rotary.expect("a layer with rotary embedding");
        assert_eq!((dim, interleaved, positions), (rotary.dim, rotary.interleaved, rotary.positions));
    }

    fn rotate(&mut self, r: &Rotation, slot: Slot) {
        self.assert_rotation(r.rotary_dim, r.interleaved, r.table_rows);
        assert_eq!((r.y, r.head_dim), (None, self.case.layer.key_dim));
        for [b, head, r_row] in places([r.batch, r.heads, r.rows]) {
            for d in 0..r.head_dim {
                let key = (slot, place(&r.x, [b, head, r_row]) + u64::from(d));
                let Some(&Cell::Product { map, batch, row, column, rotated: false }) = self.cells.get(&key) else {
                    panic!("{:?} at {key:?} cannot be rotated", self.cells.get(&key))
                };
                assert!(map < 2 && (batch, row) == (b, r_row) && column % r.head_dim == d);
                self.cells.insert(key, Cell::Product { map, batch, row, column, rotated: true });
            }
        }
    }

    /// What attention, or the cache, reads of a projected tensor: all heads of all rows, rotated where the layer wants that.
    fn assert_tensor(&self, map: u32, buffer: Slot, strides: &Strides, [heads, dim]: [u32; 2]) {
        let rotated = map < 2 && self.case.layer.rotary.is_some();
        for [batch, head, row] in places([self.case.problem.batch, heads, self.rows(map)]) {
            for d in 0..dim {
                let at = place(strides, [batch, head, row]) + u64::from(d);
                let want = Cell::Product { map, batch, row, column: head * dim + d, rotated };
                assert_eq!(self.cells.get(&(buffer, at)), Some(&want), "{buffer:?} {at}");
            }
        }
    }

    fn append(&mut self, append: &Append, x: Slot, cache: Slot) {
        let layer = &self.case.layer;
        let (map, dim) = if cache == Slot::KeyCache { (1, layer.key_dim) } else { (2, layer.value_dim) };
        let Layout::Strided(strides) = append.x else { panic!("{:?} is not strided", append.x) };
        self.assert_tensor(map, x, &strides, [layer.kv_heads, dim]);
        let p = &self.case.problem;
        let got = [append.batch, append.heads, append.rows, append.capacity, append.dim];
        assert_eq!(got, [p.batch, layer.kv_heads, p.seq_q, p.seq_kv, dim]);
        assert!(append.cache == Layout::Bhsd && !append.circular && append.paged.is_none());
    }

    fn attention(&mut self) {
        let (layer, shape) = (&self.case.layer, self.plan.attention().shape());
        let tensor = |map: u32, slot: Slot, tensor: &Tensor, sizes: [u32; 2]| {
            self.assert_tensor(map, self.plan.attention_buffer(slot), &tensor.strides, sizes);
        };
        tensor(0, Slot::Q, shape.q(), [layer.heads, layer.key_dim]);
        if !self.case.call.cache {
            tensor(1, Slot::K, shape.k(), [layer.kv_heads, layer.key_dim]);
            tensor(2, Slot::V, shape.v(), [layer.kv_heads, layer.value_dim]);
        }
        let sizes = [self.case.problem.batch, layer.heads, self.case.problem.seq_q];
        let (dim, strides) = (layer.value_dim, shape.out().strides);
        for [batch, head, row] in places(sizes) {
            for d in 0..dim {
                let cell = Cell::Merged { batch, row, column: head * dim + d, joined: false };
                self.write(Slot::Out, place(&strides, [batch, head, row]) + u64::from(d), cell);
            }
        }
    }

    fn run(&mut self, operation: &LayerOperation) {
        match operation {
            LayerOperation::Project(p, wiring) => self.project(p, wiring),
            LayerOperation::Rotate(r, slots) => {
                assert_eq!(slots.x, slots.y);
                self.rotate(r, slots.x);
            }
            LayerOperation::Append(append, slots) => self.append(append, slots.x, slots.cache),
            LayerOperation::JoinAddedKey { added, biases } => {
                assert_eq!(*biases, self.biases.len() as u64);
                let (key, value) = self.case.layer.bias_kv.as_ref().expect("an added key");
                assert_eq!(self.biases[added.key_offset as usize..][..key.len()], key[..]);
                assert_eq!(self.biases[added.value_offset as usize..][..value.len()], value[..]);
                for cell in self.cells.values_mut() {
                    if let Cell::Merged { joined, .. } = cell {
                        *joined = true;
                    }
                }
            }
            LayerOperation::GiveWeights { columns, mean, added } => {
                let (layer, p) = (&self.case.layer, &self.case.problem);
                assert_eq!(*columns, p.seq_kv + u32::from(layer.zero_attn) + u32::from(layer.bias_kv.is_some()));
                assert_eq!(*mean, self.case.call.weights == Some(Weights::Mean));
                assert_eq!(*added, layer.bias_kv.is_some());
            }
        }
    }

    /// Every element of the result holds what it must.
    fn assert_result(&self) {
        let (p, width) = (&self.case.problem, self.case.layer.out.outputs);
        for [batch, row, column] in places([p.batch, p.seq_q, width]) {
            let at = self.outer([batch, row, column], p.seq_q, width);
            let want = Cell::Product { map: 3, batch, row, column, rotated: false };
            assert_eq!(self.cells.get(&(Slot::Result, at)), Some(&want), "result {at}");
        }
    }
}

fn places([a, b, c]: [u32; 3]) -> impl Iterator<Item = [u32; 3]> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| [i, j, k])))
}

fn place(s: &Strides, [batch, head, row]: [u32; 3]) -> u64 {
    s.offset + u64::from(batch) * s.batch + u64::from(head) * s.head + u64::from(row) * s.row
}

/// Follows a call, and says how many projections there were before attention; none where the device is too small.
fn follow(case: &Case) -> Option<usize> {
    let Case { layer, problem, call, element, caps } = case;
    let plan = match LayerPlan::new(layer, *element, problem, call, caps, &Options::default()) {
        Ok(plan) => plan,
        Err(Error::Room { size, limit, .. }) if size > limit => return None,
        Err(error) => panic!("{error}: {case:?}"),
    };
    let parameters = Parameters::new(layer, *element, caps).unwrap();
    let (weights, biases) = (parameters.weights(layer), parameters.bias_values(layer));
    let mut machine = Machine { case, plan: &plan, weights, biases, cells: HashMap::new() };
    machine.fill_inputs();
    plan.before.operations.iter().for_each(|operation| machine.run(operation));
    machine.attention();
    plan.after.operations.iter().for_each(|operation| machine.run(operation));
    machine.assert_result();
    let count = |wanted: fn(&LayerOperation) -> bool| {
        plan.before.operations.iter().chain(&plan.after.operations).filter(|operation| wanted(operation)).count()
    };
    let appends = count(|operation| matches!(operation, LayerOperation::Append(..)));
    let gives = count(|operation| matches!(operation, LayerOperation::GiveWeights { .. }));
    let changed = match call.weights {
        None => false,
        Some(Weights::Heads) => layer.zero_attn || layer.bias_kv.is_some(),
        Some(Weights::Mean) => true,
    };
    assert_eq!((appends, gives), (if call.cache { 2 } else { 0 }, usize::from(changed)));
    Some(plan.before.operations.iter().filter(|operation| matches!(operation, LayerOperation::Project(..))).count())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_number_of_a_layer_is_where_the_next_operation_reads_it(case in cases()) {
        follow(&case);
    }
}

#[test]
fn every_way_of_joining_projections_is_followed() {
    let case = |sources: Sources, order: Order, value_order: Order, max_buffer_size: u64| {
        let maps = [(0, 12, 24, order), (1, 12, 8, order), (2, 12, 12, value_order), (3, 36, 5, order)];
        let maps = maps.map(|(map, inputs, outputs, order)| linear(map, inputs, outputs, order, map == 1));
        let mut layer = Layer::new(3, 1, maps).unwrap();
        layer.rotary = Some(RotaryEmbedding { dim: 8, interleaved: false, base: 100.0, positions: 9 });
        let problem = layer.problem(3, 9, 9);
        let mut caps = Caps::new(wgpu::Limits::default());
        caps.limits.max_buffer_size = max_buffer_size;
        let call = Call { sources, ..Call::default() };
        follow(&Case { layer, problem, call, element: Element::F32, caps })
    };
    let [out_in, in_out] = [Order::OutIn, Order::InOut];
    for order in [out_in, in_out] {
        assert_eq!(case(Sources::Query, order, order, 1 << 20), Some(1));
        // Three tensors of 44 columns are 4752 bytes together.
        assert_eq!(case(Sources::Query, order, order, 4751), Some(2));
        assert_eq!(case(Sources::Key, order, order, 1 << 20), Some(2));
        assert_eq!(case(Sources::Each, order, order, 1 << 20), Some(3));
    }
    assert_eq!(case(Sources::Query, out_in, in_out, 1 << 20), Some(3));
}
