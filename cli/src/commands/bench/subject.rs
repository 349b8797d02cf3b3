//! The problem that is timed: its operands, and what the reference computes from them.

use std::ops::Range;

use wgpu_attention::{Precision, Shape, reference};

use crate::error::{Error, Result};
use crate::memory;
use crate::operands::OwnedInputs;
use crate::oracle::{Judgement, Oracle};
use crate::problem::Given;
use crate::sample::Sample;

/// The number of runs of neighbouring rows that are checked of a large problem: the first rows, the last rows, and runs at equal distances
/// between.
const CHECK_RUNS: u32 = 5;

/// A problem to time, with the reference's results for all or some of its rows.
pub struct Subject {
    pub given: Given,
    pub operands: OwnedInputs,
    /// Operations over the pairs of query and key that are visible.
    pub flops: f64,
    /// Ranges of rows of each head that are checked.
    checked: Vec<Range<u32>>,
    oracle: Oracle,
}

/// Refuses problems without work: their times would mean nothing, and their rates would be 0 divided by a time.
pub fn must_have_work(given: &Given) -> Result<()> {
    match given.problem.check()?.visible_pairs() {
        0 => Err(no_work(given)),
        _ => Ok(()),
    }
}

fn no_work(given: &Given) -> Error {
    Error::NoWork { problem: given.to_string() }
}

impl Subject {
    /// Makes up operands and computes the reference, for results of some precision. The check may take at most `check_flops` operations.
    pub fn new(given: Given, precision: Precision, check_flops: f64) -> Result<Self> {
        let problem = &given.problem;
        let shape = problem.check()?;
        let all = 4.0 * shape.scores_len() as f64 * f64::from(problem.head_dim);
        let rows = (f64::from(problem.seq_q) * (check_flops / all).min(1.0)).ceil().max(1.0) as u32;
        memory::room("the problem with its reference", Self::bytes(&shape)?)?;
        let operands = Sample(2).operands(&given)?;
        let inputs = operands.inputs();
        // Only operands tell what is visible beyond causal rule and window, and that takes a look at every pair.
        let pairs = match inputs.operands.iter().next() {
            None => shape.visible_pairs(),
            Some(_) => reference::visible_pairs(problem, &inputs)?,
        };
        if pairs == 0 {
            return Err(no_work(&given));
        }
        let flops = pairs as f64 * 2.0 * f64::from(problem.head_dim + problem.value_dim);
        let checked = runs(problem.seq_q, rows);
        let oracle = Oracle::of_rows(problem, &inputs, precision, &checked)?;
        Ok(Subject { given, operands, flops, checked, oracle })
    }

    /// Bytes on the host for the operands and the reference.
    fn bytes(shape: &Shape) -> Result<u64> {
        let [q, k, v] = [shape.q(), shape.k(), shape.v()].map(|tensor| tensor.extent());
        // Random numbers are made in f32 and rounded afterwards.
        let numbers = 4 * q.max(k).max(v) + shape.problem().element.bytes() * (q + k + v);
        Ok(numbers + memory::of_operands(shape) + memory::of_reference(shape, 8, true))
    }

    /// The judgement of the rows that are checked.
    pub fn judge(&self, out: &[f32]) -> Judgement {
        self.oracle.out(out)
    }

    /// Tells which rows are checked; `None` if all are.
    pub fn sampled(&self) -> Option<String> {
        let names: Vec<String> =
            self.checked.iter().map(|rows| format!("{} to {}", rows.start, rows.end - 1)).collect();
        let count: u32 = self.checked.iter().map(|rows| rows.len() as u32).sum();
        let all = self.given.problem.seq_q;
        (count < all).then(|| format!("{}: checked on {count} of {all} query rows: {}", self.given, names.join(", ")))
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

#[cfg(test)]
mod tests {
    use wgpu_attention::{Broadcast, Causal, Element, Problem, with};

    use super::*;
    use crate::options::ShapeArg;

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
    fn sampled_rows_are_judged_and_no_others() {
        for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight] {
            let shape: ShapeArg = "2,4,2,33,47,8".parse().unwrap();
            let mut problem = with!(shape.problem(), causal, element: Element::F16, alibi: true);
            problem.mask = Some(Broadcast([1, 1, 33, 47]));
            let subject =
                Subject::new(problem.into(), Precision::Strict, 12.0 / 33.0 * 4.0 * 2.0 * 4.0 * 33.0 * 47.0 * 8.0)
                    .unwrap();
            assert!(subject.sampled().unwrap().contains("10 of 33 query rows: 0 to 1, 7 to 8,"));
            let problem = &subject.given.problem;
            let all = problem.check().unwrap().flops();
            assert!(subject.flops > 0.7 * all && subject.flops < 0.8 * all, "three of four keys are visible");
            let right = reference::attention::<f32>(problem, &subject.operands.inputs()).unwrap().out;
            assert!(subject.judge(&right).comparison.passed());
            for row in 0..33 {
                let mut wrong = right.clone();
                wrong[(33 * 5 + row) * 8 + 3] += 0.1;
                let checked = subject.checked.iter().any(|rows| rows.contains(&(row as u32)));
                assert_ne!(subject.judge(&wrong).comparison.passed(), checked, "row {row}");
            }
        }
    }

    #[test]
    fn a_mask_that_hides_every_key_leaves_no_work() {
        let mut problem = Problem::new(1, 1, 4, 4, 8);
        problem.mask = Some(Broadcast([1, 1, 4, 4]));
        let mut given = Given::from(problem);
        given.values.density = -1.0;
        must_have_work(&given).unwrap();
        assert!(matches!(Subject::new(given, Precision::Strict, 1e9), Err(Error::NoWork { .. })));
    }
}
