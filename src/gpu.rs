//! A device of our own: adapters, upload, run, read-back. Callers with their own device use [`Attention`] directly.

mod operations;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use futures::channel::oneshot;

use crate::caps::Caps;
use crate::encode::{Attention, Buffers, Home, Prepared, Recording, allocate};
use crate::error::counted;
use crate::error::{Error, Result};
use crate::operands::Operands;
use crate::options::Options;
use crate::plan::Plan;
use crate::problem::{Element, Inputs, Outputs, Problem};
use crate::shape::Shape;

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Limits to ask for; `None` asks for all that the adapter offers.
    pub limits: Option<wgpu::Limits>,
    /// Features to ask for; `None` asks for those of use that the adapter offers.
    pub features: Option<wgpu::Features>,
    /// Compile shaders with wgpu's runtime checks; slower.
    pub checked: bool,
}

/// An adapter with a device of its own.
#[derive(Debug)]
pub struct Gpu {
    info: wgpu::AdapterInfo,
    device: wgpu::Device,
    queue: wgpu::Queue,
    library: Attention,
    faults: Arc<Mutex<Faults>>,
}

/// What wgpu reported outside of error scopes.
#[derive(Debug, Default)]
struct Faults {
    /// Comes back from every call.
    lost: Option<Error>,
    /// The first error of each thread that no call has returned yet. wgpu reports on the thread whose command is wrong, so that no
    /// other thread's call gets it.
    threads: HashMap<ThreadId, Error>,
}

fn lock(faults: &Mutex<Faults>) -> MutexGuard<'_, Faults> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Operands of one call in device memory, and buffers for its outputs.
#[derive(Debug)]
pub struct Resident {
    home: Home,
    q: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    out: wgpu::Buffer,
    operands: Operands<wgpu::Buffer>,
    lse: Option<wgpu::Buffer>,
    weights: Option<wgpu::Buffer>,
    logits: Option<wgpu::Buffer>,
}

impl Resident {
    /// The operands as [`Prepared::encode`] takes them.
    pub fn buffers(&self) -> Buffers<'_> {
        Buffers {
            q: self.q.slice(..),
            k: self.k.slice(..),
            v: self.v.slice(..),
            out: self.out.slice(..),
            operands: self.operands.as_ref().map(|_, buffer| buffer.slice(..)),
            lse: whole(&self.lse),
            weights: whole(&self.weights),
            logits: whole(&self.logits),
        }
    }
}

/// All of a buffer that there may be.
pub(crate) fn whole(buffer: &Option<wgpu::Buffer>) -> Option<wgpu::BufferSlice<'_>> {
    buffer.as_ref().map(|buffer| buffer.slice(..))
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    // Debug flags of a debug build would make drivers compile without optimisation; the environment can still set them.
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor.with_env())
}

/// An adapter in a line: name, backend, driver.
pub fn describe(info: &wgpu::AdapterInfo) -> String {
    format!("{} ({}, {} {})", info.name, info.backend, info.driver, info.driver_info)
}

/// Variables that wgpu passes over in silence where it does not know their value, and the values that it knows, in any case.
const VARIABLES: [(&str, &[&str], &str); 10] = [
    ("WGPU_POWER_PREF", &["low", "high", "none"], "low, high or none"),
    ("WGPU_GLES_MINOR_VERSION", &["automatic", "0", "1", "2"], "automatic, 0, 1 or 2"),
    ("WGPU_GL_FENCE_BEHAVIOR", &["normal", "autofinish"], "normal or autofinish"),
    (
        "WGPU_GL_DEBUG_FNS",
        &["auto", "forceenabled", "force_enabled", "enabled", "disabled"],
        "auto, forceenabled or disabled",
    ),
    ("WGPU_DX12_COMPILER", &["fxc", "dxc", "dynamicdxc", "staticdxc", "auto"], "fxc, dxc, staticdxc or auto"),
    ("WGPU_DX12_PRESENTATION_SYSTEM", &["dxgifromvisual", "visual", "dxgifromhwnd", "hwnd"], "visual or hwnd"),
    ("WGPU_DX12_USE_FRAME_LATENCY_WAITABLE_OBJECT", &["none", "wait", "dontwait"], "none, wait or dontwait"),
    ("WGPU_DX12_AGILITY_SDK_REQUIRE", &["0", "1"], "0 or 1"),
    ("WGPU_NOOP_BACKEND", &["0", "1"], "0 or 1"),
    ("WGPU_DX12_AGILITY_SDK_VERSION", &[], "a whole number"),
];

/// Backends as `WGPU_BACKEND` names them.
const BACKENDS: [&str; 11] =
    ["vulkan", "vk", "dx12", "d3d12", "metal", "mtl", "opengl", "gles", "gl", "webgpu", "noop"];

/// The first variable whose value nobody understands. A list of backends has commas; of other variables nothing is like not set.
fn unknown_variable(value: impl Fn(&str) -> Option<String>) -> Result<()> {
    let error = |variable, value: String, want| Err(Error::Environment { variable, value, want });
    if let Some(backends) = value("WGPU_BACKEND") {
        let known = |name: &str| BACKENDS.contains(&name.trim());
        if !backends.to_lowercase().split(',').all(known) {
            return error(
                "WGPU_BACKEND",
                backends,
                "vulkan, metal, dx12 or gl, or several of them with commas between",
            );
        }
    }
    for (variable, known, want) in VARIABLES {
        let Some(value) = value(variable).filter(|value| !value.is_empty()) else { continue };
        let right = match known {
            [] => value.parse::<u32>().is_ok(),
            _ => known.contains(&value.to_lowercase().as_str()),
        };
        if !right {
            return error(variable, value, want);
        }
    }
    Ok(())
}

/// An environment variable, whatever its bytes.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

impl Gpu {
    /// Refuses what wgpu would ignore: an environment variable that it reads (`WGPU_BACKEND`, `WGPU_POWER_PREF`, …) with a value
    /// that it does not know. All functions that choose an adapter call this, except for [`Gpu::adapters`], which cannot fail.
    pub fn check_environment() -> Result<()> {
        unknown_variable(variable)
    }

    /// All adapters that can run compute shaders, in wgpu's order; indices for [`Gpu::named`]. `WGPU_BACKEND` narrows them; where
    /// it names no backend there are none, as [`Gpu::check_environment`] tells.
    pub fn adapters() -> Vec<wgpu::Adapter> {
        let adapters = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()));
        adapters.into_iter().filter(can_compute).collect()
    }

    /// The best adapter: the one that `WGPU_ADAPTER_NAME` names, else discrete before integrated before virtual before CPU; with
    /// `WGPU_POWER_PREF=low` integrated before discrete.
    pub fn new() -> Result<Gpu> {
        Self::check_environment()?;
        if let Some(name) = variable("WGPU_ADAPTER_NAME").filter(|name| !name.is_empty()) {
            return Self::named(&name);
        }
        let frugal = wgpu::PowerPreference::from_env() == Some(wgpu::PowerPreference::LowPower);
        let best = Self::adapters().into_iter().min_by_key(|adapter| rank(adapter.get_info().device_type, frugal));
        let adapter = best.ok_or(Error::NoAdapter { wanted: String::new(), found: "none".into() })?;
        Self::open(&adapter, &DeviceOptions::default())
    }

    /// The adapter with this index in [`Gpu::adapters`], or the only one whose name contains this (in any case), optionally
    /// after its backend: `1`, `nvidia`, `vulkan:llvmpipe`, `gl:`. More than one match is an error that lists them.
    pub fn named(wanted: &str) -> Result<Gpu> {
        Self::open(&Self::find(wanted)?, &DeviceOptions::default())
    }

    /// The adapter that [`Gpu::named`] would open.
    pub fn find(wanted: &str) -> Result<wgpu::Adapter> {
        Self::check_environment()?;
        let mut adapters = Self::adapters();
        let list = |adapters: &[&wgpu::Adapter]| {
            let names: Vec<_> = adapters.iter().map(|adapter| describe(&adapter.get_info())).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        };
        if let Ok(index) = wanted.parse::<usize>() {
            if index < adapters.len() {
                return Ok(adapters.swap_remove(index));
            }
            let found = counted(adapters.len(), "adapter") + ": " + &list(&adapters.iter().collect::<Vec<_>>());
            return Err(Error::NoAdapter { wanted: format!(" with index {index}"), found });
        }
        let lower = wanted.to_lowercase();
        let (backend, name) = lower.split_once(':').unwrap_or(("", &lower));
        let matches = |adapter: &&wgpu::Adapter| {
            let info = adapter.get_info();
            (backend.is_empty() || info.backend.to_str() == backend) && info.name.to_lowercase().contains(name)
        };
        let found: Vec<_> = adapters.iter().filter(matches).collect();
        match found[..] {
            [one] => Ok(one.clone()),
            [] => Err(Error::NoAdapter {
                wanted: match wgpu::Backend::ALL.iter().any(|backend| backend.to_str() == lower) {
                    true => format!(" has {wanted:?} in its name; for the adapters of that backend say \"{lower}:\""),
                    false => format!(" matches {wanted:?}"),
                },
                found: list(&adapters.iter().collect::<Vec<_>>()),
            }),
            _ => Err(Error::AmbiguousAdapter { wanted: wanted.to_owned(), found: list(&found) }),
        }
    }

    /// Opens a device on an adapter.
    pub fn open(adapter: &wgpu::Adapter, options: &DeviceOptions) -> Result<Gpu> {
        let useful = wgpu::Features::SHADER_F16
            | wgpu::Features::SHADER_INT64
            | wgpu::Features::SUBGROUP
            | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
            | wgpu::Features::PIPELINE_CACHE;
        let features = options.features.unwrap_or(adapter.features() & useful);
        let experimental_features = if features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            // SAFETY: wgpu asks to know that experimental features may have bugs with undefined behaviour. Of this one only `matrix`
            // makes use: by loads, stores and multiply-adds alone, in the sizes and types that the adapter lists, on memory of
            // the workgroup behind workgroup barriers, and at addresses within its arrays (they are constants plus a block's
            // start). naga writes no memory operands of the Vulkan memory model for them; the barriers are what drivers heed.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("wgpu-attention"),
            required_features: features,
            experimental_features,
            required_limits: options.limits.clone().unwrap_or_else(|| adapter.limits()),
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| Error::RequestDevice(error.to_string()))?;
        let faults = Arc::<Mutex<Faults>>::default();
        let slot = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&slot).threads.entry(thread::current().id()).or_insert_with(|| error.into());
        }));
        let slot = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&slot).lost.get_or_insert_with(|| Error::DeviceLost(format!("{reason:?}: {message}")));
        });
        static OPENED: AtomicU64 = AtomicU64::new(1);
        let home = Home { device: device.clone(), gpu: OPENED.fetch_add(1, Ordering::Relaxed) };
        let library = Attention::with_caps(home, Caps::of(&device, Some(adapter))?, options.checked);
        Ok(Gpu { info: adapter.get_info(), device, queue, library, faults })
    }

    /// The adapter.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    /// The device. What is wrong with commands of your own, outside of your error scopes, comes back from the next call of this `Gpu` on
    /// the same thread.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// Its queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Planner and pipelines of this device.
    pub fn library(&self) -> &Attention {
        &self.library
    }

    /// The same, to give it tuned rows or a pipeline cache.
    pub fn library_mut(&mut self) -> &mut Attention {
        &mut self.library
    }

    /// Runs a problem on host slices: plan, upload, compute slice by slice, read back.
    pub fn attention(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        self.attention_with(problem, inputs, &Options::default())
    }

    /// The same with planning [`Options`].
    pub fn attention_with(&self, problem: &Problem, inputs: &Inputs<'_>, options: &Options) -> Result<Outputs> {
        let plan = self.library.plan_with(problem, options)?;
        plan.shape().check_inputs(inputs)?;
        let prepared = self.library.prepare(&plan)?;
        let resident = self.upload(&plan, inputs)?;
        self.run(&prepared, &resident, &mut |_, _| ())?;
        self.download(&plan, &resident)
    }

    /// The same without blocking the thread on the read-back; poll the device elsewhere, or let the browser do it.
    pub async fn attention_async(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        let plan = self.library.plan(problem)?;
        plan.shape().check_inputs(inputs)?;
        let prepared = self.library.prepare(&plan)?;
        let resident = self.upload(&plan, inputs)?;
        let call = prepared.begin()?;
        for slice in 0..prepared.slices() {
            self.submit(&call, slice, &resident)?;
        }
        let read = async |buffer: &Option<wgpu::Buffer>| match buffer {
            Some(buffer) => self.read_async(buffer.slice(..)).await.map(Some),
            None => Ok(None),
        };
        let out = self.read_async(resident.out.slice(..)).await?;
        let (lse, weights) = (read(&resident.lse).await?, read(&resident.weights).await?);
        Ok(outputs(&plan, Outputs { out, lse, weights, logits: read(&resident.logits).await? }))
    }

    /// Uploads operands and makes output buffers, filled with NaN where the kernels must write.
    pub fn upload(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Resident> {
        let s = plan.shape();
        s.check_inputs(inputs)?;
        self.fault()?;
        let make = |label: &str, bytes: &[u8]| upload_bytes(&self.device, &self.queue, label, bytes);
        let nan = |label: &str, wanted: bool, len: u64| {
            wanted.then(|| make(label, bytemuck::cast_slice(&vec![f32::NAN; len as usize])))
        };
        let create = || Resident {
            home: self.library.home().clone(),
            q: make("q", inputs.q.bytes()),
            k: make("k", inputs.k.bytes()),
            v: make("v", inputs.v.bytes()),
            out: make("out", &unwritten(s)),
            operands: inputs.operands.map(|operand, data| make(operand.name(), data.bytes())),
            // Tokens that no packed sequence owns stay 0.
            lse: match s.packed {
                Some(_) => s.lse.then(|| make("lse", &vec![0; 4 * s.lse_len() as usize])),
                None => nan("lse", s.lse, s.lse_len()),
            },
            weights: nan("weights", s.weights, s.scores_len()),
            logits: nan("logits", s.logits.is_some(), s.scores_len()),
        };
        let resident = allocate(&self.device, create)?;
        self.fault()?;
        Ok(resident)
    }

    fn check_home(&self, field: &'static str, home: &Home) -> Result<()> {
        if home.is(self.library.home()) { Ok(()) } else { Err(Error::OtherDevice { field }) }
    }

    fn submit(&self, call: &Recording<'_, Prepared>, slice: usize, resident: &Resident) -> Result<()> {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        call.encode_slice(slice, &mut encoder, &resident.buffers())?;
        self.queue.submit([encoder.finish()]);
        self.fault()
    }

    /// Submits one slice after the other and waits for each; `progress(done, of)` follows each. Any number of threads may run the same
    /// `prepared` at once, each on a `resident` of its own: see [`Recording`] for their scratch.
    pub fn run(&self, prepared: &Prepared, resident: &Resident, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        self.fault()?;
        self.check_home("prepared", prepared.home())?;
        self.check_home("resident", &resident.home)?;
        let call = prepared.begin()?;
        for slice in 0..prepared.slices() {
            self.submit(&call, slice, resident)?;
            self.wait()?;
            progress(slice + 1, prepared.slices());
        }
        Ok(())
    }

    /// Reads the outputs back.
    pub fn download(&self, plan: &Plan, resident: &Resident) -> Result<Outputs> {
        self.check_home("resident", &resident.home)?;
        let read =
            |buffer: &Option<wgpu::Buffer>| buffer.as_ref().map(|buffer| self.read(buffer.slice(..))).transpose();
        let (lse, weights, logits) = (read(&resident.lse)?, read(&resident.weights)?, read(&resident.logits)?);
        Ok(outputs(plan, Outputs { out: self.read(resident.out.slice(..))?, lse, weights, logits }))
    }

    /// Bytes of a buffer slice with usage `COPY_SRC`; offset and size are multiples of 4. Blocks.
    pub fn read(&self, slice: wgpu::BufferSlice<'_>) -> Result<Vec<u8>> {
        if slice.size() == 0 {
            return self.fault().map(|()| Vec::new());
        }
        let (staging, ready) = self.start_read(slice)?;
        self.wait()?;
        self.finish_read(&staging, pollster::block_on(ready))
    }

    /// The same without blocking the thread; the device must be polled elsewhere, as a browser does by itself.
    pub async fn read_async(&self, slice: wgpu::BufferSlice<'_>) -> Result<Vec<u8>> {
        if slice.size() == 0 {
            return self.fault().map(|()| Vec::new());
        }
        let (staging, ready) = self.start_read(slice)?;
        self.finish_read(&staging, ready.await)
    }

    fn start_read(&self, slice: wgpu::BufferSlice<'_>) -> Result<(wgpu::Buffer, Mapping)> {
        let descriptor = wgpu::BufferDescriptor {
            label: Some("read-back"),
            size: slice.size(),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        };
        let staging = allocate(&self.device, || self.device.create_buffer(&descriptor))?;
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &staging, 0, slice.size());
        self.queue.submit([encoder.finish()]);
        let (send, ready) = oneshot::channel();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            // The receiver may be gone if the caller dropped the future.
            let _ = send.send(result);
        });
        self.fault()?;
        Ok((staging, ready))
    }

    fn finish_read(
        &self,
        staging: &wgpu::Buffer,
        mapped: Result<Result<(), wgpu::BufferAsyncError>, oneshot::Canceled>,
    ) -> Result<Vec<u8>> {
        self.fault()?;
        match mapped {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Error::DeviceLost(error.to_string())),
            Err(canceled) => return Err(Error::DeviceLost(canceled.to_string())),
        }
        let view = staging.slice(..).get_mapped_range().map_err(|error| Error::DeviceLost(error.to_string()))?;
        Ok(view.to_vec())
    }

    /// Waits until the device is idle.
    pub fn wait(&self) -> Result<()> {
        loop {
            let polled = self.device.poll(wgpu::PollType::wait_indefinitely());
            self.fault()?;
            match polled {
                Ok(_) => return Ok(()),
                // OpenGL waits two seconds at most, however long it is asked to: nothing is lost.
                Err(wgpu::PollError::Timeout) => {}
                Err(error) => return Err(Error::DeviceLost(error.to_string())),
            }
        }
    }

    /// What went wrong on this thread, told once, or that the device is lost, told every time.
    fn fault(&self) -> Result<()> {
        let mut faults = lock(&self.faults);
        let own = faults.threads.remove(&thread::current().id());
        faults.lost.clone().or(own).map_or(Ok(()), Err)
    }
}

/// A storage buffer with these bytes, padded to whole words.
pub(crate) fn upload_bytes(device: &wgpu::Device, queue: &wgpu::Queue, label: &str, bytes: &[u8]) -> wgpu::Buffer {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4).max(4), 0);
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: padded.len() as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    // Written through the queue: mapping at creation (`create_buffer_init`) panics on a lost device.
    queue.write_buffer(&buffer, 0, &padded);
    buffer
}

type Mapping = oneshot::Receiver<Result<(), wgpu::BufferAsyncError>>;

/// Place of a kind of adapter in the order of choice.
fn rank(kind: wgpu::DeviceType, frugal: bool) -> u32 {
    match kind {
        wgpu::DeviceType::DiscreteGpu => u32::from(frugal),
        wgpu::DeviceType::IntegratedGpu => u32::from(!frugal),
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

fn can_compute(adapter: &wgpu::Adapter) -> bool {
    let flags = adapter.get_downlevel_capabilities().flags;
    flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) && adapter.get_info().backend != wgpu::Backend::Noop
}

/// The bytes of an output that nothing was written to: NaN in every row, 0 in the gaps that strides leave.
fn unwritten(s: &Shape) -> Vec<u8> {
    let tensor = s.out();
    let nan: &[u8] = match s.element {
        Element::F32 => &f32::NAN.to_ne_bytes(),
        Element::F16 => &half::f16::NAN.to_bits().to_ne_bytes(),
        Element::Bf16 => &half::bf16::NAN.to_bits().to_ne_bytes(),
    };
    let row = nan.repeat(tensor.dim as usize);
    let mut bytes = vec![0; tensor.extent() as usize * nan.len()];
    // Which tokens of a packed batch belong to a sequence is not known here: they start as 0.
    let [batch, heads, rows] = if s.packed.is_some() { [0; 3] } else { tensor.sizes };
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..rows {
                let at = tensor.at(b, h, i) as usize * nan.len();
                bytes[at..at + row.len()].copy_from_slice(&row);
            }
        }
    }
    bytes
}

/// The elements of a tensor's bytes, widened to f32, which is exact.
fn widened(element: Element, bytes: &[u8]) -> Vec<f32> {
    let words = bytemuck::pod_collect_to_vec::<u8, u16>;
    match element {
        Element::F32 => bytemuck::pod_collect_to_vec(bytes),
        Element::F16 => words(bytes).into_iter().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
        Element::Bf16 => words(bytes).into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
    }
}

fn outputs(plan: &Plan, bytes: Outputs<u8>) -> Outputs {
    let shape = plan.shape();
    // Buffers end at whole words and are never empty, outputs need not.
    let f32s = |bytes: Option<Vec<u8>>, len: u64| bytes.map(|b| bytemuck::pod_collect_to_vec(&b[..4 * len as usize]));
    let mut out = widened(shape.element, &bytes.out);
    out.truncate(shape.out().extent() as usize);
    Outputs {
        out,
        lse: f32s(bytes.lse, shape.lse_len()),
        weights: f32s(bytes.weights, shape.scores_len()),
        logits: f32s(bytes.logits, shape.scores_len()),
    }
}

#[cfg(test)]
mod tests {
    use super::{rank, unknown_variable};
    use crate::error::Error;
    use wgpu::DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other, VirtualGpu};

    #[test]
    fn adapters_are_chosen_by_kind_and_a_frugal_caller_gets_the_integrated_one() {
        let order = |frugal| {
            let mut kinds = [Cpu, Other, VirtualGpu, IntegratedGpu, DiscreteGpu];
            kinds.sort_by_key(|&kind| rank(kind, frugal));
            kinds
        };
        assert_eq!(order(false), [DiscreteGpu, IntegratedGpu, VirtualGpu, Other, Cpu]);
        assert_eq!(order(true), [IntegratedGpu, DiscreteGpu, VirtualGpu, Other, Cpu]);
    }

    #[test]
    fn variables_that_wgpu_would_ignore_are_named() {
        let set = |name: &'static str, value: &'static str| {
            unknown_variable(move |variable| (variable == name).then(|| value.to_owned()))
        };
        for (variable, good, bad) in [
            ("WGPU_BACKEND", &["vulkan", "VK, gl", "metal,dx12,noop"][..], &["vulkna", "", "vulkan,", "vulkan gl"][..]),
            ("WGPU_POWER_PREF", &["low", "High", "none", ""], &["frugal", "low "]),
            ("WGPU_GLES_MINOR_VERSION", &["Automatic", "2"], &["3", "es3"]),
            ("WGPU_GL_FENCE_BEHAVIOR", &["normal", "AutoFinish"], &["finish"]),
            ("WGPU_GL_DEBUG_FNS", &["auto", "force_enabled"], &["1"]),
            ("WGPU_DX12_COMPILER", &["Fxc", "dynamicdxc"], &["gcc"]),
            ("WGPU_DX12_PRESENTATION_SYSTEM", &["Visual", "hwnd"], &["window"]),
            ("WGPU_DX12_USE_FRAME_LATENCY_WAITABLE_OBJECT", &["DontWait"], &["no"]),
            ("WGPU_DX12_AGILITY_SDK_REQUIRE", &["0", "1"], &["yes"]),
            ("WGPU_DX12_AGILITY_SDK_VERSION", &["615"], &["1.615", "-1"]),
            ("WGPU_NOOP_BACKEND", &["1"], &["true"]),
            // Free text, and flags for which everything but 0 is yes.
            ("WGPU_ADAPTER_NAME", &["anything"], &[]),
            ("WGPU_VALIDATION", &["anything"], &[]),
        ] {
            for &value in good {
                assert_eq!(set(variable, value), Ok(()), "{variable}={value}");
            }
            for &value in bad {
                let error = set(variable, value).unwrap_err();
                assert!(matches!(&error, Error::Environment { variable: named, .. } if *named == variable), "{error}");
                let text = error.to_string();
                assert!(text.contains(variable) && text.contains(&format!("{value:?}; it must be ")), "{text}");
            }
        }
    }
}
