//! The features and limits of a device, as pure data.

use serde::{Deserialize, Serialize};

use crate::contract::error::{Error, Result};
use crate::contract::limits::Limits;
use crate::contract::options::Kernel;
use crate::contract::proof::{Failure, Feature, Proof, Trial};

/// Subgroup sizes for which lane-per-row forms are rendered; other sizes take the body without subgroups.
pub const SUBGROUP_SIZES: [u32; 2] = [4, 8];

/// Sizes of cooperative matrices for which `matrix` has variants; rows, columns and summed axis are the same.
pub const MATRIX_SIZES: [u32; 2] = [16, 8];

/// What the planner needs to know about a device.
///
/// With serde, limits that are missing have wgpu's defaults, and every other field must be there.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Caps {
    /// The adapter is a CPU that runs shaders (lavapipe, llvmpipe, SwiftShader, WARP): it wants other kernels than a GPU.
    pub cpu: bool,
    /// Shaders may use f16.
    pub f16: bool,
    /// Shaders may use 64-bit integers.
    pub int64: bool,
    /// Shaders may use subgroup operations, and every subgroup has this many lanes.
    pub subgroup_size: Option<u32>,
    /// Shaders may use subgroup operations, and no subgroup has fewer lanes than this.
    pub subgroup_min_size: Option<u32>,
    /// Shaders may use subgroup operations, and no subgroup has more lanes than this.
    pub subgroup_max_size: Option<u32>,
    /// Sizes of the cooperative matrices (f16 operands, f32 sums) that shaders may use; rows, columns and summed axis have the same
    /// size. Empty where shaders may not use any. Only an adapter knows the sizes: without one the list is empty too.
    pub matrices: Vec<u32>,
    /// What failed its trial on the device's driver: no plan uses it. See [`crate::Gpu::prove`].
    #[serde(default)]
    pub failures: Vec<Failure>,
    /// The trials of [`Kernel::Matrix`] whose results were right on the device's driver. The planner takes that kernel by itself for the
    /// problems of these trials alone.
    #[serde(default)]
    pub proved: Vec<Trial>,
    /// The device's limits.
    #[serde(with = "Limits")]
    pub limits: wgpu::Limits,
}

/// The most iterations that all loops of one invocation may run in total on a CPU adapter. The test that ends a loop counts as an
/// iteration. llvmpipe ends all loops after 2^16 iterations, and silently leaves out the rest of their work.
pub(crate) const LOOP_ITERATIONS: u64 = 65_000;

/// Bytes from one dispatch's uniform to the next, which hold the parameters of every kernel. Every adapter can bind multiples of 256.
pub(crate) const UNIFORM_STRIDE: u64 = 512;

/// Operations per second that are assumed for a CPU adapter when a plan is divided into slices. Every CPU adapter measured so far is
/// faster.
const CPU_FLOPS: f64 = 10e9;
/// Operations per second that are assumed for a GPU: those of an old integrated one.
const GPU_FLOPS: f64 = 200e9;

impl Caps {
    /// A GPU with these limits and none of the optional features.
    pub fn new(limits: wgpu::Limits) -> Self {
        Caps {
            cpu: false,
            f16: false,
            int64: false,
            subgroup_size: None,
            subgroup_min_size: None,
            subgroup_max_size: None,
            matrices: Vec::new(),
            failures: Vec::new(),
            proved: Vec::new(),
            limits,
        }
    }

    /// The features and limits of a device, which may be lower than those of its adapter. Pass the adapter that the device was made
    /// from to fill [`Caps::matrices`]; a device does not know its adapter.
    ///
    /// # Errors
    ///
    /// [`Error::Conflict`] if the adapter is not the one that the device was made from.
    pub fn of(device: &wgpu::Device, adapter: Option<&wgpu::Adapter>) -> Result<Self> {
        let info = device.adapter_info();
        let features = device.features();
        let fixed = info.subgroup_min_size == info.subgroup_max_size;
        let subgroups = features.contains(wgpu::Features::SUBGROUP);
        if adapter.is_some_and(|adapter| adapter.get_info() != info) {
            let why = "the device was made from another adapter";
            return Err(Error::Conflict { left: "device", right: "adapter", why });
        }
        let cooperative = features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        Ok(Caps {
            cpu: info.device_type == wgpu::DeviceType::Cpu,
            f16: features.contains(wgpu::Features::SHADER_F16),
            int64: features.contains(wgpu::Features::SHADER_INT64),
            subgroup_size: (subgroups && fixed).then_some(info.subgroup_min_size),
            subgroup_min_size: subgroups.then_some(info.subgroup_min_size),
            subgroup_max_size: subgroups.then_some(info.subgroup_max_size),
            matrices: adapter.filter(|_| cooperative).map_or(Vec::new(), matrix_sizes),
            failures: Vec::new(),
            proved: Vec::new(),
            limits: device.limits(),
        })
    }

    /// The same device without what failed in trials, and with what these proved.
    pub(crate) fn after(&self, proof: &Proof) -> Caps {
        let features = proof.failures.iter().filter_map(|failure| match failure {
            Failure::Feature { feature, .. } => Some(*feature),
            Failure::Kernel { .. } => None,
        });
        let proved = proof.right.iter().filter(|trial| trial.kernel == Kernel::Matrix).copied().collect();
        let caps = features.fold(self.clone(), |caps, feature| caps.without(feature));
        Caps { failures: proof.failures.clone(), proved, ..caps }
    }

    /// The same device without a feature.
    pub(crate) fn without(&self, feature: Feature) -> Caps {
        let mut caps = self.clone();
        match feature {
            Feature::Int64 => caps.int64 = false,
            Feature::F16 => caps.f16 = false,
            Feature::Subgroups => {
                (caps.subgroup_size, caps.subgroup_min_size, caps.subgroup_max_size) = (None, None, None);
            }
        }
        caps
    }

    /// Why a kernel may not run the problems of a trial.
    pub(crate) fn failed(&self, trial: &Trial) -> Option<&str> {
        self.failures.iter().find_map(|failure| match failure {
            Failure::Kernel { trial: of, why } if of == trial => Some(&why[..]),
            _ => None,
        })
    }

    /// Whether the device's driver takes minutes to compile this kernel: `rows` on CPU adapters whose subgroups have four lanes.
    pub fn takes_minutes(&self, kernel: Kernel) -> bool {
        kernel == Kernel::Rows && self.cpu && self.lanes().is_some_and(|lanes| lanes < 8)
    }

    /// Floating-point operations per second that are assumed when a plan is divided into slices.
    pub fn flops_per_second(&self) -> f64 {
        if self.cpu { CPU_FLOPS } else { GPU_FLOPS }
    }

    /// The subgroup size, if there are lane-per-row forms for it.
    pub(crate) fn lanes(&self) -> Option<u32> {
        self.subgroup_size.filter(|size| SUBGROUP_SIZES.contains(size))
    }

    /// The most bytes that one storage binding may have, a multiple of 4. Addresses in shaders are u32, and no backend binds more than
    /// `i32::MAX` bytes.
    pub(crate) fn binding(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size).min(i32::MAX as u64) & !3
    }

    /// The alignment of the offset of every storage binding, in bytes: at least 32, so that a vector is either wholly before the offset
    /// or wholly after it.
    pub(crate) fn alignment(&self) -> u64 {
        u64::from(self.limits.min_storage_buffer_offset_alignment).max(32)
    }

    /// Refuses devices whose limits are below what the smallest variants need.
    pub(crate) fn check(&self) -> Result<()> {
        let l = &self.limits;
        let needs = [
            ("max_storage_buffers_per_shader_stage", u64::from(l.max_storage_buffers_per_shader_stage), 4),
            ("max_uniform_buffers_per_shader_stage", u64::from(l.max_uniform_buffers_per_shader_stage), 1),
            ("max_bindings_per_bind_group", u64::from(l.max_bindings_per_bind_group), 5),
            ("max_compute_workgroup_storage_size", u64::from(l.max_compute_workgroup_storage_size), 8192),
            ("max_compute_invocations_per_workgroup", u64::from(l.max_compute_invocations_per_workgroup), 64),
            ("max_compute_workgroup_size_x", u64::from(l.max_compute_workgroup_size_x), 64),
            ("max_compute_workgroups_per_dimension", u64::from(l.max_compute_workgroups_per_dimension), 1),
            ("max_uniform_buffer_binding_size", l.max_uniform_buffer_binding_size, UNIFORM_STRIDE),
            ("max_storage_buffer_binding_size", l.max_storage_buffer_binding_size, 4096),
            ("max_buffer_size", l.max_buffer_size, 4096),
        ];
        for (limit, got, want) in needs {
            if got < want {
                return Err(Error::Device { limit, got, want });
            }
        }
        Ok(())
    }
}

/// Sizes of the cooperative matrices (f16 operands, f32 sums) that an adapter has and that the kernel `matrix` has variants for. Rows,
/// columns and summed axis have the same size.
pub fn matrix_sizes(adapter: &wgpu::Adapter) -> Vec<u32> {
    let found = adapter.cooperative_matrix_properties();
    let offers = |size: &u32| {
        found.iter().any(|x| {
            [x.m_size, x.n_size, x.k_size] == [*size; 3]
                && x.ab_type == wgpu::CooperativeScalarType::F16
                && x.cr_type == wgpu::CooperativeScalarType::F32
        })
    };
    MATRIX_SIZES.into_iter().filter(offers).collect()
}
