#pragma once

// RazorAttention for llama.cpp: the C API that libllama exports beside upstream's llama.h.
//
// Paper: "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", arXiv 2407.15891.
//
// Terms
//   retrieval head      a KV head that keeps every token of the context
//   local head          a KV head that keeps the sink tokens, a window of recent tokens and one compensation token
//   compensation token  (k, v) = mean of the dropped keys and values, its logit gets + log(number of dropped tokens)
//   fold                move the oldest tokens of the window into the compensation token
//
// The plan of a context, a function of n_ctx (the context size per sequence) and of llama_razor_params alone:
//   L     = window > 0 ? window : max(window_min, window_divisor > 0 ? n_ctx/window_divisor : 0)
//   B     = the largest power of two <= max(L/4, 1), clamped to [64, 512]                 (fold block)
//   C     = compensation ? 4 : 0                                                            (compensation cells)
//   cells = (sink_tokens + C + L + B + LLAMA_RAZOR_SLACK) rounded up to a multiple of 256   (cells of a local head)
//   no local head at all, or cells >= n_ctx: nothing would be saved, the context runs upstream's own full cache
//   A token at position p attends, in a local head, to the sinks, to the compensation token and to the
//   positions [F(p), p] where F(p) = max(sink_tokens, B*floor(p/B) - L) is the fold frontier.
//
// Bytes of the cache of layer il, with r retrieval and l local KV heads of size d_k (K) and d_v (V):
//   K     (r*n_ctx + l*cells) * row_size(type_k, d_k)
//   V     (r*n_ctx + l*cells) * row_size(type_v, d_v)
//   sums  l > 0 && compensation ? 3*l*(d_k + d_v)*4 : 0                                     (F32 accumulators)

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_RAZOR_API_VERSION 3
#define LLAMA_RAZOR_SLACK       64 // tokens that can always be rolled back, over a fold too (at most one block)

// set to a value other than "" and "0": razor metadata and overrides are ignored, upstream's own cache runs
#define LLAMA_RAZOR_DISABLE_ENV "RAZOR_LOCAL_DISABLE"

struct llama_razor_params {
    uint32_t size;            // sizeof(struct llama_razor_params)
    uint32_t enabled;         // 0: upstream's own cache, whatever the model's metadata says; the rest is ignored
    uint32_t sink_tokens;     // N0, 0..4096
    uint32_t window;          // L in tokens, 0: from window_min and window_divisor
    uint32_t window_min;      // S0, 1..2^30
    uint32_t window_divisor;  // C of the paper, 0: window_min alone decides
    uint32_t compensation;    // 0/1
    uint32_t n_retrieval;     // length of retrieval; 0: the mask of the model's metadata
    const uint8_t * retrieval; // 0/1 per KV head, layer-major
    uint32_t own_attention;   // 1: run our attention on upstream's full cache, for layers in host memory
};

// of a whole context
struct llama_razor_stats {
    uint32_t size;            // sizeof(struct llama_razor_stats), set by the caller
    uint32_t active;          // 0: upstream's own cache runs; then only n_ctx, n_layer, n_stream and kv_bytes are set
    uint32_t n_ctx;           // per sequence
    uint32_t n_layer;         // layers of the mask
    uint32_t n_stream;
    uint32_t sink_tokens;
    uint32_t window;          // L
    uint32_t block;           // B
    uint32_t cells;           // per local head
    uint32_t compensation;
    int32_t  type_k;          // enum ggml_type
    int32_t  type_v;
    uint64_t kv_bytes;        // all KV buffers together, as allocated by the backends
    uint64_t kv_bytes_retrieval; // of their tensors
    uint64_t kv_bytes_local;  // likewise, accumulators included
    uint32_t n_buffers;       // see llama_razor_get_buffer
    uint32_t own_attention;   // 1: layers in host memory run our attention; also set when razor is not active
};

struct llama_razor_layer_stats {
    uint32_t size;
    uint32_t n_head_kv;
    uint32_t n_retrieval;     // KV heads
    uint32_t n_local;
    uint64_t bytes_k;         // tensor bytes, retrieval + local
    uint64_t bytes_v;
    uint64_t bytes_sums;
};

struct llama_razor_seq_stats {
    uint32_t size;
    uint32_t n_tokens;        // tokens in the cache
    uint32_t frontier;        // F: positions [sink_tokens, frontier) are folded
    uint32_t n_folded;        // N_d = frontier - sink_tokens
    uint32_t n_rollback;      // llama_memory_seq_rm can remove at least this many tokens from the end
    uint32_t reserved;
};

struct llama_razor_buffer_stats {
    uint32_t size;
    uint32_t reserved;
    uint64_t bytes;
    char     name[64];        // buffer type, for example "CPU" or "CUDA0"
};

// what a context and its model take of one buffer type, in bytes. Of a model that was opened with no_alloc: what they
// would take
struct llama_razor_memory {
    uint32_t size;
    uint32_t is_host;         // 1: in the memory of the CPU, 0: in that of the device
    uint64_t weights;         // with mmap the part of the file that is mapped
    uint64_t cache;           // KV cache, or what the model keeps instead
    uint64_t compute;
    char     name[64];        // buffer type, for example "CPU" or "CUDA0"
    char     device[64];      // its device, "" where it names none (the CPU)
};

// LLAMA_RAZOR_API_VERSION of the library
LLAMA_API uint32_t llama_razor_api_version(void);

// "<llama-cpp-python version> <sdist sha256> <build options>" of the pin that the library was built from
LLAMA_API const char * llama_razor_build_info(void);

// what contexts that this thread creates from now on do, instead of what the model's metadata says
// NULL: back to the metadata. The struct and the mask are copied.
// A mask that does not fit the model makes the creation of the context fail (see llama_razor_last_error).
// returns false, with llama_razor_last_error() set, on a struct of the wrong size or a value out of range
LLAMA_API bool llama_razor_set_override(const struct llama_razor_params * params);

// why the last razor call, model load, context creation, decode or state load of this thread was refused by razor; "" if
// it was not. A load that fails before razor sees the file leaves it alone: llama_razor_set_override() resets it
LLAMA_API const char * llama_razor_last_error(void);

// the number of layers the mask covers, and the KV heads of each (n_head_kv may be NULL)
LLAMA_API uint32_t llama_razor_model_layers(const struct llama_model * model, uint32_t * n_head_kv, uint32_t n_max);

// false: the size member is not the library's, or the index is out of range
LLAMA_API bool llama_razor_get_stats (const struct llama_context * ctx, struct llama_razor_stats * stats);
LLAMA_API bool llama_razor_get_layer (const struct llama_context * ctx, uint32_t il, struct llama_razor_layer_stats * stats);
LLAMA_API bool llama_razor_get_seq   (const struct llama_context * ctx, llama_seq_id seq_id, struct llama_razor_seq_stats * stats);
LLAMA_API bool llama_razor_get_buffer(const struct llama_context * ctx, uint32_t i, struct llama_razor_buffer_stats * stats);

// i: 0 to the number of buffer types that the context uses, razor active or not
LLAMA_API bool llama_razor_get_memory(const struct llama_context * ctx, uint32_t i, struct llama_razor_memory * memory);

// The log of llama.cpp and ggml from now on: its last error lines are kept, and all of it is printed to stderr if print
LLAMA_API void llama_razor_log_keep(bool print);
LLAMA_API void llama_razor_log_clear(void);
// The error lines since then, at most 8, the oldest first, with newlines between them, cut to size - 1 bytes and a zero.
// returns their length
LLAMA_API int32_t llama_razor_log_get(char * lines, int32_t size);

// Upstream ends the process where an assertion fails or an exception is not caught. From now on callback gets one sentence
// before that happens, in the thread where it does, and upstream's backtrace is left out.
LLAMA_API void llama_razor_set_end_callback(void (*callback)(const char * sentence));

// Upstream's functions without razor_try_: of these both are caught, and the process goes on. Assertions only after
// llama_razor_set_end_callback(), and not on Windows. What was allocated by then may be lost.
// They return NULL, with the reason in the log
LLAMA_API struct llama_model   * llama_razor_try_model_load_from_file(const char * path, struct llama_model_params params);
LLAMA_API struct llama_context * llama_razor_try_init_from_model(struct llama_model * model, struct llama_context_params params);
// They return INT32_MIN and LLAMA_TOKEN_NULL, with llama_razor_last_error() set
LLAMA_API int32_t     llama_razor_try_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len,
                          llama_token * tokens, int32_t n_tokens_max, bool add_special, bool parse_special);
LLAMA_API llama_token llama_razor_try_sampler_sample(struct llama_sampler * smpl, struct llama_context * ctx, int32_t idx);

#ifdef __cplusplus
}
#endif
