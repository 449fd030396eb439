// SPDX-License-Identifier: Apache-2.0
// Weighs each part of a query's attention by its share of the log-sum-exp.
#include <limits>
#include <vector>

#include "cpu/common.h"

namespace hourllava_ext {

// Shares of the parts, and their common log-sum-exp; zero shares and -inf where no part saw any key.
template <class A>
ALWAYS_INLINE A shares_of(const A* lse, int64_t parts, int64_t stride, A* share) {
    A largest = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < parts; ++s) largest = std::max(largest, lse[s * stride]);
    const A shift = largest == -std::numeric_limits<A>::infinity() ? A(0) : largest;
    A sum = 0;
    for (int64_t s = 0; s < parts; ++s) sum += share[s] = std::exp(lse[s * stride] - shift);
    for (int64_t s = 0; s < parts; ++s) share[s] = sum == 0 ? A(0) : share[s] / sum;
    return shift + std::log(sum);
}

template <class Tile, class T>
ALWAYS_INLINE void merge_tokens(const MergeAttentionParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    std::vector<A> share(p.parts), sum(p.width);
    for (int64_t m = first; m < last; ++m) {
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t place = h * p.tokens + m;
            p.merged_lse[place] = shares_of(p.lse + place, p.parts, p.heads * p.tokens, share.data());
            std::fill(sum.begin(), sum.end(), A(0));
            for (int64_t s = 0; s < p.parts; ++s) {
                // A part that saw no key has nothing to say, whatever lies in its rows.
                if (share[s] == 0) continue;
                const T* out = p.out + ((s * p.tokens + m) * p.heads + h) * p.width;
                for (int64_t i = 0; i < p.width; ++i) sum[i] += share[s] * load<T>(out[i]);
            }
            T* merged = p.merged + (m * p.heads + h) * p.width;
            for (int64_t i = 0; i < p.width; ++i) merged[i] = store<T>(sum[i]);
        }
    }
}

template <class Tile, class T>
ALWAYS_INLINE void merge_tokens_backward(const MergeAttentionBackwardParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    std::vector<A> share(p.parts), product(p.parts);
    for (int64_t m = first; m < last; ++m) {
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t place = h * p.tokens + m, stride = p.heads * p.tokens;
            const T* grad = p.grad_merged + (m * p.heads + h) * p.width;
            shares_of(p.lse + place, p.parts, stride, share.data());
            A mean = 0;
            for (int64_t s = 0; s < p.parts; ++s) {
                const int64_t row = ((s * p.tokens + m) * p.heads + h) * p.width;
                product[s] = share[s] == 0 ? A(0) : dot<T>(grad, p.out + row, p.width);
                mean += share[s] * product[s];
                for (int64_t i = 0; i < p.width; ++i) p.grad_out[row + i] = store<T>(share[s] * load<T>(grad[i]));
            }
            for (int64_t s = 0; s < p.parts; ++s) {
                p.grad_lse[s * stride + place] = share[s] * (product[s] - mean + p.grad_merged_lse[place]);
            }
        }
    }
}

CPU_KERNEL(merge_attention_cpu, MergeAttentionParams, merge_tokens, p.tokens, p.parts* p.heads* p.width)
CPU_KERNEL(merge_attention_backward_cpu, MergeAttentionBackwardParams, merge_tokens_backward, p.tokens,
           2 * p.parts * p.heads * p.width)

}  // namespace hourllava_ext
