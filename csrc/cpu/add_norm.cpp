// SPDX-License-Identifier: Apache-2.0
// A row is read once and normalised in the cache. The backward sums what rows add to weight and bias by chunks, whose
// number depends on the shape alone, and then the chunks in their order.
#include <vector>

#include "cpu/common.h"

namespace hourllava_ext {

template <class T>
ALWAYS_INLINE void widen_row(const T* from, int64_t count, accumulate_t<T>* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] = load<T>(from[i]);
}

// The sum of row[i] - shift, in a fixed order, as `dot`.
template <class A>
ALWAYS_INLINE A sum_row(const A* row, int64_t count, A shift) {
    constexpr int64_t kLanes = 16;
    A sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) sums[l] += row[i + l] - shift;
    }
    for (int64_t l = 0; i < count; ++i, ++l) sums[l] += row[i] - shift;
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    return sums[0];
}

// Rounded as the sum of two tensors is, which the model normalises.
template <class T>
ALWAYS_INLINE accumulate_t<T> rounded_sum(T a, T b) {
    return load<T>(store<T>(load<T>(a) + load<T>(b)));
}

template <class T>
ALWAYS_INLINE void add_norm_rows(const AddNormParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    std::vector<A> buffer(3 * p.width);
    A* __restrict row = buffer.data(), * __restrict weight = row + p.width, * __restrict bias = weight + p.width;
    widen_row(p.weight, p.width, weight);
    widen_row(p.bias, p.width, bias);
    for (int64_t m = first; m < last; ++m) {
        const T *x = p.x + m * p.width, *residual = p.residual + m * p.width;
        for (int64_t i = 0; i < p.width; ++i) row[i] = rounded_sum(x[i], residual[i]);
        // From the first column on: the sum of a row far from zero would round away what tells its columns apart.
        const A start = p.width > 0 ? row[0] : A(0), mean = start + sum_row(row, p.width, start) / p.width;
        for (int64_t i = 0; i < p.width; ++i) row[i] -= mean;
        const A rstd = 1 / std::sqrt(dot<A>(row, row, p.width) / p.width + static_cast<A>(p.eps));
        p.mean[m] = mean;
        p.rstd[m] = rstd;
        T* __restrict out = p.out + m * p.width;
        for (int64_t i = 0; i < p.width; ++i) out[i] = store<T>(row[i] * rstd * weight[i] + bias[i]);
    }
}

template <class T>
ALWAYS_INLINE void add_norm_chunks(const AddNormBackwardParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    std::vector<A> buffer(3 * p.width);
    A* __restrict weight = buffer.data(), * __restrict normed = weight + p.width, * __restrict scaled = normed + p.width;
    widen_row(p.weight, p.width, weight);
    for (int64_t k = first; k < last; ++k) {
        A* __restrict to_weight = p.partial + 2 * k * p.width, * __restrict to_bias = to_weight + p.width;
        std::fill(to_weight, to_bias + p.width, A(0));
        for (int64_t m = k * p.chunk_rows; m < std::min(p.tokens, (k + 1) * p.chunk_rows); ++m) {
            const T *x = p.x + m * p.width, *residual = p.residual + m * p.width, *grad = p.grad + m * p.width;
            const A mean = p.mean[m], rstd = p.rstd[m];
            for (int64_t i = 0; i < p.width; ++i) {
                const A g = load<T>(grad[i]);
                normed[i] = (rounded_sum(x[i], residual[i]) - mean) * rstd;
                scaled[i] = g * weight[i];
                to_weight[i] += g * normed[i];
                to_bias[i] += g;
            }
            const A shift = sum_row(scaled, p.width, A(0)) / p.width, slope = dot<A>(scaled, normed, p.width) / p.width;
            T* __restrict out = p.grad_sum + m * p.width;
            for (int64_t i = 0; i < p.width; ++i) out[i] = store<T>(rstd * (scaled[i] - shift - slope * normed[i]));
        }
    }
}

// Hundreds of chunks add to a column, so they are summed in double.
template <class T>
ALWAYS_INLINE void add_norm_columns(const AddNormBackwardParams<T>& p, int64_t first, int64_t last) {
    std::vector<double> sum(last - first);
    for (int64_t k = 0; k < p.chunks; ++k) {
        const accumulate_t<T>* partial = p.partial + 2 * k * p.width;
        for (int64_t c = first; c < last; ++c) sum[c - first] += partial[c];
    }
    for (int64_t c = first; c < last; ++c) {
        T& out = c < p.width ? p.grad_weight[c] : p.grad_bias[c - p.width];
        out = store<T>(sum[c - first]);
    }
}

CPU_KERNEL(add_norm_cpu, AddNormParams, add_norm_rows, p.tokens, p.width)
CPU_KERNEL(add_norm_chunks_cpu, AddNormBackwardParams, add_norm_chunks, p.chunks, p.chunk_rows* p.width)
CPU_KERNEL(add_norm_columns_cpu, AddNormBackwardParams, add_norm_columns, 2 * p.width, p.chunks)

#define ADD_NORM_BACKWARD(T)                                        \
    void add_norm_backward_cpu(const AddNormBackwardParams<T>& p) { \
        add_norm_chunks_cpu(p);                                     \
        add_norm_columns_cpu(p);                                    \
    }
FOR_EACH_DTYPE(ADD_NORM_BACKWARD)

}  // namespace hourllava_ext
