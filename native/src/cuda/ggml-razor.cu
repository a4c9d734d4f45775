// the operations of ggml-razor.h on CUDA, each of them one launch for all heads of a layer: storing, folding and the attention of one
// token; the attention of a batch is in ggml-razor-hopper.cu and ggml-razor-ampere.cu
//
// with upstream's operations, storing would be two launches, folding twenty, and attention one for each group of heads, plus those
// that gather the queries and outputs
//
// decode is memory-bound: each row of K and V is loaded once for all query heads of its KV head, products and sums are F32, and tiles
// that the token does not see are not loaded
// the cells of a head are split so that all thread blocks run at the same time, a second kernel combines the partial results

#include "ggml-razor.cuh"
#include "ggml-razor-batch.cuh"
#include "../ggml-razor.h"

#include "ggml-cuda/common.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static constexpr int N_WARPS         = 8;
static constexpr int TILE            = 32;         // cells of a warp's tile, one per lane
static constexpr int SMALL_TILE      = 8;          // tile width when there are too few cells to give every warp a full tile
static constexpr int SMALL_MAX_CELLS = N_WARPS*32; // largest number of cells for SMALL_TILE, one per thread
static constexpr int SPLIT_MIN_CELLS = 512;        // heads are only split if they have more cells: a second launch takes time
static constexpr int PREFETCH        = 8;          // loads of a lane in flight

struct razor_attn_args {
    const float * q; // [n_head][d], stride in floats
    int64_t       q_head;
    bool          q_aligned; // all rows are aligned to 16 bytes

    const char * k;
    const char * v;
    int64_t      k_row; // stride in bytes
    int64_t      v_row;

    // retrieval heads, local heads
    const half * mask[2];
    int64_t      first_row[2];
    int64_t      head_rows[2];
    int          n_kv[2];
    int          n_splits[2]; // splits of each head
    int          n_blocks;    // thread blocks of the retrieval heads
    int          n_retrieval; // retrieval heads

    int   split_cells;
    int   n_gqa;
    float scale; // times log2(e)

    float  * out;  // [n_head][max_splits][d]
    float2 * meta; // [n_head][max_splits] maximum and sum of the exponentials, nullptr if out is the output
    int      max_splits;

    uint8_t heads[GGML_RAZOR_ATTN_MAX_KV]; // KV heads, retrieval heads first
};

//
// rows: each lane loads 8 elements of a row
//

template <ggml_type type> struct razor_row;

struct razor_row_16_bits {
    uint4 raw;

    __device__ void load(const char * row, int part) {
        raw = ((const uint4 *) row)[part];
    }

    // return the index of the i-th element in the row
    static __device__ int index(int part, int i) { return 8*part + i; }
};

template <> struct razor_row<GGML_TYPE_F16> : razor_row_16_bits {
    __device__ void get(float (&res)[8]) const {
        const uint32_t u[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            half2 h;
            memcpy(&h, &u[i], sizeof(h));
            const float2 f = __half22float2(h);
            res[2*i + 0] = f.x;
            res[2*i + 1] = f.y;
        }
    }
};

template <> struct razor_row<GGML_TYPE_BF16> : razor_row_16_bits {
    __device__ void get(float (&res)[8]) const {
        const uint32_t u[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[2*i + 0] = __uint_as_float(u[i] << 16);
            res[2*i + 1] = __uint_as_float(u[i] & 0xffff0000u);
        }
    }
};

template <> struct razor_row<GGML_TYPE_Q8_0> {
    uint16_t d;
    uint16_t raw[4];

    __device__ void load(const char * row, int part) {
        const uint16_t * block = (const uint16_t *) (row + (part/4)*sizeof(block_q8_0));
        d = block[0];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            raw[i] = block[1 + 4*(part % 4) + i];
        }
    }

    __device__ void get(float (&res)[8]) const {
        const float f = __half2float(__ushort_as_half(d));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[2*i + 0] = f*(float) (int8_t) (raw[i] & 0xff);
            res[2*i + 1] = f*(float) (int8_t) (raw[i] >> 8);
        }
    }

    static __device__ int index(int part, int i) { return 8*part + i; }
};

template <> struct razor_row<GGML_TYPE_Q4_0> {
    uint16_t d;
    uint16_t raw[2];

    __device__ void load(const char * row, int part) {
        const uint16_t * block = (const uint16_t *) (row + (part/4)*sizeof(block_q4_0));
        d = block[0];
        raw[0] = block[1 + 2*(part % 4) + 0];
        raw[1] = block[1 + 2*(part % 4) + 1];
    }

    // a byte has the elements i and i + 16 of its block
    __device__ void get(float (&res)[8]) const {
        const float    f = __half2float(__ushort_as_half(d));
        const uint32_t u = raw[0] | (uint32_t) raw[1] << 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i + 0] = f*((int) ((u >> 8*i)       & 0xf) - 8);
            res[i + 4] = f*((int) ((u >> (8*i + 4)) & 0xf) - 8);
        }
    }

    static __device__ int index(int part, int i) { return 32*(part/4) + 4*(part % 4) + i % 4 + 16*(i/4); }
};

//
// kernels
//

// sum v[g] over n_lanes neighboring lanes, the result for g is v[0] of the lanes l with l/(n_lanes/G) == g
template <int G, int n_lanes>
static __device__ __forceinline__ void warp_reduce_sum_heads(float (&v)[G], int lane) {
    static_assert(G <= n_lanes, "more heads than lanes");

    int step = n_lanes/2;
#pragma unroll
    for (int n = G; n > 1; n /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < n/2; ++i) {
            const float give = upper ? v[i] : v[i + n/2];
            const float keep = upper ? v[i + n/2] : v[i];
            v[i] = keep + __shfl_xor_sync(0xffffffff, give, step);
        }
    }
#pragma unroll
    for (int s = n_lanes/(2*G); s > 0; s /= 2) {
        v[0] += __shfl_xor_sync(0xffffffff, v[0], s);
    }
}

// attention of one token over one split of a KV head
// G is the number of query heads, which share the rows of K and V, T the number of cells of a warp's tile
// grid: splits of all KV heads, query heads of a KV head/G
template <int D, ggml_type type, int G, int T>
static __global__ void __launch_bounds__(N_WARPS*32, G < 8 ? 2 : 1) razor_attn_split(const razor_attn_args args) {
    constexpr int LANES_PER_ROW = D/8;
    constexpr int ROWS_PER_STEP = 32/LANES_PER_ROW; // rows that a warp loads at a time
    constexpr int STEPS         = T/ROWS_PER_STEP;
    constexpr int UNROLL        = STEPS < PREFETCH ? STEPS : PREFETCH;

    __shared__ float s_tile[N_WARPS][T][G];
    __shared__ float s_max [N_WARPS][G];
    __shared__ float s_sum [N_WARPS][G];
    __shared__ float s_out [N_WARPS][G][D];

    // 1. find the KV head and its cells
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int part = lane % LANES_PER_ROW;

    const int group = (int) blockIdx.x < args.n_blocks ? 0 : 1;
    const int block = blockIdx.x - (group ? args.n_blocks : 0);

    const int n_splits = args.n_splits[group];
    const int n_kv     = args.n_kv[group];
    const int j        = block/n_splits; // index in the group
    const int split    = block - j*n_splits;

    const int head_kv = args.heads[group ? args.n_retrieval + j : j];
    const int head0   = head_kv*args.n_gqa + blockIdx.y*G;
    const int n_heads = min(G, args.n_gqa - (int) blockIdx.y*G);

    const int64_t row0 = args.first_row[group] + j*args.head_rows[group];

    const char * k = args.k + row0*args.k_row;
    const char * v = args.v + row0*args.v_row;
    const half * mask = args.mask[group];

    const int cell0 = split*args.split_cells;
    const int cell1 = min(cell0 + args.split_cells, n_kv);

    ggml_cuda_pdl_sync();

    // 2. load q into registers, 8 elements per lane
    float q[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float * src = args.q + (head0 + min(g, n_heads - 1))*args.q_head;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float * from = src + razor_row<type>::index(part, i);
            float4 x;
            if (args.q_aligned) {
                x = *(const float4 *) from;
            } else {
                x = make_float4(from[0], from[1], from[2], from[3]);
            }
            q[g][i + 0] = args.scale*x.x;
            q[g][i + 1] = args.scale*x.y;
            q[g][i + 2] = args.scale*x.z;
            q[g][i + 3] = args.scale*x.w;
        }
    }

    float out[G][8] = {};
    float row_max[G];
    float row_sum[G]; // sum over the cells of this lane
#pragma unroll
    for (int g = 0; g < G; ++g) {
        row_max[g] = -INFINITY;
        row_sum[g] = 0.0f;
    }

    auto load = [&](razor_row<type> (&rows)[UNROLL], const char * data, int64_t row_bytes, int tile, int step0) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            rows[u].load(data + min(tile + (step0 + u)*ROWS_PER_STEP + lane/LANES_PER_ROW, n_kv - 1)*row_bytes, part);
        }
    };

    // m: mask of the cell of this lane, times log2(e)
    auto attend = [&](int tile, float m) {
        // 3. scores
        razor_row<type> rows_v[UNROLL];
        if (STEPS == UNROLL && T < TILE) {
            load(rows_v, v, args.v_row, tile, 0);
        }
#pragma unroll
        for (int step0 = 0; step0 < STEPS; step0 += UNROLL) {
            razor_row<type> rows[UNROLL];
            load(rows, k, args.k_row, tile, step0);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float x[8];
                rows[u].get(x);

                float s[G];
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    s[g] = q[g][0]*x[0];
#pragma unroll
                    for (int i = 1; i < 8; ++i) {
                        s[g] += q[g][i]*x[i];
                    }
                }
                warp_reduce_sum_heads<G, LANES_PER_ROW>(s, lane);

                if (part % (LANES_PER_ROW/G) == 0) {
                    s_tile[warp][(step0 + u)*ROWS_PER_STEP + lane/LANES_PER_ROW][part/(LANES_PER_ROW/G)] = s[0];
                }
            }
        }
        __syncwarp();

#pragma unroll
        for (int g = 0; g < G; ++g) {
            // 4. softmax, the score of a masked cell can be NaN
            const float s = m > -INFINITY ? s_tile[warp][lane % T][g] + m : -INFINITY;

            const float max_new = fmaxf(warp_reduce_max(s), row_max[g]);

            const float scale_o = exp2f(row_max[g] - max_new);
            const float p       = exp2f(s - max_new);

            row_max[g] = max_new;
            row_sum[g] = row_sum[g]*scale_o + p;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out[g][i] *= scale_o;
            }
            if (lane < T) {
                s_tile[warp][lane][g] = p;
            }
        }
        __syncwarp();

        // 5. add the values
#pragma unroll
        for (int step0 = 0; step0 < STEPS; step0 += UNROLL) {
            if (STEPS != UNROLL || T == TILE) {
                load(rows_v, v, args.v_row, tile, step0);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float x[8];
                rows_v[u].get(x);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float p = s_tile[warp][(step0 + u)*ROWS_PER_STEP + lane/LANES_PER_ROW][g];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        out[g][i] += p*x[i];
                    }
                }
            }
        }
        __syncwarp();
    };

    // 6. run 3 to 5 for each tile that the token sees
    if (T == TILE) {
        for (int tile = cell0 + warp*T; tile < cell1; tile += N_WARPS*T) {
            const float m = tile + lane < cell1 ? RAZOR_LOG2E*__half2float(mask[tile + lane]) : -INFINITY;
            if (__any_sync(0xffffffff, m > -INFINITY)) {
                attend(tile, m);
            }
        }
    } else {
        // the warps take visible tiles in turn
        constexpr int TILES = 32/T; // tiles per 32 cells

        __shared__ float    s_mask[SMALL_MAX_CELLS];
        __shared__ uint32_t s_seen[N_WARPS];

        const float m = (int) threadIdx.x < n_kv ? RAZOR_LOG2E*__half2float(mask[threadIdx.x]) : -INFINITY;
        s_mask[threadIdx.x] = m;

        const uint32_t seen = __ballot_sync(0xffffffff, m > -INFINITY);
        if (lane == 0) {
            s_seen[warp] = seen;
        }
        __syncthreads();

        int n = 0;
#pragma unroll 1
        for (int i = 0; i < N_WARPS*TILES; ++i) {
            const bool any = s_seen[i/TILES] >> (i%TILES)*T & ((1ull << T) - 1);
            if (any && n++ % N_WARPS == warp) {
                attend(i*T, lane < T ? s_mask[i*T + lane] : -INFINITY);
            }
        }
    }

    // 7. reduce over the lanes of each warp
#pragma unroll
    for (int g = 0; g < G; ++g) {
        row_sum[g] = warp_reduce_sum(row_sum[g]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int step = LANES_PER_ROW; step < 32; step *= 2) {
                out[g][i] += __shfl_xor_sync(0xffffffff, out[g][i], step);
            }
            if (lane < LANES_PER_ROW) {
                s_out[warp][g][razor_row<type>::index(part, i)] = out[g][i];
            }
        }
        if (lane == 0) {
            s_max[warp][g] = row_max[g];
            s_sum[warp][g] = row_sum[g];
        }
    }
    __syncthreads();

    // 8. combine the warps and write the output or a partial result
    for (int i = threadIdx.x; i < n_heads*D; i += N_WARPS*32) {
        const int g = i/D;
        const int d = i%D;

        float m = -INFINITY;
#pragma unroll
        for (int w = 0; w < N_WARPS; ++w) {
            m = fmaxf(m, s_max[w][g]);
        }

        float o = 0.0f;
        float l = 0.0f;
#pragma unroll
        for (int w = 0; w < N_WARPS; ++w) {
            const float factor = s_max[w][g] > -INFINITY ? exp2f(s_max[w][g] - m) : 0.0f;
            o += factor*s_out[w][g][d];
            l += factor*s_sum[w][g];
        }

        const int64_t at = (int64_t) (head0 + g)*args.max_splits + split;

        if (args.meta) {
            args.out[at*D + d] = o;
            if (d == 0) {
                args.meta[at] = make_float2(m, l);
            }
        } else {
            args.out[at*D + d] = l > 0.0f ? o/l : 0.0f;
        }
    }
}

// combine the partial results of a query head
// grid: query heads; block: (d, slices of the splits)
template <int D>
static __global__ void razor_attn_combine(
        const float * parts, const float2 * meta, float * dst, int max_splits, int n_splits0, int n_splits1, uint64_t retrieval, int n_gqa) {
    constexpr int SLICES = 1024/D;

    __shared__ float s_out[SLICES][D];
    __shared__ float s_sum[SLICES];

    const int d     = threadIdx.x;
    const int slice = threadIdx.y;
    const int lane  = (slice*D + d) % 32;

    const int head = blockIdx.x;
    const int n    = retrieval >> (head/n_gqa) & 1 ? n_splits0 : n_splits1;

    parts += (int64_t) head*max_splits*D;
    meta  += (int64_t) head*max_splits;

    ggml_cuda_pdl_sync();

    // 1. maximum over all splits
    float m = -INFINITY;
    for (int i = lane; i < n; i += 32) {
        m = fmaxf(m, meta[i].x);
    }
    m = warp_reduce_max(m);

    // 2. weighted sum of each slice
    float o = 0.0f;
    float l = 0.0f;
#pragma unroll 8
    for (int i = slice; i < n; i += SLICES) {
        const float2 s      = meta[i];
        const float  factor = s.x > -INFINITY ? exp2f(s.x - m) : 0.0f;
        o += factor*parts[(int64_t) i*D + d];
        l += factor*s.y;
    }

    s_out[slice][d] = o;
    if (d == 0) {
        s_sum[slice] = l;
    }
    __syncthreads();

    // 3. add the slices and write the output
    if (slice == 0) {
        for (int i = 1; i < SLICES; ++i) {
            o += s_out[i][d];
            l += s_sum[i];
        }
        dst[(int64_t) head*D + d] = l > 0.0f ? o/l : 0.0f;
    }
}

// store the d-th element of a row, rounded as by ggml; each lane of a warp stores one of 32 consecutive elements
template <ggml_type type>
static __device__ __forceinline__ void razor_store_element(char * row, int d, float x) {
    const int i = d % 32; // index in the quantized block

    if (type == GGML_TYPE_F16) {
        ((half *) row)[d] = __float2half(x);
    } else if (type == GGML_TYPE_BF16) {
        ((nv_bfloat16 *) row)[d] = __float2bfloat16(x);
    } else if (type == GGML_TYPE_Q8_0) {
        const float scale   = warp_reduce_max(fabsf(x))/127;
        const float inverse = scale ? 1.0f/scale : 0.0f;

        block_q8_0 * block = (block_q8_0 *) row + d/32;
        if (i == 0) {
            block->d = scale;
        }
        block->qs[i] = roundf(x*inverse);
    } else if (type == GGML_TYPE_Q4_0) {
        // the first element with the largest absolute value
        float vmax = x;
        int   imax = i;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float vmax_other = __shfl_xor_sync(0xffffffff, vmax, offset);
            const int   imax_other = __shfl_xor_sync(0xffffffff, imax, offset);
            if (fabsf(vmax_other) > fabsf(vmax) || (fabsf(vmax_other) == fabsf(vmax) && imax_other < imax)) {
                vmax = vmax_other;
                imax = imax_other;
            }
        }

        const float scale   = vmax/-8;
        const float inverse = scale ? 1.0f/scale : 0.0f;

        const int nibble = min(15, (int) (int8_t) (x*inverse + 8.5f));
        const int upper  = __shfl_down_sync(0xffffffff, nibble, 16);

        block_q4_0 * block = (block_q4_0 *) row + d/32;
        if (i == 0) {
            block->d = scale;
        }
        if (i < 16) {
            block->qs[i] = nibble | upper << 4;
        }
    }
}

template <ggml_type type>
static __device__ __forceinline__ float razor_load_element(const char * row, int d) {
    if (type == GGML_TYPE_F16) {
        return __half2float(((const half *) row)[d]);
    }
    if (type == GGML_TYPE_BF16) {
        return __bfloat162float(((const nv_bfloat16 *) row)[d]);
    }
    if (type == GGML_TYPE_Q8_0) {
        const block_q8_0 * block = (const block_q8_0 *) row + d/32;

        return __half2float(block->d)*block->qs[d % 32];
    }

    const block_q4_0 * block = (const block_q4_0 *) row + d/32;

    return __half2float(block->d)*((block->qs[d % 16] >> (d % 32 < 16 ? 0 : 4) & 0xf) - 8);
}

// grid: rows of all heads and tokens, K and V; block: d
template <ggml_type type>
static __global__ void razor_store_rows(
        const float * k_cur, const float * v_cur, char * k, char * v, const int64_t * rows, int64_t k_row, int64_t v_row) {
    const int d = threadIdx.x;

    ggml_cuda_pdl_sync();

    const float x   = (blockIdx.y ? v_cur : k_cur)[(int64_t) blockIdx.x*blockDim.x + d];
    char *      row = (blockIdx.y ? v + rows[blockIdx.x]*v_row : k + rows[blockIdx.x]*k_row);

    razor_store_element<type>(row, d, x);
}

struct razor_fold_args {
    char *  rows[2]; // K and V, first row of the local heads
    int64_t row_bytes[2];
    float * sums[2]; // [slots][n_local][d]
    int64_t head_rows;

    const int32_t * fold;
    int             n_fold;

    const int32_t * slot_src;
    const int64_t * slot_dst;
    const int64_t * means;
    int             n_means;
    const float *   inverse;
};

// grid: local heads, K and V; block: (d, slices of the rows)
template <int D, ggml_type type>
static __global__ void razor_fold_rows(const razor_fold_args args) {
    constexpr int SLICES = 1024/D;

    __shared__ float s_sum[SLICES][D];

    const int d     = threadIdx.x;
    const int slice = threadIdx.y;
    const int head  = blockIdx.x;

    const int64_t row_bytes = args.row_bytes[blockIdx.y];

    char  * rows = args.rows[blockIdx.y] + head*args.head_rows*row_bytes;
    float * sums = args.sums[blockIdx.y] + head*D + d;

    ggml_cuda_pdl_sync();

    // 1. sum the rows to fold
    float sum = 0.0f;
#pragma unroll 8
    for (int i = slice; i < args.n_fold; i += SLICES) {
        sum += razor_load_element<type>(rows + args.fold[i]*row_bytes, d);
    }

    s_sum[slice][d] = sum;
    __syncthreads();

    if (slice > 0) {
        return;
    }

    // 2. add the previous sum
    sum = sums[(int64_t) args.slot_src[0]*gridDim.x*D];
    for (int i = 0; i < SLICES; ++i) {
        sum += s_sum[i][d];
    }

    sums[args.slot_dst[0]*gridDim.x*D] = sum;

    // 3. store the mean
    for (int i = 0; i < args.n_means; ++i) {
        razor_store_element<type>(rows + args.means[i]*row_bytes, d, sum*args.inverse[0]);
    }
}

struct razor_to_f16_args {
    const char * rows[2]; // K and V
    int64_t      row_bytes[2];
    half       * out[2];

    // retrieval heads, local heads
    int     n_heads[2];
    int     n_kv[2];
    int64_t head_rows[2];
    int64_t first_row[2];
};

// convert the rows that a batch attends to, the result is contiguous
// grid: rows, K and V
template <int D, ggml_type type>
static __global__ void __launch_bounds__(N_WARPS*32) razor_to_f16(const razor_to_f16_args args) {
    constexpr int LANES_PER_ROW = D/8;
    constexpr int ROWS_PER_STEP = N_WARPS*32/LANES_PER_ROW; // rows that a thread block loads at a time

    const int n_retrieval = args.n_heads[0]*args.n_kv[0];
    const int n_rows      = n_retrieval + args.n_heads[1]*args.n_kv[1];

    const int part  = threadIdx.x % LANES_PER_ROW;
    const int first = blockIdx.x*PREFETCH*ROWS_PER_STEP + threadIdx.x/LANES_PER_ROW;

    ggml_cuda_pdl_sync();

    // 1. load
    razor_row<type> rows[PREFETCH];
#pragma unroll
    for (int i = 0; i < PREFETCH; ++i) {
        const int row   = min(first + i*ROWS_PER_STEP, n_rows - 1);
        const int group = row < n_retrieval ? 0 : 1;
        const int at    = row - (group == 0 ? 0 : n_retrieval);
        const int head  = at/args.n_kv[group]; // index in the group
        const int cell  = at - head*args.n_kv[group];

        rows[i].load(args.rows[blockIdx.y] + (args.first_row[group] + head*args.head_rows[group] + cell)*args.row_bytes[blockIdx.y], part);
    }

    // 2. convert and store
#pragma unroll
    for (int i = 0; i < PREFETCH; ++i) {
        const int row = first + i*ROWS_PER_STEP;
        if (row >= n_rows) {
            return;
        }

        float x[8];
        rows[i].get(x);

        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const half2 h = __floats2half2_rn(x[2*j], x[2*j + 1]);
            memcpy(&pairs[j], &h, sizeof(h));
        }

        half * out = args.out[blockIdx.y] + (int64_t) row*D;

        if constexpr (type == GGML_TYPE_Q4_0) {
            *(uint2 *) (out + rows[i].index(part, 0)) = make_uint2(pairs[0], pairs[1]);
            *(uint2 *) (out + rows[i].index(part, 4)) = make_uint2(pairs[2], pairs[3]);
        } else {
            *(uint4 *) (out + rows[i].index(part, 0)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

//
// host
//

static bool razor_supported(const ggml_tensor * k, const ggml_tensor * v) {
    switch (k->type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
            return v->type == k->type && (k->ne[0] == 64 || k->ne[0] == 128) && v->ne[0] == k->ne[0];
        default:
            return false;
    }
}

static bool razor_attn_supported(const ggml_tensor * op, const ggml_razor_attn_params & params) {
    return razor_supported(op->src[1], op->src[2]) && params.n_head_kv <= GGML_RAZOR_ATTN_MAX_KV && op->src[0]->ne[1] % params.n_head_kv == 0;
}

// return true if the device supports the attention of a batch
static bool razor_batch_supported(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;

    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_AMPERE;
}

// return true if the kernel for compute capability 9.0 should be used
static bool razor_use_hopper(int device) {
#ifdef GGML_CUDA_RAZOR_HOPPER
    const char * env = getenv(GGML_RAZOR_DEVICE_ENV);

    return ggml_cuda_info().devices[device].cc == GGML_CUDA_CC_HOPPER && !(env && strcmp(env, "ampere") == 0);
#else
    (void) device;
    return false;
#endif
}

// return true if the device accumulates in F32 at half the speed of F16, as graphics GPUs do
static bool razor_use_f16_acc(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;

    return cc == 860 || cc == 890 || cc >= 1200;
}

bool ggml_cuda_razor_supported(int device, const ggml_tensor * op) {
    ggml_razor_store_params store;
    if (ggml_razor_get_params(op, GGML_RAZOR_STORE_MAGIC, store)) {
        return razor_supported(op->src[2], op->src[3]);
    }

    ggml_razor_fold_params fold;
    if (ggml_razor_get_params(op, GGML_RAZOR_FOLD_MAGIC, fold)) {
        return razor_supported(op->src[0], op->src[1]);
    }

    ggml_razor_attn_params attn;
    if (ggml_razor_get_params(op, GGML_RAZOR_ATTN_MAGIC, attn)) {
        return razor_attn_supported(op, attn) && op->src[0]->ne[2] == 1;
    }
    if (ggml_razor_get_params(op, GGML_RAZOR_BATCH_MAGIC, attn)) {
        return razor_attn_supported(op, attn) && razor_batch_supported(device);
    }

    return false;
}

template <int D, ggml_type type, int G>
static void razor_attn_launch(ggml_backend_cuda_context & ctx, razor_attn_args & args, const ggml_razor_attn_params & params, float * dst) {
    const int n_heads[2] = { args.n_retrieval, params.n_head_kv - args.n_retrieval };
    const int n_parts    = (args.n_gqa + G - 1)/G; // groups of G query heads of a KV head
    const int n_head     = params.n_head_kv*args.n_gqa;

    int n_tiles[2];
    int max_tiles = 1;
    for (int i = 0; i < 2; ++i) {
        n_tiles[i] = n_heads[i] > 0 ? (args.n_kv[i] + TILE - 1)/TILE : 0;
        max_tiles  = std::max(max_tiles, n_tiles[i]);
    }

    // number of thread blocks that the device runs at the same time: a few more would take twice the time
    const int n_resident = ggml_cuda_info().devices[ctx.device].nsm*(G < 8 ? 2 : 1);

    auto n_blocks = [&](int group, int tiles) { return n_heads[group]*((n_tiles[group] + tiles - 1)/tiles); };

    // 1. find the smallest split for which all thread blocks run at the same time
    int tiles = max_tiles;
    if (max_tiles*TILE > SPLIT_MIN_CELLS) {
        const int64_t total = (int64_t) n_heads[0]*n_tiles[0] + (int64_t) n_heads[1]*n_tiles[1];

        tiles = std::max<int>(N_WARPS, (total*n_parts + n_resident - 1)/n_resident);
        while (tiles < max_tiles && (n_blocks(0, tiles) + n_blocks(1, tiles))*n_parts > n_resident) {
            ++tiles;
        }
    }

    args.split_cells = tiles*TILE;
    args.n_blocks    = n_blocks(0, tiles);
    args.max_splits  = 1;
    for (int i = 0; i < 2; ++i) {
        args.n_splits[i] = std::max(1, (n_tiles[i] + tiles - 1)/tiles);
        args.max_splits  = std::max(args.max_splits, args.n_splits[i]);
    }

    // 2. allocate the partial results
    cudaStream_t stream = ctx.stream();

    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta (ctx.pool());

    if (args.max_splits > 1) {
        args.out  = parts.alloc((size_t) n_head*args.max_splits*D);
        args.meta = meta .alloc((size_t) n_head*args.max_splits);
    } else {
        args.out  = dst;
        args.meta = nullptr;
    }

    // 3. launch
    const dim3 grid(args.n_blocks + n_blocks(1, tiles), n_parts, 1);

    const ggml_cuda_kernel_launch_params launch(grid, dim3(N_WARPS*32, 1, 1), (size_t) 0, stream);

    if (max_tiles*TILE <= SMALL_MAX_CELLS) {
        ggml_cuda_kernel_launch(razor_attn_split<D, type, G, SMALL_TILE>, launch, args);
    } else {
        ggml_cuda_kernel_launch(razor_attn_split<D, type, G, TILE>, launch, args);
    }

    if (args.max_splits > 1) {
        const float  * parts_d = args.out;
        const float2 * meta_d  = args.meta;

        ggml_cuda_kernel_launch(razor_attn_combine<D>,
                ggml_cuda_kernel_launch_params(dim3(n_head, 1, 1), dim3(D, 1024/D, 1), (size_t) 0, stream),
                parts_d, meta_d, dst, args.max_splits, args.n_splits[0], args.n_splits[1], params.retrieval, args.n_gqa);
    }
}

template <int D, ggml_type type>
static void razor_attn_switch_gqa(ggml_backend_cuda_context & ctx, razor_attn_args & args, const ggml_razor_attn_params & params, float * dst) {
    if (args.n_gqa == 1) {
        razor_attn_launch<D, type, 1>(ctx, args, params, dst);
    } else if (args.n_gqa == 2) {
        razor_attn_launch<D, type, 2>(ctx, args, params, dst);
    } else if (args.n_gqa <= 4) {
        razor_attn_launch<D, type, 4>(ctx, args, params, dst);
    } else {
        razor_attn_launch<D, type, 8>(ctx, args, params, dst);
    }
}

template <int D>
static void razor_attn_switch_type(ggml_backend_cuda_context & ctx, razor_attn_args & args, const ggml_razor_attn_params & params, float * dst, ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  razor_attn_switch_gqa<D, GGML_TYPE_F16> (ctx, args, params, dst); break;
        case GGML_TYPE_BF16: razor_attn_switch_gqa<D, GGML_TYPE_BF16>(ctx, args, params, dst); break;
        case GGML_TYPE_Q8_0: razor_attn_switch_gqa<D, GGML_TYPE_Q8_0>(ctx, args, params, dst); break;
        case GGML_TYPE_Q4_0: razor_attn_switch_gqa<D, GGML_TYPE_Q4_0>(ctx, args, params, dst); break;
        default:             GGML_ABORT("unsupported type");
    }
}

// store the KV heads, retrieval heads first
// return the number of retrieval heads
static int razor_order_heads(const ggml_razor_attn_params & params, uint8_t * heads) {
    int n           = 0;
    int n_retrieval = 0;

    for (const bool retrieval : { true, false }) {
        for (int h = 0; h < params.n_head_kv; ++h) {
            if ((params.retrieval >> h & 1) == retrieval) {
                heads[n++] = h;
            }
        }
        if (retrieval) {
            n_retrieval = n;
        }
    }

    return n_retrieval;
}

static void razor_attn_token(ggml_backend_cuda_context & ctx, const ggml_razor_attn_params & params, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->nb[1] % sizeof(float) == 0);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst));

    razor_attn_args args = {};

    args.q      = (const float *) q->data;
    args.q_head = q->nb[1]/sizeof(float);
    args.q_aligned = (uintptr_t) args.q % 16 == 0 && args.q_head % 4 == 0;
    args.k      = (const char *) k->data + params.stream*k->nb[2];
    args.v      = (const char *) v->data + params.stream*v->nb[2];
    args.k_row  = k->nb[1];
    args.v_row  = v->nb[1];
    args.n_gqa  = q->ne[1]/params.n_head_kv;
    args.scale  = params.scale*RAZOR_LOG2E;

    args.n_retrieval = razor_order_heads(params, args.heads);

    for (int i = 0; i < 2; ++i) {
        const ggml_tensor * mask = dst->src[3 + i];

        GGML_ASSERT(mask->type == GGML_TYPE_F16);

        args.mask[i] = (const half *) mask->data;
        args.n_kv[i] = mask->ne[0];
    }

    args.first_row[0] = 0;
    args.head_rows[0] = params.n_ctx;
    args.first_row[1] = (int64_t) args.n_retrieval*params.n_ctx;
    args.head_rows[1] = params.cells;

    if (k->ne[0] == 64) {
        razor_attn_switch_type<64> (ctx, args, params, (float *) dst->data, k->type);
    } else {
        razor_attn_switch_type<128>(ctx, args, params, (float *) dst->data, k->type);
    }
}

template <int D>
static void razor_launch_to_f16(const razor_to_f16_args & args, ggml_type type, cudaStream_t stream) {
    const int n_rows    = args.n_heads[0]*args.n_kv[0] + args.n_heads[1]*args.n_kv[1];
    const int per_block = PREFETCH*N_WARPS*32/(D/8);

    const ggml_cuda_kernel_launch_params launch(dim3((n_rows + per_block - 1)/per_block, 2, 1), dim3(N_WARPS*32, 1, 1), (size_t) 0, stream);

    switch (type) {
        case GGML_TYPE_BF16: ggml_cuda_kernel_launch(razor_to_f16<D, GGML_TYPE_BF16>, launch, args); break;
        case GGML_TYPE_Q8_0: ggml_cuda_kernel_launch(razor_to_f16<D, GGML_TYPE_Q8_0>, launch, args); break;
        case GGML_TYPE_Q4_0: ggml_cuda_kernel_launch(razor_to_f16<D, GGML_TYPE_Q4_0>, launch, args); break;
        default:             GGML_ABORT("unsupported type");
    }
}

static void razor_attn_batch(ggml_backend_cuda_context & ctx, const ggml_razor_attn_params & params, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * bias  = dst->src[5];
    const ggml_tensor * tiles = dst->src[6];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->nb[1] % sizeof(float) == 0 && q->nb[2] % sizeof(float) == 0);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst));
    GGML_ASSERT(bias->type == GGML_TYPE_F32 && tiles->type == GGML_TYPE_I32);

    // 1. describe the operands
    const int d = k->ne[0];

    razor_batch_args args = {};

    args.q         = (const float *) q->data;
    args.q_token   = q->nb[2]/sizeof(float);
    args.q_head    = q->nb[1]/sizeof(float);
    args.q_aligned = (uintptr_t) args.q % 16 == 0 && args.q_token % 4 == 0 && args.q_head % 4 == 0;
    args.n_tokens  = q->ne[2];
    args.n_gqa     = q->ne[1]/params.n_head_kv;
    args.scale     = params.scale*RAZOR_LOG2E;
    args.bias      = (const float *) bias->data;
    args.tiles     = (const int2  *) tiles->data;
    args.out       = (float *) dst->data;

    args.n_heads[0] = razor_order_heads(params, args.heads);
    args.n_heads[1] = params.n_head_kv - args.n_heads[0];

    for (int i = 0; i < 2; ++i) {
        const ggml_tensor * since = dst->src[3 + i];

        GGML_ASSERT(since->type == GGML_TYPE_I32);

        args.since[i] = (const int *) since->data;
        args.n_kv [i] = since->ne[0];
    }

    args.first_row[0] = 0;
    args.head_rows[0] = params.n_ctx;
    args.first_row[1] = args.n_heads[0]*params.n_ctx;
    args.head_rows[1] = params.cells;

    args.k      = (const half *) ((const char *) k->data + params.stream*k->nb[2]);
    args.v      = (const half *) ((const char *) v->data + params.stream*v->nb[2]);
    args.n_rows = k->ne[1];

    ggml_cuda_pool_alloc<half>   rows (ctx.pool());
    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta (ctx.pool());

    // 2. convert K and V to F16
    if (k->type != GGML_TYPE_F16) {
        const int64_t n_rows = (int64_t) args.n_heads[0]*args.n_kv[0] + (int64_t) args.n_heads[1]*args.n_kv[1];

        rows.alloc(2*n_rows*d);

        razor_to_f16_args from = {};

        from.rows[0]      = (const char *) args.k;
        from.rows[1]      = (const char *) args.v;
        from.row_bytes[0] = k->nb[1];
        from.row_bytes[1] = v->nb[1];
        from.out[0]       = rows.get();
        from.out[1]       = rows.get() + n_rows*d;

        for (int i = 0; i < 2; ++i) {
            from.n_heads  [i] = args.n_heads  [i];
            from.n_kv     [i] = args.n_kv     [i];
            from.head_rows[i] = args.head_rows[i];
            from.first_row[i] = args.first_row[i];

            args.head_rows[i] = args.n_kv[i];
        }

        if (d == 64) {
            razor_launch_to_f16<64> (from, k->type, ctx.stream());
        } else {
            razor_launch_to_f16<128>(from, k->type, ctx.stream());
        }

        args.first_row[1] = args.n_heads[0]*args.n_kv[0];
        args.k            = from.out[0];
        args.v            = from.out[1];
        args.n_rows       = n_rows;
    }

    // 3. divide the work and launch
    const bool hopper  = razor_use_hopper(ctx.device);
    const int  n_parts = razor_batch_schedule(args, ggml_cuda_info().devices[ctx.device].nsm*(hopper ? 1 : RAZOR_AMPERE_BLOCKS_PER_SM));

    args.parts = parts.alloc((size_t) n_parts*BLOCK_M*d);
    args.meta  = meta .alloc((size_t) n_parts*BLOCK_M);

    bool done = false;
#ifdef GGML_CUDA_RAZOR_HOPPER
    done = hopper && razor_hopper_attn(args, d, ctx.stream());
#endif
    if (!done) {
        razor_ampere_attn(args, d, razor_use_f16_acc(ctx.device), ctx.stream());
    }
    CUDA_CHECK(cudaGetLastError());
}

static void razor_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k_cur = dst->src[0];
    const ggml_tensor * v_cur = dst->src[1];
    const ggml_tensor * k     = dst->src[2];
    const ggml_tensor * v     = dst->src[3];
    const ggml_tensor * rows  = dst->src[4];

    GGML_ASSERT(k_cur->type == GGML_TYPE_F32 && ggml_is_contiguous(k_cur));
    GGML_ASSERT(v_cur->type == GGML_TYPE_F32 && ggml_is_contiguous(v_cur));
    GGML_ASSERT(rows->type == GGML_TYPE_I64 && ggml_is_contiguous(rows));
    GGML_ASSERT(ggml_nelements(k_cur) == ggml_nelements(rows)*k->ne[0] && ggml_nelements(v_cur) == ggml_nelements(k_cur));

    const ggml_cuda_kernel_launch_params launch(dim3(ggml_nelements(rows), 2, 1), dim3(k->ne[0], 1, 1), (size_t) 0, ctx.stream());

    auto run = [&](auto kernel) {
        ggml_cuda_kernel_launch(kernel, launch, (const float *) k_cur->data, (const float *) v_cur->data, (char *) k->data, (char *) v->data,
                (const int64_t *) rows->data, (int64_t) k->nb[1], (int64_t) v->nb[1]);
    };

    switch (k->type) {
        case GGML_TYPE_F16:  run(razor_store_rows<GGML_TYPE_F16>);  break;
        case GGML_TYPE_BF16: run(razor_store_rows<GGML_TYPE_BF16>); break;
        case GGML_TYPE_Q8_0: run(razor_store_rows<GGML_TYPE_Q8_0>); break;
        case GGML_TYPE_Q4_0: run(razor_store_rows<GGML_TYPE_Q4_0>); break;
        default:             GGML_ABORT("unsupported type");
    }
}

static void razor_fold(ggml_backend_cuda_context & ctx, const ggml_razor_fold_params & params, ggml_tensor * dst) {
    razor_fold_args args = {};

    for (int i = 0; i < 2; ++i) {
        const ggml_tensor * cache = dst->src[i];
        const ggml_tensor * sums  = dst->src[2 + i];

        GGML_ASSERT(sums->type == GGML_TYPE_F32 && ggml_is_contiguous(sums) && sums->ne[0] == cache->ne[0]*params.n_local);

        args.rows[i]      = (char *) cache->data + params.first*cache->nb[1];
        args.row_bytes[i] = cache->nb[1];
        args.sums[i]      = (float *) sums->data;
    }

    GGML_ASSERT(dst->src[4]->type == GGML_TYPE_I32 && dst->src[5]->type == GGML_TYPE_I32 && dst->src[6]->type == GGML_TYPE_I64);
    GGML_ASSERT(dst->src[7]->type == GGML_TYPE_I64 && dst->src[8]->type == GGML_TYPE_F32);

    args.head_rows = params.cells;
    args.fold      = (const int32_t *) dst->src[4]->data;
    args.n_fold    = dst->src[4]->ne[0];
    args.slot_src  = (const int32_t *) dst->src[5]->data;
    args.slot_dst  = (const int64_t *) dst->src[6]->data;
    args.means     = (const int64_t *) dst->src[7]->data;
    args.n_means   = dst->src[7]->ne[0];
    args.inverse   = (const float *) dst->src[8]->data;

    const int d = dst->src[0]->ne[0];

    const ggml_cuda_kernel_launch_params launch(dim3(params.n_local, 2, 1), dim3(d, 1024/d, 1), (size_t) 0, ctx.stream());

    auto run = [&](auto kernel64, auto kernel128) {
        ggml_cuda_kernel_launch(d == 64 ? kernel64 : kernel128, launch, args);
    };

    switch (dst->src[0]->type) {
        case GGML_TYPE_F16:  run(razor_fold_rows<64, GGML_TYPE_F16>,  razor_fold_rows<128, GGML_TYPE_F16>);  break;
        case GGML_TYPE_BF16: run(razor_fold_rows<64, GGML_TYPE_BF16>, razor_fold_rows<128, GGML_TYPE_BF16>); break;
        case GGML_TYPE_Q8_0: run(razor_fold_rows<64, GGML_TYPE_Q8_0>, razor_fold_rows<128, GGML_TYPE_Q8_0>); break;
        case GGML_TYPE_Q4_0: run(razor_fold_rows<64, GGML_TYPE_Q4_0>, razor_fold_rows<128, GGML_TYPE_Q4_0>); break;
        default:             GGML_ABORT("unsupported type");
    }
}

bool ggml_cuda_razor(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    GGML_ASSERT(ggml_cuda_razor_supported(ctx.device, dst));

    ggml_razor_attn_params attn;
    ggml_razor_fold_params fold;

    if (ggml_razor_get_params(dst, GGML_RAZOR_ATTN_MAGIC, attn)) {
        razor_attn_token(ctx, attn, dst);
    } else if (ggml_razor_get_params(dst, GGML_RAZOR_BATCH_MAGIC, attn)) {
        razor_attn_batch(ctx, attn, dst);
    } else if (ggml_razor_get_params(dst, GGML_RAZOR_FOLD_MAGIC, fold)) {
        razor_fold(ctx, fold, dst);
    } else {
        razor_store(ctx, dst);
    }

    return true;
}
