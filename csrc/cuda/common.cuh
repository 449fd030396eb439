// SPDX-License-Identifier: Apache-2.0
// Shared by the CUDA kernels: vectors of 16 bytes, which threads take which columns of a row, sums over a block.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cuda/device.cuh"

#define FOR_EACH_GPU_DTYPE(X) X(float) X(float16) X(bfloat16)

namespace hourllava_ext {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;

template <class T, int N>
__device__ inline Pack<T, N> read(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N>
__device__ inline void write(T* to, const Pack<T, N>& pack) {
    if constexpr (sizeof(pack) == 16) {
        write_vector(to, pack);
    } else {
        *reinterpret_cast<Pack<T, N>*>(to) = pack;
    }
}

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Whether rows that begin at these places, at multiples of these sizes, can be read in vectors of 16 bytes.
template <class T>
bool in_vectors(std::initializer_list<const void*> places, std::initializer_list<int64_t> sizes) {
    for (const void* place : places) {
        if (reinterpret_cast<uintptr_t>(place) % 16 != 0) return false;
    }
    for (int64_t size : sizes) {
        if (size % kVector<T> != 0) return false;
    }
    return true;
}

// Threads of a block, side by side on rows: `columns` threads a row, `rows` rows a block.
struct Lanes {
    int columns, rows;

    explicit Lanes(int64_t columns_of_a_row)
        : columns(static_cast<int>(columns_of_a_row < 1          ? 1
                                   : columns_of_a_row < kThreads ? columns_of_a_row
                                                                 : kThreads)),
          rows(kThreads / columns) {}
    int threads() const { return columns * rows; }
    int64_t blocks(int64_t all_rows) const { return (all_rows + rows - 1) / rows; }
    __device__ int64_t row() const { return static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / columns; }
    __device__ int column() const { return threadIdx.x % columns; }
};

// Whole warps for one row of so many columns.
inline int threads_for(int64_t columns) {
    const int64_t warps = (columns + kWarp - 1) / kWarp;
    return static_cast<int>(kWarp * (warps < 1 ? 1 : warps > 8 ? 8 : warps));
}

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

__device__ inline float warp_sum(float value) {
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
    return value;
}

// The sum over a block of whole warps, in an order that depends on its size alone; every thread gets it.
__device__ inline float block_sum(float value) {
    __shared__ float sums[kThreads / kWarp];
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += sums[warp];
    __syncthreads();
    return total;
}

}  // namespace hourllava_ext
