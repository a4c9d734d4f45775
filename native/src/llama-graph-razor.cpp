#include "llama-graph-razor.h"

#include "llama-razor-prefill.h"
#include "llama-razor-source.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <limits>

llm_graph_razor_seq::llm_graph_razor_seq(
        ggml_context * ctx,
        uint32_t i_seq,
        uint32_t n_tokens,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_razor_context * mctx) :
    hparams(hparams), mctx(mctx), prefill(mctx->get_prefill()), source(mctx->get_kv().source.get()), i_seq(i_seq), n_tokens(n_tokens), n_kv_full(mctx->get_n_kv()) {

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

    size_t n_rows   = 0;
    size_t n_heads  = 0;
    size_t n_slopes = 0;

    for (auto & order : orders) {
        order.offs_rows = n_rows;
        n_rows += order.n_head_kv;

        order.offs_slopes = n_slopes;
        n_slopes += order.n_head;

        if (!order.identity) {
            order.offs_q   = n_heads;
            order.offs_out = n_heads + order.n_head;
            order.offs_kv  = n_heads + order.n_head*2;
            n_heads += order.n_head*2 + (kv.get_v_trans() || order.split ? order.n_head_kv : 0);
        }
    }

    // 2. rows and heads
    // ggml_set_rows() supports both types, but ggml-vulkan aborts on copies of I64; the operations of ggml-razor.h need I64
    bool any_device = false;
    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        any_device = any_device || kv.get_layer(il).device;
    }

    rows = input(any_device ? GGML_TYPE_I64 : GGML_TYPE_I32, n_rows*n_tokens, 1, "razor_inp_rows");

    if (prefill) {
        prefill_rows = input(GGML_TYPE_I32, n_rows*n_tokens, 1, "razor_inp_prefill_rows");
    }

    if (source) {
        source_rows = input(GGML_TYPE_I32, n_tokens, 1, "razor_inp_source_rows");
    }

    if (n_heads > 0) {
        heads = input(GGML_TYPE_I32, n_heads*n_tokens, 1, "razor_inp_heads");
    }

    if (hparams.use_alibi) {
        slopes = input(GGML_TYPE_F32, n_slopes, 1, "razor_inp_slopes");
    }

    // 3. elements of transposed V caches
    for (uint32_t il = 0; kv.get_v_trans() && il < plan.n_layer(); ++il) {
        const uint32_t n_elems = kv.get_layer(il).n_retrieval*hparams.n_embd_head_v(il);
        if (n_elems > 0 && !v_elems[n_elems]) {
            v_elems[n_elems] = input(GGML_TYPE_I64, n_elems*n_tokens, 1, "razor_inp_v_elems");
        }
    }

    // 4. inputs of each group
    auto n_tiles = [](uint32_t n) { return (n + GGML_RAZOR_TILE - 1)/GGML_RAZOR_TILE; };

    ggml_tensor * since_full = nullptr;

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        group_input group;

        group.n_kv   = get_step().groups[g].n_kv;
        group.n_fold = get_step().groups[g].n_fold;

        // flash attention requires an F16 mask
        group.mask = input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, group.n_kv, n_tokens, "razor_inp_mask");

        if (prefill) {
            group.prefill_mask = input(group.mask->type, prefill->n_kv(get_step().pos0 + n_tokens), n_tokens, "razor_inp_prefill_mask");
        }

        uint32_t n_local_max = 0;
        bool     any_batch   = false;

        for (uint32_t il = 0; il < plan.n_layer(); ++il) {
            const uint32_t n_local = plan.local[il][g].size();

            n_local_max = std::max(n_local_max, n_local);
            any_batch   = any_batch || kv.get_layer(il).device_batch;

            if (kv.get_v_trans() && n_local > 0 && !group.v_rows[n_local]) {
                group.v_rows[n_local] = input(GGML_TYPE_I64, n_local*n_tokens, 1, "razor_inp_v_rows");
            }
        }

        // these replace the masks for the attention of a batch on devices
        if (n_tokens > 1 && any_batch) {
            if (!since_full) {
                since_full = input(GGML_TYPE_I32, n_kv_full, 1, "razor_inp_since");
            }

            group.batch.since[0] = since_full;
            group.batch.since[1] = input(GGML_TYPE_I32, group.n_kv, 1, "razor_inp_since_local");
            group.batch.bias     = input(GGML_TYPE_F32, group.n_kv, 1, "razor_inp_bias");
            group.batch.tiles    = input(GGML_TYPE_I32, 2, n_tiles(n_kv_full) + n_tiles(group.n_kv), "razor_inp_tiles");
        }

        // inputs of the fold
        if (group.n_fold > 0 && plan.n_comp > 0) {
            group.fold_rows = input(GGML_TYPE_I32, group.n_fold, n_local_max, "razor_inp_fold_rows");
            group.fold_src  = input(GGML_TYPE_I32, 1,            1, "razor_inp_fold_src");
            group.fold_dst  = input(GGML_TYPE_I64, 1,            1, "razor_inp_fold_dst");
            group.fold_cell = input(GGML_TYPE_I64, llama_razor_group::N_COMP_CELLS, 1, "razor_inp_fold_cell");
            group.fold_inv  = input(GGML_TYPE_F32, 1,            1, "razor_inp_fold_inv");
        }

        groups.push_back(std::move(group));
    }
}

void llm_graph_razor_seq::init_orders() {
    const auto & plan = mctx->get_kv().get_plan();

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        const int32_t source = mctx->get_kv().get_source(il);

        head_order order;

        order.n_head    = hparams.n_head(il);
        order.n_head_kv = hparams.n_head_kv(source);
        order.split     = plan.is_split(source);

        order.groups.push_back(plan.retrieval[source]);
        order.groups.insert(order.groups.end(), plan.local[source].begin(), plan.local[source].end());

        for (size_t i = 0; i < order.groups.size(); ++i) {
            if (!order.groups[i].empty()) {
                order.sequence.push_back(i);
            }
        }

        // sort the groups by their first heads, and use this order if it is that of the model
        auto sorted = order.sequence;
        std::sort(sorted.begin(), sorted.end(), [&](size_t a, size_t b) { return order.groups[a].front() < order.groups[b].front(); });

        for (size_t i = 1; i < sorted.size(); ++i) {
            order.identity = order.identity && order.groups[sorted[i - 1]].back() < order.groups[sorted[i]].front();
        }
        if (order.identity) {
            order.sequence = sorted;
        }

        order.first.resize(order.groups.size());

        size_t n = 0;
        for (const size_t i : order.sequence) {
            order.first[i] = n;
            n += order.groups[i].size();
        }

        const auto it = std::find_if(orders.begin(), orders.end(), [&](const head_order & other) {
            return other.n_head == order.n_head && other.groups == order.groups;
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
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & step,
        uint32_t pos0,
        uint32_t n_kv) {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    std::fill(data, data + n_kv, drop);

    for (uint32_t p = 0; p < std::min(group.sink_tokens, pos0); ++p) {
        data[group.cell(p)] = keep;
    }

    for (uint32_t p = step.frontier; p < pos0; ++p) {
        data[group.cell(p)] = keep;
    }

    if (group.n_comp > 0 && step.frontier > group.sink_tokens) {
        const double n_folded = step.frontier - group.sink_tokens;

        // the first cell gets log(N_d) rounded down, the second one the logarithm of what is missing
        float val = log(n_folded);
        T  first  = llama_cast<T>(val);
        for (double over = exp(llama_cast<float>(first)); over > n_folded; over = exp(llama_cast<float>(first))) {
            val  -= std::max(1.0f, val)*1e-4f;
            first = llama_cast<T>(val);
        }

        const double rest = n_folded - exp(llama_cast<float>(first));

        data[group.comp_cell(step.slot) + 0] = first;
        data[group.comp_cell(step.slot) + 1] = rest > 0.0 ? llama_cast<T>((float) log(rest)) : drop;
    }
}

template<typename T>
static void set_input_mask(
        T * data,
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & step,
        uint32_t pos0,
        uint32_t n_kv,
        uint32_t n_tokens) {
    set_input_past(data, group, step, pos0, n_kv);

    // each token sees itself and what the previous token sees
    for (uint32_t i = 0; i < n_tokens; ++i) {
        T * row = data + (size_t) i*n_kv;

        if (i > 0) {
            std::copy(row - n_kv, row, row);
        }

        row[group.cell(pos0 + i)] = llama_cast<T>(0.0f);
    }
}

// the distances from position pos to the positions below n that are sinks or in the ring
template<typename T>
static void set_input_row_distances(
        T * row,
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & step,
        uint32_t pos,
        uint32_t n) {
    for (uint32_t p = 0; p < std::min(group.sink_tokens, n); ++p) {
        row[group.cell(p)] = llama_cast<T>(-(float) (pos - p));
    }

    for (uint32_t p = step.frontier; p < n; ++p) {
        row[group.cell(p)] = llama_cast<T>(-(float) (pos - p));
    }
}

// with ALiBi, the mask holds distances
template<typename T>
static void set_input_distances(
        T * data,
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & step,
        uint32_t pos0,
        uint32_t n_kv,
        uint32_t n_tokens) {
    GGML_ASSERT(group.n_comp == 0 && "refused when the context is created");

    std::fill(data, data + (size_t) n_tokens*n_kv, llama_cast<T>(-INFINITY));

    for (uint32_t i = 0; i < n_tokens; ++i) {
        const uint32_t pos = pos0 + i;

        set_input_row_distances(data + (size_t) i*n_kv, group, step, pos, pos + 1);
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

void llm_graph_razor_seq::set_input() {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = get_step();

    for (size_t g = 0; g < groups.size(); ++g) {
        const auto & group = groups[g];

        GGML_ASSERT(step.groups[g].n_kv == group.n_kv && step.groups[g].n_fold == group.n_fold);

        if (ggml_tensor * mask = group.mask; mask->buffer) {
            GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

            auto set_mask = [&](auto * data) {
                if (hparams.use_alibi) {
                    set_input_distances(data, plan.groups[g], step.groups[g], step.pos0, group.n_kv, n_tokens);
                } else {
                    set_input_mask(data, plan.groups[g], step.groups[g], step.pos0, group.n_kv, n_tokens);
                }
            };

            if (mask->type == GGML_TYPE_F16) {
                set_mask((ggml_fp16_t *) mask->data);
            } else {
                set_mask((float *) mask->data);
            }
        }

        if (group.batch.tiles && group.batch.tiles->buffer) {
            set_input_batch(g);
        }

        if (group.fold_rows && group.fold_rows->buffer) {
            set_input_fold(g);
        }
    }

    set_input_rows();

    if (prefill) {
        set_input_prefill();
    }

    if (source_rows && source_rows->buffer) {
        const auto rows_source = source->cache->find_rows(step.strm, step.pos0, step.pos0 + n_tokens);

        ggml_backend_tensor_set(source_rows, rows_source.data(), 0, ggml_nbytes(source_rows));
    }

    if (heads && heads->buffer) {
        set_input_heads();
    }

    if (slopes && slopes->buffer) {
        set_input_slopes();
    }
}

void llm_graph_razor_seq::set_input_batch(size_t i_group) const {
    const auto & group = mctx->get_kv().get_plan().groups[i_group];
    const auto & step  = get_step();
    const auto & batch = groups[i_group].batch;

    const uint32_t n_kv = groups[i_group].n_kv;

    for (const auto * t : { batch.since[0], batch.since[1], batch.bias, batch.tiles }) {
        GGML_ASSERT(ggml_backend_buffer_is_host(t->buffer));
    }

    int32_t * since_full = (int32_t *) batch.since[0]->data;
    int32_t * since      = (int32_t *) batch.since[1]->data;
    float   * bias       = (float   *) batch.bias->data;

    // 1. retrieval heads, same as upstream's mask: the positions of an ubatch are consecutive, see init_batch()
    const llama_seq_id seq_id = step.strm;
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

    // 2. local heads of the group
    set_input_past(bias, group, step.groups[i_group], step.pos0, n_kv);

    for (uint32_t j = 0; j < n_kv; ++j) {
        const bool seen = bias[j] != -INFINITY;

        since[j] = seen ? 0 : GGML_RAZOR_NEVER;
        bias[j]  = seen ? bias[j] : 0.0f;
    }

    for (uint32_t i = 0; i < n_tokens; ++i) {
        since[group.cell(step.pos0 + i)] = i;
    }

    // 3. tiles of both
    int32_t * tiles = (int32_t *) batch.tiles->data;

    tiles = set_input_tiles(tiles, since_full, nullptr, n_kv_full);
    tiles = set_input_tiles(tiles, since,      bias,    n_kv);

    GGML_ASSERT(tiles == (int32_t *) batch.tiles->data + ggml_nelements(batch.tiles));
}

template<typename T>
void llm_graph_razor_seq::set_input_rows_as(T * rows_data) const {
    const auto & plan  = mctx->get_kv().get_plan();
    const auto & step  = get_step();
    const auto & cells = mctx->get_cells(i_seq);

    for (const auto & order : orders) {
        T * data = rows_data + order.offs_rows*n_tokens;

        const int64_t n_rows_full = (int64_t) order.groups[0].size()*plan.n_ctx;

        int64_t n_rows_local = 0;
        for (size_t k = 1; k < order.groups.size(); ++k) {
            n_rows_local += (int64_t) order.groups[k].size()*plan.groups[k - 1].cells;
        }

        GGML_ASSERT((step.strm + 1)*(n_rows_full + n_rows_local) <= std::numeric_limits<T>::max());

        // first row of the group
        int64_t first = step.strm*(order.split ? n_rows_full : n_rows_full + n_rows_local);

        for (size_t k = 0; k < order.groups.size(); ++k) {
            const auto & heads_kv = order.groups[k];

            const int64_t head_rows = k == 0 ? plan.n_ctx : plan.groups[k - 1].cells;

            if (order.split && k == 1) {
                first = step.strm*n_rows_local;
            }

            for (uint32_t i = 0; i < n_tokens; ++i) {
                const uint32_t cell = k == 0 ? cells[i] : plan.groups[k - 1].cell(step.pos0 + i);

                for (size_t j = 0; j < heads_kv.size(); ++j) {
                    const size_t at = order.split ? order.first[k]*n_tokens + i*heads_kv.size() + j : i*order.n_head_kv + heads_kv[j];

                    data[at] = first + j*head_rows + cell;
                }
            }

            first += heads_kv.size()*head_rows;
        }
    }
}

void llm_graph_razor_seq::set_input_rows() const {
    const auto & plan  = mctx->get_kv().get_plan();
    const auto & step  = get_step();
    const auto & cells = mctx->get_cells(i_seq);

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

    for (size_t g = 0; g < groups.size(); ++g) {
        const auto & group = plan.groups[g];

        for (const auto & [n_local, idxs] : groups[g].v_rows) {
            if (idxs->buffer) {
                int64_t * data = (int64_t *) idxs->data;

                for (uint32_t i = 0; i < n_tokens; ++i) {
                    for (uint32_t j = 0; j < n_local; ++j) {
                        *data++ = (int64_t) j*group.cells + group.cell(step.pos0 + i);
                    }
                }
            }
        }
    }
}

// the mask of the cells from before the batch, followed by that of the tokens of the batch
template<typename T>
static void set_input_prefill_mask(
        T * data,
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & past,
        const llama_razor_prefill & prefill,
        uint32_t pos0,
        uint32_t n_kv,
        uint32_t n_tokens) {
    if (prefill.n_past > 0) {
        set_input_past(data, group, past, prefill.pos0, prefill.n_past);
    }

    const uint32_t n_seen = prefill.n_past + pos0 - prefill.pos0;

    std::fill(data + prefill.n_past, data + n_seen, llama_cast<T>(0.0f));
    std::fill(data + n_seen,         data + n_kv,   llama_cast<T>(-INFINITY));

    for (uint32_t i = 0; i < n_tokens; ++i) {
        T * row = data + (size_t) i*n_kv;

        if (i > 0) {
            std::copy(row - n_kv, row, row);
        }

        row[n_seen + i] = llama_cast<T>(0.0f);
    }
}

template<typename T>
static void set_input_prefill_distances(
        T * data,
        const llama_razor_group & group,
        const llama_kv_cache_razor::group_step & past,
        const llama_razor_prefill & prefill,
        uint32_t pos0,
        uint32_t n_kv,
        uint32_t n_tokens) {
    std::fill(data, data + (size_t) n_tokens*n_kv, llama_cast<T>(-INFINITY));

    for (uint32_t i = 0; i < n_tokens; ++i) {
        T * row = data + (size_t) i*n_kv;

        const uint32_t pos = pos0 + i;

        set_input_row_distances(row, group, past, pos, prefill.pos0);

        for (uint32_t p = prefill.pos0; p <= pos; ++p) {
            row[prefill.n_past + p - prefill.pos0] = llama_cast<T>(-(float) (pos - p));
        }
    }
}

void llm_graph_razor_seq::set_input_prefill() const {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = get_step();

    for (size_t g = 0; g < groups.size(); ++g) {
        ggml_tensor * mask = groups[g].prefill_mask;

        if (!mask->buffer) {
            continue;
        }

        GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

        auto set_mask = [&](auto * data) {
            if (hparams.use_alibi) {
                set_input_prefill_distances(data, plan.groups[g], prefill->steps_past[g], *prefill, step.pos0, mask->ne[0], n_tokens);
            } else {
                set_input_prefill_mask(data, plan.groups[g], prefill->steps_past[g], *prefill, step.pos0, mask->ne[0], n_tokens);
            }
        };

        if (mask->type == GGML_TYPE_F16) {
            set_mask((ggml_fp16_t *) mask->data);
        } else {
            set_mask((float *) mask->data);
        }
    }

    if (prefill_rows->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(prefill_rows->buffer));

        const uint32_t first = prefill->n_past + step.pos0 - prefill->pos0;

        for (const auto & order : orders) {
            int32_t * data = (int32_t *) prefill_rows->data + order.offs_rows*n_tokens;

            int64_t row = 0;

            for (const auto & heads_kv : order.groups) {
                for (const uint32_t h : heads_kv) {
                    for (uint32_t i = 0; i < n_tokens; ++i) {
                        data[i*order.n_head_kv + h] = row + first + i;
                    }
                    row += prefill->cells;
                }
            }

            GGML_ASSERT(row <= std::numeric_limits<int32_t>::max());
        }
    }
}

void llm_graph_razor_seq::set_input_heads() const {
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
        int32_t * data_kv  = mctx->get_kv().get_v_trans() || order.split ? data + order.offs_kv*n_tokens : nullptr;

        int32_t i_kv = 0;

        for (const size_t k : order.sequence) {
            for (const uint32_t h : order.groups[k]) {
                for (int32_t j = 0; j < n_gqa; ++j) {
                    data_q  [i_kv*n_gqa + j] = h*n_gqa + j;
                    data_out[h*n_gqa + j]    = i_kv*n_gqa + j;
                }
                if (data_kv) {
                    data_kv[i_kv] = h;
                }
                ++i_kv;
            }
        }

        for (uint32_t i = 1; i < n_tokens; ++i) {
            std::copy(data_q,   data_q   + n_head, data_q   + i*n_head);
            std::copy(data_out, data_out + n_head, data_out + i*n_head);
            if (data_kv) {
                std::copy(data_kv, data_kv + n_head_kv, data_kv + i*n_head_kv);
            }
        }
    }
}

void llm_graph_razor_seq::set_input_slopes() const {
    GGML_ASSERT(ggml_backend_buffer_is_host(slopes->buffer));

    for (const auto & order : orders) {
        const auto values = razor_attn_slopes(order.n_head, hparams.f_max_alibi_bias);

        float * data = (float *) slopes->data + order.offs_slopes;

        for (const size_t k : order.sequence) {
            const uint32_t n_gqa = order.n_head/order.n_head_kv;

            for (const uint32_t h : order.groups[k]) {
                data = std::copy_n(values.begin() + h*n_gqa, n_gqa, data);
            }
        }
    }
}

void llm_graph_razor_seq::set_input_fold(size_t i_group) const {
    const auto & plan  = mctx->get_kv().get_plan().groups[i_group];
    const auto & step  = get_step().groups[i_group];
    const auto & group = groups[i_group];

    const uint32_t strm = get_step().strm;

    int32_t * data = (int32_t *) group.fold_rows->data;

    for (uint32_t i = 0; i < step.n_fold; ++i) {
        data[i] = plan.cell(step.fold_from + i);
    }
    for (int64_t j = 1; j < group.fold_rows->ne[1]; ++j) {
        std::copy(data, data + step.n_fold, data + j*step.n_fold);
    }

    using kv = llama_kv_cache_razor;

    // the first fold starts from zero
    const uint32_t slot_src = step.fold_from == plan.sink_tokens ? kv::SLOT_ZERO : 1 - step.slot;

    *(int32_t *) group.fold_src->data = strm*kv::N_SLOTS + slot_src;
    *(int64_t *) group.fold_dst->data = strm*kv::N_SLOTS + step.slot;
    *(float   *) group.fold_inv->data = 1.0f/(step.frontier - plan.sink_tokens);

    for (uint32_t i = 0; i < plan.N_COMP_CELLS; ++i) {
        ((int64_t *) group.fold_cell->data)[i] = plan.comp_cell(step.slot) + i;
    }
}

bool llm_graph_razor_seq::can_reuse(const llama_kv_cache_razor_context * mctx_new) {
    mctx = mctx_new;

    // the graph of a layer that reads a prompt depends on the positions of its ubatch
    if (source || mctx->get_kv().source || prefill || mctx->get_prefill() || mctx->get_n_kv() != n_kv_full) {
        return false;
    }

    const auto & step = get_step();

    for (size_t g = 0; g < groups.size(); ++g) {
        if (step.groups[g].n_kv != groups[g].n_kv || step.groups[g].n_fold != groups[g].n_fold) {
            return false;
        }
    }

    return true;
}

ggml_tensor * llm_graph_razor_seq::view_local(ggml_context * ctx0, const razor_layer & layer, ggml_tensor * src, size_t i_group) const {
    const auto & plan = mctx->get_kv().get_plan();

    const size_t cells = plan.groups[i_group].cells;
    const size_t offs  = get_step().strm*src->nb[2] + plan.first_row(layer.il, i_group)*src->nb[1];

    return ggml_view_3d(ctx0, src, src->ne[0], cells, plan.local[layer.il][i_group].size(), src->nb[1], cells*src->nb[1], offs);
}

// the scheduler would copy each view of an input to the device separately, and wait each time
// so the input is copied once, and layers on a device use views of the copy
ggml_tensor * llm_graph_razor_seq::get_on_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * input) const {
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

void llm_graph_razor_seq::build_folds(const llm_graph_context & g, const razor_layer & layer, size_t i_group) const {
    const auto & plan  = mctx->get_kv().get_plan();
    const auto & sums  = layer.sums[i_group];
    const auto & group = groups[i_group];

    if (group.n_fold == 0 || !sums.k) {
        return;
    }

    if (layer.device) {
        const int64_t first = get_step().strm*layer.k->ne[1] + plan.first_row(layer.il, i_group);

        ggml_build_forward_expand(g.gf, razor_device_build_fold(g.ctx0, {
            layer.k, layer.v, sums.k, sums.v, group.fold_rows, group.fold_src, group.fold_dst, group.fold_cell, group.fold_inv,
            (int32_t) plan.local[layer.il][i_group].size(), (int32_t) plan.groups[i_group].cells, first,
        }));
    } else {
        build_fold(g, layer, group, view_local(g.ctx0, layer, layer.k_local, i_group), sums.k);
        build_fold(g, layer, group, view_local(g.ctx0, layer, layer.v_local, i_group), sums.v);
    }
}

void llm_graph_razor_seq::build_fold(
        const llm_graph_context & g,
        const razor_layer & layer,
        const group_input & group,
        ggml_tensor * store,
        ggml_tensor * sums) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n_embd  = store->ne[0];
    const int64_t n_local = store->ne[2];

    sums = ggml_reshape_2d(ctx0, sums, n_embd*n_local, sums->ne[1]*sums->ne[2]);

    ggml_tensor * idxs = get_on_device(g, layer, group.fold_rows);

    ggml_tensor * cur = ggml_get_rows(ctx0, store, ggml_view_2d(ctx0, idxs, group.n_fold, n_local, idxs->nb[1], 0)); // [n_embd, n_fold, n_local]

    cur = ggml_sum_rows(ctx0, ggml_cont(ctx0, ggml_permute(ctx0, cur, 1, 0, 2, 3)));
    cur = ggml_reshape_2d(ctx0, cur, n_embd*n_local, 1);
    cur = ggml_add(ctx0, cur, ggml_get_rows(ctx0, sums, group.fold_src));

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, sums, cur, group.fold_dst));

    cur = ggml_mul(ctx0, cur, group.fold_inv);
    cur = ggml_reshape_3d(ctx0, cur, n_embd, 1, n_local);
    cur = ggml_repeat_4d(ctx0, cur, n_embd, group.fold_cell->ne[0], n_local, 1);

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, store, cur, group.fold_cell));
}

// return a matrix with one row per head and token
static ggml_tensor * reshape_rows(ggml_context * ctx, ggml_tensor * cur) {
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_reshape_2d(ctx, cur, cur->ne[0], cur->ne[1]*cur->ne[2]);
}

ggml_tensor * llm_graph_razor_seq::view_rows(const llm_graph_context & g, const razor_layer & layer, const head_order & order, size_t first, size_t n) const {
    ggml_tensor * idxs = layer.device || rows->type == GGML_TYPE_I32 ? get_on_device(g, layer, rows) : rows;

    return ggml_view_1d(g.ctx0, idxs, n*n_tokens, (order.offs_rows + first)*n_tokens*ggml_element_size(idxs));
}

void llm_graph_razor_seq::build_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * dst, ggml_tensor * dst_local, ggml_tensor * cur, const head_order & order) const {
    ggml_context * ctx0 = g.ctx0;

    auto store = [&](ggml_tensor * dst, ggml_tensor * cur, size_t first) {
        ggml_tensor * idxs = view_rows(g, layer, order, first, cur->ne[1]);

        dst = ggml_reshape_2d(ctx0, dst, dst->ne[0], dst->ne[1]*dst->ne[2]);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, reshape_rows(ctx0, cur), idxs));
    };

    if (!order.split) {
        store(dst, cur, 0);

        return;
    }

    if (!order.identity) {
        cur = build_gather(g, layer, cur, order.offs_kv);
    }

    for (const size_t i : order.sequence) {
        const size_t first = order.first[i];

        store(i == 0 ? dst : dst_local,
                ggml_view_3d(ctx0, cur, cur->ne[0], order.groups[i].size(), n_tokens, cur->nb[1], cur->nb[2], first*cur->nb[1]), first);
    }
}

void llm_graph_razor_seq::build_store_device(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const {
    ggml_build_forward_expand(g.gf,
            razor_device_build_store(g.ctx0, reshape_rows(g.ctx0, k_cur), reshape_rows(g.ctx0, v_cur), layer.k, layer.v, view_rows(g, layer, order, 0, order.n_head_kv)));
}

void llm_graph_razor_seq::build_store_v_trans(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * v_cur, const head_order & order) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n_embd = v_cur->ne[0];

    if (!order.identity) {
        v_cur = build_gather(g, layer, v_cur, order.offs_kv);
    }

    auto part = [&](int64_t first, int64_t n) {
        return ggml_cont(ctx0, ggml_view_3d(ctx0, v_cur, n_embd, n, n_tokens, v_cur->nb[1], v_cur->nb[2], first*v_cur->nb[1]));
    };

    const size_t offs = get_step().strm*layer.v->nb[2];

    if (layer.n_retrieval > 0) {
        const int64_t n_elems = n_embd*layer.n_retrieval;
        const int64_t n_ctx   = mctx->get_kv().get_plan().n_ctx;

        // same as upstream: one element per row
        ggml_tensor * cur = ggml_reshape_2d(ctx0, part(order.first[0], layer.n_retrieval), 1, n_elems*n_tokens);
        ggml_tensor * dst = ggml_view_2d(ctx0, layer.v, 1, n_elems*n_ctx, ggml_element_size(layer.v), offs);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, cur, v_elems.at(n_elems)));
    }

    for (size_t i = 0; i < groups.size(); ++i) {
        const int64_t n = order.groups[i + 1].size();

        if (n > 0) {
            ggml_tensor * cur = ggml_reshape_2d(ctx0, part(order.first[i + 1], n), n_embd, n*n_tokens);
            ggml_tensor * dst = view_local(ctx0, layer, layer.v_local, i);

            dst = ggml_reshape_2d(ctx0, dst, n_embd, dst->ne[1]*dst->ne[2]);

            ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, dst, cur, groups[i].v_rows.at(n)));
        }
    }
}

void llm_graph_razor_seq::build_prefill_past(const llm_graph_context & g, const razor_layer & layer, const head_order & order) const {
    ggml_context * ctx0 = g.ctx0;

    int64_t row = (int64_t) order.groups[0].size()*prefill->cells;

    for (size_t i = 0; i < groups.size(); ++i) {
        const int64_t n_used = prefill->n_used(i);

        for (size_t j = 0; j < order.groups[i + 1].size(); ++j) {
            for (auto [store, dst] : { std::make_pair(layer.k_local, prefill->k), std::make_pair(layer.v_local, prefill->v) }) {
                ggml_tensor * src = view_local(ctx0, layer, store, i);

                src = ggml_view_2d(ctx0, src, src->ne[0], n_used, src->nb[1], j*src->nb[2]);
                dst = ggml_view_2d(ctx0, dst, dst->ne[0], n_used, dst->nb[1], row*dst->nb[1]);

                ggml_build_forward_expand(g.gf, ggml_cpy(ctx0, src, dst));
            }

            row += prefill->cells;
        }
    }
}

void llm_graph_razor_seq::build_prefill_store(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * k_cur, ggml_tensor * v_cur, const head_order & order) const {
    ggml_tensor * idxs = get_on_device(g, layer, prefill_rows);

    idxs = ggml_view_1d(g.ctx0, idxs, order.n_head_kv*n_tokens, order.offs_rows*n_tokens*ggml_element_size(idxs));

    ggml_build_forward_expand(g.gf, ggml_set_rows(g.ctx0, prefill->k, reshape_rows(g.ctx0, k_cur), idxs));
    ggml_build_forward_expand(g.gf, ggml_set_rows(g.ctx0, prefill->v, reshape_rows(g.ctx0, v_cur), idxs));
}

ggml_tensor * llm_graph_razor_seq::build_gather(const llm_graph_context & g, const razor_layer & layer, ggml_tensor * cur, size_t offs) const {
    ggml_tensor * idxs = ggml_view_2d(g.ctx0, get_on_device(g, layer, heads), cur->ne[1], n_tokens,
            cur->ne[1]*sizeof(int32_t), offs*n_tokens*sizeof(int32_t));

    return ggml_get_rows(g.ctx0, cur, idxs);
}

ggml_tensor * llm_graph_razor_seq::build_attn(
        const llm_graph_context & g,
        ggml_tensor * kq_mask,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) const {
    GGML_ASSERT(!kq_b && "refused when the context is created");

    ggml_context * ctx0 = g.ctx0;

    const auto & kv    = mctx->get_kv();
    const auto & plan  = kv.get_plan();
    const auto & layer = kv.get_layer(kv.get_source(il));
    const auto & order = orders[map_order[il]];

    const int64_t n_head    = q_cur->ne[1];
    const int64_t n_head_kv = layer.n_retrieval + layer.n_local;
    const int64_t n_gqa     = n_head/n_head_kv;

    GGML_ASSERT((!k_cur || k_cur->ne[1] == n_head_kv) && (uint32_t) q_cur->ne[2] == n_tokens);

    if (source) {
        auto get = [&](ggml_tensor * cache, int64_t n_embd_head) {
            cache = ggml_reshape_2d(ctx0, cache, cache->ne[0], cache->ne[1]*cache->ne[2]);

            return ggml_reshape_3d(ctx0, ggml_get_rows(ctx0, cache, source_rows), n_embd_head, n_head_kv, n_tokens);
        };

        k_cur = get(source->cache->get_k_rows(il), k_cur->ne[0]);
        v_cur = get(source->cache->get_v_rows(il), v_cur->ne[0]);
    }

    // true in the layer whose part of the graph is computed while one layer reads a prompt
    const bool reads = prefill && prefill->il == (uint32_t) il && layer.n_local > 0;

    // 1. fold, before the new tokens overwrite its rows and attend to the compensation token
    // a layer without K reads the cache of an earlier one, which folds and stores
    for (size_t i = 0; k_cur && i < groups.size(); ++i) {
        build_folds(g, layer, i);
    }

    if (reads && prefill->copies_past(get_step().pos0)) {
        build_prefill_past(g, layer, order);
    }

    // 2. store K and V
    if (!k_cur) {
    } else if (layer.device) {
        build_store_device(g, layer, k_cur, v_cur, order);
    } else {
        build_store(g, layer, layer.k, layer.k_local, k_cur, order);

        if (kv.get_v_trans()) {
            build_store_v_trans(g, layer, v_cur, order);
        } else {
            build_store(g, layer, layer.v, layer.v_local, v_cur, order);
        }
    }

    if (reads) {
        build_prefill_store(g, layer, k_cur, v_cur, order);
    }

    // 3. attention of all groups of heads as one operation, if possible
    if (reads && g.cparams.flash_attn && layer.attn && order.sequence.size() <= 1 + RAZOR_ATTN_MAX_SPLIT) {
        return build_attn_own(g, kq_mask, layer, order, q_cur, sinks, kq_scale);
    }
    if (!reads && g.cparams.flash_attn && (layer.attn || (!sinks && (n_tokens == 1 ? layer.device_token : layer.device_batch)))) {
        return build_attn_own(g, kq_mask, layer, order, q_cur, sinks, kq_scale);
    }

    // 4. else attention of each group with upstream's operations
    // if all heads of an ALiBi model are in one group, they keep the positions from which ggml derives their slopes
    const bool alibi = hparams.use_alibi && order.sequence.size() > 1;
    const bool flash = g.cparams.flash_attn && !alibi;

    if (!order.identity) {
        q_cur = build_gather(g, layer, q_cur, order.offs_q);

        if (sinks) {
            ggml_tensor * idxs = ggml_view_1d(ctx0, get_on_device(g, layer, heads), n_head, order.offs_q*n_tokens*sizeof(int32_t));

            sinks = ggml_reshape_1d(ctx0, ggml_get_rows(ctx0, ggml_reshape_2d(ctx0, sinks, 1, n_head), idxs), n_head);
        }
    }

    // n is the number of KV heads
    //   k [n_embd_head, n_kv, n]
    //   v [n_embd_head, n_kv, n], with v_trans [n_kv, n_embd_head, n]
    auto attend = [&](ggml_tensor * k, ggml_tensor * v, bool v_trans, int64_t first, ggml_tensor * mask) {
        const int64_t n = k->ne[2];

        ggml_tensor * sinks_group = sinks;
        if (sinks && n < n_head_kv) {
            // backends want the sinks to begin with their tensor
            sinks_group = ggml_cont(ctx0, ggml_view_1d(ctx0, sinks, n*n_gqa, first*n_gqa*sinks->nb[0]));
        }

        ggml_tensor * q = ggml_view_3d(ctx0, q_cur, q_cur->ne[0], n*n_gqa, n_tokens, q_cur->nb[1], q_cur->nb[2], first*n_gqa*q_cur->nb[1]);

        // if q is not contiguous, ggml-vulkan assumes that a quantized k is, but there are gaps between its heads
        if (!flash && ggml_is_quantized(k->type)) {
            q = ggml_permute(ctx0, ggml_cont(ctx0, ggml_permute(ctx0, q, 0, 2, 1, 3)), 0, 2, 1, 3);
        }

        // the scheduler may move matrix products of host layers to a device, where ggml-cuda does not support a quantized k with gaps
        if (!flash && ggml_is_quantized(k->type) && n_tokens > 1 && kv.has_devices() && ggml_backend_buffer_is_host(layer.k->buffer)) {
            k = ggml_cast(ctx0, k, GGML_TYPE_F32);
        }

        // build_attn_mha() assumes that v is transposed if the stride of its heads is larger than that of its rows
        if (!v_trans) {
            if (!flash && ggml_is_quantized(v->type)) {
                v = ggml_cast(ctx0, v, GGML_TYPE_F32); // quantized rows cannot be transposed
            }
            v = ggml_transpose(ctx0, v);
            if (!flash) {
                v = ggml_cont(ctx0, v);
            }
        }

        if (alibi) {
            return build_attn_alibi(g, layer, order, q, k, v, mask, first*n_gqa, kq_scale, il);
        }

        return g.build_attn_mha(q, ggml_permute(ctx0, k, 0, 2, 1, 3), ggml_permute(ctx0, v, 0, 2, 1, 3),
                nullptr, mask, sinks_group, nullptr, 0, kq_scale, il);
    };

    auto attend_retrieval = [&]() {
        auto view = [&](ggml_tensor * src) {
            return ggml_view_3d(ctx0, src, src->ne[0], n_kv_full, layer.n_retrieval,
                    src->nb[1], plan.n_ctx*src->nb[1], get_step().strm*src->nb[2]);
        };

        auto view_trans = [&](ggml_tensor * src) {
            return ggml_view_3d(ctx0, src, n_kv_full, src->ne[0], layer.n_retrieval,
                    plan.n_ctx*src->nb[0], plan.n_ctx*src->nb[1], get_step().strm*src->nb[2]);
        };

        return attend(view(layer.k), kv.get_v_trans() ? view_trans(layer.v) : view(layer.v), kv.get_v_trans(), order.first[0], kq_mask);
    };

    auto attend_prefill = [&](size_t i) {
        ggml_tensor * mask = groups[i].prefill_mask;

        size_t row = order.groups[0].size()*prefill->cells;
        for (size_t j = 0; j < i; ++j) {
            row += order.groups[j + 1].size()*prefill->cells;
        }

        auto view = [&](ggml_tensor * src) {
            return ggml_view_3d(ctx0, src, src->ne[0], mask->ne[0], order.groups[i + 1].size(),
                    src->nb[1], prefill->cells*src->nb[1], row*src->nb[1]);
        };

        return attend(view(prefill->k), view(prefill->v), false, order.first[i + 1], mask);
    };

    auto attend_local = [&](size_t i) {
        if (reads) {
            return attend_prefill(i);
        }

        auto view = [&](ggml_tensor * src) {
            src = view_local(ctx0, layer, src, i);

            return ggml_view_3d(ctx0, src, src->ne[0], groups[i].n_kv, src->ne[2], src->nb[1], src->nb[2], 0);
        };

        return attend(view(layer.k_local), view(layer.v_local), false, order.first[i + 1], groups[i].mask);
    };

    // the retrieval heads come first in the graph, independently of the order of the heads
    std::vector<ggml_tensor *> outs(order.groups.size(), nullptr);
    for (size_t i = 0; i < outs.size(); ++i) {
        if (!order.groups[i].empty()) {
            outs[i] = i == 0 ? attend_retrieval() : attend_local(i - 1);
        }
    }

    if (order.sequence.size() == 1) {
        return outs[order.sequence[0]];
    }

    // 5. concatenate the groups and restore the order of the heads
    ggml_tensor * cur = outs[order.sequence[0]];
    for (size_t i = 1; i < order.sequence.size(); ++i) {
        cur = ggml_concat(ctx0, cur, outs[order.sequence[i]], 0);
    }

    if (!order.identity) {
        cur = ggml_reshape_3d(ctx0, cur, cur->ne[0]/n_head, n_head, n_tokens);
        cur = build_gather(g, layer, cur, order.offs_out);
        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*n_head, n_tokens);
    }

    ggml_build_forward_expand(g.gf, cur);

    return cur;
}

ggml_tensor * llm_graph_razor_seq::build_attn_alibi(
        const llm_graph_context & g,
        const razor_layer & layer,
        const head_order & order,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * mask,
            int64_t   first,
              float   kq_scale,
                int   il) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n = q->ne[1];

    // 1. the mask of each head. The slope is repeated to a row: CPUs multiply two rows faster than a row by a number
    ggml_tensor * slope = get_on_device(g, layer, slopes);

    slope = ggml_view_3d(ctx0, slope, 1, 1, n, slope->nb[0], slope->nb[0], (order.offs_slopes + first)*slope->nb[0]);
    slope = ggml_repeat_4d(ctx0, slope, mask->ne[0], 1, n, 1);

    if (mask->type != GGML_TYPE_F32) {
        mask = ggml_cast(ctx0, mask, GGML_TYPE_F32);
    }
    mask = ggml_mul(ctx0, ggml_repeat_4d(ctx0, mask, mask->ne[0], mask->ne[1], n, 1), slope);

    // 2. same as build_attn_mha() without flash attention
    ggml_tensor * kq = ggml_mul_mat(ctx0, k, ggml_permute(ctx0, q, 0, 2, 1, 3));
    g.cb(kq, "kq", il);

    ggml_prec_set_acc(kq, GGML_PREC_F32);

    kq = ggml_soft_max_ext(ctx0, kq, mask, kq_scale, 0.0f);
    g.cb(kq, "kq_soft_max", il);

    ggml_tensor * cur = ggml_mul_mat(ctx0, v, kq);
    g.cb(cur, "kqv", il);

    cur = ggml_permute(ctx0, cur, 0, 2, 1, 3);
    cur = ggml_cont_2d(ctx0, cur, cur->ne[0]*n, n_tokens);

    if (!g.cparams.offload_kqv) {
        ggml_backend_sched_set_tensor_backend(g.sched, cur, g.backend_cpu);
    }

    return cur;
}

ggml_tensor * llm_graph_razor_seq::build_attn_own(
        const llm_graph_context & g,
        ggml_tensor * kq_mask,
        const razor_layer & layer,
        const head_order & order,
        ggml_tensor * q_cur,
        ggml_tensor * sinks,
              float   kq_scale) const {
    const auto & kv   = mctx->get_kv();
    const auto & plan = kv.get_plan();

    const uint32_t strm = get_step().strm;

    const int64_t first_full = strm*layer.k->ne[1];
    const int64_t first      = strm*layer.k_local->ne[1];

    razor_attn & attn = attns.emplace_back();

    attn.scale  = kq_scale;
    attn.cap    = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    attn.sinks  = sinks;
    attn.slopes = razor_attn_slopes(order.n_head, hparams.f_max_alibi_bias);
    attn.kernel = layer.attn;
    attn.n_gqa  = order.n_head/order.n_head_kv;

    const bool reads = prefill && prefill->il == layer.il && layer.n_local > 0;

    if (reads) {
        attn.k_local = prefill->k;
        attn.v_local = prefill->v;
    } else if (order.split) {
        attn.k_local = layer.k_local;
        attn.v_local = layer.v_local;
    }

    // leave out groups without heads, but keep one local group: the operations of devices require it
    size_t i_local = 0;

    attn.groups.push_back({ &order.groups[0], kq_mask, first_full, plan.n_ctx });

    int64_t first_prefill = reads ? (int64_t) order.groups[0].size()*prefill->cells : 0;

    for (size_t i = 0; i < groups.size(); ++i) {
        if (order.groups[i + 1].empty()) {
            continue;
        }

        if (reads) {
            attn.groups.push_back({ &order.groups[i + 1], groups[i].prefill_mask, first_prefill, prefill->cells });
            first_prefill += order.groups[i + 1].size()*prefill->cells;
        } else {
            attn.groups.push_back({ &order.groups[i + 1], groups[i].mask, first + (int64_t) plan.first_row(layer.il, i), plan.groups[i].cells });
        }
        i_local = i;
    }
    if (attn.groups.size() == 1) {
        attn.groups.push_back({ &order.groups[1], groups[0].mask, first, plan.groups[0].cells });
    }

    ggml_tensor * cur =
        layer.attn    ? attn.build(g.ctx0, q_cur, layer.k, layer.v) :
        n_tokens == 1 ? razor_device_build_attn      (g.ctx0, attn, q_cur, layer.k, layer.v, strm) :
                        razor_device_build_attn_batch(g.ctx0, attn, q_cur, layer.k, layer.v, strm, groups[i_local].batch);

    ggml_build_forward_expand(g.gf, cur);

    return cur;
}

//
// llm_graph_input_razor
//

llm_graph_input_razor::llm_graph_input_razor(
        ggml_context * ctx,
        const llama_ubatch  & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_razor_context * mctx) : n_tokens(ubatch.n_tokens/mctx->n_seqs()) {

    for (uint32_t i = 0; i < mctx->n_seqs(); ++i) {
        seqs.push_back(std::make_unique<llm_graph_razor_seq>(ctx, i, n_tokens, hparams, cparams, mctx));
    }
}

llm_graph_input_razor * llm_graph_input_razor::create(
        llm_graph_result * res,
        ggml_context * ctx,
        const llama_ubatch  & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_memory_context_i * mctx) {
    const auto * mctx_razor = llama_razor_get_context(mctx);
    if (!mctx_razor) {
        return nullptr;
    }

    return static_cast<llm_graph_input_razor *>(
            res->add_input(std::make_unique<llm_graph_input_razor>(ctx, ubatch, hparams, cparams, mctx_razor)));
}

void llm_graph_input_razor::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ubatch->n_tokens == n_tokens*seqs.size());

    for (auto & seq : seqs) {
        seq->set_input();
    }
}

bool llm_graph_input_razor::can_reuse(const llm_graph_params & params) {
    const auto * mctx = llama_razor_get_context(params.mctx);

    if (!mctx || mctx->n_seqs() != seqs.size() || params.ubatch.n_tokens != n_tokens*seqs.size()) {
        return false;
    }

    bool res = true;
    for (auto & seq : seqs) {
        res = seq->can_reuse(mctx) && res;
    }

    return res;
}

ggml_tensor * llm_graph_input_razor::build_attn(
        const llm_graph_context & g,
        ggml_tensor * kq_mask,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) const {
    ggml_context * ctx0 = g.ctx0;

    // upstream's mask has a dimension for the sequences. It also reserves memory with an ubatch of all sequences, for which razor
    // builds the graph of one sequence with as many tokens, which needs the most memory
    if (kq_mask->ne[3] > 1) {
        kq_mask = ggml_reshape_2d(ctx0, kq_mask, kq_mask->ne[0], q_cur->ne[2]);
    }

    if (seqs.size() == 1) {
        return seqs[0]->build_attn(g, kq_mask, q_cur, k_cur, v_cur, kq_b, sinks, kq_scale, il);
    }

    ggml_tensor * res = nullptr;

    for (size_t i = 0; i < seqs.size(); ++i) {
        // return the tokens of the sequence
        auto view = [&](ggml_tensor * cur) {
            return cur ? ggml_view_3d(ctx0, cur, cur->ne[0], cur->ne[1], n_tokens, cur->nb[1], cur->nb[2], i*n_tokens*cur->nb[2]) : nullptr;
        };

        ggml_tensor * mask = ggml_view_2d(ctx0, kq_mask, kq_mask->ne[0], n_tokens, kq_mask->nb[1], i*n_tokens*kq_mask->nb[1]);

        ggml_tensor * cur = seqs[i]->build_attn(g, mask, view(q_cur), view(k_cur), view(v_cur), kq_b, sinks, kq_scale, il);

        res = res ? ggml_concat(ctx0, res, cur, 1) : cur;
    }

    ggml_build_forward_expand(g.gf, res);

    return res;
}

uint32_t llama_razor_n_nodes(const llama_memory_i * memory) {
    const auto * kv = llama_razor_get_cache(memory);
    if (!kv) {
        return 0;
    }

    // per sequence and layer: 3 gathers and 3 stores of up to 6 nodes; per group: up to 2 stores, an attention (up to 23 nodes without flash
    // attention) and 2 folds of 15 nodes; with several sequences 5 views and a concatenation
    const uint32_t n_seqs = std::min(kv->get_n_stream(), llama_kv_cache_razor::MAX_SEQS);

    const uint32_t n_all = n_seqs*(20 + 70*kv->get_plan().groups.size() + (n_seqs > 1 ? 6 : 0))*kv->get_plan().n_layer();

    // a layer that reads a prompt also copies the rows of each local head (with views), and stores K and V a second time
    uint32_t n_heads = 0;
    for (uint32_t il = 0; il < kv->get_plan().n_layer(); ++il) {
        n_heads = std::max(n_heads, kv->get_plan().n_local(il));
    }

    // if K and V come from another cache, each layer takes them from its rows
    const uint32_t n_source = 8*kv->get_plan().n_layer();

    return n_all + 8*n_heads + n_source + 20;
}
