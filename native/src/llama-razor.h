#pragma once

// RazorAttention for llama.cpp: the C API that libllama exports in addition to upstream's llama.h.
//
// Paper: "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", arXiv 2407.15891
//
// Terms
//   retrieval head      a KV head that keeps every token of the context
//   local head          a KV head that keeps the sink tokens, a window of recent tokens and one compensation token
//   compensation token  k and v are the means of the dropped keys and values, log(number of dropped tokens) is added to its logit
//   fold                move the oldest tokens of the window into the compensation token
//   rewind log          what folds drop, kept outside the cache so that llama_memory_seq_rm can go back to any position
//
// The plan of a context depends only on n_ctx (the context size per sequence) and llama_razor_params:
//   L     = window > 0 ? window : max(window_min, window_divisor > 0 ? n_ctx/window_divisor : 0)
//   B     = the largest power of two <= max(L/4, 1), clamped to [64, 512]                 (fold block)
//   C     = compensation ? 4 : 0                                                            (compensation cells)
//   cells = (sink_tokens + C + L + B + LLAMA_RAZOR_SLACK) rounded up to a multiple of 256   (cells of a local head)
//   local heads with cells >= n_ctx would save nothing and are treated as retrieval heads
//   if no local heads are left, the context uses upstream's full cache
//   In a local head, a token at position p attends to the sinks, to the compensation token and to the positions [F(p), p],
//   where F(p) = max(sink_tokens, B*floor(p/B) - L) is the fold frontier.
//
// If the local heads have scopes, each has a window of its own, and all windows share one block:
//   local heads with scope >= n_ctx are treated as retrieval heads
//   B = the block for the mean scope (rounded down) of the other local heads
//   L = scope rounded up to a multiple of B
//   while there are more than LLAMA_RAZOR_MAX_WINDOWS different L, one L is replaced by the next larger one: the L for which this adds
//   the fewest tokens over all heads, and the smallest of several such L
// cells and F(p) follow from L and B as above.
//
// Size in bytes of the cache of a layer with r retrieval and l local KV heads of size d_k (K) and d_v (V):
//   K     r*n_ctx * row_size(type_k, d_k) + (sum of the cells of the local heads) * row_size(type_k_local, d_k)
//   V     r*n_ctx * row_size(type_v, d_v) + (sum of the cells of the local heads) * row_size(type_v_local, d_v)
//   sums  l > 0 && compensation ? 3*l*(d_k + d_v)*4 : 0                                     (F32 accumulators)

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_RAZOR_API_VERSION 10
#define LLAMA_RAZOR_MAX_WINDOWS 4  // maximum number of different windows
#define LLAMA_RAZOR_SLACK       64 // tokens that can always be rolled back, even across a fold (at most one block)
#define LLAMA_RAZOR_REWIND_OFF  0  // no rewind log
#define LLAMA_RAZOR_REWIND_RAM  1  // in memory
#define LLAMA_RAZOR_REWIND_FILE 2  // in a file that is deleted when it is opened

// if set to anything but "" or "0", razor metadata and overrides are ignored and upstream's cache is used
#define LLAMA_RAZOR_DISABLE_ENV "RAZOR_LOCAL_DISABLE"

struct llama_razor_params {
    uint32_t size;            // sizeof(struct llama_razor_params)
    uint32_t enabled;         // 0: use upstream's cache whatever the model's metadata says, the other members are ignored
    uint32_t sink_tokens;     // N0, 0..4096
    uint32_t window;          // L of all local heads in tokens, 0: use their scopes, or window_min and window_divisor
    uint32_t window_min;      // S0, 1..2^30
    uint32_t window_divisor;  // C of the paper, 0: only window_min counts
    uint32_t compensation;    // 0/1
    uint32_t n_retrieval;     // length of retrieval and scope, 0: use those of the model's metadata
    const uint8_t * retrieval; // 0/1 per KV head, layer-major
    uint32_t own_attention;   // 1: use razor's attention with upstream's full cache, for layers in host memory
    const uint32_t * scope;   // 0..2^30 tokens per KV head of the mask, 0 exactly for retrieval heads; NULL: one window for all local heads
    int32_t  type_k_local;    // enum ggml_type of the rows of local heads, -1: type_k of the context
    int32_t  type_v_local;    // enum ggml_type of the rows of local heads, -1: type_v of the context
    uint32_t rewind;          // LLAMA_RAZOR_REWIND_*
    uint64_t rewind_limit;    // bytes of the rewind log, 0: unlimited. When it is reached, the oldest part is dropped
    const char * rewind_folder; // of the file
};

// statistics of a context
struct llama_razor_stats {
    uint32_t size;            // sizeof(struct llama_razor_stats), set by the caller
    uint32_t active;          // 0: upstream's cache is used; only n_ctx, n_layer, n_stream, own_attention and kv_bytes, _sliding and
                              // _recurrent are set
    uint32_t n_ctx;           // per sequence
    uint32_t n_layer;         // layers of the mask
    uint32_t n_stream;
    uint32_t sink_tokens;
    uint32_t window;          // the largest L
    uint32_t block;           // B
    uint32_t cells;           // per local head with this window
    uint32_t compensation;
    int32_t  type_k;          // enum ggml_type
    int32_t  type_v;
    int32_t  type_k_local;    // of local heads
    int32_t  type_v_local;
    uint64_t kv_bytes;        // total size of the buffers of the cache, as allocated by the backends
    uint64_t kv_bytes_retrieval; // size of the tensors of the retrieval heads
    uint64_t kv_bytes_local;  // size of the tensors of the local heads, including the accumulators
    uint64_t kv_bytes_sliding;   // buffers of the layers with a sliding window, part of kv_bytes
    uint64_t kv_bytes_recurrent; // buffers of recurrent states, part of kv_bytes
    uint32_t n_buffers;       // see llama_razor_get_buffer
    uint32_t own_attention;   // 1: layers in host memory use razor's attention; also set if razor is not active
    uint32_t n_windows;       // number of different windows
    uint32_t windows[LLAMA_RAZOR_MAX_WINDOWS]; // L of each group of local heads, largest first
    uint32_t device_attention; // 1: all layers on devices use razor's operations for the attention of one token
    uint32_t rewind;          // LLAMA_RAZOR_REWIND_*
    uint64_t rewind_limit;    // bytes
    uint64_t rewind_bytes;    // size of the rewind log of all sequences, in memory or in its file; not part of kv_bytes
    char     rewind_failure[64]; // why the rewind log has ended, "" if it has not
    uint32_t full_prefill;    // see llama_razor_set_full_prefill()
    float    prefill_done;    // progress of the batch that is being read with full attention, 0..1; otherwise 0
    uint64_t prefill_count;   // number of batches that were read with full attention
    uint64_t prefill_bytes;   // size of the largest temporary buffers of such a batch; not part of kv_bytes
};

struct llama_razor_layer_stats {
    uint32_t size;
    uint32_t n_head_kv;
    uint32_t n_retrieval;     // KV heads
    uint32_t n_local;
    uint64_t bytes_k;         // tensor size, retrieval + local
    uint64_t bytes_v;
    uint64_t bytes_sums;
};

struct llama_razor_seq_stats {
    uint32_t size;
    uint32_t n_tokens;        // tokens in the cache
    uint32_t frontier;        // F of the smallest window: positions [sink_tokens, frontier) are folded
    uint32_t n_folded;        // N_d = frontier - sink_tokens
    uint32_t n_rollback;      // llama_memory_seq_rm can remove at least this many tokens from the end, with the rewind log
    uint32_t reserved;
};

struct llama_razor_buffer_stats {
    uint32_t size;
    uint32_t reserved;
    uint64_t bytes;
    char     name[64];        // buffer type, for example "CPU" or "CUDA0"
};

// memory of one buffer type used by a context and its model, in bytes
// if the model was opened with no_alloc: memory that they would use
struct llama_razor_memory {
    uint32_t size;
    uint32_t is_host;         // 1: host memory, 0: device memory
    uint64_t weights;         // with mmap, the part of the file that is mapped
    uint64_t cache;           // KV cache, or the recurrent state of models that have one
    uint64_t compute;
    char     name[64];        // buffer type, for example "CPU" or "CUDA0"
    char     device[64];      // its device, "" if it has none (the CPU)
};

// return the library's LLAMA_RAZOR_API_VERSION
LLAMA_API uint32_t llama_razor_api_version(void);

// return "<llama-cpp-python version> <sdist sha256> <build options>", from which the library was built
LLAMA_API const char * llama_razor_build_info(void);

// set the parameters of the contexts that this thread creates from now on, overriding the model's metadata
// NULL: use the metadata again
// the struct and the mask are copied
// if the mask does not fit the model, creating the context fails (see llama_razor_last_error)
// return false and set llama_razor_last_error() if the struct has the wrong size or a value is out of range
LLAMA_API bool llama_razor_set_override(const struct llama_razor_params * params);

// return why razor refused this thread's last razor call, model load, context creation, decode or state load, or ""
// a load that fails before razor sees the file does not change it: call llama_razor_set_override() first to reset it
LLAMA_API const char * llama_razor_last_error(void);

// return the number of layers that the mask covers and store the number of KV heads of each (n_head_kv may be NULL)
// layers that are recurrent, have a sliding window or read the cache of an earlier layer have no heads in the mask
LLAMA_API uint32_t llama_razor_model_layers(const struct llama_model * model, uint32_t * n_head_kv, uint32_t n_max);

// return false if the size member does not match the library's, or if the index is out of range
LLAMA_API bool llama_razor_get_stats (const struct llama_context * ctx, struct llama_razor_stats * stats);
LLAMA_API bool llama_razor_get_layer (const struct llama_context * ctx, uint32_t il, struct llama_razor_layer_stats * stats);
LLAMA_API bool llama_razor_get_seq   (const struct llama_context * ctx, llama_seq_id seq_id, struct llama_razor_seq_stats * stats);
LLAMA_API bool llama_razor_get_buffer(const struct llama_context * ctx, uint32_t i, struct llama_razor_buffer_stats * stats);

// i is less than the number of buffer types that the context uses; razor need not be active
LLAMA_API bool llama_razor_get_memory(const struct llama_context * ctx, uint32_t i, struct llama_razor_memory * memory);

// read prompts with full attention: from now on, all heads attend to all tokens of a decoded batch, and the cache is compressed layer by
// layer. This needs temporary buffers for one layer. The batch can have more than n_batch tokens
// local heads see earlier batches only in compressed form, as usual, so the results depend on how tokens are split into batches
// a batch that ends before the next fold, or has several sequences, is decoded as usual
// return false and set llama_razor_last_error() if the context does not support this
LLAMA_API bool llama_razor_set_full_prefill(struct llama_context * ctx, bool full);

// from now on, take K and V of decoded tokens from the full cache of another context of the model instead of computing them
// each token is taken from the same sequence and position. The tokens have no outputs, and a batch can have more than n_batch of them
// the result is the same cache as if the prompt was read with full attention
// both caches must be in main memory, use flash attention and have the same KV types
// NULL: compute K and V again. Until then the source must exist and keep these tokens
// return false and set llama_razor_last_error() if the contexts do not support this
LLAMA_API bool llama_razor_set_source(struct llama_context * ctx, struct llama_context * source);

// receive the log of llama.cpp and ggml from now on: keep its last error lines, print all of it to stderr if print is set
LLAMA_API void llama_razor_log_keep(bool print);
LLAMA_API void llama_razor_log_clear(void);
// store up to 8 of the latest error lines, oldest first and separated by newlines, truncated to size - 1 bytes and a zero
// return their length before truncation
LLAMA_API int32_t llama_razor_log_get(char * lines, int32_t size);

// upstream ends the process if an assertion fails or an exception is not caught
// from now on, callback is called before that with a one-sentence reason, in the failing thread, and no backtrace is printed
LLAMA_API void llama_razor_set_end_callback(void (*callback)(const char * sentence));

// upstream's functions of the same names without razor_try_, but exceptions and failed assertions are caught and the process
// continues; assertions only after llama_razor_set_end_callback(), and not on Windows. Memory allocated until then may leak
// on failure: return NULL, the reason is in the log
LLAMA_API struct llama_model   * llama_razor_try_model_load_from_file(const char * path, struct llama_model_params params);
LLAMA_API struct llama_context * llama_razor_try_init_from_model(struct llama_model * model, struct llama_context_params params);
// on failure: return INT32_MIN or LLAMA_TOKEN_NULL and set llama_razor_last_error()
LLAMA_API int32_t     llama_razor_try_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len,
                          llama_token * tokens, int32_t n_tokens_max, bool add_special, bool parse_special);
LLAMA_API llama_token llama_razor_try_sampler_sample(struct llama_sampler * smpl, struct llama_context * ctx, int32_t idx);

// connect to an RPC server, "host:port", and return its devices, for llama_model_params.devices
// the connection lasts until ggml_backend_free(*connection), and until the models on these devices are freed
// afterwards, a lost connection does not end the process: results from that server are zeros, see llama_razor_lost_server()
// on failure: return NULL and set llama_razor_last_error()
LLAMA_API struct ggml_backend_reg * llama_razor_try_rpc_connect(const char * endpoint, struct ggml_backend ** connection);

// wait for the computation, and return the RPC server of the context's model to which the connection was lost, NULL if there is none
// the results of the context are not valid then, and its model has to be loaded again
LLAMA_API const char * llama_razor_lost_server(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
