// turns failures that would end the process (uncaught exceptions, failed assertions about a file's contents) into errors, or
// reports them before the process ends

#include "llama-razor.h"

#include "llama-razor-error.h"
#include "llama-razor-rpc.h"

#include "llama-impl.h"

#include <climits>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

// > 0 while this thread is in a llama_razor_try_*() call
static thread_local int razor_guards = 0;

static void (*razor_on_end)(const char * sentence) = nullptr;

// "/path/file.cpp:12: reason" -> "reason (file.cpp:12)"
static std::string razor_abort_text(const char * message) {
    const char * reason = strstr(message, ": ");
    if (!reason) {
        return message;
    }

    const std::string place(message, reason);

    return format("%s (%s)", reason + 2, place.substr(place.find_last_of("/\\") + 1).c_str());
}

static void razor_on_abort(const char * message) {
    const std::string text = razor_abort_text(message);

#ifndef _WIN32 // MSVC assumes that extern "C" functions do not throw
    if (razor_guards > 0 && std::uncaught_exceptions() == 0) {
        throw std::runtime_error(text);
    }
#endif

    if (razor_on_end) {
        razor_on_end(("llama.cpp ended the process: " + text).c_str());
    }
}

// replaces ggml's handler, which makes a debugger print a backtrace
[[noreturn]] static void razor_on_terminate() {
    std::string what = "it has no text";

    if (const auto err = std::current_exception()) {
        try {
            std::rethrow_exception(err);
        } catch (const std::exception & err) {
            what = err.what();
        } catch (...) {
        }
    }

    if (razor_on_end) {
        razor_on_end(("a C++ exception that nobody caught ended the process: " + what).c_str());
    }

    abort();
}

void llama_razor_set_end_callback(void (*callback)(const char * sentence)) {
    razor_on_end = callback;

    ggml_set_abort_callback(razor_on_abort);
    std::set_terminate(razor_on_terminate);
}

// return call(), or fail(reason) if it throws
// only std::exception is caught: the cancellation of a thread unwinds its stack as well
template<typename Call, typename Fail>
static auto razor_guarded(Call call, Fail fail) -> decltype(call()) {
    struct scope {
        scope()  { ++razor_guards; }
        ~scope() { --razor_guards; }
    };

    try {
        scope guard;

        return call();
    } catch (const std::exception & err) {
        return fail(err.what());
    }
}

llama_model * llama_razor_try_model_load_from_file(const char * path, llama_model_params params) {
    return razor_guarded([&]() { return llama_model_load_from_file(path, params); }, [](const char * what) -> llama_model * {
        LLAMA_LOG_ERROR("llama_model_load_from_file: %s\n", what);

        return nullptr;
    });
}

llama_context * llama_razor_try_init_from_model(llama_model * model, llama_context_params params) {
    return razor_guarded([&]() { return llama_init_from_model(model, params); }, [](const char * what) -> llama_context * {
        LLAMA_LOG_ERROR("llama_init_from_model: %s\n", what);

        return nullptr;
    });
}

int32_t llama_razor_try_tokenize(const llama_vocab * vocab, const char * text, int32_t text_len,
        llama_token * tokens, int32_t n_tokens_max, bool add_special, bool parse_special) {
    llama_razor_error_set("");

    const auto call = [&]() { return llama_tokenize(vocab, text, text_len, tokens, n_tokens_max, add_special, parse_special); };

    return razor_guarded(call, [](const char * what) {
        llama_razor_error_set(what);

        return INT32_MIN;
    });
}

llama_token llama_razor_try_sampler_sample(llama_sampler * smpl, llama_context * ctx, int32_t idx) {
    llama_razor_error_set("");

    return razor_guarded([&]() { return llama_sampler_sample(smpl, ctx, idx); }, [](const char * what) {
        llama_razor_error_set(what);

        return (llama_token) LLAMA_TOKEN_NULL;
    });
}

ggml_backend_reg * llama_razor_try_rpc_connect(const char * endpoint, ggml_backend ** connection) {
    llama_razor_error_set("");

    return razor_guarded([&]() { return razor_rpc_connect(endpoint, connection); }, [](const char * what) -> ggml_backend_reg * {
        llama_razor_error_set(what);

        return nullptr;
    });
}
