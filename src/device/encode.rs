//! Plans, compiles and records attention on the caller's device.

mod buffers;
mod prepared;
mod program;
mod scratch;

pub use buffers::Buffers;
pub(crate) use buffers::check_slice;
pub use prepared::Prepared;
pub(crate) use program::Program;
pub use scratch::Recording;
pub(crate) use scratch::{Scratch, Set};

use std::sync::{Arc, Mutex};

use crate::contract::caps::Caps;
use crate::contract::error::Result;
use crate::contract::options::Options;
use crate::contract::problem::Problem;
use crate::contract::proof::{Proof, Trial};
use crate::device::gpu::Gpu;
use crate::device::lock;
use crate::device::pipelines::Pipelines;
use crate::dispatch::step::Step;
use crate::kernel::Variant;
use crate::kernel::slot::Slot;
use crate::plan::Plan;
use crate::plan::measured::Tuning;
use crate::trace::span;

/// The device that an object was made for.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) device: wgpu::Device,
    /// The number of the [`crate::Gpu`], 0 on a device of the caller's: wgpu tells devices of two instances apart only by chance.
    pub(crate) gpu: u64,
}

impl Home {
    pub(crate) fn is(&self, other: &Home) -> bool {
        self.device == other.device && (self.gpu == other.gpu || self.gpu == 0 || other.gpu == 0)
    }
}

/// Attention on the caller's device: planner and pipeline cache. Make one per device and keep it.
#[derive(Debug)]
pub struct Attention {
    home: Home,
    caps: Caps,
    tuning: Tuning,
    /// Shared with the trials of a proof, as are the pipelines.
    proof: Arc<Mutex<Proof>>,
    pipelines: Arc<Pipelines>,
}

impl Attention {
    /// For a device of the caller's, with whatever features and limits it was created.
    ///
    /// The kernel `matrix` does not run on it, because a [`wgpu::Device`] does not tell which cooperative matrices it has; see
    /// [`Attention::with_adapter`].
    pub fn new(device: &wgpu::Device) -> Self {
        Self::without_adapter(device, false)
    }

    /// Like [`Attention::new`], but with the adapter that the device was made from, so that [`crate::Kernel::Matrix`] can run. That
    /// also takes `EXPERIMENTAL_COOPERATIVE_MATRIX`, `SHADER_F16` and `SUBGROUP` among the device's features, and more than the default
    /// limit of workgroup memory.
    ///
    /// # Errors
    ///
    /// Those of [`Caps::of`].
    pub fn with_adapter(device: &wgpu::Device, adapter: &wgpu::Adapter) -> Result<Self> {
        Ok(Self::with_caps(Home { device: device.clone(), gpu: 0 }, Caps::of(device, Some(adapter))?, false))
    }

    /// Like [`Attention::new`], but pipelines are compiled with wgpu's runtime checks (bounds, loops): slower, for hunting a suspected
    /// out-of-bounds access.
    pub fn with_checks(device: &wgpu::Device) -> Self {
        Self::without_adapter(device, true)
    }

    fn without_adapter(device: &wgpu::Device, checked: bool) -> Self {
        let caps = Caps::of(device, None).expect("only an adapter can be wrong");
        Self::with_caps(Home { device: device.clone(), gpu: 0 }, caps, checked)
    }

    pub(crate) fn with_caps(home: Home, caps: Caps, checked: bool) -> Self {
        let pipelines = Arc::new(Pipelines::new(&home.device, checked));
        Attention { home, caps, tuning: Tuning::default(), proof: Arc::default(), pipelines }
    }

    /// The same object once more, for a proof that has borrowed this one.
    pub(crate) fn shared(&self) -> Attention {
        let Attention { home, caps, tuning, proof, pipelines } = self;
        let (home, caps, tuning) = (home.clone(), caps.clone(), tuning.clone());
        Attention { home, caps, tuning, proof: proof.clone(), pipelines: pipelines.clone() }
    }

    fn pipelines_mut(&mut self) -> &mut Pipelines {
        Arc::get_mut(&mut self.pipelines).expect("what shares the pipelines borrows this object")
    }

    /// Plans from now on by rows that were measured on this device's adapter, as `wgpu-attention tune` does; see [`Plan::tuned`].
    pub fn set_tuning(&mut self, tuning: Tuning) {
        self.tuning = tuning;
    }

    /// The rows it plans by; none unless set.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// What the driver's compiler made of the pipelines so far, for [`Attention::load_pipeline_cache`] in a later process. `None`
    /// unless the device was created with [`wgpu::Features::PIPELINE_CACHE`], which Vulkan alone offers.
    pub fn pipeline_cache_data(&self) -> Option<Vec<u8>> {
        self.pipelines.data()
    }

    /// Compiles from now on with what [`Attention::pipeline_cache_data`] gave out on the same adapter and driver; a file name for
    /// it is [`wgpu::util::pipeline_cache_key`]. Returns whether the data is used. Damaged data, that of another adapter or driver,
    /// and any on a device without [`wgpu::Features::PIPELINE_CACHE`], is not: then everything is compiled anew.
    ///
    /// # Safety
    ///
    /// `data` came from [`Attention::pipeline_cache_data`]. Damage on the way is found by a checksum; data that was forged is not,
    /// and drivers trust it. Keep it where only the user writes.
    pub unsafe fn load_pipeline_cache(&mut self, data: &[u8]) -> bool {
        // SAFETY: passed on to the caller.
        unsafe { self.pipelines_mut().load(data) }
    }

    /// Changes the text of each shader that is compiled from now on: tests break shaders with it.
    #[doc(hidden)]
    pub fn edit_shaders(&mut self, edit: fn(&Variant, String) -> String) {
        self.pipelines_mut().edit = Some(edit);
    }

    /// How many pipelines are compiled. [`Attention::prepare`] and the functions that prepare operations add some, recording never does.
    pub fn compiled_pipelines(&self) -> usize {
        self.pipelines.count()
    }

    pub(crate) async fn program(&self, operation: &str, steps: &[Step]) -> Result<Program> {
        Program::new(&self.home.device, &self.pipelines, operation, steps).await
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.home.device
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// What the device can do, whatever its driver makes of it.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// What plans are made for: [`Attention::caps`] without what failed a trial, and with what trials proved.
    pub fn proven_caps(&self) -> Caps {
        self.caps.after(&lock(&self.proof))
    }

    /// What is known of the device's driver; see [`Attention::prove`].
    pub fn proof(&self) -> Proof {
        lock(&self.proof).clone()
    }

    /// Starts from what was found earlier, with the same version of this crate, on the same adapter and driver: its trials do not run
    /// again, and nothing that failed is planned.
    pub fn set_proof(&mut self, proof: Proof) {
        *lock(&self.proof) = proof;
    }

    pub(crate) fn with_proof<T>(&self, note: impl FnOnce(&mut Proof) -> T) -> T {
        note(&mut lock(&self.proof))
    }

    /// Runs each of [`Trial::all`](crate::proof::Trial::all) that has no outcome yet, with the device's queue, and waits for it. No plan
    /// uses afterwards what gave wrong results, and the reasons of a plan say so. A driver that computes on the CPU may take a minute to compile all their shaders;
    /// [`Gpu`] runs a trial before the first plan that relies on it instead.
    ///
    /// # Errors
    ///
    /// [`crate::Error::OutOfMemory`] or [`crate::Error::DeviceLost`]. What a driver makes of a shader is no error here: if it does not
    /// compile, its trial has failed.
    pub fn prove(&self, queue: &wgpu::Queue) -> Result<Proof> {
        Gpu::of(self.shared(), queue).prove()
    }

    /// [`Attention::prove`] without blocking the thread, as far as [`Attention::prepare_async`] blocks none.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::prove`].
    pub async fn prove_async(&self, queue: &wgpu::Queue) -> Result<Proof> {
        Gpu::of(self.shared(), queue).prove_async().await
    }

    /// Checks and plans a problem. Pure: touches no device.
    ///
    /// # Errors
    ///
    /// Those of [`Problem::check`] and of [`Plan::new`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan> {
        self.plan_with(problem, &Options::default())
    }

    /// The same with [`Options`].
    ///
    /// # Errors
    ///
    /// Those of [`Problem::check`] and of [`Plan::new`].
    pub fn plan_with(&self, problem: &Problem, options: &Options) -> Result<Plan> {
        Plan::tuned(&problem.check()?, &self.proven_caps(), options, &self.tuning)
    }

    /// The next trial that has to have an outcome before a plan is used: those of `matrix`, where the planner would take it if it were
    /// proved, then those of the plan's own kernel.
    pub(crate) fn due(&self, plan: &Plan) -> Option<Trial> {
        let trials = plan.hoped(&self.tuning).into_iter().chain(plan.trials.iter().copied());
        trials.into_iter().find(|trial| !lock(&self.proof).knows(trial))
    }

    /// Compiles the pipelines that no earlier call compiled, and allocates the plan's scratch. Blocks while the driver compiles:
    /// call it ahead, where a pause does no harm. Recording compiles nothing, and the [`Prepared`] outlives this object.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Pipeline`] if a shader does not compile, [`crate::Error::OutOfMemory`] if there is no memory for the
    /// scratch, [`crate::Error::Validation`] if the plan was made for a device that can do more, and [`crate::Error::DeviceLost`]
    /// if the device is lost.
    pub fn prepare(&self, plan: &Plan) -> Result<Prepared> {
        pollster::block_on(self.prepare_async(plan))
    }

    /// [`Attention::prepare`] for asynchronous callers. In a browser it blocks nothing. On native backends the driver compiles on the thread
    /// that polls the future, because wgpu has no other way there.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::prepare`].
    pub async fn prepare_async(&self, plan: &Plan) -> Result<Prepared> {
        self.prepare_with(plan, &[]).await
    }

    /// With buffers beside the plan's scratch, for what is recorded around attention.
    pub(crate) async fn prepare_with(&self, plan: &Plan, more: &[(Slot, u64)]) -> Result<Prepared> {
        let prepare = async {
            let program = self.program("attention", plan.steps()).await?;
            let sizes = [&[(Slot::Lists, plan.lists().bytes())], plan.scratch(), more].concat();
            let scratch = Scratch::new(self.device(), "attention", sizes).await?;
            Ok(Prepared { plan: plan.clone(), program, scratch, home: self.home.clone() })
        };
        span!("prepare", operation = "attention", dispatches = plan.dispatches()).around(prepare).await
    }
}
