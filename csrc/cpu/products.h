// SPDX-License-Identifier: Apache-2.0
// Register-blocked matrix products. One operand is read as scalars, in place; the other as whole cache lines, so inner
// loops have constant trip counts whatever the tier.
#pragma once

#include "cpu/vectors.h"

namespace hourllava_ext {

template <class E>
struct Matrix {
    E* at;
    int64_t row;       // elements from one row to the next
    int64_t step = 1;  // elements from one column to the next
};

enum class Start { zero, add, scale };

// c (Tile::rows x Vectors) = start + a (rows x depth) b (depth x Vectors); start is 0, c, or c with its columns times
// factor. It is added last: sums of sums lose less to rounding than one long sum. Of rows < Tile::rows, the last stands
// in for those that do not exist; c has room for all.
//
// The sums stay in registers. A step of 8 x 3 loads 3 lines and 8 scalars for 24 products: half of what two load ports
// can bring, and far more sums in flight than a product has cycles.
template <class Tile, Start start, int Vectors, bool Whole, class E, class A>
ALWAYS_INLINE void multiply_tile(Matrix<const E> a, Matrix<const E> b, Matrix<A> c, int64_t rows, int64_t depth,
                                 const A* factor) {
    using V = vector_t<Tile, A>;
    constexpr int64_t L = kLanes<Tile, A>;
    V sum[Tile::rows][Vectors];
    const E* scalars[Tile::rows];
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
        scalars[r] = a.at + (Whole ? r : std::min<int64_t>(r, rows - 1)) * a.row;
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = V{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        vector_t<Tile, E> line[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) line[v] = load_vector<Tile>(b.at + k * b.row + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Tile::rows; ++r) {
            const E scalar = scalars[r][k * a.step];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] = add_product(sum[r][v], line[v], scalar);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            A* to = c.at + r * c.row + v * L;
            if constexpr (start == Start::add) sum[r][v] += load_vector<Tile>(to);
            if constexpr (start == Start::scale) sum[r][v] += load_vector<Tile>(to) * load_vector<Tile>(factor + v * L);
            store_vector(to, sum[r][v]);
        }
    }
}

// One strip of Tile::rows rows: c (strip x columns) = start + a b; columns are whole lines. Columns says at compile
// time how many there are, in whole threes of vectors.
template <class Tile, Start start, int64_t Columns, bool Whole, class E, class A>
ALWAYS_INLINE void multiply_strip(Matrix<const E> a, Matrix<const E> b, Matrix<A> c, int64_t rows, int64_t columns,
                                  int64_t depth, const A* factor = nullptr) {
    constexpr int64_t L = kLanes<Tile, A>;
    static_assert(Tile::vectors == 3 && Columns % (3 * L) == 0);
    if constexpr (Columns > 0) {
        for (int64_t j = 0; j < Columns; j += 3 * L) {
            multiply_tile<Tile, start, 3, Whole, E, A>(a, {b.at + j, b.row}, {c.at + j, c.row}, rows, depth,
                                                       factor + j);
        }
        return;
    }
    for (int64_t vectors = columns / L; vectors > 0;) {
        // Four vectors go as two and two: a tile one vector wide loads as much as it computes.
        const int64_t take = vectors == 4 ? 2 : std::min<int64_t>(vectors, 3);
        if (take == 1)
            multiply_tile<Tile, start, 1, Whole, E, A>(a, b, c, rows, depth, factor);
        else if (take == 2)
            multiply_tile<Tile, start, 2, Whole, E, A>(a, b, c, rows, depth, factor);
        else
            multiply_tile<Tile, start, 3, Whole, E, A>(a, b, c, rows, depth, factor);
        b.at += take * L;
        c.at += take * L;
        vectors -= take;
    }
}

// c (rows x columns) = start + a b, strip by strip; c has whole strips, and a too unless it is Ragged.
template <class Tile, Start start, int64_t Columns, bool Ragged, class E, class A>
ALWAYS_INLINE void multiply(Matrix<const E> a, Matrix<const E> b, Matrix<A> c, int64_t rows, int64_t columns,
                            int64_t depth, const A* factor = nullptr) {
    int64_t r = 0;
    for (; r + Tile::rows <= rows; r += Tile::rows) {
        multiply_strip<Tile, start, Columns, true, E, A>({a.at + r * a.row, a.row, a.step}, b,
                                                         {c.at + r * c.row, c.row}, Tile::rows, columns, depth, factor);
    }
    if constexpr (Ragged) {
        if (r == rows) return;
        multiply_strip<Tile, start, Columns, false, E, A>({a.at + r * a.row, a.row, a.step}, b,
                                                          {c.at + r * c.row, c.row}, rows - r, columns, depth, factor);
    }
}

// The same, with long sums cut into sums of sums, which lessens their rounding.
template <class Tile, Start start, int64_t Columns, bool Ragged, class E, class A>
ALWAYS_INLINE void multiply_long(Matrix<const E> a, Matrix<const E> b, Matrix<A> c, int64_t rows, int64_t columns,
                                 int64_t depth, const A* factor = nullptr) {
    constexpr int64_t kLongSum = 64;
    int64_t k = 0;
    if constexpr (start != Start::add) {
        multiply<Tile, start, Columns, Ragged, E, A>(a, b, c, rows, columns, std::min(depth, kLongSum), factor);
        k = kLongSum;
    }
    for (; k < depth; k += kLongSum) {
        multiply<Tile, Start::add, Columns, Ragged, E, A>({a.at + k * a.step, a.row, a.step}, {b.at + k * b.row, b.row},
                                                          c, rows, columns, std::min(depth - k, kLongSum));
    }
}

}  // namespace hourllava_ext
