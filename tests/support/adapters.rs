//! The adapters to test on, each opened once for the whole process.
//!
//! - `WGPU_ATTENTION_ADAPTERS=vulkan:llvmpipe,gl:llvmpipe`: each of these must be found. Unset: all there are, at least one.
//! - `WGPU_ATTENTION_CHECKED=1`: shaders are compiled with wgpu's runtime checks.
//! - `WGPU_ATTENTION_SUITE=small`: for slow adapters; what is left out is printed by name.

use std::cell::RefCell;
use std::env;
use std::io::Write;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use wgpu_attention::internal::describe;
use wgpu_attention::{DeviceOptions, Gpu, wgpu, with};

const INSTALL: &str = "install a software one with `apt-get install mesa-vulkan-drivers libegl1 libgles2 libgl1-mesa-dri` \
    (scripts/test does) or name others in WGPU_ATTENTION_ADAPTERS";

/// An adapter and the device that the tests share on it.
pub struct Adapter {
    pub name: String,
    adapter: wgpu::Adapter,
    gpu: Gpu,
}

impl Deref for Adapter {
    type Target = Gpu;
    fn deref(&self) -> &Gpu {
        self.take_turn();
        &self.gpu
    }
}

impl Adapter {
    fn open(adapter: wgpu::Adapter) -> Self {
        let name = describe(&adapter.get_info());
        // Trials have tests of their own; here every kernel is compared with the reference anyway.
        let gpu = Gpu::open(&adapter, &with!(DeviceOptions::default(), checked: checked(), unproven: true));
        Adapter { gpu: gpu.unwrap_or_else(|error| panic!("{name}: {error}")), name, adapter }
    }

    pub fn adapter(&self) -> &wgpu::Adapter {
        self.take_turn();
        &self.adapter
    }

    /// A device of its own with other limits than the adapter's.
    pub fn limited(&self, lower: impl FnOnce(&mut wgpu::Limits)) -> Gpu {
        self.limited_to(None, lower)
    }

    /// The same with other features, too.
    pub fn limited_to(&self, features: Option<wgpu::Features>, lower: impl FnOnce(&mut wgpu::Limits)) -> Gpu {
        self.device_of_its_own(true, features, lower)
    }

    /// A device of its own that tries each kernel before its first use, as devices do unless told otherwise.
    pub fn proving(&self, features: Option<wgpu::Features>, lower: impl FnOnce(&mut wgpu::Limits)) -> Gpu {
        self.device_of_its_own(false, features, lower)
    }

    fn device_of_its_own(
        &self,
        unproven: bool,
        features: Option<wgpu::Features>,
        lower: impl FnOnce(&mut wgpu::Limits),
    ) -> Gpu {
        self.take_turn();
        let mut limits = self.adapter.limits();
        lower(&mut limits);
        let options = with!(DeviceOptions::default(), limits: Some(limits), features, checked: checked(), unproven);
        Gpu::open(&self.adapter, &options).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Lets the tests of a binary use OpenGL one after the other, each from its first use until its thread ends: wgpu panics
    /// where a thread waits some seconds for another that compiles. Opening another device on the adapter counts, too.
    fn take_turn(&self) {
        static ROTATE: Mutex<()> = Mutex::new(());
        thread_local!(static MINE: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) });
        if self.adapter.get_info().backend == wgpu::Backend::Gl {
            // A test that failed leaves nothing behind that another one would meet.
            MINE.with_borrow_mut(|mine| {
                mine.get_or_insert_with(|| ROTATE.lock().unwrap_or_else(PoisonError::into_inner));
            });
        }
    }
}

/// A device with the least that the crate promises to run on, and every split forced.
pub fn floor(gpu: &Adapter, binding: u64, side: u32) -> Gpu {
    gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
        limits.max_storage_buffers_per_shader_stage = 4;
        limits.max_compute_workgroup_storage_size = 16352;
        limits.max_compute_invocations_per_workgroup = 256;
        limits.max_compute_workgroups_per_dimension = side;
        limits.max_storage_buffer_binding_size = binding;
    })
}

pub fn checked() -> bool {
    env::var_os("WGPU_ATTENTION_CHECKED").is_some()
}

/// Whether this is the small suite, in which every case runs as the planner wants it and in no other way.
pub fn is_small() -> bool {
    env::var("WGPU_ATTENTION_SUITE").is_ok_and(|value| value == "small")
}

/// Whether this is the small suite; then says what is left to the other adapters, also where the test passes.
pub fn small(left_out: &str) -> bool {
    let small = is_small();
    if small {
        writeln!(std::io::stderr(), "small suite: left to other adapters: {left_out}").expect("standard error is open");
    }
    small
}

/// All adapters to test on, OpenGL last: tests wait for it.
pub fn gpus() -> &'static [Adapter] {
    static ADAPTERS: OnceLock<Vec<Adapter>> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let mut found: Vec<wgpu::Adapter> = match env::var("WGPU_ATTENTION_ADAPTERS") {
            Ok(names) => {
                let find = |name: &str| Gpu::find(name.trim()).unwrap_or_else(|error| panic!("{error}; {INSTALL}"));
                names.split(',').map(find).collect()
            }
            Err(_) => Gpu::adapters(),
        };
        assert!(!found.is_empty(), "no GPU adapter; {INSTALL}");
        found.sort_by_key(|adapter| adapter.get_info().backend == wgpu::Backend::Gl);
        found.into_iter().map(Adapter::open).collect()
    })
}
