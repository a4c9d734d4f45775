#pragma once

// Operations of local and retrieval heads on devices: what libllama and a backend must agree on.
//
// They are GGML_OP_CUSTOM with one of these structs in op_params, behind ggml's own parameters. A backend that knows an
// operation says so by ggml_backend_dev_supports_op().
//
// Storing the rows of all heads:
//   src[0] k_cur F32 [d, n_head_kv*n_tokens], contiguous, as the next
//   src[1] v_cur
//   src[2] k     [d, rows, n_stream], written to, as the next
//   src[3] v
//   src[4] rows  I64 [n_head_kv*n_tokens] where each goes
//   dst          nothing
//
// Folding rows of local heads into their compensation tokens:
//   src[0] k     as above, as the next
//   src[1] v
//   src[2] k_sum F32 [d*n_local, slots], sums of what was folded before, as the next
//   src[3] v_sum
//   src[4] I32 [n_fold, ...] the rows in the cells of a head
//   src[5] I32 [1] slot that is read, src[6] I64 [1] slot that is written to
//   src[7] I64 [n] rows that get the mean
//   src[8] F32 [1] 1/number of folded rows
//   dst    nothing
//
// Attention of one token. There are two groups of KV heads with cells of their own (llama-kv-cache-razor.h):
//   src[0] q     F32 [d, n_head, 1]
//   src[1] k     [d, rows, n_stream]
//   src[2] v     [d, rows, n_stream]
//   src[3] mask  F16 [n_kv, 1] of the retrieval heads, as the next without ALiBi
//   src[4] mask  F16 [n_kv, 1] of the local heads
//   dst          F32 [d*n_head, 1], in the model's order of heads
//
// Attention of a batch, in which a token sees what the one before it sees and more: a cell is told by the first that sees it
//   src[0] q     F32 [d, n_head, n_tokens], nb[0] == 4
//   src[1] k     as for one token, as the next
//   src[2] v
//   src[3] since I32 [n_kv] of the retrieval heads: the first token that sees the cell, 0: all do, GGML_RAZOR_NEVER: none
//   src[4] since I32 [n_kv] of the local heads
//   src[5] bias  F32 [n_kv] of the local heads, added to the scaled scores: a compensation token's logarithm, 0 elsewhere
//   src[6] tiles I32 [2, n] smallest and largest `since` of each GGML_RAZOR_TILE cells of the retrieval heads, then of the
//                local heads. Cells beyond n_kv are seen by none, and a tile with a bias has GGML_RAZOR_NEVER as its largest:
//                a token sees all of a tile whose largest it reaches, without a look at its cells
//   dst          F32 [d*n_head, n_tokens], in the model's order of heads
// Arrays of a group that has no heads in a layer are not read.

#include "ggml.h"

#include <stdint.h>
#include <string.h>

#define GGML_RAZOR_ATTN_MAGIC  0x525a4154u
#define GGML_RAZOR_STORE_MAGIC 0x525a5354u
#define GGML_RAZOR_BATCH_MAGIC 0x525a4241u // with ggml_razor_attn_params
#define GGML_RAZOR_FOLD_MAGIC  0x525a464fu

#define GGML_RAZOR_DEVICE_ENV "RAZOR_LOCAL_DEVICE_ATTENTION"

#define GGML_RAZOR_ATTN_MAX_KV 64 // heads
#define GGML_RAZOR_OFFSET      24 // behind ggml_custom_op_params
#define GGML_RAZOR_TILE        128 // cells that a batch looks at together
#define GGML_RAZOR_NEVER       INT32_MAX

struct ggml_razor_store_params {
    uint32_t magic;
};

struct ggml_razor_attn_params {
    uint32_t magic;
    float    scale;
    int32_t  n_ctx;     // rows of a retrieval head
    int32_t  cells;     // rows of a local head
    uint64_t retrieval; // a bit for each KV head
    int32_t  n_head_kv;
    int32_t  stream;
};

struct ggml_razor_fold_params {
    uint32_t magic;
    int32_t  n_local;
    int32_t  cells; // rows of a local head
    int64_t  first; // row of the first of them
};

static_assert(GGML_RAZOR_OFFSET + sizeof(ggml_razor_attn_params) <= GGML_MAX_OP_PARAMS, "does not fit");

template<typename T>
inline void ggml_razor_set_params(ggml_tensor * t, const T & params) {
    memcpy((char *) t->op_params + GGML_RAZOR_OFFSET, &params, sizeof(params));
}

// false: another operation
template<typename T>
inline bool ggml_razor_get_params(const ggml_tensor * t, uint32_t magic, T & params) {
    uint32_t found;
    memcpy(&found,  (const char *) t->op_params + GGML_RAZOR_OFFSET, sizeof(found)); // the first of each
    memcpy(&params, (const char *) t->op_params + GGML_RAZOR_OFFSET, sizeof(params));

    return t->op == GGML_OP_CUSTOM && found == magic;
}
