#pragma once

// The operations of ggml-razor.h as nodes of a graph. They are built only for layers on a device that knows them: CPUs do not.

#include "cpu/llama-razor-attn-op.h"
#include "ggml-razor.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdint>

// what GGML_RAZOR_DEVICE_ENV says, for contexts that are created then: "off": upstream's operations on devices; "token": attention
// of one token by ours, of a batch by upstream's; "ampere": of a batch without the instructions of later devices
enum razor_device_choice {
    RAZOR_DEVICE_OFF,
    RAZOR_DEVICE_TOKEN,
    RAZOR_DEVICE_ON,
};

// "on" if it is not set; throws std::runtime_error on other values
razor_device_choice razor_device_choose();

// whether the device knows the operations of ggml-razor.h
bool razor_device_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// whether it knows the attention of a batch as well
bool razor_device_batch_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// rows of all heads at once, to where a cache has them
ggml_tensor * razor_device_build_store(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k, ggml_tensor * v, ggml_tensor * rows);

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

ggml_tensor * razor_device_build_fold(ggml_context * ctx, const razor_fold & fold);

// which token of a batch sees which cell, inputs of the graph as in ggml-razor.h
struct razor_batch {
    ggml_tensor * since[2] = { nullptr, nullptr }; // of the retrieval heads, of the local heads
    ggml_tensor * bias     = nullptr;
    ggml_tensor * tiles    = nullptr;
};

// attention of one token; of attn, scale and, of its groups, heads, mask and head_rows are set
//   q [d_k, n_head, n_tokens]
//   k [d_k, rows]
//   v [d_v, rows]
// returns [d_v*n_head, n_tokens]
ggml_tensor * razor_device_build_attn(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream);

// of a batch, with batch in place of masks
ggml_tensor * razor_device_build_attn_batch(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream, const razor_batch & batch);
