// SPDX-License-Identifier: Apache-2.0
// Register-blocked matrix products and vector arithmetic for the attention kernels, in compiler vector extensions.
// Packed operands have rows of whole cache lines, padded with zeros, so inner loops have constant trip counts whatever
// the instruction set.
#pragma once

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/common.h"

namespace hourllava_ext {

// How much of a product stays in registers: rows x vectors sums, for vectors of so many bytes.
template <int Bytes, int Rows, int Vectors>
struct Tile {
    static constexpr int bytes = Bytes, rows = Rows, vectors = Vectors;
};
// Row counts are padded to this multiple, which the rows of every tile divide.
constexpr int64_t kRowStep = 8;
// Elements of a cache line: what packed rows are padded to.
template <class A>
constexpr int64_t kLine = 64 / sizeof(A);

template <class A, int Bytes>
struct vector_types {
    typedef A vector __attribute__((vector_size(Bytes)));
    typedef A anywhere __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias));
};
template <class Tile, class A>
using vector_t = typename vector_types<A, Tile::bytes>::vector;
template <class Tile, class A>
constexpr int kLanes = Tile::bytes / sizeof(A);
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

// Body::run<Tile>(work, task) for each instruction set, with the tile that fills its registers.
#if defined(__x86_64__)
template <class Body, class Work>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Work& work, int64_t task) {
    Body::template run<Tile<64, 8, 3>>(work, task);
}
template <class Body, class Work>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Work& work, int64_t task) {
    Body::template run<Tile<32, 4, 3>>(work, task);
}
#endif
template <class Body, class Work>
void run_portable(const Work& work, int64_t task) {
    Body::template run<Tile<16, 4, 3>>(work, task);
}

// Runs every task on the best tier of the machine, handing the next one to whichever thread is free.
template <class Body, class Work>
void for_each_task(int64_t tasks, const Work& work) {
    void (*run)(const Work&, int64_t) = run_portable<Body, Work>;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("x86-64-v4"))
        run = run_v4<Body, Work>;
    else if (__builtin_cpu_supports("x86-64-v3"))
        run = run_v3<Body, Work>;
#endif
    std::atomic<int64_t> next{0};
    parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(work, task);
    });
}

template <class Tile, class A>
ALWAYS_INLINE vector_t<Tile, A> load_vector(const A* p) {
    return *reinterpret_cast<const typename vector_types<A, Tile::bytes>::anywhere*>(p);
}
template <class V>
ALWAYS_INLINE void store_vector(element_t<V>* p, V v) {
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

// e^x for x <= 0, exact zero below the normal range. Float: x = (n + f) log(2), and 2^f by a minimax polynomial on
// [-1/2, 1/2] with an error of 2e-9.
template <class V>
ALWAYS_INLINE V exp_vector(V x) {
    if constexpr (std::is_same_v<element_t<V>, double>) {
        V result{};
        for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) result[i] = std::exp(x[i]);
        return result;
    } else {
        // log2(e) in two parts: rounded to one, it would shift every large x.
        constexpr float kHigh = 1.44269502f, kLow = 1.92596299e-8f;
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
        const V shifted = x * kHigh + 12582912.0f;
        const V f = x * kLow + (x * kHigh - (shifted - 12582912.0f));
        V p = f * 0.000153458119f + 0.00133999312f;
        p = p * f + 0.00961848896f;
        p = p * f + 0.0555032878f;
        p = p * f + 0.240226469f;
        p = p * f + 0.693147206f;
        p = p * f + 1.0f;
        const integers_t<V> exponent = __builtin_bit_cast(integers_t<V>, shifted) << 23;
        const V power = __builtin_bit_cast(V, __builtin_bit_cast(integers_t<V>, p) + exponent);
        // Written so that a NaN stays a NaN.
        return x < -87.0f ? V{} : power;
    }
}

template <class A>
struct Matrix {
    A* at;
    int64_t row;       // elements from one row to the next
    int64_t step = 1;  // elements from one column to the next
};

enum class Start { zero, add, scale };

// c (Tile::rows x Vectors) = start + a (rows x depth) b (depth x Vectors); start is 0, c, or c with row r times
// factor[r]. It is added last: sums of sums lose less to rounding than one long sum.
template <class Tile, Start start, int Vectors, class A>
ALWAYS_INLINE void multiply_tile(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t depth, const A* factor) {
    using V = vector_t<Tile, A>;
    constexpr int64_t L = kLanes<Tile, A>;
    V sum[Tile::rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = V{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        V line[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) line[v] = load_vector<Tile>(b.at + k * b.row + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Tile::rows; ++r) {
            const A scalar = a.at[r * a.row + k * a.step];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] += line[v] * scalar;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            A* to = c.at + r * c.row + v * L;
            if constexpr (start == Start::add) sum[r][v] += load_vector<Tile>(to);
            if constexpr (start == Start::scale) sum[r][v] += load_vector<Tile>(to) * factor[r];
            store_vector(to, sum[r][v]);
        }
    }
}

// One strip of Tile::rows rows: c (strip x columns) = start + a b; columns are whole lines.
template <class Tile, Start start, class A>
ALWAYS_INLINE void multiply_strip(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t columns, int64_t depth,
                                  const A* factor = nullptr) {
    static_assert(Tile::vectors == 3);
    for (int64_t vectors = columns / kLanes<Tile, A>; vectors > 0;) {
        // Four vectors go as two and two: a tile one vector wide loads as much as it computes.
        const int64_t take = vectors == 4 ? 2 : std::min<int64_t>(vectors, 3);
        if (take == 1)
            multiply_tile<Tile, start, 1, A>(a, b, c, depth, factor);
        else if (take == 2)
            multiply_tile<Tile, start, 2, A>(a, b, c, depth, factor);
        else
            multiply_tile<Tile, start, 3, A>(a, b, c, depth, factor);
        b.at += take * kLanes<Tile, A>;
        c.at += take * kLanes<Tile, A>;
        vectors -= take;
    }
}

// c (rows x columns) = start + a b, strip by strip; rows is a multiple of kRowStep.
template <class Tile, Start start, class A>
ALWAYS_INLINE void multiply(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t rows, int64_t columns,
                            int64_t depth) {
    for (int64_t r = 0; r < rows; r += Tile::rows) {
        multiply_strip<Tile, start, A>({a.at + r * a.row, a.row, a.step}, b, {c.at + r * c.row, c.row}, columns, depth);
    }
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
        using wide = typename vector_types<uint32_t, Tile::bytes>::vector;
        return __builtin_bit_cast(V, __builtin_convertvector(stored, wide) << 16);
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

// One square of the transpose: rows [0, count) and dims [0, width) of it exist, where Whole says that all do.
template <class Tile, bool Whole, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_square(const T* rows, int64_t row, int64_t count, int64_t width, A* out, int64_t out_row) {
    constexpr int L = kLanes<Tile, A>;
    vector_t<Tile, A> square[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
        if constexpr (Whole)
            square[i] = load_values<Tile>(rows + i * row, L);
        else
            square[i] = i < count ? load_values<Tile>(rows + i * row, width) : vector_t<Tile, A>{};
    }
    transpose_square<L>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
        if (Whole || i < width) store_vector(out + i * out_row, square[i]);
    }
}

// out (width x out_row) = transpose of rows (count x width); columns from count to the end of the line are zero.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_transposed(const T* rows, int64_t count, int64_t width, A* out, int64_t out_row) {
    constexpr int64_t L = kLanes<Tile, A>;
    for (int64_t j = 0; j < round_up(count, kLine<A>); j += L) {
        for (int64_t d = 0; d < width; d += L) {
            const T* from = rows + j * width + d;
            A* to = out + d * out_row + j;
            if (j + L <= count && d + L <= width)
                pack_square<Tile, true>(from, width, L, L, to, out_row);
            else
                pack_square<Tile, false>(from, width, count - j, width - d, to, out_row);
        }
    }
}

// out (count x padded) = rows (count x width) times factor, zeros beyond width.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_rows(const T* rows, int64_t count, int64_t width, A* out, A factor) {
    const int64_t padded = round_up(width, kLine<A>);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < padded; d += kLanes<Tile, A>) {
            store_vector(out + i * padded + d, load_values<Tile>(rows + i * width + d, width - d) * factor);
        }
    }
}

}  // namespace hourllava_ext
