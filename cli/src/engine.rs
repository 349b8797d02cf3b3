//! What computes: a GPU adapter with its device, or the CPU reference.

use std::path::PathBuf;

use clap::Args;
use wgpu_attention::multihead::MultiHeadAttention;
use wgpu_attention::operations::Rotation;
use wgpu_attention::wgpu::{Adapter, AdapterInfo, Features, Limits};
use wgpu_attention::{
    DeviceOptions, Element, Error, Form, Gpu, Inputs, Kernel, Options, Outputs, Plan, Precision, Problem, Profile,
    reference, with,
};

use crate::cases::{AppendWork, LayerWork, RotationWork};
use crate::memory;
use crate::options;
use crate::store::Device;

/// Which device is opened and how.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Adapter")]
pub struct DeviceArgs {
    /// Open devices with the lowest limits that WebGPU guarantees on old hardware and without optional features
    #[arg(long)]
    pub low_limits: bool,
    /// Compile shaders with runtime checks of bounds and loops (slower)
    #[arg(long)]
    pub checked: bool,
    /// Plan without the rows that `tune` stored for the adapter
    #[arg(long)]
    pub untuned: bool,
    /// Plan by the rows of this file (default: those that `tune` stored for the adapter)
    #[arg(long, value_name = "FILE", conflicts_with = "untuned")]
    pub tuning: Option<PathBuf>,
}

/// What computes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Adapter")]
pub struct EngineArgs {
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long, conflicts_with = "cpu")]
    adapter: Option<String>,
    /// Run the CPU reference in f32 instead
    #[arg(long)]
    cpu: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl EngineArgs {
    pub fn open(&self) -> wgpu_attention::Result<Engine> {
        if self.cpu {
            return Ok(Engine::Cpu);
        }
        Ok(Engine::Gpu(Box::new(one(self.adapter.as_deref(), &self.device)?)))
    }
}

/// How kernels are chosen. The planner decides what is `None`.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq)]
#[command(next_help_heading = "Kernel")]
pub struct KernelArgs {
    /// How attention is computed
    #[arg(long, value_parser = options::kernel())]
    pub kernel: Option<Kernel>,
    /// Algorithm of the scores and values kernels, or of the matrix kernel
    #[arg(long, value_parser = options::form())]
    pub form: Option<Form>,
    /// Arithmetic access to f16 tensors: the adapter's f16 type, or pairs packed in 32 bits
    #[arg(long, value_enum)]
    pub f16: Option<F16Arg>,
    /// Exactness of f16 weights in the matrix kernel; the others are always strict
    #[arg(long, value_parser = options::precision(), default_value_t)]
    pub precision: Precision,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
pub enum F16Arg {
    Native,
    Packed,
}

impl KernelArgs {
    /// These arguments with the three kernels instead of the kernel asked for: only the three kernels have stages.
    pub fn staged(&self) -> Self {
        KernelArgs { kernel: Some(Kernel::Unfused), ..*self }
    }

    pub fn options(&self) -> Options {
        let native_f16 = self.f16.map(|f16| matches!(f16, F16Arg::Native));
        with!(Options::default(), kernel: self.kernel, form: self.form, native_f16, precision: self.precision)
    }
}

/// One way to compute attention.
#[derive(Debug)]
pub enum Engine {
    Gpu(Box<Device>),
    /// The f32 instance of the reference.
    Cpu,
}

/// The name of an engine in every table and object. It always holds the backend, because Mesa's Vulkan and OpenGL adapters have the same
/// name.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Label {
    pub adapter: String,
    pub backend: String,
    pub driver: String,
}

impl Label {
    pub fn of(info: &AdapterInfo) -> Self {
        let driver = format!("{} {}", info.driver, info.driver_info).trim().to_string();
        Label { adapter: info.name.clone(), backend: info.backend.to_string(), driver }
    }

    fn cpu() -> Self {
        Label { adapter: "CPU reference".into(), backend: "cpu".into(), driver: "f32".into() }
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} · {}", self.adapter, self.backend)
    }
}

impl Engine {
    pub fn label(&self) -> Label {
        match self {
            Engine::Gpu(gpu) => Label::of(gpu.info()),
            Engine::Cpu => Label::cpu(),
        }
    }

    /// Runs one problem. `kernels` has no effect on the CPU reference.
    pub fn attention(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_>,
        kernels: &KernelArgs,
    ) -> wgpu_attention::Result<Outputs> {
        match self {
            Engine::Gpu(gpu) => {
                let plan = gpu.plan_with(problem, &kernels.options())?;
                Ok(run_plan(gpu, &plan, inputs, false, &mut |_, _| ())?.0)
            }
            Engine::Cpu => {
                memory::room("the call", memory::of_reference(&problem.check()?, 4, false))?;
                reference::attention::<f32>(problem, inputs)
            }
        }
    }
}

/// Runs a plan; `progress(done, of)` is called after each slice. With `profile`, runs it once more and measures each step.
pub fn run_plan(
    gpu: &Gpu,
    plan: &Plan,
    inputs: &Inputs<'_>,
    profile: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> wgpu_attention::Result<(Outputs, Option<Profile>)> {
    plan.shape().check_inputs(inputs)?;
    memory::room("the call", memory::of_call(plan, gpu.library().caps().cpu))?;
    let prepared = gpu.library().prepare(plan)?;
    let resident = gpu.upload(plan, inputs)?;
    gpu.run(&prepared, &resident, progress)?;
    let profile = profile.then(|| prepared.profile(gpu, &resident.buffers())).transpose()?;
    Ok((gpu.download(plan, &resident)?, profile))
}

impl Engine {
    /// Runs a whole layer.
    pub fn layer(&self, work: &LayerWork, kernels: &KernelArgs) -> wgpu_attention::Result<Outputs> {
        let (layer, problem, call, inputs) = (&work.layer, &work.problem, &work.call, work.inputs());
        let outputs = match self {
            Engine::Gpu(gpu) => {
                let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, Element::F32)?;
                resident.forward_with(gpu, problem, call, &inputs, &kernels.options())?
            }
            Engine::Cpu => reference::layer::<f32>(layer, problem, call, &inputs)?,
        };
        Ok(with!(Outputs::new(outputs.out), weights: outputs.weights))
    }

    /// Applies a rotary embedding in place.
    pub fn rotation(&self, work: &RotationWork) -> wgpu_attention::Result<Outputs> {
        let RotationWork { rotation, x, table, positions } = work;
        let out = match self {
            Engine::Gpu(gpu) => gpu.rotate(rotation, x.elements(), table, positions)?,
            Engine::Cpu => {
                // The reference returns dense heads; each row is copied back to its own offset.
                let (rotated, _) = reference::rotary::<f32>(rotation, x.elements(), table, positions)?;
                let (mut out, mut rows) = (x.widened(), rotated.chunks_exact(rotation.head_dim as usize));
                for (b, h, row) in places(rotation) {
                    let at = b * rotation.x.batch + h * rotation.x.head + row * rotation.x.row + rotation.x.offset;
                    let rotated = rows.next().expect("one for each place");
                    out[at as usize..][..rotated.len()].copy_from_slice(rotated);
                }
                out
            }
        };
        Ok(Outputs::new(out))
    }
}

impl Engine {
    /// Writes new rows into a cache.
    pub fn append(&self, work: &AppendWork) -> wgpu_attention::Result<Outputs> {
        let AppendWork { append, x, cache, starts } = work;
        let out = match self {
            Engine::Gpu(gpu) => gpu.append(append, x.elements(), cache.elements(), starts, None)?,
            Engine::Cpu => {
                let mut out = cache.widened();
                reference::append(append, &x.widened(), &mut out, starts, None)?;
                out
            }
        };
        Ok(Outputs::new(out))
    }
}

/// Batch, head and row of each row of a rotation, in order.
fn places(rotation: &Rotation) -> impl Iterator<Item = (u64, u64, u64)> {
    let [batch, heads, rows] = [rotation.batch, rotation.heads, rotation.rows].map(u64::from);
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..rows).map(move |row| (b, h, row))))
}

/// Opens one adapter, with the tuning rows and the pipeline cache that are stored for it.
pub fn open(adapter: &Adapter, device: &DeviceArgs) -> wgpu_attention::Result<Device> {
    let mut options = with!(DeviceOptions::default(), checked: device.checked);
    if device.low_limits {
        options.limits = Some(Limits::downlevel_defaults().or_worse_values_from(&adapter.limits()));
        options.features = Some(Features::empty());
    }
    Ok(Device::new(Gpu::open(adapter, &options)?, device))
}

/// The adapters that `wanted` names, in the same order. If `wanted` is empty: those that `WGPU_ADAPTER_NAME` matches, or all.
pub fn choose(wanted: &[String]) -> wgpu_attention::Result<Vec<Adapter>> {
    Gpu::check_environment()?;
    let adapters = Gpu::adapters();
    let labels: Vec<Label> = adapters.iter().map(|adapter| Label::of(&adapter.get_info())).collect();
    let named = std::env::var_os("WGPU_ADAPTER_NAME").map(|name| name.to_string_lossy().into_owned());
    let named = named.filter(|name| !name.is_empty());
    let chosen = match (wanted, named) {
        ([], None) => return Ok(adapters),
        ([], Some(name)) => all(&name, &labels)?,
        (wanted, _) => return wanted.iter().map(|wanted| Gpu::find(wanted)).collect(),
    };
    Ok(chosen.into_iter().map(|index| adapters[index].clone()).collect())
}

/// The adapter that `wanted` names, or the library's choice.
pub fn one(wanted: Option<&str>, device: &DeviceArgs) -> wgpu_attention::Result<Device> {
    match wanted {
        Some(wanted) => open(&choose(&[wanted.to_string()])?[0], device),
        None if !device.low_limits && !device.checked => Ok(Device::new(Gpu::new()?, device)),
        None => {
            let best = Gpu::new()?;
            let adapters = Gpu::adapters();
            let same = adapters.iter().find(|adapter| adapter.get_info() == *best.info());
            open(same.expect("the library's choice is one of its adapters"), device)
        }
    }
}

/// The indices of all adapters that match an index, a part of a name, or `backend:part`; at least one.
fn all(wanted: &str, labels: &[Label]) -> wgpu_attention::Result<Vec<usize>> {
    let wanted_lower = wanted.to_lowercase();
    let by_backend = wanted_lower.split_once(':');
    let matches = |index: usize| {
        if let Ok(number) = wanted.parse::<usize>() {
            return number == index;
        }
        let name = labels[index].adapter.to_lowercase();
        name.contains(&wanted_lower)
            || by_backend.is_some_and(|(backend, part)| labels[index].backend == backend && name.contains(part))
    };
    let every = 0..labels.len();
    let found: Vec<usize> = every.clone().filter(|&index| matches(index)).collect();
    if found.is_empty() {
        let found = list(&every.collect::<Vec<_>>(), labels);
        return Err(Error::NoAdapter { wanted: format!(" {wanted:?}"), found });
    }
    Ok(found)
}

fn list(indices: &[usize], labels: &[Label]) -> String {
    let named: Vec<String> = indices.iter().map(|&index| format!("{index}: {}", labels[index])).collect();
    if named.is_empty() { "none".into() } else { named.join(", ") }
}

/// Tells how to get an adapter on this operating system.
pub fn how_to_get_one() -> &'static str {
    if cfg!(target_os = "linux") {
        "Install a Vulkan driver of your GPU, or Mesa's, which also runs on the CPU:\n  \
         sudo apt install mesa-vulkan-drivers libvulkan1 libegl1 libgles2 libgl1-mesa-dri   (Debian, Ubuntu)\n\
         In a container, pass the GPU through (--device /dev/dri, or --gpus all). WGPU_BACKEND, if set, must not exclude the backend."
    } else if cfg!(target_os = "macos") {
        "macOS has Metal built in: check that this is a session with access to the GPU (not a virtual machine without one), \
         and that WGPU_BACKEND, if set, names metal."
    } else if cfg!(target_os = "windows") {
        "Windows has Direct3D 12 built in, with a software adapter: check that the GPU driver is installed and enabled in the \
         Device Manager, and that WGPU_BACKEND, if set, names dx12 or vulkan."
    } else {
        "Install a Vulkan driver, and check that WGPU_BACKEND, if set, names vulkan or gl."
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(adapter: &str, backend: &str) -> Label {
        Label { adapter: adapter.into(), backend: backend.into(), driver: String::new() }
    }

    #[test]
    fn adapters_are_found_by_index_name_and_backend() {
        let labels = [label("llvmpipe (LLVM)", "vulkan"), label("llvmpipe (LLVM)", "gl"), label("Arc A770", "vulkan")];
        assert_eq!(all("1", &labels).unwrap(), [1]);
        assert_eq!(all("arc", &labels).unwrap(), [2]);
        assert_eq!(all("gl:", &labels).unwrap(), [1]);
        assert_eq!(all("vulkan:LLVM", &labels).unwrap(), [0]);
        assert_eq!(all("vulkan:", &labels).unwrap(), [0, 2]);
        for missing in ["3", "metal:", "nvidia", "99999999999999999999999"] {
            assert!(matches!(all(missing, &labels), Err(Error::NoAdapter { .. })), "{missing}");
        }
        assert_eq!(all("LLVM", &labels).unwrap(), [0, 1]);
        let error = all("nvidia", &[]).unwrap_err().to_string();
        assert!(error.contains("\"nvidia\"; found: none"), "{error}");
    }
}
