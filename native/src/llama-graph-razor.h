#pragma once

// the graph of an ubatch with RazorAttention: folding, storing and the attention of all heads
//
// the sequences of an ubatch have an attention each, all other operations of the graph are common to them
//
// the topology depends only on the plan, the sequences, and the number of tokens, cells and folded positions. Everything else, such as where rows
// are stored and which cells a token sees, is data of the inputs: a graph can be reused as long as these numbers do not change. Upstream does
// not reuse the graph of other sequences

#include "llama-graph.h"
#include "llama-memory-razor.h"
#include "llama-razor-device.h"

#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

// inputs of a sequence that all layers share
class llm_graph_razor_seq {
public:
    llm_graph_razor_seq(
            ggml_context * ctx,
            uint32_t i_seq,
            uint32_t n_tokens,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_razor_context * mctx);

    void set_input();

    bool can_reuse(const llama_kv_cache_razor_context * mctx_new);

    // see llm_graph_input_razor::build_attn(), for the tokens of the sequence
    ggml_tensor * build_attn(
            const llm_graph_context & g,
            ggml_tensor * kq_mask,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il) const;

private:
    using razor_layer = llama_kv_cache_razor::razor_layer;

    // order of the heads in the graph: one group after the other
    // shared by all layers that have the same groups
    struct head_order {
        uint32_t n_head;
        uint32_t n_head_kv;

        // KV heads of the retrieval group, then of the local groups
        std::vector<std::vector<uint32_t>> groups;

        std::vector<size_t> sequence; // the groups that have heads, in the order of the graph
        std::vector<size_t> first;    // for each group: position of its first KV head in the graph

        bool identity = true; // the heads of the model are in this order

        bool split = false; // the local heads have separate tensors, so the rows of each group are stored separately

        // offsets in the inputs, in heads
        size_t offs_rows = 0;
        size_t offs_q    = 0; // only if not identity, like the next two
        size_t offs_out  = 0;
        size_t offs_kv   = 0; // only for a transposed V cache or if split

        size_t offs_slopes = 0; // only with ALiBi
    };

    // inputs of a group of local heads
    struct group_input {
        ggml_tensor * mask = nullptr; // F32/F16 [n_kv, n_tokens]

        razor_batch batch; // replaces the mask in layers with device_batch

        // only if n_fold > 0
        ggml_tensor * fold_rows = nullptr; // I32 [n_fold, max n_local]
        ggml_tensor * fold_src  = nullptr; // I32 [1] row of the accumulators
        ggml_tensor * fold_dst  = nullptr; // I64 [1]
        ggml_tensor * fold_cell = nullptr; // I64 [N_COMP_CELLS]
        ggml_tensor * fold_inv  = nullptr; // F32 [1] 1/N_d

        // only for a transposed V cache, the key is the number of heads
        std::map<uint32_t, ggml_tensor *> v_rows; // I64 [n_local*n_tokens] rows in the view of the group's heads

        // replaces the mask while one layer reads a prompt, otherwise nullptr
        ggml_tensor * prefill_mask = nullptr; // F32/F16 [cells, n_tokens]

        uint32_t n_kv;
        uint32_t n_fold;
    };

    void init_orders();

    const llama_kv_cache_razor::step_info & get_step() const { return mctx->get_step(i_seq); }

    void set_input_batch(size_t i_group) const;
    template<typename T>
    void set_input_rows_as(T * rows_data) const;

    void set_input_rows() const;
    void set_input_prefill() const;
    void set_input_heads() const;
    void set_input_slopes() const;
    void set_input_fold(size_t i_group) const;

    // return the indices at which the rows of n heads are stored: all heads of the layer, or those of a group if split
    ggml_tensor * view_rows(const llm_graph_context & g, const razor_layer & layer, const head_order & order, size_t first, size_t n) const;

    // return the rows of the local heads of a group [n_embd_head, cells, n_local]
    ggml_tensor * view_local(ggml_context * ctx0, const razor_layer & layer, ggml_tensor * src, size_t i_group) const;

    // return the input, or a copy of it on the device of the layer's cache
    ggml_tensor * get_on_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * input) const;

    // fold K and V of the group's heads
    void build_folds(const llm_graph_context & g, const razor_layer & layer, size_t i_group) const;

    void build_fold(const llm_graph_context & g, const razor_layer & layer, const group_input & group, ggml_tensor * store, ggml_tensor * sums) const;

    void build_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * dst, ggml_tensor * dst_local, ggml_tensor * cur, const head_order & order) const;

    // store both K and V, if layer.device
    void build_store_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const;

    void build_store_v_trans(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * v_cur, const head_order & order) const;

    // while one layer reads a prompt: copy the cells that local heads had before the batch to temporary rows, and store K and V there
    void build_prefill_past(const llm_graph_context & g, const razor_layer & layer, const head_order & order) const;
    void build_prefill_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const;

    // return the rows of each token in another order, which starts at offs in heads
    ggml_tensor * build_gather(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * cur, size_t offs) const;

    // attention of a group with upstream's operations, for ALiBi models
    // ggml derives the slope from the position of a head in the operation, but a head has another position in its group than in the
    // model. So each head has its own mask. Flash attention is not used: on most backends it takes one mask for all heads
    //   q    [n_embd_head_k, n_head, n_tokens]
    //   k    [n_embd_head_k, n_kv, n_head_kv]
    //   v    [n_kv, n_embd_head_v, n_head_kv]
    //   mask [n_kv, n_tokens]
    // first is the first query head in the order of the graph
    ggml_tensor * build_attn_alibi(
            const llm_graph_context & g,
            const razor_layer & layer,
            const head_order & order,
            ggml_tensor * q,
            ggml_tensor * k,
            ggml_tensor * v,
            ggml_tensor * mask,
                int64_t   first,
                  float   kq_scale,
                    int   il) const;

    // attention with razor_attn: on CPUs, or on devices for one token or if layer.device_batch
    ggml_tensor * build_attn_own(
            const llm_graph_context & g,
            ggml_tensor * kq_mask,
            const razor_layer & layer,
            const head_order & order,
            ggml_tensor * q_cur,
            ggml_tensor * sinks,
                  float   kq_scale) const;

    std::vector<group_input> groups; // one per group of the plan

    // while one layer reads a prompt: like rows, but indices of the temporary rows of K and V, and in one part even if the order is split
    ggml_tensor * prefill_rows = nullptr; // I32 [n]

    // for each order and token: the rows of the KV heads, in the order of the model
    // if the order is split: for each group and token
    ggml_tensor * rows      = nullptr; // I32 [n] rows of the layer's K and V, I64 for the operations of ggml-razor.h

    // the rows of the tokens in the source, if K and V come from another cache
    ggml_tensor * source_rows = nullptr; // I32 [n_tokens]

    // for each order and token: the heads in the order of the graph
    ggml_tensor * heads     = nullptr; // I32 [n]

    // for each order: the ALiBi slopes of the query heads, in the order of the graph
    ggml_tensor * slopes    = nullptr; // F32 [n]

    // only for a transposed V cache, the key is the number of elements of a token
    std::map<uint32_t, ggml_tensor *> v_elems; // I64 [n_retrieval*n_embd_head_v*n_tokens] elements of the retrieval heads

    mutable std::map<std::pair<ggml_backend_buffer_type_t, ggml_tensor *>, ggml_tensor *> copies; // of inputs

    std::vector<head_order> orders;
    std::vector<uint32_t>   map_order; // layer -> order

    mutable std::deque<razor_attn> attns; // one per layer with build_attn_own()

    // a copy: a reused graph outlives the parameters with which it was built
    const llama_hparams hparams;

    const llama_kv_cache_razor_context * mctx;

    llama_razor_prefill      * const prefill; // nullptr if all layers read the ubatch
    const llama_razor_source * const source;  // nullptr if the model computes K and V

    const uint32_t i_seq; // in the ubatch

    // the graph can be reused as long as these numbers and the n_kv and n_fold of all groups are the same
    const uint32_t n_tokens;
    const uint32_t n_kv_full; // cells of the retrieval heads
};

// inputs of an ubatch
class llm_graph_input_razor : public llm_graph_input_i {
public:
    llm_graph_input_razor(
            ggml_context * ctx,
            const llama_ubatch  & ubatch,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_razor_context * mctx);

    // create the inputs and add them to the graph, return nullptr if the memory has no local heads
    static llm_graph_input_razor * create(
            llm_graph_result * res,
            ggml_context * ctx,
            const llama_ubatch  & ubatch,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_memory_context_i * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // replaces llm_graph_context::build_attn_mha() and the stores before it
    //   q_cur [n_embd_head_k, n_head,    n_tokens]
    //   k_cur [n_embd_head_k, n_head_kv, n_tokens]
    //   v_cur [n_embd_head_v, n_head_kv, n_tokens]
    //   sinks [n_head]
    // kq_mask is that of the retrieval heads; k_cur and v_cur are nullptr if the layer reads the cache of an earlier one
    // returns [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & g,
            ggml_tensor * kq_mask,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il) const;

private:
    std::vector<std::unique_ptr<llm_graph_razor_seq>> seqs;

    const uint32_t n_tokens; // of each sequence
};

// return an upper bound for the number of nodes that razor adds to a graph
uint32_t llama_razor_n_nodes(const llama_memory_i * memory);
