#include "llama-graph-razor.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <limits>

llm_graph_input_razor::llm_graph_input_razor(
        ggml_context * ctx,
        const llama_ubatch  & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_razor_context * mctx) :
    hparams(hparams), mctx(mctx), n_tokens(ubatch.n_tokens), n_kv_full(mctx->get_n_kv()), n_kv(mctx->get_step().n_kv),
    n_fold(mctx->get_step().n_fold) {

    const auto & kv   = mctx->get_kv();
    const auto & plan = kv.get_plan();

    auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
        ggml_tensor * res = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(res);
        ggml_set_name(res, name);

        return res;
    };

    // 1. find the orders of the heads and their offsets in the inputs
    init_orders();

    size_t n_rows  = 0;
    size_t n_heads = 0;

    for (auto & order : orders) {
        order.offs_rows = n_rows;
        n_rows += order.n_head_kv;

        if (!order.identity) {
            order.offs_q   = n_heads;
            order.offs_out = n_heads + order.n_head;
            order.offs_v   = n_heads + order.n_head*2;
            n_heads += order.n_head*2 + (kv.get_v_trans() ? order.n_head_kv : 0);
        }
    }

    // 2. rows and heads
    // ggml_set_rows() supports both types, but ggml-vulkan aborts on copies of I64; the operations of ggml-razor.h need I64
    bool any_device = false;
    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        any_device = any_device || kv.get_layer(il).device;
    }

    rows = input(any_device ? GGML_TYPE_I64 : GGML_TYPE_I32, n_rows*n_tokens, 1, "razor_inp_rows");

    if (n_heads > 0) {
        heads = input(GGML_TYPE_I32, n_heads*n_tokens, 1, "razor_inp_heads");
    }

    // 3. mask, flash attention requires F16
    mask = input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, n_tokens, "razor_inp_mask");

    // 4. elements and rows of transposed V caches
    uint32_t n_local_max = 0;
    bool     any_batch   = false;

    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        const auto & layer = kv.get_layer(il);

        n_local_max = std::max(n_local_max, layer.n_local);
        any_batch   = any_batch || layer.device_batch;

        if (kv.get_v_trans()) {
            const uint32_t n_elems = layer.n_retrieval*hparams.n_embd_head_v(il);
            if (n_elems > 0 && !v_elems[n_elems]) {
                v_elems[n_elems] = input(GGML_TYPE_I64, n_elems*n_tokens, 1, "razor_inp_v_elems");
            }
            if (layer.n_local > 0 && !v_rows[layer.n_local]) {
                v_rows[layer.n_local] = input(GGML_TYPE_I64, layer.n_local*n_tokens, 1, "razor_inp_v_rows");
            }
        }
    }

    // 5. inputs that replace the masks for the attention of a batch on devices
    if (n_tokens > 1 && any_batch) {
        auto n_tiles = [](uint32_t n) { return (n + GGML_RAZOR_TILE - 1)/GGML_RAZOR_TILE; };

        batch.since[0] = input(GGML_TYPE_I32, n_kv_full, 1, "razor_inp_since");
        batch.since[1] = input(GGML_TYPE_I32, n_kv,      1, "razor_inp_since_local");
        batch.bias     = input(GGML_TYPE_F32, n_kv,      1, "razor_inp_bias");
        batch.tiles    = input(GGML_TYPE_I32, 2, n_tiles(n_kv_full) + n_tiles(n_kv), "razor_inp_tiles");
    }

    // 6. fold
    if (n_fold > 0 && plan.n_comp > 0) {
        fold_rows = input(GGML_TYPE_I32, n_fold, n_local_max, "razor_inp_fold_rows");
        fold_src  = input(GGML_TYPE_I32, 1,      1, "razor_inp_fold_src");
        fold_dst  = input(GGML_TYPE_I64, 1,      1, "razor_inp_fold_dst");
        fold_cell = input(GGML_TYPE_I64, plan.N_COMP_CELLS, 1, "razor_inp_fold_cell");
        fold_inv  = input(GGML_TYPE_F32, 1,      1, "razor_inp_fold_inv");
    }
}

llm_graph_input_razor * llm_graph_input_razor::create(
        llm_graph_result * res,
        ggml_context * ctx,
        const llama_ubatch  & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_memory_context_i * mctx) {
    const auto * mctx_razor = dynamic_cast<const llama_kv_cache_razor_context *>(mctx);
    if (!mctx_razor) {
        return nullptr;
    }

    return static_cast<llm_graph_input_razor *>(
            res->add_input(std::make_unique<llm_graph_input_razor>(ctx, ubatch, hparams, cparams, mctx_razor)));
}

void llm_graph_input_razor::init_orders() {
    const auto & plan = mctx->get_kv().get_plan();

    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        head_order order;

        order.n_head    = hparams.n_head(il);
        order.n_head_kv = hparams.n_head_kv(il);
        order.retrieval = plan.retrieval[il];
        order.local     = plan.local[il];

        if (!order.retrieval.empty() && !order.local.empty()) {
            const bool retrieval_first = order.retrieval.back() < order.local.front();

            order.local_first = order.local.back() < order.retrieval.front();
            order.identity    = retrieval_first || order.local_first;
        }

        const auto it = std::find_if(orders.begin(), orders.end(), [&](const head_order & other) {
            return other.n_head == order.n_head && other.retrieval == order.retrieval && other.local == order.local;
        });

        map_order.push_back(it - orders.begin());

        if (it == orders.end()) {
            orders.push_back(std::move(order));
        }
    }
}

// the mask of the cells that were written before this ubatch
template<typename T>
static void set_input_past(
        T * data,
        const llama_razor_plan & plan,
        const llama_kv_cache_razor::step_info & step,
        uint32_t n_kv) {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    std::fill(data, data + n_kv, drop);

    for (uint32_t p = 0; p < std::min(plan.sink_tokens, step.pos0); ++p) {
        data[plan.cell(p)] = keep;
    }

    for (uint32_t p = step.frontier; p < step.pos0; ++p) {
        data[plan.cell(p)] = keep;
    }

    if (plan.n_comp > 0 && step.frontier > plan.sink_tokens) {
        const double n_folded = step.frontier - plan.sink_tokens;

        // the first cell gets log(N_d) rounded down, the second one the logarithm of what is missing
        float val = log(n_folded);
        T  first  = llama_cast<T>(val);
        for (double over = exp(llama_cast<float>(first)); over > n_folded; over = exp(llama_cast<float>(first))) {
            val  -= std::max(1.0f, val)*1e-4f;
            first = llama_cast<T>(val);
        }

        const double rest = n_folded - exp(llama_cast<float>(first));

        data[plan.comp_cell(step.slot) + 0] = first;
        data[plan.comp_cell(step.slot) + 1] = rest > 0.0 ? llama_cast<T>((float) log(rest)) : drop;
    }
}

template<typename T>
static void set_input_mask(
        T * data,
        const llama_razor_plan & plan,
        const llama_kv_cache_razor::step_info & step,
        uint32_t n_kv,
        uint32_t n_tokens) {
    set_input_past(data, plan, step, n_kv);

    // each token sees itself and what the previous token sees
    for (uint32_t i = 0; i < n_tokens; ++i) {
        T * row = data + (size_t) i*n_kv;

        if (i > 0) {
            std::copy(row - n_kv, row, row);
        }

        row[plan.cell(step.pos0 + i)] = llama_cast<T>(0.0f);
    }
}

// smallest and largest `since` of each tile, as in ggml-razor.h
// return the position after the last tile
static int32_t * set_input_tiles(int32_t * data, const int32_t * since, const float * bias, uint32_t n_kv) {
    for (uint32_t first = 0; first < n_kv; first += GGML_RAZOR_TILE) {
        const uint32_t end = std::min<uint32_t>(first + GGML_RAZOR_TILE, n_kv);

        int32_t low  = GGML_RAZOR_NEVER;
        int32_t high = end - first < GGML_RAZOR_TILE ? GGML_RAZOR_NEVER : 0;

        for (uint32_t j = first; j < end; ++j) {
            low  = std::min(low,  since[j]);
            high = std::max(high, bias && bias[j] != 0.0f ? GGML_RAZOR_NEVER : since[j]);
        }

        *data++ = low;
        *data++ = high;
    }

    return data;
}

void llm_graph_input_razor::set_input(const llama_ubatch * ubatch) {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = mctx->get_step();

    GGML_ASSERT(ubatch->n_tokens == n_tokens && step.n_kv == n_kv && step.n_fold == n_fold);

    if (mask->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

        if (mask->type == GGML_TYPE_F16) {
            set_input_mask((ggml_fp16_t *) mask->data, plan, step, n_kv, n_tokens);
        } else {
            set_input_mask((float *) mask->data, plan, step, n_kv, n_tokens);
        }
    }

    if (batch.tiles && batch.tiles->buffer) {
        set_input_batch(*ubatch);
    }

    set_input_rows();

    if (heads && heads->buffer) {
        set_input_heads();
    }

    if (fold_rows && fold_rows->buffer) {
        set_input_fold();
    }
}

void llm_graph_input_razor::set_input_batch(const llama_ubatch & ubatch) const {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = mctx->get_step();

    for (const auto * t : { batch.since[0], batch.since[1], batch.bias, batch.tiles }) {
        GGML_ASSERT(ggml_backend_buffer_is_host(t->buffer));
    }

    int32_t * since_full = (int32_t *) batch.since[0]->data;
    int32_t * since      = (int32_t *) batch.since[1]->data;
    float   * bias       = (float   *) batch.bias->data;

    // 1. retrieval heads, same as upstream's mask: the positions of an ubatch are consecutive, see init_batch()
    const llama_seq_id seq_id = ubatch.seq_id[0][0];
    const auto &       cells  = mctx->get_kv().get_cells(seq_id);

    for (uint32_t j = 0; j < n_kv_full; ++j) {
        since_full[j] = GGML_RAZOR_NEVER;

        if (!cells.is_empty(j) && cells.seq_has(j, seq_id)) {
            const int64_t i = (int64_t) cells.pos_get(j) - step.pos0;
            if (i < n_tokens) {
                since_full[j] = std::max<int64_t>(i, 0);
            }
        }
    }

    // 2. local heads
    set_input_past(bias, plan, step, n_kv);

    for (uint32_t j = 0; j < n_kv; ++j) {
        const bool seen = bias[j] != -INFINITY;

        since[j] = seen ? 0 : GGML_RAZOR_NEVER;
        bias[j]  = seen ? bias[j] : 0.0f;
    }

    for (uint32_t i = 0; i < n_tokens; ++i) {
        since[plan.cell(step.pos0 + i)] = i;
    }

    // 3. tiles of both
    int32_t * tiles = (int32_t *) batch.tiles->data;

    tiles = set_input_tiles(tiles, since_full, nullptr, n_kv_full);
    tiles = set_input_tiles(tiles, since,      bias,    n_kv);

    GGML_ASSERT(tiles == (int32_t *) batch.tiles->data + ggml_nelements(batch.tiles));
}

template<typename T>
void llm_graph_input_razor::set_input_rows_as(T * rows_data) const {
    const auto & plan  = mctx->get_kv().get_plan();
    const auto & step  = mctx->get_step();
    const auto & cells = mctx->get_cells();

    for (const auto & order : orders) {
        T * data = rows_data + order.offs_rows*n_tokens;

        // first rows of the stream, and of the local heads in it
        const int64_t first_local = (int64_t) order.retrieval.size()*plan.n_ctx;
        const int64_t n_rows      = first_local + (int64_t) order.local.size()*plan.cells;
        const int64_t first       = step.strm*n_rows;

        GGML_ASSERT(first + n_rows <= std::numeric_limits<T>::max());

        for (uint32_t i = 0; i < n_tokens; ++i, data += order.n_head_kv) {
            const uint32_t cell = plan.cell(step.pos0 + i);

            for (size_t j = 0; j < order.retrieval.size(); ++j) {
                data[order.retrieval[j]] = first + j*plan.n_ctx + cells[i];
            }
            for (size_t j = 0; j < order.local.size(); ++j) {
                data[order.local[j]] = first + first_local + j*plan.cells + cell;
            }
        }
    }
}

void llm_graph_input_razor::set_input_rows() const {
    const auto & plan  = mctx->get_kv().get_plan();
    const auto & step  = mctx->get_step();
    const auto & cells = mctx->get_cells();

    if (rows->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(rows->buffer));

        if (rows->type == GGML_TYPE_I64) {
            set_input_rows_as((int64_t *) rows->data);
        } else {
            set_input_rows_as((int32_t *) rows->data);
        }
    }

    for (const auto & [n_elems, idxs] : v_elems) {
        if (idxs->buffer) {
            int64_t * data = (int64_t *) idxs->data;

            for (uint32_t i = 0; i < n_tokens; ++i) {
                for (uint32_t j = 0; j < n_elems; ++j) {
                    *data++ = (int64_t) j*plan.n_ctx + cells[i];
                }
            }
        }
    }

    for (const auto & [n_local, idxs] : v_rows) {
        if (idxs->buffer) {
            int64_t * data = (int64_t *) idxs->data;

            for (uint32_t i = 0; i < n_tokens; ++i) {
                for (uint32_t j = 0; j < n_local; ++j) {
                    *data++ = (int64_t) j*plan.cells + plan.cell(step.pos0 + i);
                }
            }
        }
    }
}

void llm_graph_input_razor::set_input_heads() const {
    GGML_ASSERT(ggml_backend_buffer_is_host(heads->buffer));

    int32_t * data = (int32_t *) heads->data;

    for (const auto & order : orders) {
        if (order.identity) {
            continue;
        }

        const int32_t n_head    = order.n_head;
        const int32_t n_head_kv = order.n_head_kv;
        const int32_t n_gqa     = n_head/n_head_kv;

        int32_t * data_q   = data + order.offs_q  *n_tokens;
        int32_t * data_out = data + order.offs_out*n_tokens;
        int32_t * data_v   = mctx->get_kv().get_v_trans() ? data + order.offs_v*n_tokens : nullptr;

        int32_t i_kv = 0;

        for (const auto * group : { &order.retrieval, &order.local }) {
            for (const uint32_t h : *group) {
                for (int32_t j = 0; j < n_gqa; ++j) {
                    data_q  [i_kv*n_gqa + j] = h*n_gqa + j;
                    data_out[h*n_gqa + j]    = i_kv*n_gqa + j;
                }
                if (data_v) {
                    data_v[i_kv] = h;
                }
                ++i_kv;
            }
        }

        for (uint32_t i = 1; i < n_tokens; ++i) {
            std::copy(data_q,   data_q   + n_head, data_q   + i*n_head);
            std::copy(data_out, data_out + n_head, data_out + i*n_head);
            if (data_v) {
                std::copy(data_v, data_v + n_head_kv, data_v + i*n_head_kv);
            }
        }
    }
}

void llm_graph_input_razor::set_input_fold() const {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = mctx->get_step();

    int32_t * data = (int32_t *) fold_rows->data;

    for (uint32_t i = 0; i < n_fold; ++i) {
        data[i] = plan.cell(step.fold_from + i);
    }
    for (int64_t j = 1; j < fold_rows->ne[1]; ++j) {
        std::copy(data, data + n_fold, data + j*n_fold);
    }

    using kv = llama_kv_cache_razor;

    // the first fold starts from zero
    const uint32_t slot_src = step.fold_from == plan.sink_tokens ? kv::SLOT_ZERO : 1 - step.slot;

    *(int32_t *) fold_src->data = step.strm*kv::N_SLOTS + slot_src;
    *(int64_t *) fold_dst->data = step.strm*kv::N_SLOTS + step.slot;
    *(float   *) fold_inv->data = 1.0f/(step.frontier - plan.sink_tokens);

    for (uint32_t i = 0; i < plan.N_COMP_CELLS; ++i) {
        ((int64_t *) fold_cell->data)[i] = plan.comp_cell(step.slot) + i;
    }
}

bool llm_graph_input_razor::can_reuse(const llm_graph_params & params) {
    const auto * mctx_new = dynamic_cast<const llama_kv_cache_razor_context *>(params.mctx);
    if (!mctx_new) {
        return false;
    }

    mctx = mctx_new;

    const auto & step = mctx->get_step();

    return params.ubatch.n_tokens == n_tokens && mctx->get_n_kv() == n_kv_full && step.n_kv == n_kv && step.n_fold == n_fold;
}

ggml_tensor * llm_graph_input_razor::view_local(ggml_context * ctx0, const razor_layer & layer, ggml_tensor * src) const {
    const auto & kv = mctx->get_kv();

    const size_t offs = mctx->get_step().strm*src->nb[2] + kv.local_row(layer, 0)*src->nb[1];

    return ggml_view_3d(ctx0, src, src->ne[0], kv.get_plan().cells, layer.n_local, src->nb[1], kv.get_plan().cells*src->nb[1], offs);
}

// the scheduler would copy each view of an input to the device separately, and wait each time
// so the input is copied once, and layers on a device use views of the copy
ggml_tensor * llm_graph_input_razor::get_on_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * input) const {
    if (ggml_backend_buffer_is_host(layer.k->buffer)) {
        return input;
    }

    ggml_tensor * & copy = copies[{ ggml_backend_buffer_get_type(layer.k->buffer), input }];
    if (!copy) {
        copy = ggml_dup(g.ctx0, input);
        ggml_set_name(copy, input->name);
    }

    return copy;
}

void llm_graph_input_razor::build_fold(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * store, ggml_tensor * sums) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n_embd  = store->ne[0];
    const int64_t n_local = store->ne[2];

    sums = ggml_reshape_2d(ctx0, sums, n_embd*n_local, sums->ne[1]*sums->ne[2]);

    ggml_tensor * idxs = get_on_device(g, layer, fold_rows);

    ggml_tensor * cur = ggml_get_rows(ctx0, store, ggml_view_2d(ctx0, idxs, n_fold, n_local, idxs->nb[1], 0)); // [n_embd, n_fold, n_local]

    cur = ggml_sum_rows(ctx0, ggml_cont(ctx0, ggml_permute(ctx0, cur, 1, 0, 2, 3)));
    cur = ggml_reshape_2d(ctx0, cur, n_embd*n_local, 1);
    cur = ggml_add(ctx0, cur, ggml_get_rows(ctx0, sums, fold_src));

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, sums, cur, fold_dst));

    cur = ggml_mul(ctx0, cur, fold_inv);
    cur = ggml_reshape_3d(ctx0, cur, n_embd, 1, n_local);
    cur = ggml_repeat_4d(ctx0, cur, n_embd, fold_cell->ne[0], n_local, 1);

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, store, cur, fold_cell));
}

// return a matrix with one row per head and token
static ggml_tensor * reshape_rows(ggml_context * ctx, ggml_tensor * cur) {
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_reshape_2d(ctx, cur, cur->ne[0], cur->ne[1]*cur->ne[2]);
}

ggml_tensor * llm_graph_input_razor::view_rows(const llm_graph_context & g, const razor_layer & layer, const head_order & order) const {
    ggml_tensor * idxs = layer.device || rows->type == GGML_TYPE_I32 ? get_on_device(g, layer, rows) : rows;

    return ggml_view_1d(g.ctx0, idxs, order.n_head_kv*n_tokens, order.offs_rows*n_tokens*ggml_element_size(idxs));
}

void llm_graph_input_razor::build_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * dst, ggml_tensor * cur, const head_order & order) const {
    ggml_context * ctx0 = g.ctx0;

    dst = ggml_reshape_2d(ctx0, dst, dst->ne[0], dst->ne[1]*dst->ne[2]);

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, reshape_rows(ctx0, cur), view_rows(g, layer, order)));
}

void llm_graph_input_razor::build_store_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const {
    ggml_build_forward_expand(g.gf,
            razor_device_build_store(g.ctx0, reshape_rows(g.ctx0, k_cur), reshape_rows(g.ctx0, v_cur), layer.k, layer.v, view_rows(g, layer, order)));
}

void llm_graph_input_razor::build_store_v_trans(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * v_cur, const head_order & order) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n_embd = v_cur->ne[0];

    if (!order.identity) {
        v_cur = build_gather(g, layer, v_cur, order.offs_v);
    }

    auto part = [&](int64_t first, int64_t n) {
        return ggml_cont(ctx0, ggml_view_3d(ctx0, v_cur, n_embd, n, n_tokens, v_cur->nb[1], v_cur->nb[2], first*v_cur->nb[1]));
    };

    const size_t offs = mctx->get_step().strm*layer.v->nb[2];

    if (layer.n_retrieval > 0) {
        const int64_t n_elems = n_embd*layer.n_retrieval;
        const int64_t n_ctx   = mctx->get_kv().get_plan().n_ctx;

        // same as upstream: one element per row
        ggml_tensor * cur = ggml_reshape_2d(ctx0, part(order.local_first ? layer.n_local : 0, layer.n_retrieval), 1, n_elems*n_tokens);
        ggml_tensor * dst = ggml_view_2d(ctx0, layer.v, 1, n_elems*n_ctx, ggml_element_size(layer.v), offs);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, cur, v_elems.at(n_elems)));
    }

    if (layer.n_local > 0) {
        ggml_tensor * cur = ggml_reshape_2d(ctx0, part(order.local_first ? 0 : layer.n_retrieval, layer.n_local), n_embd, layer.n_local*n_tokens);
        ggml_tensor * dst = view_local(ctx0, layer, layer.v);

        dst = ggml_reshape_2d(ctx0, dst, n_embd, dst->ne[1]*dst->ne[2]);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, cur, v_rows.at(layer.n_local)));
    }
}

ggml_tensor * llm_graph_input_razor::build_gather(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * cur, size_t offs) const {
    ggml_tensor * idxs = ggml_view_2d(g.ctx0, get_on_device(g, layer, heads), cur->ne[1], n_tokens,
            cur->ne[1]*sizeof(int32_t), offs*n_tokens*sizeof(int32_t));

    return ggml_get_rows(g.ctx0, cur, idxs);
}

ggml_tensor * llm_graph_input_razor::build_attn(
        const llm_graph_context & g,
        const llm_graph_input_attn_kv & inp,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) const {
    GGML_ASSERT(!kq_b && !sinks && "refused when the context is created");

    ggml_context * ctx0 = g.ctx0;

    const auto & kv    = mctx->get_kv();
    const auto & plan  = kv.get_plan();
    const auto & layer = kv.get_layer(il);
    const auto & order = orders[map_order[il]];

    const int64_t n_head    = q_cur->ne[1];
    const int64_t n_head_kv = k_cur->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;

    GGML_ASSERT(layer.n_retrieval + layer.n_local == n_head_kv && (uint32_t) q_cur->ne[2] == n_tokens);

    // 1. fold, before the new tokens overwrite its rows and attend to the compensation token
    if (n_fold > 0 && layer.k_sum && layer.device) {
        const int64_t first = mctx->get_step().strm*layer.k->ne[1] + kv.local_row(layer, 0);

        ggml_build_forward_expand(g.gf, razor_device_build_fold(ctx0, {
            layer.k, layer.v, layer.k_sum, layer.v_sum, fold_rows, fold_src, fold_dst, fold_cell, fold_inv,
            (int32_t) layer.n_local, (int32_t) plan.cells, first,
        }));
    } else if (n_fold > 0 && layer.k_sum) {
        build_fold(g, layer, view_local(ctx0, layer, layer.k), layer.k_sum);
        build_fold(g, layer, view_local(ctx0, layer, layer.v), layer.v_sum);
    }

    // 2. store K and V
    if (layer.device) {
        build_store_device(g, layer, k_cur, v_cur, order);
    } else {
        build_store(g, layer, layer.k, k_cur, order);

        if (kv.get_v_trans()) {
            build_store_v_trans(g, layer, v_cur, order);
        } else {
            build_store(g, layer, layer.v, v_cur, order);
        }
    }

    // 3. attention of both groups of heads as one operation, if possible
    if (g.cparams.flash_attn && (layer.attn || (n_tokens == 1 ? layer.device : layer.device_batch))) {
        return build_attn_own(g, inp, layer, order, q_cur, kq_scale);
    }

    // 4. else attention of each group with upstream's operations
    if (!order.identity) {
        q_cur = build_gather(g, layer, q_cur, order.offs_q);
    }

    // n is the number of KV heads
    //   k [n_embd_head, n_kv, n]
    //   v [n_embd_head, n_kv, n], with v_trans [n_kv, n_embd_head, n]
    auto attend = [&](ggml_tensor * k, ggml_tensor * v, bool v_trans, int64_t first, ggml_tensor * kq_mask) {
        const int64_t n = k->ne[2];

        ggml_tensor * q = ggml_view_3d(ctx0, q_cur, q_cur->ne[0], n*n_gqa, n_tokens, q_cur->nb[1], q_cur->nb[2], first*n_gqa*q_cur->nb[1]);

        // if q is not contiguous, ggml-vulkan assumes that a quantized k is, but there are gaps between its heads
        if (!g.cparams.flash_attn && ggml_is_quantized(k->type)) {
            q = ggml_permute(ctx0, ggml_cont(ctx0, ggml_permute(ctx0, q, 0, 2, 1, 3)), 0, 2, 1, 3);
        }

        // the scheduler may move matrix products of host layers to a device, where ggml-cuda does not support a quantized k with gaps
        if (!g.cparams.flash_attn && ggml_is_quantized(k->type) && n_tokens > 1 && kv.has_devices() && ggml_backend_buffer_is_host(layer.k->buffer)) {
            k = ggml_cast(ctx0, k, GGML_TYPE_F32);
        }

        // build_attn_mha() assumes that v is transposed if the stride of its heads is larger than that of its rows
        if (!v_trans) {
            v = ggml_transpose(ctx0, v);
            if (!g.cparams.flash_attn) {
                v = ggml_cont(ctx0, v);
            }
        }

        return g.build_attn_mha(q, ggml_permute(ctx0, k, 0, 2, 1, 3), ggml_permute(ctx0, v, 0, 2, 1, 3),
                nullptr, kq_mask, nullptr, nullptr, 0, kq_scale, il);
    };

    ggml_tensor * out_retrieval = nullptr;
    ggml_tensor * out_local     = nullptr;

    if (layer.n_retrieval > 0) {
        auto view = [&](ggml_tensor * src) {
            return ggml_view_3d(ctx0, src, src->ne[0], n_kv_full, layer.n_retrieval,
                    src->nb[1], plan.n_ctx*src->nb[1], mctx->get_step().strm*src->nb[2]);
        };

        auto view_trans = [&](ggml_tensor * src) {
            return ggml_view_3d(ctx0, src, n_kv_full, src->ne[0], layer.n_retrieval,
                    plan.n_ctx*src->nb[0], plan.n_ctx*src->nb[1], mctx->get_step().strm*src->nb[2]);
        };

        out_retrieval = attend(view(layer.k), kv.get_v_trans() ? view_trans(layer.v) : view(layer.v), kv.get_v_trans(),
                order.local_first ? layer.n_local : 0, inp.get_kq_mask());
    }

    if (layer.n_local > 0) {
        auto view = [&](ggml_tensor * src) {
            src = view_local(ctx0, layer, src);

            return ggml_view_3d(ctx0, src, src->ne[0], n_kv, src->ne[2], src->nb[1], src->nb[2], 0);
        };

        out_local = attend(view(layer.k), view(layer.v), false, order.local_first ? 0 : layer.n_retrieval, mask);
    }

    if (!out_retrieval || !out_local) {
        return out_retrieval ? out_retrieval : out_local;
    }

    // 5. concatenate the groups and restore the order of the heads
    ggml_tensor * cur = order.local_first ?
        ggml_concat(ctx0, out_local, out_retrieval, 0) :
        ggml_concat(ctx0, out_retrieval, out_local, 0);

    if (!order.identity) {
        cur = ggml_reshape_3d(ctx0, cur, cur->ne[0]/n_head, n_head, n_tokens);
        cur = build_gather(g, layer, cur, order.offs_out);
        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*n_head, n_tokens);
    }

    ggml_build_forward_expand(g.gf, cur);

    return cur;
}

ggml_tensor * llm_graph_input_razor::build_attn_own(
        const llm_graph_context & g,
        const llm_graph_input_attn_kv & inp,
        const razor_layer & layer,
        const head_order & order,
        ggml_tensor * q_cur,
              float   kq_scale) const {
    const auto & kv   = mctx->get_kv();
    const auto & plan = kv.get_plan();

    const int64_t first = mctx->get_step().strm*layer.k->ne[1];

    razor_attn & attn = attns.emplace_back();

    attn.scale  = kq_scale;
    attn.kernel = layer.attn;
    attn.n_gqa  = order.n_head/order.n_head_kv;

    attn.groups[0].heads     = &order.retrieval;
    attn.groups[0].mask      = inp.get_kq_mask();
    attn.groups[0].first_row = first;
    attn.groups[0].head_rows = plan.n_ctx;

    attn.groups[1].heads     = &order.local;
    attn.groups[1].mask      = mask;
    attn.groups[1].first_row = first + kv.local_row(layer, 0);
    attn.groups[1].head_rows = plan.cells;

    const uint32_t strm = mctx->get_step().strm;

    ggml_tensor * cur =
        layer.attn    ? attn.build(g.ctx0, q_cur, layer.k, layer.v) :
        n_tokens == 1 ? razor_device_build_attn      (g.ctx0, attn, q_cur, layer.k, layer.v, strm) :
                        razor_device_build_attn_batch(g.ctx0, attn, q_cur, layer.k, layer.v, strm, batch);

    ggml_build_forward_expand(g.gf, cur);

    return cur;
}

uint32_t llama_razor_n_nodes(const llama_memory_i * memory) {
    const auto * kv = dynamic_cast<const llama_kv_cache_razor *>(memory);

    // per layer: 3 gathers, 3 stores of up to 6 nodes, an attention without flash attention (about 16), 2 folds of 15
    return kv ? 80*kv->get_plan().local.size() : 0;
}
