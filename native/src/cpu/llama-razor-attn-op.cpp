#include "llama-razor-attn-op.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

// query rows of a task: enough to amortize the conversion of K and V
static constexpr int64_t ROWS = 64;

// cells of a task if there are few query rows, so that there is a task for each thread
static constexpr int64_t CHUNK = 512;

// return the kernels that were compiled and that this CPU supports, best first
static std::vector<std::pair<const char *, razor_attn_kernel>> razor_attn_get_kernels() {
    std::vector<std::pair<const char *, razor_attn_kernel>> res;

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) { // these imply F16C, for which old versions of Clang cannot test
        if (__builtin_cpu_supports("avx512f")) {
            res.emplace_back("avx512", razor_attn_kernel_avx512());
        }
        res.emplace_back("avx2", razor_attn_kernel_avx2());
    }
#endif
    res.emplace_back("neon", razor_attn_kernel_neon());

    res.erase(std::remove_if(res.begin(), res.end(), [](const auto & x) { return !x.second; }), res.end());

    return res;
}

razor_attn_kernel razor_attn_choose_kernel() {
    const char * env = getenv(RAZOR_ATTN_ENV);

    const std::string wanted  = env ? env : "";
    const auto        kernels = razor_attn_get_kernels();

    std::string names = "off";
    for (const auto & [name, kernel] : kernels) {
        if (wanted.empty() || wanted == name) {
            return kernel;
        }
        names += std::string(", ") + name;
    }
    if (wanted.empty() || wanted == "off") {
        return nullptr;
    }

    throw std::runtime_error(RAZOR_ATTN_ENV " is '" + wanted.substr(0, 32) + "', expected one of: " + names + "; correct or unset it");
}

static bool razor_attn_get_rows(ggml_type type, razor_attn_rows & rows) {
    rows.to_float = nullptr;

    switch (type) {
        case GGML_TYPE_F32:  rows.format = RAZOR_ROWS_F32;  return true;
        case GGML_TYPE_F16:  rows.format = RAZOR_ROWS_F16;  return true;
        case GGML_TYPE_BF16: rows.format = RAZOR_ROWS_BF16; return true;
        case GGML_TYPE_Q8_0: rows.format = RAZOR_ROWS_Q8_0; return true;
        case GGML_TYPE_Q4_0: rows.format = RAZOR_ROWS_Q4_0; return true;
        default: break;
    }

    rows.format   = RAZOR_ROWS_FUNC;
    rows.to_float = ggml_get_type_traits(type)->to_float;

    return rows.to_float != nullptr;
}

bool razor_attn_supported(ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v) {
    razor_attn_rows rows;

    return d_k % 16 == 0 && d_v % 16 == 0 && razor_attn_get_rows(type_k, rows) && razor_attn_get_rows(type_v, rows);
}

// same as ggml_soft_max_ext()
std::vector<float> razor_attn_slopes(int64_t n_head, float max_bias) {
    if (max_bias <= 0.0f) {
        return {};
    }

    int64_t n = 1; // largest power of two up to n_head
    while (2*n <= n_head) {
        n *= 2;
    }

    const float m0 = powf(2.0f, -max_bias/n);
    const float m1 = powf(2.0f, -max_bias/2.0f/n);

    std::vector<float> res(n_head);
    for (int64_t h = 0; h < n_head; ++h) {
        res[h] = h < n ? powf(m0, h + 1) : powf(m1, 2*(h - n) + 1);
    }

    return res;
}

// threads take tasks in turn, the last one to leave resets the counters for the next run of the graph
int64_t razor_attn::next_task() {
    const int64_t res = next.fetch_add(1, std::memory_order_relaxed);

    return res < n_tasks ? res : -1;
}

void razor_attn::leave(int n_threads) {
    if (done.fetch_add(1, std::memory_order_acq_rel) == n_threads - 1) {
        next.store(0, std::memory_order_relaxed);
        done.store(0, std::memory_order_release);
    }
}

static float * razor_attn_get_scratch(size_t n) {
    static thread_local std::vector<float> memory;

    if (memory.size() < n + 16) {
        memory.resize(n + 16);
    }

    return (float *) (((uintptr_t) memory.data() + 63)/64*64);
}

static void razor_attn_compute(ggml_tensor * dst, int /* ith */, int nth, void * userdata) {
    auto & op = *(razor_attn *) userdata;

    const ggml_tensor * q = dst->src[0];

    // 1. what all tasks have in common
    razor_attn_task task = {};

    task.n_gqa = op.n_gqa;
    task.d_k   = op.d_k;
    task.d_v   = op.d_v;
    task.scale = op.scale;
    task.cap   = op.cap;

    // with partial results, razor_attn_reduce() adds them
    const float * sinks = op.sinks && op.n_chunks == 1 ? (const float *) dst->src[op.src_sinks]->data : nullptr;

    task.q_token = q->nb[2]/sizeof(float);
    task.q_head  = q->nb[1]/sizeof(float);

    task.chunk     = CHUNK;
    task.partial   = op.n_chunks > 1;
    task.out_head  = task.partial ? op.n_chunks*op.partial_size() : op.d_v;
    task.out_token = task.out_head*op.n_head;

    // 2. a task is one KV head, some tokens and some cells
    for (int64_t i = op.next_task(); i >= 0; i = op.next_task()) {
        int64_t rest = i;

        size_t i_group = 0;
        while (rest >= op.groups[i_group].n_tasks) {
            rest -= op.groups[i_group++].n_tasks;
        }

        const auto & group = op.groups[i_group];

        // which chunk, which block of tokens, which KV head of the group; rows of heads that lie together are read together
        int64_t chunk, block, j;
        if (op.by_token && group.n_chunks > 1) {
            const int64_t n_heads = group.heads->size();
            j     = rest % n_heads;
            chunk = rest / n_heads;
            block = 0;
        } else {
            chunk = rest % group.n_chunks;
            rest /= group.n_chunks;
            block = rest % op.n_blocks;
            j     = rest / op.n_blocks;
        }

        const int64_t token = block*op.block_tokens;
        const int64_t row   = op.by_token ? j : group.first_row + j*group.head_rows;
        const int64_t head  = (*group.heads)[j]*op.n_gqa;

        const ggml_tensor * k    = dst->src[i_group > 0 ? op.src_local     : 1];
        const ggml_tensor * v    = dst->src[i_group > 0 ? op.src_local + 1 : 2];
        const ggml_tensor * mask = dst->src[group.src_mask];

        razor_attn_get_rows(k->type, task.k);
        razor_attn_get_rows(v->type, task.v);
        task.k.row_bytes = k->nb[op.by_token ? 2 : 1];
        task.v.row_bytes = v->nb[op.by_token ? 2 : 1];
        task.k.n_bytes   = ggml_row_size(k->type, op.d_k);
        task.v.n_bytes   = ggml_row_size(v->type, op.d_v);

        task.n_tokens = std::min(op.block_tokens, op.n_tokens - token);

        task.q      = (const float *) ((const char *) q->data + token*q->nb[2] + head*q->nb[1]);
        task.k.data = (const char *) k->data + row*k->nb[1];
        task.v.data = (const char *) v->data + row*v->nb[1];

        task.mask       = (const uint16_t *) ((const char *) mask->data + token*mask->nb[1]);
        task.mask_token = mask->nb[1]/sizeof(uint16_t);

        task.cell0 = chunk*op.chunk;
        task.cell1 = std::min(task.cell0 + op.chunk, group.n_kv);

        task.sinks  = sinks ? sinks + head : nullptr;
        task.slopes = op.slopes.empty() ? nullptr : op.slopes.data() + head;

        task.out = (float *) dst->data + token*task.out_token + head*task.out_head + chunk*op.partial_size();

        op.kernel(task, razor_attn_get_scratch(razor_attn_scratch(task)));
    }

    op.leave(nth);
}

// combine the partial results of each query head
static void razor_attn_reduce(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & op = *(const razor_attn *) userdata;

    const float * parts = (const float *) dst->src[0]->data;
    const float * sinks = op.sinks ? (const float *) dst->src[1]->data : nullptr;

    razor_attn_task task = {};

    task.d_v = op.d_v;

    for (int64_t i = ith; i < op.n_tokens*op.n_head; i += nth) {
        task.parts   = parts + i*op.n_chunks*op.partial_size();
        task.n_parts = op.head_chunks[i % op.n_head];
        task.sinks   = sinks ? sinks + i % op.n_head : nullptr;
        task.out     = (float *) dst->data + i*op.d_v;

        op.kernel(task, nullptr);
    }
}

ggml_tensor * razor_attn::build(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float));
    GGML_ASSERT(q->nb[1] % sizeof(float) == 0 && q->nb[2] % sizeof(float) == 0);

    // 1. split tokens and cells into tasks
    d_k      = q->ne[0];
    d_v      = v->ne[0];
    n_head   = q->ne[1];
    n_tokens = q->ne[2];

    block_tokens = std::max<int64_t>(1, ROWS/n_gqa);
    n_blocks     = (n_tokens + block_tokens - 1)/block_tokens;

    chunk = n_blocks == 1 ? CHUNK : INT64_MAX/2;

    head_chunks.assign(n_head, 0);

    ggml_tensor * args[GGML_MAX_SRC] = { q, k, v };
    int n_args = 3;

    if (k_local) {
        GGML_ASSERT(k_local->ne[0] == d_k && v_local->ne[0] == d_v);

        src_local = n_args;

        args[n_args++] = k_local;
        args[n_args++] = v_local;
    }

    for (auto & group : groups) {
        group.n_tasks  = 0;
        group.n_chunks = 1;

        if (group.heads->empty()) {
            continue;
        }

        GGML_ASSERT(n_args < GGML_MAX_SRC);

        group.n_kv     = group.mask->ne[0];
        group.n_chunks = (group.n_kv + chunk - 1)/chunk;
        group.n_tasks  = group.heads->size()*n_blocks*group.n_chunks;
        group.src_mask = n_args;

        n_tasks += group.n_tasks;
        n_chunks = std::max(n_chunks, group.n_chunks);

        for (const uint32_t h : *group.heads) {
            std::fill_n(head_chunks.begin() + h*n_gqa, n_gqa, group.n_chunks);
        }

        GGML_ASSERT(group.mask->type == GGML_TYPE_F16);

        args[n_args++] = group.mask;
    }

    // 2. add the operation, and another one to combine partial results
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(sinks) && ggml_nelements(sinks) == n_head);
    }
    GGML_ASSERT(slopes.empty() || (int64_t) slopes.size() == n_head);

    if (sinks && n_chunks == 1) {
        src_sinks = n_args;

        args[n_args++] = sinks;
    }
    if (n_chunks == 1) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, d_v*n_head, n_tokens, 1, 1, args, n_args, razor_attn_compute, GGML_N_TASKS_MAX, this);
    }

    ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, partial_size(), n_chunks, n_head, n_tokens,
            args, n_args, razor_attn_compute, GGML_N_TASKS_MAX, this);

    ggml_tensor * args_reduce[2] = { parts, sinks };

    return ggml_custom_4d(ctx, GGML_TYPE_F32, d_v*n_head, n_tokens, 1, 1, args_reduce, sinks ? 2 : 1, razor_attn_reduce, GGML_N_TASKS_MAX, this);
}
