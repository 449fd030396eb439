// SPDX-License-Identifier: Apache-2.0
// Vector arithmetic in compiler vector extensions, as wide as the tier. The few instructions that these cannot express
// are here, and nowhere else.
#pragma once

#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/common.h"

namespace hourllava_ext {

// Two bfloat16 that meet two others in one product: an element of an operand whose sums run over pairs.
struct Pair {
    bfloat16 first, second;
};
// What an element takes in a vector; a pair is as wide as the float it is summed in.
template <class E>
struct lane {
    using type = E;
};
template <>
struct lane<Pair> {
    using type = uint32_t;
};

// Elements of a cache line: what packed rows are padded to.
template <class A>
constexpr int64_t kLine = 64 / sizeof(A);

template <class A, int Bytes>
struct vector_types {
    typedef A vector __attribute__((vector_size(Bytes)));
    typedef A anywhere __attribute__((vector_size(Bytes), aligned(1), may_alias));
};
template <class Tile, class E>
using vector_t = typename vector_types<typename lane<E>::type, Tile::bytes>::vector;
template <class Tile, class E>
constexpr int kLanes = Tile::bytes / sizeof(E);
template <class V>
using integers_t = decltype(V{} < V{});
template <class V>
using element_t = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Uninitialised memory for a kernel's own use, on a cache line boundary.
template <class A>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<A*>(::operator new(std::max<int64_t>(count, 1) * sizeof(A), std::align_val_t{64}))) {}
    A* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(A* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<A, Free> data_;
};

template <class Tile, class E>
ALWAYS_INLINE vector_t<Tile, E> load_vector(const E* p) {
    return *reinterpret_cast<const typename vector_types<typename lane<E>::type, Tile::bytes>::anywhere*>(p);
}
template <class V, class E>
ALWAYS_INLINE void store_vector(E* p, V v) {
    *reinterpret_cast<typename vector_types<element_t<V>, sizeof(V)>::anywhere*>(p) = v;
}

// All ones in the lanes from `first` on.
template <class V>
ALWAYS_INLINE integers_t<V> lanes_from(int64_t first) {
    using I = integers_t<V>;
    I lanes;
    for (size_t i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) lanes[i] = i;
    return lanes >= static_cast<element_t<I>>(first);
}

template <int Step, class V, int... I>
ALWAYS_INLINE V swap_lanes(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ Step)...);
}
template <class V, int Step = sizeof(V) / sizeof(element_t<V>) / 2>
ALWAYS_INLINE element_t<V> largest_lane(V v) {
    const V other = swap_lanes<Step>(v, std::make_integer_sequence<int, sizeof(V) / sizeof(element_t<V>)>{});
    v = v > other ? v : other;
    if constexpr (Step == 1)
        return v[0];
    else
        return largest_lane<V, Step / 2>(v);
}
template <class V, int Step = sizeof(V) / sizeof(element_t<V>) / 2>
ALWAYS_INLINE element_t<V> sum_of_lanes(V v) {
    v += swap_lanes<Step>(v, std::make_integer_sequence<int, sizeof(V) / sizeof(element_t<V>)>{});
    if constexpr (Step == 1)
        return v[0];
    else
        return sum_of_lanes<V, Step / 2>(v);
}

// 2^x for x <= 0, exact zero below the normal range. Float: x = n + f, and 2^f by a minimax polynomial on [-1/2, 1/2]
// with an error of 2e-9.
template <class V>
ALWAYS_INLINE V exp2_vector(V x) {
    if constexpr (std::is_same_v<element_t<V>, double>) {
        V result{};
        for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) result[i] = std::exp2(x[i]);
        return result;
    } else {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
        const V shifted = x + 12582912.0f;
        const V f = x - (shifted - 12582912.0f);
        V p = f * 0.000153458119f + 0.00133999312f;
        p = p * f + 0.00961848896f;
        p = p * f + 0.0555032878f;
        p = p * f + 0.240226469f;
        p = p * f + 0.693147206f;
        p = p * f + 1.0f;
        const integers_t<V> exponent = __builtin_bit_cast(integers_t<V>, shifted) << 23;
        const V power = __builtin_bit_cast(V, __builtin_bit_cast(integers_t<V>, p) + exponent);
        // Written so that a NaN stays a NaN.
        return x < -126.0f ? V{} : power;
    }
}

// sum + line * scalar.
template <class V>
ALWAYS_INLINE V add_product(V sum, V line, element_t<V> scalar) {
    return sum + line * scalar;
}
// The same for pairs: sum + line.second * scalar.second + line.first * scalar.first, in float. Assembly, because an
// intrinsic cannot be inlined into a template that is compiled for several targets.
template <class V, class U>
ALWAYS_INLINE V add_product(V sum, U line, Pair scalar) {
#if defined(__x86_64__)
    const U pair = U{} + __builtin_bit_cast(uint32_t, scalar);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(line), "v"(pair));
#endif
    return sum;
}

// Rounds a vector of floats to bfloat16, to nearest even.
template <class V>
ALWAYS_INLINE auto round_to_bfloat16(V v) {
    typename vector_types<uint16_t, sizeof(V) / 2>::vector rounded;
#if defined(__x86_64__)
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
#endif
    return rounded;
}

template <class V, int... I>
ALWAYS_INLINE V alternate_halves(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I / 2 + (I % 2) * sizeof...(I) / 2)...);
}
// Lane i of the result is the pair of first[i] and second[i], rounded to bfloat16.
template <class V>
ALWAYS_INLINE auto round_to_pairs(V first, V second) {
    constexpr int kCount = sizeof(V) / sizeof(uint16_t);
    typename vector_types<uint16_t, sizeof(V)>::vector halves;
#if defined(__x86_64__)
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
#endif
    return alternate_halves(halves, std::make_integer_sequence<int, kCount>{});
}

// A vector of stored values, converted.
template <class Tile, class U>
ALWAYS_INLINE auto widen(U stored, bfloat16) {
    using wide = typename vector_types<uint32_t, Tile::bytes>::vector;
    return __builtin_bit_cast(vector_t<Tile, float>, __builtin_convertvector(stored, wide) << 16);
}
template <class Tile, class U>
ALWAYS_INLINE auto widen(U stored, float16) {
    vector_t<Tile, float> v;
#if defined(__x86_64__)
    if constexpr (Tile::bytes > 16) {
        asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(stored));
        return v;
    }
#endif
    using wide = typename vector_types<uint32_t, Tile::bytes>::vector;
    v = widen_float16<vector_t<Tile, float>>(__builtin_convertvector(stored, wide));
    return v;
}

// Up to one vector of stored values, converted; lanes from `count` on are zero.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE vector_t<Tile, A> load_values(const T* p, int64_t count) {
    using V = vector_t<Tile, A>;
    if constexpr (std::is_same_v<T, A>) {
        if (count >= kLanes<Tile, A>) return load_vector<Tile>(p);
    } else if (count >= kLanes<Tile, A>) {
        typename vector_types<uint16_t, Tile::bytes / 2>::vector stored;
        std::memcpy(&stored, p, sizeof stored);
        return widen<Tile>(stored, T{});
    }
    V v{};
    for (int64_t i = 0; i < count; ++i) v[i] = load<T>(p[i]);
    return v;
}

template <bool High, class V, int... I>
ALWAYS_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    return __builtin_shufflevector(a, b, (I / 2 + (High ? L / 2 : 0) + (I % 2 ? L : 0))...);
}

// Turns L rows of L lanes into columns: interleaving row i with row i + L/2, log2(L) times over.
template <int L, class V>
ALWAYS_INLINE void transpose_square(V (&rows)[L]) {
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 4
    for (int round = L; round > 1; round /= 2) {
        V next[L];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = interleave<false>(rows[i], rows[i + L / 2], lanes);
            next[2 * i + 1] = interleave<true>(rows[i], rows[i + L / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
}

// out (count x out_row) = transpose of rows (L rows of `row` elements, `count` columns of them); L is the lanes.
template <class Tile, class E>
ALWAYS_INLINE void transpose_rows(const E* rows, int64_t row, int64_t count, E* out, int64_t out_row) {
    constexpr int L = kLanes<Tile, E>;
    vector_t<Tile, E> square[L];
    for (int64_t first = 0; first < count; first += L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load_vector<Tile>(rows + i * row + first);
        transpose_square<L>(square);
        const int64_t columns = std::min<int64_t>(L, count - first);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
            if (i < columns) store_vector(out + (first + i) * out_row, square[i]);
        }
    }
}

}  // namespace hourllava_ext
