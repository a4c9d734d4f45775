#include "llama-razor-prefill.h"

#include "llama-memory-razor.h"
#include "llama-razor-error.h"
#include "llama-razor-source.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

//
// llama_razor_prefill
//

// return the index of the node with the hidden states after a layer, -1 if it is missing
static int razor_find_states(ggml_cgraph * gf, uint32_t il, int64_t n_embd, int64_t n_tokens) {
    const std::string name = format("l_out-%u", il);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);

        if (name == t->name) {
            const bool fits = t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && t->ne[0] == n_embd && t->ne[1] == n_tokens && ggml_nrows(t) == n_tokens;

            return fits ? i : -1;
        }
    }

    return -1;
}

std::string llama_razor_prefill::find_unsupported(llama_context & ctx, const llama_kv_cache_razor * kv) {
    const auto & model = ctx.get_model();

    if (!kv) {
        return llama_razor_get_cache(ctx.get_memory()) ? "models with sliding windows or recurrent layers cannot read prompts with full attention" :
            "razor is not active in this context";
    }

    const uint32_t n_layer  = model.hparams.n_layer();
    const uint32_t n_tokens = std::min(ctx.get_cparams().n_ubatch, 2u);

    const auto mctx = ctx.get_memory()->init_full();

    ggml_cgraph * gf = ctx.graph_reserve(n_tokens, 1, 1, mctx.get(), true);

    for (uint32_t il = 0; gf && il + 1 < n_layer; ++il) {
        if (kv->get_source(il) != (int32_t) il || razor_find_states(gf, il, model.hparams.n_embd, n_tokens) < 0) {
            return format("%s models cannot read a prompt one layer at a time", llm_arch_name(model.arch));
        }
    }

    return gf ? "" : "out of memory";
}

bool llama_razor_prefill::is_useful(const llama_kv_cache_razor & kv, const std::vector<llama_ubatch> & ubatches) {
    const auto & plan = kv.get_plan();

    // local heads attend to the tokens of their own ubatch anyway
    const llama_ubatch & first = ubatches.front();
    const llama_ubatch & last  = ubatches.back();

    if (first.n_seqs_unq != 1 || first.seq_id[0][0] != last.seq_id[0][0] || plan.frontier_end(first.pos[0]) > (uint32_t) last.pos[0]) {
        return false;
    }

    // the layers read batches of several sequences together, as usual
    if (std::any_of(ubatches.begin(), ubatches.end(), [&](const auto & u) { return u.n_seqs_unq != 1 || u.seq_id[0][0] != first.seq_id[0][0]; })) {
        return false;
    }

    return plan.groups.back().frontier(last.pos[0]) > plan.sink_tokens;
}

llama_razor_prefill::llama_razor_prefill(
        llama_kv_cache_razor * kv,
        llama_kv_cache::slot_info_vec_t sinfos_in,
        std::vector<llama_ubatch> ubatches_in) :
    kv(kv), sinfos(std::move(sinfos_in)), ubatches(std::move(ubatches_in)) {

    strm = kv->get_stream(ubatches.front().seq_id[0][0]);
    pos0 = ubatches.front().pos[0];
    past = kv->get_state(strm);

    const auto & plan = kv->get_plan();

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        llama_kv_cache_razor::group_step step;

        step.frontier = plan.groups[g].frontier(pos0);
        step.slot     = past.groups[g].slot ^ (step.frontier > past.groups[g].frontier ? 1 : 0);

        steps_past.push_back(step);

        n_past = pos0 > 0 ? std::max(n_past, n_used(g)) : 0;
    }

    const llama_ubatch & last = ubatches.back();

    cells = GGML_PAD(n_past + last.pos[last.n_tokens - 1] + 1 - pos0, 256);

    kv->save_cells(strm, cells_past, head_past);

    init_states();

    // allocate the rows of the first layer with local heads, to fail before anything is computed
    while (kv->get_layer(il).n_local == 0) {
        il++;
    }
    init_rows();
}

llama_razor_prefill::~llama_razor_prefill() {
    kv->synchronize();
    kv->prefill_done = 0.0f;

    llama_razor_reset_plan(*kv);
}

void llama_razor_reset_plan(const llama_kv_cache_razor & kv) {
    if (!kv.get_sched()) {
        return;
    }

    uint8_t buf[16*1024];

    ggml_init_params params = {
        /*.mem_size   =*/ sizeof(buf),
        /*.mem_buffer =*/ buf,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx(ggml_init(params));

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 4, false);

    ggml_build_forward_expand(gf, ggml_dup(ctx.get(), ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1)));

    ggml_backend_sched_reserve(kv.get_sched(), gf);
}

size_t llama_razor_prefill::n_bytes() const {
    size_t res = 0;
    for (const auto * buf : { &buf_states, &buf_rows }) {
        res += *buf ? ggml_backend_buffer_get_size(buf->get()) : 0;
    }

    return res;
}

static ggml_context_ptr razor_new_context(size_t n_tensors) {
    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr res(ggml_init(params));
    if (!res) {
        throw std::bad_alloc();
    }

    return res;
}

void llama_razor_prefill::init_states() {
    const auto & model = kv->get_model();

    const int64_t n_tokens = ubatches.back().pos[ubatches.back().n_tokens - 1] + 1 - pos0;

    ctx_states = razor_new_context(1);

    states = ggml_new_tensor_2d(ctx_states.get(), GGML_TYPE_F32, model.hparams.n_embd, n_tokens);
    ggml_set_name(states, "razor_prefill_states");

    buf_states.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_states.get(), ggml_backend_dev_buffer_type(model.dev_layer(0))));
    if (!buf_states) {
        throw std::bad_alloc();
    }
}

// the layers use the rows one after the other, so they are allocated again only if their type, size or device differs
void llama_razor_prefill::init_rows() {
    const auto & layer = kv->get_layer(il);

    if (layer.n_local == 0) {
        return;
    }

    const int64_t n_rows = (int64_t) cells*(layer.n_retrieval + layer.n_local);

    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer.k_local->buffer);

    auto fits = [&](const ggml_tensor * rows, const ggml_tensor * cache) {
        return rows && rows->type == cache->type && rows->ne[0] == cache->ne[0] && rows->ne[1] == n_rows;
    };

    if (fits(k, layer.k_local) && fits(v, layer.v_local) && ggml_backend_buffer_get_type(buf_rows.get()) == buft) {
        return;
    }

    kv->synchronize();

    buf_rows.reset();

    ctx_rows = razor_new_context(2);

    k = ggml_new_tensor_2d(ctx_rows.get(), layer.k_local->type, layer.k_local->ne[0], n_rows);
    v = ggml_new_tensor_2d(ctx_rows.get(), layer.v_local->type, layer.v_local->ne[0], n_rows);

    ggml_set_name(k, "razor_prefill_k");
    ggml_set_name(v, "razor_prefill_v");

    buf_rows.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_rows.get(), buft));
    if (!buf_rows) {
        k = v = nullptr;

        throw std::bad_alloc();
    }

    // cells that are not in use must not contain NaNs
    ggml_backend_buffer_clear(buf_rows.get(), 0);
}

llama_memory_context_ptr llama_razor_prefill::start_layer(const std::shared_ptr<llama_razor_prefill> & prefill, uint32_t il) {
    auto & self = *prefill;

    if (il > 0) {
        self.kv->restore(self.strm, self.cells_past, self.head_past, self.past);
    }

    self.il = il;
    self.init_rows();

    self.kv->prefill_count += il == 0;
    self.kv->prefill_bytes = std::max<uint64_t>(self.kv->prefill_bytes, self.n_bytes());

    return std::make_unique<llama_kv_cache_razor_context>(self.kv, self.sinfos, self.ubatches, prefill);
}

ggml_cgraph * llama_razor_prefill::cut_graph(llm_graph_result * res, const llama_ubatch & ubatch) {
    ggml_cgraph * gf = res->get_gf();

    const uint32_t n_layer = kv->get_model().hparams.n_layer();

    kv->prefill_done = (il + (float) (ubatch.pos[0] - pos0)/states->ne[1])/n_layer;

    const int      n_nodes = ggml_graph_n_nodes(gf);

    // 1. find the tensors before and after the layer
    const bool is_first = il == 0;
    const bool is_last  = il + 1 == n_layer;

    const int i_inp = is_first ? -1          : razor_find_states(gf, il - 1, states->ne[0], ubatch.n_tokens);
    const int i_out = is_last  ? n_nodes - 1 : razor_find_states(gf, il,     states->ne[0], ubatch.n_tokens);

    bool found = (is_first || i_inp >= 0) && i_inp < i_out;

    // 2. take the input of the layer from the states
    std::vector<ggml_tensor *> nodes;
    for (int i = i_inp + 1; found && i <= i_out; ++i) {
        nodes.push_back(ggml_graph_node(gf, i));
    }

    const size_t offs = (ubatch.pos[0] - pos0)*states->nb[1];

    if (found && !is_first) {
        ggml_tensor * inp = ggml_graph_node(gf, i_inp);

        inp->op = GGML_OP_NONE;
        std::fill(std::begin(inp->src), std::end(inp->src), nullptr);

        inp->view_src  = states;
        inp->view_offs = offs;
        inp->buffer    = nullptr;
        ggml_backend_view_init(inp);
    }

    // 3. build the graph of the layer
    ggml_cgraph * cut = llama_razor_cut_graph(res, nodes, ctx_graph);
    if (!cut) {
        return nullptr;
    }

    const std::unordered_set<const ggml_tensor *> own(nodes.begin(), nodes.end());

    // 4. nodes of other layers are computed again, so they must not read a cache
    for (int i = 0; i < ggml_graph_n_nodes(cut); ++i) {
        const ggml_tensor * node = ggml_graph_node(cut, i);

        if (own.count(node) == 0) {
            for (const ggml_tensor * t : node->src) {
                t = t && t->view_src ? t->view_src : t;

                found = found && !(t && t->buffer && t != states && kv->owns(t->buffer));
            }
        }
    }

    if (!found) {
        llama_razor_error_set(format("%s models cannot read a prompt one layer at a time", llm_arch_name(kv->get_model().arch)));

        return nullptr;
    }

    if (!is_last) {
        ggml_tensor * dst = ggml_view_2d(ctx_graph.get(), states, states->ne[0], ubatch.n_tokens, states->nb[1], offs);

        ggml_build_forward_expand(cut, ggml_cpy(ctx_graph.get(), ggml_graph_node(gf, i_out), dst));
    }

    return res->gf = cut;
}

ggml_cgraph * llama_razor_cut_graph(llm_graph_result * res, const std::vector<ggml_tensor *> & nodes, ggml_context_ptr & ctx) {
    ggml_cgraph * gf = res->get_gf();

    // 1. make a graph with room for a few more nodes of the caller
    const size_t n_max = res->get_max_nodes();

    ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_max, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    ctx.reset(ggml_init(params));
    if (!ctx) {
        llama_razor_error_set("out of memory");

        return nullptr;
    }

    ggml_cgraph * cut = ggml_new_graph_custom(ctx.get(), n_max, false);

    // 2. all inputs must be allocated, because upstream sets most of them even if the nodes do not read them; only the masks and razor's
    // own inputs are checked first
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        for (ggml_tensor * src : ggml_graph_node(gf, i)->src) {
            src = src && src->view_src ? src->view_src : src;

            if (src && (src->flags & GGML_TENSOR_FLAG_INPUT) && src->op == GGML_OP_NONE && strncmp(src->name, "razor_", 6) != 0) {
                ggml_build_forward_expand(cut, src);
            }
        }
    }

    // 3. add the nodes
    for (ggml_tensor * node : nodes) {
        if (node->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(cut, node);
        }
    }

    return cut;
}

//
// calls of upstream
//

int llama_razor_prefill_layers(
        llama_memory_context_ptr & mctx,
        const std::function<ggml_status(const llama_ubatch & ubatch)> & compute) {
    auto * first = dynamic_cast<llama_kv_cache_razor_context *>(mctx.get());

    const auto prefill = first ? first->get_shared_prefill() : nullptr;
    if (!prefill) {
        return 0;
    }

    const uint32_t n_layer = prefill->kv->get_model().hparams.n_layer();

    ggml_status status = GGML_STATUS_SUCCESS;

    try {
        for (uint32_t il = 0; il < n_layer; ++il) {
            mctx = llama_razor_prefill::start_layer(prefill, il);

            if (il + 1 == n_layer) {
                return 0;
            }

            do {
                status = compute(mctx->get_ubatch());
            } while (status == GGML_STATUS_SUCCESS && mctx->next());

            if (status != GGML_STATUS_SUCCESS) {
                break;
            }
        }
    } catch (const std::bad_alloc &) {
        llama_razor_error_set("out of memory for reading a prompt with full attention");

        status = GGML_STATUS_ALLOC_FAILED;
    }

    LLAMA_LOG_WARN("%s: layer %u was not read, clearing sequence %u\n", __func__, prefill->il, prefill->strm);

    prefill->kv->synchronize();
    prefill->kv->clear_stream(prefill->strm);

    return status == GGML_STATUS_ABORTED ? 2 : status == GGML_STATUS_ALLOC_FAILED ? -2 : -3;
}

bool llama_razor_prefill_is_on(const llama_memory_i * memory) {
    const auto * kv = dynamic_cast<const llama_kv_cache_razor *>(memory);

    return kv && (kv->full_prefill || kv->source);
}

ggml_cgraph * llama_razor_prefill_graph(llm_graph_result * res, const llama_memory_context_i * mctx, const llama_ubatch & ubatch) {
    const auto * ctx = dynamic_cast<const llama_kv_cache_razor_context *>(mctx);

    if (ctx && ctx->get_kv().source) {
        return ctx->get_kv().source->cut_graph(res);
    }

    return ctx && ctx->get_prefill() ? ctx->get_prefill()->cut_graph(res, ubatch) : res->get_gf();
}
