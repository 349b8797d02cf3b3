//! Adapters, and devices of our own on them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result, counted};
use crate::device::encode::{Attention, Home};
use crate::device::gpu::environment::variable;
use crate::device::gpu::{DeviceOptions, Faults, Gpu, describe};
use crate::device::lock;

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    // Debug flags of a debug build would make drivers compile without optimisation; the environment can still set them.
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor.with_env())
}

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

impl Gpu {
    /// All adapters that can run compute shaders, in wgpu's order; indices for [`Gpu::named`]. `WGPU_BACKEND` narrows them; where
    /// it names no backend there are none, as [`Gpu::check_environment`] tells.
    pub fn adapters() -> Vec<wgpu::Adapter> {
        pollster::block_on(Self::adapters_async())
    }

    /// [`Gpu::adapters`] without blocking the thread.
    pub async fn adapters_async() -> Vec<wgpu::Adapter> {
        let adapters = instance().enumerate_adapters(wgpu::Backends::all()).await;
        adapters.into_iter().filter(can_compute).collect()
    }

    /// The best adapter: the one that `WGPU_ADAPTER_NAME` names, else discrete before integrated before virtual before CPU; with
    /// `WGPU_POWER_PREF=low` integrated before discrete.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::check_environment`] and of [`Gpu::open`], [`Error::NoAdapter`] if there is no adapter, and those of
    /// [`Gpu::named`] if `WGPU_ADAPTER_NAME` is set.
    pub fn new() -> Result<Gpu> {
        pollster::block_on(Self::new_async())
    }

    /// [`Gpu::new`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::new`].
    pub async fn new_async() -> Result<Gpu> {
        Self::check_environment()?;
        if let Some(name) = variable("WGPU_ADAPTER_NAME").filter(|name| !name.is_empty()) {
            return Self::named_async(&name).await;
        }
        let frugal = wgpu::PowerPreference::from_env() == Some(wgpu::PowerPreference::LowPower);
        let adapters = Self::adapters_async().await;
        let best = adapters.into_iter().min_by_key(|adapter| rank(adapter.get_info().device_type, frugal));
        let adapter = best.ok_or(Error::NoAdapter { wanted: String::new(), found: "none".into() })?;
        Self::open_async(&adapter, &DeviceOptions::default()).await
    }

    /// The adapter with this index in [`Gpu::adapters`], or the only one whose name contains this (in any case), optionally
    /// after its backend: `1`, `nvidia`, `vulkan:llvmpipe`, `gl:`. More than one match is an error that lists them.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::find`] and of [`Gpu::open`].
    pub fn named(wanted: &str) -> Result<Gpu> {
        pollster::block_on(Self::named_async(wanted))
    }

    /// [`Gpu::named`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::named`].
    pub async fn named_async(wanted: &str) -> Result<Gpu> {
        Self::open_async(&Self::find_async(wanted).await?, &DeviceOptions::default()).await
    }

    /// The adapter that [`Gpu::named`] would open.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::check_environment`], [`Error::NoAdapter`] if no adapter matches, and [`Error::AmbiguousAdapter`] if
    /// several do.
    pub fn find(wanted: &str) -> Result<wgpu::Adapter> {
        pollster::block_on(Self::find_async(wanted))
    }

    /// [`Gpu::find`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::find`].
    pub async fn find_async(wanted: &str) -> Result<wgpu::Adapter> {
        Self::check_environment()?;
        let mut adapters = Self::adapters_async().await;
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
    ///
    /// # Errors
    ///
    /// [`Error::RequestDevice`] if the adapter makes no device with these features and limits.
    pub fn open(adapter: &wgpu::Adapter, options: &DeviceOptions) -> Result<Gpu> {
        pollster::block_on(Self::open_async(adapter, options))
    }

    /// [`Gpu::open`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::open`].
    pub async fn open_async(adapter: &wgpu::Adapter, options: &DeviceOptions) -> Result<Gpu> {
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
        let requested = adapter.request_device(&descriptor).await;
        let (device, queue) = requested.map_err(|error| Error::RequestDevice(error.to_string()))?;
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
        Ok(Gpu { info: adapter.get_info(), device, queue, library, unproven: options.unproven, faults })
    }
}

#[cfg(test)]
mod tests {
    use super::rank;
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
}
