#pragma once

// attention as an operation of the graph: on CPUs by the kernels of llama-razor-attn.h, on devices by backends that know it

#include "ggml-razor.h"
#include "llama-razor-attn.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <atomic>
#include <vector>

// which instructions, for contexts that are created then; "off": upstream's attention
#define RAZOR_ATTN_ENV "RAZOR_LOCAL_CPU_ATTENTION"

// the best that this CPU has, or what RAZOR_ATTN_ENV names; nullptr: off, or none
// throws std::runtime_error on another value
razor_attn_kernel razor_attn_choose();

bool razor_attn_supported(ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v);

// "off": upstream's operations on devices; "token": attention of one token by ours, of a batch by upstream's; "ampere": of a
// batch without the instructions of later devices; for contexts that are created then
#define RAZOR_DEVICE_ENV GGML_RAZOR_DEVICE_ENV

enum razor_device_choice {
    RAZOR_DEVICE_OFF,
    RAZOR_DEVICE_TOKEN,
    RAZOR_DEVICE_ON,
};

// "on" if it is not set; throws std::runtime_error on other values
razor_device_choice razor_device_wanted();

// whether the device knows the operations of ggml-razor.h
bool razor_device_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// whether it knows the attention of a batch as well
bool razor_device_batch_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// rows of all heads at once, to where a cache has them
ggml_tensor * razor_store_device(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k, ggml_tensor * v, ggml_tensor * rows);

// rows of local heads into their compensation tokens: the caches of a layer, and inputs of the graph
struct razor_fold {
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * k_sum;
    ggml_tensor * v_sum;
    ggml_tensor * rows; // I32 [n_fold, ...]
    ggml_tensor * src;
    ggml_tensor * dst;
    ggml_tensor * cells;
    ggml_tensor * inverse;

    int32_t n_local;
    int32_t head_rows;
    int64_t first_row; // of the local heads
};

ggml_tensor * razor_fold_device(ggml_context * ctx, const razor_fold & fold);

// which token of a batch sees which cell, inputs of the graph as in ggml-razor.h
struct razor_batch {
    ggml_tensor * since[2] = { nullptr, nullptr }; // of the retrieval heads, of the local heads
    ggml_tensor * bias     = nullptr;
    ggml_tensor * tiles    = nullptr;
};

// the parameters of the operation of one layer, which live as long as the graph
struct razor_attn {
    // KV heads with the same number of cells
    struct head_group {
        const std::vector<uint32_t> * heads = nullptr;

        ggml_tensor * mask = nullptr; // F16 [n_kv, n_tokens]

        int64_t first_row = 0; // of K and V
        int64_t head_rows = 0;

        int64_t n_kv     = 0;
        int64_t n_chunks = 0;
        int64_t n_tasks  = 0;
        int     src_mask = 0;
    };

    float scale; // the first: razor_local/verify/ reads it

    razor_attn_kernel kernel = nullptr;

    // the rows of a token lie one after the other, and groups[0] has all heads:
    //   k [d_k, n_head_kv, cells]
    //   v [d_v, n_head_kv, cells]
    bool by_token = false;

    head_group groups[2];

    int64_t n_gqa = 1;

    int64_t d_k = 0, d_v = 0, n_head = 0, n_tokens = 0;

    int64_t block_tokens = 0; // tokens and cells of a task
    int64_t chunk        = 0;

    int64_t n_blocks = 0;
    int64_t n_chunks = 1;
    int64_t n_tasks  = 0;

    std::vector<int64_t> head_chunks; // per query head

    std::atomic<int64_t> next = 0;
    std::atomic<int>     done = 0;

    // scale, kernel, n_gqa and, of groups, heads, mask and (unless by_token) rows are set
    //   q [d_k, n_head, n_tokens]
    //   k [d_k, rows]
    //   v [d_v, rows]
    // returns [d_v*n_head, n_tokens]
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v);

    // the same by the operation of ggml-razor.h, for one token; of groups, heads, mask and head_rows are set
    ggml_tensor * build_device(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream);

    // for a batch; mask does not count
    ggml_tensor * build_batch(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream, const razor_batch & batch);

    int64_t partial_size() const { return d_v + 2; }

    int64_t next_task();
    void    leave(int n_threads);
};
