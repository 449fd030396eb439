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

// The conversions of vectors are assembly where the compiler would put the result together from narrower ones.
#if defined(__x86_64__)
#define CONVERT_VECTOR(instruction, result, v) asm(instruction " %1, %0" : "=v"(result) : "v"(v))
#else
#define CONVERT_VECTOR(instruction, result, v) __builtin_unreachable()
#endif

// Half of a vector of floats as doubles: the first if `From` is 0, the second if it is half the lanes.
template <int From, class V, int... I>
ALWAYS_INLINE auto as_doubles(V v, std::integer_sequence<int, I...>) {
    using D = typename vector_types<double, sizeof(V)>::vector;
    const auto half = __builtin_shufflevector(v, v, (I + From)...);
    D wide;
    if constexpr (sizeof(V) > 16)
        CONVERT_VECTOR("vcvtps2pd", wide, half);
    else
        wide = __builtin_convertvector(half, D);
    return wide;
}
template <bool Second, class V>
ALWAYS_INLINE auto as_doubles(V v) {
    constexpr int kHalf = sizeof(V) / sizeof(double);
    return as_doubles<Second ? kHalf : 0>(v, std::make_integer_sequence<int, kHalf>{});
}
template <class D, int... I>
ALWAYS_INLINE auto as_floats(D first, D second, std::integer_sequence<int, I...>) {
    using half = typename vector_types<float, sizeof(D) / 2>::vector;
    return __builtin_shufflevector(__builtin_convertvector(first, half), __builtin_convertvector(second, half), I...);
}
template <class D>
ALWAYS_INLINE auto as_floats(D first, D second) {
    return as_floats(first, second, std::make_integer_sequence<int, sizeof(D) / sizeof(float)>{});
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
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa, and 127 more makes it the bits
        // of an exponent.
        const V shifted = x + 12583039.0f;
        const V f = x - (shifted - 12583039.0f);
        V p = f * 0.000153458119f + 0.00133999312f;
        p = p * f + 0.00961848896f;
        p = p * f + 0.0555032878f;
        p = p * f + 0.240226469f;
        p = p * f + 0.693147206f;
        p = p * f + 1.0f;
        // A product, so that a NaN stays one.
        const V power = p * __builtin_bit_cast(V, __builtin_bit_cast(integers_t<V>, shifted) << 23);
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

// Stored values as they lie in a register, converted.
template <class Tile, class U>
ALWAYS_INLINE auto widen(U stored, bfloat16) {
    using wide = typename vector_types<uint32_t, Tile::bytes>::vector;
    wide bits;
    if constexpr (Tile::bytes > 16)
        CONVERT_VECTOR("vpmovzxwd", bits, stored);
    else
        bits = __builtin_convertvector(stored, wide);
    return __builtin_bit_cast(vector_t<Tile, float>, bits << 16);
}
template <class Tile, class U>
ALWAYS_INLINE auto widen(U stored, float16) {
    using wide = typename vector_types<uint32_t, Tile::bytes>::vector;
    vector_t<Tile, float> v;
    if constexpr (Tile::bytes > 16)
        CONVERT_VECTOR("vcvtph2ps", v, stored);
    else
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

// A vector of stored values, and the same vector rounded and stored.
template <class Tile, class T>
ALWAYS_INLINE auto load_lanes(const T* p) {
    return load_values<Tile>(p, kLanes<Tile, accumulate_t<T>>);
}
template <class Tile, class T, class V>
ALWAYS_INLINE auto narrow(V v) {
    if constexpr (std::is_same_v<element_t<V>, T>) {
        return v;
    } else if constexpr (Tile::pairs && std::is_same_v<T, bfloat16>) {
        return round_to_bfloat16(v);
    } else {
        using U = typename vector_types<uint32_t, sizeof(V)>::vector;
        typename vector_types<uint16_t, sizeof(V) / 2>::vector stored;
        const U bits = __builtin_bit_cast(U, v);
        if constexpr (std::is_same_v<T, float16> && sizeof(V) > 16)
            CONVERT_VECTOR("vcvtps2ph $0,", stored, v);
        else if constexpr (std::is_same_v<T, float16>)
            stored = __builtin_convertvector(narrow_float16<V>(bits), decltype(stored));
        else if constexpr (sizeof(V) > 32)
            CONVERT_VECTOR("vpmovdw", stored, narrow_bfloat16(bits));
        else
            stored = __builtin_convertvector(narrow_bfloat16(bits), decltype(stored));
        return stored;
    }
}

// Lanes of a and of b in turn, from the first or from the second half of both.
template <bool High, class V, int... I>
ALWAYS_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    return __builtin_shufflevector(a, b, (I / 2 + (High ? L / 2 : 0) + (I % 2 ? L : 0))...);
}

// A line of stored values, widened: one vector, or for 16 bits two. Of bfloat16 they are the even and the odd values,
// which is where these lie in a register; `in_order` says which values the two hold together.
template <class Tile, class T>
struct Line {
    using V = vector_t<Tile, accumulate_t<T>>;
    static constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
    static constexpr int kCount = kParts * kLanes<Tile, accumulate_t<T>>;
    V parts[kParts];

    ALWAYS_INLINE static Line load(const T* p) {
        if constexpr (std::is_same_v<T, bfloat16>) {
            const auto bits = __builtin_bit_cast(typename vector_types<uint32_t, Tile::bytes>::vector,
                                                 load_vector<Tile>(reinterpret_cast<const uint16_t*>(p)));
            return {{__builtin_bit_cast(V, bits << 16), __builtin_bit_cast(V, bits & 0xffff0000u)}};
        } else if constexpr (kParts == 2) {
            return {{load_lanes<Tile>(p), load_lanes<Tile>(p + kCount / 2)}};
        } else {
            return {{load_lanes<Tile>(p)}};
        }
    }
    // Rounded, and each value in its place again.
    ALWAYS_INLINE void store(T* out) const {
        if constexpr (Tile::pairs && std::is_same_v<T, bfloat16>) {
            store_vector(reinterpret_cast<uint16_t*>(out), round_to_pairs(parts[0], parts[1]));
        } else if constexpr (std::is_same_v<T, bfloat16>) {
            using U = typename vector_types<uint32_t, Tile::bytes>::vector;
            const U even = narrow_bfloat16(__builtin_bit_cast(U, parts[0]));
            store_vector(out, even | narrow_bfloat16(__builtin_bit_cast(U, parts[1])) << 16);
        } else {
            for (int i = 0; i < kParts; ++i) store_vector(out + i * (kCount / kParts), narrow<Tile, T>(parts[i]));
        }
    }
    ALWAYS_INLINE static void store_in_order(const V (&parts)[kParts], accumulate_t<T>* out) {
        constexpr auto lanes = std::make_integer_sequence<int, kLanes<Tile, accumulate_t<T>>>{};
        if constexpr (std::is_same_v<T, bfloat16>) {
            store_vector(out, interleave<false>(parts[0], parts[1], lanes));
            store_vector(out + kCount / 2, interleave<true>(parts[0], parts[1], lanes));
        } else {
            for (int i = 0; i < kParts; ++i) store_vector(out + i * (kCount / kParts), parts[i]);
        }
    }
};

// to[i] = from[i]; the two are apart, or the same. A stream goes past the caches, which spares reading the lines first:
// `to` is aligned to the tier's vectors, and other threads see it after `finish_streams`.
template <class Tile, bool Stream = false, class T>
ALWAYS_INLINE void copy_row(const T* from, T* to, int64_t count) {
    using E = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
    using V = vector_t<Tile, E>;
    constexpr int L = kLanes<Tile, E>;
    int64_t i = 0;
    for (; i + L <= count; i += L) {
        const V v = load_vector<Tile>(reinterpret_cast<const E*>(from + i));
#if defined(__x86_64__)
        using anywhere = typename vector_types<E, Tile::bytes>::anywhere;
        if constexpr (Stream)
            asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<anywhere*>(to + i)) : "v"(v));
        else
#endif
            store_vector(reinterpret_cast<E*>(to + i), v);
    }
    for (; i < count; ++i) to[i] = from[i];
}
// Asks for a row that is read soon: where rows lie apart, the machine does not guess the next one.
template <class T>
ALWAYS_INLINE void prefetch_row(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}
ALWAYS_INLINE void finish_streams() {
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}
template <class Tile>
constexpr bool kStreams = Tile::bytes > 16;
// Worth it for what is too large to be found in a cache later; rows must be whole lines.
template <class Tile>
ALWAYS_INLINE bool streams(const void* out, int64_t row_bytes, int64_t bytes) {
    return kStreams<Tile> && bytes >= 1 << 25 && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}
// to[i] = from[i] * factor, rounded once.
template <class Tile, class T>
ALWAYS_INLINE void scale_row(const T* from, T* to, int64_t count, accumulate_t<T> factor) {
    using L = Line<Tile, T>;
    int64_t i = 0;
    for (; i + L::kCount <= count; i += L::kCount) {
        L line = L::load(from + i);
        for (auto& part : line.parts) part *= factor;
        line.store(to + i);
    }
    for (; i < count; ++i) to[i] = store<T>(load<T>(from[i]) * factor);
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
