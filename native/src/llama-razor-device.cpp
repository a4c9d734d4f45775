#include "llama-razor-attn-op.h"

#include "ggml-razor.h"

#include "ggml-cpp.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

// made only for layers on a device that knows the operation
static void razor_no_device(ggml_tensor * /* dst */, int /* ith */, int /* nth */, void * /* userdata */) {
    GGML_ABORT("razor: an operation of a device was given to the CPU");
}

static ggml_tensor * razor_attn_op(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
        ggml_tensor * mask_retrieval, ggml_tensor * mask_local, const ggml_razor_attn_params & params, razor_attn * attn) {
    ggml_tensor * args[5] = { q, k, v, mask_retrieval, mask_local };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0]*q->ne[1], q->ne[2], 1, 1, args, 5, razor_no_device, 1, attn);

    ggml_razor_set_params(res, params);

    return res;
}

ggml_tensor * razor_store_device(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k, ggml_tensor * v, ggml_tensor * rows) {
    ggml_tensor * args[5] = { k_cur, v_cur, k, v, rows };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 5, razor_no_device, 1, nullptr);

    ggml_razor_set_params(res, ggml_razor_store_params { GGML_RAZOR_STORE_MAGIC });

    return res;
}

ggml_tensor * razor_fold_device(ggml_context * ctx, const razor_fold & fold) {
    ggml_tensor * args[9] = {
        fold.k, fold.v, fold.k_sum, fold.v_sum, fold.rows, fold.src, fold.dst, fold.cells, fold.inverse,
    };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 9, razor_no_device, 1, nullptr);

    ggml_razor_fold_params params = {};

    params.magic   = GGML_RAZOR_FOLD_MAGIC;
    params.n_local = fold.n_local;
    params.cells   = fold.head_rows;
    params.first   = fold.first_row;

    ggml_razor_set_params(res, params);

    return res;
}

ggml_tensor * razor_attn::build_device(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream) {
    ggml_razor_attn_params params = {};

    params.magic  = GGML_RAZOR_ATTN_MAGIC;
    params.scale  = scale;
    params.n_ctx  = groups[0].head_rows;
    params.cells  = groups[1].head_rows;
    params.stream = stream;

    params.n_head_kv = groups[0].heads->size() + groups[1].heads->size();
    for (const uint32_t h : *groups[0].heads) {
        params.retrieval |= 1ull << h;
    }

    return razor_attn_op(ctx, q, k, v, groups[0].mask, groups[1].mask, params, this);
}

bool razor_device_wanted() {
    const char * env = getenv(RAZOR_DEVICE_ENV);

    const std::string wanted = env ? env : "";
    if (wanted.empty() || wanted == "on" || wanted == "off") {
        return wanted != "off";
    }

    throw std::runtime_error(RAZOR_DEVICE_ENV " is '" + wanted.substr(0, 32) + "', expected one of: on, off; correct or unset it");
}

bool razor_device_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv) {
    if (!dev || n_head_kv > GGML_RAZOR_ATTN_MAX_KV) {
        return false;
    }

    ggml_init_params init = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx_ptr(ggml_init(init));
    ggml_context *   ctx = ctx_ptr.get();

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, n_head, 1);
    ggml_tensor * k    = ggml_new_tensor_2d(ctx, type_k, d_k, n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_2d(ctx, type_v, d_v, n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 1, 1);
    ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_head_kv);

    ggml_razor_attn_params params = {};

    params.magic     = GGML_RAZOR_ATTN_MAGIC;
    params.n_head_kv = n_head_kv;

    ggml_tensor * attn  = razor_attn_op(ctx, q, k, v, mask, mask, params, nullptr);
    ggml_tensor * store = razor_store_device(ctx, k, v, k, v, rows);

    const bool known = ggml_backend_dev_supports_op(dev, attn) && ggml_backend_dev_supports_op(dev, store);

    ggml_razor_set_params(store, ggml_razor_store_params { 0 });

    return known && !ggml_backend_dev_supports_op(dev, store); // CPUs call any function
}
