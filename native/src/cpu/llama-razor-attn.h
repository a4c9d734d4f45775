#pragma once

// attention on CPUs: each row of K and V is read and converted to F32 once for all query heads of its KV head
//
// llama-razor-attn-kernel.h is the kernel, llama-razor-attn-{avx512,avx2,neon}.cpp compile it for an instruction set, and
// llama-razor-attn-op.cpp adds it to a graph

#include <stddef.h>
#include <stdint.h>

#define RAZOR_ATTN_TILE  64 // cells of a tile
#define RAZOR_ATTN_LANES 16 // floats of the longest vector

enum razor_attn_format {
    RAZOR_ROWS_F32,
    RAZOR_ROWS_F16,
    RAZOR_ROWS_BF16,
    RAZOR_ROWS_Q8_0,
    RAZOR_ROWS_Q4_0,
    RAZOR_ROWS_FUNC, // converted by to_float()
};

// rows of K or V of one KV head
struct razor_attn_rows {
    const char * data;
    size_t       row_bytes; // from one row to the next one
    size_t       n_bytes;   // of a row

    razor_attn_format format;

    void (*to_float)(const void * src, float * dst, int64_t n);
};

// what a thread computes at a time: one KV head, some tokens and some cells
struct razor_attn_task {
    int32_t n_tokens;
    int32_t n_gqa; // query heads
    int32_t d_k;   // multiples of 16
    int32_t d_v;

    float scale;
    float cap;     // if not 0, the logits become cap*tanh(logit/cap) before the mask is added

    const float * sinks; // if not nullptr, a logit without a value for each query head, added when the output is written

    // strides are in elements
    const float * q;
    int64_t q_token;
    int64_t q_head;

    razor_attn_rows k;
    razor_attn_rows v;

    const uint16_t * mask; // F16
    int64_t mask_token;

    const float * slopes; // ALiBi: factor of the mask for each query head, nullptr: 1

    int64_t cell0;
    int64_t cell1;
    int64_t chunk; // cells that are summed before their sum is added to the total, so that the result does not depend on n_tokens

    // with partial: the sum of e^(s - m)*v, then m, then the sum of e^(s - m)
    // else the output, which is the quotient of the sums
    float * out;
    int64_t out_token;
    int64_t out_head;
    bool    partial;

    // if not nullptr, combine the partial results of one query head [n_parts][d_v + 2] into out and ignore all other inputs
    const float * parts;
    int64_t n_parts;
};

// return the number of floats that a task needs as scratch memory
inline size_t razor_attn_scratch(const razor_attn_task & t) {
    const size_t n_rows = (size_t) t.n_tokens*t.n_gqa;

    const size_t d = t.d_k > t.d_v ? t.d_k : t.d_v;

    return n_rows*(t.d_k + 2*t.d_v + RAZOR_ATTN_TILE + 4) + RAZOR_ATTN_LANES*t.d_k + RAZOR_ATTN_TILE*(d + t.n_tokens + 1);
}

typedef void (*razor_attn_kernel)(const razor_attn_task & task, float * scratch);

// return nullptr if the kernel was not compiled
razor_attn_kernel razor_attn_kernel_avx512();
razor_attn_kernel razor_attn_kernel_avx2();
razor_attn_kernel razor_attn_kernel_neon();
