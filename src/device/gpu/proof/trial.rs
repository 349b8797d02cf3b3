//! The problem, the operands and the stored results of a trial.

use half::{bf16, f16};

use crate::contract::operands::{HostSlice, Operands};
use crate::contract::options::Precision;
use crate::contract::problem::{Bias, Broadcast, Causal, Element, Elements, Inputs, Outputs, Problem, Window};
use crate::contract::proof::Trial;
use crate::contract::shape::DIMS;

const BATCH: u32 = 2;
const HEADS: u32 = 2;
/// More than the lanes of a CPU adapter, and odd.
const SEQ_Q: u32 = 33;
/// Several tiles of keys of every kernel, and a part of one.
const SEQ_KV: u32 = 130;
const ROWS: usize = (BATCH * HEADS * SEQ_Q) as usize;

/// The expected results of a row of out, and of its lse.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// The results themselves.
    pub row: RowSummary,
    /// How far [`RowSummary::sum`] may be off, for f32, f16 and bf16.
    pub sum_budget: [f32; 3],
    /// How far lse may be off.
    pub lse_budget: f32,
}

/// What is compared of a row of out and of its lse.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSummary {
    /// The sum of the finite elements of out, each times its [`factor`].
    pub sum: f32,
    /// The number of NaN among the elements of out, plus 1000 times the number of infinities.
    pub nonfinite: f32,
    /// The lse; 0 where the problem has none.
    pub lse: f32,
}

/// The factor of an element of a row in the sum of the row: elements that change places change the sum.
pub fn factor(dim: usize) -> f64 {
    1.0 + (dim % 7) as f64
}

impl RowSummary {
    /// Of a row of out with its lse.
    pub fn new<T: Copy + Into<f64>>(out: &[T], lse: Option<T>) -> RowSummary {
        let (mut sum, mut nonfinite) = (0.0, 0.0);
        for (dim, &x) in out.iter().enumerate() {
            match x.into() {
                x if x.is_nan() => nonfinite += 1.0,
                x if x.is_infinite() => nonfinite += 1000.0,
                x => sum += factor(dim) * x,
            }
        }
        RowSummary { sum: sum as f32, nonfinite, lse: lse.map_or(0.0, |lse| lse.into() as f32) }
    }
}

/// The numbers of a row in the file of expected results, in the order of the fields of [`Expected`].
const NUMBERS: usize = 7;

impl Expected {
    /// The bytes of a row in the file of expected results.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Expected { row: RowSummary { sum, nonfinite, lse }, sum_budget: [f32, f16, bf16], lse_budget } = *self;
        [sum, nonfinite, lse, f32, f16, bf16, lse_budget].into_iter().flat_map(f32::to_le_bytes).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Expected {
        let number = |n: usize| f32::from_le_bytes(bytes[4 * n..][..4].try_into().expect("four bytes"));
        Expected {
            row: RowSummary { sum: number(0), nonfinite: number(1), lse: number(2) },
            sum_budget: [number(3), number(4), number(5)],
            lse_budget: number(6),
        }
    }
}

/// The expected results of every trial: for each of the dims without and with operands, row by row. A test computes them with the f64
/// reference, and compares.
static EXPECTED: &[u8] = include_bytes!("expected.bin");

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
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Vec<u8>,
    bias: Tensor,
    /// How exact the weights are.
    precision: Precision,
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
        let problem = problem(trial);
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
        let tensor = |values| Tensor::new(trial.element, values);
        let mask = p.mask.map_or(Vec::new(), |mask| (0..mask.len()).map(|at| u8::from(number(4, at) > -1.0)).collect());
        let bias = p.bias.map_or(Vec::new(), |bias| (0..bias.shape.len()).map(|at| number(5, at)).collect());
        let dims = DIMS.into_iter().position(|dims| dims == trial.dims).expect("a trial has the dims of a class");
        let place = 2 * dims + usize::from(trial.operands);
        Data {
            q: tensor(q),
            k: tensor(k),
            v: tensor(v),
            mask,
            bias: tensor(bias),
            precision: trial.precision,
            place,
            problem,
        }
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The operands.
    pub fn inputs(&self) -> Inputs<'_> {
        let mut inputs = Inputs::new(self.q.elements(), self.k.elements(), self.v.elements());
        if self.problem.mask.is_some() {
            inputs.operands = Operands {
                mask: Some(HostSlice::from(&self.mask)),
                bias: Some(self.bias.elements().into()),
                key_lengths: Some(HostSlice::from(&KEY_LENGTHS)),
                offsets: Some(HostSlice::from(&OFFSETS)),
                alibi_slopes: Some(HostSlice::from(&SLOPES)),
                sinks: Some(HostSlice::from(&SINKS)),
                ..Operands::default()
            };
        }
        inputs
    }

    /// The expected results, row by row.
    pub fn expected(&self) -> impl Iterator<Item = Expected> {
        EXPECTED.chunks_exact(4 * NUMBERS).skip(self.place * ROWS).take(ROWS).map(Expected::from_bytes)
    }

    /// Each row of outputs.
    pub fn summaries<T: Copy + Into<f64>>(&self, outputs: &Outputs<T>) -> Vec<RowSummary> {
        let rows = outputs.out.chunks_exact(self.problem.value_dim as usize).enumerate();
        rows.map(|(row, out)| RowSummary::new(out, outputs.lse.as_ref().map(|lse| lse[row]))).collect()
    }

    /// How much weights rounded to f16 move the sum of a row, at most: 2⁻¹¹ Σ p |v| in each element, where no finite value is beyond 2
    /// and the weights add up to 1.
    fn rounded_weights(&self) -> f32 {
        let factors: f64 = (0..self.problem.value_dim as usize).map(factor).sum();
        (2.0 * factors / 2048.0) as f32
    }

    /// Whether outputs are right, or what is wrong with the first row that is not.
    pub(super) fn judge(&self, outputs: &Outputs) -> Result<(), String> {
        let element = match self.problem.element {
            Element::F32 => 0,
            Element::F16 => 1,
            Element::Bf16 => 2,
        };
        let rounded = match self.precision {
            Precision::Strict => 0.0,
            Precision::Fast => self.rounded_weights(),
        };
        for ((n, got), expected) in self.summaries(outputs).into_iter().enumerate().zip(self.expected()) {
            let want = expected.row;
            let difference = [
                ("sum of the outputs", got.sum, want.sum, expected.sum_budget[element] + rounded),
                ("code of the NaN and infinities", got.nonfinite, want.nonfinite, 0.0),
                ("lse", got.lse, want.lse, expected.lse_budget),
            ]
            .into_iter()
            .find(|&(_, got, want, budget)| !near(got, want, budget));
            if let Some((what, got, want, budget)) = difference {
                let (row, heads) = (n as u32 % SEQ_Q, n as u32 / SEQ_Q);
                let (head, batch) = (heads % HEADS, heads / HEADS);
                return Err(format!(
                    "the {what} of query {row} of head {head} of batch {batch} is {got} and must be {want} ± {budget:e}"
                ));
            }
        }
        Ok(())
    }
}

/// Whether two numbers differ by no more than a budget, or are the same infinity, or both NaN.
fn near(got: f32, want: f32, budget: f32) -> bool {
    got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= budget
}

fn problem(trial: &Trial) -> Problem {
    // The last vector of four of the dims holds no value.
    let mut p = Problem::new(BATCH, HEADS, SEQ_Q, SEQ_KV, trial.dims);
    (p.kv_heads, p.value_dim, p.element) = (1, trial.dims - 4, trial.element);
    p.causal = Causal::BottomRight;
    if trial.operands {
        p.mask = Some(Broadcast([BATCH, 1, SEQ_Q, SEQ_KV]));
        p.bias = Some(Bias { shape: Broadcast([1, HEADS, SEQ_Q, SEQ_KV]), element: trial.element });
        p.causal = Causal::Offset;
        p.window = Window { left: Some(100), right: None };
        p.softcap = Some(5.0);
        (p.key_lengths, p.alibi, p.sinks, p.lse) = (true, true, true, true);
    }
    p
}
