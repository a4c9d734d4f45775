#include "llama-razor-rpc.h"

#include "llama-razor.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-model.h"

#include <cstring>
#include <stdexcept>

// return a function of the RPC backend, nullptr if the build has none
template <typename Function>
static Function razor_rpc_function(const char * name) {
    const auto reg = ggml_backend_reg_by_name("RPC");

    return reg ? (Function) ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}

ggml_backend_reg_t razor_rpc_connect(const char * endpoint, ggml_backend_t * connection) {
    const auto set_callback = razor_rpc_function<void (*)(void (*)(const char *))>("ggml_razor_rpc_set_callback");
    const auto init         = razor_rpc_function<ggml_backend_t (*)(const char *, uint32_t)>("ggml_backend_rpc_init");
    const auto add_server   = razor_rpc_function<ggml_backend_reg_t (*)(const char *)>("ggml_backend_rpc_add_server");

    if (!set_callback || !init || !add_server) {
        throw std::runtime_error("this build has no RPC backend");
    }

    set_callback([](const char * /* endpoint */) {}); // llama_razor_lost_server() reports it

    ggml_backend_ptr backend { init(endpoint, 0) };

    const auto reg = add_server(endpoint); // known since init()
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); ++i) {
        if (!ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(reg, i))) {
            throw std::runtime_error("the connection was lost");
        }
    }

    *connection = backend.release();

    return reg;
}

const char * llama_razor_lost_server(llama_context * ctx) {
    static const auto is_lost = razor_rpc_function<bool (*)(const char *)>("ggml_razor_rpc_is_lost");
    if (!is_lost) {
        return nullptr;
    }

    bool synchronized = false;

    for (const auto & device : ctx->get_model().devices) {
        const auto reg = ggml_backend_dev_backend_reg(device.dev);
        if (!reg || strcmp(ggml_backend_reg_name(reg), "RPC") != 0) {
            continue;
        }

        if (!synchronized) {
            ctx->synchronize(); // what is still being computed could fail
            synchronized = true;
        }

        const char * endpoint = ggml_backend_dev_description(device.dev);
        if (is_lost(endpoint)) {
            return endpoint;
        }
    }

    return nullptr;
}
