#include "llama-kv-cache-razor.h"

#include "llama-razor-error.h"
#include "llama-razor-pages.h"
#include "llama-razor-prefill.h"
#include "llama-razor-source.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <stdexcept>

static constexpr uint32_t RAZOR_STATE_MAGIC   = 0x315a5252; // "RRZ1"
static constexpr uint32_t RAZOR_STATE_VERSION = 2;

llama_razor_hparams::llama_razor_hparams(const llama_hparams & hparams) : hparams_head(hparams) {
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        hparams_head.n_head_kv_arr[il] = 1;
    }
}

//
// llama_kv_cache_razor
//

llama_kv_cache_razor::llama_kv_cache_razor(
        const llama_model & model,
     const llama_cparams  & cparams,
         llama_razor_plan   plan_in,
        razor_attn_kernel   attn,
      razor_device_choice   device,
const llama_razor_rewind_params & rewind_params,
    const layer_reuse_cb & reuse) :
    llama_razor_hparams(model.hparams),
    llama_kv_cache(
            model,
            hparams_head,
            plan_in.types.k,
            plan_in.types.v,
            !cparams.flash_attn,
            cparams.offload_kqv,
            cparams.kv_unified,
            cparams.n_ctx_seq,
            cparams.n_seq_max,
            1,
            0,
            LLAMA_SWA_TYPE_NONE,
            nullptr,
            [](int32_t) { return false; },
            nullptr,
            nullptr),
    cparams(cparams), plan(std::move(plan_in)) {

    // 1. initialize the streams and the rotation
    const llama_hparams & hparams_model = model.hparams;

    const uint32_t n_strm = get_n_stream();

    streams.resize(n_strm);
    for (auto & st : streams) {
        st = empty_state();
    }

    init_rotation();

    // 2. create the tensors of each layer
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        const int64_t n_retrieval = plan.retrieval[il].size();
        const int64_t n_local     = plan.n_local(il);

        razor_layer layer = { il, (uint32_t) n_retrieval, (uint32_t) n_local, nullptr, nullptr, nullptr, nullptr, {}, std::vector<group_sums>(plan.groups.size()) };

        const int32_t source = reuse ? reuse(il) : -1;

        sources.push_back(source < 0 ? il : source);

        if (n_retrieval + n_local == 0) {
            layers_razor.push_back(layer);
            continue;
        }

        ggml_backend_buffer_type_t buft = cparams.offload_kqv ?
            ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        auto & ctx_ptr = ctx_map[buft];
        if (!ctx_ptr) {
            // up to 4 tensors per layer and 2 per group, their parts of each stream, 2 per retrieval head and stream
            size_t n_tensors = 0;
            for (const auto & heads : plan.retrieval) {
                n_tensors += (4 + 2*plan.groups.size())*(1 + n_strm) + 2*(1 + n_strm)*heads.size();
            }

            ggml_init_params params = {
                /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
                /*.mem_buffer =*/ NULL,
                /*.no_alloc   =*/ true,
            };

            ctx_ptr.reset(ggml_init(params));
            if (!ctx_ptr) {
                throw std::runtime_error("failed to create ggml context for the KV cache");
            }
        }

        ggml_context * ctx = ctx_ptr.get();

        const int64_t n_embd_k = hparams_model.n_embd_head_k(il);
        const int64_t n_embd_v = hparams_model.n_embd_head_v(il);

        const ggml_type type_k = plan.first_types(il).k;
        const ggml_type type_v = plan.first_types(il).v;

        const bool split = plan.is_split(il);

        layer.k = ggml_new_tensor_3d(ctx, type_k, n_embd_k, plan.n_rows(il), n_strm);
        layer.v = ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.n_rows(il), n_strm);

        layer.k_local = split ? ggml_new_tensor_3d(ctx, plan.types_local.k, n_embd_k, plan.n_rows_local(il), n_strm) : layer.k;
        layer.v_local = split ? ggml_new_tensor_3d(ctx, plan.types_local.v, n_embd_v, plan.n_rows_local(il), n_strm) : layer.v;

        ggml_format_name(layer.k, "cache_razor_k_l%d", il);
        ggml_format_name(layer.v, "cache_razor_v_l%d", il);

        if (split) {
            ggml_format_name(layer.k_local, "cache_razor_k_local_l%d", il);
            ggml_format_name(layer.v_local, "cache_razor_v_local_l%d", il);
        }

        for (size_t g = 0; g < plan.groups.size(); ++g) {
            const int64_t n = plan.local[il][g].size();

            if (plan.n_comp > 0 && n > 0) {
                auto & sums = layer.sums[g];

                sums.k = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_k*n, N_SLOTS, n_strm);
                sums.v = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_v*n, N_SLOTS, n_strm);

                ggml_format_name(sums.k, "cache_razor_k_sum_l%d_g%zu", il, g);
                ggml_format_name(sums.v, "cache_razor_v_sum_l%d_g%zu", il, g);
            }
        }

        const auto n_groups = std::count_if(plan.local[il].begin(), plan.local[il].end(), [](const auto & heads) { return !heads.empty(); });

        if (ggml_backend_buft_is_host(buft) && razor_attn_supported(type_k, type_v, n_embd_k, n_embd_v) &&
                (!split || (n_groups <= RAZOR_ATTN_MAX_SPLIT && razor_attn_supported(plan.types_local.k, plan.types_local.v, n_embd_k, n_embd_v)))) {
            layer.attn = attn;
        }

        layer.device = device != RAZOR_DEVICE_OFF && !split && cparams.offload_kqv && cparams.flash_attn && !hparams_model.attn_soft_cap && razor_device_supported(
                model.dev_layer(il), type_k, type_v, n_embd_k, n_embd_v, hparams_model.n_head(il), n_retrieval + n_local);

        layer.device_batch = layer.device && device == RAZOR_DEVICE_ON && razor_device_batch_supported(
                model.dev_layer(il), type_k, type_v, n_embd_k, n_embd_v, hparams_model.n_head(il), n_retrieval + n_local);

        layer.device_token = layer.device       && n_groups <= 1 && !hparams_model.use_alibi;
        layer.device_batch = layer.device_batch && n_groups <= 1 && !hparams_model.use_alibi;

        std::vector<ggml_tensor *> tensors = { layer.k, layer.v };
        if (split) {
            tensors.insert(tensors.end(), { layer.k_local, layer.v_local });
        }
        for (const auto & sums : layer.sums) {
            if (sums.k) {
                tensors.insert(tensors.end(), { sums.k, sums.v });
            }
        }

        for (uint32_t s = 0; n_strm > 1 && s < n_strm; ++s) {
            auto & parts = layer.parts.emplace_back();
            for (ggml_tensor * t : tensors) {
                parts.push_back(ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], s*t->nb[2]));
            }
        }

        // each retrieval head is a layer of llama_kv_cache
        for (int64_t i = 0; i < n_retrieval; ++i) {
            auto view = [&](ggml_tensor * t) {
                return ggml_view_3d(ctx, t, t->ne[0], plan.n_ctx, n_strm, t->nb[1], t->nb[2], i*plan.n_ctx*t->nb[1]);
            };

            kv_layer head = { il, view(layer.k), view(layer.v), {}, {} };

            for (uint32_t s = 0; s < n_strm; ++s) {
                head.k_stream.push_back(ggml_view_2d(ctx, head.k, n_embd_k, plan.n_ctx, head.k->nb[1], s*head.k->nb[2]));
                head.v_stream.push_back(ggml_view_2d(ctx, head.v, n_embd_v, plan.n_ctx, head.v->nb[1], s*head.v->nb[2]));
            }

            layers.push_back(std::move(head));
        }

        layers_razor.push_back(layer);
    }

    // 3. allocate and clear the buffers
    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams_model.no_alloc) {
            // same as upstream: with a dummy buffer, the scheduler does not allocate the tensors
            buf = ggml_backend_buft_alloc_buffer(buft, /*size =*/ 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for the KV cache");
        }

        razor_use_huge_pages(buf);

        // the padding must not contain NaNs, and SLOT_ZERO is never written
        ggml_backend_buffer_clear(buf, 0);

        LLAMA_LOG_INFO("%s: %10s KV buffer size = %8.2f MiB\n", __func__,
                ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    // 4. create the rewind log
    if (rewind_params.mode != RAZOR_REWIND_OFF && !hparams_model.no_alloc) {
        init_rewind(rewind_params);
    }

    // 5. log the number of heads
    size_t n_retrieval = 0;
    size_t n_local     = 0;
    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        n_retrieval += plan.retrieval[il].size();
        n_local     += plan.n_local(il);
    }

    LLAMA_LOG_INFO("%s: %zu of %zu KV heads keep all %u tokens, %zu keep %u sinks, a window and %s (blocks of %u)\n", __func__,
            n_retrieval, n_retrieval + n_local, plan.n_ctx, n_local, plan.sink_tokens,
            plan.n_comp > 0 ? "a compensation token" : "no compensation token", plan.block);

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        size_t n = 0;
        for (const auto & heads : plan.local) {
            n += heads[g].size();
        }

        LLAMA_LOG_INFO("%s: %zu KV heads have a window of %u (%u cells)\n", __func__, n, plan.groups[g].window, plan.groups[g].cells);
    }
}

// same as the constructor of llama_kv_cache, which has no layers at that time
void llama_kv_cache_razor::init_rotation() {
    const char * LLAMA_ATTN_ROT_DISABLE = getenv("LLAMA_ATTN_ROT_DISABLE");
    const bool rot = !(LLAMA_ATTN_ROT_DISABLE && atoi(LLAMA_ATTN_ROT_DISABLE));

    auto common = [](int32_t all, uint32_t n) { return all == 0 || all == (int32_t) n ? (int32_t) n : -1; };

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        if (plan.n_local(il) > 0 || !plan.retrieval[il].empty()) {
            n_embd_head_k_all = common(n_embd_head_k_all, hparams.n_embd_head_k(il));
            n_embd_head_v_all = common(n_embd_head_v_all, hparams.n_embd_head_v(il));
        }
    }

    // the queries of a layer are rotated together, so all heads are rotated if those of one kind are
    const bool any_k = ggml_is_quantized(plan.types.k) || ggml_is_quantized(plan.types_local.k);
    const bool any_v = ggml_is_quantized(plan.types.v) || ggml_is_quantized(plan.types_local.v);

    attn_rot_k = rot && any_k && n_embd_head_k_all > 0 && hparams.n_embd_head_k() % 64 == 0;
    attn_rot_v = rot && any_v && n_embd_head_v_all > 0 && hparams.n_embd_head_v() % 64 == 0;

    for (int64_t n = 64; (attn_rot_k || attn_rot_v) && n <= std::max(n_embd_head_k_all, n_embd_head_v_all); n *= 2) {
        // orthonormal Walsh-Hadamard matrix: the sign is the parity of the bits that row and column have in common
        auto & mat = attn_rot_hadamard[n];
        mat.resize(n*n);
        for (int64_t i = 0; i < n*n; ++i) {
            int parity = 0;
            for (int64_t bits = (i/n) & (i%n); bits != 0; bits &= bits - 1) {
                parity ^= 1;
            }
            mat[i] = (parity ? -1.0f : 1.0f)/sqrtf(n);
        }
    }
}

llama_kv_cache_razor::~llama_kv_cache_razor() = default;

llama_memory_context_ptr llama_razor_refuse_batch(const char * why) {
    LLAMA_LOG_ERROR("razor: %s\n", why);
    llama_razor_error_set(why);

    return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_razor::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    llama_razor_error_set("");

    // upstream's output buffer has n_outputs_max rows
    if (full_prefill && balloc.get_n_outputs() > cparams.n_outputs_max) {
        return llama_razor_refuse_batch("the batch has more outputs than n_outputs_max (n_batch by default); request the logits of fewer tokens");
    }

    std::vector<llama_ubatch> ubatches;

    const char * why = split_batch(balloc, n_ubatch, false, ubatches);
    if (why) {
        return llama_razor_refuse_batch(why);
    }

    // find cells for the retrieval heads
    auto sinfos = prepare(ubatches);
    if (sinfos.empty()) {
        return llama_razor_refuse_batch("the context is full");
    }

    if (source) {
        if (!source->has(ubatches)) {
            return llama_razor_refuse_batch("the source does not hold these tokens");
        }
        if (balloc.get_n_outputs() > 0) {
            return llama_razor_refuse_batch("tokens from a source have no outputs");
        }
    }

    std::shared_ptr<llama_razor_prefill> prefill;

    if (full_prefill && !source && llama_razor_prefill::is_useful(*this, ubatches)) {
        try {
            prefill = std::make_shared<llama_razor_prefill>(this, sinfos, ubatches);
        } catch (const std::bad_alloc &) {
            return llama_razor_refuse_batch("out of memory for reading a prompt with full attention");
        }
    }

    return std::make_unique<llama_kv_cache_razor_context>(this, std::move(sinfos), std::move(ubatches), std::move(prefill));
}

const char * llama_kv_cache_razor::split_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool equal_seqs,
            std::vector<llama_ubatch> & ubatches) const {
    // 1. check that the cache can be used
    const llama_batch & batch = balloc.get_batch();

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.n_seq_id[i] != 1 || batch.seq_id[i][0] >= (llama_seq_id) n_stream) {
            return "a token of several sequences is not supported, decode it in one sequence and copy the sequence";
        }
        if (streams[batch.seq_id[i][0]].broken) {
            return "the sequence was changed in a way that local heads cannot follow, clear it before the next token is decoded";
        }
    }
    if (!cparams.causal_attn) {
        return "non-causal attention is not supported, switch razor off for this context";
    }
    if (cparams.training) {
        return "training is not supported, switch razor off for this context";
    }

    // 2. split the batch where the frontier changes
    balloc.split_reset();

    std::vector<uint32_t> next(n_stream);   // position of the next token of each sequence
    std::vector<uint32_t> n_left(n_stream); // tokens that are in no ubatch

    for (uint32_t s = 0; s < n_stream; ++s) {
        next[s] = n_tokens(s);
    }
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        n_left[batch.seq_id[i][0]]++;
    }

    int32_t i_next = 0; // first token that is in no ubatch

    auto is_used = [&](int32_t i) { return (uint32_t) batch.pos[i] < next[batch.seq_id[i][0]]; };

    while (true) {
        while (i_next + 1 < batch.n_tokens && is_used(i_next)) {
            ++i_next;
        }

        // all positions of a sequence in an ubatch have the same frontiers, so the contents of the cache do not depend on the split
        auto n_to_frontier = [&](uint32_t s) { return plan.frontier_end(next[s]) - next[s]; };

        const uint32_t s_next = batch.seq_id[i_next][0];

        // the sequences of split_equal(), and the tokens that each of them can have
        uint32_t n_seqs = 1;
        uint32_t n_each = n_left[s_next];
        uint32_t n_room = n_to_frontier(s_next);

        for (int32_t i = i_next + 1; i < batch.n_tokens && n_seqs < MAX_SEQS; ++i) {
            const uint32_t s = batch.seq_id[i][0];

            if (s == s_next + n_seqs && !is_used(i)) {
                n_seqs++;
                n_each = std::min(n_each, n_left[s]);
                n_room = std::min(n_room, n_to_frontier(s));
            }
        }

        llama_ubatch ubatch;

        // the ubatch begins with the first token that is in no ubatch
        // it takes several sequences if one of them ends in it. Other ubatches are large enough with one sequence
        if (n_seqs == MAX_SEQS && n_each == 1 && n_ubatch >= MAX_SEQS) {
            ubatch = balloc.split_equal(MAX_SEQS - 1, true, 0); // it takes one more sequence, with one token each
        } else if (n_seqs > 1 && n_seqs < MAX_SEQS && n_each <= n_room && n_each*n_seqs <= n_ubatch) {
            ubatch = balloc.split_equal(n_each*n_seqs, true, 0);
        } else {
            const uint32_t n_max = std::min(n_ubatch, n_to_frontier(s_next));

            ubatch = equal_seqs || n_stream > 1 ? balloc.split_seq(n_max) : balloc.split_simple(n_max);
        }

        if (ubatch.n_tokens == 0) {
            break;
        }

        // the tokens of an image share a position
        if (model.hparams.n_pos_per_embd() > 1 && !ubatch.token) {
            return "a batch of embeddings (images) is not supported with M-RoPE, switch razor off for this context";
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const uint32_t s = ubatch.seq_id[i][0];

            if (ubatch.pos[i] != (llama_pos) next[s]) {
                return "the positions of a sequence must start at 0 and follow each other without a gap";
            }

            next[s]++;
            n_left[s]--;

            if (next[s] > plan.n_ctx) {
                return "the context is full";
            }
        }

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    return balloc.get_n_used() < balloc.get_n_tokens() ? "failed to split the batch" : nullptr;
}

llama_memory_context_ptr llama_kv_cache_razor::init_full() {
    return std::make_unique<llama_kv_cache_razor_context>(this);
}

llama_memory_context_ptr llama_kv_cache_razor::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);

    this->lctx = lctx;

    return std::make_unique<llama_kv_cache_razor_update>(this, lctx);
}

bool llama_kv_cache_razor::get_can_shift() const {
    // the keys in the compensation token do not have a position that could be shifted
    return false;
}

void llama_kv_cache_razor::clear(bool data) {
    llama_kv_cache::clear(data);

    for (auto & st : streams) {
        st = empty_state();
    }

    last_steps.clear();
    last_is_prefill = false;

    for (uint32_t s = 0; rewind && s < n_stream; ++s) {
        rewind->clear(s);
    }
}

void llama_kv_cache_razor::save_cells(uint32_t strm, llama_kv_cells & cells, uint32_t & head) const {
    cells = v_cells[strm];
    head  = v_heads[strm];
}

void llama_kv_cache_razor::restore(uint32_t strm, const llama_kv_cells & cells, uint32_t head, const stream_state & st) {
    v_cells[strm] = cells;
    v_heads[strm] = head;

    streams[strm] = st;
}

bool llama_kv_cache_razor::owns(ggml_backend_buffer_t buf) const {
    return std::any_of(ctxs_bufs.begin(), ctxs_bufs.end(), [&](const auto & x) { return x.second.get() == buf; });
}

void llama_kv_cache_razor::clear_stream(uint32_t strm) {
    v_cells[strm].reset();
    v_heads[strm] = 0;

    streams[strm] = empty_state();

    if (rewind) {
        rewind->clear(strm);
    }
}

llama_kv_cache_razor::stream_state llama_kv_cache_razor::empty_state() const {
    stream_state res;

    res.groups.resize(plan.groups.size());
    for (auto & group : res.groups) {
        group.frontier = plan.sink_tokens;
    }

    return res;
}

bool llama_kv_cache_razor::can_unfold(const stream_state & st, size_t i_group, uint32_t to) const {
    // with a compensation token, only its value before the last fold is kept; without, only the rows are needed
    if (plan.n_comp > 0 && st.groups[i_group].frontier_prev != (int64_t) to) {
        return false;
    }

    // position p + ring overwrites the row of position p
    return st.n_high <= to + plan.groups[i_group].ring();
}

bool llama_kv_cache_razor::can_go_back(uint32_t strm, uint32_t pos) const {
    return can_unfold_to(streams[strm], pos) || (rewind && can_rewind(plan_rewind(strm, pos, pos)));
}

bool llama_kv_cache_razor::can_unfold_to(const stream_state & st, uint32_t pos) const {
    for (size_t g = 0; g < plan.groups.size(); ++g) {
        const uint32_t frontier = plan.groups[g].frontier(pos);

        if (frontier < st.groups[g].frontier && !can_unfold(st, g, frontier)) {
            return false;
        }
    }

    return true;
}

void llama_kv_cache_razor::unfold(group_state & st, uint32_t to) const {
    st.frontier      = to;
    st.frontier_prev = -1;
    st.slot         ^= 1;
}

bool llama_kv_cache_razor::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    // ask all sequences before the first one changes
    const auto range = streams_of(seq_id);

    for (uint32_t s = range.first; s < range.end; ++s) {
        // sequences that end before p0 do not matter if all are meant
        const bool is_shorter = seq_id < 0 && n_stream > 1 && n_tokens(s) < (uint32_t) p0;

        if (!is_shorter && !can_remove(s, p0, p1)) {
            return false;
        }
    }

    // read what is needed from the rewind log before anything changes
    std::vector<rewind_step> steps;

    for (uint32_t s = range.first; s < range.end; ++s) {
        if (p0 > 0 && p0 < p1 && (uint32_t) p0 < n_tokens(s) && !can_unfold_to(streams[s], p0)) {
            steps.push_back(plan_rewind(s, p0, p0));

            if (!load_rewind(steps.back())) {
                return false;
            }
        }
    }

    for (const auto & step : steps) {
        apply_rewind(step);
    }

    for (uint32_t s = range.first; s < range.end; ++s) {
        remove(s, p0, p1);
    }

    return true;
}

llama_kv_cache_razor::stream_range llama_kv_cache_razor::streams_of(llama_seq_id seq_id) const {
    if (seq_id < 0) {
        return { 0, n_stream };
    }

    return { (uint32_t) seq_id, std::min<uint32_t>((uint32_t) seq_id + 1, n_stream) };
}

bool llama_kv_cache_razor::can_remove(uint32_t strm, uint32_t p0, uint32_t p1) const {
    const uint32_t n = n_tokens(strm);

    if ((p0 == 0 && p1 >= n) || p0 >= p1 || p0 == n) {
        return true;
    }

    // there must be p0 tokens to keep, and tokens in the middle cannot be removed from a mean
    if (p0 > n || p1 < n) {
        return false;
    }

    return can_go_back(strm, p0);
}

void llama_kv_cache_razor::remove(uint32_t strm, uint32_t p0, uint32_t p1) {
    const uint32_t n = n_tokens(strm);

    if (p0 == 0 && p1 >= n) {
        clear_stream(strm);

        return;
    }

    if (p0 >= p1 || p0 >= n) {
        return;
    }

    auto & st = streams[strm];

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        const uint32_t frontier = plan.groups[g].frontier(p0);

        if (frontier < st.groups[g].frontier) {
            unfold(st.groups[g], frontier);
        }
    }

    if (rewind) {
        rewind->cut(strm, p0);
    }

    llama_kv_cache::seq_rm(strm, p0, p1);
}

void llama_kv_cache_razor::abort_ubatch(llama_seq_id seq_id, llama_pos p0) {
    const uint32_t strm = get_stream(seq_id);

    const auto it = std::find_if(last_steps.begin(), last_steps.end(), [&](const auto & step) { return step.strm == strm; });
    if (it == last_steps.end()) {
        return; // cleared
    }

    auto & st = streams[strm];

    LLAMA_LOG_WARN("%s: the ubatch at position %d did not complete\n", __func__, p0);

    // if one layer was reading a prompt, the layers hold different tokens
    if (last_is_prefill) {
        clear_stream(strm);

        return;
    }

    // some layers may have folded and others may not
    const auto & groups = it->groups;

    bool folds       = false;
    bool overwritten = false;

    for (size_t g = 0; g < groups.size(); ++g) {
        folds       = folds       || groups[g].n_fold > 0;
        overwritten = overwritten || (groups[g].n_fold > 0 && st.n_high > groups[g].fold_from + plan.groups[g].ring());
    }

    if (overwritten) {
        auto step = plan_rewind(strm, p0, p0 - 1);

        if (!can_rewind(step) || !load_rewind(step)) {
            LLAMA_LOG_WARN("%s: rows that were to be folded are overwritten, clearing the sequence\n", __func__);

            clear_stream(strm);

            return;
        }

        apply_rewind(step);
    } else {
        for (size_t g = 0; g < groups.size(); ++g) {
            if (groups[g].n_fold > 0) {
                unfold(st.groups[g], groups[g].fold_from);
            }
        }
    }

    if (rewind && folds) {
        rewind->cut(strm, p0 - 1);
    }

    llama_kv_cache::seq_rm(seq_id, p0, -1);
}

void llama_kv_cache_razor::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    for (const llama_seq_id seq_id : { seq_id_src, seq_id_dst }) {
        if (seq_id < 0 || seq_id >= (llama_seq_id) n_stream) {
            LLAMA_LOG_ERROR("razor: seq_cp of sequence %d to %d is not possible, the context has %u (n_seq_max)\n", seq_id_src, seq_id_dst, n_stream);

            return;
        }
    }

    const llama_pos n = n_tokens(seq_id_src);

    clear_stream(seq_id_dst);

    if (n > 0 && (p0 > 0 || (p1 >= 0 && p1 < n))) {
        LLAMA_LOG_ERROR("razor: seq_cp of a part of a sequence is not supported, copy all of it (p0 = p1 = -1)\n");
        streams[seq_id_dst].broken = true;

        return;
    }

    llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, -1, -1);

    // upstream would copy the rows of the retrieval heads alone
    sc_info = {};
    copies.emplace_back(seq_id_src, seq_id_dst);

    streams[seq_id_dst] = streams[seq_id_src];

    if (rewind) {
        rewind->copy(seq_id_src, seq_id_dst);
    }
}

void llama_kv_cache_razor::copy_streams() const {
    for (const auto & [src, dst] : copies) {
        for (const auto & layer : layers_razor) {
            for (size_t i = 0; layer.k && i < layer.parts[src].size(); ++i) {
                ggml_backend_tensor_copy(layer.parts[src][i], layer.parts[dst][i]);
            }
        }
    }

    copies.clear();
}

void llama_kv_cache_razor::seq_keep(llama_seq_id seq_id) {
    for (uint32_t s = 0; s < n_stream; ++s) {
        if ((llama_seq_id) s != seq_id) {
            clear_stream(s);
        }
    }
}

void llama_kv_cache_razor::set_broken(llama_seq_id seq_id, const char * why) {
    if (seq_id >= 0 && seq_id < (llama_seq_id) n_stream && n_tokens(seq_id) > 0) {
        LLAMA_LOG_ERROR("razor: %s\n", why);
        streams[seq_id].broken = true;
    }
}

void llama_kv_cache_razor::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (shift != 0) {
        set_broken(seq_id, "seq_add is not supported, positions cannot be shifted (llama_memory_can_shift is false)");
    }
}

void llama_kv_cache_razor::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (d != 1) {
        set_broken(seq_id, "seq_div is not supported, positions cannot be divided");
    }
}

size_t llama_kv_cache_razor::bytes_k(const razor_layer & layer) {
    return layer.k ? ggml_nbytes(layer.k) + (layer.k_local != layer.k ? ggml_nbytes(layer.k_local) : 0) : 0;
}

size_t llama_kv_cache_razor::bytes_v(const razor_layer & layer) {
    return layer.v ? ggml_nbytes(layer.v) + (layer.v_local != layer.v ? ggml_nbytes(layer.v_local) : 0) : 0;
}

size_t llama_kv_cache_razor::bytes_sums(const razor_layer & layer) {
    size_t res = 0;
    for (const auto & sums : layer.sums) {
        res += sums.k ? ggml_nbytes(sums.k) + ggml_nbytes(sums.v) : 0;
    }

    return res;
}

uint32_t llama_kv_cache_razor::n_tokens(uint32_t strm) const {
    return seq_pos_max(strm) + 1;
}

llama_pos llama_kv_cache_razor::seq_pos_min(llama_seq_id seq_id) const {
    const uint32_t strm = get_stream(seq_id);

    const llama_pos n = n_tokens(strm);

    return n > 0 ? std::max<llama_pos>(n - n_rollback(strm), 1) - 1 : -1;
}

uint32_t llama_kv_cache_razor::n_rollback(uint32_t strm) const {
    // go back block by block as long as the frontiers can be moved back, too
    uint32_t n_left = n_tokens(strm);
    while (n_left > 0) {
        if (!can_go_back(strm, n_left - 1)) {
            break;
        }

        // all positions of a block have the same frontiers, and the smallest window folds first
        n_left = plan.groups.back().frontier(n_left - 1) == plan.sink_tokens ? 0 : (n_left - 1) - (n_left - 1) % plan.block;
    }

    return n_tokens(strm) - n_left;
}

std::vector<llama_kv_cache_razor::step_info> llama_kv_cache_razor::apply_local(const llama_ubatch & ubatch, const llama_razor_prefill * prefill) {
    const uint32_t n = ubatch.n_tokens/ubatch.n_seqs_unq;

    last_steps.clear();
    last_is_prefill = prefill != nullptr;

    for (uint32_t i = 0; i < ubatch.n_tokens; i += n) {
        last_steps.push_back(apply_seq(get_stream(ubatch.seq_id[i][0]), ubatch.pos[i], n, prefill));
    }

    return last_steps;
}

llama_kv_cache_razor::step_info llama_kv_cache_razor::apply_seq(
        uint32_t strm,
        uint32_t pos0,
        uint32_t n_tokens,
        const llama_razor_prefill * prefill) {
    if (rewind) {
        log_fold(strm, pos0, prefill);
    }

    auto & st = streams[strm];

    const uint32_t n_end = pos0 + n_tokens;

    step_info res;

    res.strm = strm;
    res.pos0 = pos0;

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        const auto & group = plan.groups[g];

        auto & state = st.groups[g];

        group_step step;

        step.frontier  = group.frontier(pos0);
        step.fold_from = state.frontier;
        step.n_fold    = step.frontier > state.frontier ? step.frontier - state.frontier : 0;

        GGML_ASSERT(step.frontier >= state.frontier && "a rollback over a fold was not undone");
        GGML_ASSERT(step.n_fold <= plan.block);
        GGML_ASSERT(st.n_high <= state.frontier + group.ring());

        if (step.n_fold > 0) {
            state.frontier_prev = state.frontier;
            state.frontier      = step.frontier;
            state.slot         ^= 1;
        }

        step.slot = state.slot;
        step.n_kv = std::min<uint32_t>(group.cells, GGML_PAD(group.n_used(n_end, step.frontier), 256));

        res.groups.push_back(step);
    }

    st.n_high = std::max(st.n_high, n_end);

    return res;
}

llama_kv_cache_razor::step_info llama_kv_cache_razor::full_step() const {
    step_info res;

    for (const auto & group : plan.groups) {
        group_step step;

        step.n_kv      = group.cells;
        step.fold_from = plan.sink_tokens;
        step.n_fold    = plan.block;
        step.frontier  = step.fold_from + step.n_fold;

        res.groups.push_back(step);
    }

    return res;
}

uint64_t llama_kv_cache_razor::fingerprint() const {
    // FNV-1a
    uint64_t res = 0xcbf29ce484222325ull;

    auto add = [&](uint64_t v) {
        for (int i = 0; i < 8; ++i) {
            res = (res ^ ((v >> 8*i) & 0xff))*0x100000001b3ull;
        }
    };

    add(plan.sink_tokens);
    for (const auto & group : plan.groups) {
        add(group.window);
        add(group.block);
        add(group.n_comp);
        add(group.cells);
    }
    for (const auto * types : { &plan.types, &plan.types_local }) {
        // equal types are not added again, as in states of earlier versions
        if (types == &plan.types || !(*types == plan.types)) {
            add(types->k);
            add(types->v);
        }
    }
    add(get_n_stream());
    add(cparams.flash_attn);

    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        add(model.hparams.n_embd_head_k(il));
        add(model.hparams.n_embd_head_v(il));
        add(plan.retrieval[il].size());
        add(plan.n_local(il));
        for (const uint32_t h : plan.retrieval[il]) {
            add(h);
        }

        // the remaining heads have the smallest window
        for (size_t g = 0; g + 1 < plan.groups.size(); ++g) {
            add(plan.local[il][g].size());
            for (const uint32_t h : plan.local[il][g]) {
                add(h);
            }
        }
    }

    return res;
}

template<typename F>
void llama_kv_cache_razor::for_each_local_head(uint32_t strm, const stream_state & st, F && f) const {
    for (const auto & layer : layers_razor) {
        for (auto * t : { layer.k_local, layer.v_local }) {
            for (size_t g = 0; g < plan.groups.size(); ++g) {
                // the rows after the first n_used are not in use
                const uint32_t n_used = plan.groups[g].n_used(st.n_high, st.groups[g].frontier);

                for (size_t i = 0; i < plan.local[layer.il][g].size(); ++i) {
                    f(t, strm*t->nb[2] + (plan.first_row(layer.il, g) + i*plan.groups[g].cells)*t->nb[1], n_used*t->nb[1]);
                }
            }
        }

        for (const auto & sums : layer.sums) {
            if (sums.k) {
                f(sums.k, strm*sums.k->nb[2], SLOT_ZERO*sums.k->nb[1]);
                f(sums.v, strm*sums.v->nb[2], SLOT_ZERO*sums.v->nb[1]);
            }
        }
    }
}

void llama_kv_cache_razor::state_write_stream(llama_io_write_i & io, uint32_t n, const stream_state & st) const {
    io.write(&n,         sizeof(n));
    io.write(&st.n_high, sizeof(st.n_high));
    for (const auto & group : st.groups) {
        io.write(&group.frontier,      sizeof(group.frontier));
        io.write(&group.frontier_prev, sizeof(group.frontier_prev));
        io.write(&group.slot,          sizeof(group.slot));
    }
}

uint32_t llama_kv_cache_razor::state_read_stream(llama_io_read_i & io, stream_state & st) const {
    uint32_t n = 0;

    io.read(&n,         sizeof(n));
    io.read(&st.n_high, sizeof(st.n_high));
    for (auto & group : st.groups) {
        io.read(&group.frontier,      sizeof(group.frontier));
        io.read(&group.frontier_prev, sizeof(group.frontier_prev));
        io.read(&group.slot,          sizeof(group.slot));
    }

    if (n > plan.n_ctx || st.n_high > plan.n_ctx) {
        llama_razor_error_throw("the state holds more tokens than the context, create a context of at least the size it was saved with");
    }

    // until the first ubatch of the next block folds, a frontier is that of the last position
    bool sane = n == 0 || n <= st.n_high;

    for (size_t g = 0; n > 0 && g < plan.groups.size(); ++g) {
        const auto & group = plan.groups[g];
        const auto & state = st.groups[g];

        sane = sane && state.slot <= 1 && st.n_high <= state.frontier + group.ring() &&
            (state.frontier == group.frontier(n) || state.frontier == group.frontier(n - 1)) &&
            (state.frontier_prev == -1 || (state.frontier_prev >= plan.sink_tokens && state.frontier_prev < state.frontier));
    }

    if (!sane) {
        llama_razor_error_throw("the state is damaged, evaluate the prompt again");
    }

    return n;
}

void llama_kv_cache_razor::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    copy_streams();

    const uint64_t fp = fingerprint();

    io.write(&RAZOR_STATE_MAGIC,   sizeof(RAZOR_STATE_MAGIC));
    io.write(&RAZOR_STATE_VERSION, sizeof(RAZOR_STATE_VERSION));
    io.write(&fp,                  sizeof(fp));

    const auto range = streams_of(seq_id);

    for (uint32_t s = range.first; s < range.end; ++s) {
        state_write_stream(io, n_tokens(s), streams[s]);
    }
    if (range.first >= range.end) {
        state_write_stream(io, 0, empty_state());
    }

    llama_kv_cache::state_write(io, seq_id, flags);

    for (uint32_t s = range.first; s < range.end; ++s) {
        if (n_tokens(s) > 0) {
            for_each_local_head(s, streams[s], [&](ggml_tensor * t, size_t offset, size_t size) { io.write_tensor(t, offset, size); });
        }
    }
}

void llama_kv_cache_razor::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    llama_razor_error_set("");

    // 1. check the header, before anything is changed
    uint32_t magic   = 0;
    uint32_t version = 0;
    uint64_t fp      = 0;

    io.read(&magic, sizeof(magic));
    if (magic != RAZOR_STATE_MAGIC) {
        llama_razor_error_throw("the state was not saved by a context that runs razor, load it with razor off");
    }

    io.read(&version, sizeof(version));
    if (version != RAZOR_STATE_VERSION) {
        llama_razor_error_throw("the state was saved by another version of razor, evaluate the prompt again");
    }

    io.read(&fp, sizeof(fp));
    if (fp != fingerprint()) {
        llama_razor_error_throw(
                "the state was saved under another plan (heads, window, sinks, compensation, KV types, number of sequences or flash attention), "
                "load it with the options it was saved with");
    }

    const uint32_t n_read = seq_id < 0 ? n_stream : 1;
    const uint32_t first  = std::max(seq_id, 0);

    std::vector<uint32_t>     n(n_read);
    std::vector<stream_state> st(n_read, empty_state());

    for (uint32_t i = 0; i < n_read; ++i) {
        n[i] = state_read_stream(io, st[i]);
    }

    if (first + n_read > n_stream) {
        llama_razor_error_throw(format("the context has no sequence %d, load the state into a sequence below %u (n_seq_max)", seq_id, n_stream));
    }

    // 2. read the retrieval heads, then the local heads; clear what was to be read if that fails
    copy_streams();

    try {
        if (seq_id >= 0) {
            // upstream would only free the cells of the sequence
            clear_stream(seq_id);
        }

        llama_kv_cache::state_read(io, seq_id, flags);

        for (uint32_t i = 0; i < n_read; ++i) {
            if (n_tokens(first + i) != n[i]) {
                throw std::runtime_error("razor: the state is damaged, evaluate the prompt again");
            }

            if (n[i] > 0) {
                for_each_local_head(first + i, st[i], [&](ggml_tensor * t, size_t offset, size_t size) { io.read_tensor(t, offset, size); });

                streams[first + i] = st[i];
            }
        }
    } catch (const std::exception & err) {
        llama_razor_error_set(err.what());
        io.discard();

        if (n_read == n_stream) {
            clear(true);
        } else {
            clear_stream(seq_id);
        }
        throw;
    }
}

//
// rewind log
//

void llama_kv_cache_razor::init_rewind(const llama_razor_rewind_params & params) {
    std::vector<size_t> parts;
    for (const auto & layer : layers_razor) {
        parts.push_back(rewind_size(layer));
    }

    rewind = std::make_unique<llama_razor_rewind>(params, n_stream, plan.block, std::move(parts));
}

size_t llama_kv_cache_razor::rewind_size(const razor_layer & layer) const {
    size_t res = 0;

    for (const auto * t : { layer.k_local, layer.v_local }) {
        res += plan.n_local(layer.il)*(plan.block + (plan.n_comp > 0 ? 1 : 0))*(t ? t->nb[1] : 0);
    }
    for (const auto & sums : layer.sums) {
        res += sums.k ? sums.k->nb[1] + sums.v->nb[1] : 0;
    }

    return res;
}

template<typename F>
void llama_kv_cache_razor::for_each_rewind_piece(
        const razor_layer & layer,
        uint32_t strm,
        uint32_t start,
        const std::vector<rewind_group> & groups,
        uint8_t * data,
        F && f) const {
    for (size_t g = 0; g < plan.groups.size(); ++g) {
        const auto & group = plan.groups[g];
        const auto & want  = groups[g];

        const size_t n_heads = plan.local[layer.il][g].size();

        if (n_heads == 0) {
            continue;
        }

        // positions of the rows in the block
        const uint32_t first = group.frontier(start - 1);
        const uint32_t end   = group.frontier(start);

        for (ggml_tensor * t : { layer.k_local, layer.v_local }) {
            const size_t nb = t->nb[1];

            auto offset = [&](uint32_t cell) { return strm*t->nb[2] + (plan.first_row(layer.il, g) + cell)*nb; };

            // 1. the rows of each head, in pieces without a wrap of the ring
            for (uint32_t pos = std::max(first, want.from); pos < std::min(end, want.end); ) {
                const uint32_t cell = group.cell(pos);
                const uint32_t n    = std::min(std::min(end, want.end) - pos, group.sink_tokens + group.ring() - cell);

                f(t, data + (pos - first)*nb, offset(cell), n*nb, n_heads, group.cells*nb, plan.block*nb);

                pos += n;
            }

            data += n_heads*plan.block*nb;

            // 2. the compensation token of each head, whose cells have equal rows
            if (plan.n_comp > 0) {
                for (uint32_t i = 0; want.move_comp && i < llama_razor_group::N_COMP_CELLS; ++i) {
                    f(t, data, offset(group.comp_cell(want.slot) + i), nb, n_heads, group.cells*nb, nb);
                }

                data += n_heads*nb;
            }
        }

        // 3. the accumulators
        for (ggml_tensor * t : { layer.sums[g].k, layer.sums[g].v }) {
            if (t) {
                if (want.move_comp) {
                    f(t, data, strm*t->nb[2] + want.slot*t->nb[1], t->nb[1], 1, 0, 0);
                }

                data += t->nb[1];
            }
        }
    }
}

ggml_backend_sched_t llama_kv_cache_razor::get_sched() const {
    return lctx ? lctx->get_sched() : nullptr;
}

void llama_kv_cache_razor::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }

    copy_streams();
}

void llama_kv_cache_razor::log_fold(uint32_t strm, uint32_t pos0, const llama_razor_prefill * prefill) {
    const auto & st = streams[strm];

    std::vector<rewind_group> groups(plan.groups.size());

    bool folds = false;
    bool known = pos0 > 0;

    for (size_t g = 0; g < groups.size(); ++g) {
        const auto & state = st.groups[g];

        groups[g].from      = state.frontier;
        groups[g].end       = plan.groups[g].frontier(pos0);
        groups[g].slot      = state.slot;
        groups[g].move_comp = state.frontier > plan.sink_tokens;

        folds = folds || groups[g].from < groups[g].end;
        known = known && state.frontier == plan.groups[g].frontier(pos0 - 1);
    }

    if (!folds) {
        return;
    }

    // a state that was loaded may be at other frontiers
    if (!known) {
        rewind->clear(strm);

        return;
    }

    synchronize();

    auto fill = [&](size_t il, uint8_t * data) {
        for_each_rewind_piece(layers_razor[il], strm, pos0, groups, data, ggml_backend_tensor_get_2d);
    };

    // while a prompt is read layer by layer, each layer folds and writes its part of the block by itself
    if (!prefill || prefill->il == 0) {
        rewind->add(strm, pos0);
    }
    for (size_t il = prefill ? prefill->il : 0; il < (prefill ? prefill->il + 1 : layers_razor.size()); ++il) {
        rewind->write(strm, pos0, il, fill);
    }
}

llama_kv_cache_razor::rewind_step llama_kv_cache_razor::plan_rewind(uint32_t strm, uint32_t p0, uint32_t pos) const {
    const auto & st = streams[strm];

    rewind_step res;

    res.strm   = strm;
    res.p0     = p0;
    res.pos    = pos;
    res.n_high = st.n_high;

    for (const auto & group : plan.groups) {
        res.n_high = std::min(res.n_high, group.frontier(pos) + group.ring());
    }

    // the block with the compensation tokens and accumulators at the frontiers of pos
    const uint32_t edge = pos - pos % plan.block + plan.block;

    auto add_block = [&](uint32_t start) {
        res.first = res.end == 0 ? start                : std::min(res.first, start);
        res.end   = res.end == 0 ? start + plan.block : std::max(res.end,   start + plan.block);
    };

    for (size_t g = 0; g < plan.groups.size(); ++g) {
        const auto & group = plan.groups[g];
        const auto & state = st.groups[g];

        const uint32_t frontier = group.frontier(pos);

        rewind_group want;

        // rows that were overwritten and are in the ring again at the new n_high
        auto first_in_ring = [&](uint32_t n_high) { return std::max(plan.sink_tokens, n_high - std::min(n_high, group.ring())); };

        want.from = first_in_ring(res.n_high);
        want.end  = std::min(p0, first_in_ring(st.n_high));

        if (want.from < want.end) {
            // a row is in the block of the first position whose frontier is after it
            add_block((want.from + group.window)/plan.block*plan.block + plan.block);
            add_block((want.end - 1 + group.window)/plan.block*plan.block + plan.block);
        }

        if (frontier < state.frontier) {
            // each fold has changed the slot
            want.slot      = state.slot ^ ((state.frontier - frontier + plan.block - 1)/plan.block & 1);
            want.move_comp = plan.n_comp > 0 && frontier > plan.sink_tokens;

            if (want.move_comp) {
                add_block(edge);
            }
        }

        res.groups.push_back(want);
    }

    return res;
}

bool llama_kv_cache_razor::can_rewind(const rewind_step & step) const {
    return step.end == 0 || (rewind && rewind->has(step.strm, step.first, step.end - plan.block));
}

bool llama_kv_cache_razor::load_rewind(rewind_step & step) const {
    for (uint32_t start = step.first; start < step.end; start += plan.block) {
        step.data.push_back(rewind->read(step.strm, start));

        if (!step.data.back()) {
            return false;
        }
    }

    return true;
}

void llama_kv_cache_razor::apply_rewind(const rewind_step & step) {
    auto & st = streams[step.strm];

    synchronize();

    // 1. write the rows, compensation tokens and accumulators
    const uint32_t edge = step.pos - step.pos % plan.block + plan.block;

    for (size_t i = 0; i < step.data.size(); ++i) {
        const uint32_t start = step.first + i*plan.block;

        auto groups = step.groups;
        for (auto & group : groups) {
            group.move_comp = group.move_comp && start == edge;
        }

        // the pieces are only read
        uint8_t * data = const_cast<uint8_t *>(step.data[i].get());

        for (const auto & layer : layers_razor) {
            for_each_rewind_piece(layer, step.strm, start, groups, data, ggml_backend_tensor_set_2d);

            data += rewind_size(layer);
        }
    }

    // 2. move the frontiers
    for (size_t g = 0; g < plan.groups.size(); ++g) {
        auto & state = st.groups[g];

        const uint32_t frontier = plan.groups[g].frontier(step.pos);

        if (frontier < state.frontier) {
            state.frontier      = frontier;
            state.frontier_prev = -1;
            state.slot          = step.groups[g].slot;
        }
    }

    st.n_high = step.n_high;
}

bool llama_kv_cache_razor::has_devices() const {
    return !model.devices.empty();
}

//
// llama_kv_cache_razor_context
//

llama_kv_cache_razor_context::llama_kv_cache_razor_context(llama_kv_cache_razor * kv) :
    llama_kv_cache_context(kv), kv_razor(kv), steps({ kv->full_step() }) {
}

llama_kv_cache_razor_context::llama_kv_cache_razor_context(
        llama_kv_cache_razor * kv,
        slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches,
        std::shared_ptr<llama_razor_prefill> prefill) :
    llama_kv_cache_context(kv, sinfos, std::move(ubatches)), kv_razor(kv), prefill(std::move(prefill)) {

    for (auto & sinfo : sinfos) {
        cells.push_back(std::move(sinfo.idxs));
    }
}

bool llama_kv_cache_razor_context::next() {
    ++i_cur;

    return llama_kv_cache_context::next();
}

bool llama_kv_cache_razor_context::apply() {
    if (prefill || kv_razor->source) {
        llama_razor_reset_plan(*kv_razor);
    }

    steps = kv_razor->apply_local(get_ubatch(), prefill.get());

    return llama_kv_cache_context::apply();
}

//
// llama_kv_cache_razor_update
//

llama_kv_cache_razor_update::llama_kv_cache_razor_update(const llama_kv_cache_razor * kv, llama_context * lctx) :
    llama_kv_cache_context(kv->has_copies() ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE), kv(kv), lctx(lctx) {
}

bool llama_kv_cache_razor_update::apply() {
    llama_synchronize(lctx);

    kv->copy_streams();

    return true;
}
