//! The adapters to test on, each opened once for the whole process.
//!
//! - `WGPU_ATTENTION_ADAPTERS=vulkan:llvmpipe,gl:llvmpipe`: each of these must be found. Unset: all there are, at least one.
//! - `WGPU_ATTENTION_CHECKED=1`: shaders are compiled with wgpu's runtime checks.
//! - `WGPU_ATTENTION_SUITE=small`: for slow adapters; what is left out is printed by name.

use std::env;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use wgpu_attention::gpu::describe;
use wgpu_attention::{DeviceOptions, Gpu, wgpu};

const INSTALL: &str = "install a software one with `apt-get install mesa-vulkan-drivers libegl1 libgl1-mesa-dri` \
    (scripts/test does) or name others in WGPU_ATTENTION_ADAPTERS";

/// An adapter and the device that the tests share on it.
pub struct Adapter {
    pub name: String,
    pub adapter: wgpu::Adapter,
    gpu: Gpu,
    turn: Mutex<()>,
}

/// An adapter for the one test whose turn it is: GL has one context, and wgpu panics when a thread waits a second for it.
pub struct Turn {
    adapter: &'static Adapter,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Turn {
    type Target = Adapter;
    fn deref(&self) -> &Adapter {
        self.adapter
    }
}

impl Deref for Adapter {
    type Target = Gpu;
    fn deref(&self) -> &Gpu {
        &self.gpu
    }
}

impl Adapter {
    fn open(adapter: wgpu::Adapter) -> Self {
        let name = describe(&adapter.get_info());
        let gpu = Gpu::open(&adapter, &DeviceOptions { checked: checked(), ..DeviceOptions::default() });
        Adapter { gpu: gpu.unwrap_or_else(|error| panic!("{name}: {error}")), name, adapter, turn: Mutex::new(()) }
    }

    /// A device of its own with other limits than the adapter's.
    pub fn limited(&self, lower: impl FnOnce(&mut wgpu::Limits)) -> Gpu {
        self.limited_to(None, lower)
    }

    /// The same with other features, too.
    pub fn limited_to(&self, features: Option<wgpu::Features>, lower: impl FnOnce(&mut wgpu::Limits)) -> Gpu {
        let mut limits = self.adapter.limits();
        lower(&mut limits);
        let options = DeviceOptions { limits: Some(limits), features, checked: checked() };
        Gpu::open(&self.adapter, &options).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}

pub fn checked() -> bool {
    env::var_os("WGPU_ATTENTION_CHECKED").is_some()
}

/// Whether this is the small suite, in which every case runs as the planner wants it and in no other way.
pub fn is_small() -> bool {
    env::var("WGPU_ATTENTION_SUITE").is_ok_and(|value| value == "small")
}

/// Whether this is the small suite; then says what of `test` is left to the other adapters.
pub fn small(test: &str) -> bool {
    let small = is_small();
    if small {
        eprintln!("small suite: left to other adapters: {test}");
    }
    small
}

/// All adapters to test on, one after the other.
pub fn adapters() -> impl Iterator<Item = Turn> {
    static ADAPTERS: OnceLock<Vec<Adapter>> = OnceLock::new();
    let all = ADAPTERS.get_or_init(|| {
        let found: Vec<wgpu::Adapter> = match env::var("WGPU_ATTENTION_ADAPTERS") {
            Ok(names) => {
                let find = |name: &str| Gpu::find(name.trim()).unwrap_or_else(|error| panic!("{error}; {INSTALL}"));
                names.split(',').map(find).collect()
            }
            Err(_) => Gpu::adapters(),
        };
        assert!(!found.is_empty(), "no GPU adapter; {INSTALL}");
        found.into_iter().map(Adapter::open).collect()
    });
    // A test that failed leaves nothing behind that another one would meet.
    let turn = |adapter: &'static Adapter| adapter.turn.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter().map(move |adapter| Turn { adapter, _turn: turn(adapter) })
}
