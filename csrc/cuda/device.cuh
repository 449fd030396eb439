// SPDX-License-Identifier: Apache-2.0
// What the kernels have of nvcc alone: launches and the conversions of the hardware. The tests put a file in its place
// that runs the same kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hourllava_ext {

struct Grid {
    int64_t x, y = 1, z = 1;
};

inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorNoKernelImageForDevice) {
        throw std::runtime_error(
            "hourllava_ext: its kernels need a GPU of compute capability 8.0 or newer, and this one is older; "
            "use the CPU");
    }
    throw std::runtime_error(std::string("hourllava_ext: a GPU kernel could not be ") + what + ": " +
                             cudaGetErrorString(error));
}

template <class... Params>
void launch(void (*kernel)(Params...), Grid grid, int threads, Stream stream, Params... params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
        throw std::runtime_error("hourllava_ext: the tensors are too large for one launch on a GPU; split them");
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(params...);
    check_cuda(cudaGetLastError(), "launched");
}

inline void fill_bytes(void* begin, int value, int64_t bytes, Stream stream) {
    if (bytes == 0) return;
    check_cuda(cudaMemsetAsync(begin, value, bytes, static_cast<cudaStream_t>(stream)), "prepared");
}

__device__ inline float load(float value) { return value; }
__device__ inline float load(float16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}
__device__ inline float load(bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

// Rounds to nearest even.
template <class T>
__device__ inline T store(float value) {
    return value;
}
template <>
__device__ inline float16 store(float value) {
    float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
}
template <>
__device__ inline bfloat16 store(float value) {
    bfloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
}

// N elements that are read and written at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

// Two halves to a word, by hand: left to itself, the compiler stores eight halves one by one.
__device__ inline unsigned word_of(const Pack<float, 4>& pack, int i) { return __float_as_uint(pack.at[i]); }
template <class T>
__device__ inline unsigned word_of(const Pack<T, 8>& pack, int i) {
    return pack.at[2 * i].bits | static_cast<unsigned>(pack.at[2 * i + 1].bits) << 16;
}
template <class T, int N>
__device__ inline void write_vector(T* to, const Pack<T, N>& pack) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(word_of(pack, 0)), "r"(word_of(pack, 1)), "r"(word_of(pack, 2)), "r"(word_of(pack, 3))
                 : "memory");
}

}  // namespace hourllava_ext
