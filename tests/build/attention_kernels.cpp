// The attention kernels of native/src/cpu against plain loops in double precision, on the CPU this is compiled for.
// Compiled and run by tests/build/test_attention_kernels.py.

#include "llama-razor-attn.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

static float f16_to_float(uint16_t h) {
    const int   exponent = (h >> 10) & 31;
    const float sign     = h >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return h & 1023 ? NAN : sign*INFINITY;
    }

    return sign*(exponent ? ldexpf(1024 + (h & 1023), exponent - 25) : ldexpf(h & 1023, -24));
}

static void read_row(razor_attn_format format, const char * src, float * dst, int n) {
    for (int i = 0; i < n; ++i) {
        uint16_t h;
        uint32_t u;
        switch (format) {
            case RAZOR_ROWS_F32:  memcpy(&dst[i], src + 4*i, 4); break;
            case RAZOR_ROWS_F16:  memcpy(&h, src + 2*i, 2); dst[i] = f16_to_float(h); break;
            case RAZOR_ROWS_BF16: memcpy(&h, src + 2*i, 2); u = (uint32_t) h << 16; memcpy(&dst[i], &u, 4); break;
            case RAZOR_ROWS_Q8_0:
                memcpy(&h, src + i/32*34, 2);
                dst[i] = f16_to_float(h)*(int8_t) src[i/32*34 + 2 + i%32];
                break;
            case RAZOR_ROWS_Q4_0: {
                memcpy(&h, src + i/32*18, 2);
                const uint8_t byte = src[i/32*18 + 2 + i%16];
                dst[i] = f16_to_float(h)*((i%32 < 16 ? byte & 15 : byte >> 4) - 8);
                break;
            }
            case RAZOR_ROWS_FUNC: break;
        }
    }
}

static size_t row_bytes(razor_attn_format format, int n) {
    return format == RAZOR_ROWS_F32 ? 4*n : format == RAZOR_ROWS_Q8_0 ? n/32*34 : format == RAZOR_ROWS_Q4_0 ? n/32*18 : 2*n;
}

int main() {
    struct { const char * name; razor_attn_kernel kernel; } kernels[] = {
        { "avx512", razor_attn_kernel_avx512() }, { "avx2", razor_attn_kernel_avx2() }, { "neon", razor_attn_kernel_neon() },
    };

    std::mt19937 rng(1);
    std::normal_distribution<float> normal;

    int n_tried = 0;
    for (const auto & [name, kernel] : kernels) {
        if (!kernel) {
            continue;
        }

        double worst = 0.0;
        for (int i = 0; i < 300; ++i, ++n_tried) {
            const auto format = (razor_attn_format) (i % 5);
            const bool blocks = format == RAZOR_ROWS_Q8_0 || format == RAZOR_ROWS_Q4_0;

            const int n_tokens = 1 + rng() % 20;
            const int n_gqa    = 1 + rng() % 5;
            const int d_k      = (blocks ? 32 : 16)*(1 + rng() % 5);
            const int d_v      = (blocks ? 32 : 16)*(1 + rng() % 5);
            const int n_kv     = 1 + rng() % 300;

            std::vector<float> q(n_tokens*n_gqa*d_k);
            for (auto & x : q) {
                x = normal(rng);
            }

            // any bits, with factors and numbers of ordinary size, to the last byte
            auto make = [&](int d) {
                std::vector<char> rows(n_kv*row_bytes(format, d));
                for (auto & x : rows) {
                    x = rng();
                }
                for (size_t j = 0; format == RAZOR_ROWS_F32 && j < rows.size(); j += 4) {
                    const float x = normal(rng);
                    memcpy(&rows[j], &x, 4);
                }
                const size_t step = blocks ? row_bytes(format, 32) : 2;
                for (size_t j = 0; format != RAZOR_ROWS_F32 && j < rows.size(); j += step) {
                    const uint16_t x = (format == RAZOR_ROWS_BF16 ? 0x3f00 : blocks ? 0x2000 : 0x3800) | (rng() & 0x807f);
                    memcpy(&rows[j], &x, 2);
                }
                return rows;
            };
            const auto k = make(d_k);
            const auto v = make(d_v);

            std::vector<uint16_t> mask(n_tokens*n_kv);
            for (auto & x : mask) {
                x = rng() % 3 == 0 ? 0xfc00 : rng() % 7 == 0 ? 0x4400 : 0;
            }

            std::vector<float> slopes(n_gqa, 1.0f); // of ALiBi
            for (auto & x : slopes) {
                x = i % 2 ? 1.0f : 0.01f + 0.1f*(rng() % 10);
            }

            std::vector<float> out(n_tokens*n_gqa*(d_v + 2));

            razor_attn_task t = {};
            t.n_tokens = n_tokens; t.n_gqa = n_gqa; t.d_k = d_k; t.d_v = d_v;
            t.scale    = 1.0f/sqrtf(d_k);
            t.q = q.data(); t.q_head = d_k; t.q_token = d_k*n_gqa;
            t.k = { k.data(), row_bytes(format, d_k), row_bytes(format, d_k), format, nullptr };
            t.v = { v.data(), row_bytes(format, d_v), row_bytes(format, d_v), format, nullptr };
            t.mask  = mask.data(); t.mask_token = n_kv;
            t.slopes = i % 2 ? nullptr : slopes.data();
            t.cell0 = rng() % n_kv;
            t.cell1 = n_kv;
            t.partial = rng() % 2;
            t.chunk   = t.partial ? n_kv : (1 + rng() % 4)*RAZOR_ATTN_TILE;
            t.out = out.data(); t.out_head = d_v + 2; t.out_token = n_gqa*(d_v + 2);

            std::vector<float> scratch(razor_attn_scratch(t));
            kernel(t, scratch.data());

            std::vector<float> row(d_k + d_v);
            for (int r = 0; r < n_tokens*n_gqa; ++r) {
                std::vector<double> want(d_v);
                double sum = 0.0;
                for (int c = t.cell0; c < n_kv; ++c) {
                    read_row(format, k.data() + c*t.k.row_bytes, row.data(), d_k);
                    read_row(format, v.data() + c*t.v.row_bytes, row.data() + d_k, d_v);
                    double s = 0.0;
                    for (int d = 0; d < d_k; ++d) {
                        s += (double) q[r*d_k + d]*row[d];
                    }
                    const double e = exp(s*t.scale + slopes[r%n_gqa]*f16_to_float(mask[r/n_gqa*n_kv + c]));
                    sum += e;
                    for (int d = 0; d < d_v; ++d) {
                        want[d] += e*row[d_k + d];
                    }
                }
                const float * got = &out[r*(d_v + 2)];
                for (int d = 0; d < d_v; ++d) {
                    const double x = sum > 0.0 ? want[d]/sum : 0.0;
                    const double y = !t.partial ? got[d] : got[d_v + 1] > 0.0f ? got[d]/got[d_v + 1] : 0.0;
                    worst = fmax(worst, fabs(x - y));
                }
                if (t.partial && sum > 0.0) {
                    worst = fmax(worst, fabs(got[d_v] + log(got[d_v + 1]) - log(sum)));
                }
            }

            // the same bits from one token and one chunk at a time
            if (!t.partial) {
                const int64_t n_parts = (t.cell1 - t.cell0 + t.chunk - 1)/t.chunk;
                for (int r = 0; r < n_tokens*n_gqa; ++r) {
                    std::vector<float> parts(n_parts*(d_v + 2)), one(d_v);
                    razor_attn_task u = t;
                    u.n_tokens = u.n_gqa = 1;
                    u.q        = q.data() + r*d_k;
                    u.mask     = mask.data() + r/n_gqa*n_kv;
                    u.slopes   = t.slopes ? t.slopes + r%n_gqa : nullptr;
                    u.partial  = true;
                    for (int64_t j = 0; j < n_parts; ++j) {
                        u.cell0 = t.cell0 + j*t.chunk;
                        u.cell1 = u.cell0 + t.chunk < t.cell1 ? u.cell0 + t.chunk : t.cell1;
                        u.out   = parts.data() + j*(d_v + 2);
                        kernel(u, scratch.data());
                    }
                    u.parts = parts.data(); u.n_parts = n_parts; u.out = one.data();
                    kernel(u, nullptr);
                    if (memcmp(one.data(), &out[r*(d_v + 2)], d_v*sizeof(float)) != 0) {
                        printf("%s: a token alone has other sums\n", name);
                        return 1;
                    }
                }
            }
        }

        printf("%s: largest error %.1e\n", name, worst);
        if (!(worst < 2e-5)) {
            return 1;
        }
    }

    return n_tried ? 0 : 2;
}
