#pragma once

// attention of a batch on CUDA: the part that its two kernels share, ggml-razor-hopper.cu for compute capability 9.0 and
// ggml-razor-ampere.cu for 8.0 and later
//
// the query rows of a KV head (the query heads of all tokens) are divided into blocks of BLOCK_M
// the tiles of all KV heads of a layer, one after the other, are divided into as many ranges as can run at the same time for each
// block of query rows: thread blocks with the same range read the same rows of K and V at about the same time, from the L2 cache
// a second kernel combines the partial results of heads that more than one range contains
//
// without a mask: each cell stores the first token that sees it, and only tiles that are seen in part are masked

#include "../ggml-razor.h"

#include "ggml-cuda/common.cuh"
#include "ggml-cuda/cp-async.cuh"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

struct razor_batch_args {
    const float * q; // [n_tokens][n_head][d], strides in floats
    int64_t       q_token;
    int64_t       q_head;
    bool          q_aligned; // all rows are aligned to 16 bytes

    const half * k; // [n_rows][d]
    const half * v;
    int64_t      n_rows;

    // retrieval heads, local heads
    int         n_heads[2]; // KV heads
    int         n_kv[2];
    int         head_rows[2];
    int         first_row[2];
    const int * since[2];

    const float * bias;  // local heads
    const int2  * tiles; // smallest and largest `since` of each tile

    int   n_tokens;
    int   n_gqa;
    float scale; // times log2(e)

    float * out; // [n_tokens][n_head][d]

    uint8_t heads[GGML_RAZOR_ATTN_MAX_KV]; // KV heads, retrieval heads first

    // set by razor_batch_schedule()
    int n_blocks; // blocks of query rows
    int n_ranges; // ranges of tiles
    int n_tiles;  // tiles of all heads

    float  * parts; // [2*n_blocks*n_ranges][BLOCK_M][d] partial results
    float2 * meta;  // [2*n_blocks*n_ranges][BLOCK_M] maximum and sum of their exponentials
};

// compute capability 9.0
// return false if the driver cannot encode a tensor map of the cache
bool razor_hopper_attn(const razor_batch_args & args, int d, cudaStream_t stream);

#define RAZOR_AMPERE_BLOCKS_PER_SM 2

// compute capability 8.0 and later
// f16_acc: accumulate P*V in F16, over the cells of a tile
void razor_ampere_attn(const razor_batch_args & args, int d, bool f16_acc, cudaStream_t stream);

static constexpr int   BLOCK_M       = 128; // query rows of a thread block
static constexpr int   SWIZZLE_WIDTH = 64;  // elements of a row in shared memory: 128 bytes, the width of the swizzle
static constexpr float RAZOR_LOG2E   = 1.4426950408889634f;

static __host__ __device__ __forceinline__ int razor_batch_n_tiles(const razor_batch_args & args, int group) {
    return (args.n_kv[group] + GGML_RAZOR_TILE - 1)/GGML_RAZOR_TILE;
}

// n_resident: number of thread blocks that the device runs at the same time
// return the number of partial results
static inline int razor_batch_schedule(razor_batch_args & args, int n_resident) {
    args.n_tiles  = args.n_heads[0]*razor_batch_n_tiles(args, 0) + args.n_heads[1]*razor_batch_n_tiles(args, 1);
    args.n_blocks = (args.n_tokens*args.n_gqa + BLOCK_M - 1)/BLOCK_M;
    args.n_ranges = std::max(1, std::min(n_resident/args.n_blocks, args.n_tiles));

    return 2*args.n_blocks*args.n_ranges;
}

// return the first tile of a range
static __device__ __forceinline__ int razor_batch_range_begin(const razor_batch_args & args, int i) {
    return (int64_t) i*args.n_tiles/args.n_ranges;
}

// the tiles [first, end) of one KV head
struct razor_segment {
    int group;
    int head;  // index in args.heads
    int row;   // first row of the head
    int tiles; // index of its first tile in args.tiles
    int first;
    int end;
    int n;     // number of tiles of the head
};

// return the segment of a range that starts at tile `at`, the range ends at tile `end`
static __device__ __forceinline__ razor_segment razor_batch_get_segment(const razor_batch_args & args, int at, int end) {
    const int n_retrieval = razor_batch_n_tiles(args, 0);
    const int all         = args.n_heads[0]*n_retrieval;

    razor_segment res;

    res.group = at < all ? 0 : 1;
    res.n     = razor_batch_n_tiles(args, res.group);
    res.tiles = res.group == 0 ? 0 : n_retrieval;

    const int rest = at - (res.group == 0 ? 0 : all);
    const int head = rest/res.n;

    res.head  = head + (res.group == 0 ? 0 : args.n_heads[0]);
    res.row   = args.first_row[res.group] + head*args.head_rows[res.group];
    res.first = rest - head*res.n;
    res.end   = min(res.n, res.first + end - at);

    return res;
}

static __device__ __forceinline__ uint32_t pack_half2(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);

    return (uint32_t) __half_as_ushort(__low2half(h)) | (uint32_t) __half_as_ushort(__high2half(h)) << 16;
}

// the registers of a thread for M_TILES tiles of 16 query rows and BLOCK_N cells, in the layout of mma and wgmma accumulators:
// of each tile the rows lane/4 and lane/4 + 8, of each 8 columns the two at 2*(lane % 4), both columns of the first row first
template <int D, int BLOCK_N, int M_TILES>
struct razor_batch_acc {
    float    s[M_TILES][BLOCK_N/2]; // scores, then their exponentials
    uint32_t p[M_TILES][BLOCK_N/4]; // the exponentials as F16
    float    o[M_TILES][D/2];

    float row_max[M_TILES][2];
    float row_sum[M_TILES][2]; // sum over the columns of this thread
    int   token  [M_TILES][2];

    // first: first row of the thread in the block
    __device__ __forceinline__ void init_tokens(const razor_batch_args & args, int block, int first) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                token[m][r] = (block*BLOCK_M + first + 16*m + 8*r)/args.n_gqa;
            }
        }
    }

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < D/2; ++i) {
                o[m][i] = 0.0f;
            }
            row_max[m][0] = row_max[m][1] = -INFINITY;
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }

    // add the bias to the scores, and set those of cells that the token does not see to -INFINITY
    __device__ __forceinline__ void apply_mask(const razor_batch_args & args, const razor_segment & segment, int cell) {
        const int   * since = args.since[segment.group];
        const float * bias  = segment.group == 1 ? args.bias : nullptr;
        const int     n_kv  = args.n_kv[segment.group];

#pragma unroll
        for (int i = 0; i < BLOCK_N/2; i += 4) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int c = cell + 2*i + 2*(threadIdx.x % 4) + j;

                const int   first = c < n_kv ? since[c] : GGML_RAZOR_NEVER;
                const float add   = bias && c < n_kv ? bias[c]*RAZOR_LOG2E : 0.0f;
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float & x = s[m][i + 2*r + j];

                        x = first <= token[m][r] ? x + add : -INFINITY; // the score of a hidden cell can be NaN
                    }
                }
            }
        }
    }

    // replace the scores by their exponentials, scale_o is the factor for the previous sums
    __device__ __forceinline__ void online_softmax(float (&scale_o)[M_TILES][2]) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float max_new = row_max[m][r];
#pragma unroll
                for (int i = 0; i < BLOCK_N/2; i += 4) {
                    max_new = fmaxf(max_new, fmaxf(s[m][i + 2*r], s[m][i + 2*r + 1]));
                }
                max_new = fmaxf(max_new, __shfl_xor_sync(0xffffffff, max_new, 1));
                max_new = fmaxf(max_new, __shfl_xor_sync(0xffffffff, max_new, 2));

                const float base = max_new == -INFINITY ? 0.0f : max_new; // no cell was visible so far

                scale_o[m][r] = exp2f(row_max[m][r] - base);
                row_max[m][r] = max_new;

                float add = 0.0f;
#pragma unroll
                for (int i = 0; i < BLOCK_N/2; i += 4) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float & x = s[m][i + 2*r + j];

                        x = exp2f(x - base);
                        add += x;
                    }
                }
                row_sum[m][r] = row_sum[m][r]*scale_o[m][r] + add;
            }
        }
    }

    __device__ __forceinline__ void rescale_o(const float (&scale_o)[M_TILES][2]) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < D/2; ++i) {
                o[m][i] *= scale_o[m][i/2 % 2];
            }
        }
    }

    __device__ __forceinline__ void convert_p() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < BLOCK_N/4; ++i) {
                p[m][i] = pack_half2(s[m][2*i], s[m][2*i + 1]);
            }
        }
    }

    // write the output if the segment is the whole head, else a partial result
    __device__ __forceinline__ void store(const razor_batch_args & args, int head_kv, int block, int first, bool whole, int part) const {
        const int lane   = threadIdx.x % 32;
        const int n_head = (args.n_heads[0] + args.n_heads[1])*args.n_gqa;

#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float l = row_sum[m][r];
                l += __shfl_xor_sync(0xffffffff, l, 1);
                l += __shfl_xor_sync(0xffffffff, l, 2);

                const int row = first + 16*m + 8*r;
                const int at  = block*BLOCK_M + row;

                float * out;
                float   scale = 1.0f;

                if (whole) {
                    if (at >= args.n_tokens*args.n_gqa) {
                        continue;
                    }
                    out    = args.out + ((size_t) token[m][r]*n_head + head_kv*args.n_gqa + at % args.n_gqa)*D;
                    scale = l > 0.0f ? 1.0f/l : 0.0f;
                } else {
                    const size_t slot = (size_t) part*BLOCK_M + row;

                    out = args.parts + slot*D;
                    if (lane % 4 == 0) {
                        args.meta[slot] = make_float2(row_max[m][r], l);
                    }
                }

#pragma unroll
                for (int i = 0; i < D/2; i += 4) {
                    ((float2 *) out)[i + lane % 4] = make_float2(o[m][i + 2*r]*scale, o[m][i + 2*r + 1]*scale);
                }
            }
        }
    }
};

// load query rows into shared memory; 16-byte vectors are swizzled: the index of a vector is its column XOR its row, modulo 8
template <int D>
static __device__ __forceinline__ void razor_batch_load_q(
        half (*q)[BLOCK_M][SWIZZLE_WIDTH], const razor_batch_args & args, int head_kv, int block, int first, int n, int thread, int n_threads) {
    const int n_rows = args.n_tokens*args.n_gqa;

    for (int i = thread; i < n*D/8; i += n_threads) {
        const int row  = first + i/(D/8);
        const int part = i % (D/8);

        float x[8] = { 0.0f };

        const int at = block*BLOCK_M + row;
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
            h[j] = pack_half2(x[2*j]*args.scale, x[2*j + 1]*args.scale);
        }
        *(uint4 *) &q[part/8][row][(part ^ row) % 8*8] = make_uint4(h[0], h[1], h[2], h[3]);
    }
}

// combine the partial results of a KV head and a block of query rows
// grid: blocks of query rows, KV heads, rows; block: (d/4, rows)
template <int D>
static __global__ void razor_batch_combine(const __grid_constant__ razor_batch_args args) {
    const int block = blockIdx.x;
    const int head  = blockIdx.y;

    const int group = head < args.n_heads[0] ? 0 : 1;
    const int n     = razor_batch_n_tiles(args, group);
    const int start = group == 0 ? head*n : args.n_heads[0]*razor_batch_n_tiles(args, 0) + (head - args.n_heads[0])*n;

    auto range_of = [&](int tile) { return (int) (((int64_t) (tile + 1)*args.n_ranges - 1)/args.n_tiles); };

    // 1. find the ranges that contain tiles of the head, if there is only one it has written the output
    const int first = range_of(start);
    const int last  = range_of(start + n - 1);
    if (first == last) {
        return;
    }

    const int row = blockIdx.z*blockDim.y + threadIdx.y;
    const int at  = block*BLOCK_M + row;
    if (at >= args.n_tokens*args.n_gqa) {
        return;
    }

    auto slot = [&](int range) {
        return (size_t) (2*(range*args.n_blocks + block) + (start > razor_batch_range_begin(args, range)))*BLOCK_M + row;
    };

    // 2. maximum of the partial results
    float max = -INFINITY;
    for (int i = first; i <= last; ++i) {
        max = fmaxf(max, args.meta[slot(i)].x);
    }

    // 3. weighted sum
    float4 res = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float  sum = 0.0f;

    for (int i = first; i <= last; ++i) {
        const float2 part = args.meta[slot(i)];
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

    // 4. write the output
    const float factor = sum > 0.0f ? 1.0f/sum : 0.0f;
    const int   n_head = (args.n_heads[0] + args.n_heads[1])*args.n_gqa;

    float * out = args.out + ((size_t) (at/args.n_gqa)*n_head + args.heads[head]*args.n_gqa + at % args.n_gqa)*D;

    ((float4 *) out)[threadIdx.x] = make_float4(res.x*factor, res.y*factor, res.z*factor, res.w*factor);
}

template <int D>
static void razor_batch_launch_combine(const razor_batch_args & args, cudaStream_t stream) {
    if (args.n_ranges > 1) {
        const dim3 rows(D/4, 1024/D, 1);
        const dim3 grid(args.n_blocks, args.n_heads[0] + args.n_heads[1], BLOCK_M/rows.y);

        razor_batch_combine<D><<<grid, rows, 0, stream>>>(args);
    }
}
