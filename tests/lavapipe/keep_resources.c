// Preloaded into the tests on lavapipe (tests/other_backend.py).
//
// ggml-vulkan leaves descriptors of buffers it has freed in its descriptor sets, where no shader
// reads them. Vulkan allows that, but Mesa 22.3 takes and drops a reference to every resource of a set:
// it counts up and down in freed memory while other threads use it, and malloc notices sooner or later.
// Here the driver's own structs of that size are never freed: some 500 bytes for each buffer.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stddef.h>
#include <string.h>

// malloc_usable_size() of a struct llvmpipe_resource: malloc may give 16 bytes more than asked for
static const size_t RESOURCE_SIZE = 504;

void free(void * pointer) {
    static void (*next)(void *) = NULL;
    if (!next) {
        next = (void (*)(void *)) dlsym(RTLD_NEXT, "free");
    }
    const size_t size = pointer ? malloc_usable_size(pointer) : 0;
    if (size == RESOURCE_SIZE || size == RESOURCE_SIZE + 16) {
        Dl_info info;
        if (dladdr(__builtin_return_address(0), &info) && info.dli_fname && strstr(info.dli_fname, "libvulkan_lvp")) {
            return;
        }
    }
    next(pointer);
}
