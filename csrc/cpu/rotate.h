// SPDX-License-Identifier: Apache-2.0
// Partial rotary embedding of one head, shared by every operator that turns queries or keys.
#pragma once

#include "cpu/vectors.h"

namespace hourllava_ext {

// With a and b for x quarter turns before the angle: its cosine and sine.
template <class U, class V>
ALWAYS_INLINE void choose_quarter(U quarter, V odd, V even, V& cosine, V& sine) {
    constexpr int kSign = 8 * sizeof(quarter[0]) - 2;
    const auto swapped = (quarter & 1u) != 0u;
    const U a = __builtin_bit_cast(U, swapped ? odd : even), b = __builtin_bit_cast(U, swapped ? even : odd);
    cosine = __builtin_bit_cast(V, a ^ ((quarter + 1u) & 2u) << kSign);
    sine = __builtin_bit_cast(V, b ^ (quarter & 2u) << kSign);
}

// Cosines and sines of a vector of double angles of up to 2^23, with errors below 1e-11.
template <class V>
ALWAYS_INLINE void cosines_and_sines(V angle, V& cosine, V& sine) {
    // Quarter turns, then the rest: the first part of pi / 2 has 30 bits, so its multiples are exact.
    const V shifted = angle * 0.6366197723675814 + 6755399441055744.0;
    const V turns = shifted - 6755399441055744.0;
    const V x = (angle - turns * 1.570796325802803) - turns * 9.920935796805404e-10, y = x * x;
    const V s = 2.7181216249746892e-06 * y - 0.00019839312269259;
    const V c = -2.720575267627279e-07 * y + 2.479946013438781e-05;
    const V odd = x + x * y * ((s * y + 0.008333329304842334) * y - 0.16666666640797054);
    const V even = 1 - 0.5 * y + y * y * ((c * y - 0.001388888349999741) * y + 0.04166666661949054);
    choose_quarter(__builtin_bit_cast(typename vector_types<uint64_t, sizeof(V)>::vector, shifted), odd, even, cosine,
                   sine);
}

// sum - a * b, rounded once where the tier has fused products.
template <class V>
ALWAYS_INLINE V subtract_product(V sum, V a, V b) {
#if defined(__x86_64__)
    asm("vfnmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    return sum - a * b;
#endif
}
// The same in float, of angles of up to 6.5e6 and with errors below 4e-7 of the result: enough for numbers of 11 bits.
// For tiers that have fused products.
template <class V>
ALWAYS_INLINE void short_cosines_and_sines(V angle, V& cosine, V& sine) {
    const V shifted = angle * 0.63661975f + 12582912.0f;
    const V turns = shifted - 12582912.0f;
    // The first difference is a multiple of 2^-23 below 1.1, so it is exact.
    V x = subtract_product(angle, turns, V{} + 1.5707964f);
    x = subtract_product(x, turns, V{} - 4.371139e-08f);
    x = subtract_product(x, turns, V{} - 1.7151245e-15f);
    const V y = x * x;
    const V odd = x + x * y * ((-0.00019327f * y + 0.00833033f) * y - 0.16666614f);
    const V even = 1.0f - 0.5f * y + y * y * ((2.42609199e-05f * y - 0.00138855087f) * y + 0.041666601f);
    choose_quarter(__builtin_bit_cast(typename vector_types<uint32_t, sizeof(V)>::vector, shifted), odd, even, cosine,
                   sine);
}

inline float largest_of(const float* inv_freq, int64_t half) {
    float largest = 0;
    // A NaN stays one, and makes every angle one to the general functions.
    for (int64_t i = 0; i < half; ++i) {
        const float f = std::abs(inv_freq[i]);
        if (f > largest || std::isnan(f)) largest = f;
    }
    return largest;
}

// Cosines and sines of one position, rounded to T as the model's tables are; its angles are float32 products, whatever
// T. Room for them in whole vectors.
template <class Tile, class T>
struct Rotation {
    using A = accumulate_t<T>;
    static constexpr int64_t kWhole = kLanes<Tile, float>;

    const float* inv_freq;  // (half,)
    int64_t half;
    bool inverse;
    float fastest = largest_of(inv_freq, half);                               // a bound of every angle
    Scratch<A> cosine{round_up(half, kWhole)}, sine{round_up(half, kWhole)};  // (half,)

    ALWAYS_INLINE void turn_to(int64_t position_id) const {
        const float position = static_cast<float>(position_id), largest = std::abs(position * fastest);
        if constexpr (std::is_same_v<A, float>) {
            if (largest <= 8388608.0f) return turn_lanes(position, largest);
        }
        for (int64_t i = 0; i < half; ++i) {
            const A angle = position * inv_freq[i], s = std::sin(angle);
            cosine.get()[i] = load<T>(store<T>(std::cos(angle)));
            sine.get()[i] = load<T>(store<T>(inverse ? -s : s));
        }
    }

    ALWAYS_INLINE void turn_lanes(float position, float largest) const {
        using V = vector_t<Tile, float>;
        for (int64_t i = 0; i < half; i += kWhole) {
            const V angle = load_values<Tile>(inv_freq + i, half - i) * position;
            V c, s;
            if (sizeof(T) == 2 && Tile::bytes > 16 && largest <= 6.5e6f) {
                short_cosines_and_sines(angle, c, s);
            } else {
                vector_t<Tile, double> c0, s0, c1, s1;
                cosines_and_sines(as_doubles<false>(angle), c0, s0);
                cosines_and_sines(as_doubles<true>(angle), c1, s1);
                c = as_floats(c0, c1), s = as_floats(s0, s1);
            }
            put(cosine.get() + i, c);
            put(sine.get() + i, inverse ? -s : s);
        }
    }
    template <class V>
    ALWAYS_INLINE static void put(A* table, V v) {
        if constexpr (sizeof(T) == 2)
            store_vector(table, widen<Tile>(narrow<Tile, T>(v), T{}));
        else
            store_vector(table, v);
    }
};

// The two halves of a head's rotated dims, from dim i on.
template <class Tile, class T, class V>
ALWAYS_INLINE void turn_pairs(V a, V b, V c, V s, T* out, int64_t half) {
    store_vector(out, narrow<Tile, T>(a * c - b * s));
    store_vector(out + half, narrow<Tile, T>(a * s + b * c));
}

// Turns x (width,) into out (width,), which may be the same memory; dims from 2 * half on are copied.
template <class Tile, class T>
ALWAYS_INLINE void rotate_head(const Rotation<Tile, T>& r, const T* x, T* out, int64_t width) {
    using A = accumulate_t<T>;
    constexpr int L = kLanes<Tile, A>;
    const int64_t half = r.half;
    const A *cosine = r.cosine.get(), *sine = r.sine.get();
    if (half < L) {
        for (int64_t i = 0; i < half; ++i) {
            const A a = load<T>(x[i]), b = load<T>(x[half + i]);
            out[i] = store<T>(a * cosine[i] - b * sine[i]);
            out[half + i] = store<T>(a * sine[i] + b * cosine[i]);
        }
    } else {
        // The last vectors may overlap those before: they are read before anything is written.
        const int64_t last = half - L;
        const auto a = load_lanes<Tile>(x + last), b = load_lanes<Tile>(x + half + last);
        for (int64_t i = 0; i < last; i += L) {
            turn_pairs<Tile, T>(load_lanes<Tile>(x + i), load_lanes<Tile>(x + half + i), load_lanes<Tile>(cosine + i),
                                load_lanes<Tile>(sine + i), out + i, half);
        }
        turn_pairs<Tile, T>(a, b, load_lanes<Tile>(cosine + last), load_lanes<Tile>(sine + last), out + last, half);
    }
    if (x != out) copy_row<Tile>(x + 2 * half, out + 2 * half, width - 2 * half);
}

}  // namespace hourllava_ext
