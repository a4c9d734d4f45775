#include "ggml-razor-rpc.h"

#include "ggml-rpc.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>

#ifndef _WIN32
#  include <fcntl.h>
#  include <netinet/in.h>
#  include <netinet/tcp.h>
#  include <sys/socket.h>
#endif

static std::atomic<void (*)(const char *)> razor_on_lost { nullptr };

static std::mutex            razor_lost_mutex;
static std::set<std::string> razor_lost; // endpoints

void ggml_razor_rpc_set_callback(void (*callback)(const char * endpoint)) {
    razor_on_lost = callback;
}

bool ggml_razor_rpc_is_lost(const char * endpoint) {
    std::lock_guard<std::mutex> lock(razor_lost_mutex);

    return razor_lost.count(endpoint) > 0;
}

void ggml_razor_rpc_connected(const std::string & endpoint) {
    std::lock_guard<std::mutex> lock(razor_lost_mutex);

    razor_lost.erase(endpoint);
}

bool ggml_razor_rpc_check(bool status, const std::string & endpoint, void * output, size_t output_size) {
    if (status) {
        return true;
    }

    const auto callback = razor_on_lost.load();
    if (!callback) {
        GGML_ABORT("the connection to the RPC server %s was lost", endpoint.c_str());
    }

    bool is_new;
    {
        std::lock_guard<std::mutex> lock(razor_lost_mutex);

        is_new = razor_lost.insert(endpoint).second;
    }
    if (is_new) {
        callback(endpoint.c_str());
    }

    if (output) {
        memset(output, 0, output_size);
    }

    return false;
}

bool ggml_razor_rpc_supports_op(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MAP_CUSTOM1:
        case GGML_OP_MAP_CUSTOM2:
        case GGML_OP_MAP_CUSTOM3:
        case GGML_OP_CUSTOM:
            return false;
        default:
            return true;
    }
}

void ggml_razor_rpc_set_options(int sockfd) {
#ifdef _WIN32
    GGML_UNUSED(sockfd);
#else
    const auto set = [sockfd](int level, int name, int value) {
        setsockopt(sockfd, level, name, &value, sizeof(value));
    };

    fcntl(sockfd, F_SETFD, FD_CLOEXEC);

    // a machine that does not answer for 9 seconds is lost
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
#  ifdef TCP_KEEPIDLE
    set(IPPROTO_TCP, TCP_KEEPIDLE, 3);
#  else
    set(IPPROTO_TCP, TCP_KEEPALIVE, 3); // macOS
#  endif
    set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
    set(IPPROTO_TCP, TCP_KEEPCNT,   3);
#  ifdef TCP_USER_TIMEOUT
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, 9000); // milliseconds, while data is sent
#  endif
#endif
}

void * ggml_razor_rpc_get_proc_address(const char * name) {
    if (strcmp(name, "ggml_backend_rpc_init") == 0) {
        return (void *) ggml_backend_rpc_init;
    }
    if (strcmp(name, "ggml_razor_rpc_set_callback") == 0) {
        return (void *) ggml_razor_rpc_set_callback;
    }
    if (strcmp(name, "ggml_razor_rpc_is_lost") == 0) {
        return (void *) ggml_razor_rpc_is_lost;
    }

    return nullptr;
}
