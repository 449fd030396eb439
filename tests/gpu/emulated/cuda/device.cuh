// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cuda/device.cuh: runs the CUDA kernels on the CPU, thread for thread. A block's threads are fibers
// that take turns at barriers and warp operations, in an order that the tests change: what a kernel forgot to wait for
// differs from order to order. A barrier that some thread never reaches is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/common.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace hourllava_ext {
namespace emulated {

constexpr int kWarpSize = 32, kStackBytes = 1 << 16;

// 0: threads go on in ascending order, 1: descending, 2: odd ones first; -1: launches are checked, and nothing runs.
inline int order = 0;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool done = false, moved = false;
};

// Threads that wait for each other: a warp, or a block.
struct Meeting {
    int members = 0, arrived = 0, round = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    std::vector<uint64_t> exchange;  // what each thread shows to its warp
    std::function<void()> body;
    std::exception_ptr failure;
    ucontext_t scheduler;
    int current = 0, votes = 0;
};
inline Block block;

inline void run_fiber() {
    try {
        block.body();
    } catch (...) {
        block.failure = std::current_exception();
    }
    block.fibers[block.current].done = true;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void wait_for(Meeting& meeting) {
    Fiber& self = block.fibers[block.current];
    const int round = meeting.round;
    self.moved = true;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) swapcontext(&self.context, &block.scheduler);
}

inline Meeting& own_warp() { return block.warps[block.current / kWarpSize]; }

inline int place_in_order(int turn, int threads) {
    if (order == 1) return threads - 1 - turn;
    if (order == 2) return turn < threads / 2 ? 2 * turn + 1 : 2 * (turn - threads / 2);
    return turn;
}

inline void run_block(int threads) {
    block.all = {threads};
    block.warps.assign((threads + kWarpSize - 1) / kWarpSize, {});
    for (int t = 0; t < threads; ++t) ++block.warps[t / kWarpSize].members;
    block.exchange.assign(threads, 0);
    block.votes = 0;
    block.failure = nullptr;
    if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = block.fibers[t];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (int left = threads; left > 0;) {
        bool moved = false;
        for (int turn = 0; turn < threads; ++turn) {
            Fiber& fiber = block.fibers[block.current = place_in_order(turn, threads)];
            if (fiber.done) continue;
            threadIdx.x = block.current;
            fiber.moved = false;
            swapcontext(&block.scheduler, &fiber.context);
            moved |= fiber.moved || fiber.done;
            left -= fiber.done;
            if (block.failure) std::rethrow_exception(block.failure);
        }
        if (!moved) throw std::runtime_error("emulated GPU: threads wait at a barrier that others never reach");
    }
}

// Calls body(shown, members) once every thread of the warp has shown its value.
template <class Body>
auto meet(uint64_t value, const Body& body) {
    block.exchange[block.current] = value;
    wait_for(own_warp());
    const auto result = body(&block.exchange[block.current / kWarpSize * kWarpSize], own_warp().members);
    wait_for(own_warp());
    return result;
}

// The value of another lane; a lane that the warp lacks shows the own one.
template <class T>
T show(T value, int lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return meet(bits, [&](const uint64_t* shown, int members) {
        T seen = value;
        if (lane >= 0 && lane < members) std::memcpy(&seen, shown + lane, sizeof(T));
        return seen;
    });
}

}  // namespace emulated
}  // namespace hourllava_ext

inline void __syncthreads() { hourllava_ext::emulated::wait_for(hourllava_ext::emulated::block.all); }

inline int __syncthreads_or(int vote) {
    using namespace hourllava_ext::emulated;
    block.votes |= vote;
    __syncthreads();
    const int any = block.votes;
    __syncthreads();
    block.votes = 0;
    __syncthreads();
    return any;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return hourllava_ext::emulated::show(value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
    return hourllava_ext::emulated::show(value, static_cast<int>(threadIdx.x % 32) - delta);
}
inline unsigned __ballot_sync(unsigned, int vote) {
    return hourllava_ext::emulated::meet(vote != 0, [](const uint64_t* shown, int members) {
        unsigned votes = 0;
        for (int lane = 0; lane < members; ++lane) votes |= static_cast<unsigned>(shown[lane]) << lane;
        return votes;
    });
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// One operating system thread runs everything, so these need nothing to be atomic.
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at = static_cast<T>(before + value);
    return before;
}
template <class T>
T atomicMax(T* at, T value) {
    const T before = *at;
    *at = std::max(before, value);
    return before;
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
    const T before = *at;
    if (before == expected) *at = value;
    return before;
}

namespace hourllava_ext {

struct Grid {
    int64_t x, y = 1, z = 1;
};

template <class... Params>
void launch(void (*kernel)(Params...), Grid grid, int threads, Stream, Params... params) {
    if (threads < 1 || threads > 1024) throw std::runtime_error("emulated GPU: a block has 1 to 1024 threads");
    if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
        throw std::runtime_error("emulated GPU: a grid has up to 2^31 - 1, 65535 and 65535 blocks");
    }
    if (emulated::order < 0) return;
    gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    emulated::block.body = [&] { kernel(params...); };
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulated::run_block(threads);
        }
    }
}

inline void fill_bytes(void* begin, int value, int64_t bytes, Stream) {
    if (emulated::order >= 0) std::memset(begin, value, bytes);
}

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};
template <class T, int N>
void write_vector(T* to, const Pack<T, N>& pack) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) throw std::runtime_error("emulated GPU: a vector is not aligned");
    std::memcpy(to, &pack, sizeof(pack));
}

}  // namespace hourllava_ext
