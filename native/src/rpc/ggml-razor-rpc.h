#pragma once

// handles lost connections to RPC servers, on which upstream aborts; compiled into ggml-rpc
//
// once a callback is set, commands to a lost server do nothing and return zeros: buffers can still be freed,
// and callers must check llama_razor_lost_server() before they use a result

#include "ggml-backend.h"

#include <cstddef>
#include <string>

// these two are proc addresses of the backend
extern "C" {
    // when a connection is lost, call callback (in the thread that sends commands) instead of aborting
    GGML_BACKEND_API void ggml_razor_rpc_set_callback(void (*callback)(const char * endpoint));

    GGML_BACKEND_API bool ggml_razor_rpc_is_lost(const char * endpoint);
}

void ggml_razor_rpc_connected(const std::string & endpoint);

// return status: whether a command and its answer were transferred
// if not, the connection is lost
bool ggml_razor_rpc_check(bool status, const std::string & endpoint, void * output, size_t output_size);

// return false for operations that call a function of this process
bool ggml_razor_rpc_supports_op(const ggml_tensor * op);

// set keepalive and timeouts, so that a machine that stops responding is noticed, and close-on-exec
void ggml_razor_rpc_set_options(int sockfd);

// return nullptr for a name that is unknown
void * ggml_razor_rpc_get_proc_address(const char * name);
