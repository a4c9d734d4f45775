#include "llama-razor-attn.h"

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))

#include <arm_neon.h>

#define RAZOR_LANES       4
#define RAZOR_REGISTERS   32
#define RAZOR_LOAD_F16(p) ((vf) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define RAZOR_F16(p)      ((float) *(const __fp16 *) (p))
#define RAZOR_LOAD_4(p)   vreinterpret_u8_u32(vdup_n_u32(*(const word *) (p)))
#define RAZOR_LOAD_I8(p)  ((vi) vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(RAZOR_LOAD_4(p))))))
#define RAZOR_LOAD_U8(p)  ((vi) vmovl_u16(vget_low_u16(vmovl_u8(RAZOR_LOAD_4(p)))))
#define RAZOR_LOAD_U16(p) ((vi) vmovl_u16(vld1_u16(p)))

typedef uint32_t word __attribute__((aligned(1), may_alias));

#include "llama-razor-attn-kernel.h"

razor_attn_kernel razor_attn_kernel_neon() { return attention; }

#else

razor_attn_kernel razor_attn_kernel_neon() { return nullptr; }

#endif
