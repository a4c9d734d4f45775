#include "llama-razor.h"

#include "llama-razor-plan.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-kv-cache-razor.h"
#include "llama-model.h"
#include "llama-razor-full.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifndef RAZOR_BUILD_INFO
#define RAZOR_BUILD_INFO "unknown"
#endif

static thread_local std::string razor_last_error;

void llama_razor_error_set(const std::string & msg) {
    razor_last_error = msg;

    // texts of a file can be part of it, and what is shown to people is one line
    for (char & c : razor_last_error) {
        if (c < ' ' || c > '~') {
            c = '?';
        }
    }
}

[[noreturn]] static void razor_refuse(const std::string & msg) {
    llama_razor_error_set(msg);

    throw std::runtime_error("razor: " + msg);
}

static bool razor_is_disabled() {
    const char * env = getenv(LLAMA_RAZOR_DISABLE_ENV);

    return env && strcmp(env, "") != 0 && strcmp(env, "0") != 0;
}

//
// profile
//

static std::string razor_type_name(const gguf_context * ctx, int64_t id) {
    const gguf_type type = gguf_get_kv_type(ctx, id);

    if (type == GGUF_TYPE_ARRAY) {
        return format("%s[%zu]", gguf_type_name(gguf_get_arr_type(ctx, id)), gguf_get_arr_n(ctx, id));
    }

    return gguf_type_name(type);
}

static int64_t razor_find(const gguf_context * ctx, const char * key, const std::string & expected, bool required) {
    const int64_t id = gguf_find_key(ctx, key);

    if (id < 0 && required) {
        razor_refuse(format("the model has razor metadata without %s, expected %s; convert the model again", key, expected.c_str()));
    }

    return id;
}

static void razor_check_type(const gguf_context * ctx, int64_t id, const char * key, const std::string & expected) {
    const std::string found = razor_type_name(ctx, id);

    if (found != expected) {
        razor_refuse(format("%s is %s, expected %s; convert the model again", key, found.c_str(), expected.c_str()));
    }
}

static void razor_check_range(const char * key, uint32_t val, uint32_t min, uint32_t max) {
    if (val < min || val > max) {
        razor_refuse(format("%s is %u, expected %u to %u", key, val, min, max));
    }
}

static uint32_t razor_get_u32(const gguf_context * ctx, const char * key, uint32_t min, uint32_t max) {
    const int64_t id = razor_find(ctx, key, "u32", true);
    razor_check_type(ctx, id, key, "u32");

    const uint32_t val = gguf_get_val_u32(ctx, id);
    razor_check_range(key, val, min, max);

    return val;
}

static void razor_check_mask(const std::vector<uint8_t> & mask) {
    for (size_t i = 0; i < mask.size(); ++i) {
        if (mask[i] > 1) {
            razor_refuse(format("razor.head.retrieval[%zu] is %u, expected 0 or 1; convert the model again", i, mask[i]));
        }
    }
}

static void razor_check_scores(const gguf_context * ctx, int64_t id, const char * key) {
    const float * data = (const float *) gguf_get_arr_data(ctx, id);

    for (size_t i = 0; i < gguf_get_arr_n(ctx, id); ++i) {
        if (!std::isfinite(data[i])) {
            razor_refuse(format("%s[%zu] is %f, expected a finite number; convert the model again", key, i, data[i]));
        }
    }
}

static bool razor_is_head_key(const char * key) {
    for (const char * known : { "retrieval", "echo_score", "induction_score", "scope" }) {
        if (strcmp(key + strlen("razor.head."), known) == 0) {
            return true;
        }
    }

    return false;
}

static size_t razor_n_kv_heads(const llama_hparams & hparams) {
    size_t res = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res += hparams.n_head_kv(il);
    }

    return res;
}

static size_t razor_n_heads(const llama_hparams & hparams) {
    size_t res = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res += hparams.n_head(il);
    }

    return res;
}

static constexpr uint32_t RAZOR_VERSION         = 1;
static constexpr uint32_t RAZOR_MAX_SINK_TOKENS = 4096;
static constexpr uint32_t RAZOR_MAX_WINDOW      = 1u << 30;

std::shared_ptr<const llama_razor_profile> llama_razor_profile_load(const gguf_context * ctx, const llama_hparams & hparams) {
    llama_razor_error_set("");

    if (razor_is_disabled()) {
        return nullptr;
    }

    bool any = false;
    const char * unknown = nullptr;

    for (int64_t id = 0; id < gguf_get_n_kv(ctx); ++id) {
        const char * key = gguf_get_key(ctx, id);

        any = any || strncmp(key, "razor.", 6) == 0;

        if (strncmp(key, "razor.head.", 11) == 0 && !razor_is_head_key(key)) {
            unknown = key;
        }
    }

    if (!any) {
        return nullptr;
    }

    const int64_t id_version = razor_find(ctx, "razor.version", "u32", true);
    razor_check_type(ctx, id_version, "razor.version", "u32");

    const uint32_t version = gguf_get_val_u32(ctx, id_version);
    if (version != RAZOR_VERSION) {
        razor_refuse(format("razor.version is %u and this library knows version %u; update it or convert the model again", version, RAZOR_VERSION));
    }

    // whatever is said about heads changes what they keep
    if (unknown) {
        razor_refuse(format("unknown key %.64s, made by a newer version; update this library or convert the model again", unknown));
    }

    const int64_t id_method = razor_find(ctx, "razor.method", "str", true);
    razor_check_type(ctx, id_method, "razor.method", "str");

    const std::string method = gguf_get_val_str(ctx, id_method);
    if (method != "rope" && method != "alibi") {
        razor_refuse(format("razor.method is '%.32s', expected 'rope' or 'alibi'", method.c_str()));
    }

    auto res = std::make_shared<llama_razor_profile>();

    res->alibi = method == "alibi";

    res->sink_tokens    = razor_get_u32(ctx, "razor.sink_tokens",    0, RAZOR_MAX_SINK_TOKENS);
    res->window_min     = razor_get_u32(ctx, "razor.window_min",     1, RAZOR_MAX_WINDOW);
    res->window_divisor = razor_get_u32(ctx, "razor.window_divisor", 0, RAZOR_MAX_WINDOW);

    const int64_t id_comp = razor_find(ctx, "razor.compensation", "bool", true);
    razor_check_type(ctx, id_comp, "razor.compensation", "bool");
    res->compensation = gguf_get_val_bool(ctx, id_comp);

    const size_t n_kv_heads = razor_n_kv_heads(hparams);

    const std::string type_mask = format("u8[%zu]", n_kv_heads);

    const int64_t id_mask = razor_find(ctx, "razor.head.retrieval", type_mask, true);
    razor_check_type(ctx, id_mask, "razor.head.retrieval", type_mask);

    const uint8_t * mask = (const uint8_t *) gguf_get_arr_data(ctx, id_mask);
    res->retrieval.assign(mask, mask + n_kv_heads);
    razor_check_mask(res->retrieval);

    // not used here, but a file that has them wrong was not written by the converter
    for (const char * key : { "razor.head.echo_score", "razor.head.induction_score" }) {
        const int64_t id = razor_find(ctx, key, "", false);
        if (id >= 0) {
            razor_check_type(ctx, id, key, format("f32[%zu]", razor_n_heads(hparams)));
            razor_check_scores(ctx, id, key);
        }
    }

    const int64_t id_scope = razor_find(ctx, "razor.head.scope", "", false);
    if (id_scope >= 0) {
        razor_check_type(ctx, id_scope, "razor.head.scope", format("u32[%zu]", n_kv_heads));
    }

    return res;
}

//
// override
//

static thread_local std::unique_ptr<const llama_razor_profile> razor_override;

bool llama_razor_set_override(const llama_razor_params * params) {
    llama_razor_error_set("");

    if (!params) {
        razor_override.reset();

        return true;
    }

    try {
        if (params->size != sizeof(llama_razor_params)) {
            razor_refuse(format("llama_razor_params has %u bytes, expected %zu: header and library do not match", params->size, sizeof(llama_razor_params)));
        }

        auto res = std::make_unique<llama_razor_profile>();

        res->enabled       = params->enabled != 0;
        res->own_attention = params->own_attention != 0;

        if (res->enabled) {
            razor_check_range("sink_tokens",    params->sink_tokens,    0, RAZOR_MAX_SINK_TOKENS);
            razor_check_range("window",         params->window,         0, RAZOR_MAX_WINDOW);
            razor_check_range("window_min",     params->window_min,     params->window > 0 ? 0 : 1, RAZOR_MAX_WINDOW);
            razor_check_range("window_divisor", params->window_divisor, 0, RAZOR_MAX_WINDOW);
            razor_check_range("compensation",   params->compensation,   0, 1);
            razor_check_range("n_retrieval",    params->n_retrieval,    0, LLAMA_MAX_LAYERS*4096u);

            res->sink_tokens    = params->sink_tokens;
            res->window         = params->window;
            res->window_min     = params->window_min;
            res->window_divisor = params->window_divisor;
            res->compensation   = params->compensation != 0;

            if (params->n_retrieval > 0) {
                if (!params->retrieval) {
                    razor_refuse("n_retrieval is set and retrieval is NULL");
                }

                res->retrieval.assign(params->retrieval, params->retrieval + params->n_retrieval);
                razor_check_mask(res->retrieval);
            }
        }

        razor_override = std::move(res);
    } catch (const std::exception &) {
        return false;
    }

    return true;
}

//
// plan
//

// why razor cannot run, "" if it can
static std::string razor_unsupported(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    // architectures whose attention is not one plain causal attention per layer over build_attn(llm_graph_input_attn_kv)
    switch (model.arch) {
        case LLM_ARCH_NANBEIGE:
        case LLM_ARCH_HRM_TEXT:
            return "models that run their layers in a loop";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
            return "draft models";
        case LLM_ARCH_GRANITE_SWITCH:
        case LLM_ARCH_COGVLM:
        case LLM_ARCH_POCKETTTS:
            return std::string("architecture ") + llm_arch_name(model.arch);
        default:
            break;
    }

    if (llm_arch_is_recurrent(model.arch))               { return "recurrent models"; }
    if (llm_arch_is_hybrid(model.arch))                  { return "hybrid (attention + recurrent) models"; }
    if (hparams.is_mla())                                { return "multi-head latent attention (MLA)"; }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE)         { return "sliding window attention (iSWA)"; }
    if (hparams.indexer_head_size > 0)                   { return "sparse attention with an indexer"; }
    if (hparams.use_alibi)                               { return "ALiBi"; }
    if (hparams.n_pos_per_embd() > 1)                    { return "M-RoPE"; }
    if (!hparams.causal_attn || !cparams.causal_attn)    { return "non-causal attention (encoders)"; }
    if (hparams.dec_n_layer > 0 || hparams.n_rel_attn_bkts > 0) { return "encoder-decoder models"; }
    if (hparams.n_layer_kv_from_start >= 0)              { return "layers that share a KV cache"; }
    if (hparams.ple_n_heads > 0)                         { return "n-gram embeddings"; }
    if (cparams.n_seq_max > 1)                           { return "more than one sequence (n_seq_max > 1)"; }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT)   { return "draft (MTP) contexts"; }
    if (params.mem_other)                                { return "a cache that is shared with another context"; }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR)   { return "split mode 'tensor'"; }

    return "";
}

static llama_razor_plan razor_make_plan(const llama_razor_profile & profile, const std::vector<uint8_t> & mask, const llama_hparams & hparams, uint32_t n_ctx) {
    llama_razor_plan res;

    uint64_t window = profile.window;
    if (window == 0) {
        window = std::max<uint64_t>(profile.window_min, profile.window_divisor > 0 ? n_ctx/profile.window_divisor : 0);
    }

    uint32_t block = 64;
    while (block < 512 && 2*block <= window/4) {
        block *= 2;
    }

    const uint64_t n_comp = profile.compensation ? llama_razor_plan::N_COMP : 0;
    const uint64_t cells  = (profile.sink_tokens + n_comp + window + block + LLAMA_RAZOR_SLACK + 255)/256*256;

    res.n_ctx       = n_ctx;
    res.sink_tokens = profile.sink_tokens;
    res.window      = window;
    res.block       = block;
    res.n_comp      = n_comp;
    res.cells       = std::min<uint64_t>(cells, UINT32_MAX);

    size_t i = 0;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        std::vector<uint32_t> retrieval;
        std::vector<uint32_t> local;

        for (uint32_t h = 0; h < hparams.n_head_kv(il); ++h) {
            (mask[i++] ? retrieval : local).push_back(h);
        }

        res.retrieval.push_back(std::move(retrieval));
        res.local    .push_back(std::move(local));
    }

    return res;
}

// the scheduler ends the process when it meets a tensor that is too large for the device whose memory it lies in
static void razor_check_tensor(ggml_backend_dev_t dev, ggml_type type, uint64_t n_embd, uint64_t n_rows) {
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
        razor_refuse(format("one layer of the KV cache would have a tensor of %.1f MiB, which %s cannot hold in one piece; use a smaller context or KV type",
                    ggml_nbytes(t)/1024.0/1024.0, ggml_backend_dev_name(dev)));
    }
}

// plan: nullptr for upstream's own cache
static void razor_check_tensors(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const llama_razor_plan * plan) {
    const auto & hparams = model.hparams;

    // caches of another layout are left to upstream
    if (!cparams.offload_kqv || llm_arch_is_recurrent(model.arch) || hparams.swa_type != LLAMA_SWA_TYPE_NONE ||
            hparams.indexer_head_size > 0 || model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return;
    }

    const uint64_t n_stream = cparams.kv_unified ? 1 : cparams.n_seq_max;

    uint64_t n_widest = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        n_widest = std::max<uint64_t>(n_widest, hparams.n_head_kv(il));
    }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }

        const uint64_t d_k = hparams.n_embd_head_k(il);
        const uint64_t d_v = hparams.is_mla() ? 0 : hparams.n_embd_head_v(il);

        ggml_backend_dev_t dev = model.dev_layer(il);

        if (plan) {
            const uint64_t n_rows = plan->retrieval[il].size()*plan->n_ctx + plan->local[il].size()*plan->cells;

            razor_check_tensor(dev, params.type_k, d_k, n_stream*n_rows);
            razor_check_tensor(dev, params.type_v, d_v, n_stream*n_rows);
        } else {
            razor_check_tensor(dev, params.type_k, hparams.n_head_kv(il)*d_k,                           n_stream*cparams.n_ctx_seq);
            razor_check_tensor(dev, params.type_v, (cparams.flash_attn ? hparams.n_head_kv(il) : n_widest)*d_v, n_stream*cparams.n_ctx_seq);
        }
    }
}

// the plan of a context that is created now, nullptr: upstream's own cache
static std::unique_ptr<llama_razor_plan> razor_choose_plan(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (razor_is_disabled()) {
        return nullptr;
    }

    const llama_razor_profile * profile = razor_override ? razor_override.get() : model.razor.get();
    if (!profile || !profile->enabled) {
        return nullptr;
    }

    const auto & hparams = model.hparams;

    const std::string unsupported = razor_unsupported(model, params, cparams);
    if (!unsupported.empty()) {
        razor_refuse(format("%s: %s not supported, switch razor off to use the full cache", llm_arch_name(model.arch), unsupported.c_str()));
    }

    const std::vector<uint8_t> * mask = &profile->retrieval;
    if (mask->empty()) {
        if (!model.razor) {
            razor_refuse("the model has no razor metadata and no retrieval heads were given");
        }
        mask = &model.razor->retrieval;
    }

    // such a model loads, to be run with razor off
    if (mask == &profile->retrieval ? profile->alibi : model.razor->alibi) {
        razor_refuse("razor.method is 'alibi', and only 'rope' can be run, switch razor off to use the full cache");
    }

    if (mask->size() != razor_n_kv_heads(hparams)) {
        razor_refuse(format("the mask of retrieval heads has %zu entries, the model has %zu KV heads in %u layers",
                    mask->size(), razor_n_kv_heads(hparams), hparams.n_layer()));
    }

    llama_razor_plan plan = razor_make_plan(*profile, *mask, hparams, cparams.n_ctx_seq);

    const bool any_local = std::any_of(plan.local.begin(), plan.local.end(), [](const auto & l) { return !l.empty(); });

    if (!any_local || plan.cells >= plan.n_ctx) {
        LLAMA_LOG_INFO("razor: nothing would be saved at a context of %u tokens, using the full cache\n", plan.n_ctx);

        return nullptr;
    }

    return std::make_unique<llama_razor_plan>(std::move(plan));
}

static bool razor_wants_own_attention(const llama_model & model) {
    if (razor_is_disabled()) {
        return false;
    }

    return razor_override ? razor_override->own_attention : model.razor && model.razor->enabled;
}

llama_memory_i * llama_razor_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    llama_razor_error_set("");

    const auto plan = razor_choose_plan(model, params, cparams);

    razor_check_tensors(model, params, cparams, plan.get());

    if (!plan) {
        if (!razor_wants_own_attention(model) || !razor_unsupported(model, params, cparams).empty()) {
            return nullptr;
        }
        try {
            return llama_razor_create_full(model, params, cparams);
        } catch (const std::runtime_error & err) {
            razor_refuse(err.what());
        }
    }

    razor_attn_kernel attn = nullptr;
    razor_device_choice device = RAZOR_DEVICE_ON;
    try {
        attn   = razor_attn_choose();
        device = razor_device_wanted();
    } catch (const std::exception & err) {
        razor_refuse(err.what());
    }

    return new llama_kv_cache_razor(model, cparams, std::move(*plan), params.type_k, params.type_v, attn, device);
}

bool llama_razor_abort(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0) {
    auto * kv = dynamic_cast<llama_kv_cache_razor *>(memory);
    if (!kv) {
        return false;
    }

    kv->abort_ubatch(seq_id, p0);

    return true;
}

uint32_t llama_razor_n_nodes(const llama_memory_i * memory) {
    const auto * kv = dynamic_cast<const llama_kv_cache_razor *>(memory);

    // per layer: 3 gathers, 3 stores of up to 6 nodes, an attention without flash attention (about 16), 2 folds of 15
    return kv ? 80*kv->get_plan().local.size() : 0;
}

//
// C API
//

uint32_t llama_razor_api_version(void) {
    return LLAMA_RAZOR_API_VERSION;
}

const char * llama_razor_build_info(void) {
    return RAZOR_BUILD_INFO;
}

const char * llama_razor_last_error(void) {
    return razor_last_error.c_str();
}

uint32_t llama_razor_model_layers(const llama_model * model, uint32_t * n_head_kv, uint32_t n_max) {
    const uint32_t n_layer = model->hparams.n_layer();

    for (uint32_t il = 0; n_head_kv && il < std::min(n_layer, n_max); ++il) {
        n_head_kv[il] = model->hparams.n_head_kv(il);
    }

    return n_layer;
}

static const llama_kv_cache_razor * razor_get(const llama_context * ctx) {
    return dynamic_cast<const llama_kv_cache_razor *>(ctx->get_memory());
}

template<typename T>
static bool razor_check_size(const T * stats, const char * name) {
    llama_razor_error_set("");

    if (stats->size != sizeof(T)) {
        llama_razor_error_set(format("%s has %u bytes, expected %zu: header and library do not match", name, stats->size, sizeof(T)));

        return false;
    }

    return true;
}

bool llama_razor_get_stats(const llama_context * ctx, llama_razor_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_stats")) {
        return false;
    }

    const auto & model = ctx->get_model();

    llama_razor_stats res = {};

    res.size     = sizeof(res);
    res.n_ctx    = ctx->get_cparams().n_ctx_seq;
    res.n_layer  = model.hparams.n_layer();
    res.n_stream = ctx->get_cparams().kv_unified ? 1 : ctx->get_cparams().n_seq_max;

    const auto * memory = ctx->get_memory();
    if (memory) {
        for (const auto & [_, size] : memory->memory_breakdown()) {
            res.kv_bytes += size;
        }
    }

    res.own_attention = dynamic_cast<const llama_kv_cache_full *>(memory) != nullptr;

    if (const auto * kv = razor_get(ctx)) {
        const auto & plan = kv->get_plan();

        res.active             = 1;
        res.n_stream           = kv->get_n_stream();
        res.sink_tokens        = plan.sink_tokens;
        res.window             = plan.window;
        res.block              = plan.block;
        res.cells              = plan.cells;
        res.compensation       = plan.n_comp > 0;
        res.type_k             = kv->get_type_k();
        res.type_v             = kv->get_type_v();
        res.n_buffers          = kv->bufs().size();

        for (uint32_t il = 0; il < plan.local.size(); ++il) {
            const auto & layer = kv->get_layer(il);
            res.own_attention |= layer.attn && ctx->get_cparams().flash_attn;
            for (const auto * t : { layer.k, layer.v, layer.k_sum, layer.v_sum }) {
                res.kv_bytes_local += t ? ggml_nbytes(t) : 0;
            }
            for (const auto * t : { layer.k, layer.v }) {
                const uint64_t bytes = t ? kv->local_row(layer, 0)*t->nb[1]*t->ne[2] : 0;
                res.kv_bytes_local     -= bytes;
                res.kv_bytes_retrieval += bytes;
            }
        }
    }

    *stats = res;

    return true;
}

bool llama_razor_get_layer(const llama_context * ctx, uint32_t il, llama_razor_layer_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_layer_stats")) {
        return false;
    }

    const auto * kv = razor_get(ctx);
    if (!kv || il >= kv->get_plan().local.size()) {
        llama_razor_error_set(kv ? format("layer %u of %zu", il, kv->get_plan().local.size()) : "razor is not active in this context");

        return false;
    }

    llama_razor_layer_stats res = {};

    res.size        = sizeof(res);
    res.n_retrieval = kv->get_plan().retrieval[il].size();
    res.n_local     = kv->get_plan().local[il].size();
    res.n_head_kv   = res.n_retrieval + res.n_local;

    const auto & layer = kv->get_layer(il);

    res.bytes_k    = layer.k     ? ggml_nbytes(layer.k) : 0;
    res.bytes_v    = layer.v     ? ggml_nbytes(layer.v) : 0;
    res.bytes_sums = layer.k_sum ? ggml_nbytes(layer.k_sum) + ggml_nbytes(layer.v_sum) : 0;

    *stats = res;

    return true;
}

bool llama_razor_get_seq(const llama_context * ctx, llama_seq_id seq_id, llama_razor_seq_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_seq_stats")) {
        return false;
    }

    const auto * kv = razor_get(ctx);
    if (!kv || seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {
        llama_razor_error_set(kv ? format("sequence %d of %u", seq_id, kv->get_n_seq_max()) : "razor is not active in this context");

        return false;
    }

    const uint32_t strm = kv->get_stream(seq_id);

    llama_razor_seq_stats res = {};

    res.size       = sizeof(res);
    res.n_tokens   = kv->n_tokens(strm);
    res.frontier   = kv->get_state(strm).frontier;
    res.n_folded   = res.frontier - kv->get_plan().sink_tokens;
    res.n_rollback = kv->n_rollback(strm);

    *stats = res;

    return true;
}

bool llama_razor_get_buffer(const llama_context * ctx, uint32_t i, llama_razor_buffer_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_buffer_stats")) {
        return false;
    }

    const auto * kv = razor_get(ctx);

    const uint32_t n_buffers = kv ? kv->bufs().size() : 0;

    if (i >= n_buffers) {
        llama_razor_error_set(kv ? format("buffer %u of %u", i, n_buffers) : "razor is not active in this context");

        return false;
    }

    ggml_backend_buffer_t buf = kv->bufs()[i].second.get();

    llama_razor_buffer_stats res = {};

    res.size  = sizeof(res);
    res.bytes = ggml_backend_buffer_get_size(buf);
    snprintf(res.name, sizeof(res.name), "%s", ggml_backend_buffer_name(buf));

    *stats = res;

    return true;
}

bool llama_razor_get_memory(const llama_context * ctx, uint32_t i, llama_razor_memory * memory) {
    if (!razor_check_size(memory, "llama_razor_memory")) {
        return false;
    }

    const auto breakdown = llama_get_memory_breakdown(ctx);

    if (i >= breakdown.size()) {
        llama_razor_error_set(format("buffer type %u of %zu", i, breakdown.size()));

        return false;
    }

    const auto & [buft, data] = *std::next(breakdown.begin(), i);

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    llama_razor_memory res = {};

    res.size    = sizeof(res);
    res.is_host = !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || ggml_backend_buft_is_host(buft);
    res.weights = data.model;
    res.cache   = data.context;
    res.compute = data.compute;
    snprintf(res.name,   sizeof(res.name),   "%s", ggml_backend_buft_name(buft));
    snprintf(res.device, sizeof(res.device), "%s", dev ? ggml_backend_dev_name(dev) : "");

    *memory = res;

    return true;
}
