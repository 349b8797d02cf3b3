//! The trial that shows whether a driver ends long loops early.

use crate::contract::options::Kernel;
use crate::contract::problem::{Layout, Outputs, Problem, Strides};
use crate::contract::proof::Trial;
use crate::device::gpu::proof::expected::near;

/// Dims of q, k and v.
pub(super) const DIMS: usize = 32;

/// The value of every key: whole numbers, whose sums over all keys are exact in f32.
pub(super) const VALUE: [f32; DIMS] = {
    let mut value = [0.0; DIMS];
    let mut dim = 0;
    while dim < DIMS {
        value[dim] = (dim % 13) as f32 - 6.0;
        dim += 1;
    }
    value
};

/// How far a natural logarithm may be off. One key less in a thousand changes it by ten times as much.
const LSE_BUDGET: f32 = 1e-4;

/// How far a value may be off: a division of f32, and the rounding to f16.
const OUT_BUDGET: f32 = 1e-2;

/// A query that sees many keys, all alike: the log-sum-exp is the logarithm of their number. The rows of k and v share one place in
/// memory, so that the trial takes next to none.
pub(super) fn problem(trial: &Trial) -> Problem {
    // So many that the loops of an invocation take 8,000 to 30,000 iterations in a dispatch. The planner allows 65,000, but the trial
    // would take longer than all others together.
    let keys = match trial.kernel {
        Kernel::Rows => 125_000,
        Kernel::Split | Kernel::Unfused => 64_000,
        Kernel::Flash | Kernel::Matrix => 32_000,
    };
    let mut p = Problem::new(1, 1, 1, keys, DIMS as u32);
    let one = Layout::Strided(Strides::default());
    (p.k, p.v, p.element, p.lse) = (one, one, trial.element, true);
    p
}

/// Whether outputs are right, or what is wrong with them.
pub(super) fn judge(problem: &Problem, outputs: &Outputs) -> Result<(), String> {
    let (keys, want) = (problem.seq_kv, f64::from(problem.seq_kv).ln() as f32);
    let got = outputs.lse.as_ref().map_or(f32::NAN, |lse| lse[0]);
    if !near(got, want, LSE_BUDGET) {
        return Err(format!("the lse of {keys} equal keys is {got} and must be {want} ± {LSE_BUDGET:e}"));
    }
    match outputs.out.iter().zip(VALUE).position(|(&got, want)| !near(got, want, OUT_BUDGET)) {
        Some(dim) => {
            let (got, want) = (outputs.out[dim], VALUE[dim]);
            Err(format!("output {dim} of {keys} equal keys is {got} and must be {want} ± {OUT_BUDGET:e}"))
        }
        None => Ok(()),
    }
}
