#pragma once

// What a context does about RazorAttention: a function of its size, the profile and the model's hparams alone, decided before
// anything is allocated. The arithmetic is explained in llama-razor.h, and razor_local/plan.py computes the same numbers.

#include "llama-razor-profile.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;

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
