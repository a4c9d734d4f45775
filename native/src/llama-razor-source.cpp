#include "llama-razor-source.h"

#include "llama-razor-prefill.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

llama_razor_source::llama_razor_source(const llama_kv_cache_razor * kv, const llama_kv_cache_full * cache) : cache(cache), kv(kv) {
}

std::string llama_razor_source::find_unsupported(const llama_kv_cache_razor * kv, const llama_kv_cache_full * cache) {
    if (!kv) {
        return "razor is not active in this context, or its model has sliding windows or recurrent layers";
    }
    if (!cache) {
        return "the source is not a full cache in main memory with razor's attention";
    }
    if (kv->get_v_trans()) {
        return "without flash attention, keys and values cannot be taken from another cache";
    }

    const auto & plan = kv->get_plan();

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        const auto & layer = kv->get_layer(il);

        if (kv->get_source(il) != (int32_t) il || !cache->has_layer(il)) {
            return "layers that share a cache cannot take keys and values from another cache";
        }

        const auto * k = cache->get_k_rows(il);
        const auto * v = cache->get_v_rows(il);

        for (const ggml_tensor * t : std::initializer_list<const ggml_tensor *> { layer.k, layer.v, layer.k_local, layer.v_local, k, v }) {
            if (t && !ggml_backend_buffer_is_host(t->buffer)) {
                return "keys and values cannot be taken from or to a device";
            }
        }

        const int64_t n_head_kv = layer.n_retrieval + layer.n_local;

        const auto & hparams = kv->get_model().hparams;

        if (k->ne[0] != n_head_kv*hparams.n_embd_head_k(il) || v->ne[0] != n_head_kv*hparams.n_embd_head_v(il)) {
            return "the source belongs to a model with another attention shape";
        }
        if (k->type != plan.types.k || v->type != plan.types.v || k->type != plan.types_local.k || v->type != plan.types_local.v) {
            return "the source has other KV types";
        }
    }

    return "";
}

bool llama_razor_source::has(const std::vector<llama_ubatch> & ubatches) const {
    for (const auto & ubatch : ubatches) {
        if (ubatch.n_seqs_unq != 1 || cache->find_rows(ubatch.seq_id[0][0], ubatch.pos[0], ubatch.pos[0] + ubatch.n_tokens).empty()) {
            return false;
        }
    }

    return true;
}

ggml_cgraph * llama_razor_source::cut_graph(llm_graph_result * res) {
    std::vector<ggml_tensor *> nodes;

    for (int i = 0; i < ggml_graph_n_nodes(res->get_gf()); ++i) {
        ggml_tensor * node = ggml_graph_node(res->get_gf(), i);

        if (node->op == GGML_OP_SET_ROWS && kv->owns(node->view_src->buffer)) {
            nodes.push_back(node);
        }
    }

    ggml_cgraph * cut = llama_razor_cut_graph(res, nodes, ctx_graph);

    return cut ? res->gf = cut : nullptr;
}
