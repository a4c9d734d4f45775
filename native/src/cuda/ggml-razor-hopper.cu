// attention of a batch for compute capability 9.0, with wgmma and TMA
//
// a thread block has a producer, which loads tiles with TMA, and two consumer warpgroups of 64 query rows each
// a consumer computes Q*K of a tile while P*V of the previous tile runs, as in FlashAttention-3 (arXiv 2407.08608)

#include "ggml-razor-batch.cuh"

#include <cuda.h>

#pragma nv_diag_suppress 177 // unused functions: the kernel is empty for other architectures

static constexpr int BLOCK_N        = GGML_RAZOR_TILE;
static constexpr int WARPGROUP_M    = 64;                  // query rows of a warpgroup
static constexpr int WARPGROUP_SIZE = 128;                 // threads
static constexpr int N_CONSUMERS    = BLOCK_M/WARPGROUP_M; // consumer warpgroups
static constexpr int N_STAGES       = 2;                   // tiles of K and of V in shared memory

//
// PTX instructions
//

static __device__ __forceinline__ void mbarrier_init(uint64_t * bar, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(ggml_cuda_cvta_generic_to_shared(bar)), "r"(n));
}

static __device__ __forceinline__ void mbarrier_arrive(uint64_t * bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(ggml_cuda_cvta_generic_to_shared(bar)) : "memory");
}

// the phase also waits for TMA to write this number of bytes
static __device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t * bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(ggml_cuda_cvta_generic_to_shared(bar)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void mbarrier_wait_parity(uint64_t * bar, int phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra end;\n"
        "bra again;\n"
        "end:\n"
        "}\n" :: "r"(ggml_cuda_cvta_generic_to_shared(bar)), "r"(phase) : "memory");
}

// load a box of a tensor into shared memory
static __device__ __forceinline__ void tma_load_2d(void * dst, const CUtensorMap * map, int column, int row, uint64_t * bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(ggml_cuda_cvta_generic_to_shared(dst)), "l"((uint64_t) map), "r"(column), "r"(row), "r"(ggml_cuda_cvta_generic_to_shared(bar)) : "memory");
}

// matrix descriptor for 128-byte swizzled rows, with a stride of 1024 bytes between groups of 8 rows
// chunk: leading dimension byte offset, between groups of SWIZZLE_WIDTH columns; only used if the matrix is transposed
static __device__ __forceinline__ uint64_t make_smem_desc(void * p, int chunk) {
    return (uint64_t) (ggml_cuda_cvta_generic_to_shared(p) >> 4 & 0x3fff) | (uint64_t) (chunk >> 4) << 16 | (uint64_t) (1024 >> 4) << 32 | 1ull << 62;
}

#define REPEAT_8(x, i)  x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define REPEAT_32(x, i) REPEAT_8(x, i), REPEAT_8(x, i + 8), REPEAT_8(x, i + 16), REPEAT_8(x, i + 24)
#define ACC_OPERAND(i)  "+f"(d[i])

#define ACC_REGS_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ACC_REGS_32 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, 128] (+)= a [64, 16] x b [128, 16]^T
static __device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" ACC_REGS_0 ", " ACC_REGS_32 "}, %64, %65, add, 1, 1, 0, 0;\n"
        "}\n" : REPEAT_32(ACC_OPERAND, 0), REPEAT_32(ACC_OPERAND, 32) : "l"(a), "l"(b), "r"(add));
}

// d [64, 128] += a [64, 16] x b [16, 128]
static __device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], const uint32_t * a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" ACC_REGS_0 ", " ACC_REGS_32 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : REPEAT_32(ACC_OPERAND, 0), REPEAT_32(ACC_OPERAND, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d [64, 64] += a [64, 16] x b [16, 64]
static __device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], const uint32_t * a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" ACC_REGS_0 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : REPEAT_32(ACC_OPERAND, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void wgmma_fence()        { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int n>
static __device__ __forceinline__ void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory"); }

// barrier for n threads: those that wait plus those that only arrive
template <int n>
static __device__ __forceinline__ void named_barrier_sync(int id) { asm volatile("bar.sync %0, %1;" :: "r"(id), "n"(n) : "memory"); }

template <int n>
static __device__ __forceinline__ void named_barrier_arrive(int id) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "n"(n) : "memory"); }

static __device__ __forceinline__ void fence_proxy_async()   { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
static __device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

template <int n>
static __device__ __forceinline__ void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(n)); }

template <int n>
static __device__ __forceinline__ void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(n)); }

// keep the compiler from moving accesses to these registers across
template <int n>
static __device__ __forceinline__ void warpgroup_fence_operand(float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+f"(x[i]) :: "memory");
    }
}

template <int n>
static __device__ __forceinline__ void warpgroup_fence_operand(uint32_t (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+r"(x[i]) :: "memory");
    }
}

template <int D>
struct razor_hopper_smem {
    half q[D/SWIZZLE_WIDTH][BLOCK_M][SWIZZLE_WIDTH];
    half k[N_STAGES][D/SWIZZLE_WIDTH][BLOCK_N][SWIZZLE_WIDTH];
    half v[N_STAGES][D/SWIZZLE_WIDTH][BLOCK_N][SWIZZLE_WIDTH];

    uint64_t k_full [N_STAGES];
    uint64_t k_empty[N_STAGES];
    uint64_t v_full [N_STAGES];
    uint64_t v_empty[N_STAGES];

    int2 tile[N_STAGES]; // first cell, or -1 at the end of a segment; 1 if the tile has to be masked
};

// position in the stages of K or V, the phase flips each time all stages were used
struct pipeline_state {
    int stage = 0;
    int phase = 0;

    __device__ void advance() {
        if (++stage == N_STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

//
// producer: one thread, which loads the visible tiles of all segments
//

template <int D>
static __device__ void razor_hopper_producer(
        razor_hopper_smem<D> & smem, const CUtensorMap & k_map, const CUtensorMap & v_map, const razor_batch_args & args) {
    const int block = blockIdx.x % args.n_blocks;
    const int range = blockIdx.x / args.n_blocks;

    const int t_first = block*BLOCK_M/args.n_gqa;
    const int t_last  = min(args.n_tokens - 1, (block*BLOCK_M + BLOCK_M - 1)/args.n_gqa);

    pipeline_state pipe_k;
    pipeline_state pipe_v;

    const int end = razor_batch_range_begin(args, range + 1);

    for (int at = razor_batch_range_begin(args, range); at < end;) {
        const razor_segment segment = razor_batch_get_segment(args, at, end);
        at += segment.end - segment.first;

        int2 next = args.tiles[segment.tiles + segment.first];

        for (int i = segment.first; i < segment.end; ++i) {
            const int2 tile = next;
            if (i + 1 < segment.end) {
                next = args.tiles[segment.tiles + i + 1];
            }
            if (tile.x > t_last) {
                continue;
            }

            const int cell = i*BLOCK_N;

            // 1. K, as soon as the stage is free
            mbarrier_wait_parity(&smem.k_empty[pipe_k.stage], pipe_k.phase ^ 1);
            smem.tile[pipe_k.stage] = make_int2(cell, tile.y > t_first);
            mbarrier_arrive_expect_tx(&smem.k_full[pipe_k.stage], sizeof(smem.k[0]));
            for (int c = 0; c < D/SWIZZLE_WIDTH; ++c) {
                tma_load_2d(smem.k[pipe_k.stage][c], &k_map, c*SWIZZLE_WIDTH, segment.row + cell, &smem.k_full[pipe_k.stage]);
            }
            pipe_k.advance();

            // 2. V
            mbarrier_wait_parity(&smem.v_empty[pipe_v.stage], pipe_v.phase ^ 1);
            mbarrier_arrive_expect_tx(&smem.v_full[pipe_v.stage], sizeof(smem.v[0]));
            for (int c = 0; c < D/SWIZZLE_WIDTH; ++c) {
                tma_load_2d(smem.v[pipe_v.stage][c], &v_map, c*SWIZZLE_WIDTH, segment.row + cell, &smem.v_full[pipe_v.stage]);
            }
            pipe_v.advance();
        }

        // 3. end of the segment
        mbarrier_wait_parity(&smem.k_empty[pipe_k.stage], pipe_k.phase ^ 1);
        smem.tile[pipe_k.stage] = make_int2(-1, 0);
        mbarrier_arrive(&smem.k_full[pipe_k.stage]);
        pipe_k.advance();
    }
}

//
// consumers
//

// start S = Q*K^T
template <int D>
static __device__ __forceinline__ void wgmma_qk(float (&s)[BLOCK_N/2], half (*q)[BLOCK_M][SWIZZLE_WIDTH], int row, half (*k)[BLOCK_N][SWIZZLE_WIDTH]) {
#pragma unroll
    for (int i = 0; i < D/16; ++i) {
        wgmma_m64n128k16(s, make_smem_desc(&q[i/4][row][i%4*16], 0), make_smem_desc(&k[i/4][0][i%4*16], 0), i > 0);
    }
}

// start O += P*V
template <int D>
static __device__ __forceinline__ void wgmma_pv(float (&o)[D/2], const uint32_t (&p)[BLOCK_N/4], half (*v)[BLOCK_N][SWIZZLE_WIDTH]) {
#pragma unroll
    for (int i = 0; i < BLOCK_N/16; ++i) {
        const uint64_t desc = make_smem_desc(&v[0][16*i][0], sizeof(v[0]));

        if constexpr (D == 128) {
            wgmma_m64n128k16(o, &p[4*i], desc);
        } else {
            wgmma_m64n64k16(o, &p[4*i], desc);
        }
    }
}

template <int D>
static __device__ void razor_hopper_consumer(razor_hopper_smem<D> & smem, const razor_batch_args & args) {
    const int block  = blockIdx.x % args.n_blocks;
    const int range  = blockIdx.x / args.n_blocks;
    const int group  = threadIdx.x/WARPGROUP_SIZE - 1;
    const int thread = threadIdx.x % WARPGROUP_SIZE;
    const int lane   = threadIdx.x % 32;
    const int row    = WARPGROUP_M*group + thread/32*16 + lane/4; // first of two rows

    razor_batch_acc<D, BLOCK_N, 1> acc;

    acc.init_tokens(args, block, row);

    pipeline_state pipe_k;
    pipeline_state pipe_v;

    // each warp releases a stage when its own wgmma instructions are complete
    auto release = [&](uint64_t * empty) {
        if (lane == 0) {
            mbarrier_arrive(empty);
        }
    };

    // the warpgroups issue wgmma instructions in turn, so that one computes exponentials while the tensor cores run for the other
    auto wait_turn = [&] {
        named_barrier_sync<N_CONSUMERS*WARPGROUP_SIZE>(3 + group);
    };
    auto pass_turn = [&] {
        named_barrier_arrive<N_CONSUMERS*WARPGROUP_SIZE>(3 + (group ^ 1));
    };

    if (group == 1) {
        pass_turn();
    }

    // 1. for each segment of the range
    const int begin = razor_batch_range_begin(args, range);
    const int end   = razor_batch_range_begin(args, range + 1);

    for (int at = begin; at < end;) {
        const razor_segment segment = razor_batch_get_segment(args, at, end);

        const int  head_kv = args.heads[segment.head];
        const bool whole   = segment.first == 0 && segment.end == segment.n;
        const int  part    = 2*(range*args.n_blocks + block) + (at != begin);

        at += segment.end - segment.first;

        // 2. load Q
        named_barrier_sync<WARPGROUP_SIZE>(1 + group); // the previous Q is no longer read
        razor_batch_load_q<D>(smem.q, args, head_kv, block, WARPGROUP_M*group, WARPGROUP_M, thread, WARPGROUP_SIZE);
        fence_proxy_async();
        named_barrier_sync<WARPGROUP_SIZE>(1 + group);

        acc.reset();

        // 3. first tile: S = Q*K^T and softmax
        mbarrier_wait_parity(&smem.k_full[pipe_k.stage], pipe_k.phase);
        int2 tile = smem.tile[pipe_k.stage];

        if (tile.x >= 0) {
            float scale_o[1][2];

            wait_turn();
            warpgroup_fence_operand(acc.s[0]);
            wgmma_fence();
            wgmma_qk<D>(acc.s[0], smem.q, WARPGROUP_M*group, smem.k[pipe_k.stage]);
            wgmma_commit_group();
            pass_turn();
            wgmma_wait_group<0>();
            warpgroup_fence_operand(acc.s[0]);
            release(&smem.k_empty[pipe_k.stage]);
            pipe_k.advance();

            if (tile.y) {
                acc.apply_mask(args, segment, tile.x);
            }
            acc.online_softmax(scale_o);
            acc.convert_p();

            for (;;) {
                mbarrier_wait_parity(&smem.k_full[pipe_k.stage], pipe_k.phase);
                tile = smem.tile[pipe_k.stage];
                if (tile.x < 0) {
                    break;
                }

                // 4. next tile: start S = Q*K^T, then O += P*V of the previous tile
                wait_turn();
                warpgroup_fence_operand(acc.s[0]);
                warpgroup_fence_operand(acc.o[0]);
                warpgroup_fence_operand(acc.p[0]);
                wgmma_fence();
                wgmma_qk<D>(acc.s[0], smem.q, WARPGROUP_M*group, smem.k[pipe_k.stage]);
                wgmma_commit_group();

                mbarrier_wait_parity(&smem.v_full[pipe_v.stage], pipe_v.phase);
                wgmma_pv<D>(acc.o[0], acc.p[0], smem.v[pipe_v.stage]);
                wgmma_commit_group();
                pass_turn();

                // 5. softmax of S while P*V is running
                wgmma_wait_group<1>();
                warpgroup_fence_operand(acc.s[0]);
                release(&smem.k_empty[pipe_k.stage]);
                pipe_k.advance();

                if (tile.y) {
                    acc.apply_mask(args, segment, tile.x);
                }
                acc.online_softmax(scale_o);

                // 6. rescale O
                wgmma_wait_group<0>();
                warpgroup_fence_operand(acc.o[0]);
                warpgroup_fence_operand(acc.p[0]);
                release(&smem.v_empty[pipe_v.stage]);
                pipe_v.advance();

                acc.rescale_o(scale_o);
                acc.convert_p();
            }

            // 7. O += P*V of the last tile
            warpgroup_fence_operand(acc.o[0]);
            warpgroup_fence_operand(acc.p[0]);
            wgmma_fence();
            mbarrier_wait_parity(&smem.v_full[pipe_v.stage], pipe_v.phase);
            wgmma_pv<D>(acc.o[0], acc.p[0], smem.v[pipe_v.stage]);
            wgmma_commit_group();
            wgmma_wait_group<0>();
            warpgroup_fence_operand(acc.o[0]);
            release(&smem.v_empty[pipe_v.stage]);
            pipe_v.advance();
        }

        release(&smem.k_empty[pipe_k.stage]); // end of the segment
        pipe_k.advance();

        // 8. write the output or a partial result
        acc.store(args, head_kv, block, row, whole, part);
    }
}

template <int D>
static __global__ void __launch_bounds__((1 + N_CONSUMERS)*WARPGROUP_SIZE, 1) razor_hopper_kernel(
        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ razor_batch_args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char smem_raw[];

    auto & smem = *(razor_hopper_smem<D> *) smem_raw;

    // 1. initialize the barriers
    if (threadIdx.x == 0) {
        for (int i = 0; i < N_STAGES; ++i) {
            mbarrier_init(&smem.k_full [i], 1);
            mbarrier_init(&smem.v_full [i], 1);
            mbarrier_init(&smem.k_empty[i], N_CONSUMERS*WARPGROUP_SIZE/32);
            mbarrier_init(&smem.v_empty[i], N_CONSUMERS*WARPGROUP_SIZE/32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    // 2. the producer gives registers to the consumers
    if (threadIdx.x < WARPGROUP_SIZE) {
        setmaxnreg_dec<24>();
        if (threadIdx.x == 0) {
            razor_hopper_producer<D>(smem, k_map, v_map, args);
        }
    } else {
        setmaxnreg_inc<240>();
        razor_hopper_consumer<D>(smem, args);
    }
#else
    (void) k_map, (void) v_map, (void) args;
    __trap(); // never launched on other devices
#endif
}

//
// host
//

static bool razor_hopper_make_tensor_map(CUtensorMap & map, const half * rows, int64_t n_rows, int d) {
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
    const cuuint32_t box   [2] = { SWIZZLE_WIDTH, BLOCK_N };
    const cuuint32_t step  [2] = { 1, 1 };

    return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void *) rows, size, stride, box, step,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int D>
static bool razor_hopper_launch(const razor_batch_args & args, cudaStream_t stream) {
    CUtensorMap k_map;
    CUtensorMap v_map;

    if (!razor_hopper_make_tensor_map(k_map, args.k, args.n_rows, D) || !razor_hopper_make_tensor_map(v_map, args.v, args.n_rows, D)) {
        return false;
    }

    const int bytes = sizeof(razor_hopper_smem<D>);

    // if this fails, so does the launch
    cudaFuncSetAttribute(razor_hopper_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

    razor_hopper_kernel<D><<<args.n_blocks*args.n_ranges, (1 + N_CONSUMERS)*WARPGROUP_SIZE, bytes, stream>>>(k_map, v_map, args);

    razor_batch_launch_combine<D>(args, stream);

    return true;
}

bool razor_hopper_attn(const razor_batch_args & args, int d, cudaStream_t stream) {
    return d == 64 ? razor_hopper_launch<64>(args, stream) : razor_hopper_launch<128>(args, stream);
}
