#pragma once

// adds the operations of ggml-razor.h to a graph
//
// they may only be added for layers on a device that supports them, which the CPU does not

#include "cpu/llama-razor-attn-op.h"
#include "ggml-razor.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdint>

// values of GGML_RAZOR_DEVICE_ENV, which is read when a context is created:
//   "on", ""  use all operations of ggml-razor.h that a device supports
//   "ampere"  the same, without the instructions of later GPUs
//   "token"   use upstream's attention for batches
//   "off"     use upstream's operations
enum razor_device_choice {
    RAZOR_DEVICE_OFF,
    RAZOR_DEVICE_TOKEN,
    RAZOR_DEVICE_ON,
};

// throws std::runtime_error if GGML_RAZOR_DEVICE_ENV has another value
razor_device_choice razor_device_choose();

// return true if the device supports storing, folding and the attention of one token
bool razor_device_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// return true if the device supports the attention of a batch
bool razor_device_batch_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// store the rows of all heads in the cache
ggml_tensor * razor_device_build_store(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k, ggml_tensor * v, ggml_tensor * rows);

// operands of a fold: the tensors of a layer, and inputs of the graph as in ggml-razor.h
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
    int64_t first_row; // first row of the local heads
};

// fold rows of the local heads into their compensation tokens
ggml_tensor * razor_device_build_fold(ggml_context * ctx, const razor_fold & fold);

// inputs of the graph which say which cells each token of a batch sees, as in ggml-razor.h
struct razor_batch {
    ggml_tensor * since[2] = { nullptr, nullptr }; // retrieval heads, local heads
    ggml_tensor * bias     = nullptr;
    ggml_tensor * tiles    = nullptr;
};

// attention of one token
// attn has scale set, and heads, mask and head_rows of its groups
//   q [d_k, n_head, n_tokens]
//   k [d_k, rows]
//   v [d_v, rows]
// returns [d_v*n_head, n_tokens]
ggml_tensor * razor_device_build_attn(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream);

// attention of a batch: the same, but batch replaces the masks
ggml_tensor * razor_device_build_attn_batch(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream, const razor_batch & batch);
