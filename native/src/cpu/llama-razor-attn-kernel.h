// Attention of the query heads of one KV head over a range of cells, for one instruction set: included by a file that is
// compiled for it, after the macros RAZOR_LANES (floats of a vector), RAZOR_REGISTERS (vectors), RAZOR_LOAD_<TYPE> (a vector
// of floats or of 32-bit integers) and RAZOR_F16 (one number). Compilers convert other vectors than floats one by one.
//
// Nothing of the standard library here: the linker would merge its inline functions with those of files for any CPU.

#include "llama-razor-attn.h"

namespace {

constexpr int W  = RAZOR_LANES;
constexpr int TC = RAZOR_ATTN_TILE;

typedef float    vf  __attribute__((vector_size(4*W)));
typedef int32_t  vi  __attribute__((vector_size(4*W)));

// of any address
typedef float    vf_u  __attribute__((vector_size(4*W), aligned(4), may_alias));

inline vf   load (const float * p)  { return *(const vf_u *) p; }
inline void store(float * p, vf x)  { *(vf_u *) p = x; }
inline vf   splat(float x)          { return x - vf{}; }

inline vf select(vi mask, vf a, vf b) { return (vf) (((vi) a & mask) | ((vi) b & ~mask)); }
inline vf max(vf a, vf b)             { return select(a > b, a, b); }
inline vf min(vf a, vf b)             { return select(a < b, a, b); }

#if defined(__clang__)
#define RAZOR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RAZOR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

#if RAZOR_LANES == 16
#define RAZOR_ZIP_LO 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RAZOR_ZIP_HI 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif RAZOR_LANES == 8
#define RAZOR_ZIP_LO 0, 8, 1, 9, 2, 10, 3, 11
#define RAZOR_ZIP_HI 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RAZOR_ZIP_LO 0, 4, 1, 5
#define RAZOR_ZIP_HI 2, 6, 3, 7
#endif

// after log2(W) steps of zipping a vector with itself each lane has met all others
inline float reduce_max(vf x) {
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
        x = max(RAZOR_SHUFFLE(x, x, RAZOR_ZIP_LO), RAZOR_SHUFFLE(x, x, RAZOR_ZIP_HI));
    }

    return x[0];
}

inline float reduce_min(vf x) { return -reduce_max(-x); }

inline float reduce_sum(vf x) {
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
        x = RAZOR_SHUFFLE(x, x, RAZOR_ZIP_LO) + RAZOR_SHUFFLE(x, x, RAZOR_ZIP_HI);
    }

    return x[0];
}

// e^x for x <= 0, 0 below the normal numbers
inline vf exp_neg(vf x) {
    const vf round = splat(12582912.0f); // 1.5*2^23: what is added to it is rounded to an integer

    const vf n = (x*1.44269504088896341f + round) - round;

    // ln(2) in two parts, so that the rest is exact
    vf r = x - n*0.693359375f;
    r    = r + n*2.12194440054690583e-4f;

    // its Taylor series
    vf y = splat(1.0f/5040.0f);
    y = y*r + 1.0f/720.0f;
    y = y*r + 1.0f/120.0f;
    y = y*r + 1.0f/24.0f;
    y = y*r + 1.0f/6.0f;
    y = y*r + 0.5f;
    y = y*r + 1.0f;
    y = y*r + 1.0f;

    const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;

    return select(x > -87.0f, y*(vf) exponent, vf{});
}

//
// rows -> F32
//

// W elements of a row, for types whose elements are stored one by one
struct row_f32 {
    static constexpr int bytes = 4;
    static vf load(const char * src, int i) { return ::load((const float *) src + i); }
};

struct row_f16 {
    static constexpr int bytes = 2;
    static vf load(const char * src, int i) { return RAZOR_LOAD_F16((const uint16_t *) src + i); }
};

struct row_bf16 {
    static constexpr int bytes = 2;
    static vf load(const char * src, int i) { return (vf) (RAZOR_LOAD_U16((const uint16_t *) src + i) << 16); }
};

// f(row_...) for these types; returns false for the others, whose rows have to be converted as a whole
template<typename F>
inline bool read_in_place(razor_attn_format format, const F & f) {
    switch (format) {
        case RAZOR_ROWS_F32:  f(row_f32  {}); return true;
        case RAZOR_ROWS_F16:  f(row_f16  {}); return true;
        case RAZOR_ROWS_BF16: f(row_bf16 {}); return true;
        default: return false;
    }
}

// blocks of 32: an F16 factor, then bytes
inline void rows_q8_0(const char * src, float * dst, int n) {
    for (int i = 0; i < n; i += 32, src += 34) {
        const float d = RAZOR_F16((const uint16_t *) src);
        for (int j = 0; j < 32; j += W) {
            store(dst + i + j, __builtin_convertvector(RAZOR_LOAD_I8(src + 2 + j), vf)*d);
        }
    }
}

// blocks of 32: an F16 factor, then 16 bytes with two numbers each, the first half and the second
inline void rows_q4_0(const char * src, float * dst, int n) {
    for (int i = 0; i < n; i += 32, src += 18) {
        const float d = RAZOR_F16((const uint16_t *) src);
        for (int j = 0; j < 16; j += W) {
            const vi x = RAZOR_LOAD_U8(src + 2 + j);
            store(dst + i + j,      __builtin_convertvector((x & 15) - 8, vf)*d);
            store(dst + i + j + 16, __builtin_convertvector((x >> 4) - 8, vf)*d);
        }
    }
}

inline void read_row(const razor_attn_rows & rows, const char * src, float * dst, int n) {
    const auto read = [&](auto row) {
        for (int i = 0; i < n; i += W) {
            store(dst + i, row.load(src, i));
        }
    };
    if (read_in_place(rows.format, read)) {
        return;
    }

    switch (rows.format) {
        case RAZOR_ROWS_Q8_0: rows_q8_0(src, dst, n); break;
        case RAZOR_ROWS_Q4_0: rows_q4_0(src, dst, n); break;
        default: rows.to_float(src, dst, n); break;
    }
}

// n_rows from cell c0 on; the rows of cells that no token sees may hold anything
inline void read_rows(const razor_attn_rows & rows, int64_t c0, int n_rows, const float * live, float * dst, int n) {
    const char * src = rows.data + c0*rows.row_bytes;

    for (int c = 0; c < n_rows; ++c, src += rows.row_bytes, dst += n) {
        if (live[c] != -__builtin_inff()) {
            read_row(rows, src, dst, n);
        } else {
            for (int d = 0; d < n; d += W) {
                store(dst + d, vf{});
            }
        }
    }
}

//
// transpose
//

// indices of a shuffle: numbers i, j, k and l of the lane of 128 bits that begins at number n; the same of each lane
#define RAZOR_LANE(n, i, j, k, l) (n) + (i), (n) + (j), (n) + (k), (n) + (l)

#if RAZOR_LANES == 16
#define RAZOR_EACH_LANE(...) RAZOR_LANE(0, __VA_ARGS__), RAZOR_LANE(4, __VA_ARGS__), RAZOR_LANE(8, __VA_ARGS__), RAZOR_LANE(12, __VA_ARGS__)
#elif RAZOR_LANES == 8
#define RAZOR_EACH_LANE(...) RAZOR_LANE(0, __VA_ARGS__), RAZOR_LANE(4, __VA_ARGS__)
#else
#define RAZOR_EACH_LANE(...) RAZOR_LANE(0, __VA_ARGS__)
#endif

// lanes i and j, counted over both vectors of a shuffle
#define RAZOR_TWO_LANES(i, j) RAZOR_LANE(4*(i), 0, 1, 2, 3), RAZOR_LANE(4*(j), 0, 1, 2, 3)

// exchange lane j of vector 4*i + k with lane i of vector 4*j + k
inline void transpose_lanes(vf * a) {
#if RAZOR_LANES == 16
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        const vf b0 = RAZOR_SHUFFLE(a[k + 0], a[k +  4], RAZOR_TWO_LANES(0, 1), RAZOR_TWO_LANES(4, 5));
        const vf b1 = RAZOR_SHUFFLE(a[k + 0], a[k +  4], RAZOR_TWO_LANES(2, 3), RAZOR_TWO_LANES(6, 7));
        const vf b2 = RAZOR_SHUFFLE(a[k + 8], a[k + 12], RAZOR_TWO_LANES(0, 1), RAZOR_TWO_LANES(4, 5));
        const vf b3 = RAZOR_SHUFFLE(a[k + 8], a[k + 12], RAZOR_TWO_LANES(2, 3), RAZOR_TWO_LANES(6, 7));

        a[k +  0] = RAZOR_SHUFFLE(b0, b2, RAZOR_TWO_LANES(0, 2), RAZOR_TWO_LANES(4, 6));
        a[k +  4] = RAZOR_SHUFFLE(b0, b2, RAZOR_TWO_LANES(1, 3), RAZOR_TWO_LANES(5, 7));
        a[k +  8] = RAZOR_SHUFFLE(b1, b3, RAZOR_TWO_LANES(0, 2), RAZOR_TWO_LANES(4, 6));
        a[k + 12] = RAZOR_SHUFFLE(b1, b3, RAZOR_TWO_LANES(1, 3), RAZOR_TWO_LANES(5, 7));
    }
#elif RAZOR_LANES == 8
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        const vf b = a[k];

        a[k + 0] = RAZOR_SHUFFLE(b, a[k + 4], RAZOR_TWO_LANES(0, 2));
        a[k + 4] = RAZOR_SHUFFLE(b, a[k + 4], RAZOR_TWO_LANES(1, 3));
    }
#else
    (void) a;
#endif
}

// [W][n] -> [n][W] in columns of a matrix with rows of ld
template<typename row>
inline void transpose(const char * src, size_t row_bytes, int n, float * dst, int ld) {
    for (int i = 0; i < n; i += W) {
        vf a[W], b[W];

#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
            a[j] = row::load(src + j*row_bytes, i);
        }

        // transpose 4x4 numbers in each lane of 128 bits, then exchange lanes, which takes slower shuffles
#pragma GCC unroll 4
        for (int j = 0; j < W; j += 4) {
            b[j + 0] = RAZOR_SHUFFLE(a[j + 0], a[j + 1], RAZOR_EACH_LANE(0, W + 0, 1, W + 1));
            b[j + 1] = RAZOR_SHUFFLE(a[j + 0], a[j + 1], RAZOR_EACH_LANE(2, W + 2, 3, W + 3));
            b[j + 2] = RAZOR_SHUFFLE(a[j + 2], a[j + 3], RAZOR_EACH_LANE(0, W + 0, 1, W + 1));
            b[j + 3] = RAZOR_SHUFFLE(a[j + 2], a[j + 3], RAZOR_EACH_LANE(2, W + 2, 3, W + 3));

            a[j + 0] = RAZOR_SHUFFLE(b[j + 0], b[j + 2], RAZOR_EACH_LANE(0, 1, W + 0, W + 1));
            a[j + 1] = RAZOR_SHUFFLE(b[j + 0], b[j + 2], RAZOR_EACH_LANE(2, 3, W + 2, W + 3));
            a[j + 2] = RAZOR_SHUFFLE(b[j + 1], b[j + 3], RAZOR_EACH_LANE(0, 1, W + 0, W + 1));
            a[j + 3] = RAZOR_SHUFFLE(b[j + 1], b[j + 3], RAZOR_EACH_LANE(2, 3, W + 2, W + 3));
        }
        transpose_lanes(a);

#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
            store(dst + (i + j)*ld, a[j]);
        }
    }
}

//
// products
//

// The rows that a product prefetches in its loop; if data is nullptr, it prefetches nothing.
//
// The hardware does not prefetch many short rows. The requests are spread over the loop, because a core can wait for a few of
// them only, and the rows go to L2: rows that are a power of two apart share a few sets of L1, and would displace each other.
struct next_rows {
    const char * data;
    size_t       row_bytes;
    size_t       n_bytes; // of a row
};

// the rows of the tile from cell c0 on
inline next_rows get_next_rows(const razor_attn_rows & rows, int64_t c0) {
    return { rows.data + c0*rows.row_bytes, rows.row_bytes, rows.n_bytes };
}

// C [MR, NV*W] = A [MR, n] * B [n, NV*W], or added to C; B starts at column col of rows of ldb bytes
template<typename row_b, int MR, int NV>
inline void product_block(int n, const float * a, int lda, const char * b, size_t ldb, int col, float * c, int ldc, bool add, next_rows next) {
    vf acc[MR][NV];

#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            acc[i][j] = add ? load(c + i*ldc + j*W) : vf{};
        }
    }

    int due = 0; // spreads TC prefetched rows evenly over n steps

    for (int k = 0; k < n; ++k, b += ldb) {
        vf row[NV];

#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            row[j] = row_b::load(b, col + j*W);
        }
        if (next.data) {
            for (due += TC; due >= n; due -= n, next.data += next.row_bytes) {
                for (size_t j = 0; j < next.n_bytes; j += 64) {
                    __builtin_prefetch(next.data + j, 0, 2);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
            const vf x = splat(a[i*lda + k]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
                acc[i][j] += x*row[j];
            }
        }
    }

#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            store(c + i*ldc + j*W, acc[i][j]);
        }
    }
}

template<typename row_b, int NV>
inline void product_columns(int rows, int n, const float * a, int lda, const char * b, size_t ldb, int col, float * c, int ldc, bool add, next_rows next) {
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        product_block<row_b, 4, NV>(n, a + i*lda, lda, b, ldb, col, c + i*ldc, ldc, add, next);
        next.data = nullptr;
    }
    switch (rows - i) {
        case 3: product_block<row_b, 3, NV>(n, a + i*lda, lda, b, ldb, col, c + i*ldc, ldc, add, next); break;
        case 2: product_block<row_b, 2, NV>(n, a + i*lda, lda, b, ldb, col, c + i*ldc, ldc, add, next); break;
        case 1: product_block<row_b, 1, NV>(n, a + i*lda, lda, b, ldb, col, c + i*ldc, ldc, add, next); break;
    }
}

// C [rows, columns] = A [rows, n] * B [n, columns], or added to C; the first block prefetches the next rows
template<typename row_b>
inline void product(int rows, int columns, int n, const float * a, int lda, const char * b, size_t ldb, float * c, int ldc, bool add, next_rows next) {
    constexpr int NV = RAZOR_REGISTERS >= 32 ? 4 : 2;

    int j = 0;
    for (; j + NV*W <= columns; j += NV*W) {
        product_columns<row_b, NV>(rows, n, a, lda, b, ldb, j, c + j, ldc, add, next);
        next.data = nullptr;
    }
    for (; j < columns; j += W) {
        product_columns<row_b, 1>(rows, n, a, lda, b, ldb, j, c + j, ldc, add, next);
        next.data = nullptr;
    }
}

//
// attention
//

// s becomes tanh(s)*cap
inline void soft_cap_row(float * s, float cap) {
    for (int c = 0; c < TC; c += W) {
        const vf x = load(s + c);
        const vf e = exp_neg(min(x, -x)*2.0f);
        const vf y = (1.0f - e)/(1.0f + e)*cap;
        store(s + c, select(x < 0.0f, -y, y));
    }
}

// softmax of a tile's scores [TC] goes on: s becomes e^(s - m)
inline void softmax_row(float * s, const float * mask, float slope, float & m, float & l, float * o, int d_v) {
    vf top = splat(m);
    for (int c = 0; c < TC; c += W) {
        const vf x = load(s + c) + load(mask + c)*slope;
        store(s + c, x);
        top = max(top, x);
    }

    const float m_new = reduce_max(top);

    if (m_new == -__builtin_inff()) {
        for (int c = 0; c < TC; c += W) {
            store(s + c, vf{});
        }
        return;
    }

    if (m_new > m) {
        const float scale = m == -__builtin_inff() ? 0.0f : exp_neg(splat(m - m_new))[0];
        l *= scale;
        for (int d = 0; d < d_v; d += W) {
            store(o + d, load(o + d)*scale);
        }
        m = m_new;
    }

    vf sum = vf{};
    for (int c = 0; c < TC; c += W) {
        const vf x = exp_neg(load(s + c) - m_new);
        store(s + c, x);
        sum += x;
    }
    l += reduce_sum(sum);
}

// sums over cells, relative to e^m, are added to others
__attribute__((noinline)) void merge(float & m_all, float & l_all, float * o_all, float m, float l, const float * o, int d_v) {
    if (m == -__builtin_inff()) {
        return;
    }

    const float m_new = m_all > m ? m_all : m;
    const float f_all = m_all == -__builtin_inff() ? 0.0f : exp_neg(splat(m_all - m_new))[0];
    const float f     = exp_neg(splat(m - m_new))[0];

    for (int d = 0; d < d_v; d += W) {
        store(o_all + d, load(o_all + d)*f_all + load(o + d)*f);
    }
    l_all = l_all*f_all + l*f;
    m_all = m_new;
}

// the sum gets another logit, whose value is 0
void add_sink(float & m, float & l, float * o, float sink, int d_v) {
    const float m_new = m > sink ? m : sink;
    const float f     = m == -__builtin_inff() ? 0.0f : exp_neg(splat(m - m_new))[0];

    for (int d = 0; d < d_v; d += W) {
        store(o + d, load(o + d)*f);
    }
    l = l*f + exp_neg(splat(sink - m_new))[0];
    m = m_new;
}

void clear(float & m, float & l, float * o, int d_v) {
    for (int d = 0; d < d_v; d += W) {
        store(o + d, vf{});
    }
    m = -__builtin_inff();
    l = 0.0f;
}

void divide(float * dst, const float * o, float l, int d_v) {
    const float factor = l > 0.0f ? 1.0f/l : 0.0f;
    for (int d = 0; d < d_v; d += W) {
        store(dst + d, load(o + d)*factor);
    }
}

void merge_parts(const razor_attn_task & t) {
    const int d_v = t.d_v;

    float m, l;
    clear(m, l, t.out, d_v);

    for (int64_t i = 0; i < t.n_parts; ++i) {
        const float * part = t.parts + i*(d_v + 2);
        merge(m, l, t.out, part[d_v], part[d_v + 1], part, d_v);
    }

    if (t.sinks) {
        add_sink(m, l, t.out, *t.sinks, d_v);
    }

    divide(t.out, t.out, l, d_v);
}

void attention(const razor_attn_task & t, float * scratch) {
    if (t.parts) {
        merge_parts(t);
        return;
    }

    const int n_gqa  = t.n_gqa;
    const int n_rows = t.n_tokens*n_gqa;
    const int d_k    = t.d_k;
    const int d_v    = t.d_v;

    // see razor_attn_scratch()
    float * q    = scratch;
    float * k    = q    + n_rows*d_k;
    float * kt   = k    + W*d_k;
    float * v    = kt; // after K
    float * s    = kt   + TC*(d_k > d_v ? d_k : d_v);
    float * o    = s    + n_rows*TC;
    float * mask = o    + n_rows*d_v;
    float * live = mask + t.n_tokens*TC;
    float * m    = live + TC;
    float * l    = m    + n_rows;

    // of all chunks before
    float * o_all = l     + n_rows;
    float * m_all = o_all + n_rows*d_v;
    float * l_all = m_all + n_rows;

    const float scale = t.cap != 0.0f ? t.scale/t.cap : t.scale;

    for (int i = 0; i < n_rows; ++i) {
        const float * src = t.q + (i / n_gqa)*t.q_token + (i % n_gqa)*t.q_head;
        for (int d = 0; d < d_k; d += W) {
            store(q + i*d_k + d, load(src + d)*scale);
        }
        clear(m[i], l[i], o + i*d_v, d_v);
        clear(m_all[i], l_all[i], o_all + i*d_v, d_v);
    }

    int64_t chunk_end = t.cell1 - t.cell0 > t.chunk ? t.cell0 + t.chunk : t.cell1;

    for (int64_t c0 = t.cell0; c0 < t.cell1; c0 += TC) {
        if (c0 >= chunk_end) {
            for (int i = 0; i < n_rows; ++i) {
                merge(m_all[i], l_all[i], o_all + i*d_v, m[i], l[i], o + i*d_v, d_v);
                clear(m[i], l[i], o + i*d_v, d_v);
            }
            chunk_end += t.chunk;
        }

        const int n = t.cell1 - c0 < TC ? t.cell1 - c0 : TC;

        // the mask, and the cells that any token sees
        vf any   = splat(-__builtin_inff());
        vf worst = splat(0.0f);
        for (int c = 0; c < TC; c += W) {
            vf all = splat(-__builtin_inff());
            for (int i = 0; i < t.n_tokens; ++i) {
                const uint16_t * src = t.mask + i*t.mask_token + c0 + c;

                vf x;
                if (c + W <= n) {
                    x = RAZOR_LOAD_F16(src);
                } else {
                    uint16_t part[W];
                    for (int j = 0; j < W; ++j) {
                        part[j] = c + j < n ? src[j] : 0xfc00; // -inf
                    }
                    x = RAZOR_LOAD_F16(part);
                }
                store(mask + i*TC + c, x);
                all = max(all, x);
            }
            store(live + c, all);
            any   = max(any, all);
            worst = min(worst, all);
        }
        if (reduce_max(any) == -__builtin_inff()) {
            continue;
        }

        // all rows of the tile may be read
        const bool whole = reduce_min(worst) > -__builtin_inff();

        for (int c = 0; c < TC; c += W) {
            const bool in_place = whole && read_in_place(t.k.format, [&](auto row) {
                transpose<decltype(row)>(t.k.data + (c0 + c)*t.k.row_bytes, t.k.row_bytes, d_k, kt + c, TC);
            });
            if (!in_place) {
                read_rows(t.k, c0 + c, W, live + c, k, d_k);
                transpose<row_f32>((const char *) k, d_k*sizeof(float), d_k, kt + c, TC);
            }
        }

        product<row_f32>(n_rows, TC, d_k, q, d_k, (const char *) kt, TC*sizeof(float), s, TC, false, get_next_rows(t.k, c0 + TC));

        for (int i = 0; i < n_rows; ++i) {
            if (t.cap != 0.0f) {
                soft_cap_row(s + i*TC, t.cap);
            }
            softmax_row(s + i*TC, mask + (i / n_gqa)*TC, t.slopes ? t.slopes[i % n_gqa] : 1.0f, m[i], l[i], o + i*d_v, d_v);
        }

        // rows that are read once or twice need not be stored as F32
        const bool in_place = whole && n_rows <= 8 && read_in_place(t.v.format, [&](auto row) {
            product<decltype(row)>(n_rows, d_v, TC, s, TC, t.v.data + c0*t.v.row_bytes, t.v.row_bytes, o, d_v, true, get_next_rows(t.v, c0 + TC));
        });
        if (!in_place) {
            read_rows(t.v, c0, TC, live, v, d_v);
            product<row_f32>(n_rows, d_v, TC, s, TC, (const char *) v, d_v*sizeof(float), o, d_v, true, get_next_rows(t.v, c0 + TC));
        }
    }

    for (int i = 0; i < n_rows; ++i) {
        float * dst = t.out + (i / n_gqa)*t.out_token + (i % n_gqa)*t.out_head;

        if (t.partial) {
            for (int d = 0; d < d_v; d += W) {
                store(dst + d, load(o + i*d_v + d));
            }
            dst[d_v + 0] = m[i];
            dst[d_v + 1] = l[i];
        } else {
            merge(m_all[i], l_all[i], o_all + i*d_v, m[i], l[i], o + i*d_v, d_v);
            if (t.sinks) {
                add_sink(m_all[i], l_all[i], o_all + i*d_v, t.sinks[i % n_gqa], d_v);
            }
            divide(dst, o_all + i*d_v, l_all[i], d_v);
        }
    }
}

} // namespace
