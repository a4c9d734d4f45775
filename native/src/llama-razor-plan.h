#pragma once

// What a context does about RazorAttention, decided before anything is allocated.
// The arithmetic stands in llama-razor.h, the C API; razor_local/plan.py computes the same numbers.

#include "llama-memory.h"
#include "llama-razor.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct gguf_context;
struct llama_cparams;
struct llama_hparams;
struct llama_model;

// hyper-parameters and head mask, from the model's metadata or from llama_razor_set_override()
struct llama_razor_profile {
    bool     enabled        = true;
    uint32_t sink_tokens    = 4;
    uint32_t window         = 0; // 0: from the two below
    uint32_t window_min     = 4000;
    uint32_t window_divisor = 5;
    bool     compensation   = true;
    bool     alibi          = false; // of scopes per head, which cannot be run yet
    bool     own_attention  = true;  // with upstream's own cache

    std::vector<uint8_t> retrieval; // 0/1 per KV head, layer-major
};

// throws std::runtime_error when razor.* keys are there but malformed, returns nullptr when there are none
std::shared_ptr<const llama_razor_profile> llama_razor_profile_load(const gguf_context * ctx, const llama_hparams & hparams);

struct llama_razor_plan {
    // a fold writes one compensation token while the other keeps the value before it, and each takes two cells with
    // equal rows, because an F16 mask cannot hold log(N_d) but the sum of two of its exponentials can be N_d
    static constexpr uint32_t N_COMP_SLOTS = 2;
    static constexpr uint32_t N_COMP_CELLS = 2; // per slot
    static constexpr uint32_t N_COMP       = N_COMP_SLOTS*N_COMP_CELLS;

    uint32_t n_ctx       = 0; // per sequence
    uint32_t sink_tokens = 0; // S
    uint32_t window      = 0; // L
    uint32_t block       = 0; // B
    uint32_t n_comp      = 0; // compensation cells, N_COMP or 0
    uint32_t cells       = 0; // of a local head: [sinks | ring | compensation]

    // KV heads of each layer: the retrieval heads in order, the local heads in order
    std::vector<std::vector<uint32_t>> retrieval;
    std::vector<std::vector<uint32_t>> local;

    uint32_t ring() const { return cells - sink_tokens - n_comp; }

    bool has_local(int32_t il) const { return (size_t) il < local.size() && !local[il].empty(); }

    // F(p): in the block of position p, the positions [sink_tokens, F) are folded
    uint32_t frontier(uint32_t pos) const {
        const uint32_t start = pos - pos % block;

        return start > window && start - window > sink_tokens ? start - window : sink_tokens;
    }

    // the first position after pos that has another frontier
    uint32_t frontier_end(uint32_t pos) const {
        const uint32_t end = pos - pos % block + block;

        // nothing is folded in the blocks that start at or before sink_tokens + window
        return std::max(end, (sink_tokens + window)/block*block + block);
    }

    // the first cell of a compensation token
    uint32_t comp_cell(uint32_t slot) const { return cells - n_comp + slot*N_COMP_CELLS; }

    // the cell of position p, of the sinks or of the ring
    uint32_t cell(uint32_t pos) const {
        return pos < sink_tokens ? pos : sink_tokens + (pos - sink_tokens) % ring();
    }

    // the cells that count are in [0, n_used) once n_tokens positions were written: until something is folded as many as
    // in a full cache
    uint32_t n_used(uint32_t n_tokens, uint32_t frontier) const {
        return frontier > sink_tokens ? cells : std::min(n_tokens, cells - n_comp);
    }
};

// the memory of a context that runs RazorAttention; nullptr: upstream's own memory is to be created
// throws std::runtime_error when razor is asked for and the model or the context is not supported
llama_memory_i * llama_razor_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// to be called instead of llama_memory_i::seq_rm() after an ubatch was applied and its computation failed
// returns false when the memory is not ours
bool llama_razor_abort(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0);

// what llama_razor_last_error() returns on this thread
void llama_razor_error_set(const std::string & msg);

// upper bound of the graph nodes that a razor context adds
uint32_t llama_razor_n_nodes(const llama_memory_i * memory);
