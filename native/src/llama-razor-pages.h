#pragma once

#include "ggml-backend.h"

// ask the system for huge pages, before the buffer is first written: attention reads whole caches, and address translation takes
// a tenth of its time with pages of 4 KiB. Does nothing if the system does not support it, or the buffer is not in plain memory
void razor_use_huge_pages(ggml_backend_buffer_t buf);

// the same for a buffer that was cleared before. It is zero afterwards, too
void razor_clear_in_huge_pages(ggml_backend_buffer_t buf);
