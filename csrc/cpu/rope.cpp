// SPDX-License-Identifier: Apache-2.0
// Rotates each token's heads by one table of cosines and sines, computed once a token.
#include <vector>

#include "cpu/common.h"

namespace hourllava_ext {

template <class T>
ALWAYS_INLINE void rope_tokens(const RopeParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    const int64_t half = p.frequencies;
    std::vector<A> table(2 * half);
    A* cosine = table.data();
    A* sine = cosine + half;
    for (int64_t m = first; m < last; ++m) {
        const float position = static_cast<float>(p.position_ids[m]);
        for (int64_t i = 0; i < half; ++i) {
            // The model's angles are float32 products, whatever the dtype of x.
            const A angle = position * p.inv_freq[i];
            cosine[i] = load<T>(store<T>(std::cos(angle)));
            const A s = load<T>(store<T>(std::sin(angle)));
            sine[i] = p.inverse ? -s : s;
        }
        for (int64_t h = 0; h < p.heads; ++h) {
            const T* x = p.x + m * p.token_stride + h * p.head_stride;
            T* out = p.out + (m * p.heads + h) * p.width;
            for (int64_t i = 0; i < half; ++i) {
                const A a = load<T>(x[i]), b = load<T>(x[half + i]);
                out[i] = store<T>(a * cosine[i] - b * sine[i]);
                out[half + i] = store<T>(a * sine[i] + b * cosine[i]);
            }
            std::copy(x + 2 * half, x + p.width, out + 2 * half);
        }
    }
}

CPU_KERNEL(rope_cpu, RopeParams, rope_tokens, p.tokens, p.heads* p.width)

}  // namespace hourllava_ext
