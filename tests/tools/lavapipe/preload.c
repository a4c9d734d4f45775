// Preloaded into the tests on lavapipe (tests/tools/other_backend.py): what it needs to be safe and quick.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <malloc.h>
#include <stddef.h>
#include <string.h>
#include <vulkan/vulkan_core.h>

// Safe: ggml-vulkan leaves descriptors of buffers it has freed in its descriptor sets, where no shader
// reads them. Vulkan allows that, but Mesa 22.3 takes and drops a reference to every resource of a set:
// it counts up and down in freed memory while other threads use it, and malloc notices sooner or later.
// Here the driver's own structs of that size are never freed: some 500 bytes for each buffer.

// malloc_usable_size() of a struct llvmpipe_resource: malloc may give 16 bytes more than asked for
static const size_t RESOURCE_SIZE = 504;

void free(void * pointer) {
    static void (*next)(void *) = NULL;
    if (!next) {
        next = (void (*)(void *)) dlsym(RTLD_NEXT, "free");
    }
    const size_t size = pointer ? malloc_usable_size(pointer) : 0;
    if (size == RESOURCE_SIZE || size == RESOURCE_SIZE + 16) {
        // not dladdr(), which searches all symbols: LLVM frees blocks of that size by the million
        struct dl_find_object caller;
        if (_dl_find_object(__builtin_return_address(0), &caller) == 0 &&
            strstr(caller.dlfo_link_map->l_name, "libvulkan_lvp")) {
            return;
        }
    }
    next(pointer);
}

// Quick: ggml-vulkan asks for the status of a fence again and again until it is reached, on a core that
// the driver computes on. Here the question sleeps.

static PFN_vkWaitForFences wait_for_fences;

static VkResult VKAPI_CALL get_fence_status(VkDevice device, VkFence fence) {
    const VkResult result = wait_for_fences(device, 1, &fence, VK_TRUE, 100 * 1000 * 1000);
    return result == VK_TIMEOUT ? VK_NOT_READY : result;
}

PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char * name) {
    static PFN_vkGetInstanceProcAddr next = NULL;
    if (!next) {
        next = (PFN_vkGetInstanceProcAddr) dlsym(dlopen("libvulkan.so.1", RTLD_NOW), "vkGetInstanceProcAddr");
    }
    if (strcmp(name, "vkGetFenceStatus") == 0) {
        wait_for_fences = (PFN_vkWaitForFences) next(instance, "vkWaitForFences");
        return (PFN_vkVoidFunction) get_fence_status;
    }
    return next(instance, name);
}
