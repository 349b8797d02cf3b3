//! The stored results of trials, and what of a result is compared with them.

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

    /// The rows of a trial, of which each has so many; `place` is that of its dims and operands in the file.
    pub(super) fn stored(place: usize, rows: usize) -> impl Iterator<Item = Expected> {
        EXPECTED.chunks_exact(4 * NUMBERS).skip(place * rows).take(rows).map(Expected::from_bytes)
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

/// Whether two numbers differ by no more than a budget, or are the same infinity, or both NaN.
pub(super) fn near(got: f32, want: f32, budget: f32) -> bool {
    got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= budget
}
