// SPDX-License-Identifier: Apache-2.0
// Rotates each token's heads by one table of cosines and sines, computed once a token.
#include "cpu/rotate.h"

namespace hourllava_ext {

template <class Tile, class T>
ALWAYS_INLINE void rope_tokens(const RopeParams<T>& p, int64_t first, int64_t last) {
    const Rotation<Tile, T> rotation{p.inv_freq, p.frequencies, p.inverse};
    for (int64_t m = first; m < last; ++m) {
        rotation.turn_to(p.position_ids[m]);
        for (int64_t h = 0; h < p.heads; ++h) {
            rotate_head(rotation, p.x + m * p.token_stride + h * p.head_stride, p.out + (m * p.heads + h) * p.width,
                        p.width);
        }
    }
}

CPU_KERNEL(rope_cpu, RopeParams, rope_tokens, p.tokens, p.heads* p.width)

}  // namespace hourllava_ext
