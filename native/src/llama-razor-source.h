#pragma once

// filling a cache with the keys and values of a full cache
//
// the keys and values of a prompt that was read with full attention do not depend on what a cache drops afterwards. So contexts with
// different plans can take them from one full cache instead of reading the prompt themselves. The graph of an ubatch is then cut down to
// the operations that store and fold

#include "llama-kv-cache-razor.h"
#include "llama-razor-full.h"

#include <string>

class llm_graph_result;

class llama_razor_source {
public:
    llama_razor_source(const llama_kv_cache_razor * kv, const llama_kv_cache_full * cache);

    // return why kv cannot take keys and values from the cache, "" if it can; nullptr: the context has another type of memory
    static std::string find_unsupported(const llama_kv_cache_razor * kv, const llama_kv_cache_full * cache);

    // return true if the cache holds the tokens of the ubatches
    bool has(const std::vector<llama_ubatch> & ubatches) const;

    // replace the graph of an ubatch with the operations that store and fold
    // return nullptr and set llama_razor_last_error() if memory is missing
    ggml_cgraph * cut_graph(llm_graph_result * res);

    const llama_kv_cache_full * const cache;

private:
    const llama_kv_cache_razor * const kv;

    ggml_context_ptr ctx_graph;
};
