// attention of a batch for compute capability 8.0 and later, with mma.sync and cp.async
//
// each of four warps has 32 query rows, so that a fragment of K or V from shared memory is used for two mma instructions
// V is loaded while Q*K is computed, the next tile of K while P*V is computed

#include "ggml-razor-batch.cuh"

#pragma nv_diag_suppress 177 // unused functions: the kernel is empty for older architectures

static constexpr int N_WARPS = 4;

//
// PTX instructions
//

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// load four 8x8 matrices, p is the address of the row of this lane
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], void * p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(ggml_cuda_cvta_generic_to_shared(p)) : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], void * p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(ggml_cuda_cvta_generic_to_shared(p)) : "memory");
}

// d [16, 8] += a [16, 16] x b [16, 8]
static __device__ __forceinline__ void mma_m16n8k16(float * d, const uint32_t * a, const uint32_t * b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_m16n8k16(uint32_t * d, const uint32_t * a, const uint32_t * b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// BLOCK_N is the number of cells of an iteration, a tile or a part of it
template <int D, int BLOCK_N>
struct razor_ampere_smem {
    half q[D/SWIZZLE_WIDTH][BLOCK_M][SWIZZLE_WIDTH];
    half k[D/SWIZZLE_WIDTH][BLOCK_N][SWIZZLE_WIDTH];
    half v[D/SWIZZLE_WIDTH][BLOCK_N][SWIZZLE_WIDTH];
};

// f16_acc: accumulate P*V in F16 over BLOCK_N cells
template <int D, int BLOCK_N, bool f16_acc>
static __global__ void __launch_bounds__(N_WARPS*32, RAZOR_AMPERE_BLOCKS_PER_SM) razor_ampere_kernel(const __grid_constant__ razor_batch_args args) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(1024) char smem_raw[];

    auto & smem = *(razor_ampere_smem<D, BLOCK_N> *) smem_raw;

    constexpr int N_PARTS = GGML_RAZOR_TILE/BLOCK_N; // iterations per tile

    const int block = blockIdx.x % args.n_blocks;
    const int range = blockIdx.x / args.n_blocks;

    const int t_first = block*BLOCK_M/args.n_gqa;
    const int t_last  = min(args.n_tokens - 1, (block*BLOCK_M + BLOCK_M - 1)/args.n_gqa);

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int row  = 32*warp + lane/4; // first of four rows

    razor_batch_acc<D, BLOCK_N, 2> acc;

    acc.init_tokens(args, block, row);

    // 1. for each segment of the range
    const int begin = razor_batch_range_begin(args, range);
    const int end   = razor_batch_range_begin(args, range + 1);

    for (int at = begin; at < end;) {
        const razor_segment segment = razor_batch_get_segment(args, at, end);

        const int  n_kv    = args.n_kv[segment.group];
        const int  head_kv = args.heads[segment.head];
        const bool whole   = segment.first == 0 && segment.end == segment.n;
        const int  part    = 2*(range*args.n_blocks + block) + (at != begin);

        at += segment.end - segment.first;

        auto load = [&](half (*dst)[BLOCK_N][SWIZZLE_WIDTH], const half * src, int cell) {
#pragma unroll
            for (int i = threadIdx.x; i < BLOCK_N*D/8; i += N_WARPS*32) {
                const int r = i/(D/8);
                const int c = i % (D/8);

                half       * to   = &dst[c/8][r][(c ^ r) % 8*8];
                const half * from = src + (size_t) (segment.row + min(cell + r, n_kv - 1))*D + c*8;

                cp_async_cg_16<0>(ggml_cuda_cvta_generic_to_shared(to), from);
            }
        };

        // return the first tile from there on that any token of the block sees
        auto next_tile = [&](int tile) {
            while (tile < segment.end && args.tiles[segment.tiles + tile].x > t_last) {
                ++tile;
            }
            return tile;
        };

        // 2. load Q and the first part of K
        __syncthreads(); // all warps are done with the shared memory of the previous segment
        razor_batch_load_q<D>(smem.q, args, head_kv, block, 0, BLOCK_M, threadIdx.x, N_WARPS*32);

        acc.reset();

        int tile = next_tile(segment.first);
        int t    = 0; // part of the tile
        if (tile < segment.end) {
            load(smem.k, args.k, tile*GGML_RAZOR_TILE);
        }

        while (tile < segment.end) {
            const int  cell   = tile*GGML_RAZOR_TILE + t*BLOCK_N;
            const bool masked = args.tiles[segment.tiles + tile].y > t_first;

            if (++t == N_PARTS) {
                t    = 0;
                tile = next_tile(tile + 1);
            }

            // 3. wait for K, start to load V
            cp_async_wait_all();
            __syncthreads(); // all warps are done with the previous V
            load(smem.v, args.v, cell);

            // 4. S = Q*K^T
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int i = 0; i < BLOCK_N/2; ++i) {
                    acc.s[m][i] = 0.0f;
                }
            }
#pragma unroll
            for (int i = 0; i < D/16; ++i) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const int r = 32*warp + 16*m + lane % 16;

                    ldmatrix_x4(a[m], &smem.q[i/4][r][((i % 4*2 + lane/16) ^ r) % 8*8]);
                }
#pragma unroll
                for (int j = 0; j < BLOCK_N/16; ++j) {
                    const int r = 16*j + lane/16*8 + lane % 8;

                    uint32_t b[4];
                    ldmatrix_x4(b, &smem.k[i/4][r][((i % 4*2 + lane/8 % 2) ^ r) % 8*8]);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        mma_m16n8k16(&acc.s[m][8*j + 0], a[m], b + 0);
                        mma_m16n8k16(&acc.s[m][8*j + 4], a[m], b + 2);
                    }
                }
            }

            // 5. wait for V, start to load the next part of K
            cp_async_wait_all();
            __syncthreads(); // all warps are done with K
            if (tile < segment.end) {
                load(smem.k, args.k, tile*GGML_RAZOR_TILE + t*BLOCK_N);
            }

            // 6. softmax
            if (masked) {
                acc.apply_mask(args, segment, cell);
            }

            float scale_o[2][2];
            acc.online_softmax(scale_o);
            if (__any_sync(0xffffffff, scale_o[0][0] != 1.0f || scale_o[0][1] != 1.0f || scale_o[1][0] != 1.0f || scale_o[1][1] != 1.0f)) {
                acc.rescale_o(scale_o);
            }
            acc.convert_p();

            // 7. O += P*V
#pragma unroll
            for (int j = 0; j < D/16; ++j) {
                uint32_t o_f16[2][2][2] = {};
#pragma unroll
                for (int i = 0; i < BLOCK_N/16; ++i) {
                    const int r = 16*i + lane % 16;

                    uint32_t b[4];
                    ldmatrix_x4_trans(b, &smem.v[j/4][r][((j % 4*2 + lane/16) ^ r) % 8*8]);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            if (f16_acc) {
                                mma_m16n8k16(o_f16[m][n], &acc.p[m][4*i], b + 2*n);
                            } else {
                                mma_m16n8k16(&acc.o[m][8*j + 4*n], &acc.p[m][4*i], b + 2*n);
                            }
                        }
                    }
                }
                if (f16_acc) {
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
#pragma unroll
                            for (int r = 0; r < 2; ++r) {
                                half2 h;
                                memcpy(&h, &o_f16[m][n][r], sizeof(h));
                                const float2 f = __half22float2(h);
                                acc.o[m][8*j + 4*n + 2*r + 0] += f.x;
                                acc.o[m][8*j + 4*n + 2*r + 1] += f.y;
                            }
                        }
                    }
                }
            }
        }

        // 8. write the output or a partial result
        acc.store(args, head_kv, block, row, whole, part);
    }
#else
    (void) args;
    __trap(); // never launched on older devices
#endif
}

//
// host
//

template <int D, int BLOCK_N, bool f16_acc>
static void razor_ampere_launch(const razor_batch_args & args, cudaStream_t stream) {
    const int bytes = sizeof(razor_ampere_smem<D, BLOCK_N>);

    // if this fails, so does the launch
    cudaFuncSetAttribute(razor_ampere_kernel<D, BLOCK_N, f16_acc>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

    razor_ampere_kernel<D, BLOCK_N, f16_acc><<<args.n_blocks*args.n_ranges, N_WARPS*32, bytes, stream>>>(args);

    razor_batch_launch_combine<D>(args, stream);
}

void razor_ampere_attn(const razor_batch_args & args, int d, bool f16_acc, cudaStream_t stream) {
    if (d == 64) {
        if (f16_acc) {
            razor_ampere_launch<64, 64, true> (args, stream);
        } else {
            razor_ampere_launch<64, 64, false>(args, stream);
        }
    } else if (f16_acc) {
        razor_ampere_launch<128, 32, true> (args, stream); // two thread blocks fit into 100 KiB of shared memory
    } else {
        razor_ampere_launch<128, 64, false>(args, stream);
    }
}
