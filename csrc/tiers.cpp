// SPDX-License-Identifier: Apache-2.0
// Which instruction-set tier the kernels run on, decided when the library loads.
#include "cpu/tiers.h"

#include <atomic>
#include <string_view>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hourllava_ext {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

CpuTier best_tier() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) {
        return __builtin_cpu_supports("avx512bf16") ? CpuTier::avx512_bf16 : CpuTier::avx512;
    }
    if (__builtin_cpu_supports("x86-64-v3")) return CpuTier::avx2;
#endif
    return CpuTier::portable;
}

std::atomic<CpuTier> tier{best_tier()};

}  // namespace

CpuTier cpu_tier() { return tier.load(std::memory_order_relaxed); }

}  // namespace hourllava_ext

EXPORT const char* hourllava_ext_cpu_tier() {
    return hourllava_ext::kNames[static_cast<int>(hourllava_ext::cpu_tier())];
}

// For tests, which have one machine and must see every tier's numbers. False if the machine lacks the tier.
EXPORT bool hourllava_ext_use_cpu_tier(const char* name) {
    using namespace hourllava_ext;
    for (int i = 0; i <= static_cast<int>(best_tier()); ++i) {
        if (std::string_view(name) != kNames[i]) continue;
        tier.store(static_cast<CpuTier>(i), std::memory_order_relaxed);
        return true;
    }
    return false;
}
