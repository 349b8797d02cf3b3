//! The problem that is timed: its operands, and what the reference computes from them.

use std::ops::Range;

use wgpu_attention::{Causal, Problem, Shape};

use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::memory;
use crate::operands::{Array, OwnedInputs};
use crate::options::ShapeArg;
use crate::oracle::{Judgement, Oracle};
use crate::sample::Sample;

/// The number of runs of neighbouring rows that are checked of a large problem: the first rows, the last rows, and runs at equal distances
/// between.
const CHECK_RUNS: u32 = 5;

/// A problem to time, with the reference's results for all or some of its rows.
pub struct Subject {
    pub shape: ShapeArg,
    pub problem: Problem,
    pub operands: OwnedInputs,
    /// Ranges of rows of each head, and their expected results.
    checked: Vec<(Range<u32>, Oracle)>,
}

/// Refuses problems without work: their times would mean nothing, and their rates would be 0 divided by a time.
pub fn must_have_work(shape: ShapeArg, problem: &Problem) -> Result<()> {
    match problem.check()?.visible_pairs() {
        0 => Err(Error::NoWork { shape: shape.to_string() }),
        _ => Ok(()),
    }
}

impl Subject {
    /// Prepares a problem without operands beside q, k and v. The check may take at most `check_flops` operations.
    pub fn new(shape: ShapeArg, problem: Problem, check_flops: f64) -> Result<Self> {
        let checked = problem.check()?;
        let all = 4.0 * checked.scores_len() as f64 * f64::from(problem.head_dim);
        let rows = (f64::from(problem.seq_q) * (check_flops / all).min(1.0)).ceil().max(1.0) as u32;
        memory::room("the problem with its reference", Self::bytes(&checked, rows)?)?;
        let operands = Sample(2).operands(&problem)?;
        let oracle = |rows: Range<u32>| -> Result<(Range<u32>, Oracle)> {
            let (part, operands) = only(&problem, &operands, &rows);
            Ok((rows, Oracle::new(&part, &operands.inputs())?))
        };
        let checked = runs(problem.seq_q, rows).into_iter().map(oracle).collect::<Result<_>>()?;
        Ok(Subject { shape, problem, operands, checked })
    }

    /// Bytes on the host for the operands, a copy of them for a run of rows, and the reference for `rows` rows of each head.
    fn bytes(shape: &Shape, rows: u32) -> Result<u64> {
        let [q, k, v] = [shape.q(), shape.k(), shape.v()].map(|tensor| tensor.extent());
        let mut part: Problem = shape.problem().clone();
        part.seq_q = rows;
        let reference = memory::of_reference(&part.check()?, 8, true);
        // Random numbers are made in f32 and rounded afterwards.
        Ok(2 * shape.problem().element.bytes() * (q + k + v) + 4 * q.max(k).max(v) + reference)
    }

    /// The judgement of the run of rows that uses most of its error budget.
    pub fn judge(&self, out: &[f32]) -> Judgement {
        let p = &self.problem;
        let one = |(rows, oracle): &(Range<u32>, Oracle)| {
            let heads = out.chunks_exact((p.seq_q * p.value_dim) as usize);
            let range = (rows.start * p.value_dim) as usize..(rows.end * p.value_dim) as usize;
            oracle.out(&heads.flat_map(|head| &head[range.clone()]).copied().collect::<Vec<_>>())
        };
        let worse = |a: Judgement, b: Judgement| {
            if b.comparison.worst_ratio > a.comparison.worst_ratio { b } else { a }
        };
        self.checked.iter().map(one).reduce(worse).expect("at least one run of rows")
    }

    /// Tells which rows are checked; `None` if all are.
    pub fn sampled(&self) -> Option<String> {
        let names: Vec<String> =
            self.checked.iter().map(|(rows, _)| format!("{} to {}", rows.start, rows.end - 1)).collect();
        let count: u32 = self.checked.iter().map(|(rows, _)| rows.len() as u32).sum();
        (count < self.problem.seq_q).then(|| {
            let all = self.problem.seq_q;
            format!("{}: checked on {count} of {all} query rows: {}", self.shape, names.join(", "))
        })
    }
}

/// At most `rows` of `seq_q` rows, as runs at equal distances. The first run begins with the first row, and the last one ends with the last
/// row.
fn runs(seq_q: u32, rows: u32) -> Vec<Range<u32>> {
    if rows >= seq_q {
        return std::iter::once(0..seq_q).collect();
    }
    let count = CHECK_RUNS.min(rows);
    let each = rows / count;
    let start = |n: u32| match count {
        // A single row: the last one, which sees the most keys under a causal rule.
        1 => seq_q - each,
        _ => (u64::from(seq_q - each) * u64::from(n) / u64::from(count - 1)) as u32,
    };
    (0..count).map(|n| start(n)..start(n) + each).collect()
}

/// The problem of some query rows of each head, with the same keys and positions.
fn only(problem: &Problem, inputs: &OwnedInputs, rows: &Range<u32>) -> (Problem, OwnedInputs) {
    let (mut part, mut inputs) = (problem.clone(), inputs.clone());
    if rows.len() as u32 == problem.seq_q {
        return (part, inputs);
    }
    part.seq_q = rows.len() as u32;
    let first = match problem.causal {
        Causal::TopLeft => Some(0),
        Causal::BottomRight => Some(problem.seq_kv as i32 - problem.seq_q as i32),
        _ => None,
    };
    if let Some(first) = first {
        part.causal = Causal::Offset;
        inputs.operands.offsets = Some(Array::I32(vec![first + rows.start as i32; problem.batch as usize]));
    }
    let dim = problem.head_dim as usize;
    let (all, kept) = (problem.seq_q as usize * dim, rows.start as usize * dim..rows.end as usize * dim);
    fn pick<T: Copy>(x: &[T], all: usize, kept: &Range<usize>) -> Vec<T> {
        x.chunks_exact(all).flat_map(|head| &head[kept.clone()]).copied().collect()
    }
    inputs.q = match &inputs.q {
        Floats::F32(x) => Floats::F32(pick(x, all, &kept)),
        Floats::F16(x) => Floats::F16(pick(x, all, &kept)),
        Floats::Bf16(x) => Floats::Bf16(pick(x, all, &kept)),
    };
    (part, inputs)
}

#[cfg(test)]
mod tests {
    use wgpu_attention::{Element, reference, with};

    use super::*;

    #[test]
    fn rows_are_sampled_from_the_first_to_the_last() {
        let of = |seq_q, rows| runs(seq_q, rows).into_iter().map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert_eq!(of(10, 10), [(0, 10)]);
        let long = [(0, 17), (32763, 32780), (65527, 65544), (98291, 98308), (131055, 131072)];
        assert_eq!(of(1 << 17, 89), long);
        assert_eq!(of(100, 3), [(0, 1), (49, 50), (99, 100)]);
        assert_eq!(of(100, 1), [(99, 100)]);
        for rows in 1..40 {
            let runs = runs(40, rows);
            assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start) && runs.last().unwrap().end == 40);
        }
    }

    #[test]
    fn sampled_rows_are_judged_as_those_of_the_whole() {
        for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight] {
            let mut subject = {
                let shape: ShapeArg = "2,4,2,33,47,8".parse().unwrap();
                let problem = with!(shape.problem(), causal, element: Element::F16);
                Subject::new(shape, problem, 3e9).unwrap()
            };
            let oracle = |rows| {
                let (part, operands) = only(&subject.problem, &subject.operands, &rows);
                (rows, Oracle::new(&part, &operands.inputs()).unwrap())
            };
            subject.checked = runs(33, 12).into_iter().map(oracle).collect();
            assert!(subject.sampled().unwrap().contains("10 of 33 query rows: 0 to 1, 7 to 8,"));
            let right = reference::attention::<f32>(&subject.problem, &subject.operands.inputs()).unwrap().out;
            assert!(subject.judge(&right).comparison.passed());
            for row in [0, 1, 8, 32] {
                let mut wrong = right.clone();
                wrong[(33 * 5 + row) * 8 + 3] += 0.1;
                assert!(!subject.judge(&wrong).comparison.passed(), "row {row}");
            }
        }
    }
}
