// SPDX-License-Identifier: Apache-2.0
// What attention multiplies: rows of queries (or of gradients) as vectors, keys and values as scalars. Float and double
// keys and values are read where they lie in their page. On a tier that multiplies pairs, bfloat16 keys are too; on the
// others they are converted first.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/attention_plan.h"
#include "cpu/products.h"

namespace hourllava_ext {

// Scratch that may take many megabytes, then on huge pages where the system grants them: to map and clear small ones on
// first touch took a tenth of a backward.
template <class A>
class LargeScratch {
  public:
    explicit LargeScratch(int64_t count) : data_(nullptr, Free{alignment_of(count)}) {
        const size_t bytes = std::max<int64_t>(count, 1) * sizeof(A);
        data_.reset(static_cast<A*>(::operator new(bytes, data_.get_deleter().alignment)));
#if defined(__linux__)
        // Advice: where it is not taken, pages are small.
        if (alignment_of(count) == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    A* get() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kHugePage{size_t{1} << 21}, kCacheLine{64};
    static std::align_val_t alignment_of(int64_t count) {
        return count * sizeof(A) < 2 * static_cast<size_t>(kHugePage) ? kCacheLine : kHugePage;
    }
    struct Free {
        std::align_val_t alignment;
        void operator()(A* p) const { ::operator delete(p, alignment); }
    };
    std::unique_ptr<A, Free> data_;
};

// Pairs where the tier multiplies them, else the type of sums.
template <class Tile, class T>
using operand_t = std::conditional_t<Tile::pairs && std::is_same_v<T, bfloat16>, Pair, accumulate_t<T>>;
// Numbers in an element, and elements that hold a count of numbers.
template <class E>
constexpr int64_t kNumbers = std::is_same_v<std::remove_const_t<E>, Pair> ? 2 : 1;
template <class E>
constexpr int64_t elements(int64_t numbers) {
    return (numbers + kNumbers<E> - 1) / kNumbers<E>;
}

// out[i] = the pair of first[i] and second[i], for a count that is a multiple of 8. A null second counts as zeros.
template <int Bytes>
ALWAYS_INLINE void pair_lanes(const bfloat16* first, const bfloat16* second, Pair* out) {
    typename vector_types<uint16_t, Bytes / 2>::vector low{}, high{};
    using wide = typename vector_types<uint32_t, Bytes>::vector;
    std::memcpy(&low, first, sizeof low);
    if (second) std::memcpy(&high, second, sizeof high);
    store_vector(out, __builtin_convertvector(low, wide) | __builtin_convertvector(high, wide) << 16);
}
ALWAYS_INLINE void pair_up(const bfloat16* first, const bfloat16* second, int64_t count, Pair* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) pair_lanes<64>(first + i, second ? second + i : nullptr, out + i);
    if (i < count) pair_lanes<32>(first + i, second ? second + i : nullptr, out + i);
}

// rows (count x row) paired down the columns: out (count / 2, rounded up, x out_row), a missing last row as zeros.
ALWAYS_INLINE void pair_rows(const bfloat16* rows, int64_t row, int64_t count, int64_t columns, Pair* out,
                             int64_t out_row) {
    for (int64_t i = 0; i < count; i += 2) {
        pair_up(rows + i * row, i + 1 < count ? rows + (i + 1) * row : nullptr, columns, out + i / 2 * out_row);
    }
}

// One strip of rows of a tensor (M, Hq, D).
template <class T>
struct Strip {
    const PagedAttentionParams<T>& p;
    const Plan& plan;
    const RowTile& tile;
    int64_t head, first, rows;  // rows [first, first + rows) of the tile, heads of this key head

    // Row r of `from`, (D,).
    const T* row_of(const T* from, int64_t r) const {
        const int64_t token = plan.token_of(tile, first + r), q = head * plan.group + plan.member_of(tile, first + r);
        return from + (token * p.query_heads + q) * p.head_dim;
    }
};

// Rows of a strip side by side, out (kStrip, width): numbers converted to A and times sign, zeros in the padding.
template <class Tile, class T, class A>
ALWAYS_INLINE void gather_rows(const Strip<T>& s, const T* from, A sign, A* out) {
    const int64_t width = s.plan.width;
    for (int64_t r = 0; r < s.rows; ++r) {
        const T* row = s.row_of(from, r);
        for (int64_t d = 0; d < width; d += kLanes<Tile, A>) {
            store_vector(out + r * width + d, load_values<Tile>(row + d, s.p.head_dim - d) * sign);
        }
    }
    std::fill(out + s.rows * width, out + kStrip<A> * width, A{0});
}
// The same without conversion: out (kStrip, 2 * width), so that pairs of a row fill whole vectors.
template <class Tile>
ALWAYS_INLINE void gather_rows(const Strip<bfloat16>& s, const bfloat16* from, float sign, bfloat16* out) {
    const int64_t width = 2 * s.plan.width;
    const uint16_t flip = sign < 0 ? 0x8000 : 0;
    std::fill(out, out + kStrip<float> * width, bfloat16{});
    for (int64_t r = 0; r < s.rows; ++r) {
        const bfloat16* row = s.row_of(from, r);
        for (int64_t d = 0; d < s.p.head_dim; ++d) out[r * width + d].bits = row[d].bits ^ flip;
    }
}

// A strip of rows as operands of products: `across` has rows as lanes, `down` runs over rows and may be null.
template <class Tile, class T, class E = operand_t<Tile, T>>
ALWAYS_INLINE void pack_strip(const Strip<T>& s, const T* from, accumulate_t<T> sign, E* space,
                              E* across,  // (elements(head_dim), kStrip)
                              E* down) {  // (elements(kStrip), width)
    using A = accumulate_t<T>;
    const int64_t width = s.plan.width;
    if constexpr (std::is_same_v<E, Pair>) {
        bfloat16* rows = &space->first;
        gather_rows<Tile>(s, from, sign, rows);
        if (down) pair_rows(rows, 2 * width, kStrip<A>, width, down, width);
    } else {
        gather_rows<Tile>(s, from, sign, space);
        if (down) std::copy(space, space + kStrip<A> * width, down);
    }
    for (int64_t r = 0; r < kStrip<A>; r += kLanes<Tile, E>) {
        transpose_rows<Tile>(space + r * width, width, elements<E>(s.p.head_dim), across + r, kStrip<A>);
    }
}

// Keys or values [begin, begin + count) of a page, one key head, as scalars.
template <class Tile, class T>
struct PageRows {
    using E = operand_t<Tile, T>;
    const T* at;  // (count, head_dim)
    int64_t count, head_dim;
    E* space;  // (kBlockKeys, head_dim)

    // (count x elements(head_dim)): products run over the dims.
    ALWAYS_INLINE Matrix<const E> along_dims() const {
        if constexpr (std::is_same_v<E, Pair>)
            return {reinterpret_cast<const Pair*>(at), head_dim / 2};
        else
            return {converted(), head_dim};
    }
    // (head_dim x elements(count)): products run over the keys.
    ALWAYS_INLINE Matrix<const E> along_keys() const {
        if constexpr (std::is_same_v<E, Pair>) {
            pair_rows(at, head_dim, count, head_dim, space, head_dim);
            return {space, 1, head_dim};
        } else {
            return {converted(), 1, head_dim};
        }
    }
    ALWAYS_INLINE const E* converted() const {
        if constexpr (std::is_same_v<T, E>) {
            return at;
        } else {
            for (int64_t i = 0; i < count * head_dim; i += kLanes<Tile, E>) {
                store_vector(space + i, load_values<Tile>(at + i, count * head_dim - i));
            }
            return space;
        }
    }
};

}  // namespace hourllava_ext
