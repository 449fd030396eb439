// SPDX-License-Identifier: Apache-2.0
// Shared by the CPU kernels: the launcher of the simple ones, and arithmetic on stored values.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/tiers.h"

#define FOR_EACH_DTYPE(X) X(float) X(double) X(float16) X(bfloat16)

// Defines the launcher `name(const Params<T>&)` for the four dtypes. `body<Tile, T>(params, first, last)` computes the
// tasks [first, last) of `tasks` in all; each task owns its outputs, so the thread count cannot change a result. `work`
// is the number of elements one task touches. Both are expressions of the parameters `p`.
#define CPU_KERNEL(name, Params, body, tasks, work)                                                                \
    struct name##_body {                                                                                           \
        template <class Tile, class T>                                                                             \
        ALWAYS_INLINE static void run(const Params<T>& p, int64_t first, int64_t last) {                           \
            body<Tile, T>(p, first, last);                                                                         \
        }                                                                                                          \
    };                                                                                                             \
    template <class T>                                                                                             \
    static void name##_launch(const Params<T>& p) {                                                                \
        parallel_for(0, tasks, grain_of(work), [&p](int64_t b, int64_t e) { run_on_tier<name##_body>(p, b, e); }); \
    }                                                                                                              \
    void name(const Params<float>& p) { name##_launch(p); }                                                        \
    void name(const Params<double>& p) { name##_launch(p); }                                                       \
    void name(const Params<float16>& p) { name##_launch(p); }                                                      \
    void name(const Params<bfloat16>& p) { name##_launch(p); }

namespace hourllava_ext {

// Tasks a thread takes at a time: below some thousand elements, waking another thread costs more than it saves.
inline int64_t grain_of(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)); }

// The bits of float16 as floats; F and U are float and uint32_t, or vectors of them. Plain arithmetic, so that a loop
// of it vectorises on every tier.
template <class F, class U>
ALWAYS_INLINE F widen_float16(U bits) {
    const U magnitude = bits & 0x7fffu, normal = (magnitude << 13) + (112u << 23);
    // Subnormals count units of 2^-24, the last place of a half.
    const U small = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude + 0x3f000000u) - 0.5f);
    const U special = normal + (112u << 23);  // infinity and NaN
    const U value = magnitude < 0x400u ? small : magnitude < 0x7c00u ? normal : special;
    return __builtin_bit_cast(F, value | (bits & 0x8000u) << 16);
}

// The bits of floats as those of float16 and bfloat16. Both round to nearest even; a NaN stays a NaN instead of being
// rounded up to infinity.
template <class F, class U>
ALWAYS_INLINE U narrow_float16(U bits) {
    const U magnitude = bits & 0x7fffffffu;
    const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding a half rounds to its last place, the unit of subnormals.
    const U small = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) + 0.5f) - 0x3f000000u;
    const U special = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
    const U rounded = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : special;
    return rounded | ((bits >> 16) & 0x8000u);
}
template <class U>
ALWAYS_INLINE U narrow_bfloat16(U bits) {
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

template <class T>
ALWAYS_INLINE accumulate_t<T> load(T value) {
    return value;
}
template <>
ALWAYS_INLINE float load(float16 value) {
    return widen_float16<float, uint32_t>(value.bits);
}
template <>
ALWAYS_INLINE float load(bfloat16 value) {
    return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <class T>
ALWAYS_INLINE T store(accumulate_t<T> value) {
    return value;
}
template <>
ALWAYS_INLINE float16 store(float value) {
    return {static_cast<uint16_t>(narrow_float16<float>(std::bit_cast<uint32_t>(value)))};
}
template <>
ALWAYS_INLINE bfloat16 store(float value) {
    return {static_cast<uint16_t>(narrow_bfloat16(std::bit_cast<uint32_t>(value)))};
}

// Sum of products in a fixed order, 16 running sums wide: vectorised, and the same for every instruction set up to
// fused rounding.
template <class T>
ALWAYS_INLINE accumulate_t<T> dot(const T* a, const T* b, int64_t count) {
    using A = accumulate_t<T>;
    constexpr int64_t kLanes = 16;
    A sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) sums[l] += load<T>(a[i + l]) * load<T>(b[i + l]);
    }
    for (int64_t l = 0; i < count; ++i, ++l) sums[l] += load<T>(a[i]) * load<T>(b[i]);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    return sums[0];
}

}  // namespace hourllava_ext
