#pragma once

// what a context is asked to do, by the model's razor.* metadata or by llama_razor_set_override()
//
// a profile is checked when it is made: every llama_razor_profile is valid, except that a mask from llama_razor_set_override() may
// not fit the model

#include "llama-razor-rewind.h"

#include "llama-arch.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

struct gguf_context;
struct llama_hparams;

struct llama_razor_profile {
    bool     enabled        = true;
    uint32_t sink_tokens    = 4;
    uint32_t window         = 0; // 0: computed from the next two
    uint32_t window_min     = 4000;
    uint32_t window_divisor = 5;
    bool     compensation   = true;
    bool     alibi          = false; // razor.method is "alibi": the scopes are those of ALiBi heads
    bool     own_attention  = true;  // use razor's attention if the context gets upstream's cache

    int32_t  type_k_local   = -1;    // enum ggml_type of the rows of local heads, -1: as in the context
    int32_t  type_v_local   = -1;

    llama_razor_rewind_params rewind;

    std::vector<uint8_t>  retrieval; // 0/1 per KV head, layer-major
    std::vector<uint32_t> scope;     // tokens per KV head, 0 exactly for retrieval heads, empty: one window for all local heads
};

// return nullptr if there are no razor.* keys
// throws std::runtime_error if a key is malformed
std::shared_ptr<const llama_razor_profile> llama_razor_profile_load(const gguf_context * ctx, llm_arch arch, const llama_hparams & hparams);

// return the profile set by llama_razor_set_override() on this thread, nullptr if there is none
const llama_razor_profile * llama_razor_profile_get_override();

// return true if LLAMA_RAZOR_DISABLE_ENV is set
bool llama_razor_is_disabled();

// return true if the layer has a KV cache of the whole context, in which razor can have local heads
// layers with a sliding window, recurrent layers and layers that read the cache of an earlier one have none
bool llama_razor_is_full_layer(llm_arch arch, const llama_hparams & hparams, uint32_t il);

// return the number of KV heads of a layer, 0 if it is not a full layer
uint32_t llama_razor_n_head_kv(llm_arch arch, const llama_hparams & hparams, uint32_t il);

// return the number of KV heads of all layers, which is the length of a mask
size_t llama_razor_n_kv_heads(llm_arch arch, const llama_hparams & hparams);
