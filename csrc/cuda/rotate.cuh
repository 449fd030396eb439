// SPDX-License-Identifier: Apache-2.0
// Partial rotary embedding in columns of N dims, shared by every kernel that turns queries or keys.
#pragma once

#include "cuda/common.cuh"

namespace hourllava_ext {

// A head in columns: the first turn N pairs of dims each, the others hold N dims that are copied.
template <int N>
struct HeadColumns {
    int64_t frequencies, pairs, count;

    __host__ __device__ HeadColumns(int64_t width, int64_t rotated)
        : frequencies(rotated), pairs(rotated / N), count(pairs + (width - 2 * rotated) / N) {}
    __device__ bool turns(int64_t column) const { return column < pairs; }
    __device__ int64_t first(int64_t column) const {
        return turns(column) ? column * N : 2 * frequencies + (column - pairs) * N;
    }
    // Of a column that turns: the dims that the first ones turn with.
    __device__ int64_t second(int64_t column) const { return frequencies + column * N; }
};

template <int N>
struct Rotation {
    float cosine[N], sine[N];
};

// The model's angles are float32 products; their cosines and sines are rounded to T.
template <class T, int N>
__device__ inline Rotation<N> rotation(int64_t position_id, const float* inv_freq, bool inverse) {
    const float position = static_cast<float>(position_id);
    Rotation<N> rotation;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float sine, cosine;
        // The intrinsic is never fused into what follows.
        sincosf(__fmul_rn(position, inv_freq[i]), &sine, &cosine);
        rotation.cosine[i] = load(store<T>(cosine));
        rotation.sine[i] = load(store<T>(inverse ? -sine : sine));
    }
    return rotation;
}

template <class T, int N>
__device__ inline void turn(Pack<T, N>& first, Pack<T, N>& second, const Rotation<N>& r) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float a = load(first.at[i]), b = load(second.at[i]);
        first.at[i] = store<T>(a * r.cosine[i] - b * r.sine[i]);
        second.at[i] = store<T>(a * r.sine[i] + b * r.cosine[i]);
    }
}

// Heads that a thread has in flight at once.
constexpr int kHeads = 4;

// One column of up to kHeads heads from `x` to `out`, turned by `r`, or copied where the column does not turn or `r` is
// null. All are read before the first is written.
template <class T, int N>
__device__ inline void turn_heads(const T* x, int64_t x_stride, T* out, int64_t out_stride, int heads,
                                  const HeadColumns<N>& columns, int64_t column, const Rotation<N>* r) {
    const bool pair = columns.turns(column);
    const int64_t first = columns.first(column), second = columns.second(column);
    Pack<T, N> a[kHeads], b[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        a[h] = read<T, N>(x + h * x_stride + first);
        if (pair) b[h] = read<T, N>(x + h * x_stride + second);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        if (pair && r) turn(a[h], b[h], *r);
        write(out + h * out_stride + first, a[h]);
        if (pair) write(out + h * out_stride + second, b[h]);
    }
}

}  // namespace hourllava_ext
