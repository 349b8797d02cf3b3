//! The layer on the GPU: weights that stay there, and calls recorded into the caller's encoder.

use std::cmp::Ordering;

use crate::caps::Caps;
use crate::encode::{Attention, Buffers, Home, Prepared, Recording, Set, allocate, constant};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, upload_bytes, whole};
use crate::kernel::slot::Slot;
use crate::layer::{Call, Layer, LayerInputs, LayerOutputs, Linear, Sources, Weights};
use crate::operands::Operands;
use crate::operation::Compiled;
use crate::ops::append::{self, Append};
use crate::ops::average::Average;
use crate::ops::extra::{Extra, lse_words};
use crate::ops::project::{Order, Projection, Turn, Wiring};
use crate::ops::rotary::{self, Positions, Rotation};
use crate::options::Options;
use crate::plan::no_more_slices;
use crate::problem::{Causal, Element, Layout, Problem, Strides};
use crate::step::Step;
use crate::steps::Steps;

/// A [`Layer`] whose weights are on a device.
#[derive(Debug)]
pub struct MultiHeadAttention {
    home: Home,
    /// Without its weights, which are only on the device.
    layer: Layer,
    element: Element,
    /// Query, key, value and output, the first three apart or together.
    matrices: Vec<wgpu::Buffer>,
    /// Of query (0), key and value weights those from this one on are one matrix.
    packed: usize,
    /// Biases and added key and value, and where they begin.
    shifts: Vec<f32>,
    places: Places,
    /// Cosines and sines.
    table: Option<wgpu::Buffer>,
}

/// Places in the buffer of biases.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    query: Option<u64>,
    key: Option<u64>,
    value: Option<u64>,
    out: Option<u64>,
    extra_key: u64,
    extra_value: u64,
}

/// A layer prepared for one [`Problem`] and [`Call`], ready to be recorded any number of times, from any number of threads.
#[derive(Debug)]
pub struct PreparedLayer {
    before: Compiled,
    /// Its scratch is that of the whole layer.
    attention: Prepared,
    after: Compiled,
    call: Call,
    matrices: Vec<wgpu::Buffer>,
    shifts: wgpu::Buffer,
    table: Option<wgpu::Buffer>,
    /// Zeros, for positions and sinks.
    zeros: wgpu::Buffer,
    zero_attn: bool,
    reasons: Vec<String>,
}

/// Buffers of one call of a layer. Tensors are f32 and need usage `STORAGE`. Of one without elements any slice may be given, as
/// for [`Buffers`].
#[derive(Clone, Copy, Debug)]
pub struct LayerBuffers<'a> {
    /// Query input.
    pub query: wgpu::BufferSlice<'a>,
    /// Key input, where [`Sources`] has one.
    pub key: Option<wgpu::BufferSlice<'a>>,
    /// Value input, where [`Sources`] has one.
    pub value: Option<wgpu::BufferSlice<'a>>,
    /// The layer's output.
    pub result: wgpu::BufferSlice<'a>,
    /// The weights, if the call asks for them.
    pub weights: Option<wgpu::BufferSlice<'a>>,
    /// The key/value cache, if the call has one.
    pub cache: Option<CacheBuffers<'a>>,
    /// Mask, bias and the small arrays of the attention inside.
    pub operands: Operands<wgpu::BufferSlice<'a>>,
}

/// A key/value cache on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct CacheBuffers<'a> {
    /// [batch, kv_heads, seq_kv, key_dim], changed in place.
    pub k: wgpu::BufferSlice<'a>,
    /// [batch, kv_heads, seq_kv, value_dim], changed in place.
    pub v: wgpu::BufferSlice<'a>,
    /// Keys that each batch has already: u32 `[batch]`, usages `STORAGE` and `COPY_SRC`. Not written: add `seq_q` for the next
    /// call. New rows go there as [`Append`] says.
    pub starts: wgpu::BufferSlice<'a>,
}

impl<'a> LayerBuffers<'a> {
    /// Self-attention without further operands.
    pub fn new(query: wgpu::BufferSlice<'a>, result: wgpu::BufferSlice<'a>) -> Self {
        let operands = Operands::default();
        LayerBuffers { query, key: None, value: None, result, weights: None, cache: None, operands }
    }
}

fn encoded(values: &[f32], element: Element) -> Vec<u8> {
    match element {
        Element::F32 => bytemuck::cast_slice(values).to_vec(),
        Element::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
    }
}

/// Matrices with the same rows of x as one, their columns side by side.
fn together(parts: &[&Linear]) -> Vec<f32> {
    match parts[0].order {
        Order::OutIn => parts.iter().flat_map(|part| part.weight.iter().copied()).collect(),
        Order::InOut => (0..parts[0].inputs as usize)
            .flat_map(|i| parts.iter().flat_map(move |part| part.weight.chunks_exact(part.outputs as usize).nth(i)))
            .flatten()
            .copied()
            .collect(),
    }
}

impl MultiHeadAttention {
    /// Uploads a layer's weights as `element`; biases stay f32.
    pub fn new(attention: &Attention, queue: &wgpu::Queue, layer: &Layer, element: Element) -> Result<Self> {
        layer.check()?;
        let caps = attention.caps();
        caps.check()?;
        let parts = [&layer.query, &layer.key, &layer.value];
        let bytes = |parts: &[&Linear]| parts.iter().map(|p| p.weight.len() as u64).sum::<u64>() * element.bytes();
        let packs = |&from: &usize| {
            let alike = |p: &&Linear| (p.inputs, p.order) == (parts[from].inputs, parts[from].order);
            parts[from..].iter().all(alike) && bytes(&parts[from..]) <= caps.limits.max_buffer_size
        };
        let packed = (0..2).find(packs).unwrap_or(2);
        let mut hosts: Vec<Vec<f32>> = parts[..packed].iter().map(|p| p.weight.clone()).collect();
        hosts.push(together(&parts[packed..]));
        hosts.push(layer.out.weight.clone());
        let limit = caps.limits.max_buffer_size;
        if let Some(value) = hosts.iter().map(|m| m.len() as u64 * element.bytes()).find(|&size| size > limit) {
            return Err(Error::bytes("weight matrix", value, limit));
        }
        let table = layer.rotary.map_or(0, |r| 4 * u64::from(r.positions) * u64::from(r.dim));
        if table > caps.binding() {
            return Err(Error::bytes("rotary table", table, caps.binding()));
        }
        let (mut shifts, mut places) = (Vec::new(), Places::default());
        if parts.iter().any(|p| p.bias.is_some()) {
            // All three, so that they stand in a row for the packed matrix.
            for (part, place) in parts.iter().zip([&mut places.query, &mut places.key, &mut places.value]) {
                *place = Some(shifts.len() as u64);
                shifts.extend(part.bias.clone().unwrap_or_else(|| vec![0.0; part.outputs as usize]));
            }
        }
        if let Some(bias) = &layer.out.bias {
            places.out = Some(shifts.len() as u64);
            shifts.extend(bias);
        }
        if let Some((key, value)) = &layer.bias_kv {
            places.extra_key = shifts.len() as u64;
            shifts.extend(key);
            places.extra_value = shifts.len() as u64;
            shifts.extend(value);
        }
        // A binding is at least a vector long.
        shifts.resize(shifts.len().max(4), 0.0);
        let (matrices, table) = allocate(attention.device(), || {
            let upload = |label, bytes: &[u8]| upload_bytes(attention.device(), queue, label, bytes);
            let matrices = hosts.iter().map(|m| upload("weights", &encoded(m, element))).collect();
            let table = layer
                .rotary
                .map(|r| upload("rotary table", bytemuck::cast_slice(&Rotation::table(r.positions, r.dim, r.base))));
            (matrices, table)
        })?;
        let mut layer = layer.clone();
        for linear in [&mut layer.query, &mut layer.key, &mut layer.value, &mut layer.out] {
            linear.weight = Vec::new();
        }
        let home = attention.home().clone();
        Ok(MultiHeadAttention { home, layer, element, matrices, packed, shifts, places, table })
    }

    /// The attention problem inside the layer, as [`Layer::problem`].
    pub fn problem(&self, batch: u32, seq_q: u32, seq_kv: u32) -> Problem {
        self.layer.problem(batch, seq_q, seq_kv)
    }

    /// Plans, compiles what is not cached yet, and allocates the scratch. Blocks while the driver compiles.
    ///
    /// With a cache, `problem.seq_kv` is its room, and the causal rule is that each new row sees the keys up to itself.
    pub fn prepare(
        &self,
        attention: &Attention,
        problem: &Problem,
        call: &Call,
        options: &Options,
    ) -> Result<PreparedLayer> {
        if !self.home.is(attention.home()) {
            return Err(Error::OtherDevice { field: "layer" });
        }
        self.layer.check_call_sizes(problem, call)?;
        Preparation::new(self, attention, problem, *call, options)?.prepare(attention)
    }

    /// Runs the layer on host slices: upload, compute, read back.
    pub fn forward(&self, gpu: &Gpu, problem: &Problem, call: &Call, inputs: &LayerInputs<'_>) -> Result<LayerOutputs> {
        self.forward_with(gpu, problem, call, inputs, &Options::default())
    }

    /// The same with planning [`Options`].
    pub fn forward_with(
        &self,
        gpu: &Gpu,
        problem: &Problem,
        call: &Call,
        inputs: &LayerInputs<'_>,
        options: &Options,
    ) -> Result<LayerOutputs> {
        if call.cache {
            let why = "the cache stays on the GPU: record the call into an encoder";
            return Err(Error::Conflict { left: "cache", right: "host slices", why });
        }
        self.layer.check_call_sizes(problem, call)?;
        self.layer.check_inputs(problem, call, inputs)?;
        problem.check()?.check_operands(&inputs.operands)?;
        let prepared = self.prepare(gpu.library(), problem, call, options)?;
        let columns = u64::from(self.layer.weight_columns(problem.seq_kv));
        let rows = u64::from(problem.batch) * u64::from(problem.seq_q);
        let heads = call.weights.map(|which| if which == Weights::Heads { u64::from(problem.heads) } else { 1 });
        let result_len = (rows * u64::from(self.layer.out.outputs)) as usize;
        let weights_len = heads.map(|heads| (heads * rows * columns) as usize);
        let upload =
            |label, values: &[f32]| upload_bytes(gpu.device(), gpu.queue(), label, bytemuck::cast_slice(values));
        let make = || Uploaded {
            query: upload("query", inputs.query),
            key: inputs.key.map(|key| upload("key", key)),
            value: inputs.value.map(|value| upload("value", value)),
            result: upload("result", &vec![f32::NAN; result_len]),
            weights: weights_len.map(|len| upload("weights", &vec![f32::NAN; len])),
            operands: inputs
                .operands
                .map(|operand, data| upload_bytes(gpu.device(), gpu.queue(), operand.name(), data.bytes())),
        };
        let uploaded = allocate(gpu.device(), make)?;
        let buffers = uploaded.buffers();
        let recording = prepared.begin()?;
        for slice in 0..prepared.slices() {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            recording.encode_slice(slice, &mut encoder, &buffers)?;
            gpu.queue().submit([encoder.finish()]);
            gpu.wait()?;
        }
        // Buffers are never empty, outputs may be.
        let read = |slice, len: usize| gpu.read(slice).map(|read| bytemuck::pod_collect_to_vec(&read[..4 * len]));
        let weights = buffers.weights.zip(weights_len).map(|(slice, len)| read(slice, len));
        Ok(LayerOutputs { out: read(buffers.result, result_len)?, weights: weights.transpose()? })
    }
}

/// What one call on host slices has on the device.
struct Uploaded {
    query: wgpu::Buffer,
    key: Option<wgpu::Buffer>,
    value: Option<wgpu::Buffer>,
    result: wgpu::Buffer,
    weights: Option<wgpu::Buffer>,
    operands: Operands<wgpu::Buffer>,
}

impl Uploaded {
    fn buffers(&self) -> LayerBuffers<'_> {
        LayerBuffers {
            query: self.query.slice(..),
            key: whole(&self.key),
            value: whole(&self.value),
            result: self.result.slice(..),
            weights: whole(&self.weights),
            cache: None,
            operands: self.operands.as_ref().map(|_, buffer| buffer.slice(..)),
        }
    }
}

/// What [`PreparedLayer`] is made from.
struct Preparation<'a> {
    of: &'a MultiHeadAttention,
    caps: &'a Caps,
    options: &'a Options,
    problem: Problem,
    call: Call,
    /// Of query (0), key and value those from this one on are projected in one dispatch, into one buffer.
    joint: usize,
    /// Where projected keys and values stand: the rows that are new, where there is a cache.
    fresh: [Strides; 2],
}

impl<'a> Preparation<'a> {
    fn new(
        of: &'a MultiHeadAttention,
        attention: &'a Attention,
        problem: &Problem,
        call: Call,
        options: &'a Options,
    ) -> Result<Self> {
        let (caps, layer) = (attention.caps(), &of.layer);
        let widths = [&layer.query, &layer.key, &layer.value].map(|linear| u64::from(linear.outputs));
        let keys = u64::from(if call.cache { problem.seq_q } else { problem.seq_kv });
        let joins = |&from: &usize| {
            let shared = if from == 0 { call.sources == Sources::Query } else { call.sources != Sources::Each };
            let bytes = 4 * u64::from(problem.batch) * keys * widths[from..].iter().sum::<u64>();
            shared && of.packed <= from && bytes <= caps.limits.max_buffer_size
        };
        let joint = (0..2).find(joins).unwrap_or(2);
        let mut inner = problem.clone().with_layout(Layout::Bshd);
        let direct = call.weights == Some(Weights::Heads) && layer.weight_columns(0) == 0;
        inner.weights = call.weights.is_some();
        inner.lse = layer.bias_kv.is_some() || (call.weights.is_some() && !direct);
        inner.sinks |= layer.zero_attn;
        let heads = [layer.key_dim, layer.key_dim, layer.value_dim].map(u64::from);
        // Where a part stands in the rows of those that begin with `from`; a call with queries among them has as many of these as keys.
        let place = |n: usize, from: usize, to: usize| {
            let row = widths[from..to].iter().sum();
            Strides { offset: widths[from..n].iter().sum(), batch: keys * row, head: heads[n], row }
        };
        let fresh = [1, 2].map(|n| if n < joint { place(n, n, n + 1) } else { place(n, joint, 3) });
        if joint == 0 {
            inner.q = Layout::Strided(place(0, 0, 3));
        }
        if call.cache {
            (inner.k, inner.v, inner.causal) = (Layout::Bhsd, Layout::Bhsd, Causal::Offset);
        } else {
            (inner.k, inner.v) = (Layout::Strided(fresh[0]), Layout::Strided(fresh[1]));
        }
        inner.check()?;
        Ok(Preparation { of, caps, options, problem: inner, call, joint, fresh })
    }

    /// Strides of an input or the output of the layer.
    fn outer(&self, width: u32, rows: u32) -> Strides {
        let (batch, row) = if self.call.seq_first { (1, self.problem.batch) } else { (rows, 1) };
        let width = u64::from(width);
        Strides { offset: 0, batch: u64::from(batch) * width, head: 0, row: u64::from(row) * width }
    }

    /// How many keys and values of a batch are projected.
    fn keys(&self) -> u32 {
        if self.call.cache { self.problem.seq_q } else { self.problem.seq_kv }
    }

    /// The projections and rotations before attention, and what goes into the cache; says why rotations are where they are.
    fn before(&self, steps: &mut Steps<'_>) -> Result<Vec<String>> {
        let (layer, shape) = (&self.of.layer, self.problem.check()?);
        let [nq, nk, nv] = [layer.query.outputs, layer.key.outputs, layer.value.outputs];
        let (seq_q, keys, [k, v]) = (self.problem.seq_q, self.keys(), self.fresh);
        let key_source = if self.call.sources == Sources::Query { Slot::Query } else { Slot::Key };
        let value_source = if self.call.sources == Sources::Each { Slot::Value } else { key_source };
        let parts = [
            (&layer.query, self.of.places.query, Slot::Query, Slot::Q, shape.q().strides, seq_q, layer.key_dim),
            (&layer.key, self.of.places.key, key_source, Slot::K, k, keys, layer.key_dim),
            (&layer.value, self.of.places.value, value_source, Slot::V, v, keys, layer.value_dim),
        ];
        let widths = [nq, nk, nv];
        let (mut rotations, mut reasons) = (Vec::new(), Vec::new());
        for (n, (linear, bias, source, to, y, rows, dim)) in parts.into_iter().enumerate().take(self.joint + 1) {
            let outputs = if n < self.joint { widths[n] } else { widths[n..].iter().sum() };
            let mut p = Projection::new(rows, linear.inputs, outputs, linear.order, self.of.element);
            (p.batch, p.x, p.bias, p.y) = (self.problem.batch, self.outer(linear.inputs, rows), bias, y);
            let matrix = self.of.packed.min(n);
            let mut wiring = Wiring { x: source, weight: Slot::Matrix(matrix as u8), y: to, turn: None };
            if n >= self.of.packed {
                let column = u64::from(widths[matrix..n].iter().sum::<u32>());
                (p.weight_offset, p.weight_row) = match linear.order {
                    Order::OutIn => (column * u64::from(linear.inputs), linear.inputs.into()),
                    Order::InOut => (column, widths[matrix..].iter().sum::<u32>().into()),
                };
            }
            if n == self.joint && n < 2 {
                (p.y.head, p.head_columns) = (0, outputs);
            } else {
                p.head_columns = dim;
            }
            if let Some(rotary) = layer.rotary.filter(|_| n < 2) {
                // In one buffer, the heads of the keys follow those of the queries.
                let (names, columns) = if self.joint == 0 { ("q and k", nq + nk) } else { (to.name(), widths[n]) };
                let turn = Turn {
                    columns,
                    head_dim: dim,
                    rotary_dim: rotary.dim,
                    interleaved: rotary.interleaved,
                    table_rows: rotary.positions,
                    batch: self.problem.batch,
                    rows,
                };
                match p.turn_obstacle(self.caps, &turn) {
                    None => {
                        wiring.turn = Some(turn);
                        reasons.push(format!("rotary embedding of {names}: in the projection, which saves a pass"));
                    }
                    Some(why) => {
                        let mut r = Rotation::new(self.problem.batch, columns / dim, rows, dim, rotary.positions);
                        (r.rotary_dim, r.interleaved, r.positions) =
                            (rotary.dim, rotary.interleaved, Positions::Starts);
                        r.x = y;
                        rotations.push((r, rotary::Slots { x: to, y: to }));
                        reasons.push(format!("rotary embedding of {names}: not in the projection: {why}"));
                    }
                }
            }
            p.dispatches(wiring, steps)?;
        }
        for (rotation, slots) in rotations {
            rotation.dispatches(slots, steps)?;
        }
        let [k_slot, v_slot] = [1, 2].map(|n: usize| [Slot::Q, Slot::K, Slot::V][n.min(self.joint)]);
        if self.call.cache {
            let appended = [(k_slot, Slot::KeyCache, k, layer.key_dim), (v_slot, Slot::ValueCache, v, layer.value_dim)];
            for (x, cache, strides, dim) in appended {
                let mut a = Append::new(self.problem.batch, layer.kv_heads, keys, self.problem.seq_kv, dim);
                a.x = Layout::Strided(strides);
                a.dispatches(append::Slots { x, cache }, steps)?;
            }
        }
        Ok(reasons)
    }

    /// The added key, the output projection and the weights, after attention.
    fn after(&self, steps: &mut Steps<'_>) -> Result<()> {
        let (layer, attention, places) = (&self.of.layer, &self.problem.check()?, self.of.places);
        if layer.bias_kv.is_some() {
            let (key, value, biases) = (places.extra_key, places.extra_value, self.of.shifts.len() as u64);
            Extra { attention, key, value, biases }.dispatches(steps)?;
        }
        let linear = &layer.out;
        let mut p = Projection::new(self.problem.seq_q, linear.inputs, linear.outputs, linear.order, self.of.element);
        let inner = u64::from(linear.inputs);
        p.x = Strides { offset: 0, batch: u64::from(self.problem.seq_q) * inner, head: 0, row: inner };
        (p.batch, p.bias) = (self.problem.batch, places.out);
        p.y = self.outer(linear.outputs, self.problem.seq_q);
        let wiring = Wiring { x: Slot::Out, weight: Slot::Matrix(3), y: Slot::Result, turn: None };
        p.dispatches(wiring, steps)?;
        if self.averages() {
            let columns = layer.weight_columns(self.problem.seq_kv);
            let (mean, extra) = (self.call.weights == Some(Weights::Mean), layer.bias_kv.is_some());
            Average { attention, columns, mean, extra }.dispatches(steps)?;
        }
        Ok(())
    }

    /// Whether the weights pass through a kernel of their own on their way out.
    fn averages(&self) -> bool {
        self.problem.weights && self.problem.lse
    }

    fn prepare(self, attention: &Attention) -> Result<PreparedLayer> {
        let (mut before, mut after) = (Steps::new(self.caps, self.options), Steps::new(self.caps, self.options));
        let reasons = self.before(&mut before)?;
        self.after(&mut after)?;
        let before = Compiled::new(attention, before, &[])?;
        let plan = attention.plan_with(&self.problem, self.options)?;
        let after = Compiled::new(attention, after, &[])?;
        let (p, layer) = (&self.problem, &self.of.layer);
        let shape = plan.shape();
        let batch = u64::from(p.batch);
        let widths = [&layer.query, &layer.key, &layer.value].map(|linear| u64::from(linear.outputs));
        let (rows, keys) = (batch * u64::from(p.seq_q), batch * u64::from(self.keys()));
        // Columns of the buffer that begins with a part, if one does.
        let columns = |n: usize| match n.cmp(&self.joint) {
            Ordering::Less => Some(widths[n]),
            Ordering::Equal => Some(widths[n..].iter().sum::<u64>()),
            Ordering::Greater => None,
        };
        let scores = self.averages().then(|| 4 * shape.scores_len());
        let sizes = [
            (Slot::Q, "projected queries", columns(0).map(|columns| 4 * rows * columns)),
            (Slot::K, "projected keys", columns(1).map(|columns| 4 * keys * columns)),
            (Slot::V, "projected values", columns(2).map(|columns| 4 * keys * columns)),
            (Slot::Out, "merged heads", Some(4 * shape.out().extent())),
            (Slot::Lse, "log-sum-exp", p.lse.then(|| 4 * lse_words(shape, layer.bias_kv.is_some()))),
            (Slot::Weights, "weights of heads", scores),
        ];
        let zeros = vec![0; 4 * batch.max(layer.heads.into()) as usize];
        let sized = sizes.iter().filter_map(|&(slot, field, size)| Some((slot, field, size?)));
        let limit = self.caps.limits.max_buffer_size;
        for (field, value) in sized.clone().map(|(_, field, size)| (field, size)).chain([("zeros", zeros.len() as u64)])
        {
            if value > limit {
                return Err(Error::bytes(field, value, limit));
            }
        }
        let own: Vec<_> = sized.map(|(slot, _, size)| (slot, size.max(16))).collect();
        let inner = attention.prepare_with(&plan, &own)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let shifts = constant(attention.device(), "biases", usage, bytemuck::cast_slice(&self.of.shifts))?;
        let zeros = constant(attention.device(), "zeros", usage, &zeros)?;
        Ok(PreparedLayer {
            before,
            attention: inner,
            after,
            call: self.call,
            matrices: self.of.matrices.clone(),
            shifts,
            table: self.of.table.clone(),
            zeros,
            zero_attn: layer.zero_attn,
            reasons,
        })
    }
}

impl PreparedLayer {
    /// The plan of the attention inside.
    pub fn plan(&self) -> &crate::Plan {
        self.attention.plan()
    }

    /// The dispatches of the whole layer in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.before.steps().chain(self.attention.plan().steps()).chain(self.after.steps())
    }

    /// Why the steps around attention are as they are, a sentence each; [`PreparedLayer::plan`] has those of attention.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// How many slices there are.
    pub fn slices(&self) -> usize {
        self.before.slices() + self.attention.slices() + self.after.slices()
    }

    /// Records the whole layer. Nothing is submitted, waited for or read back.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &LayerBuffers<'_>) -> Result<()> {
        let set = self.attention.scratch().shared()?;
        if self.slices() == 0 {
            return self.check(&self.slots(buffers, &set)?, &self.inner(buffers, &set));
        }
        (0..self.slices()).try_for_each(|slice| self.record(slice, encoder, buffers, &set))
    }

    /// Begins a call that is recorded slice by slice, as [`Prepared::begin`] does.
    pub fn begin(&self) -> Result<Recording<'_, PreparedLayer>> {
        Ok(Recording { of: self, set: self.attention.scratch().own()? })
    }

    fn record(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &LayerBuffers<'_>,
        set: &Set,
    ) -> Result<()> {
        no_more_slices(slice, self.slices())?;
        let (slots, inner) = (self.slots(buffers, set)?, self.inner(buffers, set));
        // What is wrong with a later part must not leave the first ones in the encoder.
        self.check(&slots, &inner)?;
        let (first, second) = (self.before.slices(), self.before.slices() + self.attention.slices());
        if slice < first {
            self.before.record(self.before.slice(slice)?, encoder, &slots, &[])
        } else if slice < second {
            self.attention.record(self.attention.slice(slice - first)?, encoder, &inner, set)
        } else {
            self.after.record(self.after.slice(slice - second)?, encoder, &slots, &[])
        }
    }

    fn check(&self, slots: &[(Slot, wgpu::BufferSlice<'_>)], inner: &Buffers<'_>) -> Result<()> {
        self.before.check(slots)?;
        self.attention.check(inner)?;
        self.after.check(slots)
    }

    /// What the operations around attention bind.
    fn slots<'a>(&'a self, buffers: &LayerBuffers<'a>, set: &'a Set) -> Result<Vec<(Slot, wgpu::BufferSlice<'a>)>> {
        let given = [
            ("key", buffers.key.is_some(), self.call.sources != Sources::Query),
            ("value", buffers.value.is_some(), self.call.sources == Sources::Each),
            ("weights", buffers.weights.is_some(), self.call.weights.is_some()),
            ("cache", buffers.cache.is_some(), self.call.cache),
        ];
        for (field, given, wanted) in given {
            match (given, wanted) {
                (true, false) => return Err(Error::Unexpected { field }),
                (false, true) => return Err(Error::Missing { field }),
                _ => {}
            }
        }
        let cache = buffers.cache.as_ref();
        let read = self.plan().shape().batch > 0;
        if read && cache.is_some_and(|cache| !cache.starts.buffer().usage().contains(wgpu::BufferUsages::COPY_SRC)) {
            return Err(Error::BufferUsage { field: "starts", usage: "COPY_SRC" });
        }
        let listed = [
            (Slot::Query, Some(buffers.query)),
            (Slot::Key, buffers.key),
            (Slot::Value, buffers.value),
            (Slot::Result, Some(buffers.result)),
            (Slot::Averaged, buffers.weights),
            (Slot::Shifts, Some(self.shifts.slice(..))),
            (Slot::Q, own(set, Slot::Q)),
            (Slot::K, own(set, Slot::K)),
            (Slot::V, own(set, Slot::V)),
            (Slot::KeyCache, cache.map(|cache| cache.k)),
            (Slot::ValueCache, cache.map(|cache| cache.v)),
            (Slot::Starts, cache.map(|cache| cache.starts)),
            (Slot::Out, own(set, Slot::Out)),
            (Slot::Lse, own(set, Slot::Lse)),
            (Slot::Weights, own(set, Slot::Weights)),
            (Slot::Angles, self.table.as_ref().map(|table| table.slice(..))),
            (Slot::Positions, Some(cache.map_or(self.zeros.slice(..), |cache| cache.starts))),
        ];
        let last = self.matrices.len() - 1;
        let matrices = self
            .matrices
            .iter()
            .enumerate()
            .map(|(n, matrix)| (Slot::Matrix(if n == last { 3 } else { n as u8 }), matrix.slice(..)));
        Ok(listed.into_iter().filter_map(|(slot, slice)| Some((slot, slice?))).chain(matrices).collect())
    }

    /// What attention binds.
    fn inner<'a>(&'a self, buffers: &LayerBuffers<'a>, set: &'a Set) -> Buffers<'a> {
        let made = "every layer projects queries and merges heads";
        let (q, out) = (own(set, Slot::Q).expect(made), own(set, Slot::Out).expect(made));
        let (k, v) = match &buffers.cache {
            Some(cache) => (cache.k, cache.v),
            None => {
                let k = own(set, Slot::K).unwrap_or(q);
                (k, own(set, Slot::V).unwrap_or(k))
            }
        };
        let mut inner = Buffers::new(q, k, v, out);
        inner.lse = own(set, Slot::Lse);
        inner.weights = own(set, Slot::Weights).or(buffers.weights);
        inner.operands = buffers.operands;
        if self.zero_attn {
            inner.operands.sinks = Some(self.zeros.slice(..));
        }
        if let Some(cache) = &buffers.cache {
            inner.operands.offsets = Some(cache.starts);
        }
        inner
    }
}

impl Recording<'_, PreparedLayer> {
    /// Records one slice. Slices run in order, each at most about [`Options::work_budget`] long; submit after each.
    pub fn encode_slice(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &LayerBuffers<'_>,
    ) -> Result<()> {
        self.of.record(slice, encoder, buffers, &self.set)?;
        self.hold(encoder);
        Ok(())
    }
}

/// The layer's own buffer for a slot.
fn own(set: &Set, slot: Slot) -> Option<wgpu::BufferSlice<'_>> {
    set.iter().find(|(own, _)| *own == slot).map(|(_, buffer)| buffer.slice(..))
}
