// SPDX-License-Identifier: Apache-2.0
// Instruction-set tiers: one source, compiled once for each, and the best of the machine taken when the library loads.
// A tier's code is compiled for its own target only if everything hot is inlined into it, so kernels are ALWAYS_INLINE
// templates, and lambdas stay outside.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace hourllava_ext {

// Ascending: a machine that has one has those before it.
enum class CpuTier { portable, avx2, avx512, avx512_bf16 };

// What every kernel of this process runs on.
CpuTier cpu_tier();

// How much of a product stays in registers: rows x vectors sums, for vectors of so many bytes. `Pairs` says that the
// machine multiplies pairs of bfloat16.
template <int Bytes, int Rows, int Vectors, bool Pairs = false>
struct Tile {
    static constexpr int bytes = Bytes, rows = Rows, vectors = Vectors;
    static constexpr bool pairs = Pairs;
};
// Row counts are padded to this multiple, which the rows of every tile divide.
constexpr int64_t kRowStep = 8;

// Body::run<Tile>(arguments...) on each tier, with the tile that fills its registers: 32 of them hold 8 x 3 sums, a
// line and a scalar, 16 of them 4 x 3.
#if defined(__x86_64__)
template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v4"))) void run_avx512_bf16(const Arguments&... arguments) {
    Body::template run<Tile<64, 8, 3, true>>(arguments...);
}
template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v4"))) void run_avx512(const Arguments&... arguments) {
    Body::template run<Tile<64, 8, 3>>(arguments...);
}
template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(const Arguments&... arguments) {
    Body::template run<Tile<32, 4, 3>>(arguments...);
}
#endif
template <class Body, class... Arguments>
void run_portable(const Arguments&... arguments) {
    Body::template run<Tile<16, 4, 3>>(arguments...);
}

// The T of a Work<T>.
template <class Work>
struct stored;
template <template <class> class Work, class T>
struct stored<Work<T>> {
    using type = T;
};

template <class Body, class Work, class... Arguments>
void run_on_tier(const Work& work, const Arguments&... arguments) {
    const CpuTier tier = cpu_tier();
#if defined(__x86_64__)
    using T = typename stored<Work>::type;
    // Only bfloat16 has pairs to multiply, and float64 is for gradient checks, which wait for other things.
    if constexpr (std::is_same_v<T, bfloat16>) {
        if (tier == CpuTier::avx512_bf16) return run_avx512_bf16<Body>(work, arguments...);
    }
    if constexpr (!std::is_same_v<T, double>) {
        if (tier >= CpuTier::avx512) return run_avx512<Body>(work, arguments...);
    }
    if (tier >= CpuTier::avx2) return run_avx2<Body>(work, arguments...);
#endif
    run_portable<Body>(work, arguments...);
}

// Body::run<Tile>(work, task) for every task, handing the next one to whichever thread is free.
template <class Body, class Work>
void for_each_task(int64_t tasks, const Work& work) {
    std::atomic<int64_t> next{0};
    parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            run_on_tier<Body>(work, task);
    });
}

}  // namespace hourllava_ext
