#pragma once

#include "llama-hparams.h"
#include "llama-kv-cache.h"
#include "llama-razor-attn-op.h"
#include "llama-razor-plan.h"

#include <deque>
#include <map>
#include <vector>

struct llm_graph_context;

//
// llama_kv_cache_razor
//

// a copy of the model's hparams in which each layer has one KV head, since llama_kv_cache sees each retrieval head as a layer
// a base class, so that it exists before llama_kv_cache keeps a reference to it
struct llama_razor_hparams {
    llama_razor_hparams(const llama_hparams & hparams);

    llama_hparams hparams_head;
};

// the cache of retrieval heads, which keep all n_ctx tokens, and of local heads, cells = [sinks | ring of recent tokens |
// compensation]. The rows of a head lie one after the other: attention reads them in one stream, and the new rows of all
// heads of a layer are stored at once
//
// the llama_kv_cache it derives from finds the cells of the retrieval heads, makes their mask and saves their state; its
// "layers" are views of single heads
//
// when the positions reach a new block, the part of the ring that leaves the window is folded into the compensation
// token. The fold is part of the graph of the block's first ubatch: rows of the ring -> sum -> accumulator -> mean
//
// what the local heads hold after n tokens depends on the tokens alone: the fold frontier is a function of the position,
// and no ubatch has positions of two frontiers
class llama_kv_cache_razor : private llama_razor_hparams, public llama_kv_cache {
public:
    // the fold state of a stream, written by apply_local() alone
    struct stream_state {
        uint32_t n_high        = 0;  // positions below were written at some time since the last clear
        uint32_t frontier      = 0;  // positions [sink_tokens, frontier) are folded
        int64_t  frontier_prev = -1; // before the last fold, -1: cannot be undone
        uint32_t slot          = 0;  // compensation token and accumulator row in use
    };

    // what the graph of one ubatch does with the local heads
    struct step_info {
        uint32_t strm      = 0;
        uint32_t pos0      = 0;  // first position of the ubatch
        uint32_t n_kv      = 0;  // cells that the attention looks at
        uint32_t frontier  = 0;
        uint32_t slot      = 0;
        uint32_t fold_from = 0;  // positions [fold_from, frontier) are folded before the ubatch is written
        uint32_t n_fold    = 0;
    };

    // row of the accumulators that is always zero
    static constexpr uint32_t SLOT_ZERO = 2;
    static constexpr uint32_t N_SLOTS   = 3;

    struct razor_layer {
        uint32_t il;

        uint32_t n_retrieval; // KV heads
        uint32_t n_local;

        // rows: n_ctx of each retrieval head, then cells of each local head
        // without flash attention the values of a retrieval head are transposed: [n_ctx, n_embd_head_v]
        ggml_tensor * k; // type_k [n_embd_head_k, rows, n_stream]
        ggml_tensor * v; // type_v [n_embd_head_v, rows, n_stream]

        // sums of the folded rows, nullptr without compensation or local heads
        ggml_tensor * k_sum; // F32 [n_embd_head_k*n_local, N_SLOTS, n_stream]
        ggml_tensor * v_sum; // F32 [n_embd_head_v*n_local, N_SLOTS, n_stream]

        razor_attn_kernel attn = nullptr; // with flash attention, where the cache lies in the host's memory

        bool device       = false; // with flash attention, where the device knows the operations of ggml-razor.h
        bool device_batch = false; // the attention of a batch as well
    };

    llama_kv_cache_razor(
            const llama_model & model,
         const llama_cparams  & cparams,
             llama_razor_plan   plan,
                    ggml_type   type_k,
                    ggml_type   type_v,
            razor_attn_kernel   attn,
          razor_device_choice   device);

    ~llama_kv_cache_razor() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    // only the end of the sequence can be removed, and over a fold only as far as the ring still has the folded rows
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_razor specific API
    //

    // the ubatch was applied but its computation failed: go back to before it, or clear if the ring has lost rows
    void abort_ubatch(llama_seq_id seq_id, llama_pos p0);

    // called for each ubatch before its graph is built
    step_info apply_local(const llama_ubatch & ubatch);

    // the step with the largest graph
    step_info full_step() const;

    const llama_razor_plan & get_plan() const { return plan; }

    const razor_layer & get_layer(int32_t il) const { return layers_razor[il]; }

    uint32_t n_tokens(uint32_t strm) const;

    const stream_state & get_state(uint32_t strm) const { return streams[strm]; }

    // tokens that seq_rm() can remove from the end now
    uint32_t n_rollback(uint32_t strm) const;

    ggml_type get_type_k() const { return tk; }
    ggml_type get_type_v() const { return tv; }

    bool get_v_trans() const { return v_trans; }
    bool has_devices() const;

    // first row of the i-th local head
    uint64_t local_row(const razor_layer & layer, uint32_t i) const {
        return (uint64_t) layer.n_retrieval*plan.n_ctx + (uint64_t) i*plan.cells;
    }

    const std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & bufs() const { return ctxs_bufs; }

private:
    const llama_cparams & cparams;

    const llama_razor_plan plan;

    const ggml_type tk;
    const ggml_type tv;

    // an operation that local heads cannot follow was asked for: nothing is decoded until the cache is cleared
    bool broken = false;

    std::vector<stream_state> streams;

    std::vector<razor_layer> layers_razor; // of all layers of the plan

    // the step of the last apply_local()
    step_info last_step;

    void init_rotation();

    uint64_t fingerprint() const;

    // true: the positions [frontier, n_high) below the fold frontier `to` are still in the ring
    bool can_unfold(const stream_state & st, uint32_t to) const;

    void unfold(stream_state & st, uint32_t to) const;
};

class llama_kv_cache_razor_context : public llama_kv_cache_context {
public:
    // used to create a full-cache context
    llama_kv_cache_razor_context(llama_kv_cache_razor * kv);

    // used to create a batch processing context from a batch
    llama_kv_cache_razor_context(
            llama_kv_cache_razor * kv,
            slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches);

    bool next()  override;
    bool apply() override;

    const llama_kv_cache_razor            & get_kv()   const { return *kv_razor; }
    const llama_kv_cache_razor::step_info & get_step() const { return step; }

    // the cells of the ubatch's tokens in the retrieval heads
    const std::vector<uint32_t> & get_cells() const { return cells[i_cur]; }

private:
    llama_kv_cache_razor * kv_razor;

    llama_kv_cache_razor::step_info step;

    std::vector<std::vector<uint32_t>> cells; // per ubatch

    size_t i_cur = 0;
};

//
// llm_graph_input_razor
//

// the inputs of the heads of all layers
class llm_graph_input_razor : public llm_graph_input_i {
public:
    llm_graph_input_razor(
            ggml_context * ctx,
            const llama_ubatch  & ubatch,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_razor_context * mctx);

    // added to the inputs of the graph when the memory is ours, else nullptr
    static llm_graph_input_razor * create(
            llm_graph_result * res,
            ggml_context * ctx,
            const llama_ubatch  & ubatch,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_memory_context_i * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    //   q_cur [n_embd_head_k, n_head,    n_tokens]
    //   k_cur [n_embd_head_k, n_head_kv, n_tokens]
    //   v_cur [n_embd_head_v, n_head_kv, n_tokens]
    // returns [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & g,
            const llm_graph_input_attn_kv & inp,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il) const;

private:
    using razor_layer = llama_kv_cache_razor::razor_layer;

    // where the heads of a layer are, the same for all layers with these retrieval heads
    struct head_order {
        uint32_t n_head;
        uint32_t n_head_kv;

        std::vector<uint32_t> retrieval; // KV heads
        std::vector<uint32_t> local;

        bool identity    = true;  // one group of heads after the other already
        bool local_first = false;

        // offsets in heads
        size_t offs_rows = 0;
        size_t offs_q    = 0; // the following when not identity
        size_t offs_out  = 0;
        size_t offs_v    = 0; // of a transposed V cache
    };

    void make_orders();

    void set_batch_input(const llama_ubatch & ubatch) const;
    template<typename T>
    void set_rows_of_heads(T * rows_data) const;

    void set_rows_input() const;
    void set_heads_input() const;
    void set_fold_input() const;

    // where the rows of the layer's tokens go
    ggml_tensor * view_rows(const llm_graph_context & g, const razor_layer & layer, const head_order & order) const;

    // rows of the local heads -> [n_embd_head, cells, n_local]
    ggml_tensor * view_local(ggml_context * ctx0, const razor_layer & layer, ggml_tensor * src) const;

    // the input where the layer's cache is
    ggml_tensor * on_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * input) const;

    void build_fold(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * store, ggml_tensor * sums) const;

    void build_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * dst, ggml_tensor * cur, const head_order & order) const;

    // both K and V, where layer.device
    void build_store_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const;

    void build_store_v_trans(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * v_cur, const head_order & order) const;

    // the rows of a token one after the other, in the order of the graph
    ggml_tensor * build_gather(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * cur, size_t offs) const;

    // by razor_attn, on devices of one token or where layer.device_batch
    ggml_tensor * build_own_attn(
            const llm_graph_context & g,
            const llm_graph_input_attn_kv & inp,
            const razor_layer & layer,
            const head_order & order,
            ggml_tensor * q_cur,
                  float   kq_scale) const;

    ggml_tensor * mask      = nullptr; // F32/F16 [n_kv, n_tokens/n_stream, 1, n_stream]

    razor_batch batch; // instead of masks, for layers with device_batch

    // per order and token, the KV heads in the order of the model
    ggml_tensor * rows      = nullptr; // I32, or I64 for our operations, [n] rows of razor_layer::k and ::v

    // per order and token, the heads in the order of the graph
    ggml_tensor * heads     = nullptr; // I32 [n]

    // of a transposed V cache, by the number of heads
    std::map<uint32_t, ggml_tensor *> v_elems; // I64 [n_retrieval*n_embd_head_v*n_tokens] elements of the retrieval heads
    std::map<uint32_t, ggml_tensor *> v_rows;  // I64 [n_local*n_tokens] rows of the local heads

    // of the fold, unused when n_fold == 0
    ggml_tensor * fold_rows = nullptr; // I32 [n_fold, max n_local]
    ggml_tensor * fold_src  = nullptr; // I32 [1] row of the accumulators
    ggml_tensor * fold_dst  = nullptr; // I64 [1]
    ggml_tensor * fold_cell = nullptr; // I64 [N_COMP_CELLS]
    ggml_tensor * fold_inv  = nullptr; // F32 [1] 1/N_d

    mutable std::map<std::pair<ggml_backend_buffer_type_t, ggml_tensor *>, ggml_tensor *> copies; // of inputs, on devices

    std::vector<head_order> orders;
    std::vector<uint32_t>   map_order; // layer -> order

    mutable std::deque<razor_attn> attns; // of the layers so far

    // copies, because a reused graph outlives the parameters it was built with
    const llama_hparams hparams;

    const llama_kv_cache_razor_context * mctx;

    // what the graph was built for
    const uint32_t n_tokens;
    const uint32_t n_kv_full; // cells of the retrieval heads
    const uint32_t n_kv;
    const uint32_t n_fold;
};
