#pragma once

// Attention of a batch (native/src/ggml-razor.h) on CPUs, as simple as possible and in double. It tests the arrays that
// otherwise only GPUs read. Included by a copy of llama-razor-device.cpp (NAIVE in tests/tools/broken_builds.py).

#include "ggml-razor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

// what came up, a line of the file that RAZOR_NAIVE_BATCH names for each process: tests ask for all of it
enum naive_case { NAIVE_SKIPPED, NAIVE_WHOLE, NAIVE_BY_CELL, NAIVE_BIAS, NAIVE_STREAM };

inline void naive_note(naive_case what) {
    static const char * const names[] = { "skipped tile", "whole tile", "tile by cell", "bias", "another stream" };
    static const char * const path = getenv("RAZOR_NAIVE_BATCH");
    static std::atomic<bool>  noted[5];

    if (path && !noted[what].load() && !noted[what].exchange(true)) {
        FILE * file = fopen(path, "a");
        GGML_ASSERT(file);
        fprintf(file, "%s\n", names[what]);
        fclose(file);
    }
}

// rows of a head as F32
inline std::vector<float> naive_rows(const ggml_tensor * t, int64_t first, int64_t n) {
    std::vector<float> res(n*t->ne[0]);

    for (int64_t j = 0; j < n; ++j) {
        const char * row = (const char *) t->data + (first + j)*t->nb[1];

        if (t->type == GGML_TYPE_F32) {
            std::copy_n((const float *) row, t->ne[0], &res[j*t->ne[0]]);
        } else {
            ggml_get_type_traits(t->type)->to_float(row, &res[j*t->ne[0]], t->ne[0]);
        }
    }

    return res;
}

// cells of a group of heads
struct naive_group {
    int64_t         n;
    const int32_t * since;
    const float   * bias; // nullptr: none
    const int32_t * tiles;

    naive_group(const ggml_tensor * t_since, const ggml_tensor * t_bias, const int32_t * tiles) :
        n(t_since->ne[0]), since((const int32_t *) t_since->data), bias(t_bias ? (const float *) t_bias->data : nullptr), tiles(tiles) {
        GGML_ASSERT(!t_bias || t_bias->ne[0] == n);
    }

    int64_t n_tiles() const { return (n + GGML_RAZOR_TILE - 1)/GGML_RAZOR_TILE; }

    // that a tile's numbers are neither too small nor too large: the latter only costs time
    void check(int64_t n_tokens) const {
        for (int64_t i = 0; i < n_tiles(); ++i) {
            int32_t low = GGML_RAZOR_NEVER, high = 0;

            for (int64_t j = i*GGML_RAZOR_TILE; j < (i + 1)*GGML_RAZOR_TILE; ++j) {
                const int32_t s = j < n ? since[j] : GGML_RAZOR_NEVER;
                GGML_ASSERT(s == GGML_RAZOR_NEVER || (s >= 0 && s < n_tokens));

                low  = std::min(low, s);
                high = std::max(high, bias && j < n && bias[j] != 0.0f ? GGML_RAZOR_NEVER : s);
            }

            GGML_ASSERT(tiles[2*i] == low && tiles[2*i + 1] == high);
        }
    }

    // what is added to the score, -INFINITY if the token does not see the cell
    double mask(int64_t j, int64_t token) const {
        const int32_t * tile = tiles + j/GGML_RAZOR_TILE*2;

        if (tile[0] > token) {
            naive_note(NAIVE_SKIPPED);
            return -INFINITY;
        }
        if (tile[1] <= token) {
            naive_note(NAIVE_WHOLE);
            return 0.0;
        }
        naive_note(bias && bias[j] != 0.0f ? NAIVE_BIAS : NAIVE_BY_CELL);

        return since[j] > token ? -INFINITY : bias ? bias[j] : 0.0;
    }
};

// false: another operation
inline bool naive_batch(ggml_tensor * dst, int ith, int nth) {
    ggml_razor_attn_params params;
    if (!ggml_razor_get_params(dst, GGML_RAZOR_BATCH_MAGIC, params)) {
        return false;
    }

    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    const int64_t d_k = k->ne[0], d_v = v->ne[0], n_head = q->ne[1], n_tokens = q->ne[2], n_gqa = n_head/params.n_head_kv;

    GGML_ASSERT(n_tokens > 1 && q->nb[0] == sizeof(float) && dst->ne[0] == d_v*n_head && dst->ne[1] == n_tokens);

    const naive_group retrieval(dst->src[3], nullptr,     (const int32_t *) dst->src[6]->data);
    const naive_group local    (dst->src[4], dst->src[5], retrieval.tiles + 2*retrieval.n_tiles());

    GGML_ASSERT(dst->src[6]->ne[0] == 2 && dst->src[6]->ne[1] == retrieval.n_tiles() + local.n_tiles());
    retrieval.check(n_tokens);
    local    .check(n_tokens);

    GGML_ASSERT(params.stream >= 0 && params.stream < k->ne[2]);
    if (params.stream > 0) {
        naive_note(NAIVE_STREAM);
    }

    int64_t row = params.stream*k->ne[1];

    // rows: retrieval heads first
    for (const bool is_local : { false, true }) {
        const naive_group & group = is_local ? local : retrieval;

        for (int64_t h = 0; h < params.n_head_kv; ++h) {
            if ((params.retrieval >> h & 1) == is_local) {
                continue;
            }

            GGML_ASSERT(row + group.n <= (params.stream + 1)*k->ne[1]);
            const std::vector<float> ks = naive_rows(k, row, group.n);
            const std::vector<float> vs = naive_rows(v, row, group.n);
            row += is_local ? params.cells : params.n_ctx;

            for (int64_t i = ith; i < n_gqa*n_tokens; i += nth) {
                const int64_t head  = h*n_gqa + i%n_gqa;
                const int64_t token = i/n_gqa;

                const float * x   = (const float *) ((const char *) q->data + head*q->nb[1] + token*q->nb[2]);
                float       * out = (float *) ((char *) dst->data + token*dst->nb[1]) + head*d_v;

                std::vector<double> scores(group.n);
                for (int64_t j = 0; j < group.n; ++j) {
                    scores[j] = group.mask(j, token);
                    if (scores[j] == -INFINITY) {
                        continue; // unseen rows may hold anything
                    }
                    double dot = 0.0;
                    for (int64_t c = 0; c < d_k; ++c) {
                        dot += (double) x[c]*ks[j*d_k + c];
                    }
                    scores[j] += dot*params.scale;
                }

                const double largest = *std::max_element(scores.begin(), scores.end());
                GGML_ASSERT(largest > -INFINITY && "a token that sees nothing, itself included");

                double              sum = 0.0;
                std::vector<double> mean(d_v);
                for (int64_t j = 0; j < group.n; ++j) {
                    if (scores[j] == -INFINITY) {
                        continue;
                    }
                    const double weight = exp(scores[j] - largest);
                    sum += weight;
                    for (int64_t c = 0; c < d_v; ++c) {
                        mean[c] += weight*vs[j*d_v + c];
                    }
                }
                for (int64_t c = 0; c < d_v; ++c) {
                    out[c] = mean[c]/sum;
                }
            }
        }
    }

    return true;
}
