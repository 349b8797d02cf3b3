//! The f64 reference and the error budget of one problem, computed once and shared by all engines.

use std::ops::Range;

use wgpu_attention::reference::{self, Budget, Comparison, Tolerance};
use wgpu_attention::{Inputs, Outputs, Precision, Problem, Shape};

/// The expected outputs, and how far a kernel of some precision may be from them.
#[derive(Debug)]
pub struct Oracle {
    shape: Shape,
    truth: Outputs<f64>,
    budget: Budget,
}

/// A comparison, and the largest tolerance of any element.
#[derive(Clone, Copy, Debug)]
pub struct Judgement {
    pub comparison: Comparison,
    pub budget: f64,
}

impl Oracle {
    pub fn new(problem: &Problem, inputs: &Inputs<'_>, precision: Precision) -> wgpu_attention::Result<Self> {
        let (truth, budget) = reference::attention_with_budget(problem, inputs)?;
        Ok(Oracle { shape: problem.check()?, truth, budget: budget.with_precision(precision) })
    }

    /// Of some rows of each head only; other rows are not judged.
    pub fn of_rows(
        problem: &Problem,
        inputs: &Inputs<'_>,
        precision: Precision,
        rows: &[Range<u32>],
    ) -> wgpu_attention::Result<Self> {
        let (truth, budget) = reference::attention_with_budget_of_rows(problem, inputs, rows)?;
        Ok(Oracle { shape: problem.check()?, truth, budget: budget.with_precision(precision) })
    }

    pub fn out(&self, got: &[f32]) -> Judgement {
        let comparison = self.budget.compare_out(&self.shape, got, &self.truth.out);
        Judgement { comparison, budget: largest(&self.budget.out, &self.truth.out) }
    }

    /// The raw logits, if the problem asks for them.
    pub fn logits(&self, got: &Outputs) -> Option<Judgement> {
        judge(&self.budget.logits, got.logits.as_ref()?, self.truth.logits.as_ref()?)
    }

    /// The weights, if the problem asks for them.
    pub fn weights(&self, got: &Outputs) -> Option<Judgement> {
        judge(&self.budget.weights, got.weights.as_ref()?, self.truth.weights.as_ref()?)
    }
}

fn judge(tolerance: &Tolerance, got: &[f32], want: &[f64]) -> Option<Judgement> {
    Some(Judgement { comparison: tolerance.check(got, want), budget: largest(tolerance, want) })
}

/// An upper bound of the tolerance of every element: the largest absolute part plus the relative part of the largest value.
fn largest(tolerance: &Tolerance, want: &[f64]) -> f64 {
    let peak = want.iter().filter(|x| x.is_finite()).fold(0.0f64, |peak, x| peak.max(x.abs()));
    tolerance.atol.iter().copied().fold(0.0, f64::max) + tolerance.rtol * peak
}
