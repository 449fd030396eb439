// SPDX-License-Identifier: Apache-2.0
// Rotates each token's heads by one table of cosines and sines, computed once a token.
#include <vector>

#include "cpu/rotate.h"

namespace hourllava_ext {

template <class T>
ALWAYS_INLINE void rope_tokens(const RopeParams<T>& p, int64_t first, int64_t last) {
    std::vector<accumulate_t<T>> cosine(p.frequencies), sine(p.frequencies);
    for (int64_t m = first; m < last; ++m) {
        rotation_table<T>(p.position_ids[m], p.inv_freq, p.frequencies, cosine.data(), sine.data());
        for (int64_t h = 0; h < p.heads; ++h) {
            rotate_head(p.x + m * p.token_stride + h * p.head_stride, p.out + (m * p.heads + h) * p.width,
                        p.frequencies, p.width, cosine.data(), sine.data(), p.inverse);
        }
    }
}

CPU_KERNEL(rope_cpu, RopeParams, rope_tokens, p.tokens, p.heads* p.width)

}  // namespace hourllava_ext
