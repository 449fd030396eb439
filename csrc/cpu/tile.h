// SPDX-License-Identifier: Apache-2.0
// Register-blocked matrix products and vector arithmetic for the attention kernels, in compiler vector extensions.
// A row of a packed operand is padded with zeros to whole vectors, so inner loops have constant trip counts.
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

template <class A>
struct vector_types;
template <>
struct vector_types<float> {
    using vector = float __attribute__((vector_size(64)));
    using anywhere = float __attribute__((vector_size(64), aligned(4), may_alias));
    using integers = int32_t __attribute__((vector_size(64)));
};
template <>
struct vector_types<double> {
    using vector = double __attribute__((vector_size(64)));
    using anywhere = double __attribute__((vector_size(64), aligned(8), may_alias));
    using integers = int64_t __attribute__((vector_size(64)));
};
template <class A>
using vector_t = typename vector_types<A>::vector;
template <class A>
using integers_t = typename vector_types<A>::integers;
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How many accumulators fill the register file: 24 of the 32 of AVX-512, or 4 vectors of two halves each elsewhere.
struct WideTile {
    static constexpr int rows = 8, vectors = 3;
};
struct NarrowTile {
    static constexpr int rows = 4, vectors = 1;
};
// Row counts are padded to this multiple, which every tile divides.
constexpr int64_t kRowStep = 8;

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

// Body::run<Tile>(work, task), compiled for the instruction sets that differ in what a tile may hold.
#if defined(__x86_64__)
template <class Body, class Work>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Work& work, int64_t task) {
    Body::template run<WideTile>(work, task);
}
template <class Body, class Work>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Work& work, int64_t task) {
    Body::template run<NarrowTile>(work, task);
}
#endif
template <class Body, class Work>
void run_portable(const Work& work, int64_t task) {
    Body::template run<NarrowTile>(work, task);
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

template <class A>
ALWAYS_INLINE vector_t<A> load_vector(const A* p) {
    return *reinterpret_cast<const typename vector_types<A>::anywhere*>(p);
}
template <class A>
ALWAYS_INLINE void store_vector(A* p, vector_t<A> v) {
    *reinterpret_cast<typename vector_types<A>::anywhere*>(p) = v;
}

// All ones in the lanes from `first` on.
template <class A>
ALWAYS_INLINE integers_t<A> lanes_from(int64_t first) {
    integers_t<A> lanes;
    for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = i;
    return lanes >= static_cast<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>(first);
}

template <int Step, class V, int... I>
ALWAYS_INLINE V swap_lanes(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ Step)...);
}
template <class A, int Step = kLanes<A> / 2>
ALWAYS_INLINE A largest_lane(vector_t<A> v) {
    const vector_t<A> other = swap_lanes<Step>(v, std::make_integer_sequence<int, kLanes<A>>{});
    v = v > other ? v : other;
    if constexpr (Step == 1)
        return v[0];
    else
        return largest_lane<A, Step / 2>(v);
}
template <class A, int Step = kLanes<A> / 2>
ALWAYS_INLINE A sum_of_lanes(vector_t<A> v) {
    v += swap_lanes<Step>(v, std::make_integer_sequence<int, kLanes<A>>{});
    if constexpr (Step == 1)
        return v[0];
    else
        return sum_of_lanes<A, Step / 2>(v);
}

// e^x for x <= 0, exact zero below the normal range. Float: x = (n + f) log(2), and 2^f by a minimax polynomial on
// [-1/2, 1/2] with an error of 2e-9.
ALWAYS_INLINE vector_t<float> exp_vector(vector_t<float> x) {
    // log2(e) in two parts: rounded to one, it would shift every large x.
    constexpr float kHigh = 1.44269502f, kLow = 1.92596299e-8f;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
    const vector_t<float> shifted = x * kHigh + 12582912.0f;
    const vector_t<float> f = x * kLow + (x * kHigh - (shifted - 12582912.0f));
    vector_t<float> p = f * 0.000153458119f + 0.00133999312f;
    p = p * f + 0.00961848896f;
    p = p * f + 0.0555032878f;
    p = p * f + 0.240226469f;
    p = p * f + 0.693147206f;
    p = p * f + 1.0f;
    const integers_t<float> exponent = __builtin_bit_cast(integers_t<float>, shifted) << 23;
    const vector_t<float> power =
        __builtin_bit_cast(vector_t<float>, __builtin_bit_cast(integers_t<float>, p) + exponent);
    // Written so that a NaN stays a NaN.
    return x < -87.0f ? vector_t<float>{} : power;
}
ALWAYS_INLINE vector_t<double> exp_vector(vector_t<double> x) {
    vector_t<double> result;
    for (int64_t i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
    return result;
}

template <class A>
struct Matrix {
    A* at;
    int64_t row;       // elements from one row to the next
    int64_t step = 1;  // elements from one column to the next
};

enum class Start { zero, add, scale };

// c (Rows x Vectors) = start + a (Rows x depth) b (depth x Vectors); start is 0, c, or c with row r times factor[r]. It
// is added last: sums of sums lose less to rounding than one long sum.
template <Start start, int Rows, int Vectors, class A>
ALWAYS_INLINE void multiply_tile(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t depth, const A* factor) {
    constexpr int64_t L = kLanes<A>;
    vector_t<A> sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = vector_t<A>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        vector_t<A> line[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) line[v] = load_vector(b.at + k * b.row + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const A scalar = a.at[r * a.row + k * a.step];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] += line[v] * scalar;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            A* to = c.at + r * c.row + v * L;
            if constexpr (start == Start::add) sum[r][v] += load_vector(to);
            if constexpr (start == Start::scale) sum[r][v] += load_vector(to) * factor[r];
            store_vector(to, sum[r][v]);
        }
    }
}

// One strip of Tile::rows rows: c (strip x vectors) = start + a b.
template <class Tile, Start start, class A>
ALWAYS_INLINE void multiply_strip(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t vectors, int64_t depth,
                                  const A* factor = nullptr) {
    while (vectors > 0) {
        // Four vectors go as two and two: a tile one vector wide loads as much as it computes.
        const int64_t take = Tile::vectors == 1 ? 1 : vectors == 4 ? 2 : std::min<int64_t>(vectors, Tile::vectors);
        if (take == 1) {
            multiply_tile<start, Tile::rows, 1, A>(a, b, c, depth, factor);
        } else if constexpr (Tile::vectors > 1) {
            if (take == 2)
                multiply_tile<start, Tile::rows, 2, A>(a, b, c, depth, factor);
            else
                multiply_tile<start, Tile::rows, 3, A>(a, b, c, depth, factor);
        }
        b.at += take * kLanes<A>;
        c.at += take * kLanes<A>;
        vectors -= take;
    }
}

// c (rows x vectors) = start + a b, strip by strip; rows is a multiple of kRowStep.
template <class Tile, Start start, class A>
ALWAYS_INLINE void multiply(Matrix<const A> a, Matrix<const A> b, Matrix<A> c, int64_t rows, int64_t vectors,
                            int64_t depth) {
    for (int64_t r = 0; r < rows; r += Tile::rows) {
        multiply_strip<Tile, start, A>({a.at + r * a.row, a.row, a.step}, b, {c.at + r * c.row, c.row}, vectors, depth);
    }
}

// Up to one vector of stored values, converted; lanes from `count` on are zero.
template <class T>
ALWAYS_INLINE vector_t<accumulate_t<T>> load_values(const T* p, int64_t count) {
    using A = accumulate_t<T>;
    if constexpr (std::is_same_v<T, A>) {
        if (count >= kLanes<A>) return load_vector(p);
    } else if (count >= kLanes<A>) {
        uint16_t stored __attribute__((vector_size(32)));
        std::memcpy(&stored, p, sizeof stored);
        using wide = uint32_t __attribute__((vector_size(64)));
        return __builtin_bit_cast(vector_t<A>, __builtin_convertvector(stored, wide) << 16);
    }
    vector_t<A> v{};
    for (int64_t i = 0; i < count; ++i) v[i] = load<T>(p[i]);
    return v;
}

template <bool High, class V, int... I>
ALWAYS_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    return __builtin_shufflevector(a, b, (I / 2 + (High ? L / 2 : 0) + (I % 2 ? L : 0))...);
}

// Turns L rows of L lanes into columns: interleaving row i with row i + L/2, log2(L) times over.
template <class A>
ALWAYS_INLINE void transpose_square(vector_t<A> (&rows)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 4
    for (int round = L; round > 1; round /= 2) {
        vector_t<A> next[L];
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
template <bool Whole, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_square(const T* rows, int64_t row, int64_t count, int64_t width, A* out, int64_t out_row) {
    constexpr int64_t L = kLanes<A>;
    vector_t<A> square[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
        if constexpr (Whole)
            square[i] = load_values(rows + i * row, L);
        else
            square[i] = i < count ? load_values(rows + i * row, width) : vector_t<A>{};
    }
    transpose_square<A>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
        if (Whole || i < width) store_vector(out + i * out_row, square[i]);
    }
}

// out (width x out_row) = transpose of rows (count x width); columns from count to the next whole vector are zero.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_transposed(const T* rows, int64_t count, int64_t width, A* out, int64_t out_row) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t j = 0; j < count; j += L) {
        for (int64_t d = 0; d < width; d += L) {
            const T* from = rows + j * width + d;
            A* to = out + d * out_row + j;
            if (j + L <= count && d + L <= width)
                pack_square<true>(from, width, L, L, to, out_row);
            else
                pack_square<false>(from, width, count - j, width - d, to, out_row);
        }
    }
}

// out (count x padded) = rows (count x width) times factor, zeros beyond width.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_rows(const T* rows, int64_t count, int64_t width, A* out, A factor) {
    const int64_t padded = round_up(width, kLanes<A>);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < padded; d += kLanes<A>) {
            store_vector(out + i * padded + d, load_values(rows + i * width + d, width - d) * factor);
        }
    }
}

}  // namespace hourllava_ext
