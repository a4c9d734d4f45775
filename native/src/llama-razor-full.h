#pragma once

// upstream's full KV cache with the attention of cpu/llama-razor-attn.h, for layers whose cache is in host memory
//
// all operations on the cache are upstream's, only the attention is replaced: upstream's rounds differently for each batch size,
// and is slower in deep caches

#include "llama-kv-cache.h"
#include "cpu/llama-razor-attn.h"

struct llm_graph_context;

class llama_kv_cache_full : public llama_kv_cache {
public:
    llama_kv_cache_full(
            const llama_model & model,
         const llama_cparams  & cparams,
                    ggml_type   type_k,
                    ggml_type   type_v,
            razor_attn_kernel   kernel);

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    bool has_layer(int32_t il) const { return map_layer_ids.count(il) > 0; }

    // a row has the K or V of all KV heads for one token: [n_embd, n_cells, n_stream]
    ggml_tensor * get_k_rows(int32_t il) const { return layers[map_layer_ids.at(il)].k; }
    ggml_tensor * get_v_rows(int32_t il) const { return layers[map_layer_ids.at(il)].v; }

    // return the rows of the positions [p0, p1) of a sequence; empty if the cache lacks any of them
    std::vector<int32_t> find_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    const razor_attn_kernel kernel;
};

class llama_kv_cache_full_context : public llama_kv_cache_context {
public:
    llama_kv_cache_full_context(llama_kv_cache_full * kv) : llama_kv_cache_context(kv), kernel(kv->kernel) {}

    llama_kv_cache_full_context(llama_kv_cache_full * kv, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) :
        llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kernel(kv->kernel) {}

    const razor_attn_kernel kernel;
};

// return nullptr if the context should use upstream's attention
llama_memory_i * llama_razor_create_full(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// replaces llm_graph_context::build_attn_mha(), return nullptr if the layer should use it
//   q [n_embd_head_k, n_head,    n_tokens]
//   k [n_embd_head_k, n_head_kv, n_kv]
//   v [n_embd_head_v, n_head_kv, n_kv]
ggml_tensor * llama_razor_full_attn(
        const llm_graph_context & g,
        const llama_kv_cache_context * mctx,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_b,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
              float   kq_scale);
