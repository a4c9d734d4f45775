#pragma once

// connections to RPC servers

#include "ggml-backend.h"

// connect to an RPC server and return its devices
// the connection lasts until connection and all buffers on these devices are freed
// throws std::runtime_error; call it through razor_guarded(), which also catches upstream's failed assertions
ggml_backend_reg_t razor_rpc_connect(const char * endpoint, ggml_backend_t * connection);
