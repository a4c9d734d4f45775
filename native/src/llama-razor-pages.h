#pragma once

#include "ggml-backend.h"

// ask the system for huge pages, before the buffer is first written. Attention reads whole caches, and with pages of 4 KiB it
// spends about a tenth of its time on the translation of addresses. Does nothing on other systems than Linux, and for memory
// of a driver
void razor_use_huge_pages(ggml_backend_buffer_t buf);

// the same for a buffer of zeros that has pages already: gives them back, and takes huge ones
void razor_clear_in_huge_pages(ggml_backend_buffer_t buf);
