// Fuzz target of the razor.* metadata: random keys in a tiny model, which is then loaded.
//
// A finding is a report of a sanitizer, a wrong verdict on the keys (docs/format.md, written down a second time here) or
// a message that is not one printable line. The rest of the file stays as it is: it is upstream's to read.
//
// RAZOR_FUZZ_MODELS: folder with the models. Built and run by tests/tools/sanitizers.py.

#include "llama-razor.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#define EXPECT(cond, ...)                                                         \
    do {                                                                          \
        if (!(cond)) {                                                            \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #cond);    \
            fprintf(stderr, __VA_ARGS__);                                         \
            fprintf(stderr, "\nlast error: %s\n", llama_razor_last_error());      \
            abort();                                                              \
        }                                                                         \
    } while (0)

enum : uint32_t { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };

static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

static const size_t N_LAYER = 2, N_HEAD = 6, N_HEAD_KV = 3; // of tests/tools/sanitizers.py's llama.gguf

static std::string model; // the file without razor.* keys

struct value {
    uint32_t    type;     // ARRAY: of item
    uint32_t    item;
    uint64_t    count;
    std::string data;
};

template<typename T> static std::string raw(T x) { return std::string((const char *) &x, sizeof(x)); }

static std::string sized(const std::string & s) { return raw<uint64_t>(s.size()) + s; }

static std::string random_data(FuzzedDataProvider & fdp, uint32_t type, uint64_t count) {
    std::string res;
    for (uint64_t i = 0; i < count; ++i) {
        if (type == STRING) {
            res += sized(fdp.ConsumeRandomLengthString(40));
        } else if (type == BOOL || type == U8) {
            res += (char) fdp.ConsumeIntegralInRange<uint8_t>(0, fdp.remaining_bytes() % 8 == 0 ? 255 : 1);
        } else {
            std::string x = fdp.ConsumeBytesAsString(sizes[type]);
            x.resize(sizes[type]);
            res += x;
        }
    }
    return res;
}

static value random_value(FuzzedDataProvider & fdp) {
    value res = { fdp.PickValueInArray({ U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 }), 0, 1, "" };
    if (res.type == ARRAY) {
        res.item  = fdp.PickValueInArray({ U8, I8, U16, U32, I32, F32, BOOL, STRING, U64 });
        res.count = fdp.PickValueInArray<uint64_t>({ N_LAYER*N_HEAD_KV, N_LAYER*N_HEAD, 0, 1, N_LAYER*N_HEAD_KV - 1, N_LAYER*N_HEAD_KV + 1 });
    }
    res.data = random_data(fdp, res.type == ARRAY ? res.item : res.type, res.count);
    return res;
}

static value number(uint32_t x) { return { U32, 0, 1, raw(x) }; }

static value array(FuzzedDataProvider & fdp, uint32_t item, uint64_t count) {
    return { ARRAY, item, count, random_data(fdp, item, count) };
}

static uint32_t as_number(const value & v) {
    uint32_t res;
    memcpy(&res, v.data.data(), sizeof(res));
    return res;
}

static bool is_array(const value & v, uint32_t item, uint64_t count) {
    return v.type == ARRAY && v.item == item && v.count == count;
}

static bool is_scores(const value & v) {
    bool res = is_array(v, F32, N_LAYER*N_HEAD);
    for (size_t i = 0; res && i < v.count; ++i) {
        float x;
        memcpy(&x, &v.data[i*sizeof(x)], sizeof(x));
        res = std::isfinite(x);
    }
    return res;
}

static bool in_range(const value & v, uint32_t min, uint32_t max) {
    return v.type == U32 && as_number(v) >= min && as_number(v) <= max;
}

struct key {
    const char * name;
    bool         required;
    value     (* good)(FuzzedDataProvider & fdp); // mostly valid; nullptr: none is
    bool      (* valid)(const value & v);
};

static const key keys[] = {
    { "razor.version", true,
        [](FuzzedDataProvider & fdp) { return number(fdp.PickValueInArray({ 1, 2 })); },
        [](const value & v) { return in_range(v, 1, 2); } },
    { "razor.method", true,
        [](FuzzedDataProvider &) { return value{ STRING, 0, 1, sized("rope") }; },
        [](const value & v) { return v.type == STRING && v.data == sized("rope"); } },
    { "razor.sink_tokens", true,
        [](FuzzedDataProvider & fdp) { return number(fdp.PickValueInArray({ 0, 4, 4096, 4097, 300 })); },
        [](const value & v) { return in_range(v, 0, 4096); } },
    { "razor.window_min", true,
        [](FuzzedDataProvider & fdp) { return number(fdp.PickValueInArray({ 1, 0, 50, 4000, 1 << 30, (1 << 30) + 1 })); },
        [](const value & v) { return in_range(v, 1, 1 << 30); } },
    { "razor.window_divisor", true,
        [](FuzzedDataProvider & fdp) { return number(fdp.PickValueInArray({ 5, 0, 1, 1 << 30, (1 << 30) + 1 })); },
        [](const value & v) { return in_range(v, 0, 1 << 30); } },
    { "razor.compensation", true,
        [](FuzzedDataProvider & fdp) { return value{ BOOL, 0, 1, std::string(1, fdp.ConsumeBool()) }; },
        [](const value & v) { return v.type == BOOL; } },
    { "razor.head.retrieval", true,
        [](FuzzedDataProvider & fdp) { return array(fdp, U8, N_LAYER*N_HEAD_KV); },
        [](const value & v) { return is_array(v, U8, N_LAYER*N_HEAD_KV) &&
            std::all_of(v.data.begin(), v.data.end(), [](uint8_t x) { return x <= 1; }); } },
    { "razor.head.echo_score", false,
        [](FuzzedDataProvider & fdp) { return array(fdp, F32, N_LAYER*N_HEAD); },
        [](const value & v) { return is_scores(v); } },
    { "razor.head.induction_score", false,
        [](FuzzedDataProvider & fdp) { return array(fdp, F32, N_LAYER*N_HEAD); },
        [](const value & v) { return is_scores(v); } },
    { "razor.head.scope", false,
        [](FuzzedDataProvider & fdp) { return array(fdp, U32, N_LAYER*N_HEAD_KV); },
        [](const value & v) { return is_array(v, U32, N_LAYER*N_HEAD_KV); } },
    { "razor.head.unknown", false, nullptr,
        [](const value &) { return false; } },
    { "razor.unknown", false,
        [](FuzzedDataProvider & fdp) { return random_value(fdp); },
        [](const value &) { return true; } },
};

// scopes that fit the mask: 0 only for retrieval heads
static value fitting_scopes(FuzzedDataProvider & fdp, const value & mask) {
    value res = { ARRAY, U32, mask.count, "" };
    for (const uint8_t x : mask.data) {
        res.data += raw<uint32_t>(x == 1 ? 0 : fdp.PickValueInArray({ 1, 50, 300, 600, 1 << 30 }));
    }
    return res;
}

// version 2 requires scopes
static bool scopes_fit(const std::map<std::string, value> & added) {
    const auto version = added.find("razor.version");
    if (version == added.end() || !in_range(version->second, 2, 2)) {
        return true;
    }

    const auto mask  = added.find("razor.head.retrieval");
    const auto scope = added.find("razor.head.scope");
    if (mask == added.end() || scope == added.end() || mask->second.count != scope->second.count) {
        return false;
    }

    for (size_t i = 0; i < mask->second.count; ++i) {
        uint32_t x;
        memcpy(&x, &scope->second.data[i*sizeof(x)], sizeof(x));
        if (x > 1u << 30 || (x == 0) != (mask->second.data[i] == 1)) {
            return false;
        }
    }
    return true;
}

static std::string entry(const std::string & name, const value & v) {
    std::string res = sized(name) + raw(v.type);
    if (v.type == ARRAY) {
        res += raw(v.item) + raw(v.count);
    }
    return res + v.data;
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    const char * folder = getenv("RAZOR_FUZZ_MODELS");
    std::ifstream file(std::string(folder ? folder : ".") + "/llama.gguf", std::ios::binary);
    model.assign(std::istreambuf_iterator<char>(file), {});
    if (model.size() < 1000) {
        fprintf(stderr, "no model in RAZOR_FUZZ_MODELS, run python -m tests.tools.sanitizers\n");
        exit(2);
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * bytes, size_t size) {
    FuzzedDataProvider fdp(bytes, size);

    // one key is often missing or random, seldom more
    const size_t odd  = fdp.ConsumeIntegralInRange<size_t>(0, 2*std::size(keys));
    const bool   more = fdp.ConsumeIntegralInRange<int>(0, 9) == 0;

    std::string added;
    uint64_t    n_added  = 0;
    bool        missing  = false;
    bool        valid    = true;

    std::map<std::string, value> values;

    for (const auto & key : keys) {
        const bool is_odd = (size_t) (&key - keys) == odd || (more && fdp.ConsumeBool());
        if ((is_odd && fdp.ConsumeBool()) || (!key.required && fdp.ConsumeBool()) || (!is_odd && !key.good)) {
            missing = missing || key.required;
            continue;
        }
        value v = is_odd ? random_value(fdp) : key.good(fdp);
        const auto  mask = values.find("razor.head.retrieval");
        if (!is_odd && key.name == std::string("razor.head.scope") && mask != values.end() &&
                is_array(mask->second, U8, N_LAYER*N_HEAD_KV) && fdp.ConsumeBool()) {
            v = fitting_scopes(fdp, mask->second);
        }
        valid  = valid && key.valid(v);
        values.emplace(key.name, v);
        added += entry(key.name, v);
        n_added++;
    }
    valid = n_added == 0 || (valid && !missing && scopes_fit(values));

    // the tensors stay where they are aligned
    const size_t filler = entry("filler", { STRING, 0, 1, sized("") }).size();
    added += entry("filler", { STRING, 0, 1, sized(std::string(31 - (added.size() + filler + 31)%32, 'x')) });

    std::string file = model.substr(0, 16) + raw<uint64_t>(*(const uint64_t *) &model[16] + n_added + 1) + added + model.substr(24);
    EXPECT(added.size() % 32 == 0, "%zu bytes", added.size());

    // sometimes a few bytes of the keys are others: then any verdict is right
    const bool damaged = fdp.ConsumeIntegralInRange<int>(0, 3) == 0;
    for (int n = damaged ? 3 : 0; n > 0; --n) {
        file[24 + fdp.ConsumeIntegralInRange<size_t>(0, added.size() - 1)] = fdp.ConsumeIntegral<char>();
    }

    const int fd = memfd_create("model", 0);
    EXPECT(fd >= 0 && write(fd, file.data(), file.size()) == (ssize_t) file.size(), "no memory");

    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;

    llama_razor_set_override(nullptr); // resets the last error
    llama_model * loaded = llama_model_load_from_file(("/proc/self/fd/" + std::to_string(fd)).c_str(), params);
    close(fd);

    const std::string error = llama_razor_last_error();
    for (const unsigned char c : error) {
        EXPECT(c >= ' ' && c != 127, "byte %u in the message", c);
    }
    EXPECT(damaged || (bool) loaded == valid, "valid is %d", valid);
    EXPECT(loaded ? error.empty() : (damaged || !error.empty()), "loaded is %d", (bool) loaded);

    if (loaded) {
        auto cparams = llama_context_default_params();
        cparams.n_ctx     = 512;
        cparams.n_threads = cparams.n_threads_batch = 1;
        cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

        llama_context * ctx = llama_init_from_model(loaded, cparams);
        EXPECT(ctx, "valid keys give no context");
        llama_token token = 1;
        EXPECT(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0, "the first token");
        llama_free(ctx);
        llama_model_free(loaded);
    }

    return 0;
}
