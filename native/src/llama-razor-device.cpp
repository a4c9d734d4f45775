#include "llama-razor-device.h"

#include "ggml-cpp.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

// never called: these operations are only added for devices that support them
static void razor_device_abort(ggml_tensor * /* dst */, int /* ith */, int /* nth */, void * /* userdata */) {
    GGML_ABORT("razor: an operation of a device was given to the CPU");
}

// args: q, k, v, then the masks or the inputs that replace them
static ggml_tensor * razor_device_new_attn(ggml_context * ctx, std::vector<ggml_tensor *> args, const ggml_razor_attn_params & params, razor_attn * attn) {
    const ggml_tensor * q = args[0];
    const ggml_tensor * v = args[2];

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0]*q->ne[1], q->ne[2], 1, 1, args.data(), args.size(), razor_device_abort, 1, attn);

    ggml_razor_set_params(res, params);

    return res;
}

ggml_tensor * razor_device_build_store(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * k, ggml_tensor * v, ggml_tensor * rows) {
    ggml_tensor * args[5] = { k_cur, v_cur, k, v, rows };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 5, razor_device_abort, 1, nullptr);

    ggml_razor_set_params(res, ggml_razor_store_params { GGML_RAZOR_STORE_MAGIC });

    return res;
}

ggml_tensor * razor_device_build_fold(ggml_context * ctx, const razor_fold & fold) {
    ggml_tensor * args[9] = {
        fold.k, fold.v, fold.k_sum, fold.v_sum, fold.rows, fold.src, fold.dst, fold.cells, fold.inverse,
    };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 9, razor_device_abort, 1, nullptr);

    ggml_razor_fold_params params = {};

    params.magic   = GGML_RAZOR_FOLD_MAGIC;
    params.n_local = fold.n_local;
    params.cells   = fold.head_rows;
    params.first   = fold.first_row;

    ggml_razor_set_params(res, params);

    return res;
}

static ggml_razor_attn_params razor_device_attn_params(const razor_attn & attn, uint32_t magic, uint32_t stream) {
    ggml_razor_attn_params params = {};

    params.magic  = magic;
    params.scale  = attn.scale;
    params.n_ctx  = attn.groups[0].head_rows;
    params.cells  = attn.groups[1].head_rows;
    params.stream = stream;

    params.n_head_kv = attn.groups[0].heads->size() + attn.groups[1].heads->size();
    for (const uint32_t h : *attn.groups[0].heads) {
        params.retrieval |= 1ull << h;
    }

    return params;
}

ggml_tensor * razor_device_build_attn(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream) {
    return razor_device_new_attn(ctx, { q, k, v, attn.groups[0].mask, attn.groups[1].mask },
            razor_device_attn_params(attn, GGML_RAZOR_ATTN_MAGIC, stream), &attn);
}

ggml_tensor * razor_device_build_attn_batch(ggml_context * ctx, razor_attn & attn, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, uint32_t stream, const razor_batch & batch) {
    return razor_device_new_attn(ctx, { q, k, v, batch.since[0], batch.since[1], batch.bias, batch.tiles },
            razor_device_attn_params(attn, GGML_RAZOR_BATCH_MAGIC, stream), &attn);
}

razor_device_choice razor_device_choose() {
    const char * env = getenv(GGML_RAZOR_DEVICE_ENV);

    const std::string wanted = env ? env : "";
    if (wanted.empty() || wanted == "on" || wanted == "ampere") {
        return RAZOR_DEVICE_ON;
    }
    if (wanted == "token") {
        return RAZOR_DEVICE_TOKEN;
    }
    if (wanted == "off") {
        return RAZOR_DEVICE_OFF;
    }

    throw std::runtime_error(GGML_RAZOR_DEVICE_ENV " is '" + wanted.substr(0, 32) + "', expected one of: on, ampere, token, off; correct or unset it");
}

// return a context for the metadata of up to 8 tensors
static ggml_context_ptr razor_device_new_ctx() {
    ggml_init_params init = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    return ggml_context_ptr(ggml_init(init));
}

// return true if the device supports the operation; the parameters of op are lost
static bool razor_device_knows(ggml_backend_dev_t dev, ggml_tensor * op) {
    const bool known = ggml_backend_dev_supports_op(dev, op);

    ggml_razor_set_params(op, uint32_t(0));

    return known && !ggml_backend_dev_supports_op(dev, op); // the CPU accepts every custom operation
}

bool razor_device_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv) {
    if (!dev || n_head_kv > GGML_RAZOR_ATTN_MAX_KV) {
        return false;
    }

    ggml_context_ptr ctx_ptr = razor_device_new_ctx();
    ggml_context *   ctx     = ctx_ptr.get();

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, n_head, 1);
    ggml_tensor * k    = ggml_new_tensor_2d(ctx, type_k, d_k, n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_2d(ctx, type_v, d_v, n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 1, 1);
    ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_head_kv);

    ggml_razor_attn_params params = {};

    params.magic     = GGML_RAZOR_ATTN_MAGIC;
    params.n_head_kv = n_head_kv;

    return razor_device_knows(dev, razor_device_new_attn(ctx, { q, k, v, mask, mask }, params, nullptr)) &&
           razor_device_knows(dev, razor_device_build_store(ctx, k, v, k, v, rows));
}

bool razor_device_batch_supported(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv) {
    if (!dev || n_head_kv > GGML_RAZOR_ATTN_MAX_KV) {
        return false;
    }

    ggml_context_ptr ctx_ptr = razor_device_new_ctx();
    ggml_context *   ctx     = ctx_ptr.get();

    ggml_tensor * q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, n_head, 2);
    ggml_tensor * k     = ggml_new_tensor_2d(ctx, type_k, d_k, n_head_kv);
    ggml_tensor * v     = ggml_new_tensor_2d(ctx, type_v, d_v, n_head_kv);
    ggml_tensor * since = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor * bias  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_tensor * tiles = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 2);

    ggml_razor_attn_params params = {};

    params.magic     = GGML_RAZOR_BATCH_MAGIC;
    params.n_ctx     = 1;
    params.cells     = 1;
    params.n_head_kv = n_head_kv;

    return razor_device_knows(dev, razor_device_new_attn(ctx, { q, k, v, since, since, bias, tiles }, params, nullptr));
}
