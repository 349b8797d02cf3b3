//! A problem with its operands and what the reference makes of them.

use wgpu_attention::internal::{Variant, describe};
use wgpu_attention::reference::{Budget, attention_with_budget, regression_limit};
use wgpu_attention::{Gpu, Options, Outputs, Plan, Problem};

use super::Data;

#[derive(Clone)]
pub struct Case {
    pub problem: Problem,
    pub operands: Data,
    pub want: Outputs<f64>,
    pub budget: Budget,
    /// What a loss of accuracy exceeds.
    pub limit: Budget,
}

impl Case {
    pub fn new(problem: Problem, operands: Data) -> Self {
        let (want, budget) = attention_with_budget(&problem, &operands.inputs())
            .unwrap_or_else(|error| panic!("{error}\n{problem:?}\n{operands:?}"));
        let limit = regression_limit(&problem, &operands.inputs(), &want, &budget).unwrap();
        Case { problem, operands, want, budget, limit }
    }

    pub fn random(problem: Problem, seed: u64) -> Self {
        let operands = Data::random(&problem, seed, 1.0);
        Case::new(problem, operands)
    }

    /// The same without the outputs that need the score matrix.
    pub fn lean(&self) -> Self {
        let mut case = self.clone();
        (case.problem.weights, case.problem.logits) = (false, None);
        (case.want.weights, case.want.logits) = (None, None);
        case
    }

    /// Runs and compares every output; gives the outputs and the plan.
    #[track_caller]
    pub fn check(&self, gpu: &Gpu, options: &Options) -> (Outputs, Plan) {
        let plan = gpu
            .library()
            .plan_with(&self.problem, options)
            .unwrap_or_else(|error| panic!("{error}\n{:?}", self.problem));
        let got = gpu
            .attention_with(&self.problem, &self.operands.inputs(), options)
            .unwrap_or_else(|error| panic!("{error}\n{:?}\n{plan}", self.problem));
        self.compare_on(&describe(gpu.info()), &got, &plan);
        (got, plan)
    }

    /// Compares outputs with the reference, every element with its own budget.
    #[track_caller]
    pub fn compare(&self, got: &Outputs, plan: &Plan) {
        self.compare_on("the test's own buffers", got, plan);
    }

    #[track_caller]
    fn compare_on(&self, place: &str, got: &Outputs, plan: &Plan) {
        self.compare_within(place, got, plan, &self.budget);
        // Beyond this an answer is right, and less accurate than it was.
        self.compare_within(&format!("{place}, less accurate than recorded"), got, plan, &self.limit);
    }

    #[track_caller]
    fn compare_within(&self, place: &str, got: &Outputs, plan: &Plan, budget: &Budget) {
        // What ran counts, not what the plan was asked for: most kernels are always strict.
        let precision = plan.steps().iter().find_map(|step| match step.variant {
            Variant::Matrix(x) => Some(x.precision),
            _ => None,
        });
        let found = budget
            .clone()
            .with_precision(precision.unwrap_or_default())
            .compare(plan.shape(), got, &self.want)
            .unwrap_or_else(|error| panic!("{error}\n{place}\n{plan}\n{:?}", self.problem));
        assert!(found.passed(), "on {place}:\n{found}kernel {}\n{plan}\n{:?}", plan.kernel(), self.problem);
    }
}
