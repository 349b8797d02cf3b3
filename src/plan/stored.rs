//! A plan as data that can be kept: what it was made from, and enough of it to tell whether the same plan is made again.

use serde::{Deserialize, Serialize};

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::Problem;
use crate::plan::Plan;
use crate::plan::measured::{Choice, Class, Row, Tuning};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    problem: Problem,
    caps: Caps,
    options: Options,
    choice: Choice,
    kernel: String,
    /// The kernel of each dispatch with its tile and what else its pipeline is compiled for.
    variants: Vec<String>,
    dispatches: usize,
    slices: usize,
    scratch_bytes: u64,
    estimate_ms: f64,
    reasons: Vec<String>,
}

impl From<Plan> for Stored {
    fn from(plan: Plan) -> Self {
        Stored {
            kernel: plan.kernel(),
            choice: plan.choice,
            variants: plan.steps.iter().map(|step| step.variant.to_string()).collect(),
            dispatches: plan.dispatches(),
            slices: plan.slices(),
            scratch_bytes: plan.scratch_bytes(),
            estimate_ms: 1e3 * plan.estimate().as_secs_f64(),
            problem: plan.shape.problem,
            caps: plan.caps,
            options: plan.options,
            reasons: plan.reasons,
        }
    }
}

impl TryFrom<Stored> for Plan {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Plan> {
        let shape = stored.problem.check()?;
        let row = Row { class: Class::of(&shape), choice: stored.choice, ms: 0.0 };
        let tuning = Tuning { source: "a stored plan".into(), rows: vec![row] };
        let mut plan = Plan::tuned(&shape, &stored.caps, &stored.options, &tuning)?;
        plan.reasons.clone_from(&stored.reasons);
        let made = Stored::from(plan.clone());
        let same = made.variants == stored.variants
            && [made.dispatches, made.slices] == [stored.dispatches, stored.slices]
            && made.scratch_bytes == stored.scratch_bytes;
        if same { Ok(plan) } else { Err(Error::StoredPlan { stored: stored.kernel, made: made.kernel }) }
    }
}
