#pragma once

// reading a prompt with full attention, one layer at a time
//
// as in the paper, all heads attend to the whole prompt, and the cache is compressed afterwards. If all layers read one ubatch before the
// next, this needs a full cache of all layers. Here, each layer reads all tokens of the batch before the next layer starts, so only one layer
// has a full cache at a time:
// - the hidden states of the tokens between two layers are kept
// - K and V of the layer are kept in temporary tensors, to which the tokens of the batch attend
// - the same rows are stored in the cache and folded as usual
//
// the part of the graph that belongs to a layer is found by the names of the tensors between the layers

#include "llama-kv-cache-razor.h"

#include <functional>
#include <memory>
#include <string>

class llm_graph_result;

class llama_razor_prefill {
public:
    // kv must not change until the batch has been computed
    llama_razor_prefill(
            llama_kv_cache_razor * kv,
            llama_kv_cache::slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches);

    ~llama_razor_prefill();

    // return why the context cannot read prompts with full attention, "" if it can; kv is nullptr if its memory is not this cache
    static std::string find_unsupported(llama_context & ctx, const llama_kv_cache_razor * kv);

    // return true if local heads would drop tokens of the batch while it is read
    static bool is_useful(const llama_kv_cache_razor & kv, const std::vector<llama_ubatch> & ubatches);

    // bring the cache to its state before the batch, and return the context in which a layer reads the batch
    static llama_memory_context_ptr start_layer(const std::shared_ptr<llama_razor_prefill> & prefill, uint32_t il);

    // replace the graph of an ubatch with its part that belongs to the current layer
    // return nullptr and set llama_razor_last_error() if the layer's part cannot be found
    ggml_cgraph * cut_graph(llm_graph_result * res, const llama_ubatch & ubatch);

    // return the number of temporary cells of a local head that an ubatch which ends before pos attends to
    // the first ones are a copy of the head's cells before the batch, the others hold the tokens of the batch
    uint32_t n_kv(uint32_t pos) const { return std::min<uint32_t>(cells, GGML_PAD(n_past + pos - pos0, 256)); }

    // return true if the cache before the batch has to be copied in the ubatch that begins at pos, after its fold
    bool copies_past(uint32_t pos) const { return pos == pos0 && n_past > 0; }

    // return the number of cells of a local head that were in use before the batch
    uint32_t n_used(size_t i_group) const { return kv->get_plan().groups[i_group].n_used(past.n_high, steps_past[i_group].frontier); }

    // return the size of the temporary buffers in bytes
    size_t n_bytes() const;

    llama_kv_cache_razor * const kv;

    uint32_t strm   = 0;
    uint32_t il     = 0; // the current layer
    uint32_t pos0   = 0; // the first position of the batch
    uint32_t n_past = 0; // temporary cells of each head that hold a copy of the cache before the batch
    uint32_t cells  = 0; // temporary cells of each head

    // the state before the batch, and the step of each group that its first token sees: frontier and slot after its fold
    llama_kv_cache_razor::stream_state            past;
    std::vector<llama_kv_cache_razor::group_step> steps_past;

    // temporary rows of the current layer, `cells` for each of its KV heads: those of the retrieval heads first, then group by group
    ggml_tensor * k = nullptr; // [n_embd_head_k, rows]
    ggml_tensor * v = nullptr; // [n_embd_head_v, rows]

private:
    const llama_kv_cache::slot_info_vec_t sinfos;

    const std::vector<llama_ubatch> ubatches;

    llama_kv_cells cells_past; // of the retrieval heads, before the batch
    uint32_t       head_past = 0;

    ggml_context_ptr        ctx_rows;
    ggml_backend_buffer_ptr buf_rows;

    ggml_tensor * states = nullptr; // F32 [n_embd, n_tokens], the hidden states of all tokens of the batch between two layers

    ggml_context_ptr        ctx_states;
    ggml_backend_buffer_ptr buf_states;

    ggml_context_ptr ctx_graph;

    void init_states();
    void init_rows();
};

// make ggml plan the memory of the next graph again
// otherwise it keeps the plan of the last graph if both have the same number of nodes and inputs, although their order can differ
void llama_razor_reset_plan(const llama_kv_cache_razor & kv);

// return a graph that computes only these nodes of a graph and their inputs; its memory is in ctx
// return nullptr and set llama_razor_last_error() if memory is missing
ggml_cgraph * llama_razor_cut_graph(llm_graph_result * res, const std::vector<ggml_tensor *> & nodes, ggml_context_ptr & ctx);

// if the context reads prompts with full attention, and if that makes a difference, read the batch with all layers but the last one
// compute(ubatch) computes an ubatch in mctx; mctx is replaced with the context in which the last layer reads the batch
// return 0, or what llama_decode() returns for a failed computation, after which the sequence is empty
int llama_razor_prefill_layers(
        llama_memory_context_ptr & mctx,
        const std::function<ggml_status(const llama_ubatch & ubatch)> & compute);

// return true if a batch can have more tokens than n_batch, because prompts are read with full attention or come from another cache
bool llama_razor_prefill_is_on(const llama_memory_i * memory);

// return the graph to compute in mctx: the part of one layer if it reads a prompt, the part that stores and folds if K and V come from
// another cache, otherwise the whole graph; nullptr on failure
ggml_cgraph * llama_razor_prefill_graph(llm_graph_result * res, const llama_memory_context_i * mctx, const llama_ubatch & ubatch);
