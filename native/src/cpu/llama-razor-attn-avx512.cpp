#include "llama-razor-attn.h"

#if defined(__AVX512F__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define RAZOR_LANES       16
#define RAZOR_REGISTERS   32
#define RAZOR_LOAD_F16(p) ((vf) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) (p))))
#define RAZOR_F16(p)      _cvtsh_ss(*(p))
#define RAZOR_LOAD_I8(p)  ((vi) _mm512_maskz_cvtepi8_epi32 (0xffff, _mm_loadu_si128((const __m128i *) (p))))
#define RAZOR_LOAD_U8(p)  ((vi) _mm512_maskz_cvtepu8_epi32 (0xffff, _mm_loadu_si128((const __m128i *) (p))))
#define RAZOR_LOAD_U16(p) ((vi) _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i *) (p))))

#include "llama-razor-attn-kernel.h"

razor_attn_kernel razor_attn_kernel_avx512() { return attention; }

#else

razor_attn_kernel razor_attn_kernel_avx512() { return nullptr; }

#endif
