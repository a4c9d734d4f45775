#pragma once

// the plan of a context: the size and layout of its cache and the positions at which tokens are folded
//
// a plan depends only on the context size, the profile and the model's hparams. It is made before anything is allocated and never
// changes. The formulas are in llama-razor.h, and razor_local/plan.py computes the same numbers

#include "llama-razor-profile.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ggml.h"

struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;

// types of the rows of K and V
struct llama_razor_types {
    ggml_type k;
    ggml_type v;

    bool operator==(const llama_razor_types & other) const { return k == other.k && v == other.v; }
};

// the local heads with the same window
// the cells of a head are [sinks | ring of recent tokens | compensation tokens]
struct llama_razor_group {
    // there are two compensation tokens: a fold writes one and leaves the previous value in the other
    // each of them has two cells with equal rows: log(N_d) is not exact in F16, but the exponentials of two F16 values can add up to N_d
    static constexpr uint32_t N_COMP_SLOTS = 2;
    static constexpr uint32_t N_COMP_CELLS = 2; // per slot
    static constexpr uint32_t N_COMP       = N_COMP_SLOTS*N_COMP_CELLS;

    uint32_t sink_tokens = 0; // S
    uint32_t window      = 0; // L
    uint32_t block       = 0; // B
    uint32_t n_comp      = 0; // compensation cells, N_COMP or 0
    uint32_t cells       = 0; // cells of a head

    uint32_t ring() const { return cells - sink_tokens - n_comp; }

    // return F(pos): while the block of pos is processed, the positions [sink_tokens, F) are folded
    uint32_t frontier(uint32_t pos) const {
        const uint32_t start = pos - pos % block;

        return start > window && start - window > sink_tokens ? start - window : sink_tokens;
    }

    // return the first position after pos with another frontier
    uint32_t frontier_end(uint32_t pos) const {
        const uint32_t end = pos - pos % block + block;

        // blocks that start at or before sink_tokens + window have nothing to fold
        return std::max(end, (sink_tokens + window)/block*block + block);
    }

    // return the first cell of a compensation token
    uint32_t comp_cell(uint32_t slot) const { return cells - n_comp + slot*N_COMP_CELLS; }

    // return the cell of a position that is a sink or in the ring
    uint32_t cell(uint32_t pos) const {
        return pos < sink_tokens ? pos : sink_tokens + (pos - sink_tokens) % ring();
    }

    // return the number of cells in use after n_tokens positions were written. Before the first fold, it is that of a full cache
    uint32_t n_used(uint32_t n_tokens, uint32_t frontier) const {
        return frontier > sink_tokens ? cells : std::min(n_tokens, cells - n_comp);
    }
};

struct llama_razor_plan {
    uint32_t n_ctx       = 0; // per sequence
    uint32_t sink_tokens = 0; // the same in all groups, like block and n_comp
    uint32_t block       = 0;
    uint32_t n_comp      = 0;

    llama_razor_types types;       // of retrieval heads
    llama_razor_types types_local; // of local heads

    // largest window first, each group has a head in at least one layer
    std::vector<llama_razor_group> groups;

    // KV heads in ascending order
    std::vector<std::vector<uint32_t>>              retrieval; // per layer
    std::vector<std::vector<std::vector<uint32_t>>> local;     // per layer and group

    uint32_t n_layer() const { return retrieval.size(); }

    uint32_t n_local(uint32_t il) const {
        uint32_t res = 0;
        for (const auto & heads : local[il]) {
            res += heads.size();
        }

        return res;
    }

    // return the first position after pos with another frontier in any group
    uint32_t frontier_end(uint32_t pos) const { return groups.back().frontier_end(pos); }

    // return true if the local heads of a layer have separate tensors, because their types differ from those of its retrieval heads
    bool is_split(uint32_t il) const {
        return !(types == types_local) && !retrieval[il].empty() && n_local(il) > 0;
    }

    // return the types of the first rows of a layer's cache
    const llama_razor_types & first_types(uint32_t il) const { return retrieval[il].empty() ? types_local : types; }

    uint64_t n_rows_retrieval(uint32_t il) const { return (uint64_t) retrieval[il].size()*n_ctx; }

    // return the first row of a group in a layer's cache, where the groups follow the retrieval heads unless the layer is split
    uint64_t first_row(uint32_t il, size_t i_group) const {
        uint64_t res = is_split(il) ? 0 : n_rows_retrieval(il);
        for (size_t g = 0; g < i_group; ++g) {
            res += (uint64_t) local[il][g].size()*groups[g].cells;
        }

        return res;
    }

    // return the number of rows of the tensors with the local heads
    uint64_t n_rows_local(uint32_t il) const { return first_row(il, groups.size()); }

    // return the number of rows of the tensors with the retrieval heads
    uint64_t n_rows(uint32_t il) const { return is_split(il) ? n_rows_retrieval(il) : n_rows_local(il); }
};

// return the memory of a context with RazorAttention, nullptr if upstream's memory should be created
// throws std::runtime_error if razor was requested but the model or the context is not supported
llama_memory_i * llama_razor_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);
