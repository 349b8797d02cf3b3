//! The problem and the operands of a trial, and whether its results are right.

use half::{bf16, f16};

use super::expected::{Expected, RowSummary, factor, near};
use super::long;
use crate::contract::caps::Caps;
use crate::contract::operands::{HostSlice, Operands};
use crate::contract::options::Precision;
use crate::contract::problem::{Element, Elements, Inputs, Outputs, Problem};
use crate::contract::proof::problem::{BATCH, HEADS, PAGE_SIZE, PAGES, SEQ_KV, SEQ_Q, total_keys};
use crate::contract::proof::{Case, Trial};
use crate::contract::shape::{DIMS, Shape};
use crate::contract::tensor;

const ROWS: usize = (BATCH * HEADS * SEQ_Q) as usize;

const PAGES_EACH: u32 = SEQ_KV.div_ceil(PAGE_SIZE);

/// Keys of a dispatch where there are several.
const KEYS_EACH: u64 = 64;

/// Numbers in one of the element types.
enum Tensor {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    fn new(element: Element, values: Vec<f32>) -> Tensor {
        match element {
            Element::F32 => Tensor::F32(values),
            Element::F16 => Tensor::F16(values.into_iter().map(f16::from_f32).collect()),
            Element::Bf16 => Tensor::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Tensor::F32(x) => x.into(),
            Tensor::F16(x) => x.into(),
            Tensor::Bf16(x) => x.into(),
        }
    }
}

/// A multiple of 1/8 from −2 to 2, which every element type holds exactly.
fn number(seed: u64, at: usize) -> f32 {
    // The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    let mut x = (seed << 32).wrapping_add(at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) % 33) as f32 / 8.0 - 2.0
}

/// Everything that a trial reads, and what it must give.
pub struct Data {
    shape: Shape,
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// The values, [batch, keys, value_dim].
    values: Vec<f32>,
    mask: Vec<u8>,
    bias: Tensor,
    /// How exact the weights are.
    precision: Precision,
    block_table: Vec<u32>,
    cu_seqlens: [[u32; 3]; 2],
    /// The place of the expected results among those of all trials.
    place: usize,
}

const KEY_LENGTHS: [u32; 2] = [SEQ_KV, SEQ_KV - 1];
const OFFSETS: [i32; 2] = [97, 90];
const SLOPES: [f32; 2] = [0.125, 0.03125];
const SINKS: [f32; 2] = [0.5, -1.25];

impl Data {
    /// Of a trial.
    pub fn of(trial: &Trial) -> Data {
        if trial.case == Case::Long {
            let row = |of: [f32; long::DIMS]| Tensor::new(trial.element, of.to_vec());
            let zeros = [0.0; long::DIMS];
            return Data::new(trial, checked(&long::problem(trial)), [row(zeros), row(zeros), row(long::VALUE)]);
        }
        let problem = trial.problem();
        let p = &problem;
        let values = |seed, heads: u32, rows: u32, dim: u32| -> Vec<f32> {
            (0..(BATCH * heads * rows * dim) as usize).map(|at| number(seed, at)).collect()
        };
        let mut q = values(1, HEADS, SEQ_Q, p.head_dim);
        let mut k = values(2, p.kv_heads, SEQ_KV, p.head_dim);
        let mut v = values(3, p.kv_heads, SEQ_KV, p.value_dim);
        // The first batch is finite, because some kernels compute in another way where anything is not. In the second one few rows
        // see what is not finite: the last rows alone see the last keys.
        let set = |tensor: &mut Vec<f32>, row: u32, dim: u32, at: u32, x: f32| tensor[(row * dim + at) as usize] = x;
        set(&mut q, 3 * SEQ_Q + 20, p.head_dim, 0, f32::NAN);
        set(&mut k, SEQ_KV + 125, p.head_dim, 2, f32::INFINITY);
        set(&mut k, SEQ_KV + 127, p.head_dim, 1, f32::NAN);
        set(&mut v, SEQ_KV + 120, p.value_dim, 2, f32::INFINITY);
        set(&mut v, SEQ_KV + 122, p.value_dim, 5, f32::NAN);
        // With operands nobody sees the last key of the second batch.
        if trial.operands {
            set(&mut k, SEQ_KV + 129, p.head_dim, 3, f32::NAN);
            set(&mut v, SEQ_KV + 129, p.value_dim, 3, f32::NAN);
        }
        let shape = checked(p);
        let case = trial.case;
        let buffer = |of: &tensor::Tensor, rows: &[f32], place: &dyn Fn(u32, u32, u32) -> Option<u64>| {
            Tensor::new(trial.element, placed(of, rows, place))
        };
        let key = |of: tensor::Tensor| move |batch, head, key| key_at(case, trial.operands, &of, batch, head, key);
        let tensors = [
            buffer(&shape.q, &q, &|batch, head, row| Some(row_at(case, &shape.q, batch, head, row))),
            buffer(&shape.k, &k, &key(shape.k)),
            buffer(&shape.v, &v, &key(shape.v)),
        ];
        Data { values: v, ..Data::new(trial, shape, tensors) }
    }

    /// Of q, k and v; the rest follows from the trial.
    fn new(trial: &Trial, shape: Shape, [q, k, v]: [Tensor; 3]) -> Data {
        let p = &shape.problem;
        let bias = p.bias.map_or(Vec::new(), |bias| (0..bias.shape.len()).map(|at| number(5, at)).collect());
        let dims = DIMS.into_iter().position(|dims| dims == trial.dims).expect("a trial has the dims of a class");
        Data {
            case: trial.case,
            precision: trial.precision,
            q,
            k,
            v,
            values: Vec::new(),
            mask: p.mask.map_or(Vec::new(), |mask| (0..mask.len()).map(|at| u8::from(number(4, at) > -1.0)).collect()),
            bias: Tensor::new(trial.element, bias),
            block_table: (0..BATCH * PAGES_EACH).map(page).collect(),
            cu_seqlens: [[0, SEQ_Q, 2 * SEQ_Q], [0, SEQ_KV, total_keys(trial.operands)]],
            place: 2 * dims + usize::from(trial.operands),
            shape,
        }
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.shape.problem
    }

    /// The device, as far as the trial uses it: bindings so small that they hold a part of the keys, where there are to be several.
    pub(super) fn caps(&self, caps: &Caps) -> Caps {
        let mut caps = caps.clone();
        if self.case == Case::Several {
            let row = self.shape.k.strides.row * self.problem().element.bytes();
            let limit = &mut caps.limits.max_storage_buffer_binding_size;
            *limit = (KEYS_EACH * row + 256).min(*limit);
        }
        caps
    }

    /// The operands.
    pub fn inputs(&self) -> Inputs<'_> {
        let mut inputs = Inputs::new(self.q.elements(), self.k.elements(), self.v.elements());
        let p = self.problem();
        let operands = &mut inputs.operands;
        if p.mask.is_some() {
            *operands = Operands {
                mask: Some(HostSlice::from(&self.mask)),
                bias: Some(self.bias.elements().into()),
                offsets: Some(HostSlice::from(&OFFSETS)),
                alibi_slopes: Some(HostSlice::from(&SLOPES)),
                sinks: Some(HostSlice::from(&SINKS)),
                ..Operands::default()
            };
        }
        operands.key_lengths = p.key_lengths.then(|| HostSlice::from(&KEY_LENGTHS));
        operands.block_table = p.paged.map(|_| HostSlice::from(&self.block_table));
        if p.packed.is_some() {
            [operands.cu_seqlens_q, operands.cu_seqlens_kv] =
                self.cu_seqlens.each_ref().map(|of| Some(HostSlice::from(of)));
        }
        inputs
    }

    /// The expected results, row by row; none are stored of [`Case::Long`].
    pub fn expected(&self) -> impl Iterator<Item = Expected> {
        Expected::stored(self.place, ROWS)
    }

    /// Each row of outputs.
    pub fn summaries<T: Copy + Into<f64>>(&self, outputs: &Outputs<T>) -> Vec<RowSummary> {
        let dim = self.problem().value_dim as usize;
        let row = |(batch, head, row)| {
            let at = row_at(self.case, &self.shape.out, batch, head, row) as usize;
            let line = match self.case {
                Case::Packed => (head * BATCH + batch) * SEQ_Q + row,
                _ => (batch * HEADS + head) * SEQ_Q + row,
            };
            RowSummary::new(&outputs.out[at..][..dim], outputs.lse.as_ref().map(|lse| lse[line as usize]))
        };
        each_row(HEADS, SEQ_Q).map(row).collect()
    }

    /// The same by the weights that were given, or that follow from the logits.
    fn weighed(&self, outputs: &Outputs) -> Option<Vec<RowSummary>> {
        let p = self.problem();
        let weights = match (&outputs.weights, &outputs.logits) {
            (Some(weights), _) => weights.iter().copied().map(f64::from).collect(),
            (None, Some(logits)) => softmax(logits, p.sinks),
            (None, None) => return None,
        };
        let (keys, dim) = (SEQ_KV as usize, p.value_dim as usize);
        let row = |(n, weights): (usize, &[f64])| {
            let values = self.values.chunks_exact(keys * dim).nth(n / (HEADS * SEQ_Q) as usize).expect("a batch");
            let mut out = vec![0.0; dim];
            // Hidden keys weigh 0, and hold what must not show.
            for (weight, value) in weights.iter().zip(values.chunks_exact(dim)).filter(|(weight, _)| **weight != 0.0) {
                out.iter_mut().zip(value).for_each(|(sum, &x)| *sum += weight * f64::from(x));
            }
            RowSummary::new(&out, None)
        };
        Some(weights.chunks_exact(keys).enumerate().map(row).collect())
    }

    /// How much weights rounded to f16 move the sum of a row, at most: 2⁻¹¹ Σ p |v| in each element, where no finite value is beyond 2
    /// and the weights add up to 1.
    fn rounded_weights(&self) -> f32 {
        let factors: f64 = (0..self.problem().value_dim as usize).map(factor).sum();
        (2.0 * factors / 2048.0) as f32
    }

    /// Whether outputs are right, or what is wrong with the first row that is not.
    pub(super) fn judge(&self, outputs: &Outputs) -> Result<(), String> {
        if self.case == Case::Long {
            return long::judge(self.problem(), outputs);
        }
        let element = match self.problem().element {
            Element::F32 => 0,
            Element::F16 => 1,
            Element::Bf16 => 2,
        };
        // With `Precision::Fast` the outputs may be off by more. Weights and logits that a problem asks for are as exact as ever.
        let rounded = match self.precision {
            Precision::Strict => 0.0,
            Precision::Fast => self.rounded_weights(),
        };
        let budgets = |expected: &Expected| expected.sum_budget[element] + rounded;
        self.compare("outputs", self.summaries(outputs), budgets, true)?;
        // They are f32, whatever the type of the outputs is.
        let budgets = |expected: &Expected| expected.sum_budget[0];
        self.weighed(outputs).map_or(Ok(()), |rows| self.compare("values by weights or logits", rows, budgets, false))
    }

    fn compare(
        &self,
        sum: &str,
        rows: Vec<RowSummary>,
        sum_budget: impl Fn(&Expected) -> f32,
        lse: bool,
    ) -> Result<(), String> {
        for ((n, got), expected) in rows.into_iter().enumerate().zip(self.expected()) {
            let want = expected.row;
            let difference = [
                ("sum", got.sum, want.sum, sum_budget(&expected)),
                ("code of the NaN and infinities", got.nonfinite, want.nonfinite, 0.0),
                ("lse", if lse { got.lse } else { want.lse }, want.lse, expected.lse_budget),
            ]
            .into_iter()
            .find(|&(_, got, want, budget)| !near(got, want, budget));
            if let Some((what, got, want, budget)) = difference {
                let (row, heads) = (n as u32 % SEQ_Q, n as u32 / SEQ_Q);
                let (head, batch) = (heads % HEADS, heads / HEADS);
                let what = if what == "lse" { what.into() } else { format!("{what} of the {sum}") };
                return Err(format!(
                    "the {what} of query {row} of head {head} of batch {batch} is {got} and must be {want} ± {budget:e}"
                ));
            }
        }
        Ok(())
    }
}

/// The shape of a trial's problem.
fn checked(problem: &Problem) -> Shape {
    problem.check().expect("a trial has a problem that is right")
}

/// Batch, head and row of each row of a tensor.
fn each_row(heads: u32, rows: u32) -> impl Iterator<Item = (u32, u32, u32)> {
    (0..BATCH * heads * rows).map(move |n| (n / rows / heads, n / rows % heads, n % rows))
}

/// The elements of a buffer with these rows in their places; NaN in between.
fn placed(of: &tensor::Tensor, rows: &[f32], place: &dyn Fn(u32, u32, u32) -> Option<u64>) -> Vec<f32> {
    let mut buffer = vec![f32::NAN; of.extent() as usize];
    let (heads, dim) = (of.sizes[1], of.dim as usize);
    let each = (rows.len() / dim) as u32 / BATCH / heads;
    for ((batch, head, row), values) in each_row(heads, each).zip(rows.chunks_exact(dim)) {
        if let Some(at) = place(batch, head, row) {
            buffer[at as usize..][..dim].copy_from_slice(values);
        }
    }
    buffer
}

/// Where a row of q or out is.
fn row_at(case: Case, of: &tensor::Tensor, batch: u32, head: u32, row: u32) -> u64 {
    if case == Case::Packed { of.at(0, head, batch * SEQ_Q + row) } else { of.at(batch, head, row) }
}

/// Where a row of k or v is, unless its sequence has no such key.
fn key_at(case: Case, operands: bool, of: &tensor::Tensor, batch: u32, head: u32, key: u32) -> Option<u64> {
    let row = batch * SEQ_KV + key;
    match case {
        Case::Packed => (row < total_keys(operands)).then(|| of.at(0, head, row)),
        Case::Paged => Some(of.at(page(batch * PAGES_EACH + key / PAGE_SIZE), head, key % PAGE_SIZE)),
        _ => Some(of.at(batch, head, key)),
    }
}

/// The page of the pool at a place of the block table: each once, in no order.
fn page(place: u32) -> u32 {
    (7 * place + 3) % PAGES
}

/// The weights that follow from the logits of each row.
fn softmax(logits: &[f32], sinks: bool) -> Vec<f64> {
    let rows = logits.chunks_exact(SEQ_KV as usize).enumerate();
    let row = |(n, row): (usize, &[f32])| {
        let sink = sinks.then(|| f64::from(SINKS[n / SEQ_Q as usize % HEADS as usize]));
        let all = || row.iter().copied().map(f64::from).chain(sink);
        let top = all().fold(f64::NEG_INFINITY, |top, x| if x.is_nan() || x > top { x } else { top });
        let weigh = move |x: f64| if top == f64::NEG_INFINITY { 0.0 } else { (x - top).exp() };
        let total: f64 = all().map(weigh).sum();
        row.iter().map(move |&x| if total == 0.0 { 0.0 } else { weigh(x.into()) / total }).collect::<Vec<_>>()
    };
    rows.flat_map(row).collect()
}
