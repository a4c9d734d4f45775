#include "llama-memory-razor.h"

#include "llama-razor-error.h"

#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>

//
// llama_memory_razor
//

llama_memory_razor::llama_memory_razor(llama_memory_i * memory, llama_kv_cache_razor * kv) :
    memory(memory), kv(kv),
    iswa  (dynamic_cast<llama_kv_cache_iswa *>(memory)),
    hybrid(dynamic_cast<llama_memory_hybrid *>(memory)),
    swa   (iswa   ? iswa->get_swa()        : nullptr),
    recr  (hybrid ? hybrid->get_mem_recr() : nullptr) {
    GGML_ASSERT(iswa ? iswa->get_base() == kv : hybrid && hybrid->get_mem_attn() == kv);
}

// upstream's prepare() applies the ubatches one after the other and then undoes them, but it does not restore the tokens
// that it removed because they are older than those that an ubatch overwrites. If the cells are not in the order of the
// tokens, as after loading a state, the first ubatch would not see all tokens in its window
struct razor_sliding_cells : llama_kv_cache {
    static slot_info_vec_t prepare(llama_kv_cache & swa, const std::vector<llama_ubatch> & ubatches) {
        if (ubatches.size() == 1) {
            return swa.prepare(ubatches);
        }

        auto & cells = *(swa.*(&razor_sliding_cells::v_cells_impl));

        const auto before = cells;
        auto res = swa.prepare(ubatches);
        cells = before;

        return res;
    }

    static void clear(llama_kv_cache & swa, uint32_t strm) {
        (*(swa.*(&razor_sliding_cells::v_cells_impl)))[strm].reset();
        (swa.*(&razor_sliding_cells::v_heads))[strm] = 0;
    }

    // perform the copies that upstream would perform at the next update
    static void copy_streams(llama_kv_cache & swa) {
        auto & copies = swa.*(&razor_sliding_cells::sc_info);

        for (size_t i = 0; i < copies.ssrc.size(); ++i) {
            for (const auto & layer : swa.*(&razor_sliding_cells::layers)) {
                ggml_backend_tensor_copy(layer.k_stream[copies.ssrc[i]], layer.k_stream[copies.sdst[i]]);
                ggml_backend_tensor_copy(layer.v_stream[copies.ssrc[i]], layer.v_stream[copies.sdst[i]]);
            }
        }

        copies = {};
    }
};

llama_memory_context_ptr llama_memory_razor::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool /* embd_all */) {
    llama_razor_error_set("");

    for (uint32_t s = 0; s < kv->get_n_stream(); ++s) {
        if (pos_max_other(s) + 1 != (llama_pos) kv->n_tokens(s)) {
            return llama_razor_refuse_batch("the parts of the cache hold different numbers of tokens, clear it before the next token is decoded");
        }
    }

    std::vector<llama_ubatch> ubatches;

    // a recurrent state needs ubatches of whole sequences
    const char * why = kv->split_batch(balloc, n_ubatch, recr != nullptr, ubatches);
    if (why) {
        return llama_razor_refuse_batch(why);
    }

    auto sinfos = kv->prepare(ubatches);

    if (sinfos.empty() || (recr && !recr->prepare(ubatches))) {
        return llama_razor_refuse_batch("the context is full");
    }

    if (hybrid) {
        return std::make_unique<llama_memory_hybrid_context>(hybrid, std::move(sinfos), std::move(ubatches));
    }

    auto sinfos_swa = razor_sliding_cells::prepare(*swa, ubatches);
    if (sinfos_swa.empty()) {
        return llama_razor_refuse_batch("the context is full");
    }

    return std::make_unique<llama_kv_cache_iswa_context>(iswa, std::move(sinfos), std::move(sinfos_swa), std::move(ubatches));
}

llama_pos llama_memory_razor::pos_max_other(uint32_t strm) const {
    return swa ? swa->seq_pos_max(strm) : recr->seq_pos_max(strm);
}

bool llama_memory_razor::can_keep(uint32_t strm, uint32_t n) const {
    if (recr) {
        return recr->seq_pos_max(strm) + 1 == (llama_pos) n;
    }

    if (swa->seq_pos_max(strm) + 1 < (llama_pos) n) {
        return false;
    }

    // the token at position n must not attend to tokens that are gone
    const llama_pos pos_min = swa->seq_pos_min(strm);

    const auto & hparams = kv->get_model().hparams;

    return pos_min <= 0 || llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos_min - 1, n);
}

void llama_memory_razor::clear_other(uint32_t strm) {
    if (swa) {
        razor_sliding_cells::clear(*swa, strm);
    } else if (kv->get_n_stream() == 1) {
        recr->clear(false);
    } else {
        recr->seq_rm(strm, -1, -1);
    }
}

bool llama_memory_razor::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    // ask all parts before the first one changes
    const auto range = kv->streams_of(seq_id);

    for (uint32_t s = range.first; s < range.end; ++s) {
        const llama_pos n = kv->n_tokens(s);

        const bool all  = p0 == 0 && p1 >= n;
        const bool none = p0 >= p1 || p0 >= n;

        if (!all && !none && !can_keep(s, p0)) {
            return false;
        }
    }

    if (!kv->seq_rm(seq_id, p0, p1)) {
        return false;
    }

    for (uint32_t s = range.first; s < range.end; ++s) {
        const llama_pos n = kv->n_tokens(s);

        if (n == 0) {
            clear_other(s);
        } else if (swa) {
            swa->seq_rm(s, n, -1);
        }
    }

    return true;
}

void llama_memory_razor::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    kv->seq_cp(seq_id_src, seq_id_dst, p0, p1);

    for (const llama_seq_id seq_id : { seq_id_src, seq_id_dst }) {
        if (seq_id < 0 || seq_id >= (llama_seq_id) kv->get_n_stream() || seq_id_src == seq_id_dst) {
            return;
        }
    }

    clear_other(seq_id_dst);

    if (kv->n_tokens(seq_id_dst) == 0) {
        return; // there is nothing to copy, or not all was to be copied
    }

    if (swa) {
        swa->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    } else {
        recr->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    }
}

void llama_memory_razor::copy_streams() const {
    kv->copy_streams();

    if (swa) {
        razor_sliding_cells::copy_streams(*swa);
    }
}

void llama_memory_razor::seq_keep(llama_seq_id seq_id) {
    kv->seq_keep(seq_id);

    for (uint32_t s = 0; s < kv->get_n_stream(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            clear_other(s);
        }
    }
}

void llama_memory_razor::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    kv->seq_add(seq_id, p0, p1, shift);
}

void llama_memory_razor::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    kv->seq_div(seq_id, p0, p1, d);
}

void llama_memory_razor::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    copy_streams();

    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        kv->state_write(io, seq_id, flags);
    }

    if (swa) {
        swa->state_write(io, seq_id, flags);
    } else {
        recr->state_write(io, seq_id, flags);
    }
}

void llama_memory_razor::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    copy_streams();

    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        auto clear_empty = [&]() {
            const auto range = kv->streams_of(seq_id);

            for (uint32_t s = range.first; s < range.end; ++s) {
                if (kv->n_tokens(s) == 0) {
                    clear_other(s);
                }
            }
        };

        try {
            kv->state_read(io, seq_id, flags);
        } catch (...) {
            // either nothing has changed, or what was to be read is empty
            clear_empty();
            throw;
        }

        // upstream keeps the tokens of a sequence if its state is empty
        clear_empty();
    }

    try {
        if (swa) {
            swa->state_read(io, seq_id, flags);
        } else {
            recr->state_read(io, seq_id, flags);
        }
    } catch (const std::exception & err) {
        llama_razor_error_set(err.what());
        io.discard();

        if (seq_id < 0 || kv->get_n_stream() == 1) {
            clear(true);
        } else {
            kv->clear_stream(seq_id);
            clear_other(seq_id);
        }
        throw;
    }
}

void llama_memory_razor::abort_ubatch(llama_seq_id seq_id, llama_pos p0) {
    kv->abort_ubatch(seq_id, p0);

    if (recr) {
        LLAMA_LOG_WARN("%s: clearing the cache\n", __func__);

        clear(false);
    } else if ((llama_pos) kv->n_tokens(seq_id) != p0) {
        LLAMA_LOG_WARN("%s: clearing the sequence\n", __func__);

        kv->clear_stream(seq_id);
        clear_other(seq_id);
    } else {
        swa->seq_rm(seq_id, p0, -1);
    }
}

uint32_t llama_memory_razor::n_rollback(uint32_t strm) const {
    const uint32_t n     = kv->n_tokens(strm);
    const uint32_t n_max = kv->n_rollback(strm);

    uint32_t res = 0;
    while (res < n_max && can_keep(strm, n - res - 1)) {
        ++res;
    }

    return res;
}

//
// creation
//

// what llama_razor_new_kv_cache() creates, set while upstream creates the memory around it
struct razor_new_memory {
    const llama_cparams & cparams;

    llama_razor_plan    plan;
    razor_attn_kernel   attn;
    razor_device_choice device;

    const llama_razor_rewind_params & rewind;

    llama_kv_cache_razor * kv = nullptr;
};

static thread_local razor_new_memory * razor_new = nullptr;

bool llama_razor_in_new_memory() {
    return razor_new != nullptr;
}

llama_kv_cache * llama_razor_new_kv_cache(
        const llama_model & model,
        const llama_hparams & hparams,
        ggml_type type_k,
        ggml_type type_v,
        bool v_trans,
        bool offload,
        bool unified,
        uint32_t kv_size,
        uint32_t n_seq_max,
        uint32_t n_pad,
        uint32_t n_swa,
        llama_swa_type swa_type,
        llama_memory_t mem_other,
        const llama_memory_i::layer_filter_cb & filter,
        const llama_memory_i::layer_reuse_cb & reuse,
        const llama_memory_i::layer_share_cb & share) {
    if (!razor_new) {
        return new llama_kv_cache(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
                n_swa, swa_type, mem_other, filter, reuse, share);
    }

    const auto & plan = razor_new->plan;

    // the plan has the heads of the layers that upstream would create a full cache for
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        const bool planned = il < plan.n_layer() && plan.n_local(il) + plan.retrieval[il].size() > 0;
        const bool wanted  = hparams.n_head_kv(il) > 0 && hparams.has_kv(il) && (!filter || filter(il));

        if (planned != wanted) {
            llama_razor_error_throw(format("%s: the layers with a KV cache are not those with full attention, switch razor off to use the full cache",
                        llm_arch_name(model.arch)));
        }
    }

    razor_new->kv = new llama_kv_cache_razor(model, razor_new->cparams, plan, razor_new->attn, razor_new->device, razor_new->rewind, reuse);

    return razor_new->kv;
}

llama_kv_cache_context * llama_razor_new_kv_context(llama_kv_cache * kv, llama_kv_cache::slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) {
    if (auto * kv_razor = dynamic_cast<llama_kv_cache_razor *>(kv)) {
        return new llama_kv_cache_razor_context(kv_razor, std::move(sinfos), std::move(ubatches));
    }

    return new llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches));
}

llama_memory_i * llama_razor_new_memory(
        const llama_model & model,
        const llama_memory_params & params,
        const llama_cparams & cparams,
        llama_razor_plan plan,
        razor_attn_kernel attn,
        razor_device_choice device,
        const llama_razor_rewind_params & rewind) {
    razor_new_memory pending = { cparams, std::move(plan), attn, device, rewind };

    struct scope {
        scope(razor_new_memory * pending) { razor_new = pending; }
        ~scope()                          { razor_new = nullptr; }
    };

    std::unique_ptr<llama_memory_i> memory;
    {
        scope in_scope(&pending);

        memory.reset(model.create_memory(params, cparams));
    }

    if (!pending.kv) {
        llama_razor_error_throw(format("%s: this kind of cache is not supported, switch razor off to use the full cache", llm_arch_name(model.arch)));
    }

    return new llama_memory_razor(memory.release(), pending.kv);
}

const llama_kv_cache_razor * llama_razor_get_cache(const llama_memory_i * memory) {
    if (const auto * parts = dynamic_cast<const llama_memory_razor *>(memory)) {
        return parts->get_kv();
    }

    return dynamic_cast<const llama_kv_cache_razor *>(memory);
}

const llama_kv_cache_razor_context * llama_razor_get_context(const llama_memory_context_i * mctx) {
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        mctx = iswa->get_base();
    } else if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        mctx = hybrid->get_attn();
    }

    return dynamic_cast<const llama_kv_cache_razor_context *>(mctx);
}

bool llama_razor_abort(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0) {
    if (auto * parts = dynamic_cast<llama_memory_razor *>(memory)) {
        parts->abort_ubatch(seq_id, p0);

        return true;
    }

    if (auto * kv = dynamic_cast<llama_kv_cache_razor *>(memory)) {
        kv->abort_ubatch(seq_id, p0);

        return true;
    }

    return false;
}
