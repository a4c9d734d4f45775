#include "llama-razor-pages.h"

#if defined(__linux__)

#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 // Linux 5.14
#endif

// the pages that a CPU buffer covers completely: its first and last page may also hold other data. Empty for other buffers
struct razor_pages {
    void * first = nullptr;
    size_t size  = 0;

    explicit razor_pages(ggml_backend_buffer_t buf) {
        if (ggml_backend_buffer_get_type(buf) != ggml_backend_cpu_buffer_type()) {
            return;
        }

        const uintptr_t page  = sysconf(_SC_PAGESIZE);
        const uintptr_t begin = (uintptr_t) ggml_backend_buffer_get_base(buf);
        const uintptr_t end   = begin + ggml_backend_buffer_get_size(buf);

        first = (void *) ((begin + page - 1)/page*page);
        size  = end/page*page > (uintptr_t) first ? end/page*page - (uintptr_t) first : 0;
    }
};

void razor_use_huge_pages(ggml_backend_buffer_t buf) {
    const razor_pages pages(buf);

    if (pages.size > 0) {
        madvise(pages.first, pages.size, MADV_HUGEPAGE); // an error does not matter
    }
}

void razor_clear_in_huge_pages(ggml_backend_buffer_t buf) {
    const razor_pages pages(buf);

    // pages that are mapped stay small: give them back first
    if (pages.size > 0 && madvise(pages.first, pages.size, MADV_DONTNEED) == 0) {
        razor_use_huge_pages(buf);

        // map the new pages, which are zero, now: if memory runs out, it should do so here and not while decoding; Linux before
        // 5.14 has to write them
        if (madvise(pages.first, pages.size, MADV_POPULATE_WRITE) != 0) {
            ggml_backend_buffer_clear(buf, 0);
        }
    }
}

#else

void razor_use_huge_pages(ggml_backend_buffer_t /* buf */) {}

void razor_clear_in_huge_pages(ggml_backend_buffer_t /* buf */) {}

#endif
