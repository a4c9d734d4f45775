#pragma once

// the KV cache of a context with RazorAttention
//
// the content of the local heads depends only on the tokens, not on how they were split into batches: the fold frontier of a group
// is a function of the position, all positions of a sequence in an ubatch have the same frontiers, and only apply_local() folds
//
// each sequence has a stream of its own, with the same number: its cells, rows, accumulators and frontiers

#include "llama-hparams.h"
#include "llama-kv-cache.h"
#include "llama-razor-device.h"
#include "llama-razor-plan.h"
#include "llama-razor-rewind.h"

#include <memory>
#include <vector>

class llama_razor_prefill;
class llama_razor_source;

//
// llama_kv_cache_razor
//

// a copy of the model's hparams with one KV head per layer, since llama_kv_cache sees each retrieval head as a layer
// it is a base class because llama_kv_cache keeps a reference to it, so it has to be constructed first
struct llama_razor_hparams {
    llama_razor_hparams(const llama_hparams & hparams);

    llama_hparams hparams_head;
};

// retrieval heads have n_ctx cells, local heads have those of their group: [sinks | ring of recent tokens | compensation tokens]
// the rows of a head are contiguous, so that attention reads them as one stream
//
// llama_kv_cache manages the cells of the retrieval heads, makes their mask and saves their state. Its layers are views of
// single retrieval heads
//
// the first ubatch of a block of positions folds the tokens that leave the window, as part of its graph:
// rows of the ring -> sum -> accumulator -> mean -> compensation token
class llama_kv_cache_razor : private llama_razor_hparams, public llama_kv_cache {
public:
    // the fold state of a group
    struct group_state {
        uint32_t frontier      = 0;  // positions [sink_tokens, frontier) are folded
        int64_t  frontier_prev = -1; // frontier before the last fold, -1: the fold cannot be undone
        uint32_t slot          = 0;  // compensation token and accumulator row in use
    };

    struct stream_state {
        uint32_t n_high = 0; // positions below this one were written since the last clear, even if they were removed again

        // an operation was requested that local heads do not support: refuse to decode until the stream is cleared
        bool broken = false;

        std::vector<group_state> groups;
    };

    struct stream_range {
        uint32_t first;
        uint32_t end;
    };

    // the part of an ubatch's graph that concerns the local heads of a group
    struct group_step {
        uint32_t n_kv      = 0;  // cells that the attention reads
        uint32_t frontier  = 0;
        uint32_t slot      = 0;
        uint32_t fold_from = 0;  // positions [fold_from, frontier) are folded before the ubatch is written
        uint32_t n_fold    = 0;
    };

    // one sequence of an ubatch
    struct step_info {
        uint32_t strm = 0;
        uint32_t pos0 = 0; // its first position in the ubatch

        std::vector<group_step> groups;
    };

    // rows of the accumulators: one for each compensation token, and one that is always zero
    static constexpr uint32_t SLOT_ZERO = 2;
    static constexpr uint32_t N_SLOTS   = 3;

    // sums of the folded rows of a group
    struct group_sums {
        ggml_tensor * k = nullptr; // F32 [n_embd_head_k*n_local, N_SLOTS, n_stream]
        ggml_tensor * v = nullptr; // F32 [n_embd_head_v*n_local, N_SLOTS, n_stream]
    };

    struct razor_layer {
        uint32_t il;

        uint32_t n_retrieval; // KV heads
        uint32_t n_local;

        // the rows are n_ctx rows of each retrieval head, then for each group the cells of its heads
        // without flash attention, the values of each retrieval head are transposed: [n_ctx, n_embd_head_v]
        ggml_tensor * k; // [n_embd_head_k, rows, n_stream]
        ggml_tensor * v; // [n_embd_head_v, rows, n_stream]

        // the tensors with the rows of the groups: separate ones if the layer is split, else k and v
        ggml_tensor * k_local;
        ggml_tensor * v_local;

        // with several streams: for each of them, its part of each tensor of the layer
        std::vector<std::vector<ggml_tensor *>> parts;

        std::vector<group_sums> sums; // one per group, with nullptr if there is no compensation or the group has no heads in the layer

        razor_attn_kernel attn = nullptr; // kernel for flash attention if the cache is in host memory, else nullptr

        // with flash attention: the operations of ggml-razor.h that the layer can use on its device
        // those for attention support at most one group with heads in the layer, and no ALiBi
        bool device       = false; // storing and folding
        bool device_token = false; // attention of one token
        bool device_batch = false; // attention of a batch
    };

    llama_kv_cache_razor(
            const llama_model & model,
         const llama_cparams  & cparams,
             llama_razor_plan   plan,
            razor_attn_kernel   attn,
          razor_device_choice   device,
const llama_razor_rewind_params & rewind,
        const layer_reuse_cb & reuse = nullptr);

    ~llama_kv_cache_razor();

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    // only the end of a sequence can be removed, across a fold only while the folded rows are still in the ring or in the rewind log
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    // only a whole sequence can be copied, else the copy is empty and must be removed before it is used
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // one less than the first position to which seq_rm() can go back: callers do not ask it to go back further
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_razor specific API
    //

    // maximum number of sequences in an ubatch: each of them has its own attention in the graph
    static constexpr uint32_t MAX_SEQS = 8;

    // split the batch into ubatches, in each of which the positions of a sequence have the same frontier
    // with equal_seqs: for memories with a recurrent part
    // return why the batch is refused, nullptr if it is not
    const char * split_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool equal_seqs,
            std::vector<llama_ubatch> & ubatches) const;

    // to be called for each sequence of an ubatch that was applied but whose computation failed
    // undo the ubatch, or clear the sequence if rows that are needed for it were overwritten
    void abort_ubatch(llama_seq_id seq_id, llama_pos p0);

    // to be called for each ubatch before its graph is built; prefill is nullptr if all layers read the ubatch
    // return a step for each of its sequences, which have the same number of tokens
    std::vector<step_info> apply_local(const llama_ubatch & ubatch, const llama_razor_prefill * prefill);

    // return the step with the largest graph
    step_info full_step() const;

    const llama_razor_plan & get_plan() const { return plan; }

    const razor_layer & get_layer(int32_t il) const { return layers_razor[il]; }

    // return the size of a layer's K or V in bytes
    static size_t bytes_k(const razor_layer & layer);
    static size_t bytes_v(const razor_layer & layer);

    // return the size of a layer's accumulators in bytes
    static size_t bytes_sums(const razor_layer & layer);

    // return the layer whose cache the layer reads: itself, except in models whose layers share caches
    int32_t get_source(int32_t il) const { return sources[il]; }

    const llama_model & get_model() const { return model; }

    uint32_t n_tokens(uint32_t strm) const;

    const stream_state & get_state(uint32_t strm) const { return streams[strm]; }

    // return the streams of a sequence id: all of them if it is negative, none if the id is out of range
    stream_range streams_of(llama_seq_id seq_id) const;

    void clear_stream(uint32_t strm);

    // copy the cells of the retrieval heads
    void save_cells(uint32_t strm, llama_kv_cells & cells, uint32_t & head) const;

    // restore saved cells and the state of a stream; rows that were overwritten since then are not restored
    void restore(uint32_t strm, const llama_kv_cells & cells, uint32_t head, const stream_state & st);

    // wait for computations, so that rows can be read and written
    void synchronize() const;

    // return the scheduler of the context, nullptr before the first decode
    ggml_backend_sched_t get_sched() const;

    // return true if the tensors of the cache are in this buffer
    bool owns(ggml_backend_buffer_t buf) const;

    // return nullptr if the rewind log is off
    const llama_razor_rewind * get_rewind() const { return rewind.get(); }

    // perform the copies that seq_cp() requested; no computation may be running
    void copy_streams() const;

    bool has_copies() const { return !copies.empty(); }

    // return the number of tokens that seq_rm() can remove from the end
    uint32_t n_rollback(uint32_t strm) const;

    bool get_v_trans() const { return v_trans; }
    bool has_devices() const;

    const std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & bufs() const { return ctxs_bufs; }

    // see llama_razor_set_full_prefill() and llama_razor_stats; the last three are written by llama_razor_prefill
    bool     full_prefill  = false;
    bool     can_prefill   = false; // llama_razor_prefill::find_unsupported() found nothing
    float    prefill_done  = 0.0f;
    uint64_t prefill_count = 0;
    uint64_t prefill_bytes = 0;

    // the source of K and V of decoded tokens, nullptr if the model computes them; see llama_razor_set_source()
    std::unique_ptr<llama_razor_source> source;

private:
    const llama_cparams & cparams;

    const llama_razor_plan plan;

    std::vector<stream_state> streams;

    // pending copies from a stream to another one, performed before the rows of a stream are read or written
    mutable std::vector<std::pair<uint32_t, uint32_t>> copies;

    std::vector<razor_layer> layers_razor; // one per layer of the plan

    std::vector<int32_t> sources; // layer -> layer whose cache it reads

    // result of the last apply_local(), and whether only one layer read its ubatch
    std::vector<step_info> last_steps;
    bool last_is_prefill = false;

    // the context of the cache, nullptr before the first decode
    llama_context * lctx = nullptr;

    std::unique_ptr<llama_razor_rewind> rewind; // nullptr: off

    // rows [from, end) of a group, and if move_comp is set its compensation token and accumulators in a slot
    struct rewind_group {
        uint32_t from = 0;
        uint32_t end  = 0;
        uint32_t slot = 0;

        bool move_comp = false;
    };

    // what brings a stream back to its first p0 tokens and the frontiers of position pos
    struct rewind_step {
        uint32_t strm = 0;
        uint32_t p0   = 0;
        uint32_t pos  = 0;

        uint32_t n_high = 0; // afterwards

        std::vector<rewind_group> groups;

        // the blocks of the log to read: [first, end), in steps of plan.block
        uint32_t first = 0;
        uint32_t end   = 0;

        std::vector<std::shared_ptr<const uint8_t>> data; // their bytes
    };

    void init_rotation();

    uint64_t fingerprint() const;

    // return the state of an empty stream
    stream_state empty_state() const;

    // return true if the positions [p0, p1) of a stream can be removed
    bool can_remove(uint32_t strm, uint32_t p0, uint32_t p1) const;

    void remove(uint32_t strm, uint32_t p0, uint32_t p1);

    void init_rewind(const llama_razor_rewind_params & params);

    // add what the fold before position pos0 drops to the rewind log, before it is computed
    void log_fold(uint32_t strm, uint32_t pos0, const llama_razor_prefill * prefill);

    rewind_step plan_rewind(uint32_t strm, uint32_t p0, uint32_t pos) const;

    bool can_rewind(const rewind_step & step) const;

    // read the blocks of a step that is possible, return false if they cannot be read
    bool load_rewind(rewind_step & step) const;

    void apply_rewind(const rewind_step & step);

    // return the size of the part of a layer in a block of the rewind log
    size_t rewind_size(const razor_layer & layer) const;

    // call f(tensor, data, offset, size, n_copies, stride_tensor, stride_data) for pieces of a layer and their places in the part of
    // the layer in the block of the fold before position start
    template<typename F>
    void for_each_rewind_piece(const razor_layer & layer, uint32_t strm, uint32_t start, const std::vector<rewind_group> & groups,
            uint8_t * data, F && f) const;

    // advance a stream by tokens that follow pos0
    step_info apply_seq(uint32_t strm, uint32_t pos0, uint32_t n_tokens, const llama_razor_prefill * prefill);

    // make a sequence unusable, if it has tokens
    void set_broken(llama_seq_id seq_id, const char * why);

    // return true if the frontier of a group can be moved back: the rows from position `to` on are still in the ring
    bool can_unfold(const stream_state & st, size_t i_group, uint32_t to) const;

    // return true if no frontier is beyond that of the position, or all that are can be moved back to it
    bool can_unfold_to(const stream_state & st, uint32_t pos) const;

    // same, or the rewind log has what is needed to go back to p0 = pos
    bool can_go_back(uint32_t strm, uint32_t pos) const;

    void unfold(group_state & st, uint32_t to) const;

    // call f(tensor, offset, size), in bytes, for the rows in use of each local head and for the accumulators
    template<typename F>
    void for_each_local_head(uint32_t strm, const stream_state & st, F && f) const;

    void state_write_stream(llama_io_write_i & io, uint32_t n, const stream_state & st) const;

    // return the number of tokens, throws if the state cannot be right
    uint32_t state_read_stream(llama_io_read_i & io, stream_state & st) const;
};

class llama_kv_cache_razor_context : public llama_kv_cache_context {
public:
    // used to create a full-cache context
    llama_kv_cache_razor_context(llama_kv_cache_razor * kv);

    // used to create a batch processing context from a batch
    llama_kv_cache_razor_context(
            llama_kv_cache_razor * kv,
            slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches,
            std::shared_ptr<llama_razor_prefill> prefill = nullptr);

    bool next()  override;
    bool apply() override;

    const llama_kv_cache_razor & get_kv() const { return *kv_razor; }

    // return nullptr if all layers read the ubatch
    llama_razor_prefill * get_prefill() const { return prefill.get(); }

    const std::shared_ptr<llama_razor_prefill> & get_shared_prefill() const { return prefill; }

    // return the number of sequences of the ubatch
    uint32_t n_seqs() const { return steps.size(); }

    const llama_kv_cache_razor::step_info & get_step(uint32_t i_seq) const { return steps[i_seq]; }

    // return the cells of a sequence's tokens in the retrieval heads
    const std::vector<uint32_t> & get_cells(uint32_t i_seq) const { return cells[i_cur][i_seq]; }

private:
    llama_kv_cache_razor * kv_razor;

    std::shared_ptr<llama_razor_prefill> prefill;

    std::vector<llama_kv_cache_razor::step_info> steps;

    std::vector<std::vector<std::vector<uint32_t>>> cells; // per ubatch and sequence

    size_t i_cur = 0;
};

// performs the pending copies of streams
class llama_kv_cache_razor_update : public llama_kv_cache_context {
public:
    llama_kv_cache_razor_update(const llama_kv_cache_razor * kv, llama_context * lctx);

    bool apply() override;

private:
    const llama_kv_cache_razor * kv;

    llama_context * lctx;
};

// refuse a batch, for a reason that llama_razor_last_error() returns
llama_memory_context_ptr llama_razor_refuse_batch(const char * why);
