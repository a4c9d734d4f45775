#pragma once

// operations for retrieval and local heads on devices: the interface between libllama and a backend
//
// they are GGML_OP_CUSTOM with one of the structs below in op_params, after ggml's own parameters
// a backend supports an operation if ggml_backend_dev_supports_op() returns true
//
// store the rows of all heads:
//   src[0] k_cur F32 [d, n_head_kv*n_tokens], contiguous
//   src[1] v_cur same as k_cur
//   src[2] k     [d, rows, n_stream], modified
//   src[3] v     same as k
//   src[4] rows  I64 [n_head_kv*n_tokens], index of the row of each
//   dst          unused
//
// fold rows of local heads into their compensation tokens:
//   src[0] k       [d, rows, n_stream], modified
//   src[1] v       same as k
//   src[2] k_sum   F32 [d*n_local, slots], sums of the rows that were folded before, modified
//   src[3] v_sum   same as k_sum
//   src[4] rows    I32 [n_fold, ...], cells to fold
//   src[5] src     I32 [1], slot to read
//   src[6] dst     I64 [1], slot to write
//   src[7] cells   I64 [n], cells that get the mean
//   src[8] inverse F32 [1], 1/number of folded rows
//   dst            unused
//
// attention of one token, for two groups of KV heads with different numbers of cells (see llama-kv-cache-razor.h):
//   src[0] q     F32 [d, n_head, 1]
//   src[1] k     [d, rows, n_stream]
//   src[2] v     [d, rows, n_stream]
//   src[3] mask  F16 [n_kv, 1], retrieval heads, without ALiBi
//   src[4] mask  F16 [n_kv, 1], local heads
//   dst          F32 [d*n_head, 1], heads in the model's order
//
// attention of a batch: each token sees all cells that the previous token sees, so a cell only needs the first token that sees it
//   src[0] q     F32 [d, n_head, n_tokens], nb[0] == 4
//   src[1] k     [d, rows, n_stream]
//   src[2] v     [d, rows, n_stream]
//   src[3] since I32 [n_kv], retrieval heads: the first token that sees the cell, GGML_RAZOR_NEVER if there is none
//   src[4] since I32 [n_kv], local heads
//   src[5] bias  F32 [n_kv], local heads: added to the scaled scores, 0 except for the compensation token
//   src[6] tiles I32 [2, n], smallest and largest `since` of each tile of GGML_RAZOR_TILE cells, first those of the retrieval heads,
//                then those of the local heads
//                no token sees cells after n_kv, and the largest `since` of a tile with a bias is GGML_RAZOR_NEVER: a token for which
//                the largest one is not greater sees the whole tile without a mask
//   dst          F32 [d*n_head, n_tokens], heads in the model's order
//
// the inputs of a group are not read if the layer has no heads in it

#include "ggml.h"

#include <stdint.h>
#include <string.h>

#define GGML_RAZOR_ATTN_MAGIC  0x525a4154u
#define GGML_RAZOR_STORE_MAGIC 0x525a5354u
#define GGML_RAZOR_BATCH_MAGIC 0x525a4241u // with ggml_razor_attn_params
#define GGML_RAZOR_FOLD_MAGIC  0x525a464fu

#define GGML_RAZOR_DEVICE_ENV "RAZOR_LOCAL_DEVICE_ATTENTION"

#define GGML_RAZOR_ATTN_MAX_KV 64 // heads
#define GGML_RAZOR_OFFSET      24 // in op_params, after ggml_custom_op_params
#define GGML_RAZOR_TILE        128 // cells of a tile, for batches
#define GGML_RAZOR_NEVER       INT32_MAX

struct ggml_razor_store_params {
    uint32_t magic;
};

struct ggml_razor_attn_params {
    uint32_t magic;
    float    scale;
    int32_t  n_ctx;     // rows of a retrieval head
    int32_t  cells;     // rows of a local head
    uint64_t retrieval; // one bit for each KV head
    int32_t  n_head_kv;
    int32_t  stream;
};

struct ggml_razor_fold_params {
    uint32_t magic;
    int32_t  n_local;
    int32_t  cells; // rows of a local head
    int64_t  first; // first row of the local heads
};

static_assert(GGML_RAZOR_OFFSET + sizeof(ggml_razor_attn_params) <= GGML_MAX_OP_PARAMS, "does not fit");

template<typename T>
inline void ggml_razor_set_params(ggml_tensor * t, const T & params) {
    memcpy((char *) t->op_params + GGML_RAZOR_OFFSET, &params, sizeof(params));
}

// return false if it is another operation
template<typename T>
inline bool ggml_razor_get_params(const ggml_tensor * t, uint32_t magic, T & params) {
    uint32_t found;
    memcpy(&found,  (const char *) t->op_params + GGML_RAZOR_OFFSET, sizeof(found)); // the first member of each struct
    memcpy(&params, (const char *) t->op_params + GGML_RAZOR_OFFSET, sizeof(params));

    return t->op == GGML_OP_CUSTOM && found == magic;
}
