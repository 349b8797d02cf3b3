// A Vulkan layer for measuring Dawn (ONNX Runtime's WebGPU) on drivers that it refuses, and without subgroups.
//
// Dawn insists on shaderSampledImageArrayDynamicIndexing and shaderStorageImageArrayDynamicIndexing. Mesa 22.3's lavapipe lacks
// them, and compute kernels on buffers use neither: this layer says that they are there, and does not ask the driver for them. With
// WGPU_ATTENTION_HIDE_SUBGROUPS set it also hides subgroup operations, because lavapipe's subgroups of 8 lanes make ONNX Runtime's
// fused attention wrong, so that the comparison needs a right one.
//
// Only for measuring, and only where benches/peers/run is asked for it (--layer). One instance and one device a process.
#include <stdlib.h>
#include <string.h>
#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

static VkInstance instance;
static PFN_vkGetInstanceProcAddr next_instance;
static PFN_vkGetDeviceProcAddr next_device;

// The functions of the layer below. They are asked for while the instance is made: later the loader would give back ours.
static PFN_vkGetPhysicalDeviceFeatures next_features;
static PFN_vkGetPhysicalDeviceFeatures2 next_features2;
static PFN_vkGetPhysicalDeviceProperties2 next_properties2;
static PFN_vkCreateDevice next_create_device;

static PFN_vkVoidFunction next(const char *name, const char *before_1_1) {
    PFN_vkVoidFunction function = next_instance(instance, name);
    return function ? function : next_instance(instance, before_1_1);
}

static void set_indexing(VkPhysicalDeviceFeatures *features, VkBool32 value) {
    features->shaderSampledImageArrayDynamicIndexing = value;
    features->shaderStorageImageArrayDynamicIndexing = value;
}

static void VKAPI_CALL features(VkPhysicalDevice device, VkPhysicalDeviceFeatures *found) {
    next_features(device, found);
    set_indexing(found, VK_TRUE);
}

static void VKAPI_CALL features2(VkPhysicalDevice device, VkPhysicalDeviceFeatures2 *found) {
    next_features2(device, found);
    set_indexing(&found->features, VK_TRUE);
}

static void VKAPI_CALL properties2(VkPhysicalDevice device, VkPhysicalDeviceProperties2 *found) {
    next_properties2(device, found);
    if (!getenv("WGPU_ATTENTION_HIDE_SUBGROUPS"))
        return;
    for (VkBaseOutStructure *part = found->pNext; part; part = part->pNext) {
        if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES)
            ((VkPhysicalDeviceSubgroupProperties *)part)->supportedOperations = VK_SUBGROUP_FEATURE_BASIC_BIT;
        if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES)
            ((VkPhysicalDeviceVulkan11Properties *)part)->subgroupSupportedOperations = VK_SUBGROUP_FEATURE_BASIC_BIT;
    }
}

// The loader's link to the next layer, which each layer moves on for the one below.
static const void *link_of(const void *chain, VkStructureType type, VkLayerFunction function) {
    for (const VkBaseInStructure *part = chain; part; part = part->pNext)
        if (part->sType == type && ((const VkLayerInstanceCreateInfo *)part)->function == function)
            return part;
    return NULL;
}

static VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo *info, const VkAllocationCallbacks *memory, VkInstance *made) {
    VkLayerInstanceCreateInfo *link =
        (VkLayerInstanceCreateInfo *)link_of(info->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO, VK_LAYER_LINK_INFO);
    if (!link)
        return VK_ERROR_INITIALIZATION_FAILED;
    next_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    VkResult result = ((PFN_vkCreateInstance)next_instance(NULL, "vkCreateInstance"))(info, memory, made);
    if (result != VK_SUCCESS)
        return result;
    instance = *made;
    next_features = (PFN_vkGetPhysicalDeviceFeatures)next_instance(instance, "vkGetPhysicalDeviceFeatures");
    next_features2 =
        (PFN_vkGetPhysicalDeviceFeatures2)next("vkGetPhysicalDeviceFeatures2", "vkGetPhysicalDeviceFeatures2KHR");
    next_properties2 =
        (PFN_vkGetPhysicalDeviceProperties2)next("vkGetPhysicalDeviceProperties2", "vkGetPhysicalDeviceProperties2KHR");
    next_create_device = (PFN_vkCreateDevice)next_instance(instance, "vkCreateDevice");
    return VK_SUCCESS;
}

static VkResult VKAPI_CALL create_device(VkPhysicalDevice device, const VkDeviceCreateInfo *info, const VkAllocationCallbacks *memory,
                                         VkDevice *made) {
    VkLayerDeviceCreateInfo *link =
        (VkLayerDeviceCreateInfo *)link_of(info->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO, VK_LAYER_LINK_INFO);
    if (!link)
        return VK_ERROR_INITIALIZATION_FAILED;
    next_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;

    VkPhysicalDeviceFeatures core;
    VkDeviceCreateInfo asked = *info;
    if (info->pEnabledFeatures) {
        core = *info->pEnabledFeatures;
        set_indexing(&core, VK_FALSE);
        asked.pEnabledFeatures = &core;
    }
    for (VkBaseOutStructure *part = (VkBaseOutStructure *)info->pNext; part; part = part->pNext)
        if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2)
            set_indexing(&((VkPhysicalDeviceFeatures2 *)part)->features, VK_FALSE);
    return next_create_device(device, &asked, memory, made);
}

static PFN_vkVoidFunction VKAPI_CALL device_function(VkDevice device, const char *name) { return next_device(device, name); }

static PFN_vkVoidFunction VKAPI_CALL instance_function(VkInstance from, const char *name) {
    static const struct {
        const char *name;
        PFN_vkVoidFunction function;
    } own[] = {
        {"vkGetInstanceProcAddr", (PFN_vkVoidFunction)instance_function},
        {"vkCreateInstance", (PFN_vkVoidFunction)create_instance},
        {"vkCreateDevice", (PFN_vkVoidFunction)create_device},
        {"vkGetPhysicalDeviceFeatures", (PFN_vkVoidFunction)features},
        {"vkGetPhysicalDeviceFeatures2", (PFN_vkVoidFunction)features2},
        {"vkGetPhysicalDeviceFeatures2KHR", (PFN_vkVoidFunction)features2},
        {"vkGetPhysicalDeviceProperties2", (PFN_vkVoidFunction)properties2},
        {"vkGetPhysicalDeviceProperties2KHR", (PFN_vkVoidFunction)properties2},
    };
    for (size_t n = 0; n < sizeof own / sizeof *own; n++)
        if (!strcmp(name, own[n].name))
            return own[n].function;
    return next_instance ? next_instance(from, name) : NULL;
}

__attribute__((visibility("default"))) VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *interface) {
    interface->loaderLayerInterfaceVersion = 2;
    interface->pfnGetInstanceProcAddr = instance_function;
    interface->pfnGetDeviceProcAddr = device_function;
    interface->pfnGetPhysicalDeviceProcAddr = NULL;
    return VK_SUCCESS;
}
