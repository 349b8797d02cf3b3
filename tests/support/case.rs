//! A problem with its operands and what the reference makes of them.

use wgpu_attention::gpu::describe;
use wgpu_attention::reference::{Budget, Comparison, Tolerance, attention_with_budget, regression_limit};
use wgpu_attention::{Gpu, Options, Outputs, Plan, Problem, Shape};

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
        let (shape, want) = (plan.shape(), &self.want);
        let out = budget.compare_out(shape, &got.out, &want.out);
        let out_atol = |index| self.row_of(shape, index).map_or(0.0, |row| budget.out.atol[row]);
        self.report(&format!("out on {place}"), plan, &out, &got.out, &want.out, |i| {
            out_atol(i) + budget.out.rtol * want.out[i].abs()
        });
        if self.want.out.len() < 1 << 20 {
            let gap = (0..got.out.len()).find(|&i| got.out[i] != 0.0 && self.row_of(shape, i).is_none());
            assert_eq!(gap, None, "out was written between its rows on {place}\n{plan}");
        }
        let rest = [
            ("lse", &got.lse, &want.lse, &budget.lse),
            ("weights", &got.weights, &want.weights, &budget.weights),
            ("logits", &got.logits, &want.logits, &budget.logits),
        ];
        for (name, got, want, tolerance) in rest {
            assert_eq!(got.is_some(), want.is_some(), "{name} on {place}\n{plan}");
            let (Some(got), Some(want)) = (got, want) else { continue };
            let allowed = |i: usize| allowed(tolerance, want, i);
            self.report(&format!("{name} on {place}"), plan, &tolerance.check(got, want), got, want, allowed);
        }
    }

    #[track_caller]
    fn report(
        &self,
        what: &str,
        plan: &Plan,
        found: &Comparison,
        got: &[f32],
        want: &[f64],
        allowed: impl Fn(usize) -> f64,
    ) {
        let Some(worst) = found.worst.filter(|_| !found.passed()) else { return };
        panic!(
            "{what}: element {worst} is {}, not {} ± {:e}: {found}\nkernel {}\n{plan}\n{:?}",
            got[worst],
            want[worst],
            allowed(worst),
            plan.kernel(),
            self.problem
        );
    }

    /// The row, in the order of `lse`, that an element of `out` belongs to.
    fn row_of(&self, shape: &Shape, index: usize) -> Option<usize> {
        let out = shape.out();
        let [batches, heads, rows] = out.sizes.map(|n| n as usize);
        let at = |b, h, i| out.at(b as u32, h as u32, i as u32) as usize;
        // Disjoint rows: along each axis the last start at or before the index is the only candidate, axes by falling stride.
        let mut axes = [(out.strides.batch, batches, 0), (out.strides.head, heads, 1), (out.strides.row, rows, 2)];
        axes.sort_unstable_by_key(|&(stride, ..)| std::cmp::Reverse(stride));
        let mut rest = index.checked_sub(out.strides.offset as usize)?;
        let mut place = [0; 3];
        for (stride, size, axis) in axes {
            if size > 1 {
                place[axis] = (rest / stride as usize).min(size - 1);
                rest -= place[axis] * stride as usize;
            }
        }
        let [b, h, i] = place;
        let start = at(b, h, i);
        (start..start + out.dim as usize).contains(&index).then_some((b * heads + h) * rows + i)
    }
}

fn allowed(tolerance: &Tolerance, want: &[f64], index: usize) -> f64 {
    tolerance.atol[index / (want.len() / tolerance.atol.len())] + tolerance.rtol * want[index].abs()
}
