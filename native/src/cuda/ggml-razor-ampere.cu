// Attention of a batch on GPUs of compute capability 8.0 and later.
//
// Four warps have 32 query rows each, so that what they read of K and V from shared memory serves two matrix instructions. Values
// are loaded while scores are computed, and the next keys while values are added up.

#include "ggml-razor-batch.cuh"

#pragma nv_diag_suppress 177 // in code for older devices nothing of this is called

static constexpr int WARPS = 4;
static constexpr int ROWS  = GGML_RAZOR_ROWS;
static constexpr int CHUNK = RAZOR_CHUNK;

static constexpr int AT_ONCE = RAZOR_AMPERE_AT_ONCE;

//
// instructions
//

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
static __device__ __forceinline__ void razor_copy(void * dst, const void * src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(razor_shared(dst)), "l"(src) : "memory");
}

static __device__ __forceinline__ void razor_copies_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// four matrices of 8 x 8; p: this lane's row of one of them
static __device__ __forceinline__ void razor_fragments(uint32_t (&x)[4], const void * p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(razor_shared(p)) : "memory");
}

static __device__ __forceinline__ void razor_fragments_transposed(uint32_t (&x)[4], const void * p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(razor_shared(p)) : "memory");
}

// d [16, 8] += a [16, 16] x b [16, 8]
static __device__ __forceinline__ void razor_product(float * d, const uint32_t * a, const uint32_t * b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void razor_product(uint32_t * d, const uint32_t * a, const uint32_t * b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// T cells are looked at together
template <int D, int T>
struct razor_ampere_shared {
    half q[D/CHUNK][ROWS][CHUNK];
    half k[D/CHUNK][T][CHUNK];
    half v[D/CHUNK][T][CHUNK];
};

// fast_sums: of the products with values, of T cells each, in F16
template <int D, int T, bool fast_sums>
static __global__ void __launch_bounds__(WARPS*32, AT_ONCE) razor_ampere(const __grid_constant__ razor_batch_args args) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(1024) char memory[];

    auto & sh = *(razor_ampere_shared<D, T> *) memory;

    constexpr int PARTS = GGML_RAZOR_TILE/T; // of a tile

    const int block = blockIdx.x % args.n_blocks;
    const int range = blockIdx.x / args.n_blocks;

    const int t_first = block*ROWS/args.n_gqa;
    const int t_last  = min(args.n_tokens - 1, (block*ROWS + ROWS - 1)/args.n_gqa);

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int row  = 32*warp + lane/4; // of the first of four

    razor_batch_rows<D, T, 2> rows;

    rows.place(args, block, row);

    const int begin = razor_range(args, range);
    const int end   = razor_range(args, range + 1);

    for (int at = begin; at < end;) {
        const razor_piece piece = razor_piece_at(args, at, end);

        const int  n_kv    = args.n_kv[piece.group];
        const int  head_kv = args.heads[piece.head];
        const bool whole   = piece.first == 0 && piece.end == piece.n;
        const int  part    = 2*(range*args.n_blocks + block) + (at != begin);

        at += piece.end - piece.first;

        auto load = [&](half (*dst)[T][CHUNK], const half * src, int cell) {
#pragma unroll
            for (int i = threadIdx.x; i < T*D/8; i += WARPS*32) {
                const int r = i/(D/8);
                const int c = i % (D/8);

                razor_copy(&dst[c/8][r][(c ^ r) % 8*8], src + (size_t) (piece.row + min(cell + r, n_kv - 1))*D + c*8);
            }
        };

        // the first from there that some of the tokens see
        auto find = [&](int tile) {
            while (tile < piece.end && args.tiles[piece.tiles + tile].x > t_last) {
                ++tile;
            }
            return tile;
        };

        __syncthreads(); // the piece before is done with shared memory
        razor_batch_queries<D>(sh.q, args, head_kv, block, 0, ROWS, threadIdx.x, WARPS*32);

        rows.reset();

        int tile = find(piece.first);
        int t    = 0; // part of it
        if (tile < piece.end) {
            load(sh.k, args.k, tile*GGML_RAZOR_TILE);
        }

        while (tile < piece.end) {
            const int  cell = tile*GGML_RAZOR_TILE + t*T;
            const bool look = args.tiles[piece.tiles + tile].y > t_first;

            if (++t == PARTS) {
                t    = 0;
                tile = find(tile + 1);
            }

            razor_copies_wait();
            __syncthreads(); // keys are there, and the values before are used
            load(sh.v, args.v, cell);

#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int i = 0; i < T/2; ++i) {
                    rows.s[m][i] = 0.0f;
                }
            }
#pragma unroll
            for (int i = 0; i < D/16; ++i) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const int r = 32*warp + 16*m + lane % 16;

                    razor_fragments(a[m], &sh.q[i/4][r][((i % 4*2 + lane/16) ^ r) % 8*8]);
                }
#pragma unroll
                for (int j = 0; j < T/16; ++j) {
                    const int r = 16*j + lane/16*8 + lane % 8;

                    uint32_t b[4];
                    razor_fragments(b, &sh.k[i/4][r][((i % 4*2 + lane/8 % 2) ^ r) % 8*8]);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        razor_product(&rows.s[m][8*j + 0], a[m], b + 0);
                        razor_product(&rows.s[m][8*j + 4], a[m], b + 2);
                    }
                }
            }

            razor_copies_wait();
            __syncthreads(); // values are there, and keys are used
            if (tile < piece.end) {
                load(sh.k, args.k, tile*GGML_RAZOR_TILE + t*T);
            }

            if (look) {
                rows.hide(args, piece, cell);
            }

            float factor[2][2];
            rows.powers(factor);
            if (__any_sync(0xffffffff, factor[0][0] != 1.0f || factor[0][1] != 1.0f || factor[1][0] != 1.0f || factor[1][1] != 1.0f)) {
                rows.scale(factor);
            }
            rows.pack();

#pragma unroll
            for (int j = 0; j < D/16; ++j) {
                uint32_t sums[2][2][2] = {};
#pragma unroll
                for (int i = 0; i < T/16; ++i) {
                    const int r = 16*i + lane % 16;

                    uint32_t b[4];
                    razor_fragments_transposed(b, &sh.v[j/4][r][((j % 4*2 + lane/16) ^ r) % 8*8]);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            if (fast_sums) {
                                razor_product(sums[m][n], &rows.p[m][4*i], b + 2*n);
                            } else {
                                razor_product(&rows.o[m][8*j + 4*n], &rows.p[m][4*i], b + 2*n);
                            }
                        }
                    }
                }
                if (fast_sums) {
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
#pragma unroll
                            for (int r = 0; r < 2; ++r) {
                                half2 h;
                                memcpy(&h, &sums[m][n][r], sizeof(h));
                                const float2 f = __half22float2(h);
                                rows.o[m][8*j + 4*n + 2*r + 0] += f.x;
                                rows.o[m][8*j + 4*n + 2*r + 1] += f.y;
                            }
                        }
                    }
                }
            }
        }

        rows.store(args, head_kv, block, row, whole, part);
    }
#else
    (void) args;
    __trap(); // compiled for other devices, too, but never run there
#endif
}

//
// host
//

template <int D, int T, bool fast_sums>
static void razor_ampere_launch(const razor_batch_args & args, cudaStream_t stream) {
    const int bytes = sizeof(razor_ampere_shared<D, T>);

    // an error shows when it is launched
    cudaFuncSetAttribute(razor_ampere<D, T, fast_sums>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

    razor_ampere<D, T, fast_sums><<<args.n_blocks*args.n_ranges, WARPS*32, bytes, stream>>>(args);

    razor_batch_add_parts<D>(args, stream);
}

void razor_ampere_attn(const razor_batch_args & args, int d, bool slow_sums, cudaStream_t stream) {
    if (d == 64) {
        if (slow_sums) {
            razor_ampere_launch<64, 64, true> (args, stream);
        } else {
            razor_ampere_launch<64, 64, false>(args, stream);
        }
    } else if (slow_sums) {
        razor_ampere_launch<128, 32, true> (args, stream); // two fit into 100 KiB of shared memory
    } else {
        razor_ampere_launch<128, 64, false>(args, stream);
    }
}
