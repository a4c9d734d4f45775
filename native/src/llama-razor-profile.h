#pragma once

// What is asked of a context: by the model's razor.* metadata, or by the thread that creates it.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

struct gguf_context;
struct llama_hparams;

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

// what llama_razor_set_override() says on this thread, nullptr: the metadata counts
const llama_razor_profile * llama_razor_profile_get_override();

// by LLAMA_RAZOR_DISABLE_ENV
bool llama_razor_is_disabled();

// entries of a mask: the KV heads of all layers
size_t llama_razor_n_kv_heads(const llama_hparams & hparams);
