// SPDX-License-Identifier: Apache-2.0
// What csrc/ops hands to the kernels: parameter structs with shapes, and one launcher an operator and dtype.
// Pointers are to contiguous memory unless a stride is given; offsets are 64 bits. No framework header here.
#pragma once

#include <cstdint>
#include <functional>

namespace hourllava_ext {

struct bfloat16 {
    uint16_t bits;
};

// Sums, rotations and log-sum-exps are computed in float (double for double) and rounded once when stored.
template <class T>
struct accumulate {
    using type = float;
};
template <>
struct accumulate<double> {
    using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

// Calls body(first, last) on disjoint ranges of at least `grain` that cover [begin, end), on the caller's thread pool.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

template <class T>
struct RopeParams {
    const T* x;                   // (M, H, D), last dim dense
    const int64_t* position_ids;  // (M,)
    const float* inv_freq;        // (F,), 2F <= D
    T* out;                       // (M, H, D)
    int64_t tokens;               // M
    int64_t heads;                // H
    int64_t width;                // D
    int64_t frequencies;          // F
    int64_t token_stride;         // of x, in elements
    int64_t head_stride;          // of x, in elements
    bool inverse;
};
void rope_cpu(const RopeParams<float>&);
void rope_cpu(const RopeParams<double>&);
void rope_cpu(const RopeParams<bfloat16>&);

}  // namespace hourllava_ext
