// Fuzz target of the native cache: a random plan, then random operations on a context that runs it.
//
// A finding is a report of a sanitizer, an assertion of the library, statistics that disagree with the operations, or
// wrong logits. Logits must equal those of a new context that evaluates the same tokens at once (test_native_reference.py
// shows that these are right). After a saved state was loaded, they must be bit-identical.
//
// RAZOR_FUZZ_MODELS: folder with the models. RAZOR_FUZZ_VERBOSE: what is done, and the largest differences of logits.
// Built and run by tests/tools/sanitizers.py; with RAZOR_FUZZ_THREADS for ThreadSanitizer, without libFuzzer.

#include "llama-razor.h"

#include "ggml.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#ifdef RAZOR_FUZZ_THREADS
#include <random>
#include <thread>
static constexpr int N_THREADS = 2;
#else
static constexpr int N_THREADS = 1;
#endif

static const bool verbose = getenv("RAZOR_FUZZ_VERBOSE") != nullptr;

static thread_local std::string trace; // what was done, printed with a finding

__attribute__((format(printf, 1, 2))) static void log_op(const char * fmt, ...) {
    char buf[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    trace += buf;
    if (verbose) {
        fputs(buf, stderr);
    }
}

#define EXPECT(cond, ...)                                                                \
    do {                                                                                 \
        if (!(cond)) {                                                                   \
            fprintf(stderr, "%s\n%s:%d: not so: %s: ", trace.c_str(), __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__);                                                \
            fprintf(stderr, "\nlast error: %s\n", llama_razor_last_error());             \
            abort();                                                                     \
        }                                                                                \
    } while (0)

//
// models, KV types
//

struct model_info {
    llama_model *         model;
    uint32_t              head_dim;
    uint32_t              n_vocab;
    std::vector<uint32_t> n_head_kv; // per layer
};

static auto & models = *new std::vector<model_info>; // never freed, so that LeakSanitizer finds the models in it

struct kv_kind {
    const char *       name;
    ggml_type          type_k;
    ggml_type          type_v;
    bool               flash_attn;
    float              tolerance; // of logits (order of 3) computed in other batches: CPU flash attention adds up in F16 below 64 tokens
    std::atomic<float> seen;
};

static std::array<kv_kind, 7> kinds = {{
    { "f32",     GGML_TYPE_F32,  GGML_TYPE_F32,  false, 2e-4f, {0} },
    { "f32 fa",  GGML_TYPE_F32,  GGML_TYPE_F32,  true,  3e-1f, {0} },
    { "f16",     GGML_TYPE_F16,  GGML_TYPE_F16,  false, 5e-2f, {0} },
    { "f16 fa",  GGML_TYPE_F16,  GGML_TYPE_F16,  true,  3e-1f, {0} },
    { "bf16",    GGML_TYPE_BF16, GGML_TYPE_BF16, false, 5e-1f, {0} },
    { "q8_0 fa", GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true,  5e-1f, {0} },
    { "q4_0",    GGML_TYPE_Q4_0, GGML_TYPE_F16,  false, 5e-1f, {0} },
}};

static void load_models() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    const char * folder = getenv("RAZOR_FUZZ_MODELS");
    if (!folder) {
        fprintf(stderr, "RAZOR_FUZZ_MODELS is not set, run python -m tests.tools.sanitizers\n");
        exit(2);
    }

    for (const auto & [name, head_dim] : { std::pair("llama", 32), std::pair("rotated", 64), std::pair("deci", 32) }) {
        auto params = llama_model_default_params();
        params.n_gpu_layers = 0;

        model_info res = {};
        res.model = llama_model_load_from_file((std::string(folder) + "/" + name + ".gguf").c_str(), params);
        if (!res.model) {
            fprintf(stderr, "%s/%s.gguf cannot be loaded, run python -m tests.tools.sanitizers\n", folder, name);
            exit(2);
        }
        res.head_dim = head_dim;
        res.n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(res.model));
        res.n_head_kv.resize(llama_razor_model_layers(res.model, nullptr, 0));
        llama_razor_model_layers(res.model, res.n_head_kv.data(), res.n_head_kv.size());
        models.push_back(res);
    }
}

//
// plan: the arithmetic of llama-razor.h, written down a second time
//

struct plan_info {
    const model_info *   model;
    kv_kind *            kind;
    std::vector<uint8_t> mask;

    uint32_t n_ctx, n_ubatch;
    uint32_t sink_tokens, window, window_min, window_divisor;
    bool     compensation;

    uint32_t length() const { return window > 0 ? window : std::max(window_min, window_divisor > 0 ? n_ctx/window_divisor : 0); }

    uint32_t block() const {
        for (uint32_t res : { 512, 256, 128 }) {
            if (res <= length()/4) {
                return res;
            }
        }
        return 64;
    }

    uint32_t cells() const {
        return (sink_tokens + (compensation ? 4 : 0) + length() + block() + LLAMA_RAZOR_SLACK + 255)/256*256;
    }

    uint32_t frontier(int64_t pos) const {
        return std::max<int64_t>(sink_tokens, pos/block()*block() - (int64_t) length());
    }

    // full: of a cache where all heads keep all tokens
    uint64_t bytes(bool full) const {
        const uint64_t row_k = ggml_row_size(kind->type_k, model->head_dim);
        const uint64_t row_v = ggml_row_size(kind->type_v, model->head_dim);

        std::vector<uint64_t> r, l;
        size_t i = 0;
        for (const uint32_t n : model->n_head_kv) {
            const uint64_t n_retrieval = full ? n : std::accumulate(&mask[i], &mask[i] + n, 0);
            r.push_back(n_retrieval);
            l.push_back(n - n_retrieval);
            i += n;
        }

        uint64_t res = 0;
        for (size_t il = 0; il < r.size(); ++il) {
            // without flash attention upstream pads V of its full cache
            const uint64_t r_v = kind->flash_attn || !full ? r[il] : *std::max_element(r.begin(), r.end());
            res += (r[il]*n_ctx + l[il]*cells())*row_k + (r_v*n_ctx + l[il]*cells())*row_v;
            res += compensation ? 3*l[il]*2*model->head_dim*sizeof(float) : 0;
        }
        return res;
    }

    bool active() const {
        return std::count(mask.begin(), mask.end(), 0) > 0 && cells() < n_ctx;
    }
};

static plan_info random_plan(FuzzedDataProvider & fdp) {
    plan_info res = {};

    res.model = &models[fdp.ConsumeIntegralInRange<size_t>(0, models.size() - 1)];
    // one half has the F32 cache, whose logits are compared most strictly
    res.kind  = &kinds[fdp.ConsumeBool() ? 0 : fdp.ConsumeIntegralInRange<size_t>(0, kinds.size() - 1)];

    const uint32_t n_heads = std::accumulate(res.model->n_head_kv.begin(), res.model->n_head_kv.end(), 0u);
    const uint32_t bits    = fdp.ConsumeIntegral<uint8_t>();
    for (uint32_t i = 0; i < n_heads; ++i) {
        res.mask.push_back(bits >> i & 1);
    }

    res.n_ctx          = fdp.PickValueInArray({ 512, 512, 768, 1024 });
    res.n_ubatch       = fdp.PickValueInArray({ 7, 16, 64, 128, 512 });
    res.sink_tokens    = fdp.ConsumeBool() ? fdp.ConsumeIntegralInRange<uint32_t>(0, 9) : fdp.ConsumeIntegralInRange<uint32_t>(0, 300);
    res.compensation   = fdp.ConsumeIntegralInRange<int>(0, 2) > 0;
    res.window_divisor = fdp.ConsumeIntegralInRange<uint32_t>(0, 30);
    res.window_min     = fdp.ConsumeIntegralInRange<uint32_t>(1, 200);

    switch (fdp.ConsumeIntegralInRange<int>(0, 3)) {
        case 0: res.window = 0; break;
        case 1: res.window = fdp.ConsumeIntegralInRange<uint32_t>(1, 130); break;
        case 2: res.window = fdp.ConsumeIntegralInRange<uint32_t>(1, 700); break;
        case 3: { // the ring has no cell to spare
            const uint32_t used = res.sink_tokens + (res.compensation ? 4 : 0) + LLAMA_RAZOR_SLACK + 64;
            res.window = 256 - used%256;
            break;
        }
    }

    return res;
}

//
// contexts
//

static bool set_override(const plan_info & plan) {
    llama_razor_params params = {};

    params.size           = sizeof(params);
    params.enabled        = 1;
    params.sink_tokens    = plan.sink_tokens;
    params.window         = plan.window;
    params.window_min     = plan.window_min;
    params.window_divisor = plan.window_divisor;
    params.compensation   = plan.compensation;
    params.n_retrieval    = plan.mask.size();
    params.retrieval      = plan.mask.data();

    return llama_razor_set_override(&params);
}

struct context {
    const plan_info & plan;

    llama_context * ctx;
    llama_memory_t  mem;

    int64_t n_nodes = -1; // graph nodes until the computation is aborted

    // a damaged state was accepted: any logits. NaN can lie in cells that masks hide, where it shows all the same, so
    // this ends only when all buffers are cleared
    bool tainted = false;

    explicit context(const plan_info & plan) : plan(plan) {
        auto params = llama_context_default_params();

        params.n_ctx           = plan.n_ctx;
        params.n_batch         = plan.n_ctx;
        params.n_ubatch        = plan.n_ubatch;
        params.n_threads       = N_THREADS;
        params.n_threads_batch = N_THREADS;
        params.type_k          = plan.kind->type_k;
        params.type_v          = plan.kind->type_v;
        params.flash_attn_type = plan.kind->flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        params.no_perf         = true;

        EXPECT(set_override(plan), "a valid plan is refused");
        ctx = llama_init_from_model(plan.model->model, params);
        EXPECT(ctx, "a valid plan gives no context");
        llama_razor_set_override(nullptr);

        mem = llama_get_memory(ctx);
        llama_set_abort_callback(ctx, abort_after, this);
    }

    ~context() { llama_free(ctx); }

    context(const context &) = delete;

    static bool abort_after(void * data) {
        auto * self = (context *) data;
        return self->n_nodes >= 0 && self->n_nodes-- == 0;
    }

    // logits of all tokens, appended to rows
    int decode(const llama_token * tokens, size_t n, llama_pos pos, std::vector<float> * rows, llama_seq_id seq_id = 0) {
        std::vector<llama_token>    token(tokens, tokens + n);
        std::vector<llama_pos>      positions(n);
        std::vector<int32_t>        n_seq_id(n, 1);
        std::vector<llama_seq_id *> seq_ids(n, &seq_id);
        std::vector<int8_t>         output(n, 1);
        std::iota(positions.begin(), positions.end(), pos);

        llama_batch batch = {};
        batch.n_tokens = n;
        batch.token    = token.data();
        batch.pos      = positions.data();
        batch.n_seq_id = n_seq_id.data();
        batch.seq_id   = seq_ids.data();
        batch.logits   = output.data();

        const int status = llama_decode(ctx, batch);
        if (status == 0 && rows) {
            const float * logits = llama_get_logits(ctx);
            rows->insert(rows->end(), logits, logits + n*plan.model->n_vocab);
        }
        return status;
    }

    uint32_t n_tokens() const { return llama_memory_seq_pos_max(mem, 0) + 1; }

    llama_razor_seq_stats seq() const {
        llama_razor_seq_stats res = {};
        res.size = sizeof(res);
        EXPECT(llama_razor_get_seq(ctx, 0, &res), "no statistics of the sequence");
        return res;
    }

    std::vector<uint8_t> save(bool whole) const {
        std::vector<uint8_t> res(whole ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, 0));
        const size_t n = whole ? llama_state_get_data(ctx, res.data(), res.size()) :
            llama_state_seq_get_data(ctx, res.data(), res.size(), 0);
        EXPECT(n == res.size() && n > 0, "a state of %zu bytes has %zu", res.size(), n);
        return res;
    }

    bool load(const std::vector<uint8_t> & state, bool whole) {
        // a copy of exactly its size, so that AddressSanitizer sees what is read behind it
        const std::vector<uint8_t> data(state);
        return (whole ? llama_state_set_data(ctx, data.data(), data.size()) :
            llama_state_seq_set_data(ctx, data.data(), data.size(), 0)) != 0;
    }
};

static void check_stats(const plan_info & plan, const context & ctx) {
    llama_razor_stats stats = {};
    stats.size = sizeof(stats);
    EXPECT(llama_razor_get_stats(ctx.ctx, &stats), "no statistics");
    EXPECT((bool) stats.active == plan.active(), "%" PRIu64 " of %" PRIu64 " bytes", plan.bytes(false), plan.bytes(true));
    EXPECT(stats.n_ctx == plan.n_ctx, "%u", stats.n_ctx);
    if (!stats.active) {
        return;
    }

    EXPECT(stats.window == plan.length() && stats.block == plan.block() && stats.cells == plan.cells() &&
            stats.sink_tokens == plan.sink_tokens && (bool) stats.compensation == plan.compensation,
            "window %u block %u cells %u", stats.window, stats.block, stats.cells);
    EXPECT(stats.kv_bytes == plan.bytes(false), "%" PRIu64 " bytes, expected %" PRIu64, stats.kv_bytes, plan.bytes(false));
    EXPECT(stats.kv_bytes == stats.kv_bytes_retrieval + stats.kv_bytes_local, "%" PRIu64 " bytes", stats.kv_bytes);

    uint64_t layers = 0, buffers = 0;
    for (uint32_t il = 0; il < stats.n_layer; ++il) {
        llama_razor_layer_stats layer = {};
        layer.size = sizeof(layer);
        EXPECT(llama_razor_get_layer(ctx.ctx, il, &layer), "layer %u", il);
        EXPECT(layer.n_head_kv == plan.model->n_head_kv[il], "layer %u has %u KV heads", il, layer.n_head_kv);
        layers += layer.bytes_k + layer.bytes_v + layer.bytes_sums;
    }
    for (uint32_t i = 0; i < stats.n_buffers; ++i) {
        llama_razor_buffer_stats buffer = {};
        buffer.size = sizeof(buffer);
        EXPECT(llama_razor_get_buffer(ctx.ctx, i, &buffer), "buffer %u", i);
        buffers += buffer.bytes;
    }
    EXPECT(layers == stats.kv_bytes && buffers == stats.kv_bytes, "layers %" PRIu64 " buffers %" PRIu64, layers, buffers);
}

//
// operations
//

class machine {
public:
    machine(FuzzedDataProvider & fdp, const plan_info & plan) : fdp(fdp), plan(plan), n_vocab(plan.model->n_vocab), ctx(new context(plan)) {}

    void run() {
        check_stats(plan, *ctx);
        if (!plan.active()) {
            return;
        }

        // most of what can go wrong comes after the first folds
        decode(token_kind::right, fdp.PickValueInArray({ 0, 0, 60, 130, 200, 320, 500 }), 512);

        for (int i = 0; i < 40 && fdp.remaining_bytes() > 0 && n_decoded < 3*plan.n_ctx; ++i) {
            step();
            check();
        }

        fresh();
    }

private:
    enum class token_kind { right, wrong };

    FuzzedDataProvider & fdp;
    const plan_info    & plan;
    const uint32_t       n_vocab;

    std::unique_ptr<context> ctx;
    std::unique_ptr<context> spare;  // states are loaded into it
    std::unique_ptr<context> oracle; // evaluates the right tokens in order

    std::vector<float> want; // logits of the right tokens, as far as they were needed

    std::vector<llama_token> tokens; // in the cache

    uint32_t n_high     = 0;     // end of the highest position since the last clear
    bool     must_clear = false; // nothing can be decoded
    size_t   n_decoded  = 0;

    struct saved_state {
        bool                     whole;
        std::vector<uint8_t>     data;
        std::vector<llama_token> tokens;
        uint32_t                 n_high;
    };

    std::vector<saved_state> saved;

    // the right token of a position; all others are wrong
    llama_token right(uint32_t pos) const { return (pos*2654435761u >> 13) % n_vocab; }

    uint32_t number(uint32_t min, uint32_t max) { return fdp.ConsumeIntegralInRange<uint32_t>(min, max); }

    context & get_spare() {
        if (!spare) {
            spare = std::make_unique<context>(plan);
        }
        return *spare;
    }

    void compare(const float * got, const float * expected, size_t n, const char * what) {
        float diff = 0;
        for (size_t i = 0; i < n; ++i) {
            const float d = fabsf(got[i] - expected[i]);
            diff = d > diff || std::isnan(d) ? d : diff;
        }
        if (verbose && diff > plan.kind->seen) {
            fprintf(stderr, "\n%s: difference %g\n", plan.kind->name, diff);
            plan.kind->seen = diff;
        }
        EXPECT(diff <= plan.kind->tolerance, "%s, %s: logits differ by %g", what, plan.kind->name, diff);
    }

    // rows [from, to) of the right tokens, evaluated in order
    const float * oracle_rows(uint32_t from, uint32_t to) {
        if (!oracle) {
            oracle = std::make_unique<context>(plan);
        }
        const uint32_t n = want.size()/n_vocab;
        if (to > n) {
            std::vector<llama_token> more;
            for (uint32_t pos = n; pos < to; ++pos) {
                more.push_back(right(pos));
            }
            EXPECT(oracle->decode(more.data(), more.size(), n, &want) == 0, "the oracle fails");
        }
        return want.data() + (size_t) from*n_vocab;
    }

    std::vector<llama_token> draw(token_kind kind, uint32_t n) {
        const uint32_t n_past = tokens.size();
        std::vector<llama_token> res;
        for (uint32_t i = 0; i < std::min(n, plan.n_ctx - n_past); ++i) {
            res.push_back((right(n_past + i) + (kind == token_kind::wrong ? 1 + i % 7 : 0)) % n_vocab);
        }
        n_decoded += res.size();
        return res;
    }

    bool all_right() const {
        for (uint32_t i = 0; i < tokens.size(); ++i) {
            if (tokens[i] != right(i)) {
                return false;
            }
        }
        return true;
    }

    void decode(token_kind kind, uint32_t n, uint32_t split) {
        const auto more = draw(kind, n);
        if (more.empty()) {
            return;
        }
        log_op("decode %zu %s by %u; ", more.size(), kind == token_kind::right ? "right" : "wrong", split);

        std::vector<float> rows;
        for (size_t i = 0; i < more.size(); i += split) {
            const size_t n_now = std::min<size_t>(split, more.size() - i);
            const int status = ctx->decode(more.data() + i, n_now, tokens.size(), &rows);
            if (must_clear || ctx->tainted) {
                EXPECT(status != 0 || !must_clear, "decoded what had to be cleared");
                if (status != 0) {
                    follow();
                    return;
                }
            }
            EXPECT(status == 0, "status %d at %zu", status, tokens.size());
            tokens.insert(tokens.end(), more.begin() + i, more.begin() + i + n_now);
        }
        n_high = std::max<uint32_t>(n_high, tokens.size());

        if (!ctx->tainted && all_right()) {
            const uint32_t from = tokens.size() - more.size();
            compare(rows.data(), oracle_rows(from, tokens.size()), rows.size(), "decoded after other operations");
        }
    }

    // what a damaged state or a failed decode left
    void follow() {
        tokens.resize(ctx->n_tokens());
        if (tokens.empty()) {
            emptied();
        }
    }

    void emptied() {
        tokens.clear();
        n_high     = 0;
        must_clear = false;
    }

    // the tokens in the cache and one more, in a fresh context
    void fresh() {
        if (must_clear || ctx->tainted || tokens.size() >= plan.n_ctx) {
            return;
        }
        log_op("fresh; ");

        const auto probe = draw(token_kind::wrong, 1);
        std::vector<float> got, expected;

        EXPECT(ctx->decode(probe.data(), 1, tokens.size(), &got) == 0, "one token more");
        tokens.push_back(probe[0]);
        n_high = std::max<uint32_t>(n_high, tokens.size());

        n_decoded += tokens.size();

        context clean(plan);
        EXPECT(clean.decode(tokens.data(), tokens.size(), 0, &expected) == 0, "a fresh context fails");
        compare(got.data(), &expected[expected.size() - n_vocab], n_vocab, "a fresh context");
    }

    void remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
        const int64_t n = tokens.size();
        log_op("seq_rm(%d, %d, %d) of %d; ", seq_id, p0, p1, (int) n);

        const int64_t from = std::max<int64_t>(p0, 0);
        const int64_t to   = p1 < 0 ? INT32_MAX : p1;
        const bool    tail = from < n && to >= n && seq_id <= 0;

        const uint32_t n_rollback = ctx->seq().n_rollback;
        const bool     ok         = llama_memory_seq_rm(ctx->mem, seq_id, p0, p1);

        if (tail && (n - from <= n_rollback || from == 0)) {
            EXPECT(ok, "%" PRIi64 " tokens removed, n_rollback is %u", n - from, n_rollback);
        }
        if (tail && !ctx->tainted && from + (int64_t) std::min<uint32_t>(LLAMA_RAZOR_SLACK, plan.block()) >= n_high) {
            EXPECT(ok, "removing %" PRIi64 " tokens is refused, highest was %u", n - from, n_high);
        }
        if (seq_id <= 0 && from < to && from < n && to < n) {
            EXPECT(!ok, "tokens in the middle cannot be removed");
        }
        if (ok && tail) {
            tokens.resize(from);
            if (from == 0) {
                emptied();
            }
        }
    }

    void load(const saved_state & state, bool other) {
        log_op("load %s %zu%s; ", state.whole ? "whole" : "seq", state.tokens.size(), other ? " elsewhere" : "");
        if (other) {
            get_spare();
            std::swap(ctx, spare);
        }
        EXPECT(ctx->load(state.data, state.whole), "a state that was saved is refused");
        if (state.whole) {
            ctx->tainted = false;
        }
        tokens     = state.tokens;
        n_high     = state.n_high;
        must_clear = false;
    }

    void load_damaged() {
        auto state = saved[number(0, saved.size() - 1)];
        auto & data = state.data;

        // a whole state begins with a string that upstream reads before the cache, allocating whatever length it claims
        uint32_t first = 0;
        if (state.whole) {
            memcpy(&first, data.data(), sizeof(first));
            first += sizeof(first);
        }

        if (fdp.ConsumeBool()) {
            data.resize(number(first, data.size() - 1));
        } else {
            const size_t n_near = fdp.ConsumeBool() ? std::min<size_t>(data.size(), 150) : data.size();
            for (uint32_t n = number(1, 4); n > 0; --n) {
                const size_t at = number(first, n_near - 1);
                if (fdp.ConsumeBool()) {
                    data[at] ^= 1u << number(0, 7);
                } else {
                    data[at] = number(0, 255);
                }
            }
        }

        log_op("load damaged %s %zu; ", state.whole ? "whole" : "seq", data.size());

        if (ctx->load(data, state.whole)) {
            ctx->tainted = true;
            must_clear   = false;
            n_high       = plan.n_ctx;
            follow();
            return;
        }
        if (ctx->n_tokens() == 0) {
            emptied();
        } else {
            EXPECT(ctx->n_tokens() == tokens.size(), "%u tokens after a refused state, %zu before", ctx->n_tokens(), tokens.size());
        }
    }

    // the same operation with the context and with one that a state of it was loaded into: the same bits
    void save_and_continue() {
        if (must_clear || ctx->tainted || get_spare().tainted) {
            return;
        }
        const auto more = draw(token_kind::right, number(1, 70));
        const bool whole = fdp.ConsumeBool();
        if (more.empty()) {
            return;
        }
        log_op("save %s, continue %zu; ", whole ? "whole" : "seq", more.size());

        const auto state = ctx->save(whole);
        std::vector<float> first, second;

        EXPECT(get_spare().load(state, whole), "a state that was saved is refused");
        EXPECT(ctx->decode(more.data(), more.size(), tokens.size(), &first) == 0, "decode");
        EXPECT(spare->decode(more.data(), more.size(), tokens.size(), &second) == 0, "decode after load");
        EXPECT(first.size() == second.size() && memcmp(first.data(), second.data(), first.size()*sizeof(float)) == 0,
                "a loaded state goes on otherwise");
        EXPECT(ctx->seq().n_rollback == spare->seq().n_rollback, "rollback");

        tokens.insert(tokens.end(), more.begin(), more.end());
        n_high = std::max<uint32_t>(n_high, tokens.size());
    }

    // the next token is the first of a block, or almost
    void to_edge() {
        const uint32_t n = tokens.size() + number(0, 3);
        decode(token_kind::right, plan.block() - n % plan.block(), 64);
    }

    void abort_decode() {
        const auto more = draw(token_kind::right, number(1, 200));
        if (more.empty() || must_clear) {
            return;
        }
        const uint32_t n_before = tokens.size();

        // an ubatch has about a hundred nodes
        ctx->n_nodes = number(0, fdp.ConsumeBool() ? 100 : 500);
        log_op("abort %zu after %d nodes", more.size(), (int) ctx->n_nodes);
        const int status = ctx->decode(more.data(), more.size(), n_before, nullptr);
        ctx->n_nodes = -1;

        const uint32_t n_after = ctx->n_tokens();
        log_op(" = %d, %u tokens; ", status, n_after);
        if (ctx->tainted) {
            follow();
            return;
        }
        EXPECT(status == 0 || status == 2, "status %d", status);
        EXPECT(status != 0 || n_after == n_before + more.size(), "%u tokens", n_after);
        if (n_after == 0) {
            emptied();
            return;
        }
        EXPECT(n_after >= n_before && n_after <= n_before + more.size(), "%u tokens, %u before", n_after, n_before);
        tokens.insert(tokens.end(), more.begin(), more.begin() + (n_after - n_before));
        n_high = std::max<uint32_t>(n_high, n_before + more.size());
    }

    void refused_decode() {
        const std::vector<llama_token> some(plan.n_ctx + 1, 1);
        const uint32_t n = tokens.size();
        if (ctx->tainted || must_clear) {
            return;
        }
        log_op("refused; ");
        EXPECT(!llama_memory_can_shift(ctx->mem), "positions cannot be shifted");
        EXPECT(ctx->decode(some.data(), 3, n + number(1, 500), nullptr) != 0, "a gap is accepted");
        EXPECT(n == 0 || ctx->decode(some.data(), 3, number(0, n - 1), nullptr) != 0, "a position is accepted twice");
        EXPECT(ctx->decode(some.data(), 3, n, nullptr, 1) != 0, "another sequence is accepted");
        if (n > 0) {
            EXPECT(ctx->decode(some.data(), plan.n_ctx - n + 1, n, nullptr) != 0, "too many tokens are accepted");
        }
    }

    // values in and out of range, which the next context must not see
    void other_override() {
        llama_razor_params params = {};
        params.size           = fdp.ConsumeBool() ? sizeof(params) : number(0, 64);
        params.enabled        = number(0, 2);
        params.sink_tokens    = number(0, 5000);
        params.window         = fdp.ConsumeIntegral<uint32_t>();
        params.window_min     = fdp.ConsumeIntegral<uint32_t>();
        params.window_divisor = fdp.ConsumeIntegral<uint32_t>();
        params.compensation   = number(0, 2);
        const auto mask = fdp.ConsumeBytes<uint8_t>(number(0, 20));
        params.n_retrieval    = mask.size();
        params.retrieval      = mask.empty() || fdp.ConsumeIntegralInRange<int>(0, 9) == 0 ? nullptr : mask.data();
        std::vector<uint32_t> scope;
        for (const uint8_t x : mask) {
            scope.push_back(x == 1 && number(0, 9) > 0 ? 0 : number(0, 5000));
        }
        params.scope          = fdp.ConsumeBool() ? scope.data() : nullptr;

        const auto fits = [&](size_t i) { return (scope[i] == 0) == (mask[i] == 1); };

        const uint32_t max_window = 1u << 30;
        const bool valid = params.size == sizeof(params) && (params.enabled == 0 || (params.sink_tokens <= 4096 &&
            params.window <= max_window && params.window_min <= max_window && (params.window_min > 0 || params.window > 0) &&
            params.window_divisor <= max_window && params.compensation <= 1 && (mask.empty() || (params.retrieval &&
            std::all_of(mask.begin(), mask.end(), [](uint8_t x) { return x <= 1; })))));
        bool scopes_fit = true;
        for (size_t i = 0; params.scope && i < scope.size(); ++i) {
            scopes_fit = scopes_fit && fits(i);
        }

        log_op("override; ");
        const bool ok = llama_razor_set_override(&params);
        EXPECT(ok == (valid && (scopes_fit || params.enabled == 0)), "%s", ok ? "accepted" : "refused");
        EXPECT(ok == (*llama_razor_last_error() == 0), "%s", llama_razor_last_error());
        llama_razor_set_override(nullptr);
    }

    void step() {
        switch (number(0, 17)) {
            case 0: case 1: case 2:
                decode(token_kind::right, number(1, 130), fdp.PickValueInArray({ 1, 5, 64, 512 }));
                break;
            case 3:
                decode(token_kind::wrong, number(1, 130), fdp.PickValueInArray({ 1, 13, 64, 512 }));
                break;
            case 4: case 5: // a draft is taken back
                decode(token_kind::wrong, number(1, 64), 512);
                remove(0, std::max<int>(0, (int) tokens.size() - (int) number(1, 64)), -1);
                break;
            case 6: // back to the last right token
                {
                    uint32_t n = 0;
                    while (n < tokens.size() && tokens[n] == right(n)) {
                        ++n;
                    }
                    remove(fdp.PickValueInArray({ 0, -1 }), n, -1);
                }
                break;
            case 7:
                remove(number(0, 2) - 1, (int) number(0, 1100) - 1, (int) number(0, 1100) - 1);
                break;
            case 8:
                {
                    const bool data = fdp.ConsumeBool();
                    log_op("clear(%d); ", data);
                    llama_memory_clear(ctx->mem, data);
                    emptied();
                    if (data) {
                        ctx->tainted = false;
                    }
                }
                break;
            case 9:
                if (!ctx->tainted && saved.size() < 4) {
                    const bool whole = fdp.ConsumeBool();
                    log_op("save; ");
                    saved.push_back({ whole, ctx->save(whole), tokens, n_high });
                }
                break;
            case 10:
                if (!saved.empty()) {
                    load(saved[number(0, saved.size() - 1)], fdp.ConsumeBool());
                }
                break;
            case 11:
                if (!saved.empty()) {
                    load_damaged();
                }
                break;
            case 12:
                if (fdp.ConsumeBool()) {
                    to_edge();
                }
                abort_decode();
                break;
            case 13:
                save_and_continue();
                break;
            case 14:
                switch (number(0, 7)) {
                    case 0: {
                        const int32_t shift = (int) number(0, 20) - 10;
                        log_op("seq_add %d; ", shift);
                        llama_memory_seq_add(ctx->mem, 0, number(0, 100), -1, shift);
                        must_clear = must_clear || (shift != 0 && !tokens.empty());
                        break;
                    }
                    case 1: {
                        const int d = number(1, 3);
                        log_op("seq_div %d; ", d);
                        llama_memory_seq_div(ctx->mem, 0, 0, -1, d);
                        must_clear = must_clear || (d != 1 && !tokens.empty());
                        break;
                    }
                    case 2:
                        log_op("seq_cp; ");
                        llama_memory_seq_cp(ctx->mem, 0, number(0, 1), -1, -1);
                        break;
                    case 3: {
                        const llama_seq_id seq_id = number(0, 1);
                        log_op("seq_keep %d; ", seq_id);
                        llama_memory_seq_keep(ctx->mem, seq_id);
                        if (seq_id != 0) {
                            emptied();
                        }
                        break;
                    }
                    case 4: other_override();  break;
                    default: refused_decode(); break;
                }
                break;
            case 15:
                fresh();
                break;
            case 16: // as far back as it goes, and again after a few tokens
                for (uint32_t n = number(1, 2); n > 0; --n) {
                    remove(0, tokens.size() - ctx->seq().n_rollback, -1);
                    decode(token_kind::right, number(0, 3), 512);
                }
                decode(token_kind::right, number(0, 100), 64);
                break;
            case 17:
                to_edge();
                break;
        }
    }

    void check() {
        const auto    seq = ctx->seq();
        const int64_t n   = tokens.size();

        EXPECT(seq.n_tokens == n && llama_memory_seq_pos_max(ctx->mem, 0) == n - 1, "%u tokens, expected %d", seq.n_tokens, (int) n);
        EXPECT(ctx->tainted || llama_memory_seq_pos_min(ctx->mem, 0) == (n == 0 ? -1 : std::max<int64_t>(n - seq.n_rollback, 1) - 1), "first position");
        EXPECT(seq.n_rollback <= n, "n_rollback %u of %d tokens", seq.n_rollback, (int) n);
        EXPECT(seq.n_folded == seq.frontier - plan.sink_tokens && seq.frontier >= plan.sink_tokens, "folded %u", seq.n_folded);
        // the fold of a block comes with its first token
        EXPECT(seq.frontier == plan.frontier(n) || (n > 0 && seq.frontier == plan.frontier(n - 1)), "frontier %u", seq.frontier);
    }
};

// false: such a plan would save nothing, and nothing was done
static bool run(const uint8_t * data, size_t size) {
    trace.clear();

    FuzzedDataProvider fdp(data, size);

    const plan_info plan = random_plan(fdp);
    log_op("%s n_ctx %u n_ubatch %u sinks %u window %u (%u %u) comp %d heads ", plan.kind->name, plan.n_ctx, plan.n_ubatch,
            plan.sink_tokens, plan.window, plan.window_min, plan.window_divisor, plan.compensation);
    for (const uint8_t x : plan.mask) {
        log_op("%u", x);
    }
    log_op(": ");

    machine(fdp, plan).run();

    log_op("\n");

    return plan.active();
}

#ifdef RAZOR_FUZZ_THREADS

int main(int argc, char ** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 100;

    load_models();

    // the models are shared, each thread has its own contexts
    auto work = [n](uint32_t seed) {
        std::mt19937 rng(seed);
        for (int i = 0; i < n;) {
            std::vector<uint8_t> data(60 + rng() % 60);
            for (auto & x : data) {
                x = rng();
            }
            i += run(data.data(), data.size());
        }
    };

    std::thread first(work, 1), second(work, 2);
    first.join();
    second.join();

    for (auto & m : models) {
        llama_model_free(m.model);
    }
    fprintf(stderr, "2 x %d random inputs\n", n);
}

#else

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    load_models();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    run(data, size);
    return 0;
}

#endif
