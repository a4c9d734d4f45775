#pragma once

// what razor_local adds to llama-server; native/patches/0003-razor-server.patch holds the call sites

#include "common.h"
#include "json.h"

#include <cstddef>
#include <string>
#include <vector>

namespace httplib {
struct Request;
struct Response;
}

// maximum size of the body of a request in bytes
constexpr size_t RAZOR_SERVER_MAX_BODY = 32u << 20;

// a JSON object: the members of llama_razor_params, which override the metadata of the model, and the sizes in bytes of the
// cache as planned and of a full cache (kv_bytes, kv_bytes_full); all are optional
#define RAZOR_SERVER_ENV "RAZOR_LOCAL_SERVER"

// load the model and create its context with the parameters of RAZOR_SERVER_ENV
common_init_result_ptr razor_server_init(common_params & params);

// read the size of the rewind log for the reports; called by the thread that computes, which may also free the context
void razor_server_update(const llama_context * ctx);

// return true if a sequence can go back from n_state to n_reused tokens after its state was loaded, without a rewind log
bool razor_server_state_reaches(size_t n_state, size_t n_reused);

// return the plan of the context and the sizes of its cache and of its rewind log
common_json razor_server_props();

// return these sizes as metrics of Prometheus
std::string razor_server_metrics();

// check the headers Host and Origin of a request, so that no web page of another site can use a server without an API key
// return false and fill the response if the request is refused
bool razor_server_accepts(const common_params & params, const httplib::Request & req, httplib::Response & res);

// called for each signal that ends the server: return true if the last one came just before
// a terminal, a parent process and programs such as timeout send the same signal one after the other
bool razor_server_is_repeated();

// print the addresses, the slots and the size of the cache
void razor_server_started(const std::vector<std::string> & addresses);
