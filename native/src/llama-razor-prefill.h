#pragma once

// reading a prompt with full attention, one layer at a time
//
// as in the paper, all heads attend to the whole prompt and the cache is compressed afterwards. A full cache of all layers would be needed
// for that if all layers read a token before the next token is read. Instead, each layer reads all tokens of the batch before the next layer
// starts, so there is one full cache at a time:
// - the states of the tokens between two layers are kept
// - K and V of the layer's local heads are kept in temporary tensors, to which the tokens of the batch attend
// - the same rows are stored in the cache and folded, as without this
//
// a layer's part of the graph is found by the names of the tensors between the layers

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

    // return why the context cannot read prompts with full attention, "" if it can; kv is nullptr if it has other memory
    static std::string find_unsupported(llama_context & ctx, const llama_kv_cache_razor * kv);

    // return true if local heads would drop tokens of the batch while it is read
    static bool is_useful(const llama_kv_cache_razor & kv, const std::vector<llama_ubatch> & ubatches);

    // bring the cache to its state before the batch, and return the context in which a layer reads the batch
    static llama_memory_context_ptr start_layer(const std::shared_ptr<llama_razor_prefill> & prefill, uint32_t il);

    // replace the graph of an ubatch by the part of the current layer
    // return nullptr and set llama_razor_last_error() if the layer's part cannot be found
    ggml_cgraph * cut_graph(llm_graph_result * res, const llama_ubatch & ubatch);

    // return the cells that the local heads of a group attend to in an ubatch that ends before pos
    // these are a copy of their cells before the batch, and then the tokens of the batch
    uint32_t n_kv(uint32_t pos) const { return std::min<uint32_t>(cells, GGML_PAD(n_past + pos - pos0, 256)); }

    // return true if the cache before the batch has to be copied in the ubatch that begins at pos, after its fold
    bool copies_past(uint32_t pos) const { return pos == pos0 && n_past > 0; }

    // return the number of cells of a local head that were in use before the batch
    uint32_t n_used(size_t i_group) const { return kv->get_plan().groups[i_group].n_used(past.n_high, steps_past[i_group].frontier); }

    // let ggml plan the memory of the next graph anew
    // it keeps the plan of the last graph if the next one has as many nodes and inputs, but those of two layers can be in different orders
    void reset_plan() const;

    // return the size of the temporary buffers in bytes
    size_t n_bytes() const;

    llama_kv_cache_razor * const kv;

    uint32_t strm   = 0;
    uint32_t il     = 0; // the current layer
    uint32_t pos0   = 0; // the first position of the batch
    uint32_t n_past = 0; // temporary cells for the cache as of before the batch
    uint32_t cells  = 0; // temporary cells of each head

    // before the batch, and what the local heads of each group see of that: the frontiers are those of the first token of the batch
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

    ggml_tensor * states = nullptr; // F32 [n_embd, n_tokens] of all tokens of the batch, between two layers

    ggml_context_ptr        ctx_states;
    ggml_backend_buffer_ptr buf_states;

    ggml_context_ptr ctx_graph;

    void init_states();
    void init_rows();
};

// read the batch with all layers but the last one, if the context should read prompts with full attention and if that makes a difference
// mctx is replaced by the context in which the last layer reads the batch
// compute(ubatch) computes an ubatch in mctx
// return 0, or what llama_decode() returns for a failed computation; the sequence is empty then
int llama_razor_prefill_layers(
        llama_memory_context_ptr & mctx,
        const std::function<ggml_status(const llama_ubatch & ubatch)> & compute);

// return true if a batch can have more tokens than n_batch
bool llama_razor_prefill_is_on(const llama_memory_i * memory);

// return the graph that is to be computed in mctx, nullptr on failure
ggml_cgraph * llama_razor_prefill_graph(llm_graph_result * res, const llama_memory_context_i * mctx, const llama_ubatch & ubatch);
