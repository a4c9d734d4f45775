#include "llama-razor-attn.h"

#if defined(__AVX2__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define RAZOR_LANES       8
#define RAZOR_REGISTERS   16
#define RAZOR_LOAD_F16(p) ((vf) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p))))
#define RAZOR_F16(p)      _cvtsh_ss(*(p))
#define RAZOR_LOAD_I8(p)  ((vi) _mm256_cvtepi8_epi32 (_mm_loadl_epi64((const __m128i *) (p))))
#define RAZOR_LOAD_U8(p)  ((vi) _mm256_cvtepu8_epi32 (_mm_loadl_epi64((const __m128i *) (p))))
#define RAZOR_LOAD_U16(p) ((vi) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) (p))))

#include "llama-razor-attn-kernel.h"

razor_attn_kernel razor_attn_kernel_avx2() { return attention; }

#else

razor_attn_kernel razor_attn_kernel_avx2() { return nullptr; }

#endif
