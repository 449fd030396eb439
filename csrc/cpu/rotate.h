// SPDX-License-Identifier: Apache-2.0
// Partial rotary embedding of one head, shared by every operator that turns queries or keys.
#pragma once

#include "cpu/common.h"

namespace hourllava_ext {

// The model's angles are float32 products, whatever the dtype T; their cosines and sines are rounded to T.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void rotation_table(int64_t position_id, const float* inv_freq, int64_t half, A* cosine, A* sine) {
    const float position = static_cast<float>(position_id);
    for (int64_t i = 0; i < half; ++i) {
        const A angle = position * inv_freq[i];
        cosine[i] = load<T>(store<T>(std::cos(angle)));
        sine[i] = load<T>(store<T>(std::sin(angle)));
    }
}

// Turns x (width,) into out (width,), which may be the same memory; dims from 2 * half on are copied.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void rotate_head(const T* x, T* out, int64_t half, int64_t width, const A* cosine, const A* sine,
                               bool inverse) {
    const A direction = inverse ? -1 : 1;
    for (int64_t i = 0; i < half; ++i) {
        const A a = load<T>(x[i]), b = load<T>(x[half + i]), s = sine[i] * direction;
        out[i] = store<T>(a * cosine[i] - b * s);
        out[half + i] = store<T>(a * s + b * cosine[i]);
    }
    std::copy(x + 2 * half, x + width, out + 2 * half);
}

}  // namespace hourllava_ext
