// SPDX-License-Identifier: Apache-2.0
// Partial rotary embedding of one head, shared by every operator that turns queries or keys.
#pragma once

#include "cpu/common.h"

namespace hourllava_ext {

// Cosine and sine of an angle of up to 2^23, with errors below 1e-11; without a branch, so that a loop of it
// vectorises.
ALWAYS_INLINE void cosine_and_sine(double angle, double& cosine, double& sine) {
    // Quarter turns, then the rest: the first part of pi / 2 has 30 bits, so its multiples are exact.
    const double shifted = angle * 0.6366197723675814 + 6755399441055744.0;
    const double turns = shifted - 6755399441055744.0;
    const double x = (angle - turns * 1.570796325802803) - turns * 9.920935796805404e-10, y = x * x;
    const double s = 2.7181216249746892e-06 * y - 0.00019839312269259;
    const double c = -2.720575267627279e-07 * y + 2.479946013438781e-05;
    const double odd = x + x * y * ((s * y + 0.008333329304842334) * y - 0.16666666640797054);
    const double even = 1 - 0.5 * y + y * y * ((c * y - 0.001388888349999741) * y + 0.04166666661949054);
    const int64_t quarter = std::bit_cast<int64_t>(shifted);
    const double a = quarter & 1 ? odd : even, b = quarter & 1 ? even : odd;
    cosine = (quarter + 1) & 2 ? -a : a;
    sine = quarter & 2 ? -b : b;
}

// The model's angles are float32 products, whatever the dtype T; their cosines and sines are rounded to T.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void rotation_table(int64_t position_id, const float* inv_freq, int64_t half, A* cosine, A* sine) {
    const float position = static_cast<float>(position_id);
    float largest = 0;
    for (int64_t i = 0; i < half; ++i) {
        const float angle = std::abs(position * inv_freq[i]);
        // A NaN counts as large.
        largest = angle <= largest ? largest : angle;
    }
    if (sizeof(A) == sizeof(float) && largest <= 8388608.0f) {
        for (int64_t i = 0; i < half; ++i) {
            double c, s;
            cosine_and_sine(position * inv_freq[i], c, s);
            cosine[i] = load<T>(store<T>(static_cast<A>(c)));
            sine[i] = load<T>(store<T>(static_cast<A>(s)));
        }
        return;
    }
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
