//! How query, key and value are projected: from which input, by which weights, to where.

use crate::contract::problem::{Problem, Strides};
use crate::kernel::slot::Slot;
use crate::layer::parameters::{LinearLocation, Parameters};
use crate::layer::{Call, Layer, Linear, Sources};

/// How one of query, key and value is projected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Projected {
    /// What attention calls it: [`Slot::Q`], [`Slot::K`] or [`Slot::V`].
    pub(crate) tensor: Slot,
    /// The input of the layer that is multiplied.
    pub(crate) input: Slot,
    /// Where its weights and its bias are.
    pub(crate) parameters: LinearLocation,
    /// Rows of a batch.
    pub(crate) rows: u32,
    /// Columns of all heads.
    pub(crate) columns: u32,
    /// Columns of one head.
    pub(crate) head_dim: u32,
    /// The buffer that receives it. Tensors that share a buffer come out of one projection, side by side in each row.
    pub(crate) output: Slot,
    /// Where element (batch, head, row, column of a head) is in that buffer.
    pub(crate) strides: Strides,
}

impl Projected {
    /// In a buffer of its own.
    fn alone(
        tensor: Slot,
        input: Slot,
        map: &Linear,
        parameters: LinearLocation,
        [rows, head_dim]: [u32; 2],
    ) -> Projected {
        let (columns, strides) = (map.outputs, Strides::default());
        let mut alone = Projected { tensor, input, parameters, rows, columns, head_dim, output: tensor, strides };
        alone.place(0, columns.into());
        alone
    }

    /// Puts it behind the first `offset` columns of rows of `row` columns.
    fn place(&mut self, offset: u64, row: u64) {
        self.strides = Strides { offset, batch: u64::from(self.rows) * row, head: self.head_dim.into(), row };
    }

    /// Query, key and value of a call, joined as far as buffers of `max_buffer_size` bytes allow.
    pub(crate) fn of_call(
        layer: &Layer,
        parameters: &Parameters,
        problem: &Problem,
        call: &Call,
        max_buffer_size: u64,
    ) -> [Projected; 3] {
        let keys = call.projected_keys(problem);
        let [key_input, value_input] = match call.sources {
            Sources::Query => [Slot::Query; 2],
            Sources::Key => [Slot::Key; 2],
            Sources::Each => [Slot::Key, Slot::Value],
        };
        let [query, key, value] = parameters.inputs;
        let mut tensors = [
            Self::alone(Slot::Q, Slot::Query, &layer.query, query, [problem.seq_q, layer.key_dim]),
            Self::alone(Slot::K, key_input, &layer.key, key, [keys, layer.key_dim]),
            Self::alone(Slot::V, value_input, &layer.value, value, [keys, layer.value_dim]),
        ];
        let joins = |&first: &usize| {
            let joined = &tensors[first..];
            let one_product = |pair: &[Projected]| {
                (pair[0].input, pair[0].parameters.buffer) == (pair[1].input, pair[1].parameters.buffer)
            };
            joined.windows(2).all(one_product) && bytes(problem.batch, joined) <= max_buffer_size
        };
        if let Some(first) = (0..2).find(joins) {
            let (output, row) = (tensors[first].output, columns(&tensors[first..]));
            let mut offset = 0;
            for tensor in &mut tensors[first..] {
                tensor.output = output;
                tensor.place(offset, row);
                offset += u64::from(tensor.columns);
            }
        }
        tensors
    }
}

/// The tensors of one buffer each: what one projection computes.
pub(crate) fn joined(tensors: &[Projected; 3]) -> impl Iterator<Item = &[Projected]> {
    tensors.chunk_by(|left, right| left.output == right.output)
}

/// Columns of a row of a buffer that holds these tensors.
pub(crate) fn columns(tensors: &[Projected]) -> u64 {
    tensors.iter().map(|tensor| u64::from(tensor.columns)).sum()
}

/// Bytes of a buffer that holds these tensors.
pub(crate) fn bytes(batch: u32, tensors: &[Projected]) -> u64 {
    4 * u64::from(batch) * u64::from(tensors[0].rows) * columns(tensors)
}
