#include "llama-razor-profile.h"

#include "llama-razor-error.h"
#include "llama-razor.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include "gguf.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

static constexpr uint32_t RAZOR_VERSION         = 1;
static constexpr uint32_t RAZOR_VERSION_SCOPE   = 2; // method "rope" with scopes
static constexpr uint32_t RAZOR_MAX_SINK_TOKENS = 4096;
static constexpr uint32_t RAZOR_MAX_WINDOW      = 1u << 30;

bool llama_razor_is_disabled() {
    const char * env = getenv(LLAMA_RAZOR_DISABLE_ENV);

    return env && strcmp(env, "") != 0 && strcmp(env, "0") != 0;
}

//
// metadata
//

static std::string razor_meta_type_name(const gguf_context * ctx, int64_t id) {
    const gguf_type type = gguf_get_kv_type(ctx, id);

    if (type == GGUF_TYPE_ARRAY) {
        return format("%s[%zu]", gguf_type_name(gguf_get_arr_type(ctx, id)), gguf_get_arr_n(ctx, id));
    }

    return gguf_type_name(type);
}

static int64_t razor_meta_find(const gguf_context * ctx, const char * key, const std::string & expected, bool required) {
    const int64_t id = gguf_find_key(ctx, key);

    if (id < 0 && required) {
        llama_razor_error_throw(format("the model has razor metadata without %s, expected %s; convert the model again", key, expected.c_str()));
    }

    return id;
}

static void razor_meta_check_type(const gguf_context * ctx, int64_t id, const char * key, const std::string & expected) {
    const std::string found = razor_meta_type_name(ctx, id);

    if (found != expected) {
        llama_razor_error_throw(format("%s is %s, expected %s; convert the model again", key, found.c_str(), expected.c_str()));
    }
}

static void razor_check_range(const char * key, uint32_t val, uint32_t min, uint32_t max) {
    if (val < min || val > max) {
        llama_razor_error_throw(format("%s is %u, expected %u to %u", key, val, min, max));
    }
}

static void razor_check_type(const char * key, int32_t type) {
    switch (type) {
        case -1:
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return;
        default:
            llama_razor_error_throw(format("%s is %d, expected the number of a KV cache type or -1", key, type));
    }
}

static uint32_t razor_meta_get_u32(const gguf_context * ctx, const char * key, uint32_t min, uint32_t max) {
    const int64_t id = razor_meta_find(ctx, key, "u32", true);
    razor_meta_check_type(ctx, id, key, "u32");

    const uint32_t val = gguf_get_val_u32(ctx, id);
    razor_check_range(key, val, min, max);

    return val;
}

static void razor_check_mask(const std::vector<uint8_t> & mask) {
    for (size_t i = 0; i < mask.size(); ++i) {
        if (mask[i] > 1) {
            llama_razor_error_throw(format("razor.head.retrieval[%zu] is %u, expected 0 or 1; convert the model again", i, mask[i]));
        }
    }
}

static void razor_check_scope(const std::vector<uint8_t> & mask, const std::vector<uint32_t> & scope) {
    for (size_t i = 0; i < mask.size(); ++i) {
        if (scope[i] > RAZOR_MAX_WINDOW) {
            llama_razor_error_throw(format("razor.head.scope[%zu] is %u, expected 0 to %u; convert the model again", i, scope[i], RAZOR_MAX_WINDOW));
        }
        if ((scope[i] == 0) != (mask[i] == 1)) {
            llama_razor_error_throw(format("razor.head.scope[%zu] is %u and razor.head.retrieval[%zu] is %u, expected a scope of 0 for retrieval heads alone; convert the model again",
                        i, scope[i], i, mask[i]));
        }
    }
}

static void razor_meta_check_scores(const gguf_context * ctx, int64_t id, const char * key) {
    const float * data = (const float *) gguf_get_arr_data(ctx, id);

    for (size_t i = 0; i < gguf_get_arr_n(ctx, id); ++i) {
        if (!std::isfinite(data[i])) {
            llama_razor_error_throw(format("%s[%zu] is %f, expected a finite number; convert the model again", key, i, data[i]));
        }
    }
}

static bool razor_meta_is_head_key(const char * key) {
    for (const char * known : { "retrieval", "echo_score", "induction_score", "scope" }) {
        if (strcmp(key + strlen("razor.head."), known) == 0) {
            return true;
        }
    }

    return false;
}

bool llama_razor_is_full_layer(llm_arch arch, const llama_hparams & hparams, uint32_t il) {
    if (!hparams.has_kv(il) || hparams.is_swa(il)) {
        return false;
    }

    // same as the layer filters in llama_model::create_memory()
    switch (arch) {
        case LLM_ARCH_FALCON_H1:
            return true; // recurrent at the same time
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE:
            return !hparams.is_recr(il) && hparams.n_ff(il) == 0;
        default:
            return !llm_arch_is_hybrid(arch) || !hparams.is_recr(il);
    }
}

uint32_t llama_razor_n_head_kv(llm_arch arch, const llama_hparams & hparams, uint32_t il) {
    return llama_razor_is_full_layer(arch, hparams, il) ? hparams.n_head_kv(il) : 0;
}

size_t llama_razor_n_kv_heads(llm_arch arch, const llama_hparams & hparams) {
    size_t res = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res += llama_razor_n_head_kv(arch, hparams, il);
    }

    return res;
}

static size_t razor_n_heads(llm_arch arch, const llama_hparams & hparams) {
    size_t res = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res += llama_razor_is_full_layer(arch, hparams, il) ? hparams.n_head(il) : 0;
    }

    return res;
}

std::shared_ptr<const llama_razor_profile> llama_razor_profile_load(const gguf_context * ctx, llm_arch arch, const llama_hparams & hparams) {
    llama_razor_error_set("");

    if (llama_razor_is_disabled()) {
        return nullptr;
    }

    // 1. look for razor.* keys
    bool any = false;
    const char * unknown = nullptr;

    for (int64_t id = 0; id < gguf_get_n_kv(ctx); ++id) {
        const char * key = gguf_get_key(ctx, id);

        any = any || strncmp(key, "razor.", 6) == 0;

        if (strncmp(key, "razor.head.", 11) == 0 && !razor_meta_is_head_key(key)) {
            unknown = key;
        }
    }

    if (!any) {
        return nullptr;
    }

    // 2. check the version and the method
    const int64_t id_version = razor_meta_find(ctx, "razor.version", "u32", true);
    razor_meta_check_type(ctx, id_version, "razor.version", "u32");

    const uint32_t version = gguf_get_val_u32(ctx, id_version);
    if (version != RAZOR_VERSION && version != RAZOR_VERSION_SCOPE) {
        llama_razor_error_throw(format("razor.version is %u and this library knows versions %u and %u; update it or convert the model again",
                    version, RAZOR_VERSION, RAZOR_VERSION_SCOPE));
    }

    // an unknown key about heads could change which tokens they keep
    if (unknown) {
        llama_razor_error_throw(format("unknown key %.64s, made by a newer version; update this library or convert the model again", unknown));
    }

    const int64_t id_method = razor_meta_find(ctx, "razor.method", "str", true);
    razor_meta_check_type(ctx, id_method, "razor.method", "str");

    const std::string method = gguf_get_val_str(ctx, id_method);
    if (method != "rope" && method != "alibi") {
        llama_razor_error_throw(format("razor.method is '%.32s', expected 'rope' or 'alibi'", method.c_str()));
    }

    // 3. read the parameters
    auto res = std::make_shared<llama_razor_profile>();

    res->alibi = method == "alibi";

    res->sink_tokens    = razor_meta_get_u32(ctx, "razor.sink_tokens",    0, RAZOR_MAX_SINK_TOKENS);
    res->window_min     = razor_meta_get_u32(ctx, "razor.window_min",     1, RAZOR_MAX_WINDOW);
    res->window_divisor = razor_meta_get_u32(ctx, "razor.window_divisor", 0, RAZOR_MAX_WINDOW);

    const int64_t id_comp = razor_meta_find(ctx, "razor.compensation", "bool", true);
    razor_meta_check_type(ctx, id_comp, "razor.compensation", "bool");
    res->compensation = gguf_get_val_bool(ctx, id_comp);

    // 4. read the mask of retrieval heads
    const size_t n_kv_heads = llama_razor_n_kv_heads(arch, hparams);

    const std::string type_mask = format("u8[%zu]", n_kv_heads);

    const int64_t id_mask = razor_meta_find(ctx, "razor.head.retrieval", type_mask, true);
    razor_meta_check_type(ctx, id_mask, "razor.head.retrieval", type_mask);

    const uint8_t * mask = (const uint8_t *) gguf_get_arr_data(ctx, id_mask);
    res->retrieval.assign(mask, mask + n_kv_heads);
    razor_check_mask(res->retrieval);

    // 5. check the scores: they are not used here, but malformed ones show that the file is damaged
    for (const char * key : { "razor.head.echo_score", "razor.head.induction_score" }) {
        const int64_t id = razor_meta_find(ctx, key, "", false);
        if (id >= 0) {
            razor_meta_check_type(ctx, id, key, format("f32[%zu]", razor_n_heads(arch, hparams)));
            razor_meta_check_scores(ctx, id, key);
        }
    }

    // 6. read the scopes, which version 1 uses only with method "alibi"
    const bool use_scope = version == RAZOR_VERSION_SCOPE || res->alibi;

    const std::string type_scope = format("u32[%zu]", n_kv_heads);

    const int64_t id_scope = razor_meta_find(ctx, "razor.head.scope", type_scope, use_scope);
    if (id_scope >= 0) {
        razor_meta_check_type(ctx, id_scope, "razor.head.scope", type_scope);
    }

    if (use_scope) {
        const uint32_t * scope = (const uint32_t *) gguf_get_arr_data(ctx, id_scope);
        res->scope.assign(scope, scope + n_kv_heads);
        razor_check_scope(res->retrieval, res->scope);
    }

    return res;
}

//
// override
//

static thread_local std::unique_ptr<const llama_razor_profile> razor_override;

bool llama_razor_set_override(const llama_razor_params * params) {
    llama_razor_error_set("");

    if (!params) {
        razor_override.reset();

        return true;
    }

    try {
        if (params->size != sizeof(llama_razor_params)) {
            llama_razor_error_throw(format("llama_razor_params has %u bytes, expected %zu: header and library do not match", params->size, sizeof(llama_razor_params)));
        }

        auto res = std::make_unique<llama_razor_profile>();

        res->enabled       = params->enabled != 0;
        res->own_attention = params->own_attention != 0;

        if (res->enabled) {
            razor_check_range("sink_tokens",    params->sink_tokens,    0, RAZOR_MAX_SINK_TOKENS);
            razor_check_range("window",         params->window,         0, RAZOR_MAX_WINDOW);
            razor_check_range("window_min",     params->window_min,     params->window > 0 ? 0 : 1, RAZOR_MAX_WINDOW);
            razor_check_range("window_divisor", params->window_divisor, 0, RAZOR_MAX_WINDOW);
            razor_check_range("compensation",   params->compensation,   0, 1);
            razor_check_range("n_retrieval",    params->n_retrieval,    0, LLAMA_MAX_LAYERS*4096u);

            res->sink_tokens    = params->sink_tokens;
            res->window         = params->window;
            res->window_min     = params->window_min;
            res->window_divisor = params->window_divisor;
            res->compensation   = params->compensation != 0;

            razor_check_type("type_k_local", params->type_k_local);
            razor_check_type("type_v_local", params->type_v_local);

            res->type_k_local = params->type_k_local;
            res->type_v_local = params->type_v_local;

            razor_check_range("rewind", params->rewind, RAZOR_REWIND_OFF, RAZOR_REWIND_FILE);

            if (params->rewind == RAZOR_REWIND_FILE && !params->rewind_folder) {
                llama_razor_error_throw("rewind_folder is NULL, name the folder of the rewind log's file");
            }

            res->rewind.mode   = (llama_razor_rewind_mode) params->rewind;
            res->rewind.limit  = params->rewind_limit;
            res->rewind.folder = params->rewind_folder ? params->rewind_folder : "";

            if (params->n_retrieval > 0) {
                if (!params->retrieval) {
                    llama_razor_error_throw("n_retrieval is set and retrieval is NULL");
                }

                res->retrieval.assign(params->retrieval, params->retrieval + params->n_retrieval);
                razor_check_mask(res->retrieval);

                if (params->scope) {
                    res->scope.assign(params->scope, params->scope + params->n_retrieval);
                    razor_check_scope(res->retrieval, res->scope);
                }
            }
        }

        razor_override = std::move(res);
    } catch (const std::exception &) {
        return false;
    }

    return true;
}

const llama_razor_profile * llama_razor_profile_get_override() {
    return razor_override.get();
}
