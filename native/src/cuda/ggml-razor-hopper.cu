// Attention of a batch on GPUs of compute capability 9.0, with their matrix instructions (wgmma) and copy engine (TMA).
//
// A block has one warp that loads and eight that compute, in two groups of 64 query rows each. Scores of a tile are computed
// while the values of the tile before are added up (as FlashAttention-3, arXiv 2407.08608, does).

#include "ggml-razor-batch.cuh"

#include <cuda.h>

#pragma nv_diag_suppress 177 // in code for other devices nothing of this is called

static constexpr int TILE   = GGML_RAZOR_TILE;
static constexpr int ROWS   = GGML_RAZOR_ROWS;
static constexpr int GROUP  = 128;     // threads that issue matrix instructions together
static constexpr int GROUPS = ROWS/64; // of them
static constexpr int STAGES = 2;       // tiles of K, and of V, that are loaded ahead

static constexpr int CHUNK = RAZOR_CHUNK;

//
// instructions
//

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
        razor_hopper_shared<D> & sh, const CUtensorMap & k_map, const CUtensorMap & v_map, const razor_batch_args & args) {
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

// s = q x k^T, without waiting
template <int D>
static __device__ __forceinline__ void razor_scores(float (&s)[TILE/2], const half (*q)[ROWS][CHUNK], int row, const half (*k)[TILE][CHUNK]) {
#pragma unroll
    for (int i = 0; i < D/16; ++i) {
        razor_product(s, razor_matrix(&q[i/4][row][i%4*16], 0), razor_matrix(&k[i/4][0][i%4*16], 0), i > 0);
    }
}

// o += p x v, without waiting
template <int D>
static __device__ __forceinline__ void razor_values(float (&o)[D/2], const uint32_t (&p)[TILE/4], const half (*v)[TILE][CHUNK]) {
#pragma unroll
    for (int i = 0; i < TILE/16; ++i) {
        razor_product(o, &p[4*i], razor_matrix(&v[0][16*i][0], sizeof(v[0])));
    }
}

template <int D>
static __device__ void razor_hopper_compute(razor_hopper_shared<D> & sh, const razor_batch_args & args) {
    const int block  = blockIdx.x % args.n_blocks;
    const int range  = blockIdx.x / args.n_blocks;
    const int group  = threadIdx.x/GROUP - 1;
    const int thread = threadIdx.x % GROUP;
    const int lane   = threadIdx.x % 32;
    const int row    = 64*group + thread/32*16 + lane/4; // of the first of the two

    razor_batch_rows<D, TILE, 1> rows;

    rows.place(args, block, row);

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
        asm volatile("bar.sync %0, %1;" :: "r"(3 + group), "n"(GROUPS*GROUP) : "memory");
    };
    auto pass_turn = [&] {
        asm volatile("bar.arrive %0, %1;" :: "r"(3 + (group ^ 1)), "n"(GROUPS*GROUP) : "memory");
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
        razor_batch_queries<D>(sh.q, args, head_kv, block, 64*group, 64, thread, GROUP);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, %1;" :: "r"(1 + group), "n"(GROUP) : "memory");

        rows.reset();

        razor_barrier_wait(&sh.k_full[q_k.stage], q_k.phase);
        int2 tile = sh.tile[q_k.stage];

        if (tile.x >= 0) {
            float factor[1][2];

            wait_turn();
            razor_pin(rows.s[0]);
            razor_products_begin();
            razor_scores<D>(rows.s[0], sh.q, 64*group, sh.k[q_k.stage]);
            razor_products_commit();
            pass_turn();
            razor_products_wait<0>();
            razor_pin(rows.s[0]);
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
                razor_pin(rows.s[0]);
                razor_pin(rows.o[0]);
                razor_pin(rows.p[0]);
                razor_products_begin();
                razor_scores<D>(rows.s[0], sh.q, 64*group, sh.k[q_k.stage]);
                razor_products_commit();

                razor_barrier_wait(&sh.v_full[q_v.stage], q_v.phase);
                razor_values<D>(rows.o[0], rows.p[0], sh.v[q_v.stage]);
                razor_products_commit();
                pass_turn();

                razor_products_wait<1>();
                razor_pin(rows.s[0]);
                leave(&sh.k_empty[q_k.stage]);
                q_k.next();

                if (tile.y) {
                    rows.hide(args, piece, tile.x);
                }
                rows.powers(factor);

                razor_products_wait<0>();
                razor_pin(rows.o[0]);
                razor_pin(rows.p[0]);
                leave(&sh.v_empty[q_v.stage]);
                q_v.next();

                rows.scale(factor);
                rows.pack();
            }

            razor_pin(rows.o[0]);
            razor_pin(rows.p[0]);
            razor_products_begin();
            razor_barrier_wait(&sh.v_full[q_v.stage], q_v.phase);
            razor_values<D>(rows.o[0], rows.p[0], sh.v[q_v.stage]);
            razor_products_commit();
            razor_products_wait<0>();
            razor_pin(rows.o[0]);
            leave(&sh.v_empty[q_v.stage]);
            q_v.next();
        }

        leave(&sh.k_empty[q_k.stage]); // of the end of the piece
        q_k.next();

        rows.store(args, head_kv, block, row, whole, part);
    }
}

template <int D>
static __global__ void __launch_bounds__((1 + GROUPS)*GROUP, 1) razor_hopper(
        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ razor_batch_args args) {
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

//
// host
//

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
static bool razor_hopper_launch(const razor_batch_args & args, cudaStream_t stream) {
    CUtensorMap k_map;
    CUtensorMap v_map;

    if (!razor_hopper_map(k_map, args.k, args.n_rows, D) || !razor_hopper_map(v_map, args.v, args.n_rows, D)) {
        return false;
    }

    const int bytes = sizeof(razor_hopper_shared<D>);

    // an error shows when it is launched
    cudaFuncSetAttribute(razor_hopper<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

    razor_hopper<D><<<args.n_blocks*args.n_ranges, (1 + GROUPS)*GROUP, bytes, stream>>>(k_map, v_map, args);

    razor_batch_add_parts<D>(args, stream);

    return true;
}

bool razor_hopper_attn(const razor_batch_args & args, int d, cudaStream_t stream) {
    return d == 64 ? razor_hopper_launch<64>(args, stream) : razor_hopper_launch<128>(args, stream);
}
