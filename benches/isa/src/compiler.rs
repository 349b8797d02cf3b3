//! WGSL to SPIR-V as wgpu writes it, and a Vulkan pipeline of it as wgpu makes it, for the statistics of the driver's compiler.

use std::ffi::{CStr, c_char};

use ash::vk;
use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use serde::Serialize;
use wgpu_attention::internal::kernel::Variant;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no Vulkan loader: {0}")]
    Loader(#[from] ash::LoadingError),
    #[error(
        "no Vulkan driver here reports what its compiler made (VK_KHR_pipeline_executable_properties); see benches/isa/run"
    )]
    NoDevice,
    #[error(
        "the Vulkan driver gives no list of devices: {0}. Without a card AMD's driver has a device only in Mesa 25 and older, where \
         RADV_FORCE_FAMILY names its chip: Mesa 26 removed that. `scripts/drivers trixie COMMAND...` runs this program on Mesa 25.0"
    )]
    NoList(vk::Result),
    #[error("Vulkan: {0}")]
    Vulkan(#[from] vk::Result),
    #[error("not valid WGSL: {0}")]
    Shader(String),
    #[error("not written as SPIR-V: {0}")]
    Spirv(#[from] spv::Error),
    #[error("the driver reports no {0:?}; it reports {1:?}")]
    Statistic(&'static str, Vec<String>),
}

/// Lanes of a subgroup of the variants of `matrix` that need a fixed number of them.
const FIXED_LANES: u32 = 32;

/// Workgroup memory is given out in units of 512 or 1024 bytes.
const GRANULE: u64 = 1024;

/// A device of a driver that reports on its compiler.
pub struct Compiler {
    device: ash::Device,
    properties: ash::khr::pipeline_executable_properties::Device,
    pub adapter: String,
    pub driver: String,
    /// Sizes of the square cooperative matrices that the driver has, f16 operands and f32 sums.
    matrices: Vec<u32>,
    // The library has to stay loaded.
    _entry: ash::Entry,
}

/// What the driver's compiler made of a variant.
#[derive(Debug, Serialize)]
pub struct Statistics {
    pub subgroup: u32,
    sgprs: u64,
    vgprs: u64,
    pub spilled_sgprs: u64,
    spilled_vgprs: u64,
    scratch_bytes: u64,
    workgroup_bytes: u64,
    code_bytes: u64,
    subgroups_per_simd: u64,
    instructions: u64,
}

impl Statistics {
    /// What must not be: vector registers in memory, and workgroup memory that nobody asked for. Scalar registers spill to lanes of
    /// vector registers, which costs no memory: they are told, not refused.
    pub fn faults(&self, stated_bytes: u32) -> Vec<String> {
        let mut faults = Vec::new();
        if self.spilled_vgprs > 0 || self.scratch_bytes > 0 {
            faults.push(format!("spills {} VGPRs, {} bytes a subgroup", self.spilled_vgprs, self.scratch_bytes));
        }
        let stated = u64::from(stated_bytes);
        if !(stated..=stated.next_multiple_of(GRANULE)).contains(&self.workgroup_bytes) {
            faults.push(format!("{} bytes of workgroup memory, stated are {stated}", self.workgroup_bytes));
        }
        faults
    }

    pub fn cells(&self) -> [String; 9] {
        [
            self.subgroup.to_string(),
            self.sgprs.to_string(),
            self.vgprs.to_string(),
            format!("{} {}", self.spilled_sgprs, self.spilled_vgprs),
            self.scratch_bytes.to_string(),
            self.workgroup_bytes.to_string(),
            self.code_bytes.to_string(),
            self.subgroups_per_simd.to_string(),
            self.instructions.to_string(),
        ]
    }
}

/// The size of matrices that `matrix` can use: the same in all three dimensions, as wgpu wants it.
fn square_size(found: &vk::CooperativeMatrixPropertiesKHR<'_>) -> Option<u32> {
    let (half, single) = (vk::ComponentTypeKHR::FLOAT16, vk::ComponentTypeKHR::FLOAT32);
    let square = found.m_size == found.n_size && found.n_size == found.k_size;
    let types = [found.a_type, found.b_type, found.c_type, found.result_type] == [half, half, single, single];
    (square && types && found.scope == vk::ScopeKHR::SUBGROUP).then_some(found.m_size)
}

fn text(chars: &[c_char]) -> String {
    // SAFETY: Vulkan ends its fixed arrays of characters with a zero.
    unsafe { CStr::from_ptr(chars.as_ptr()) }.to_string_lossy().into_owned()
}

impl Compiler {
    /// The first device that has the extension, with the features that wgpu would turn on.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: the calls of this function get structures that live as long as they are read, and no handle outlives
        // `Compiler`, which is dropped with the process.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let create = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&create, None)?;
            let wanted = ash::khr::pipeline_executable_properties::NAME;
            let has = |physical, name: &CStr| {
                let extensions = instance.enumerate_device_extension_properties(physical).unwrap_or_default();
                extensions.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name))
            };
            let mut devices = instance.enumerate_physical_devices().map_err(Error::NoList)?.into_iter();
            let physical = devices.find(|&physical| has(physical, wanted)).ok_or(Error::NoDevice)?;

            let mut driver = vk::PhysicalDeviceDriverProperties::default();
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
            instance.get_physical_device_properties2(physical, &mut properties);
            let adapter = text(&properties.properties.device_name);
            let driver = format!("{} {}", text(&driver.driver_name), text(&driver.driver_info));

            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
            let mut extensions = vec![wanted.as_ptr()];
            let mut executables =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
            let mut memory16 = vk::PhysicalDevice16BitStorageFeatures::default()
                .storage_buffer16_bit_access(true)
                .uniform_and_storage_buffer16_bit_access(true);
            let mut float16 = vk::PhysicalDeviceShaderFloat16Int8Features::default().shader_float16(true);
            let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlFeatures::default().subgroup_size_control(true);
            let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true);
            let core = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
            let mut create = vk::DeviceCreateInfo::default().enabled_features(&core).queue_create_infos(&queues);
            // wgpu leaves bounds to the driver where it has this, and the driver's loads depend on it.
            if has(physical, ash::ext::robustness2::NAME) {
                extensions.push(ash::ext::robustness2::NAME.as_ptr());
                create = create.push_next(&mut robust);
            }
            // With cooperative matrices naga writes SPIR-V for Vulkan's memory model.
            let mut matrix = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(true);
            let mut model = vk::PhysicalDeviceVulkanMemoryModelFeatures::default()
                .vulkan_memory_model(true)
                .vulkan_memory_model_device_scope(true);
            let mut matrices = Vec::new();
            if has(physical, ash::khr::cooperative_matrix::NAME) {
                extensions.push(ash::khr::cooperative_matrix::NAME.as_ptr());
                create = create.push_next(&mut matrix).push_next(&mut model);
                let of = ash::khr::cooperative_matrix::Instance::new(&entry, &instance);
                let found = of.get_physical_device_cooperative_matrix_properties(physical)?;
                matrices.extend(found.iter().filter_map(square_size));
                matrices.sort_unstable();
                matrices.dedup();
            }
            let create =
                create.enabled_extension_names(&extensions).push_next(&mut executables).push_next(&mut memory16);
            let create = create.push_next(&mut float16).push_next(&mut subgroups);
            let device = instance.create_device(physical, &create, None)?;
            let properties = ash::khr::pipeline_executable_properties::Device::new(&instance, &device);
            Ok(Compiler { device, properties, adapter, driver, matrices, _entry: entry })
        }
    }

    /// Whether the driver has the cooperative matrices that a variant needs, if it needs any.
    pub fn has_matrices(&self, variant: &Variant) -> bool {
        variant.needs().matrices.is_none_or(|size| self.matrices.contains(&size))
    }

    /// Compiles a variant.
    pub fn compile(&self, variant: &Variant) -> Result<Statistics, Error> {
        let code = spirv(variant)?;
        let buffers = std::iter::once(vk::DescriptorType::UNIFORM_BUFFER)
            .chain(variant.bindings().into_iter().map(|_| vk::DescriptorType::STORAGE_BUFFER));
        let bindings: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, kind)| {
                let place = vk::DescriptorSetLayoutBinding::default().binding(binding).descriptor_type(kind);
                place.descriptor_count(1).stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        // SAFETY: every structure lives as long as it is read; what is made here is destroyed here, after its last use.
        unsafe {
            let set = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let sets = [self.device.create_descriptor_set_layout(&set, None)?];
            let layout = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets);
            let layout = self.device.create_pipeline_layout(&layout, None)?;
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None)?;
            let mut stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main");
            let mut fixed =
                vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default().required_subgroup_size(FIXED_LANES);
            if matches!(variant, Variant::Matrix(x) if !x.varying) {
                stage = stage.push_next(&mut fixed);
            } else {
                // As wgpu does for devices with subgroups: the compiler chooses their size.
                stage = stage.flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE);
            }
            let create = vk::ComputePipelineCreateInfo::default()
                .flags(vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR)
                .stage(stage)
                .layout(layout);
            let made = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[create], None);
            let pipeline = made.map_err(|(_, error)| error)?[0];
            let statistics = self.statistics(pipeline);
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
            self.device.destroy_pipeline_layout(layout, None);
            self.device.destroy_descriptor_set_layout(sets[0], None);
            statistics
        }
    }

    fn statistics(&self, pipeline: vk::Pipeline) -> Result<Statistics, Error> {
        // SAFETY: the pipeline was made with CAPTURE_STATISTICS, and a compute pipeline has one executable.
        let (subgroup, found) = unsafe {
            let info = vk::PipelineInfoKHR::default().pipeline(pipeline);
            let subgroup = self.properties.get_pipeline_executable_properties(&info)?[0].subgroup_size;
            let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(0);
            (subgroup, self.properties.get_pipeline_executable_statistics(&info)?)
        };
        let get = |wanted: &'static str| {
            let names = || found.iter().map(|statistic| text(&statistic.name)).collect();
            let statistic = found.iter().find(|statistic| text(&statistic.name) == wanted);
            // SAFETY: all that are asked for are counts, which drivers report as 64-bit integers, signed or not.
            statistic.map(|s| unsafe { s.value.u64 }).ok_or_else(|| Error::Statistic(wanted, names()))
        };
        Ok(Statistics {
            subgroup,
            sgprs: get("SGPRs")?,
            vgprs: get("VGPRs")?,
            spilled_sgprs: get("Spilled SGPRs")?,
            spilled_vgprs: get("Spilled VGPRs")?,
            scratch_bytes: get("Scratch size")?,
            workgroup_bytes: get("LDS size")?,
            code_bytes: get("Code size")?,
            subgroups_per_simd: get("Subgroups per SIMD")?,
            instructions: get("Instructions")?,
        })
    }
}

/// What wgpu 30 hands to Vulkan 1.3 for a module that is trusted, `ShaderRuntimeChecks::unchecked()`, and without
/// zero-initialised workgroup memory.
fn spirv(variant: &Variant) -> Result<Vec<u32>, Error> {
    let source = variant.wgsl();
    let module = naga::front::wgsl::parse_str(&source).map_err(|error| Error::Shader(error.emit_to_string(&source)))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|error| Error::Shader(error.emit_to_string(&source)))?;
    let unchecked = BoundsCheckPolicy::Unchecked;
    let policies =
        BoundsCheckPolicies { index: unchecked, buffer: unchecked, image_load: unchecked, binding_array: unchecked };
    let options = spv::Options {
        lang_version: (1, 6),
        flags: spv::WriterFlags::empty(),
        bounds_check_policies: policies,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        ray_query_initialization_tracking: false,
        emit_int_div_checks: false,
        ..spv::Options::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".to_owned() };
    Ok(spv::write_vec(&module, &info, &options, Some(&pipeline))?)
}
