//! Trials: small problems that show whether the driver computes the kernels rightly.

mod expected;
mod long;
mod trial;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::{Kernel, Options};
use crate::contract::problem::{Inputs, Outputs, Problem};
use crate::contract::proof::{Case, Ended, Feature, Proof, Trial};
use crate::device::encode::Attention;
use crate::device::gpu::Gpu;
use crate::plan::Plan;
use crate::plan::measured::{Choice, Class, Row, Tuning};

pub use expected::{Expected, RowSummary, factor};
pub use trial::Data;

/// What a trial that ran has shown: nothing wrong, or what was wrong.
type Outcome = Result<(), String>;

impl Gpu {
    /// A borrowed device, whose owner hears of errors outside of error scopes.
    pub(crate) fn of(library: Attention, queue: &wgpu::Queue) -> Gpu {
        let device = library.device().clone();
        let info = device.adapter_info();
        Gpu { info, device, queue: queue.clone(), library, unproven: false, faults: <_>::default() }
    }

    /// Runs every trial of [`Trial::all`] that has no outcome yet, as [`Attention::prove`].
    ///
    /// Without this call each trial runs before the first plan that relies on it, by [`Gpu::plan`] or by a call on host slices; unless
    /// [`crate::DeviceOptions::unproven`] refuses trials.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::prove`].
    pub fn prove(&self) -> Result<Proof> {
        self.block_on(self.prove_async())
    }

    /// [`Gpu::prove`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::prove`].
    pub async fn prove_async(&self) -> Result<Proof> {
        // A driver may take minutes to compile some kernels, which no plan prefers there, and a CPU adapter half a second for one trial
        // of a kernel that no plan prefers there either.
        let caps = self.library.caps();
        let slow = |trial: &Trial| caps.cpu && trial.kernel == Kernel::Flash && trial.case == Case::Long;
        let quick = |trial: &Trial| !caps.takes_minutes(trial.kernel) && !slow(trial);
        let next = |proof: &mut Proof| Trial::all().filter(quick).find(|trial| !proof.knows(trial));
        while let Some(trial) = self.library.with_proof(next) {
            self.outcome_of(trial).await?;
        }
        Ok(self.library.proof())
    }

    /// Plans a problem by kernels that gave right results in their trials on this device. Trials run before the first plan that relies
    /// on them.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::plan`], with [`crate::Obstacle::Unproved`] among the reasons of [`Error::Kernel`], and those of
    /// [`Attention::prove`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan> {
        self.plan_with(problem, &Options::default())
    }

    /// The same with [`Options`]. A kernel that they ask for is tried, too, and refused where its trial fails.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::plan`].
    pub fn plan_with(&self, problem: &Problem, options: &Options) -> Result<Plan> {
        self.block_on(self.plan_with_async(problem, options))
    }

    /// [`Gpu::plan_with`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::plan`].
    pub async fn plan_with_async(&self, problem: &Problem, options: &Options) -> Result<Plan> {
        self.proven(|| self.library.plan_with(problem, options), |plan| plan).await
    }

    /// Makes plans until the trial of one has an outcome that does not rule it out.
    pub(crate) async fn proven<T>(&self, make: impl Fn() -> Result<T>, attention: impl Fn(&T) -> &Plan) -> Result<T> {
        loop {
            let made = make()?;
            let due = if self.unproven { None } else { self.library.due(attention(&made)) };
            match due {
                Some(trial) => self.outcome_of(trial).await?,
                None => return Ok(made),
            }
        }
    }

    /// Runs a trial until its outcome is known.
    async fn outcome_of(&self, trial: Trial) -> Result<()> {
        while !self.library.with_proof(|proof| proof.knows(&trial)) {
            let caps = self.library.proven_caps();
            let ended = match self.try_out(&trial, &caps).await? {
                None => Ended::Unable,
                Some(Ok(())) => Ended::Right,
                Some(Err(why)) => Ended::Wrong { why, feature: self.culprit(&trial, &caps).await? },
            };
            self.library.with_proof(|proof| proof.note(trial, ended, caps.failures.len()));
        }
        Ok(())
    }

    /// The first feature without which a trial is right that was wrong.
    async fn culprit(&self, trial: &Trial, caps: &Caps) -> Result<Option<Feature>> {
        for feature in Feature::ALL {
            let without = caps.without(feature);
            if without != *caps && self.try_out(trial, &without).await? == Some(Ok(())) {
                return Ok(Some(feature));
            }
        }
        Ok(None)
    }

    /// Runs a trial once, with these features; `None` if it cannot run.
    async fn try_out(&self, trial: &Trial, caps: &Caps) -> Result<Option<Outcome>> {
        let data = Data::of(trial);
        let shape = data.problem().check()?;
        // The tile is asked for as a tuned row asks.
        let wanted = trial.tile.and_then(|tile| Choice::numbered(trial.kernel, tile));
        let row = |choice| Row { class: Class::of(&shape), choice, ms: 0.0 };
        let tuning = Tuning { source: "a trial".into(), rows: wanted.map(row).into_iter().collect() };
        let plan = Plan::tuned(&shape, &data.caps(caps), &trial.options(), &tuning);
        let Some(plan) = plan.ok().filter(|plan| wanted.is_none_or(|wanted| plan.choice() == wanted)) else {
            return Ok(None);
        };
        match self.compute(&plan, &data.inputs()).await {
            Ok(outputs) => Ok(Some(data.judge(&outputs))),
            Err(error @ (Error::DeviceLost(_) | Error::OutOfMemory(_))) => Err(error),
            Err(error) => Ok(Some(Err(error.to_string()))),
        }
    }

    /// Prepares a plan, runs it on host slices and reads the outputs back.
    pub(super) async fn compute(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Outputs> {
        let prepared = self.library.prepare_async(plan).await?;
        let resident = self.upload_async(plan, inputs).await?;
        self.run_async(&prepared, &resident, |_, _| ()).await?;
        self.download_async(plan, &resident).await
    }
}
