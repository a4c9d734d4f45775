#include "llama-kv-cache-razor.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

static constexpr uint32_t RAZOR_STATE_MAGIC   = 0x315a5252; // "RRZ1"
static constexpr uint32_t RAZOR_STATE_VERSION = 1;

llama_razor_hparams::llama_razor_hparams(const llama_hparams & hparams, const llama_razor_plan & plan) : hparams_retrieval(hparams) {
    // layers beyond the plan (nextn) have no cache, their head counts would only widen the transposed V cache
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        hparams_retrieval.n_head_kv_arr[il] = il < plan.retrieval.size() ? plan.retrieval[il].size() : 0;
    }
}

//
// llama_kv_cache_razor
//

llama_kv_cache_razor::llama_kv_cache_razor(
        const llama_model & model,
     const llama_cparams  & cparams,
         llama_razor_plan   plan_in,
                ggml_type   type_k,
                ggml_type   type_v) :
    llama_razor_hparams(model.hparams, plan_in),
    llama_kv_cache(
            model,
            hparams_retrieval,
            type_k,
            type_v,
            !cparams.flash_attn,
            cparams.offload_kqv,
            cparams.kv_unified,
            cparams.n_ctx_seq,
            cparams.n_seq_max,
            1,
            model.hparams.n_swa,
            model.hparams.swa_type,
            nullptr,
            [&plan_in](int32_t il) { return (size_t) il < plan_in.retrieval.size() && !plan_in.retrieval[il].empty(); },
            nullptr,
            nullptr),
    cparams(cparams), plan(std::move(plan_in)), tk(type_k), tv(type_v) {

    const llama_hparams & hparams_model = model.hparams;

    const uint32_t n_strm = get_n_stream();

    streams.resize(n_strm);
    for (auto & st : streams) {
        st.frontier = plan.sink_tokens;
    }

    // upstream decides from its own layers whether quantized rows are rotated, and here it may have none
    if (n_embd_head_k_all == 0) {
        const char * LLAMA_ATTN_ROT_DISABLE = getenv("LLAMA_ATTN_ROT_DISABLE");
        const bool rot = !(LLAMA_ATTN_ROT_DISABLE && atoi(LLAMA_ATTN_ROT_DISABLE));

        n_embd_head_k_all = hparams_model.n_embd_head_k();
        n_embd_head_v_all = hparams_model.n_embd_head_v();

        attn_rot_k = rot && ggml_is_quantized(type_k) && n_embd_head_k_all % 64 == 0;
        attn_rot_v = rot && ggml_is_quantized(type_v) && n_embd_head_v_all % 64 == 0;

        for (int64_t n = 64; (attn_rot_k || attn_rot_v) && n <= std::max(n_embd_head_k_all, n_embd_head_v_all); n *= 2) {
            // orthonormal Walsh-Hadamard matrix: the sign is the parity of the common bits of row and column
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

    map_local.resize(plan.local.size(), -1);

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        const int64_t n_local = plan.local[il].size();
        if (n_local == 0) {
            continue;
        }

        ggml_backend_buffer_type_t buft = cparams.offload_kqv ?
            ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        auto & ctx_ptr = ctx_map[buft];
        if (!ctx_ptr) {
            ggml_init_params params = {
                /*.mem_size   =*/ size_t(4u*plan.local.size()*ggml_tensor_overhead()),
                /*.mem_buffer =*/ NULL,
                /*.no_alloc   =*/ true,
            };

            ctx_ptr.reset(ggml_init(params));
            if (!ctx_ptr) {
                throw std::runtime_error("failed to create ggml context for the local KV heads");
            }
        }

        ggml_context * ctx = ctx_ptr.get();

        const int64_t n_embd_k = n_local*hparams_model.n_embd_head_k(il);
        const int64_t n_embd_v = n_local*hparams_model.n_embd_head_v(il);

        local_layer layer = {
            /*.il    =*/ il,
            /*.k     =*/ ggml_new_tensor_3d(ctx, type_k, n_embd_k, plan.cells, n_strm),
            /*.v     =*/ ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.cells, n_strm),
            /*.k_sum =*/ plan.n_comp > 0 ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_k, N_SLOTS, n_strm) : nullptr,
            /*.v_sum =*/ plan.n_comp > 0 ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_v, N_SLOTS, n_strm) : nullptr,
        };

        ggml_format_name(layer.k, "cache_razor_k_l%d", il);
        ggml_format_name(layer.v, "cache_razor_v_l%d", il);
        if (plan.n_comp > 0) {
            ggml_format_name(layer.k_sum, "cache_razor_k_sum_l%d", il);
            ggml_format_name(layer.v_sum, "cache_razor_v_sum_l%d", il);
        }

        map_local[il] = layers_local.size();
        layers_local.push_back(layer);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams_model.no_alloc) {
            // as upstream: a dummy buffer keeps the scheduler from allocating the tensors
            buf = ggml_backend_buft_alloc_buffer(buft, /*size =*/ 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for the local KV heads");
        }

        // the padding must hold no NaN, and SLOT_ZERO stays as it is now
        ggml_backend_buffer_clear(buf, 0);

        LLAMA_LOG_INFO("%s: %10s local KV buffer size = %8.2f MiB\n", __func__,
                ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ctxs_bufs_local.emplace_back(std::move(ctx), buf);
    }

    size_t n_retrieval = 0;
    size_t n_local     = 0;
    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        n_retrieval += plan.retrieval[il].size();
        n_local     += plan.local[il].size();
    }

    LLAMA_LOG_INFO("%s: %zu of %zu KV heads keep all %u tokens, %zu keep %u sinks, a window of %u and %s (%u cells, blocks of %u)\n", __func__,
            n_retrieval, n_retrieval + n_local, plan.n_ctx, n_local, plan.sink_tokens, plan.window,
            plan.n_comp > 0 ? "a compensation token" : "no compensation token", plan.cells, plan.block);
}

llama_memory_context_ptr llama_kv_cache_razor::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    auto refuse = [](const char * why) -> llama_memory_context_ptr {
        LLAMA_LOG_ERROR("razor: %s\n", why);
        llama_razor_error_set(why);

        return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    llama_razor_error_set("");

    if (broken) {
        return refuse("the cache was changed in a way that local heads cannot follow, clear it before the next token is decoded");
    }
    if (!cparams.causal_attn) {
        return refuse("non-causal attention is not supported, switch razor off for this context");
    }
    if (cparams.training) {
        return refuse("training is not supported, switch razor off for this context");
    }

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;

    uint32_t pos = n_tokens(0);

    while (true) {
        // no ubatch crosses a block, so that what the cache holds does not depend on the split
        auto ubatch = balloc.split_simple(std::min(n_ubatch, plan.block - pos % plan.block));

        if (ubatch.n_tokens == 0) {
            break;
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.seq_id[i][0] != 0 || ubatch.n_seq_id[i] != 1) {
                return refuse("more than one sequence is not supported, switch razor off for this context");
            }
            if (ubatch.pos[i] != (llama_pos) (pos + i)) {
                return refuse("the positions of a sequence must start at 0 and follow each other without a gap");
            }
        }

        pos += ubatch.n_tokens;

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return refuse("failed to split the batch");
    }

    if (pos > plan.n_ctx) {
        return refuse("the context is full");
    }

    auto sinfos = prepare(ubatches);
    if (sinfos.empty()) {
        return refuse("the context is full");
    }

    return std::make_unique<llama_kv_cache_razor_context>(this, std::move(sinfos), std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_razor::init_full() {
    return std::make_unique<llama_kv_cache_razor_context>(this);
}

bool llama_kv_cache_razor::get_can_shift() const {
    // the keys behind the compensation token have no position any more
    return false;
}

void llama_kv_cache_razor::clear(bool data) {
    llama_kv_cache::clear(data);

    for (auto & st : streams) {
        st = stream_state();
        st.frontier = plan.sink_tokens;
    }

    last_step = step_info();

    broken = false;

    if (data) {
        for (auto & [_, buf] : ctxs_bufs_local) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

bool llama_kv_cache_razor::can_unfold(const stream_state & st, uint32_t to) const {
    // without a compensation token nothing but the rows is needed, else the value before the last fold alone is kept
    if (plan.n_comp > 0 && st.frontier_prev != (int64_t) to) {
        return false;
    }

    // the row of position p is lost once p + ring was written
    return st.n_high <= to + plan.ring();
}

void llama_kv_cache_razor::unfold(stream_state & st, uint32_t to) const {
    st.frontier      = to;
    st.frontier_prev = -1;
    st.slot         ^= 1;
}

bool llama_kv_cache_razor::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const uint32_t n = n_tokens(0);

    if (seq_id > 0) {
        return true; // there is no such sequence
    }

    p0 = std::max(p0, 0);
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    if (p0 == 0 && (uint32_t) p1 >= n) {
        clear(false);

        return true;
    }

    if (p0 >= p1 || (uint32_t) p0 == n) {
        return true;
    }

    // a caller that keeps [0, p0) believes that there are as many, and what is in the middle cannot be taken out of a mean
    if ((uint32_t) p0 > n || (uint32_t) p1 < n) {
        return false;
    }

    auto & st = streams[0];

    const uint32_t frontier = plan.frontier(p0);

    if (frontier < st.frontier) {
        if (!can_unfold(st, frontier)) {
            return false;
        }

        unfold(st, frontier);
    }

    return llama_kv_cache::seq_rm(seq_id, p0, p1);
}

void llama_kv_cache_razor::abort_ubatch(llama_seq_id seq_id, llama_pos p0) {
    GGML_ASSERT(seq_id == 0);

    auto & st = streams[last_step.strm];

    LLAMA_LOG_WARN("%s: the ubatch at position %d did not complete\n", __func__, p0);

    if (last_step.n_fold > 0) {
        // some layers may have folded already and some not
        if (st.n_high > last_step.fold_from + plan.ring()) {
            LLAMA_LOG_WARN("%s: rows that were to be folded are overwritten, clearing the cache\n", __func__);

            clear(false);

            return;
        }

        unfold(st, last_step.fold_from);
    }

    llama_kv_cache::seq_rm(seq_id, p0, -1);
}

void llama_kv_cache_razor::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (seq_id_src != seq_id_dst) {
        LLAMA_LOG_ERROR("razor: seq_cp is not supported, the context has one sequence\n");
    }
}

void llama_kv_cache_razor::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        clear(false);
    }
}

void llama_kv_cache_razor::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (seq_id == 0 && shift != 0 && n_tokens(0) > 0) {
        LLAMA_LOG_ERROR("razor: seq_add is not supported, positions cannot be shifted (llama_memory_can_shift is false)\n");
        broken = true;
    }
}

void llama_kv_cache_razor::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (seq_id == 0 && d != 1 && n_tokens(0) > 0) {
        LLAMA_LOG_ERROR("razor: seq_div is not supported, positions cannot be divided\n");
        broken = true;
    }
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_razor::memory_breakdown() const {
    auto ret = llama_kv_cache::memory_breakdown();

    for (const auto & [ctx, buf] : ctxs_bufs_local) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        ret[buft] += model.hparams.no_alloc ?
            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }

    return ret;
}

const llama_kv_cache_razor::local_layer * llama_kv_cache_razor::get_local(int32_t il) const {
    return (size_t) il < map_local.size() && map_local[il] >= 0 ? &layers_local[map_local[il]] : nullptr;
}

uint32_t llama_kv_cache_razor::n_tokens(uint32_t strm) const {
    return seq_pos_max(strm) + 1;
}

uint32_t llama_kv_cache_razor::n_rollback(uint32_t strm) const {
    const auto & st = streams[strm];

    // the fewest tokens that can be left: the frontier of their next position must be one that can be reached
    uint32_t n_left = n_tokens(strm);
    while (n_left > 0) {
        const uint32_t frontier = plan.frontier(n_left - 1);

        if (frontier < st.frontier && !can_unfold(st, frontier)) {
            break;
        }

        // all positions of a block have the same frontier
        n_left = frontier == plan.sink_tokens ? 0 : (n_left - 1) - (n_left - 1) % plan.block;
    }

    return n_tokens(strm) - n_left;
}

size_t llama_kv_cache_razor::bytes_retrieval_k(int32_t il) const {
    const auto it = map_layer_ids.find(il);

    return it != map_layer_ids.end() ? ggml_nbytes(layers[it->second].k) : 0;
}

size_t llama_kv_cache_razor::bytes_retrieval_v(int32_t il) const {
    const auto it = map_layer_ids.find(il);

    return it != map_layer_ids.end() ? ggml_nbytes(layers[it->second].v) : 0;
}

llama_kv_cache_razor::step_info llama_kv_cache_razor::apply_local(const llama_ubatch & ubatch) {
    const uint32_t strm = 0;

    auto & st = streams[strm];

    const uint32_t pos0  = ubatch.pos[0];
    const uint32_t n_end = pos0 + ubatch.n_tokens;

    step_info res;

    res.strm      = strm;
    res.pos0      = pos0;
    res.frontier  = plan.frontier(pos0);
    res.fold_from = st.frontier;
    res.n_fold    = res.frontier > st.frontier ? res.frontier - st.frontier : 0;

    GGML_ASSERT(res.frontier >= st.frontier && "a rollback over a fold was not undone");
    GGML_ASSERT(res.n_fold <= plan.block);
    GGML_ASSERT(st.n_high <= st.frontier + plan.ring());

    if (res.n_fold > 0) {
        st.frontier_prev = st.frontier;
        st.frontier      = res.frontier;
        st.slot         ^= 1;
    }

    res.slot = st.slot;

    st.n_high = std::max(st.n_high, n_end);

    res.n_kv = std::min<uint32_t>(plan.cells, GGML_PAD(plan.n_used(n_end), 256));

    last_step = res;

    return res;
}

llama_kv_cache_razor::step_info llama_kv_cache_razor::full_step() const {
    step_info res;

    res.n_kv      = plan.cells;
    res.fold_from = plan.sink_tokens;
    res.n_fold    = plan.block;
    res.frontier  = res.fold_from + res.n_fold;

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
    add(plan.window);
    add(plan.block);
    add(plan.n_comp);
    add(plan.cells);
    add(tk);
    add(tv);
    add(get_n_stream());
    add(cparams.flash_attn);

    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        add(model.hparams.n_embd_head_k(il));
        add(model.hparams.n_embd_head_v(il));
        add(plan.retrieval[il].size());
        add(plan.local[il].size());
        for (const uint32_t h : plan.retrieval[il]) {
            add(h);
        }
    }

    return res;
}

void llama_kv_cache_razor::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    const auto & st = streams[0];

    // another sequence than the only one is empty
    const uint32_t n = seq_id > 0 ? 0 : n_tokens(0);

    const uint64_t fp = fingerprint();

    io.write(&RAZOR_STATE_MAGIC,   sizeof(RAZOR_STATE_MAGIC));
    io.write(&RAZOR_STATE_VERSION, sizeof(RAZOR_STATE_VERSION));
    io.write(&fp,                  sizeof(fp));
    io.write(&n,                   sizeof(n));
    io.write(&st.n_high,           sizeof(st.n_high));
    io.write(&st.frontier,         sizeof(st.frontier));
    io.write(&st.frontier_prev,    sizeof(st.frontier_prev));
    io.write(&st.slot,             sizeof(st.slot));

    llama_kv_cache::state_write(io, seq_id, flags);

    if (n == 0) {
        return;
    }

    // rows beyond were never written
    const uint32_t n_used = plan.n_used(st.n_high);

    for (const auto & layer : layers_local) {
        io.write_tensor(layer.k, 0, n_used*layer.k->nb[1]);
        io.write_tensor(layer.v, 0, n_used*layer.v->nb[1]);

        if (plan.n_comp > 0) {
            io.write_tensor(layer.k_sum, 0, SLOT_ZERO*layer.k_sum->nb[1]);
            io.write_tensor(layer.v_sum, 0, SLOT_ZERO*layer.v_sum->nb[1]);
        }
    }
}

void llama_kv_cache_razor::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    auto refuse = [](const char * why) {
        llama_razor_error_set(why);
        throw std::runtime_error(std::string("razor: ") + why);
    };

    llama_razor_error_set("");

    uint32_t magic   = 0;
    uint32_t version = 0;
    uint64_t fp      = 0;
    uint32_t n       = 0;

    stream_state st;

    io.read(&magic, sizeof(magic));
    if (magic != RAZOR_STATE_MAGIC) {
        refuse("the state was not saved by a context that runs razor, load it with razor off");
    }

    io.read(&version, sizeof(version));
    if (version != RAZOR_STATE_VERSION) {
        refuse("the state was saved by another version of razor, evaluate the prompt again");
    }

    io.read(&fp, sizeof(fp));
    if (fp != fingerprint()) {
        refuse("the state was saved under another plan (heads, window, sinks, compensation, KV types or flash attention), "
               "load it with the options it was saved with");
    }

    io.read(&n,                sizeof(n));
    io.read(&st.n_high,        sizeof(st.n_high));
    io.read(&st.frontier,      sizeof(st.frontier));
    io.read(&st.frontier_prev, sizeof(st.frontier_prev));
    io.read(&st.slot,          sizeof(st.slot));

    if (n > plan.n_ctx || st.n_high > plan.n_ctx) {
        refuse("the state holds more tokens than the context, create a context of at least the size it was saved with");
    }

    // the frontier can lag behind while the first ubatch of a block has not come yet, and nothing else is possible
    const bool sane = n == 0 || (n <= st.n_high && st.slot <= 1 && st.n_high <= st.frontier + plan.ring() &&
        (st.frontier == plan.frontier(n) || st.frontier == plan.frontier(n - 1)) &&
        (st.frontier_prev == -1 || (st.frontier_prev >= plan.sink_tokens && st.frontier_prev < st.frontier)));

    if (!sane) {
        refuse("the state is damaged, evaluate the prompt again");
    }

    if (seq_id > 0) {
        refuse("more than one sequence is not supported, load the state into sequence 0");
    }

    try {
        if (seq_id == 0) {
            // upstream only frees the cells of the sequence
            clear(false);
        }

        llama_kv_cache::state_read(io, seq_id, flags);

        if (n_tokens(0) != n) {
            throw std::runtime_error("razor: the state is damaged, evaluate the prompt again");
        }

        if (n == 0) {
            clear(false);

            return;
        }

        const uint32_t n_used = plan.n_used(st.n_high);

        for (const auto & layer : layers_local) {
            io.read_tensor(layer.k, 0, n_used*layer.k->nb[1]);
            io.read_tensor(layer.v, 0, n_used*layer.v->nb[1]);

            if (plan.n_comp > 0) {
                io.read_tensor(layer.k_sum, 0, SLOT_ZERO*layer.k_sum->nb[1]);
                io.read_tensor(layer.v_sum, 0, SLOT_ZERO*layer.v_sum->nb[1]);
            }
        }

        streams[0] = st;
    } catch (const std::exception & err) {
        llama_razor_error_set(err.what());
        io.discard();
        clear(true);
        throw;
    }
}

//
// llama_kv_cache_razor_context
//

llama_kv_cache_razor_context::llama_kv_cache_razor_context(llama_kv_cache_razor * kv) :
    llama_kv_cache_context(kv), kv_razor(kv), step(kv->full_step()) {
}

llama_kv_cache_razor_context::llama_kv_cache_razor_context(
        llama_kv_cache_razor * kv,
        slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kv_razor(kv) {
}

bool llama_kv_cache_razor_context::apply() {
    step = kv_razor->apply_local(get_ubatch());

    return llama_kv_cache_context::apply();
}

//
// llm_graph_input_razor
//

llm_graph_input_razor::llm_graph_input_razor(
        ggml_context * ctx,
        const llama_ubatch  & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_razor_context * mctx) :
    hparams(hparams), mctx(mctx), n_tokens(ubatch.n_tokens), n_kv(mctx->get_step().n_kv), n_fold(mctx->get_step().n_fold) {

    const auto & plan = mctx->get_kv().get_plan();

    auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
        ggml_tensor * res = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(res);
        ggml_set_name(res, name);

        return res;
    };

    cell_idxs = input(GGML_TYPE_I64, n_tokens, 1, "razor_inp_cell_idxs");

    // flash attention requires an f16 mask
    mask = input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, n_tokens, "razor_inp_mask");

    size_t n_heads = 0;

    for (uint32_t il = 0; il < plan.local.size(); ++il) {
        head_order order = make_order(il);

        if (!order.identity) {
            order.offs_q   = n_heads;
            order.offs_kv  = order.offs_q   + hparams.n_head(il);
            order.offs_out = order.offs_kv  + hparams.n_head_kv(il);
            n_heads        = order.offs_out + hparams.n_head(il);
        }

        orders.push_back(order);
    }

    if (n_heads > 0) {
        heads = input(GGML_TYPE_I32, n_heads*n_tokens, 1, "razor_inp_heads");
    }

    if (n_fold > 0 && plan.n_comp > 0) {
        fold_rows = input(GGML_TYPE_I32, n_fold, 1, "razor_inp_fold_rows");
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

llm_graph_input_razor::head_order llm_graph_input_razor::make_order(int32_t il) const {
    const auto & plan = mctx->get_kv().get_plan();

    const auto & retrieval = plan.retrieval[il];
    const auto & local     = plan.local[il];

    head_order res;

    if (!retrieval.empty() && !local.empty()) {
        const bool retrieval_first = retrieval.back() < local.front();

        res.local_first = local.back() < retrieval.front();
        res.identity    = retrieval_first || res.local_first;
    }

    return res;
}

template<typename T>
static void set_input_mask(
        T * data,
        const llama_razor_plan & plan,
        const llama_kv_cache_razor::step_info & step,
        uint32_t n_kv,
        uint32_t n_tokens) {
    const T keep = llama_cast<T>(0.0f);
    const T drop = llama_cast<T>(-INFINITY);

    // the first token sees everything that is live before it
    std::fill(data, data + n_kv, drop);

    for (uint32_t p = 0; p < std::min(plan.sink_tokens, step.pos0); ++p) {
        data[plan.cell(p)] = keep;
    }

    for (uint32_t p = step.frontier; p < step.pos0; ++p) {
        data[plan.cell(p)] = keep;
    }

    if (plan.n_comp > 0 && step.frontier > plan.sink_tokens) {
        const double n_folded = step.frontier - plan.sink_tokens;

        // the largest value of the type that is not above log(N_d), and what is missing
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

    // each token sees itself and what the one before it sees
    for (uint32_t i = 0; i < n_tokens; ++i) {
        T * row = data + (size_t) i*n_kv;

        if (i > 0) {
            std::copy(row - n_kv, row, row);
        }

        row[plan.cell(step.pos0 + i)] = keep;
    }
}

void llm_graph_input_razor::set_input(const llama_ubatch * ubatch) {
    const auto & plan = mctx->get_kv().get_plan();
    const auto & step = mctx->get_step();

    GGML_ASSERT(ubatch->n_tokens == n_tokens && step.n_kv == n_kv && step.n_fold == n_fold);

    if (cell_idxs->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(cell_idxs->buffer));

        int64_t * data = (int64_t *) cell_idxs->data;

        for (uint32_t i = 0; i < n_tokens; ++i) {
            data[i] = plan.cell(step.pos0 + i);
        }
    }

    if (mask->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

        if (mask->type == GGML_TYPE_F16) {
            set_input_mask((ggml_fp16_t *) mask->data, plan, step, n_kv, n_tokens);
        } else {
            set_input_mask((float *) mask->data, plan, step, n_kv, n_tokens);
        }
    }

    if (heads && heads->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(heads->buffer));

        int32_t * data = (int32_t *) heads->data;

        for (uint32_t il = 0; il < orders.size(); ++il) {
            const auto & order = orders[il];

            if (order.identity) {
                continue;
            }

            const int32_t n_head    = hparams.n_head(il);
            const int32_t n_head_kv = hparams.n_head_kv(il);
            const int32_t n_gqa     = n_head/n_head_kv;

            int32_t * data_q   = data + order.offs_q  *n_tokens;
            int32_t * data_kv  = data + order.offs_kv *n_tokens;
            int32_t * data_out = data + order.offs_out*n_tokens;

            int32_t i_kv = 0;

            for (const auto * group : { &plan.retrieval[il], &plan.local[il] }) {
                for (const uint32_t h : *group) {
                    for (int32_t j = 0; j < n_gqa; ++j) {
                        data_q  [i_kv*n_gqa + j] = h*n_gqa + j;
                        data_out[h*n_gqa + j]    = i_kv*n_gqa + j;
                    }
                    data_kv[i_kv++] = h;
                }
            }

            for (uint32_t i = 1; i < n_tokens; ++i) {
                std::copy(data_q,   data_q   + n_head,    data_q   + i*n_head);
                std::copy(data_kv,  data_kv  + n_head_kv, data_kv  + i*n_head_kv);
                std::copy(data_out, data_out + n_head,    data_out + i*n_head);
            }
        }
    }

    if (fold_rows && fold_rows->buffer) {
        int32_t * rows = (int32_t *) fold_rows->data;
        for (uint32_t i = 0; i < n_fold; ++i) {
            rows[i] = plan.cell(step.fold_from + i);
        }

        using kv = llama_kv_cache_razor;

        // the first fold starts from zero
        *(int32_t *) fold_src ->data = step.fold_from == plan.sink_tokens ? kv::SLOT_ZERO : 1 - step.slot;
        *(int64_t *) fold_dst ->data = step.slot;
        *(float   *) fold_inv ->data = 1.0f/(step.frontier - plan.sink_tokens);

        for (uint32_t i = 0; i < plan.N_COMP_CELLS; ++i) {
            ((int64_t *) fold_cell->data)[i] = plan.comp_cell(step.slot) + i;
        }
    }
}

bool llm_graph_input_razor::can_reuse(const llm_graph_params & params) {
    const auto * mctx_new = dynamic_cast<const llama_kv_cache_razor_context *>(params.mctx);
    if (!mctx_new) {
        return false;
    }

    mctx = mctx_new;

    const auto & step = mctx->get_step();

    return params.ubatch.n_tokens == n_tokens && step.n_kv == n_kv && step.n_fold == n_fold;
}

void llm_graph_input_razor::build_fold(const llm_graph_context & g, ggml_tensor * store, ggml_tensor * sums) const {
    ggml_context * ctx0 = g.ctx0;

    const int64_t n_embd = store->ne[0];

    store = ggml_reshape_2d(ctx0, store, n_embd, store->ne[1]*store->ne[2]);
    sums  = ggml_reshape_2d(ctx0, sums,  n_embd, sums ->ne[1]*sums ->ne[2]);

    ggml_tensor * cur = ggml_get_rows(ctx0, store, fold_rows); // [n_embd, n_fold]

    cur = ggml_sum_rows(ctx0, ggml_cont(ctx0, ggml_transpose(ctx0, cur)));
    cur = ggml_reshape_2d(ctx0, cur, n_embd, 1);
    cur = ggml_add(ctx0, cur, ggml_get_rows(ctx0, sums, fold_src));

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, sums, cur, fold_dst));

    cur = ggml_mul(ctx0, cur, fold_inv);
    cur = ggml_repeat_4d(ctx0, cur, n_embd, fold_cell->ne[0], 1, 1);

    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx0, store, cur, fold_cell));
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
    const auto * layer = mctx->get_kv().get_local(il);
    if (!layer) {
        return nullptr;
    }

    GGML_ASSERT(!kq_b && !sinks && "refused when the context is created");

    ggml_context * ctx0 = g.ctx0;
    ggml_cgraph  * gf   = g.gf;

    const auto & plan  = mctx->get_kv().get_plan();
    const auto & order = orders[il];

    const int64_t n_retrieval = plan.retrieval[il].size();
    const int64_t n_local     = plan.local[il].size();
    const int64_t n_head      = q_cur->ne[1];
    const int64_t n_head_kv   = k_cur->ne[1];
    const int64_t n_gqa       = n_head/n_head_kv;

    GGML_ASSERT(n_retrieval + n_local == n_head_kv && (uint32_t) q_cur->ne[2] == n_tokens);

    // the rows of a token one after the other, retrieval heads first
    auto gather = [&](ggml_tensor * cur, size_t offs) {
        ggml_tensor * idxs = ggml_view_2d(ctx0, heads, cur->ne[1], n_tokens,
                cur->ne[1]*sizeof(int32_t), offs*n_tokens*sizeof(int32_t));

        return ggml_get_rows(ctx0, cur, idxs);
    };

    if (!order.identity) {
        q_cur = gather(q_cur, order.offs_q);
        k_cur = gather(k_cur, order.offs_kv);
        v_cur = gather(v_cur, order.offs_kv);
    }

    auto slice = [&](ggml_tensor * cur, int64_t first, int64_t n) {
        return ggml_view_3d(ctx0, cur, cur->ne[0], n, cur->ne[2], cur->nb[1], cur->nb[2], first*cur->nb[1]);
    };

    const int64_t first_retrieval = order.local_first ? n_local     : 0;
    const int64_t first_local     = order.local_first ? 0           : n_retrieval;

    // the fold reads rows that the new tokens overwrite, and writes the compensation token that they look at
    if (n_fold > 0 && plan.n_comp > 0) {
        build_fold(g, layer->k, layer->k_sum);
        build_fold(g, layer->v, layer->v_sum);
    }

    auto store = [&](ggml_tensor * dst, ggml_tensor * cur) {
        cur = slice(cur, first_local, n_local);

        // merge the heads of a token
        GGML_ASSERT(ggml_row_size(cur->type, cur->ne[0]) == cur->nb[1]);
        cur = ggml_view_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2], cur->nb[2], 0);

        dst = ggml_reshape_2d(ctx0, dst, dst->ne[0], dst->ne[1]*dst->ne[2]);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, dst, cur, cell_idxs));
    };

    auto load = [&](ggml_tensor * src) {
        const int64_t n_embd_head = src->ne[0]/n_local;

        return ggml_view_4d(ctx0, src, n_embd_head, n_local, n_kv, src->ne[2],
                ggml_row_size(src->type, n_embd_head), src->nb[1], src->nb[2], 0);
    };

    store(layer->k, k_cur);
    store(layer->v, v_cur);

    ggml_tensor * out_retrieval = nullptr;

    if (n_retrieval > 0) {
        const auto * mctx_kv = inp.mctx;

        ggml_build_forward_expand(gf, mctx_kv->cpy_k(ctx0, slice(k_cur, first_retrieval, n_retrieval), inp.get_k_idxs(), il));
        ggml_build_forward_expand(gf, mctx_kv->cpy_v(ctx0, slice(v_cur, first_retrieval, n_retrieval), inp.get_v_idxs(), il));

        out_retrieval = g.build_attn_mha(
                slice(q_cur, first_retrieval*n_gqa, n_retrieval*n_gqa),
                mctx_kv->get_k(ctx0, il), mctx_kv->get_v(ctx0, il),
                nullptr, inp.get_kq_mask(), nullptr, nullptr, 0, kq_scale, il);
    }

    ggml_tensor * out_local = g.build_attn_mha(
            slice(q_cur, first_local*n_gqa, n_local*n_gqa),
            load(layer->k), load(layer->v),
            nullptr, mask, nullptr, nullptr, 0, kq_scale, il);

    if (!out_retrieval) {
        return out_local;
    }

    ggml_tensor * cur = order.local_first ?
        ggml_concat(ctx0, out_local, out_retrieval, 0) :
        ggml_concat(ctx0, out_retrieval, out_local, 0);

    if (!order.identity) {
        cur = ggml_reshape_3d(ctx0, cur, cur->ne[0]/n_head, n_head, n_tokens);
        cur = gather(cur, order.offs_out);
        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*n_head, n_tokens);
    }

    ggml_build_forward_expand(gf, cur);

    return cur;
}
