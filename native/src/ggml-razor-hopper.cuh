#pragma once

// Attention of a batch on GPUs of compute capability 9.0 (ggml-razor-hopper.cu)

#include "ggml-razor.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

struct razor_hopper_args {
    const float * q; // [n_tokens][n_head][d], in floats:
    int64_t       q_token;
    int64_t       q_head;
    bool          q_aligned; // to 4 floats

    const half * k; // [n_rows][d]
    const half * v;
    int64_t      n_rows;

    // retrieval heads, local heads
    int          n_heads[2]; // KV heads
    int          n_kv[2];
    int          head_rows[2];
    int          first_row[2];
    const int  * since[2];

    const float * bias;  // of local heads
    const int2  * tiles; // smallest and largest `since`

    int   n_tokens;
    int   n_gqa;
    float scale; // for powers of 2

    float * out; // [n_tokens][n_head][d]

    uint8_t heads[GGML_RAZOR_ATTN_MAX_KV]; // KV heads, retrieval heads first

    // set by razor_hopper_plan()
    int      n_blocks; // of query rows
    int      n_ranges; // of the tiles of all heads
    int      n_tiles;  // of all heads
    float  * parts;    // [2*n_blocks*n_ranges][GGML_RAZOR_ROWS][d]
    float2 * sums;     // the same without d: maximum and sum of powers
};

#define GGML_RAZOR_ROWS 128 // query rows that are looked at together: tokens, and the query heads of a KV head

// the number of parts that are kept in between
int razor_hopper_plan(razor_hopper_args & args, int n_multiprocessors);

// false: the driver gives no descriptor of the cache
bool razor_hopper_attn(const razor_hopper_args & args, int d, cudaStream_t stream);
