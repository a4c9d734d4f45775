#pragma once

// models whose memory has more parts than one KV cache: sliding window attention (iSWA) and hybrid models
//
// upstream's memories consist of a KV cache for the layers with full attention and of other parts. With razor, the KV cache is a
// llama_kv_cache_razor, the other parts are upstream's. llama_memory_razor owns such a memory: it splits batches at the fold frontier
// and changes either all parts or none. The contexts of ubatches are upstream's, so that the graphs find what they expect

#include "llama-kv-cache-razor.h"

class llama_kv_cache_iswa;
class llama_memory_hybrid;
class llama_memory_recurrent;

class llama_memory_razor : public llama_memory_i {
public:
    // memory is a llama_kv_cache_iswa or a llama_memory_hybrid that was created with kv
    llama_memory_razor(llama_memory_i * memory, llama_kv_cache_razor * kv);

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full()                                       override { return memory->init_full(); }
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize)  override { return memory->init_update(lctx, optimize); }

    bool get_can_shift() const override { return false; }

    void clear(bool data) override { memory->clear(data); }

    // false with nothing changed if a part cannot go back to p0
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    // a recurrent state is copied when one of the sequences goes on, by upstream
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override { return memory->seq_pos_min(seq_id); }
    llama_pos seq_pos_max(llama_seq_id seq_id) const override { return memory->seq_pos_max(seq_id); }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override { return memory->memory_breakdown(); }

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_memory_razor specific API
    //

    // see llama_kv_cache_razor::abort_ubatch(); recurrent states cannot go back, and an ubatch may move those of other sequences,
    // so the cache is cleared if there are some
    void abort_ubatch(llama_seq_id seq_id, llama_pos p0);

    // return the number of tokens that seq_rm() can remove from the end
    uint32_t n_rollback(uint32_t strm) const;

    llama_kv_cache_razor * get_kv() const { return kv; }

    const llama_memory_i * get_memory() const { return memory.get(); }

private:
    const std::unique_ptr<llama_memory_i> memory;

    // the parts of memory
    llama_kv_cache_razor   * const kv;
    llama_kv_cache_iswa    * const iswa;   // one of these two
    llama_memory_hybrid    * const hybrid;

    llama_kv_cache         * const swa;    // nullptr for hybrid
    llama_memory_recurrent * const recr;   // nullptr for iswa

    // return the last position of a stream in the other parts
    llama_pos pos_max_other(uint32_t strm) const;

    // return true if the other parts of a stream can be cut to n tokens
    bool can_keep(uint32_t strm, uint32_t n) const;

    // remove a stream from the other parts
    void clear_other(uint32_t strm);

    // perform the pending copies of streams of all parts
    void copy_streams() const;
};

// create the KV cache for the layers with full attention, called by upstream's memories
// same parameters as the constructor of llama_kv_cache
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
        const llama_memory_i::layer_share_cb & share);

// same for the context of the ubatches
llama_kv_cache_context * llama_razor_new_kv_context(
        llama_kv_cache * kv,
        llama_kv_cache::slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches);

// create the memory of a model that has more parts than one KV cache
llama_memory_i * llama_razor_new_memory(
        const llama_model & model,
        const llama_memory_params & params,
        const llama_cparams & cparams,
        llama_razor_plan plan,
        razor_attn_kernel attn,
        razor_device_choice device,
        const llama_razor_rewind_params & rewind);

// return true while llama_razor_new_memory() lets upstream create the memory
bool llama_razor_in_new_memory();

// return the cache with local heads, nullptr if the memory has none
const llama_kv_cache_razor * llama_razor_get_cache(const llama_memory_i * memory);

// same for the context of a batch
const llama_kv_cache_razor_context * llama_razor_get_context(const llama_memory_context_i * mctx);

// to be called instead of llama_memory_i::seq_rm() if an ubatch was applied but its computation failed
// return false if the memory has no local heads
bool llama_razor_abort(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0);
