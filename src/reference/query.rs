//! Which query rows there are, where they stand, and which keys each one sees.

use rayon::prelude::*;

use super::Real;
use crate::contract::operands::HostSlice;
use crate::contract::problem::{Broadcast, Causal, Elements, Inputs};
use crate::contract::shape::Shape;
use crate::contract::tensor::Tensor;

/// One batch, or one of the sequences laid end to end.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    pub shape: &'a Shape,
    pub inputs: &'a Inputs<'a>,
    /// Index into per-batch operands and the score matrix.
    batch: usize,
    /// Batch index into q, k, v and out: packed tensors have only one.
    slab: usize,
    first_row: usize,
    first_key: usize,
    /// Query rows.
    rows: usize,
    /// Keys that exist.
    keys: usize,
    /// Keys from here on are hidden.
    length: usize,
    /// Position of row 0.
    offset: i64,
}

impl<'a> Sequence<'a> {
    fn new(shape: &'a Shape, inputs: &'a Inputs<'a>, batch: usize) -> Self {
        let operands = &inputs.operands;
        let span = |cu: Option<HostSlice<'_>>, full: u32| match cu.map(HostSlice::u32s) {
            Some(cu) => (0, cu[batch] as usize, (cu[batch + 1] - cu[batch]) as usize),
            None => (batch, 0, full as usize),
        };
        let (slab, first_row, rows) = span(operands.cu_seqlens_q, shape.problem.seq_q);
        let (_, first_key, keys) = span(operands.cu_seqlens_kv, shape.problem.seq_kv);
        let length = operands.key_lengths.map_or(keys, |lengths| lengths.u32s()[batch] as usize);
        // Which page a key beyond the length would stand in is not said.
        let keys = if shape.problem.paged.is_some() { length } else { keys };
        let offset = match shape.problem.causal {
            Causal::None | Causal::TopLeft => 0,
            Causal::BottomRight => length as i64 - rows as i64,
            Causal::Offset => {
                operands.offsets.map_or(0, |offsets| offsets.i32s()[batch].clamp(-(1 << 30), 1 << 30).into())
            }
        };
        Sequence { shape, inputs, batch, slab, first_row, first_key, rows, keys, length, offset }
    }

    /// The same sequence of other q, k and v.
    pub fn of<'b>(&self, inputs: &'b Inputs<'b>) -> Sequence<'b>
    where
        'a: 'b,
    {
        Sequence { inputs, ..*self }
    }

    /// Keys of a head, dense [keys, head_dim].
    pub fn keys<T: Real>(&self, kv_head: usize) -> Vec<T> {
        self.gather(&self.inputs.k, self.shape.k(), kv_head)
    }

    /// Values of a head, dense [keys, value_dim].
    pub fn values<T: Real>(&self, kv_head: usize) -> Vec<T> {
        self.gather(&self.inputs.v, self.shape.v(), kv_head)
    }

    fn gather<T: Real>(&self, data: &Elements<'_>, tensor: &Tensor, head: usize) -> Vec<T> {
        let mut dense = Vec::with_capacity(self.keys * tensor.dim as usize);
        for key in self.first_key..self.first_key + self.keys {
            let (slab, row) = self.stands(key);
            read(data, at(tensor, slab, head, row), tensor.dim, &mut dense);
        }
        dense
    }

    /// Batch and row of k and v, or page and row in it, that hold a key.
    fn stands(&self, key: usize) -> (usize, usize) {
        match (self.shape.problem.paged, self.inputs.operands.block_table.map(HostSlice::u32s)) {
            (Some(paged), Some(table)) => {
                let size = paged.page_size as usize;
                let columns = table.len() / self.shape.problem.batch as usize;
                (table[self.batch * columns + key / size] as usize, key % size)
            }
            _ => (self.slab, key),
        }
    }
}

/// One query row of one head.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub shape: &'a Shape,
    sequence: Sequence<'a>,
    head: usize,
    /// Index within its sequence.
    index: usize,
}

impl<'a> Row<'a> {
    /// The same row of other q, k and v.
    pub fn of<'b>(&self, inputs: &'b Inputs<'b>) -> Row<'b>
    where
        'a: 'b,
    {
        Row { sequence: self.sequence.of(inputs), ..*self }
    }

    /// Keys that exist for this row, hidden ones included.
    pub fn keys(&self) -> usize {
        self.sequence.keys
    }

    /// The query, [head_dim].
    pub fn query<T: Real>(&self) -> Vec<T> {
        let (tensor, mut q) = (self.shape.q(), Vec::new());
        read(&self.sequence.inputs.q, at(tensor, self.sequence.slab, self.head, self.token()), tensor.dim, &mut q);
        q
    }

    /// Where its output row begins.
    pub fn out(&self) -> usize {
        at(self.shape.out(), self.sequence.slab, self.head, self.token())
    }

    /// Its index among all rows, as in `lse`.
    pub fn place(&self) -> usize {
        let [_, heads, tokens] = self.shape.out().sizes.map(|n| n as usize);
        (self.sequence.slab * heads + self.head) * tokens + self.token()
    }

    /// Where it begins in the score matrix.
    pub fn matrix(&self) -> usize {
        let [heads, seq_q, seq_kv] =
            [self.shape.problem.heads, self.shape.problem.seq_q, self.shape.problem.seq_kv].map(|n| n as usize);
        ((self.sequence.batch * heads + self.head) * seq_q + self.index) * seq_kv
    }

    /// Logit of the attention sink.
    pub fn sink<T: Real>(&self) -> Option<T> {
        self.sequence.inputs.operands.sinks.map(|sinks| T::of(sinks.f32s()[self.head].into()))
    }

    /// What ALiBi subtracts from the logit of key `j`: slope · |p − j|.
    pub fn alibi(&self, j: usize) -> f64 {
        let distance = (self.position() - self.key_position(j)).unsigned_abs();
        let slopes = self.sequence.inputs.operands.alibi_slopes;
        slopes.map_or(0.0, |slopes| f64::from(slopes.f32s()[self.head]) * distance as f64)
    }

    /// What the bias adds to the logit of key `j`; −inf beyond its last axis.
    pub fn bias(&self, j: usize) -> f64 {
        match (self.shape.problem.bias, self.sequence.inputs.operands.bias.map(HostSlice::floats)) {
            (Some(bias), Some(data)) => self.broadcast(bias.shape, j).map_or(f64::NEG_INFINITY, |at| data.get(at)),
            _ => 0.0,
        }
    }

    /// Whether this row sees key `j`.
    pub fn visible(&self, j: usize) -> bool {
        let (p, key) = (self.position(), self.key_position(j));
        let mask = || match (self.shape.problem.mask, self.sequence.inputs.operands.mask.map(HostSlice::u8s)) {
            (Some(shape), Some(mask)) => self.broadcast(shape, j).is_some_and(|at| mask[at] != 0),
            _ => true,
        };
        j < self.sequence.length
            && key >= 0
            && (self.shape.problem.causal == Causal::None || key <= p)
            && self.shape.problem.window.left.is_none_or(|left| key >= p - i64::from(left))
            && self.shape.problem.window.right.is_none_or(|right| key <= p + i64::from(right))
            && mask()
            && self.bias(j) != f64::NEG_INFINITY
    }

    /// Position p on the axis of the keys.
    fn position(&self) -> i64 {
        self.index as i64 + self.sequence.offset
    }

    /// Position of key `j`.
    fn key_position(&self, j: usize) -> i64 {
        match self.sequence.inputs.operands.key_positions.map(HostSlice::i32s) {
            Some(listed) => {
                listed[self.sequence.batch * self.shape.problem.seq_kv as usize + j].min((1 << 30) - 1).into()
            }
            None => j as i64,
        }
    }

    fn token(&self) -> usize {
        self.sequence.first_row + self.index
    }

    /// Where an operand holds the element for key `j`; `None` beyond a short last axis.
    fn broadcast(&self, Broadcast(shape): Broadcast, j: usize) -> Option<usize> {
        let shape = shape.map(|n| n as usize);
        let here = [self.sequence.batch, self.head, self.index, j];
        let place = shape.iter().zip(here).fold(0, |place, (&n, x)| place * n + if n == 1 { 0 } else { x });
        (shape[3] == 1 || j < shape[3]).then_some(place)
    }
}

/// Applies `each` to every row in parallel; `load` prepares what the rows of one key/value head of one sequence share.
pub(super) fn map<'a, S: Sync, R: Send>(
    shape: &'a Shape,
    inputs: &'a Inputs<'a>,
    load: impl Fn(&Sequence<'a>, usize) -> S + Sync,
    each: impl Fn(&Row<'a>, &S) -> R + Sync,
) -> Vec<(Row<'a>, R)> {
    map_rows(shape, inputs, &|_| true, load, each)
}

/// [`map`] over the rows that are `wanted` by their number within their sequence.
pub(super) fn map_rows<'a, S: Sync, R: Send>(
    shape: &'a Shape,
    inputs: &'a Inputs<'a>,
    wanted: &(dyn Fn(u32) -> bool + Sync),
    load: impl Fn(&Sequence<'a>, usize) -> S + Sync,
    each: impl Fn(&Row<'a>, &S) -> R + Sync,
) -> Vec<(Row<'a>, R)> {
    let [batch, heads, kv_heads] =
        [shape.problem.batch, shape.problem.heads, shape.problem.kv_heads].map(|n| n as usize);
    let group = heads / kv_heads;
    (0..batch * kv_heads)
        .into_par_iter()
        .flat_map_iter(|n| {
            let (sequence, kv_head) = (Sequence::new(shape, inputs, n / kv_heads), n % kv_heads);
            let shared = load(&sequence, kv_head);
            let row = |n: usize| {
                let row = Row { shape, sequence, head: kv_head * group + n / sequence.rows, index: n % sequence.rows };
                (row, each(&row, &shared))
            };
            let wanted = |n: &usize| wanted((n % sequence.rows) as u32);
            (0..group * sequence.rows).into_par_iter().filter(wanted).map(row).collect::<Vec<_>>()
        })
        .collect()
}

/// Puts rows of the score matrix in their places.
pub(super) fn matrix<T: Real>(shape: &Shape, rows: Vec<(Row<'_>, Vec<T>)>, unused: T) -> Vec<T> {
    let mut matrix = vec![unused; shape.scores_len() as usize];
    for (row, x) in rows {
        matrix[row.matrix()..][..x.len()].copy_from_slice(&x);
    }
    matrix
}

fn at(tensor: &Tensor, batch: usize, head: usize, row: usize) -> usize {
    let s = &tensor.strides;
    s.offset as usize + batch * s.batch as usize + head * s.head as usize + row * s.row as usize
}

fn read<T: Real>(data: &Elements<'_>, start: usize, dim: u32, into: &mut Vec<T>) {
    let range = start..start + dim as usize;
    match data {
        Elements::F32(x) => into.extend(x[range].iter().map(|&x| T::of(x.into()))),
        Elements::F16(x) => into.extend(x[range].iter().map(|&x| T::of(x.into()))),
        Elements::Bf16(x) => into.extend(x[range].iter().map(|&x| T::of(x.into()))),
    }
}
