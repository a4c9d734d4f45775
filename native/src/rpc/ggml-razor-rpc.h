#pragma once

// lost connections to RPC servers, which upstream answers by ending the process
//
// compiled into ggml-rpc. With a callback, all commands to a server whose connection is lost do nothing, and their output is zeros:
// freeing buffers still works, and libllama asks ggml_razor_rpc_is_lost() before it uses a result

#include "ggml-backend.h"

#include <cstddef>
#include <string>

// these two are proc addresses of the backend
extern "C" {
    // call callback when a connection is lost, in another thread than the one that computes, instead of ending the process
    GGML_BACKEND_API void ggml_razor_rpc_set_callback(void (*callback)(const char * endpoint));

    GGML_BACKEND_API bool ggml_razor_rpc_is_lost(const char * endpoint);
}

void ggml_razor_rpc_connected(const std::string & endpoint);

// return status: whether a command and its answer were transferred
// if not, the connection is lost
bool ggml_razor_rpc_check(bool status, const std::string & endpoint, void * output, size_t output_size);

// return false for operations that call a function of this process
bool ggml_razor_rpc_supports_op(const ggml_tensor * op);

// notice that a machine does not answer any more, and close the connection in programs that replace this one (exec)
void ggml_razor_rpc_set_options(int sockfd);

// return nullptr for a name that is unknown
void * ggml_razor_rpc_get_proc_address(const char * name);
