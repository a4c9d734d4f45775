#include "llama-razor.h"

#include "llama-memory-razor.h"
#include "llama-razor-error.h"
#include "llama-razor-full.h"
#include "llama-razor-prefill.h"
#include "llama-razor-source.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"

#include <algorithm>

#ifndef RAZOR_BUILD_INFO
#define RAZOR_BUILD_INFO "unknown"
#endif

uint32_t llama_razor_api_version(void) {
    return LLAMA_RAZOR_API_VERSION;
}

const char * llama_razor_build_info(void) {
    return RAZOR_BUILD_INFO;
}

uint32_t llama_razor_model_layers(const llama_model * model, uint32_t * n_head_kv, uint32_t n_max) {
    const uint32_t n_layer = model->hparams.n_layer();

    for (uint32_t il = 0; n_head_kv && il < std::min(n_layer, n_max); ++il) {
        n_head_kv[il] = llama_razor_n_head_kv(model->arch, model->hparams, il);
    }

    return n_layer;
}

static const llama_kv_cache_razor * razor_get_cache(const llama_context * ctx) {
    return llama_razor_get_cache(ctx->get_memory());
}

static uint64_t razor_get_bytes(const llama_memory_i * memory) {
    uint64_t res = 0;
    for (const auto & [_, size] : memory->memory_breakdown()) {
        res += size;
    }

    return res;
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
        res.kv_bytes = razor_get_bytes(memory);
    }

    const auto * parts  = dynamic_cast<const llama_memory_razor *>(memory);
    const auto * inner  = parts ? parts->get_memory() : memory;
    const auto * iswa   = dynamic_cast<const llama_kv_cache_iswa *>(inner);
    const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(inner);
    const auto * both   = dynamic_cast<const llama_memory_hybrid_iswa *>(inner);

    if (both) {
        iswa = both->get_mem_attn();
    }
    if (iswa) {
        res.kv_bytes_sliding = razor_get_bytes(iswa->get_swa());
    }
    if (hybrid || both) {
        res.kv_bytes_recurrent = razor_get_bytes(hybrid ? hybrid->get_mem_recr() : both->get_mem_recr());
    }

    res.own_attention = dynamic_cast<const llama_kv_cache_full *>(memory) != nullptr;

    if (const auto * kv = razor_get_cache(ctx)) {
        const auto & plan = kv->get_plan();

        res.active             = 1;
        res.n_stream           = kv->get_n_stream();
        res.sink_tokens        = plan.sink_tokens;
        res.window             = plan.groups[0].window;
        res.block              = plan.block;
        res.cells              = plan.groups[0].cells;
        res.compensation       = plan.n_comp > 0;
        res.type_k             = plan.types.k;
        res.type_v             = plan.types.v;
        res.type_k_local       = plan.types_local.k;
        res.type_v_local       = plan.types_local.v;
        res.n_buffers          = kv->bufs().size();

        res.n_windows = plan.groups.size();
        for (size_t g = 0; g < plan.groups.size(); ++g) {
            res.windows[g] = plan.groups[g].window;
        }

        if (const auto * rewind = kv->get_rewind()) {
            res.rewind       = rewind->get_params().mode;
            res.rewind_limit = rewind->get_params().limit;
            res.rewind_bytes = rewind->n_bytes();
            snprintf(res.rewind_failure, sizeof(res.rewind_failure), "%s", rewind->get_failure().c_str());
        }

        res.full_prefill  = kv->full_prefill;
        res.prefill_done  = kv->prefill_done;
        res.prefill_count = kv->prefill_count;
        res.prefill_bytes = kv->prefill_bytes;

        bool any_host   = false;
        bool all_host   = true;
        bool any_device = false;
        bool all_device = true;

        for (uint32_t il = 0; il < plan.n_layer(); ++il) {
            const auto & layer = kv->get_layer(il);
            if (layer.k && ggml_backend_buffer_is_host(layer.k->buffer)) {
                any_host = true;
                all_host = all_host && layer.attn && ctx->get_cparams().flash_attn;
            } else if (layer.k) {
                any_device = true;
                all_device = all_device && layer.device_token;
            }
            res.kv_bytes_local += kv->bytes_k(layer) + kv->bytes_v(layer) + kv->bytes_sums(layer);
            for (const auto * t : { layer.k, layer.v }) {
                const uint64_t bytes = t ? plan.n_rows_retrieval(il)*t->nb[1]*t->ne[2] : 0;
                res.kv_bytes_local     -= bytes;
                res.kv_bytes_retrieval += bytes;
            }
        }

        res.own_attention    = any_host   && all_host;
        res.device_attention = any_device && all_device;
    }

    *stats = res;

    return true;
}

bool llama_razor_set_full_prefill(llama_context * ctx, bool full) {
    llama_razor_error_set("");

    auto * kv = dynamic_cast<llama_kv_cache_razor *>(ctx->get_memory());

    const std::string why = full && !(kv && kv->can_prefill) ? llama_razor_prefill::find_unsupported(*ctx, kv) : "";
    if (!why.empty()) {
        llama_razor_error_set(why);

        return false;
    }

    if (kv) {
        kv->can_prefill  = kv->can_prefill || full;
        kv->full_prefill = full;
    }

    return true;
}

bool llama_razor_set_source(llama_context * ctx, llama_context * source) {
    llama_razor_error_set("");

    auto * kv = dynamic_cast<llama_kv_cache_razor *>(ctx->get_memory());

    if (!source) {
        if (kv && kv->source) {
            kv->source.reset();

            llama_razor_reset_plan(*kv);
        }

        return true;
    }

    const auto * cache = dynamic_cast<const llama_kv_cache_full *>(source->get_memory());

    const std::string why = llama_razor_source::find_unsupported(kv, cache);
    if (!why.empty()) {
        llama_razor_error_set(why);

        return false;
    }

    llama_synchronize(source);

    kv->source = std::make_unique<llama_razor_source>(kv, cache);

    return true;
}

bool llama_razor_get_layer(const llama_context * ctx, uint32_t il, llama_razor_layer_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_layer_stats")) {
        return false;
    }

    const auto * kv = razor_get_cache(ctx);
    if (!kv || il >= kv->get_plan().n_layer()) {
        llama_razor_error_set(kv ? format("layer %u of %u", il, kv->get_plan().n_layer()) : "razor is not active in this context");

        return false;
    }

    llama_razor_layer_stats res = {};

    res.size        = sizeof(res);
    res.n_retrieval = kv->get_plan().retrieval[il].size();
    res.n_local     = kv->get_plan().n_local(il);
    res.n_head_kv   = res.n_retrieval + res.n_local;

    const auto & layer = kv->get_layer(il);

    res.bytes_k    = kv->bytes_k(layer);
    res.bytes_v    = kv->bytes_v(layer);
    res.bytes_sums = kv->bytes_sums(layer);

    *stats = res;

    return true;
}

bool llama_razor_get_seq(const llama_context * ctx, llama_seq_id seq_id, llama_razor_seq_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_seq_stats")) {
        return false;
    }

    const auto * kv = razor_get_cache(ctx);
    if (!kv || seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {
        llama_razor_error_set(kv ? format("sequence %d of %u", seq_id, kv->get_n_seq_max()) : "razor is not active in this context");

        return false;
    }

    const uint32_t strm = kv->get_stream(seq_id);

    llama_razor_seq_stats res = {};

    res.size       = sizeof(res);
    res.n_tokens   = kv->n_tokens(strm);
    res.frontier   = kv->get_state(strm).groups.back().frontier;
    res.n_folded   = res.frontier - kv->get_plan().sink_tokens;

    const auto * parts = dynamic_cast<const llama_memory_razor *>(ctx->get_memory());

    res.n_rollback = parts ? parts->n_rollback(strm) : kv->n_rollback(strm);

    *stats = res;

    return true;
}

bool llama_razor_get_buffer(const llama_context * ctx, uint32_t i, llama_razor_buffer_stats * stats) {
    if (!razor_check_size(stats, "llama_razor_buffer_stats")) {
        return false;
    }

    const auto * kv = razor_get_cache(ctx);

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
