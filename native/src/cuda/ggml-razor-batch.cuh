#pragma once

// Attention of a batch on CUDA, what its kernels share: ggml-razor-hopper.cu for compute capability 9.0, ggml-razor-ampere.cu for
// 8.0 and later.
//
// The query rows of a KV head (its query heads, of all tokens) are cut into blocks of 128, and the tiles of 128 cells of all KV
// heads of a layer, one after the other, into as many ranges as there is room for at once for each block: whoever works on the
// same range reads the same rows of K and V at about the same time, so that they come from the L2 cache. Heads that two
// ranges share are added up by a second kernel. There is no mask: each cell says which token is the first to see it, and only
// tiles that some tokens see and others do not are looked at cell by cell.

#include "../ggml-razor.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#define GGML_RAZOR_ROWS 128 // query rows that are looked at together: tokens, and the query heads of a KV head

struct razor_batch_args {
    const float * q; // [n_tokens][n_head][d], in floats:
    int64_t       q_token;
    int64_t       q_head;
    bool          q_aligned; // to 4 floats

    const half * k; // [n_rows][d]
    const half * v;
    int64_t      n_rows;

    // retrieval heads, local heads
    int         n_heads[2]; // KV heads
    int         n_kv[2];
    int         head_rows[2];
    int         first_row[2];
    const int * since[2];

    const float * bias;  // of local heads
    const int2  * tiles; // smallest and largest `since`

    int   n_tokens;
    int   n_gqa;
    float scale; // for powers of 2

    float * out; // [n_tokens][n_head][d]

    uint8_t heads[GGML_RAZOR_ATTN_MAX_KV]; // KV heads, retrieval heads first

    // set by razor_batch_plan()
    int n_blocks; // of query rows
    int n_ranges; // of the tiles of all heads
    int n_tiles;  // of all heads

    float  * parts; // [2*n_blocks*n_ranges][GGML_RAZOR_ROWS][d]
    float2 * sums;  // the same without d: maximum and sum of powers
};

// compute capability 9.0; false: the driver gives no descriptor of the cache
bool razor_hopper_attn(const razor_batch_args & args, int d, cudaStream_t stream);

#define RAZOR_AMPERE_AT_ONCE 2 // blocks of threads of a multiprocessor

// compute capability 8.0 and later; slow_sums: sums of products in F32 take twice as long as in F16
void razor_ampere_attn(const razor_batch_args & args, int d, bool slow_sums, cudaStream_t stream);

static constexpr int   RAZOR_CHUNK = 64; // numbers of a row that lie together in shared memory: 128 bytes
static constexpr float RAZOR_LOG2E = 1.4426950408889634f;

static __host__ __device__ __forceinline__ int razor_head_tiles(const razor_batch_args & args, int group) {
    return (args.n_kv[group] + GGML_RAZOR_TILE - 1)/GGML_RAZOR_TILE;
}

// returns the number of parts that are kept in between; n_at_once: blocks of threads that the device runs at once
static inline int razor_batch_plan(razor_batch_args & args, int n_at_once) {
    args.n_tiles  = args.n_heads[0]*razor_head_tiles(args, 0) + args.n_heads[1]*razor_head_tiles(args, 1);
    args.n_blocks = (args.n_tokens*args.n_gqa + GGML_RAZOR_ROWS - 1)/GGML_RAZOR_ROWS;
    args.n_ranges = std::max(1, std::min(n_at_once/args.n_blocks, args.n_tiles));

    return 2*args.n_blocks*args.n_ranges;
}

// the first tile of a range
static __device__ __forceinline__ int razor_range(const razor_batch_args & args, int i) {
    return (int64_t) i*args.n_tiles/args.n_ranges;
}

// consecutive tiles of one KV head
struct razor_piece {
    int group;
    int head;  // in the order of args.heads
    int row;   // the first of the head
    int tiles; // place of its tiles in args.tiles
    int first;
    int end;
    int n;     // tiles of the head
};

static __device__ __forceinline__ razor_piece razor_piece_at(const razor_batch_args & args, int at, int end) {
    const int n_retrieval = razor_head_tiles(args, 0);
    const int all         = args.n_heads[0]*n_retrieval;

    razor_piece res;

    res.group = at < all ? 0 : 1;
    res.n     = razor_head_tiles(args, res.group);
    res.tiles = res.group == 0 ? 0 : n_retrieval;

    const int rest = at - (res.group == 0 ? 0 : all);
    const int head = rest/res.n;

    res.head  = head + (res.group == 0 ? 0 : args.n_heads[0]);
    res.row   = args.first_row[res.group] + head*args.head_rows[res.group];
    res.first = rest - head*res.n;
    res.end   = min(res.n, res.first + end - at);

    return res;
}

// an address in shared memory, for instructions
static __device__ __forceinline__ uint32_t razor_shared(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ uint32_t razor_pair(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);

    return (uint32_t) __half_as_ushort(__low2half(h)) | (uint32_t) __half_as_ushort(__high2half(h)) << 16;
}

// A thread's numbers of M tiles of 16 query rows and T cells, as matrix instructions have them: of each tile two rows, lane/4 and
// 8 more, and of each 8 columns the 2 that begin at 2*(lane % 4); 4 numbers each, first those of the first row.
template <int D, int T, int M>
struct razor_batch_rows {
    float    s[M][T/2]; // scores, then their powers
    uint32_t p[M][T/4]; // pairs of F16
    float    o[M][D/2];

    float max  [M][2];
    float sum  [M][2]; // of this thread's columns
    int   token[M][2];

    // first: the first of the block's rows that the thread has
    __device__ __forceinline__ void place(const razor_batch_args & args, int block, int first) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                token[m][r] = (block*GGML_RAZOR_ROWS + first + 16*m + 8*r)/args.n_gqa;
            }
        }
    }

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < D/2; ++i) {
                o[m][i] = 0.0f;
            }
            max[m][0] = max[m][1] = -INFINITY;
            sum[m][0] = sum[m][1] = 0.0f;
        }
    }

    // scores of cells that these tokens do not see
    __device__ __forceinline__ void hide(const razor_batch_args & args, const razor_piece & piece, int cell) {
        const int   * since = args.since[piece.group];
        const float * bias  = piece.group == 1 ? args.bias : nullptr;
        const int     n_kv  = args.n_kv[piece.group];

#pragma unroll
        for (int i = 0; i < T/2; i += 4) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int c = cell + 2*i + 2*(threadIdx.x % 4) + j;

                const int   first = c < n_kv ? since[c] : GGML_RAZOR_NEVER;
                const float add   = bias && c < n_kv ? bias[c]*RAZOR_LOG2E : 0.0f;
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float & x = s[m][i + 2*r + j];

                        x = first <= token[m][r] ? x + add : -INFINITY; // what a hidden cell has can be anything
                    }
                }
            }
        }
    }

    // factor: what the sums before have to be multiplied with
    __device__ __forceinline__ void powers(float (&factor)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float most = max[m][r];
#pragma unroll
                for (int i = 0; i < T/2; i += 4) {
                    most = fmaxf(most, fmaxf(s[m][i + 2*r], s[m][i + 2*r + 1]));
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));

                const float base = most == -INFINITY ? 0.0f : most; // nothing is seen so far

                factor[m][r] = exp2f(max[m][r] - base);
                max   [m][r] = most;

                float add = 0.0f;
#pragma unroll
                for (int i = 0; i < T/2; i += 4) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float & x = s[m][i + 2*r + j];

                        x = exp2f(x - base);
                        add += x;
                    }
                }
                sum[m][r] = sum[m][r]*factor[m][r] + add;
            }
        }
    }

    __device__ __forceinline__ void scale(const float (&factor)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < D/2; ++i) {
                o[m][i] *= factor[m][i/2 % 2];
            }
        }
    }

    __device__ __forceinline__ void pack() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < T/4; ++i) {
                p[m][i] = razor_pair(s[m][2*i], s[m][2*i + 1]);
            }
        }
    }

    // to the output, or to the parts that are added up later
    __device__ __forceinline__ void store(const razor_batch_args & args, int head_kv, int block, int first, bool whole, int part) const {
        const int lane   = threadIdx.x % 32;
        const int n_head = (args.n_heads[0] + args.n_heads[1])*args.n_gqa;

#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float l = sum[m][r];
                l += __shfl_xor_sync(0xffffffff, l, 1);
                l += __shfl_xor_sync(0xffffffff, l, 2);

                const int row = first + 16*m + 8*r;
                const int at  = block*GGML_RAZOR_ROWS + row;

                float * out;
                float   factor = 1.0f;

                if (whole) {
                    if (at >= args.n_tokens*args.n_gqa) {
                        continue;
                    }
                    out    = args.out + ((size_t) token[m][r]*n_head + head_kv*args.n_gqa + at % args.n_gqa)*D;
                    factor = l > 0.0f ? 1.0f/l : 0.0f;
                } else {
                    const size_t slot = (size_t) part*GGML_RAZOR_ROWS + row;

                    out = args.parts + slot*D;
                    if (lane % 4 == 0) {
                        args.sums[slot] = make_float2(max[m][r], l);
                    }
                }

#pragma unroll
                for (int i = 0; i < D/2; i += 4) {
                    ((float2 *) out)[i + lane % 4] = make_float2(o[m][i + 2*r]*factor, o[m][i + 2*r + 1]*factor);
                }
            }
        }
    }
};

// query rows into shared memory: the 8 pieces of 16 bytes of a chunk are swizzled by the row
template <int D>
static __device__ __forceinline__ void razor_batch_queries(
        half (*q)[GGML_RAZOR_ROWS][RAZOR_CHUNK], const razor_batch_args & args, int head_kv, int block, int first, int n, int thread, int n_threads) {
    const int n_rows = args.n_tokens*args.n_gqa;

    for (int i = thread; i < n*D/8; i += n_threads) {
        const int row  = first + i/(D/8);
        const int part = i % (D/8);

        float x[8] = { 0.0f };

        const int at = block*GGML_RAZOR_ROWS + row;
        if (at < n_rows) {
            const float * src = args.q + at/args.n_gqa*args.q_token + (head_kv*args.n_gqa + at % args.n_gqa)*args.q_head + part*8;

            if (args.q_aligned) {
                const float4 a = ((const float4 *) src)[0];
                const float4 b = ((const float4 *) src)[1];
                x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w;
                x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
            } else {
                for (int j = 0; j < 8; ++j) {
                    x[j] = src[j];
                }
            }
        }

        uint32_t h[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            h[j] = razor_pair(x[2*j]*args.scale, x[2*j + 1]*args.scale);
        }
        *(uint4 *) &q[part/8][row][(part ^ row) % 8*8] = make_uint4(h[0], h[1], h[2], h[3]);
    }
}

// the parts of a KV head and a block of query rows -> the output
template <int D>
static __global__ void razor_batch_add(const __grid_constant__ razor_batch_args args) {
    const int block = blockIdx.x;
    const int head  = blockIdx.y;

    const int group = head < args.n_heads[0] ? 0 : 1;
    const int n     = razor_head_tiles(args, group);
    const int start = group == 0 ? head*n : args.n_heads[0]*razor_head_tiles(args, 0) + (head - args.n_heads[0])*n;

    auto range_of = [&](int tile) { return (int) (((int64_t) (tile + 1)*args.n_ranges - 1)/args.n_tiles); };

    const int first = range_of(start);
    const int last  = range_of(start + n - 1);
    if (first == last) {
        return;
    }

    const int row = blockIdx.z*blockDim.y + threadIdx.y;
    const int at  = block*GGML_RAZOR_ROWS + row;
    if (at >= args.n_tokens*args.n_gqa) {
        return;
    }

    auto slot = [&](int range) {
        return (size_t) (2*(range*args.n_blocks + block) + (start > razor_range(args, range)))*GGML_RAZOR_ROWS + row;
    };

    float max = -INFINITY;
    for (int i = first; i <= last; ++i) {
        max = fmaxf(max, args.sums[slot(i)].x);
    }

    float4 res = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float  sum = 0.0f;

    for (int i = first; i <= last; ++i) {
        const float2 part = args.sums[slot(i)];
        if (part.x == -INFINITY) {
            continue;
        }

        const float  factor = exp2f(part.x - max);
        const float4 x      = ((const float4 *) (args.parts + slot(i)*D))[threadIdx.x];

        sum   += factor*part.y;
        res.x += factor*x.x;
        res.y += factor*x.y;
        res.z += factor*x.z;
        res.w += factor*x.w;
    }

    const float factor = sum > 0.0f ? 1.0f/sum : 0.0f;
    const int   n_head = (args.n_heads[0] + args.n_heads[1])*args.n_gqa;

    float * out = args.out + ((size_t) (at/args.n_gqa)*n_head + args.heads[head]*args.n_gqa + at % args.n_gqa)*D;

    ((float4 *) out)[threadIdx.x] = make_float4(res.x*factor, res.y*factor, res.z*factor, res.w*factor);
}

template <int D>
static void razor_batch_add_parts(const razor_batch_args & args, cudaStream_t stream) {
    if (args.n_ranges > 1) {
        const dim3 rows(D/4, 1024/D, 1);
        const dim3 grid(args.n_blocks, args.n_heads[0] + args.n_heads[1], GGML_RAZOR_ROWS/rows.y);

        razor_batch_add<D><<<grid, rows, 0, stream>>>(args);
    }
}
