//! Makes the operations of a [`crate::layer::plan::LayerPlan`].

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Causal, Layout, Problem, Strides};
use crate::contract::shape::Shape;
use crate::dispatch::steps::Steps;
use crate::kernel::slot::Slot;
use crate::layer::operation::LayerOperation;
use crate::layer::parameters::Parameters;
use crate::layer::plan::Stage;
use crate::layer::projected::{self, Projected, joined};
use crate::layer::{Call, Layer, Weights};
use crate::ops::append::{self, Append};
use crate::ops::extra::lse_words;
use crate::ops::project::{Projection, RotatedColumns, Wiring};
use crate::ops::rotary::{self, Positions, Rotation};

/// The attention problem on the projected tensors.
fn inner_problem(layer: &Layer, problem: &Problem, call: &Call, [q, k, v]: &[Projected; 3]) -> Problem {
    let mut inner = problem.clone().with_layout(Layout::Bshd);
    inner.weights = call.weights.is_some();
    inner.lse = layer.bias_kv.is_some() || changes_weights(layer, call);
    inner.sinks |= layer.zero_attn;
    inner.q = Layout::Strided(q.strides);
    if call.cache {
        (inner.k, inner.v, inner.causal) = (Layout::Bhsd, Layout::Bhsd, Causal::Offset);
    } else {
        (inner.k, inner.v) = (Layout::Strided(k.strides), Layout::Strided(v.strides));
    }
    inner
}

/// Whether the weights that leave the layer are others than those of attention.
fn changes_weights(layer: &Layer, call: &Call) -> bool {
    match call.weights {
        None => false,
        Some(Weights::Heads) => layer.weight_columns(0) > 0,
        Some(Weights::Mean) => true,
    }
}

/// What a [`crate::layer::plan::LayerPlan`] is made from.
pub(crate) struct Planner<'a> {
    layer: &'a Layer,
    parameters: &'a Parameters,
    caps: &'a Caps,
    call: Call,
    /// The problem inside the layer.
    pub(crate) attention: Shape,
    pub(crate) projected: [Projected; 3],
}

impl<'a> Planner<'a> {
    pub(crate) fn new(
        layer: &'a Layer,
        parameters: &'a Parameters,
        problem: &Problem,
        call: &Call,
        caps: &'a Caps,
    ) -> Result<Self> {
        let projected = Projected::of_call(layer, parameters, problem, call, caps.limits.max_buffer_size);
        let attention = inner_problem(layer, problem, call, &projected).check()?;
        Ok(Planner { layer, parameters, caps, call: *call, attention, projected })
    }

    /// Strides of an input or the output of the layer.
    fn outer(&self, width: u32, rows: u32) -> Strides {
        let (batch, row) = if self.call.seq_first { (1, self.attention.problem.batch) } else { (rows, 1) };
        let width = u64::from(width);
        Strides { offset: 0, batch: u64::from(batch) * width, head: 0, row: u64::from(row) * width }
    }

    /// The operations with their dispatches.
    pub(crate) fn stage(&self, operations: Vec<LayerOperation>, options: &Options) -> Result<Stage> {
        let mut steps = Steps::new(self.caps, options);
        operations.iter().try_for_each(|operation| operation.dispatches(&self.attention, &mut steps))?;
        let (steps, slices) = steps.finish();
        Ok(Stage { operations, steps, slices })
    }

    /// The projections and rotations before attention, and what goes into the cache; says why rotations are where they are.
    pub(crate) fn before(&self) -> (Vec<LayerOperation>, Vec<String>) {
        let (mut operations, mut rotations, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
        for tensors in joined(&self.projected) {
            let projection = self.projection(tensors);
            let (first, mut wiring) = (tensors[0], wiring(&tensors[0]));
            if let Some(rotated) = self.rotated(tensors) {
                let named = tensors.iter().filter(|tensor| tensor.tensor != Slot::V);
                let names = named.map(|tensor| tensor.tensor.name()).collect::<Vec<_>>().join(" and ");
                match projection.rotation_obstacle(self.caps, &rotated) {
                    None => {
                        wiring.rotated = Some(rotated);
                        reasons.push(format!("rotary embedding of {names}: in the projection, which saves a pass"));
                    }
                    Some(why) => {
                        rotations.push(rotation(&first, &rotated));
                        reasons.push(format!("rotary embedding of {names}: not in the projection: {why}"));
                    }
                }
            }
            operations.push(LayerOperation::Project(projection, wiring));
        }
        operations.append(&mut rotations);
        if self.call.cache {
            let [_, k, v] = &self.projected;
            operations.extend([self.append(k, Slot::KeyCache), self.append(v, Slot::ValueCache)]);
        }
        (operations, reasons)
    }

    /// The product that gives all tensors of one buffer.
    fn projection(&self, tensors: &[Projected]) -> Projection {
        let (first, columns) = (&tensors[0], tensors.iter().map(|tensor| tensor.columns).sum());
        let map = match first.tensor {
            Slot::Q => &self.layer.query,
            Slot::K => &self.layer.key,
            _ => &self.layer.value,
        };
        let mut p = Projection::new(first.rows, map.inputs, columns, map.order, self.parameters.element);
        (p.batch, p.x) = (self.attention.problem.batch, self.outer(map.inputs, first.rows));
        (p.weight_offset, p.weight_row) = (first.parameters.weight_offset, first.parameters.weight_row);
        (p.bias, p.y) = (first.parameters.bias_offset, first.strides);
        match tensors {
            [_] => p.head_columns = first.head_dim,
            // The tensors of a row follow one another without a gap, whatever their heads.
            _ => (p.y.head, p.head_columns) = (0, columns),
        }
        p
    }

    /// The rotary embedding of queries and keys among the tensors of one buffer. Heads of keys follow those of queries there.
    fn rotated(&self, tensors: &[Projected]) -> Option<RotatedColumns> {
        let rotary = self.layer.rotary?;
        let queries_and_keys = tensors.iter().filter(|tensor| tensor.tensor != Slot::V);
        let columns = queries_and_keys.map(|tensor| tensor.columns).sum::<u32>();
        (columns > 0).then_some(RotatedColumns {
            columns,
            head_dim: tensors[0].head_dim,
            rotary_dim: rotary.dim,
            interleaved: rotary.interleaved,
            table_rows: rotary.positions,
            batch: self.attention.problem.batch,
            rows: tensors[0].rows,
        })
    }

    fn append(&self, new: &Projected, cache: Slot) -> LayerOperation {
        let (s, room) = (&self.attention, self.attention.problem.seq_kv);
        let mut append = Append::new(s.problem.batch, self.layer.kv_heads, new.rows, room, new.head_dim);
        append.x = Layout::Strided(new.strides);
        LayerOperation::Append(append, append::Slots { x: new.output, cache })
    }

    /// The added key, the output projection and the weights, after attention.
    pub(crate) fn after(&self) -> Vec<LayerOperation> {
        let (s, map, location) = (&self.attention, &self.layer.out, &self.parameters.out);
        let mut operations = Vec::new();
        if let Some(added) = self.parameters.added {
            operations.push(LayerOperation::JoinAddedKey { added, biases: self.parameters.biases });
        }
        let mut p = Projection::new(s.problem.seq_q, map.inputs, map.outputs, map.order, self.parameters.element);
        let row = u64::from(map.inputs);
        p.x = Strides { offset: 0, batch: u64::from(s.problem.seq_q) * row, head: 0, row };
        (p.batch, p.bias, p.y) = (s.problem.batch, location.bias_offset, self.outer(map.outputs, s.problem.seq_q));
        (p.weight_offset, p.weight_row) = (location.weight_offset, location.weight_row);
        let wiring = Wiring { x: Slot::Out, weight: location.buffer, y: Slot::Result, rotated: None };
        operations.push(LayerOperation::Project(p, wiring));
        if changes_weights(self.layer, &self.call) {
            operations.push(LayerOperation::GiveWeights {
                columns: self.layer.weight_columns(s.problem.seq_kv),
                mean: self.call.weights == Some(Weights::Mean),
                added: self.parameters.added.is_some(),
            });
        }
        operations
    }

    /// The buffers between the operations with their bytes. Each, and the zeros, must be a buffer that the device can have.
    pub(crate) fn scratch(&self, zeros: u64) -> Result<Vec<(Slot, u64)>> {
        let s = &self.attention;
        let mut named: Vec<_> = joined(&self.projected)
            .map(|tensors| {
                let field = match tensors[0].output {
                    Slot::Q => "projected queries",
                    Slot::K => "projected keys",
                    _ => "projected values",
                };
                (tensors[0].output, field, projected::bytes(s.problem.batch, tensors))
            })
            .collect();
        named.push((Slot::Out, "merged heads", 4 * s.out().extent()));
        if s.problem.lse {
            named.push((Slot::Lse, "log-sum-exp", 4 * lse_words(s, self.parameters.added.is_some())));
        }
        if changes_weights(self.layer, &self.call) {
            named.push((Slot::Weights, "weights of heads", 4 * s.scores_len()));
        }
        let limit = self.caps.limits.max_buffer_size;
        let sizes = named.iter().map(|&(_, field, bytes)| (field, bytes)).chain([("zeros", zeros)]);
        if let Some((field, value)) = sizes.into_iter().find(|&(_, bytes)| bytes > limit) {
            return Err(Error::bytes(field, value, limit));
        }
        // Buffers are never empty, tensors may be.
        Ok(named.into_iter().map(|(slot, _, bytes)| (slot, bytes.max(16))).collect())
    }
}

fn wiring(first: &Projected) -> Wiring {
    Wiring { x: first.input, weight: first.parameters.buffer, y: first.output, rotated: None }
}

/// The rotary embedding of a projection's first columns in a pass of its own.
fn rotation(first: &Projected, rotated: &RotatedColumns) -> LayerOperation {
    let heads = rotated.columns / rotated.head_dim;
    let mut rotation = Rotation::new(rotated.batch, heads, rotated.rows, rotated.head_dim, rotated.table_rows);
    (rotation.rotary_dim, rotation.interleaved) = (rotated.rotary_dim, rotated.interleaved);
    (rotation.positions, rotation.x) = (Positions::Starts, first.strides);
    LayerOperation::Rotate(rotation, rotary::Slots { x: first.output, y: first.output })
}
