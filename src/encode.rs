//! Records a [`Plan`] into the caller's command encoder: the only file that records commands.

use std::num::NonZero;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use crate::caps::{Caps, UNIFORM_STRIDE};
use crate::dispatch::step::Step;
use crate::error::{Error, Result};
use crate::kernel::slot::Slot;
use crate::operands::{Kind, Operand, Operands};
use crate::options::Options;
use crate::pipelines::{Pipeline, Pipelines};
use crate::plan::measured::Tuning;
use crate::plan::{Plan, tensors};
use crate::problem::Problem;

/// Compiled steps and their uniforms: what every operation on the GPU records.
#[derive(Debug)]
pub(crate) struct Program {
    device: wgpu::Device,
    steps: Vec<(Step, Arc<Pipeline>)>,
    params: wgpu::Buffer,
}

impl Program {
    /// Compiles the pipelines that are not cached yet and writes the uniforms.
    pub(crate) fn new(device: &wgpu::Device, pipelines: &Pipelines, steps: &[Step]) -> Result<Self> {
        let compiled = steps.iter().map(|step| Ok((step.clone(), pipelines.get(&step.variant)?)));
        let compiled = compiled.collect::<Result<_>>()?;
        let mut bytes = vec![0; steps.len().max(1) * UNIFORM_STRIDE as usize];
        for (place, step) in bytes.chunks_exact_mut(UNIFORM_STRIDE as usize).zip(steps) {
            let source = step.uniform.bytes();
            place[..source.len()].copy_from_slice(source);
        }
        let params = constant(device, "params", wgpu::BufferUsages::UNIFORM, &bytes)?;
        Ok(Program { device: device.clone(), steps: compiled, params })
    }

    pub(crate) fn steps(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().map(|(step, _)| step)
    }

    /// Records copies, and a range of the steps in one compute pass. `buffer` gives the buffer of a slot, and where the operand starts
    /// in it. Buffers of another device are an error, and then nothing is recorded.
    pub(crate) fn record<'a>(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffer: impl Fn(Slot) -> (&'a wgpu::Buffer, u64),
        copies: &[Copy<'_>],
    ) -> Result<()> {
        let bind = || {
            // An encoder says what is wrong with a copy when it is finished, and to its own device: this one is only for that.
            if !copies.is_empty() {
                let mut probe = self.device.create_command_encoder(&Default::default());
                copies.iter().for_each(|copy| copy.record(&mut probe));
                drop(probe.finish());
            }
            steps.clone().map(|i| self.bind(i, &buffer)).collect::<Vec<_>>()
        };
        let groups = attempt(&self.device, bind).map_err(|error| {
            let bound = self.steps[steps.clone()].iter().flat_map(|(step, _)| &step.bindings);
            let bound = bound.map(|bound| (bound.slot.name(), buffer(bound.slot).0));
            let copied = copies.iter().map(|copy| (copy.field, copy.from.buffer()));
            match copied.chain(bound).find(|(_, buffer)| attempt(&self.device, || touch(&self.device, buffer)).is_err())
            {
                Some((field, _)) => Error::OtherDevice { field },
                None => error,
            }
        })?;
        let record = || {
            copies.iter().for_each(|copy| copy.record(encoder));
            let mut pass = encoder
                .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("attention"), timestamp_writes: None });
            for ((step, pipeline), group) in self.steps[steps].iter().zip(&groups) {
                let [x, y, z] = step.grid;
                pass.set_pipeline(&pipeline.compute);
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(x, y, z);
            }
        };
        // No encoder tells its device. One of another instance of wgpu panics where it does not know this one's objects.
        catch_unwind(AssertUnwindSafe(record)).map_err(|_| Error::OtherDevice { field: "encoder" })
    }

    fn bind<'a>(&self, index: usize, buffer: &impl Fn(Slot) -> (&'a wgpu::Buffer, u64)) -> wgpu::BindGroup {
        let (step, pipeline) = &self.steps[index];
        let range = |buffer, offset, size| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: NonZero::new(size) })
        };
        let uniform = range(&self.params, index as u64 * UNIFORM_STRIDE, UNIFORM_STRIDE);
        let storage = step.bindings.iter().map(|bound| {
            let (buffer, start) = buffer(bound.slot);
            range(buffer, start + bound.offset, bound.size)
        });
        let entries: Vec<_> = std::iter::once(uniform)
            .chain(storage)
            .zip(0..)
            .map(|(resource, binding)| wgpu::BindGroupEntry { binding, resource })
            .collect();
        self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(step.variant.kernel()),
            layout: &pipeline.layout,
            entries: &entries,
        })
    }
}

/// A copy of a small array into the lists.
pub(crate) struct Copy<'a> {
    field: &'static str,
    from: wgpu::BufferSlice<'a>,
    to: &'a wgpu::Buffer,
    place: u64,
    size: u64,
}

impl Copy<'_> {
    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.copy_buffer_to_buffer(self.from.buffer(), self.from.offset(), self.to, self.place, self.size);
    }
}

/// Creates objects and returns what wgpu found wrong with them: out of memory, most likely.
pub(crate) fn allocate<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> Result<T> {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let created = create();
    let validation = pollster::block_on(validation.pop());
    // What there was no memory for is invalid afterwards.
    match pollster::block_on(memory.pop()).or(validation) {
        None => Ok(created),
        Some(error) => Err(error.into()),
    }
}

/// The same with buffers of the caller's. wgpu panics where one comes from another instance and it has none of that number.
fn attempt<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> Result<T> {
    let created = allocate(device, || catch_unwind(AssertUnwindSafe(create)))?;
    created.map_err(|_| Error::Validation("a buffer does not belong to the device".into()))
}

/// Uses a buffer alone, in the one way that wgpu checks at once.
fn touch(device: &wgpu::Device, buffer: &wgpu::Buffer) {
    if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
        let mut probe = device.create_command_encoder(&Default::default());
        let usage = wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
        probe.copy_buffer_to_buffer(buffer, 0, &device.create_buffer(&descriptor), 0, 4);
        drop(probe.finish());
        return;
    }
    let ty = wgpu::BufferBindingType::Storage { read_only: true };
    let entry = wgpu::BindGroupLayoutEntry {
        binding: 0,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &[entry] });
    let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset: 0, size: NonZero::new(4) });
    let entries = &[wgpu::BindGroupEntry { binding: 0, resource }];
    drop(device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries }));
}

/// A buffer that holds these bytes, a multiple of four, and never changes.
pub(crate) fn constant(
    device: &wgpu::Device,
    label: &str,
    usage: wgpu::BufferUsages,
    bytes: &[u8],
) -> Result<wgpu::Buffer> {
    let descriptor =
        wgpu::BufferDescriptor { label: Some(label), size: bytes.len() as u64, usage, mapped_at_creation: true };
    let buffer = allocate(device, || device.create_buffer(&descriptor))?;
    // wgpu tells only the device's owner of a loss, and calls what is made afterwards invalid, without an error.
    let lost = |_| Error::DeviceLost(format!("the buffer {label:?} cannot be made on it any more"));
    buffer.get_mapped_range_mut(..).map_err(lost)?.copy_from_slice(bytes);
    buffer.unmap();
    Ok(buffer)
}

/// The buffers in which one call keeps its intermediate results.
pub(crate) type Set = Vec<(Slot, wgpu::Buffer)>;

/// Sets of scratch buffers. Preparing makes one; another is made when a call needs it while all are taken.
#[derive(Debug)]
pub(crate) struct Scratch {
    device: wgpu::Device,
    sizes: Vec<(Slot, u64)>,
    sets: Mutex<Sets>,
}

#[derive(Debug, Default)]
struct Sets {
    /// Serves every call that is recorded as a whole: wgpu runs these one after the other.
    shared: Option<Arc<Set>>,
    /// Each serves one call in several submissions, and is taken as long as anybody else refers to it.
    own: Vec<Arc<Set>>,
}

impl Scratch {
    pub(crate) fn new(device: &wgpu::Device, sizes: Vec<(Slot, u64)>) -> Result<Self> {
        let scratch = Scratch { device: device.clone(), sizes, sets: Mutex::default() };
        drop(scratch.own()?);
        Ok(scratch)
    }

    /// For a call that one encoder records as a whole.
    pub(crate) fn shared(&self) -> Result<Arc<Set>> {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = &sets.shared {
            return Ok(set.clone());
        }
        let set = match sets.own.iter().position(|set| Arc::strong_count(set) == 1) {
            Some(free) => sets.own.swap_remove(free),
            None => self.create()?,
        };
        Ok(sets.shared.insert(set).clone())
    }

    /// For a call in several submissions, until the last reference is gone.
    pub(crate) fn own(&self) -> Result<Arc<Set>> {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = sets.own.iter().find(|set| Arc::strong_count(set) == 1) {
            return Ok(free.clone());
        }
        let set = self.create()?;
        sets.own.push(set.clone());
        Ok(set)
    }

    fn create(&self) -> Result<Arc<Set>> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = |&(slot, size): &(Slot, u64)| {
            let descriptor =
                wgpu::BufferDescriptor { label: Some(slot.name()), size, usage, mapped_at_creation: false };
            (slot, self.device.create_buffer(&descriptor))
        };
        Ok(Arc::new(allocate(&self.device, || self.sizes.iter().map(buffer).collect())?))
    }
}

/// One call of a [`Prepared`], an [`crate::Operation`] or a [`crate::PreparedLayer`] that is recorded in parts, for several submissions.
///
/// What such a call leaves in scratch for its next part is its own: other calls of the same object may be in flight, on any thread,
/// and their submissions may come in between. The first call that is recorded in parts takes the scratch that preparing allocated. One
/// that begins before the device is done with the calls before it (which wgpu notices when the device is polled, and at each
/// submission) allocates its own, which then serves later calls too.
#[derive(Debug)]
pub struct Recording<'a, T> {
    pub(crate) of: &'a T,
    pub(crate) set: Arc<Set>,
}

impl<T> Recording<'_, T> {
    /// Keeps the scratch from other calls until what the encoder has so far has run, or is dropped.
    pub(crate) fn hold(&self, encoder: &wgpu::CommandEncoder) {
        if !self.set.is_empty() {
            let set = self.set.clone();
            encoder.on_submitted_work_done(move || drop(set));
        }
    }
}

/// What something was made for.
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
    pipelines: Pipelines,
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
    /// If the adapter is another one.
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
        let pipelines = Pipelines::new(&home.device, checked);
        Attention { home, caps, tuning: Tuning::default(), pipelines }
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
        unsafe { self.pipelines.load(data) }
    }

    /// How many pipelines are compiled: only [`Attention::prepare`] and the operations' likes of it add any, recording never does.
    pub fn compiled_pipelines(&self) -> usize {
        self.pipelines.count()
    }

    pub(crate) fn program(&self, steps: &[Step]) -> Result<Program> {
        Program::new(&self.home.device, &self.pipelines, steps)
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.home.device
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// What the device can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Checks and plans a problem. Pure: touches no device.
    pub fn plan(&self, problem: &Problem) -> Result<Plan> {
        self.plan_with(problem, &Options::default())
    }

    /// The same with [`Options`].
    pub fn plan_with(&self, problem: &Problem, options: &Options) -> Result<Plan> {
        Plan::tuned(&problem.check()?, &self.caps, options, &self.tuning)
    }

    /// Compiles the pipelines that no earlier call compiled, and allocates the plan's scratch. Blocks while the driver compiles:
    /// call it ahead, where a pause does no harm. Recording compiles nothing, and the [`Prepared`] outlives this object.
    pub fn prepare(&self, plan: &Plan) -> Result<Prepared> {
        self.prepare_with(plan, &[])
    }

    /// With buffers beside the plan's scratch, for what is recorded around attention.
    pub(crate) fn prepare_with(&self, plan: &Plan, more: &[(Slot, u64)]) -> Result<Prepared> {
        let program = self.program(plan.steps())?;
        let sizes = [&[(Slot::Lists, plan.lists().bytes())], plan.scratch(), more].concat();
        let (plan, home) = (plan.clone(), self.home.clone());
        Ok(Prepared { plan, program, scratch: Scratch::new(self.device(), sizes)?, home })
    }
}

/// What one call reads and writes on the GPU. Outputs that the problem does not ask for stay `None`.
///
/// Usages: `STORAGE` for tensors; `COPY_SRC` for the small per-batch and per-head arrays and the block table, which are copied
/// into a buffer of [`Prepared`]; [`Kind`] says which operand is which. Offsets of tensors are multiples of the device's
/// `min_storage_buffer_offset_alignment` (finer offsets go into [`crate::Strides::offset`]), those of small arrays of 4. A slice
/// that ends inside a 4-byte word must be followed by the rest of that word. Outputs have buffers of their own.
///
/// Of an operand without elements, because there is no batch, query or key, any slice of any buffer may be given, also an empty
/// one: it is not looked at.
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// Queries.
    pub q: wgpu::BufferSlice<'a>,
    /// Keys.
    pub k: wgpu::BufferSlice<'a>,
    /// Values.
    pub v: wgpu::BufferSlice<'a>,
    /// The output.
    pub out: wgpu::BufferSlice<'a>,
    /// Mask, bias and the small arrays.
    pub operands: Operands<wgpu::BufferSlice<'a>>,
    /// Log-sum-exp output.
    pub lse: Option<wgpu::BufferSlice<'a>>,
    /// Weights output.
    pub weights: Option<wgpu::BufferSlice<'a>>,
    /// Logits output.
    pub logits: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> Buffers<'a> {
    /// The four tensors that every problem has.
    pub fn new(
        q: wgpu::BufferSlice<'a>,
        k: wgpu::BufferSlice<'a>,
        v: wgpu::BufferSlice<'a>,
        out: wgpu::BufferSlice<'a>,
    ) -> Self {
        Buffers { q, k, v, out, operands: Operands::default(), lse: None, weights: None, logits: None }
    }

    /// Every tensor with its size in the problem, and whether it is written.
    fn tensors(&self, plan: &Plan) -> [Tensor<'a>; 9] {
        tensors(plan.shape()).map(|(slot, want)| {
            let written = matches!(slot, Slot::Out | Slot::Lse | Slot::Weights | Slot::Logits);
            Tensor { field: slot.name(), slice: self.get(slot), want, written }
        })
    }

    fn check(&self, plan: &Plan) -> Result<()> {
        let shape = plan.shape();
        let tensors = self.tensors(plan);
        for tensor in &tensors {
            let field = tensor.field;
            let Some((slice, want)) = used(field, tensor.slice, tensor.want)? else { continue };
            check_slice(field, &slice, want.next_multiple_of(4), plan.alignment())?;
            if !slice.buffer().usage().contains(wgpu::BufferUsages::STORAGE) {
                return Err(Error::BufferUsage { field, usage: "STORAGE" });
            }
        }
        for list in Operand::of_kind(Kind::List) {
            let field = list.name();
            let slice = self.operands.get(list).copied();
            let Some((slice, want)) = used(field, slice, list.bytes(shape))? else { continue };
            check_slice(field, &slice, want, 4)?;
            if !slice.buffer().usage().contains(wgpu::BufferUsages::COPY_SRC) {
                return Err(Error::BufferUsage { field, usage: "COPY_SRC" });
            }
        }
        let lists = self.lists(plan).map(|(list, slice, _)| (list.name(), Some(slice)));
        let tensors = tensors.iter().filter(|tensor| tensor.want != Some(0));
        let others: Vec<_> = tensors.clone().map(|t| (t.field, t.slice)).chain(lists).collect();
        for output in tensors.filter(|t| t.written) {
            let Some(slice) = output.slice else { continue };
            for &(other, with) in &others {
                if other != output.field && with.is_some_and(|with| with.buffer() == slice.buffer()) {
                    return Err(Error::Aliased { output: output.field, other });
                }
            }
        }
        Ok(())
    }

    /// The small arrays that have elements, each with its bytes.
    fn lists(&self, plan: &Plan) -> impl Iterator<Item = (Operand, wgpu::BufferSlice<'a>, u64)> {
        Operand::of_kind(Kind::List).filter_map(|list| {
            let size = list.bytes(plan.shape()).filter(|&size| size > 0)?;
            Some((list, *self.operands.get(list)?, size))
        })
    }

    fn get(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Q => Some(self.q),
            Slot::K => Some(self.k),
            Slot::V => Some(self.v),
            Slot::Out => Some(self.out),
            Slot::Lse => self.lse,
            Slot::Weights => self.weights,
            Slot::Logits => self.logits,
            slot => self.operands.get(slot.operand()?).copied(),
        }
    }
}

#[derive(Clone, Copy)]
struct Tensor<'a> {
    field: &'static str,
    slice: Option<wgpu::BufferSlice<'a>>,
    want: Option<u64>,
    written: bool,
}

/// A slice that is read or written, with the bytes that it needs: one that the problem has, and that has elements.
fn used<'a>(
    field: &'static str,
    slice: Option<wgpu::BufferSlice<'a>>,
    want: Option<u64>,
) -> Result<Option<(wgpu::BufferSlice<'a>, u64)>> {
    match (slice, want) {
        (None, None) => Ok(None),
        (Some(slice), Some(want)) => Ok((want > 0).then_some((slice, want))),
        (None, Some(_)) => Err(Error::Missing { field }),
        (Some(_), None) => Err(Error::Unexpected { field }),
    }
}

pub(crate) fn check_slice(field: &'static str, slice: &wgpu::BufferSlice<'_>, want: u64, alignment: u64) -> Result<()> {
    if slice.size() < want {
        return Err(Error::BufferSize { field, got: slice.size(), want });
    }
    if !slice.offset().is_multiple_of(alignment) {
        return Err(Error::BufferOffset { field, offset: slice.offset(), alignment });
    }
    Ok(())
}

/// A plan with its pipelines and scratch, ready to be recorded any number of times, from any number of threads.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    program: Program,
    scratch: Scratch,
    home: Home,
}

impl Prepared {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How many slices there are.
    pub fn slices(&self) -> usize {
        self.plan.slices()
    }

    /// Records the whole plan. Submit the encoder afterwards; nothing is submitted or waited for here.
    ///
    /// Where [`Plan::estimate`] exceeds what the driver allows one submission, record and submit slice by slice instead:
    /// [`Prepared::begin`].
    ///
    /// # Errors
    ///
    /// If a buffer is missing, too small, or not the device's. wgpu tells nobody the device of an encoder: one of another device
    /// is an error of that device when it is finished. Between devices of two [`wgpu::Instance`]s, wgpu may take one
    /// device's buffer for another's.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &Buffers<'_>) -> Result<()> {
        self.check(buffers)?;
        self.record(0..self.plan.dispatches(), encoder, buffers, &self.scratch.shared()?)
    }

    /// Begins a call that is recorded slice by slice.
    ///
    /// # Errors
    ///
    /// If it needs further scratch, see [`Recording`], and there is no memory.
    pub fn begin(&self) -> Result<Recording<'_, Prepared>> {
        Ok(Recording { of: self, set: self.scratch.own()? })
    }

    /// Checks the buffers and records nothing.
    pub(crate) fn check(&self, buffers: &Buffers<'_>) -> Result<()> {
        buffers.check(&self.plan)
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(crate) fn slice(&self, slice: usize) -> Result<Range<usize>> {
        self.plan.check_slice(slice)?;
        Ok(self.plan.slice_range(slice))
    }

    /// Records some dispatches with buffers that [`Prepared::check`] took.
    pub(crate) fn record(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &Buffers<'_>,
        set: &[(Slot, wgpu::Buffer)],
    ) -> Result<()> {
        let own = |slot: Slot| &set.iter().find(|(own, _)| *own == slot).expect("the plan states its scratch").1;
        let lists = own(Slot::Lists);
        let copies: Vec<_> = buffers
            .lists(&self.plan)
            .map(|(list, from, size)| {
                let place = 4 * u64::from(self.plan.lists().place(list));
                Copy { field: list.name(), from, to: lists, place, size }
            })
            .collect();
        let buffer = |slot: Slot| match (slot, buffers.get(slot)) {
            // `merge` takes the sinks from a buffer of their own.
            (Slot::Sinks, _) => (lists, 4 * u64::from(self.plan.lists().place(Operand::Sinks))),
            (_, Some(slice)) => (slice.buffer(), slice.offset()),
            (_, None) => (own(slot), 0),
        };
        self.program.record(steps, encoder, buffer, &copies)
    }
}

impl Recording<'_, Prepared> {
    /// Records one slice. Slices run in order, each at most about [`Options::work_budget`] long; submit after each.
    pub fn encode_slice(&self, slice: usize, encoder: &mut wgpu::CommandEncoder, buffers: &Buffers<'_>) -> Result<()> {
        self.record(self.of.slice(slice)?, encoder, buffers)
    }

    /// Records only some of the dispatches, by their numbers in [`Plan::steps`], to time a stage of its own. The results are whole
    /// once all have run in order.
    pub fn encode_steps(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &Buffers<'_>,
    ) -> Result<()> {
        let (value, limit) = (steps.end as u64, self.of.plan.dispatches() as u64);
        if value > limit {
            return Err(Error::TooLarge { field: "steps.end", value, limit });
        }
        self.record(steps.start.min(steps.end)..steps.end, encoder, buffers)
    }

    fn record(&self, steps: Range<usize>, encoder: &mut wgpu::CommandEncoder, buffers: &Buffers<'_>) -> Result<()> {
        self.of.check(buffers)?;
        self.of.record(steps, encoder, buffers, &self.set)?;
        self.hold(encoder);
        Ok(())
    }
}
