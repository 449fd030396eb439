// SPDX-License-Identifier: Apache-2.0
// Plain C functions that hourllava_ext/library.py reads with ctypes.
#include <torch/csrc/stable/version.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Which clone of every CPU kernel the loader took; the same order of preference as CPU_TIERS in cpu/common.h.
EXPORT const char* hourllava_ext_cpu_tier() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
    if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
    return "portable";
}

EXPORT uint64_t hourllava_ext_torch_target() { return TORCH_FEATURE_VERSION; }

EXPORT bool hourllava_ext_cuda_built() { return false; }
