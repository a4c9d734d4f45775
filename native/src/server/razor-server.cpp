#include "razor-server.h"

#include "llama-razor.h"

#include "llama.h"

#include <cpp-httplib/httplib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

// of the context of the model, written before the server is ready
static uint64_t          razor_kv_bytes_full = 0; // 0: unknown
static uint32_t          razor_n_slots = 0;
static uint32_t          razor_n_retrieval = 0;
static uint32_t          razor_n_local = 0;

// of the context of the model, as of the last update
static llama_razor_stats razor_stats = {};
static std::mutex        razor_stats_mutex;

static llama_razor_stats razor_get_stats() {
    std::lock_guard<std::mutex> lock(razor_stats_mutex);

    return razor_stats;
}

//
// the context
//

template <typename T>
static std::vector<T> razor_read_array(const common_json & config, const char * key) {
    std::vector<T> res;
    if (config.contains(key)) {
        for (const auto & item : config.at(key)) {
            res.push_back((T) item.template get<int64_t>());
        }
    }

    return res;
}

static void razor_set_override(const common_json & config) {
    if (!config.contains("enabled")) {
        return; // the metadata of the model
    }

    const auto retrieval = razor_read_array<uint8_t> (config, "retrieval");
    const auto scope     = razor_read_array<uint32_t>(config, "scope");
    const auto folder    = config.value<std::string>("rewind_folder", "");

    if (!scope.empty() && scope.size() != retrieval.size()) {
        throw std::runtime_error("scope and retrieval have different lengths");
    }

    llama_razor_params params = {};

    params.size           = sizeof(params);
    params.enabled        = config.value<uint32_t>("enabled",        0);
    params.sink_tokens    = config.value<uint32_t>("sink_tokens",    0);
    params.window         = config.value<uint32_t>("window",         0);
    params.window_min     = config.value<uint32_t>("window_min",     0);
    params.window_divisor = config.value<uint32_t>("window_divisor", 0);
    params.compensation   = config.value<uint32_t>("compensation",   0);
    params.own_attention  = config.value<uint32_t>("own_attention",  0);
    params.type_k_local   = config.value<int32_t> ("type_k_local",  -1);
    params.type_v_local   = config.value<int32_t> ("type_v_local",  -1);
    params.n_retrieval    = retrieval.size();
    params.retrieval      = retrieval.data();
    params.scope          = scope.empty() ? nullptr : scope.data();
    params.rewind         = config.value<uint32_t>("rewind",         0);
    params.rewind_limit   = config.value<uint64_t>("rewind_limit",   0);
    params.rewind_folder  = folder.c_str();

    if (!llama_razor_set_override(&params)) {
        throw std::runtime_error(llama_razor_last_error());
    }
}

// called when the connection to an RPC server is lost
static void razor_on_lost(const char * endpoint) {
    fprintf(stderr, "error: the connection to the RPC server %s was lost; restart that server, then restart this one\n", endpoint);
    _Exit(1);
}

static void razor_watch_rpc_servers() {
    const auto reg = ggml_backend_reg_by_name("RPC");
    if (!reg) {
        return;
    }

    const auto set_callback = (void (*)(void (*)(const char *))) ggml_backend_reg_get_proc_address(reg, "ggml_razor_rpc_set_callback");
    if (set_callback) {
        set_callback(razor_on_lost);
    }
}

common_init_result_ptr razor_server_init(common_params & params) {
    razor_watch_rpc_servers();

    const char * env = getenv(RAZOR_SERVER_ENV);

    uint64_t kv_bytes = 0; // as planned

    try {
        const auto config = common_json::parse(env && *env ? env : "{}");

        kv_bytes            = config.value<uint64_t>("kv_bytes",      0);
        razor_kv_bytes_full = config.value<uint64_t>("kv_bytes_full", 0);
        razor_set_override(config);
    } catch (const std::exception & err) {
        fprintf(stderr, "error: the environment variable " RAZOR_SERVER_ENV " is not valid (%s); unset it\n", err.what());
        exit(1);
    }

    auto res = common_init_from_params(params);

    llama_context * ctx = res->context();
    if (!ctx && *llama_razor_last_error()) {
        fprintf(stderr, "error: %s\n", llama_razor_last_error());
    }

    llama_razor_set_override(nullptr); // not for the contexts of draft models

    if (ctx) {
        razor_n_slots = params.n_parallel;

        razor_server_update(ctx);

        if (razor_get_stats().kv_bytes != kv_bytes) {
            razor_kv_bytes_full = 0; // options of llama-server have changed the cache
        }

        llama_razor_layer_stats layer = {};
        layer.size = sizeof(layer);

        razor_n_retrieval = 0;
        razor_n_local     = 0;
        for (uint32_t il = 0; llama_razor_get_layer(ctx, il, &layer); ++il) {
            razor_n_retrieval += layer.n_retrieval;
            razor_n_local     += layer.n_local;
        }
    }

    return res;
}

void razor_server_update(const llama_context * ctx) {
    llama_razor_stats stats = {};

    stats.size = sizeof(stats);
    llama_razor_get_stats(ctx, &stats);

    std::lock_guard<std::mutex> lock(razor_stats_mutex);

    razor_stats = stats;
}

// return the fold frontier of the smallest window after n tokens, which folds first
static uint64_t razor_frontier(const llama_razor_stats & stats, uint64_t n) {
    const uint64_t window = stats.windows[stats.n_windows - 1];
    const uint64_t start  = n - n % stats.block;

    return std::max<uint64_t>(stats.sink_tokens, start > window ? start - window : 0);
}

bool razor_server_state_reaches(size_t n_state, size_t n_reused) {
    const auto stats = razor_get_stats();

    return !stats.active || n_state - n_reused <= LLAMA_RAZOR_SLACK || razor_frontier(stats, n_state) == razor_frontier(stats, n_reused);
}

//
// reports
//

common_json razor_server_props() {
    const auto stats = razor_get_stats();

    common_json res = {
        { "active",   stats.active == 1 },
        { "n_ctx",    stats.n_ctx },
        { "n_slots",  razor_n_slots },
        { "kv_bytes", stats.kv_bytes },
    };
    if (razor_kv_bytes_full) {
        res["kv_bytes_full"] = razor_kv_bytes_full;
    }
    if (stats.active) {
        res["n_retrieval"]  = razor_n_retrieval;
        res["n_local"]      = razor_n_local;
        res["sink_tokens"]  = stats.sink_tokens;
        res["window"]       = stats.window;
        res["block"]        = stats.block;
        res["compensation"] = stats.compensation == 1;
        res["type_k"]       = ggml_type_name((ggml_type) stats.type_k);
        res["type_v"]       = ggml_type_name((ggml_type) stats.type_v);
        res["type_k_local"] = ggml_type_name((ggml_type) stats.type_k_local);
        res["type_v_local"] = ggml_type_name((ggml_type) stats.type_v_local);

        static const char * const names[] = { "off", "ram", "disk" };

        res["rewind"]         = names[stats.rewind];
        res["rewind_bytes"]   = stats.rewind_bytes;
        res["rewind_limit"]   = stats.rewind_limit;
        res["rewind_failure"] = stats.rewind_failure;
    }

    return res;
}

static std::string razor_metric(const char * name, const char * help, uint64_t value) {
    return string_format("# HELP razor:%s %s\n# TYPE razor:%s gauge\nrazor:%s %llu\n", name, help, name, name, (unsigned long long) value);
}

std::string razor_server_metrics() {
    const auto stats = razor_get_stats();

    std::string res = razor_metric("kv_bytes", "Bytes of the KV cache of all slots", stats.kv_bytes);
    if (razor_kv_bytes_full) {
        res += razor_metric("kv_bytes_full", "Bytes of a full KV cache of the same size", razor_kv_bytes_full);
    }
    if (stats.rewind != LLAMA_RAZOR_REWIND_OFF) {
        res += razor_metric("rewind_bytes", "Bytes of the rewind log of all slots", stats.rewind_bytes);
        res += razor_metric("rewind_limit", "Maximum bytes of the rewind log", stats.rewind_limit);
    }

    return res;
}

static std::string razor_size_text(uint64_t n_bytes) {
    const double mib = n_bytes / 1048576.0;

    return mib < 1024.0 ? string_format("%.1f MiB", mib) : string_format("%.1f GiB", mib / 1024.0);
}

void razor_server_started(const std::vector<std::string> & addresses) {
    const auto stats = razor_get_stats();

    std::string cache = "KV cache " + razor_size_text(stats.kv_bytes);
    if (stats.active && razor_kv_bytes_full) {
        cache += string_format(" instead of %s (-%.0f %%)", razor_size_text(razor_kv_bytes_full).c_str(),
                100.0 * (1.0 - (double) stats.kv_bytes / razor_kv_bytes_full));
    } else if (!stats.active) {
        cache += " (full)";
    }

    for (const auto & address : addresses) {
        fprintf(stderr, "listening on %s: %u slot%s of %u tokens, %s\n", address.c_str(),
                razor_n_slots, razor_n_slots == 1 ? "" : "s", stats.n_ctx, cache.c_str());
    }
    fflush(stderr);
}

//
// signals
//

bool razor_server_is_repeated() {
    static std::atomic<int64_t> last = { 0 };

    const int64_t now = std::chrono::duration_cast<std::chrono::milliseconds>(
            std::chrono::steady_clock::now().time_since_epoch()).count();
    const int64_t before = last.exchange(now);

    return before && now - before < 500;
}

//
// requests
//

// return the host of "host", "host:port", "[IPv6]" or "[IPv6]:port" in lower case
static std::string razor_host_of(std::string authority) {
    std::transform(authority.begin(), authority.end(), authority.begin(), [](unsigned char c) { return tolower(c); });

    if (!authority.empty() && authority[0] == '[') {
        return authority.substr(1, authority.find(']') - 1);
    }

    return authority.substr(0, authority.find(':'));
}

static bool razor_is_address(const std::string & host) {
    unsigned char buf[sizeof(struct in6_addr)];

    return inet_pton(AF_INET, host.c_str(), buf) == 1 || inet_pton(AF_INET6, host.c_str(), buf) == 1;
}

static bool razor_is_loopback(const std::string & host) {
    const bool is_name = host == "localhost" || (host.size() > 10 && host.substr(host.size() - 10) == ".localhost");

    return is_name || host == "::1" || (host.substr(0, 4) == "127." && razor_is_address(host));
}

// return why a request is refused, or ""
static std::string razor_refusal(const common_params & params, const std::string & authority, const std::string & origin) {
    if (!params.api_keys.empty()) {
        return ""; // the key is the protection
    }

    // a name that someone else controls can be made to mean this machine (DNS rebinding), an address cannot
    const std::string host = razor_host_of(authority);

    const bool is_known = host.empty() || razor_is_loopback(host) || razor_is_address(host) ||
        std::any_of(params.hostnames.begin(), params.hostnames.end(), [&](const std::string & name) {
            return razor_host_of(name) == host || string_ends_with(name, ".sock");
        });
    if (!is_known) {
        return "the Host header is not an address, localhost or a name that --host gives; set an API key to allow any name";
    }

    if (origin.empty() || params.cors_origins == "*" || params.cors_origins == origin) {
        return "";
    }

    const size_t pos = origin.find("://");
    const std::string from = pos == std::string::npos ? "" : origin.substr(pos + 3);
    if (from != authority && !razor_is_loopback(razor_host_of(from))) {
        return "the Origin header names another site; allow it with --cors-origins, or set an API key";
    }

    return "";
}

bool razor_server_accepts(const common_params & params, const httplib::Request & req, httplib::Response & res) {
    // a preflight request gets no data, and its response names only origins that are allowed
    const std::string why = req.method == "OPTIONS" ? "" :
        razor_refusal(params, req.get_header_value("Host"), req.get_header_value("Origin"));
    if (why.empty()) {
        return true;
    }

    const common_json error = { { "error", { { "message", why }, { "type", "permission_error" }, { "code", 403 } } } };

    res.status = 403;
    res.set_content(error.dump(), "application/json; charset=utf-8");

    return false;
}
