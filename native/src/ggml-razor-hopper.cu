// Attention of a batch on GPUs of compute capability 9.0, with their matrix instructions (wgmma) and copy engine (TMA).
//
// The query rows of a KV head (its query heads, of all tokens) are cut into blocks of 128, and the tiles of 128 cells of all KV
// heads of a layer, one after the other, into as many ranges as there are multiprocessors for each block: whoever works on the
// same range reads the same rows of K and V at about the same time, so that they come from the L2 cache. Heads that two
// ranges share are added up by a second kernel. There is no mask: each cell says which token is the first to see it, and only
// tiles that some tokens see and others do not are looked at cell by cell.
//
// A block has one warp that loads and eight that compute, in two groups of 64 query rows each. Scores of a tile are computed
// while the values of the tile before are added up (as FlashAttention-3, arXiv 2407.08608, does).

#include "ggml-razor-hopper.cuh"

#include <cuda.h>

#include <algorithm>
#include <cstdint>

static constexpr int TILE   = GGML_RAZOR_TILE;
static constexpr int ROWS   = GGML_RAZOR_ROWS;
static constexpr int GROUP  = 128;     // threads that issue matrix instructions together
static constexpr int GROUPS = ROWS/64; // of them
static constexpr int STAGES = 2;       // tiles of K, and of V, that are loaded ahead

static constexpr int CHUNK = 64; // numbers of a row that lie together in shared memory: 128 bytes

static constexpr float LOG2E = 1.4426950408889634f;

// the first tile of a range
static __host__ __device__ int razor_range(const razor_hopper_args & args, int i) {
    return (int64_t) i*args.n_tiles/args.n_ranges;
}

static __host__ __device__ int razor_head_tiles(const razor_hopper_args & args, int group) {
    return (args.n_kv[group] + TILE - 1)/TILE;
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

static __device__ razor_piece razor_piece_at(const razor_hopper_args & args, int at, int end) {
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

//
// instructions
//

static __device__ __forceinline__ uint32_t razor_shared(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void razor_barrier_init(uint64_t * bar, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(razor_shared(bar)), "r"(n));
}

static __device__ __forceinline__ void razor_barrier_arrive(uint64_t * bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(razor_shared(bar)) : "memory");
}

// and bytes that the copy engine will have written
static __device__ __forceinline__ void razor_barrier_arrive(uint64_t * bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(razor_shared(bar)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void razor_barrier_wait(uint64_t * bar, int phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra end;\n"
        "bra again;\n"
        "end:\n"
        "}\n" :: "r"(razor_shared(bar)), "r"(phase) : "memory");
}

static __device__ __forceinline__ void razor_load(void * dst, const CUtensorMap * map, int column, int row, uint64_t * bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(razor_shared(dst)), "l"((uint64_t) map), "r"(column), "r"(row), "r"(razor_shared(bar)) : "memory");
}

// rows of 128 bytes in swizzled groups of 8; `chunk` bytes to the next columns where the rows are the products' inner dimension
static __device__ __forceinline__ uint64_t razor_matrix(const void * p, int chunk) {
    return (uint64_t) (razor_shared(p) >> 4 & 0x3fff) | (uint64_t) (chunk >> 4) << 16 | (uint64_t) (1024 >> 4) << 32 | 1ull << 62;
}

#define RAZOR_8(x, i)  x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define RAZOR_32(x, i) RAZOR_8(x, i), RAZOR_8(x, i + 8), RAZOR_8(x, i + 16), RAZOR_8(x, i + 24)
#define RAZOR_REG(i)   "+f"(d[i])

#define RAZOR_REGS_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RAZOR_REGS_32 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, 128] (+)= a [64, 16] x b [128, 16]^T
static __device__ __forceinline__ void razor_product(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" RAZOR_REGS_0 ", " RAZOR_REGS_32 "}, %64, %65, add, 1, 1, 0, 0;\n"
        "}\n" : RAZOR_32(RAZOR_REG, 0), RAZOR_32(RAZOR_REG, 32) : "l"(a), "l"(b), "r"(add));
}

// d [64, 128] += a [64, 16] x b [16, 128]
static __device__ __forceinline__ void razor_product(float (&d)[64], const uint32_t * a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" RAZOR_REGS_0 ", " RAZOR_REGS_32 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : RAZOR_32(RAZOR_REG, 0), RAZOR_32(RAZOR_REG, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d [64, 64] += a [64, 16] x b [16, 64]
static __device__ __forceinline__ void razor_product(float (&d)[32], const uint32_t * a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" RAZOR_REGS_0 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : RAZOR_32(RAZOR_REG, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void razor_products_begin()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void razor_products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int n>
static __device__ __forceinline__ void razor_products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory"); }

// keeps the compiler from moving a use of the registers across
template <int n>
static __device__ __forceinline__ void razor_pin(float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+f"(x[i]) :: "memory");
    }
}

template <int n>
static __device__ __forceinline__ void razor_pin(uint32_t (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+r"(x[i]) :: "memory");
    }
}

static __device__ __forceinline__ uint32_t razor_pair(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);

    return (uint32_t) __half_as_ushort(__low2half(h)) | (uint32_t) __half_as_ushort(__high2half(h)) << 16;
}

template <int D>
struct razor_hopper_shared {
    half q[D/CHUNK][ROWS][CHUNK];
    half k[STAGES][D/CHUNK][TILE][CHUNK];
    half v[STAGES][D/CHUNK][TILE][CHUNK];

    uint64_t k_full [STAGES];
    uint64_t k_empty[STAGES];
    uint64_t v_full [STAGES];
    uint64_t v_empty[STAGES];

    int2 tile[STAGES]; // first cell, -1: the piece has no more; whether each cell has to be looked at
};

// the tiles that come through one of the two queues
struct razor_queue {
    int stage = 0;
    int phase = 0;

    __device__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

//
// the warp that loads
//

template <int D>
static __device__ void razor_hopper_load(
        razor_hopper_shared<D> & sh, const CUtensorMap & k_map, const CUtensorMap & v_map, const razor_hopper_args & args) {
    const int block = blockIdx.x % args.n_blocks;
    const int range = blockIdx.x / args.n_blocks;

    const int t_first = block*ROWS/args.n_gqa;
    const int t_last  = min(args.n_tokens - 1, (block*ROWS + ROWS - 1)/args.n_gqa);

    razor_queue q_k;
    razor_queue q_v;

    const int end = razor_range(args, range + 1);

    for (int at = razor_range(args, range); at < end;) {
        const razor_piece piece = razor_piece_at(args, at, end);
        at += piece.end - piece.first;

        int2 next = args.tiles[piece.tiles + piece.first];

        for (int i = piece.first; i < piece.end; ++i) {
            const int2 tile = next;
            if (i + 1 < piece.end) {
                next = args.tiles[piece.tiles + i + 1];
            }
            if (tile.x > t_last) {
                continue;
            }

            const int cell = i*TILE;

            razor_barrier_wait(&sh.k_empty[q_k.stage], q_k.phase ^ 1);
            sh.tile[q_k.stage] = make_int2(cell, tile.y > t_first);
            razor_barrier_arrive(&sh.k_full[q_k.stage], sizeof(sh.k[0]));
            for (int c = 0; c < D/CHUNK; ++c) {
                razor_load(sh.k[q_k.stage][c], &k_map, c*CHUNK, piece.row + cell, &sh.k_full[q_k.stage]);
            }
            q_k.next();

            razor_barrier_wait(&sh.v_empty[q_v.stage], q_v.phase ^ 1);
            razor_barrier_arrive(&sh.v_full[q_v.stage], sizeof(sh.v[0]));
            for (int c = 0; c < D/CHUNK; ++c) {
                razor_load(sh.v[q_v.stage][c], &v_map, c*CHUNK, piece.row + cell, &sh.v_full[q_v.stage]);
            }
            q_v.next();
        }

        razor_barrier_wait(&sh.k_empty[q_k.stage], q_k.phase ^ 1);
        sh.tile[q_k.stage] = make_int2(-1, 0);
        razor_barrier_arrive(&sh.k_full[q_k.stage]);
        q_k.next();
    }
}

//
// the warps that compute
//

// A thread has the numbers of two rows: of 8 columns each the 2 that begin at 2*(lane % 4), in groups of 4 numbers, first those
// of row lane/4, then those of row lane/4 + 8.
template <int D>
struct razor_hopper_rows {
    float s[TILE/2];
    float o[D/2];

    uint32_t p[TILE/4]; // pairs of F16

    float max[2];
    float sum[2]; // of this thread's columns
    int token[2];

    __device__ void reset() {
#pragma unroll
        for (int i = 0; i < D/2; ++i) {
            o[i] = 0.0f;
        }
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    // scores of cells that these tokens do not see
    __device__ void hide(const razor_hopper_args & args, const razor_piece & piece, int cell) {
        const int   * since = args.since[piece.group];
        const float * bias  = piece.group == 1 ? args.bias : nullptr;
        const int     n_kv  = args.n_kv[piece.group];

#pragma unroll
        for (int i = 0; i < TILE/2; i += 4) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int c = cell + 2*i + 2*(threadIdx.x % 4) + j;

                const int   first = c < n_kv ? since[c] : GGML_RAZOR_NEVER;
                const float add   = bias && c < n_kv ? bias[c]*LOG2E : 0.0f;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    s[i + 2*r + j] = first <= token[r] ? s[i + 2*r + j] + add : -INFINITY;
                }
            }
        }
    }

    // scores -> their powers; what the sums before have to be multiplied with
    __device__ void powers(float (&factor)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = max[r];
#pragma unroll
            for (int i = 0; i < TILE/2; i += 4) {
                most = fmaxf(most, fmaxf(s[i + 2*r], s[i + 2*r + 1]));
            }
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));

            const float base = most == -INFINITY ? 0.0f : most; // nothing is seen so far

            factor[r] = exp2f(max[r] - base);
            max[r]    = most;

            float add = 0.0f;
#pragma unroll
            for (int i = 0; i < TILE/2; i += 4) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    s[i + 2*r + j] = exp2f(s[i + 2*r + j] - base);
                    add += s[i + 2*r + j];
                }
            }
            sum[r] = sum[r]*factor[r] + add;
        }
    }

    __device__ void scale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < D/2; i += 4) {
            o[i + 0] *= factor[0];
            o[i + 1] *= factor[0];
            o[i + 2] *= factor[1];
            o[i + 3] *= factor[1];
        }
    }

    __device__ void pack() {
#pragma unroll
        for (int i = 0; i < TILE/4; ++i) {
            p[i] = razor_pair(s[2*i], s[2*i + 1]);
        }
    }

    // s = q x k^T, without waiting
    __device__ void scores(const half (*q)[ROWS][CHUNK], int row, const half (*k)[TILE][CHUNK]) {
#pragma unroll
        for (int i = 0; i < D/16; ++i) {
            razor_product(s, razor_matrix(&q[i/4][row][i%4*16], 0), razor_matrix(&k[i/4][0][i%4*16], 0), i > 0);
        }
    }

    // o += p x v, without waiting
    __device__ void values(const half (*v)[TILE][CHUNK]) {
#pragma unroll
        for (int i = 0; i < TILE/16; ++i) {
            razor_product(o, &p[4*i], razor_matrix(&v[0][16*i][0], sizeof(v[0])));
        }
    }
};

// query rows of a group of warps, swizzled
template <int D>
static __device__ void razor_hopper_queries(
        half (*q)[ROWS][CHUNK], const razor_hopper_args & args, int head_kv, int row0, int first, int thread) {
    const int n_rows = args.n_tokens*args.n_gqa;

#pragma unroll
    for (int i = thread; i < 64*D/8; i += GROUP) {
        const int row  = row0 + i/(D/8);
        const int part = i % (D/8);

        float x[8] = { 0.0f };

        const int at = first + row;
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

template <int D>
static __device__ void razor_hopper_compute(razor_hopper_shared<D> & sh, const razor_hopper_args & args) {
    const int block  = blockIdx.x % args.n_blocks;
    const int range  = blockIdx.x / args.n_blocks;
    const int group  = threadIdx.x/GROUP - 1;
    const int thread = threadIdx.x % GROUP;
    const int lane   = threadIdx.x % 32;
    const int row    = 64*group + thread/32*16 + lane/4; // of the first of the two

    razor_hopper_rows<D> rows;

    rows.token[0] = (block*ROWS + row)/args.n_gqa;
    rows.token[1] = (block*ROWS + row + 8)/args.n_gqa;

    razor_queue q_k;
    razor_queue q_v;

    // how many warps are done with a tile counts, and each waits for its own products alone
    auto leave = [&](uint64_t * empty) {
        if (lane == 0) {
            razor_barrier_arrive(empty);
        }
    };

    // the two groups issue their products in turn, so that each has the other's time for its powers
    auto wait_turn = [&] {
#ifndef RAZOR_NO_TURNS
        asm volatile("bar.sync %0, %1;" :: "r"(3 + group), "n"(GROUPS*GROUP) : "memory");
#endif
    };
    auto pass_turn = [&] {
#ifndef RAZOR_NO_TURNS
        asm volatile("bar.arrive %0, %1;" :: "r"(3 + (group ^ 1)), "n"(GROUPS*GROUP) : "memory");
#endif
    };

    if (group == 1) {
        pass_turn();
    }

    const int begin = razor_range(args, range);
    const int end   = razor_range(args, range + 1);

    for (int at = begin; at < end;) {
        const razor_piece piece = razor_piece_at(args, at, end);

        const int  head_kv = args.heads[piece.head];
        const bool whole   = piece.first == 0 && piece.end == piece.n;
        const int  part    = 2*(range*args.n_blocks + block) + (at != begin);

        at += piece.end - piece.first;

        asm volatile("bar.sync %0, %1;" :: "r"(1 + group), "n"(GROUP) : "memory"); // the queries before are read
        razor_hopper_queries<D>(sh.q, args, head_kv, 64*group, block*ROWS, thread);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, %1;" :: "r"(1 + group), "n"(GROUP) : "memory");

        rows.reset();

        razor_barrier_wait(&sh.k_full[q_k.stage], q_k.phase);
        int2 tile = sh.tile[q_k.stage];

        if (tile.x >= 0) {
            float factor[2];

            wait_turn();
            razor_pin(rows.s);
            razor_products_begin();
            rows.scores(sh.q, 64*group, sh.k[q_k.stage]);
            razor_products_commit();
            pass_turn();
            razor_products_wait<0>();
            razor_pin(rows.s);
            leave(&sh.k_empty[q_k.stage]);
            q_k.next();

            if (tile.y) {
                rows.hide(args, piece, tile.x);
            }
            rows.powers(factor);
            rows.pack();

            for (;;) {
                razor_barrier_wait(&sh.k_full[q_k.stage], q_k.phase);
                tile = sh.tile[q_k.stage];
                if (tile.x < 0) {
                    break;
                }

                wait_turn();
                razor_pin(rows.s);
                razor_pin(rows.o);
                razor_pin(rows.p);
                razor_products_begin();
                rows.scores(sh.q, 64*group, sh.k[q_k.stage]);
                razor_products_commit();

                razor_barrier_wait(&sh.v_full[q_v.stage], q_v.phase);
                rows.values(sh.v[q_v.stage]);
                razor_products_commit();
                pass_turn();

                razor_products_wait<1>();
                razor_pin(rows.s);
                leave(&sh.k_empty[q_k.stage]);
                q_k.next();

                if (tile.y) {
                    rows.hide(args, piece, tile.x);
                }
                rows.powers(factor);

                razor_products_wait<0>();
                razor_pin(rows.o);
                razor_pin(rows.p);
                leave(&sh.v_empty[q_v.stage]);
                q_v.next();

                rows.scale(factor);
                rows.pack();
            }

            razor_pin(rows.o);
            razor_pin(rows.p);
            razor_products_begin();
            razor_barrier_wait(&sh.v_full[q_v.stage], q_v.phase);
            rows.values(sh.v[q_v.stage]);
            razor_products_commit();
            razor_products_wait<0>();
            razor_pin(rows.o);
            leave(&sh.v_empty[q_v.stage]);
            q_v.next();
        }

        leave(&sh.k_empty[q_k.stage]); // of the end of the piece
        q_k.next();

#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = rows.sum[r];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);

            const int    at_row = block*ROWS + row + 8*r;
            const int    n_head = (args.n_heads[0] + args.n_heads[1])*args.n_gqa;
            const size_t slot   = (size_t) part*ROWS + row + 8*r;

            float * out;
            float   factor = 1.0f;

            if (whole) {
                if (at_row >= args.n_tokens*args.n_gqa) {
                    continue;
                }
                out    = args.out + ((size_t) rows.token[r]*n_head + head_kv*args.n_gqa + at_row % args.n_gqa)*D;
                factor = sum > 0.0f ? 1.0f/sum : 0.0f;
            } else {
                out = args.parts + slot*D;
                if (lane % 4 == 0) {
                    args.sums[slot] = make_float2(rows.max[r], sum);
                }
            }

#pragma unroll
            for (int i = 0; i < D/2; i += 4) {
                ((float2 *) out)[i + lane % 4] = make_float2(rows.o[i + 2*r]*factor, rows.o[i + 2*r + 1]*factor);
            }
        }
    }
}

template <int D>
static __global__ void __launch_bounds__((1 + GROUPS)*GROUP, 1) razor_hopper(
        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ razor_hopper_args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];

    auto & sh = *(razor_hopper_shared<D> *) memory;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            razor_barrier_init(&sh.k_full [i], 1);
            razor_barrier_init(&sh.v_full [i], 1);
            razor_barrier_init(&sh.k_empty[i], GROUPS*GROUP/32);
            razor_barrier_init(&sh.v_empty[i], GROUPS*GROUP/32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // registers go from those that load to those that compute
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            razor_hopper_load<D>(sh, k_map, v_map, args);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        razor_hopper_compute<D>(sh, args);
    }
#else
    (void) k_map, (void) v_map, (void) args;
    __trap(); // compiled for other devices, too, but never run there
#endif
}

// the parts of a KV head and a block of query rows -> the output
template <int D>
static __global__ void razor_hopper_add(const __grid_constant__ razor_hopper_args args) {
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
    const int at  = block*ROWS + row;
    if (at >= args.n_tokens*args.n_gqa) {
        return;
    }

    auto slot = [&](int range) {
        return (size_t) (2*(range*args.n_blocks + block) + (start > razor_range(args, range)))*ROWS + row;
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

//
// host
//

int razor_hopper_plan(razor_hopper_args & args, int n_multiprocessors) {
    args.n_tiles  = args.n_heads[0]*razor_head_tiles(args, 0) + args.n_heads[1]*razor_head_tiles(args, 1);
    args.n_blocks = (args.n_tokens*args.n_gqa + ROWS - 1)/ROWS;
    args.n_ranges = std::max(1, std::min(n_multiprocessors/args.n_blocks, args.n_tiles));

    return 2*args.n_blocks*args.n_ranges;
}

static bool razor_hopper_map(CUtensorMap & map, const half * rows, int64_t n_rows, int d) {
    using encode_t = decltype(&cuTensorMapEncodeTiled);

    static const encode_t encode = [] {
        void * res = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t err = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &res, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t err = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &res, cudaEnableDefault, &found);
#endif
        return err == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_t) res : nullptr;
    }();

    const cuuint64_t size  [2] = { (cuuint64_t) d, (cuuint64_t) n_rows };
    const cuuint64_t stride[1] = { d*sizeof(half) };
    const cuuint32_t box   [2] = { CHUNK, TILE };
    const cuuint32_t step  [2] = { 1, 1 };

    return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void *) rows, size, stride, box, step,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int D>
static bool razor_hopper_launch(const razor_hopper_args & args, cudaStream_t stream) {
    CUtensorMap k_map;
    CUtensorMap v_map;

    if (!razor_hopper_map(k_map, args.k, args.n_rows, D) || !razor_hopper_map(v_map, args.v, args.n_rows, D)) {
        return false;
    }

    const int bytes = sizeof(razor_hopper_shared<D>);

    if (cudaFuncSetAttribute(razor_hopper<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
        return false;
    }

    razor_hopper<D><<<args.n_blocks*args.n_ranges, (1 + GROUPS)*GROUP, bytes, stream>>>(k_map, v_map, args);

    if (args.n_ranges > 1) {
        const dim3 rows(D/4, 1024/D, 1);
        const dim3 grid(args.n_blocks, args.n_heads[0] + args.n_heads[1], ROWS/rows.y);

        razor_hopper_add<D><<<grid, rows, 0, stream>>>(args);
    }

    return cudaGetLastError() == cudaSuccess;
}

bool razor_hopper_attn(const razor_hopper_args & args, int d, cudaStream_t stream) {
    return d == 64 ? razor_hopper_launch<64>(args, stream) : razor_hopper_launch<128>(args, stream);
}
