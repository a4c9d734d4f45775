#pragma once

// attention on CPUs as a custom operation of the graph
//
// the sums over cells are split in the same way for one token and for many: the attention of a token has the same bits in every batch

#include "llama-razor-attn.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <atomic>
#include <vector>

// name of a kernel, or "off" for upstream's attention; read when a context is created
#define RAZOR_ATTN_ENV "RAZOR_LOCAL_CPU_ATTENTION"

// return the kernel that RAZOR_ATTN_ENV names, by default the best one for this CPU; nullptr if it is "off" or there is none
// throws std::runtime_error if RAZOR_ATTN_ENV has another value
razor_attn_kernel razor_attn_choose_kernel();

// maximum number of groups of local heads in separate tensors, limited by the number of sources of the operation
#define RAZOR_ATTN_MAX_SPLIT 2

bool razor_attn_supported(ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v);

// return the ALiBi slope of each query head of a layer, in the model's order. Empty if max_bias is 0
std::vector<float> razor_attn_slopes(int64_t n_head, float max_bias);

// parameters of the operation for one layer, must live as long as the graph
struct razor_attn {
    // KV heads with the same number of cells
    struct head_group {
        const std::vector<uint32_t> * heads = nullptr;

        ggml_tensor * mask = nullptr; // F16 [n_kv, n_tokens]

        int64_t first_row = 0; // rows of K and V
        int64_t head_rows = 0;

        int64_t n_kv     = 0;
        int64_t n_chunks = 0;
        int64_t n_tasks  = 0;
        int     src_mask = 0;
    };

    float scale; // must be the first member: razor_local/verify/ reads it

    float cap = 0.0f; // soft cap of the logits, 0: none; must follow scale

    razor_attn_kernel kernel = nullptr;

    ggml_tensor * sinks = nullptr; // F32 [n_head], logits without a value

    std::vector<float> slopes; // ALiBi: factor of the mask for each query head, empty: 1

    // the rows of a token, not of a head, are contiguous, and the only group has all heads:
    //   k [d_k, n_head_kv, cells]
    //   v [d_v, n_head_kv, cells]
    bool by_token = false;

    // if not nullptr: K and V of all groups but the first, with the layout of build()'s k and v
    ggml_tensor * k_local = nullptr;
    ggml_tensor * v_local = nullptr;

    std::vector<head_group> groups; // the retrieval heads come first

    int64_t n_gqa = 1;

    int64_t d_k = 0, d_v = 0, n_head = 0, n_tokens = 0;

    int64_t block_tokens = 0; // tokens and cells of a task
    int64_t chunk        = 0;

    int src_sinks = 0;
    int src_local = 1; // K of all groups but the first, V follows

    int64_t n_blocks = 0;
    int64_t n_chunks = 1;
    int64_t n_tasks  = 0;

    std::vector<int64_t> head_chunks; // per query head

    std::atomic<int64_t> next = 0;
    std::atomic<int>     done = 0;

    // requires scale, kernel, n_gqa, and heads, mask and (unless by_token) rows of the groups
    //   q [d_k, n_head, n_tokens]
    //   k [d_k, rows]
    //   v [d_v, rows]
    // returns [d_v*n_head, n_tokens]
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v);

    int64_t partial_size() const { return d_v + 2; }

    int64_t next_task();
    void    leave(int n_threads);
};
