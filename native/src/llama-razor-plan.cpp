#include "llama-razor-plan.h"

#include "llama-razor-error.h"
#include "llama-razor-full.h"
#include "llama-memory-razor.h"
#include "llama-razor.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

// return a feature of the model or the context that razor does not support, "" if there is none
static std::string razor_plan_find_unsupported(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    // architectures whose attention is more than one causal build_attn(llm_graph_input_attn_kv) per layer
    switch (model.arch) {
        case LLM_ARCH_NANBEIGE:
        case LLM_ARCH_HRM_TEXT:
            return "models that run their layers in a loop";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "draft models";
        case LLM_ARCH_GRANITE_SWITCH:
        case LLM_ARCH_COGVLM:
        case LLM_ARCH_POCKETTTS:
            return std::string("architecture ") + llm_arch_name(model.arch);
        default:
            break;
    }

    if (llm_arch_is_recurrent(model.arch))               { return "recurrent models"; }
    if (hparams.is_mla())                                { return "multi-head latent attention (MLA)"; }
    if (hparams.indexer_head_size > 0)                   { return "sparse attention with an indexer"; }
    if (!hparams.causal_attn || !cparams.causal_attn)    { return "non-causal attention (encoders)"; }
    if (hparams.dec_n_layer > 0 || hparams.n_rel_attn_bkts > 0) { return "encoder-decoder models"; }
    if (llm_arch_is_hybrid(model.arch) && hparams.swa_type != LLAMA_SWA_TYPE_NONE) { return "hybrid models with sliding windows"; }
    if (llm_arch_is_hybrid(model.arch) && cparams.n_rs_seq > 0)                   { return "rollback of recurrent states (n_rs_seq > 0)"; }
    if (hparams.ple_n_heads > 0)                         { return "n-gram embeddings"; }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT)   { return "draft (MTP) contexts"; }
    if (params.mem_other)                                { return "a cache that is shared with another context"; }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR)   { return "split mode 'tensor'"; }

    return "";
}

// return true if the memory of the model is one KV cache
static bool razor_plan_is_plain(const llama_model & model) {
    return !llm_arch_is_hybrid(model.arch) && model.hparams.swa_type == LLAMA_SWA_TYPE_NONE;
}

// return the fold block B of a window
static uint32_t razor_plan_block(uint64_t window) {
    uint32_t block = 64;
    while (block < 512 && 2*block <= window/4) {
        block *= 2;
    }

    return block;
}

// replace windows by larger ones until there are at most LLAMA_RAZOR_MAX_WINDOWS different ones
// 0 means that the head has no window
static void razor_plan_merge_windows(std::vector<uint64_t> & windows) {
    std::map<uint64_t, uint64_t> counts; // window -> number of heads

    for (const uint64_t window : windows) {
        if (window > 0) {
            counts[window]++;
        }
    }

    std::map<uint64_t, uint64_t> larger; // window -> window that replaces it

    while (counts.size() > LLAMA_RAZOR_MAX_WINDOWS) {
        auto best = counts.begin();
        for (auto it = counts.begin(); std::next(it) != counts.end(); ++it) {
            auto cost = [](auto at) { return at->second*(std::next(at)->first - at->first); };
            if (cost(it) < cost(best)) {
                best = it;
            }
        }

        larger[best->first] = std::next(best)->first;
        std::next(best)->second += best->second;
        counts.erase(best);
    }

    for (uint64_t & window : windows) {
        for (auto it = larger.find(window); it != larger.end(); it = larger.find(window)) {
            window = it->second;
        }
    }
}

static llama_razor_plan razor_plan_make(
        const llama_razor_profile & profile,
        const std::vector<uint8_t>  & mask,
        const std::vector<uint32_t> & scope,
        const llama_model & model,
        uint32_t n_ctx) {
    llama_razor_plan res;

    res.n_ctx       = n_ctx;
    res.sink_tokens = profile.sink_tokens;
    res.n_comp      = profile.compensation ? llama_razor_group::N_COMP : 0;

    // 1. find the window of each head, 0 for retrieval heads
    std::vector<uint64_t> windows(mask.size(), 0);

    if (scope.empty() || profile.window > 0) {
        uint64_t window = profile.window;
        if (window == 0) {
            window = std::max<uint64_t>(profile.window_min, profile.window_divisor > 0 ? n_ctx/profile.window_divisor : 0);
        }

        for (size_t i = 0; i < mask.size(); ++i) {
            windows[i] = mask[i] ? 0 : window;
        }

        res.block = razor_plan_block(window);
    } else {
        uint64_t sum = 0;
        uint64_t n   = 0;
        for (size_t i = 0; i < mask.size(); ++i) {
            windows[i] = scope[i] < n_ctx ? scope[i] : 0;

            sum += windows[i];
            n   += windows[i] > 0;
        }

        res.block = razor_plan_block(n > 0 ? sum/n : 0);

        for (uint64_t & window : windows) {
            window = (window + res.block - 1)/res.block*res.block;
        }

        razor_plan_merge_windows(windows);
    }

    // 2. make a group for each window that saves cells
    std::set<uint64_t, std::greater<>> all(windows.begin(), windows.end());

    for (const uint64_t window : all) {
        const uint64_t cells = (res.sink_tokens + res.n_comp + window + res.block + LLAMA_RAZOR_SLACK + 255)/256*256;

        if (window > 0 && cells < n_ctx) {
            res.groups.push_back({ res.sink_tokens, (uint32_t) window, res.block, res.n_comp, (uint32_t) cells });
        }
    }

    // 3. assign the heads to the groups
    size_t i = 0;

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        std::vector<uint32_t> retrieval;
        std::vector<std::vector<uint32_t>> local(res.groups.size());

        for (uint32_t h = 0; h < llama_razor_n_head_kv(model.arch, model.hparams, il); ++h) {
            const uint64_t window = windows[i++];

            const auto it = std::find_if(res.groups.begin(), res.groups.end(), [&](const auto & group) { return group.window == window; });

            (it == res.groups.end() ? retrieval : local[it - res.groups.begin()]).push_back(h);
        }

        res.retrieval.push_back(std::move(retrieval));
        res.local    .push_back(std::move(local));
    }

    return res;
}

// check that a device can hold a tensor: ggml_backend_sched would end the process otherwise
static void razor_plan_check_tensor(ggml_backend_dev_t dev, ggml_type type, uint64_t n_embd, uint64_t n_rows) {
    if (!dev || n_embd == 0 || n_rows == 0) {
        return;
    }

    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), type, n_embd, n_rows);

    if (!ggml_backend_dev_supports_op(dev, t)) {
        llama_razor_error_throw(format("one layer of the KV cache would have a tensor of %.1f MiB, which %s cannot hold in one piece; use a smaller context or KV type",
                    ggml_nbytes(t)/1024.0/1024.0, ggml_backend_dev_name(dev)));
    }
}

// check that the devices can hold the tensors of the cache, plan is nullptr for upstream's cache
static void razor_plan_check_tensors(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const llama_razor_plan * plan) {
    const auto & hparams = model.hparams;

    // caches with another layout are not checked
    if (!cparams.offload_kqv || llm_arch_is_recurrent(model.arch) ||
            hparams.indexer_head_size > 0 || model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return;
    }

    const uint64_t n_stream = cparams.kv_unified ? 1 : cparams.n_seq_max;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const uint64_t n_head_kv = llama_razor_n_head_kv(model.arch, hparams, il);
        if (n_head_kv == 0) {
            continue;
        }

        const uint64_t d_k = hparams.n_embd_head_k(il);
        const uint64_t d_v = hparams.is_mla() ? 0 : hparams.n_embd_head_v(il);

        ggml_backend_dev_t dev = model.dev_layer(il);

        if (plan) {
            razor_plan_check_tensor(dev, plan->first_types(il).k, d_k, n_stream*plan->n_rows(il));
            razor_plan_check_tensor(dev, plan->first_types(il).v, d_v, n_stream*plan->n_rows(il));

            if (plan->is_split(il)) {
                razor_plan_check_tensor(dev, plan->types_local.k, d_k, n_stream*plan->n_rows_local(il));
                razor_plan_check_tensor(dev, plan->types_local.v, d_v, n_stream*plan->n_rows_local(il));
            }
        } else {
            // without flash attention, upstream pads V to the widest layer
            const uint64_t n_embd_v = cparams.flash_attn || d_v == 0 ? n_head_kv*d_v : hparams.n_embd_v_gqa_max();

            razor_plan_check_tensor(dev, params.type_k, n_head_kv*d_k, n_stream*cparams.n_ctx_seq);
            razor_plan_check_tensor(dev, params.type_v, n_embd_v,      n_stream*cparams.n_ctx_seq);
        }
    }
}

// check the types of local heads as upstream checks those of the context
static void razor_plan_check_types(const llama_razor_plan & plan, const llama_model & model, const llama_cparams & cparams) {
    const auto & types = plan.types_local;

    if (types == plan.types) {
        return;
    }

    if (ggml_is_quantized(types.v) && (!cparams.flash_attn || cparams.auto_fa)) {
        llama_razor_error_throw(format("a quantized V cache of local heads (%s) needs flash attention, switch it on or use f16", ggml_type_name(types.v)));
    }

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        const uint32_t d_k = model.hparams.n_embd_head_k(il);
        const uint32_t d_v = model.hparams.n_embd_head_v(il);

        if (plan.n_local(il) > 0 && (d_k % ggml_blck_size(types.k) != 0 || d_v % ggml_blck_size(types.v) != 0)) {
            llama_razor_error_throw(format("the cache types of local heads (K %s, V %s) need head sizes that are multiples of %d and %d, layer %u has %u and %u; use f16",
                        ggml_type_name(types.k), ggml_type_name(types.v), (int) ggml_blck_size(types.k), (int) ggml_blck_size(types.v), il, d_k, d_v));
        }
    }
}

// return the plan of a new context, nullptr for upstream's cache
static std::unique_ptr<llama_razor_plan> razor_plan_choose(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (llama_razor_is_disabled()) {
        return nullptr;
    }

    // 1. find the profile
    const llama_razor_profile * asked   = llama_razor_profile_get_override();
    const llama_razor_profile * profile  = asked ? asked : model.razor.get();
    if (!profile || !profile->enabled) {
        return nullptr;
    }

    // 2. check that razor supports the model and the context
    const auto & hparams = model.hparams;

    const std::string unsupported = razor_plan_find_unsupported(model, params, cparams);
    if (!unsupported.empty()) {
        llama_razor_error_throw(format("%s: %s not supported, switch razor off to use the full cache", llm_arch_name(model.arch), unsupported.c_str()));
    }

    if (cparams.n_seq_max > 1 && cparams.kv_unified) {
        llama_razor_error_throw(format("local heads need a cache for each of the %u sequences (n_seq_max), set kv_unified to false or switch razor off to use the full cache",
                    cparams.n_seq_max));
    }

    // 3. find the mask and check that it fits
    const llama_razor_profile * heads = profile->retrieval.empty() ? model.razor.get() : profile;
    if (!heads) {
        llama_razor_error_throw("the model has no razor metadata and no retrieval heads were given");
    }

    const std::vector<uint8_t> & mask = heads->retrieval;

    // such a model can be loaded, but only used with razor off
    if (heads->alibi && !hparams.use_alibi) {
        llama_razor_error_throw(format("razor.method is 'alibi' and %s does not use ALiBi, convert the model again or switch razor off to use the full cache",
                    llm_arch_name(model.arch)));
    }

    // a slope cannot be applied to a mean of keys, which has no distance
    if (hparams.use_alibi && profile->compensation) {
        llama_razor_error_throw(format("%s: a compensation token is not supported with ALiBi, switch the compensation or razor off",
                    llm_arch_name(model.arch)));
    }

    const size_t n_kv_heads = llama_razor_n_kv_heads(model.arch, hparams);
    if (mask.size() != n_kv_heads) {
        llama_razor_error_throw(format("the mask of retrieval heads has %zu entries, the model has %zu KV heads in %u layers",
                    mask.size(), n_kv_heads, hparams.n_layer()));
    }

    // 4. make the plan and check that it saves something
    llama_razor_plan plan = razor_plan_make(*profile, mask, heads->scope, model, cparams.n_ctx_seq);

    plan.types       = { params.type_k, params.type_v };
    plan.types_local = {
        profile->type_k_local < 0 ? params.type_k : (ggml_type) profile->type_k_local,
        profile->type_v_local < 0 ? params.type_v : (ggml_type) profile->type_v_local,
    };

    if (plan.groups.empty()) {
        LLAMA_LOG_INFO("razor: nothing would be saved at a context of %u tokens, using the full cache\n", plan.n_ctx);

        return nullptr;
    }

    razor_plan_check_types(plan, model, cparams);

    return std::make_unique<llama_razor_plan>(std::move(plan));
}

static bool razor_wants_own_attention(const llama_model & model) {
    if (llama_razor_is_disabled()) {
        return false;
    }

    const llama_razor_profile * asked = llama_razor_profile_get_override();

    return asked ? asked->own_attention : model.razor && model.razor->enabled;
}

llama_memory_i * llama_razor_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (llama_razor_in_new_memory()) {
        return nullptr;
    }

    llama_razor_error_set("");

    // such a draft model would read the cache of the other context
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && llama_razor_get_cache(params.mem_other)) {
        llama_razor_error_throw("the draft model cannot share the cache of a context that runs razor, switch razor off for that context");
    }

    const auto plan = razor_plan_choose(model, params, cparams);

    razor_plan_check_tensors(model, params, cparams, plan.get());

    if (!plan) {
        if (!razor_plan_is_plain(model) || cparams.n_seq_max > 1 || !razor_wants_own_attention(model) || !razor_plan_find_unsupported(model, params, cparams).empty()) {
            return nullptr;
        }
        try {
            return llama_razor_create_full(model, params, cparams);
        } catch (const std::runtime_error & err) {
            llama_razor_error_throw(err.what());
        }
    }

    razor_attn_kernel attn = nullptr;
    razor_device_choice device = RAZOR_DEVICE_ON;
    try {
        attn   = razor_attn_choose_kernel();
        device = razor_device_choose();
    } catch (const std::exception & err) {
        llama_razor_error_throw(err.what());
    }

    const llama_razor_profile * asked = llama_razor_profile_get_override();

    const llama_razor_rewind_params rewind = asked ? asked->rewind : llama_razor_rewind_params();

    if (!razor_plan_is_plain(model)) {
        return llama_razor_new_memory(model, params, cparams, std::move(*plan), attn, device, rewind);
    }

    return new llama_kv_cache_razor(model, cparams, std::move(*plan), attn, device, rewind);
}
