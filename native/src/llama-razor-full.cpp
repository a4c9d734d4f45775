#include "llama-razor-full.h"

#include "cpu/llama-razor-attn-op.h"
#include "llama-razor-pages.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <numeric>
#include <set>

//
// llama_kv_cache_full
//

llama_kv_cache_full::llama_kv_cache_full(
        const llama_model & model,
     const llama_cparams  & cparams,
                ggml_type   type_k,
                ggml_type   type_v,
        razor_attn_kernel   kernel) :
    llama_kv_cache(model, model.hparams, type_k, type_v, !cparams.flash_attn, cparams.offload_kqv, cparams.kv_unified,
            cparams.n_ctx_seq, cparams.n_seq_max, 1, model.hparams.n_swa, model.hparams.swa_type, nullptr, nullptr, nullptr, nullptr),
    kernel(kernel) {
    std::set<ggml_backend_buffer_t> bufs;

    for (const auto & layer : layers) {
        for (const ggml_tensor * t : { layer.k, layer.v }) {
            if (t) {
                bufs.insert(t->buffer);
            }
        }
    }
    for (ggml_backend_buffer_t buf : bufs) {
        razor_clear_in_huge_pages(buf);
    }
}

// same as llama_kv_cache::init_batch(), except for the class of the result
llama_memory_context_ptr llama_kv_cache_full::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool /* embd_all */) {
    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;

    for (auto ubatch = balloc.split_simple(n_ubatch); ubatch.n_tokens > 0; ubatch = balloc.split_simple(n_ubatch)) {
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() == balloc.get_n_tokens()) {
        auto sinfos = prepare(ubatches);

        if (!sinfos.empty()) {
            return std::make_unique<llama_kv_cache_full_context>(this, std::move(sinfos), std::move(ubatches));
        }
    }

    return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_full::init_full() {
    return std::make_unique<llama_kv_cache_full_context>(this);
}

std::vector<int32_t> llama_kv_cache_full::find_rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if ((uint32_t) seq_id >= n_seq_max) {
        return {};
    }

    const uint32_t strm  = seq_to_stream[seq_id];
    const auto &   cells = v_cells[strm];

    std::vector<int32_t> res(p1 - p0);

    size_t n_found = 0;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq_id) && cells.pos_get(i) >= p0 && cells.pos_get(i) < p1) {
            res[cells.pos_get(i) - p0] = strm*cells.size() + i;
            n_found++;
        }
    }

    if (n_found != res.size()) {
        res.clear();
    }

    return res;
}

llama_memory_i * llama_razor_create_full(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    if (!cparams.flash_attn || cparams.auto_fa || hparams.attn_soft_cap || hparams.n_layer_nextn > 0) {
        return nullptr;
    }

    bool any_host = false;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.n_head_kv(il) == 0) {
            continue;
        }
        if (!razor_attn_supported(params.type_k, params.type_v, hparams.n_embd_head_k(il), hparams.n_embd_head_v(il))) {
            return nullptr;
        }
        any_host = any_host || !cparams.offload_kqv || ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(model.dev_layer(il)));
    }

    const razor_attn_kernel kernel = razor_attn_choose_kernel();

    return any_host && kernel ? new llama_kv_cache_full(model, cparams, params.type_k, params.type_v, kernel) : nullptr;
}

//
// graph
//

// owns the parameters of the attention of one layer: it is an input of the graph only to live as long as the graph
class llm_graph_razor_attn : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * /* ubatch */) override {}

    bool can_reuse(const llm_graph_params & /* params */) override { return true; } // upstream's inputs decide

    razor_attn attn;

    std::vector<uint32_t> heads;
};

ggml_tensor * llama_razor_full_attn(
        const llm_graph_context & g,
        const llama_kv_cache_context * mctx,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_b,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
              float   kq_scale) {
    const auto * mctx_full = dynamic_cast<const llama_kv_cache_full_context *>(mctx);

    if (!mctx_full || kq_b || sinks || g.cparams.training || !g.cparams.flash_attn || k->ne[3] != 1) {
        return nullptr;
    }
    for (const ggml_tensor * t : { k, v }) {
        ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
        if (!buffer || !ggml_backend_buffer_is_host(buffer)) {
            return nullptr;
        }
    }

    auto * input = static_cast<llm_graph_razor_attn *>(g.res->add_input(std::make_unique<llm_graph_razor_attn>()));

    input->heads.resize(k->ne[1]);
    std::iota(input->heads.begin(), input->heads.end(), 0);

    razor_attn & attn = input->attn;

    attn.scale    = kq_scale;
    attn.kernel   = mctx_full->kernel;
    attn.slopes   = razor_attn_slopes(q->ne[1], g.hparams.f_max_alibi_bias);
    attn.n_gqa    = q->ne[1]/k->ne[1];
    attn.by_token = true;

    attn.groups.push_back({ &input->heads, kq_mask });

    ggml_tensor * cur = attn.build(g.ctx0, q, k, v);

    ggml_build_forward_expand(g.gf, cur);

    return cur;
}
