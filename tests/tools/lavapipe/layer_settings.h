// Included before every C++ source of a lavapipe build (tests/tools/other_backend.py).
//
// ggml-vulkan.cpp names three types of VK_EXT_layer_settings, which the C++ headers of Vulkan 1.3.239
// (Debian 12) do not have yet. Its settings are for validation layers: a loader ignores a structure of
// an extension that was not asked for.
#pragma once

#if __has_include(<vulkan/vulkan_core.h>)
#include <vulkan/vulkan_core.h>

#ifndef VK_EXT_layer_settings
#include <vector>

namespace vk {
enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        pLayerName;
    const char *        pSettingName;
    LayerSettingTypeEXT type;
    uint32_t            valueCount;
    const void *        pValues;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) :
        settingCount(settings.size()), pSettings(settings.data()) {}

    VkStructureType         sType = (VkStructureType) 1000496000;
    const void *            pNext = nullptr;
    uint32_t                settingCount;
    const LayerSettingEXT * pSettings;
};
} // namespace vk
#endif
#endif
