// The CPU features that __builtin_cpu_supports() reads. The stub in Zig's own runtime reports none.
//
// This file has only the features that native/src asks for. The bits are those of libgcc's enum
// processor_features.

#include <cpuid.h>

#define FEATURE_AVX2    10
#define FEATURE_FMA     14
#define FEATURE_AVX512F 15

struct {
    unsigned int vendor;
    unsigned int type;
    unsigned int subtype;
    unsigned int features[1];
} __cpu_model;

unsigned int __cpu_features2[4];

__attribute__((constructor(101)))
int __cpu_indicator_init(void) {
    unsigned int eax, ebx, ecx, edx, xcr0, high;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) {
        return 0;
    }
    const unsigned int fma = ecx & bit_FMA;

    // registers that the operating system saves: XMM and YMM, and ZMM and its masks
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    const int saves_avx    = (xcr0 & 0x06) == 0x06;
    const int saves_avx512 = (xcr0 & 0xe6) == 0xe6;

    if (!saves_avx || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        return 0;
    }
    if (ebx & bit_AVX2) {
        __cpu_model.features[0] |= 1u << FEATURE_AVX2;
    }
    if (fma) {
        __cpu_model.features[0] |= 1u << FEATURE_FMA;
    }
    if (saves_avx512 && (ebx & bit_AVX512F)) {
        __cpu_model.features[0] |= 1u << FEATURE_AVX512F;
    }
    return 0;
}
