// SPDX-License-Identifier: Apache-2.0
// Page by page: the rotated keys and the values of its rows, then the summary of its keys while they are still in a
// cache. A summary is recomputed from the stored rows, so it does not depend on how the writes were grouped.
#include <limits>

#include "cpu/rotate.h"

namespace hourllava_ext {

// Rows whose sum is rounded to float before it is added to the others, in double.
constexpr int64_t kRowsInFloat = 8;

// Mean, minimum and maximum of one line of columns of a page's rows (filled, width).
template <class Tile, class T>
ALWAYS_INLINE void summarize_line(const T* rows, int64_t filled, int64_t width, accumulate_t<T>* mean,
                                  accumulate_t<T>* low, accumulate_t<T>* high) {
    using A = accumulate_t<T>;
    using V = vector_t<Tile, A>;
    using D = vector_t<Tile, double>;
    constexpr int N = Line<Tile, T>::kParts;
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    V least[N], most[N];
    D sum[N][2] = {};
    for (int i = 0; i < N; ++i) least[i] = V{} + kInfinity, most[i] = V{} - kInfinity;
    for (int64_t row = 0; row < filled; row += kRowsInFloat) {
        V few[N] = {};
        for (int64_t r = row; r < std::min(row + kRowsInFloat, filled); ++r) {
            const auto line = Line<Tile, T>::load(rows + r * width);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const V x = line.parts[i];
                least[i] = x < least[i] ? x : least[i];
                most[i] = x > most[i] ? x : most[i];
                few[i] += x;
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) {
            if constexpr (std::is_same_v<A, double>) {
                sum[i][0] += few[i];
            } else {
                sum[i][0] += as_doubles<false>(few[i]);
                sum[i][1] += as_doubles<true>(few[i]);
            }
        }
    }
    V means[N];
    const D count = D{} + static_cast<double>(filled);
    for (int i = 0; i < N; ++i) {
        if constexpr (std::is_same_v<A, double>)
            means[i] = sum[i][0] / count;
        else
            means[i] = as_floats(sum[i][0] / count, sum[i][1] / count);
    }
    Line<Tile, T>::store_in_order(means, mean);
    Line<Tile, T>::store_in_order(least, low);
    Line<Tile, T>::store_in_order(most, high);
}

// Of all columns of one key head.
template <class Tile, class T>
ALWAYS_INLINE void summarize_rows(const T* rows, int64_t filled, int64_t width, accumulate_t<T>* mean) {
    using A = accumulate_t<T>;
    constexpr int64_t kCount = Line<Tile, T>::kCount;
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    A *low = mean + width, *high = low + width;
    int64_t d = 0;
    for (; d + kCount <= width; d += kCount) {
        summarize_line<Tile>(rows + d, filled, width, mean + d, low + d, high + d);
    }
    for (; d < width; ++d) {
        double sum = 0;
        low[d] = kInfinity, high[d] = -kInfinity;
        for (int64_t row = 0; row < filled; ++row) {
            const A x = load<T>(rows[row * width + d]);
            sum += x;
            low[d] = x < low[d] ? x : low[d];
            high[d] = x > high[d] ? x : high[d];
        }
        mean[d] = static_cast<A>(sum / filled);
    }
}

// The keys and values of the i-th touched page, then its summary.
template <bool Stream, class Tile, class T>
ALWAYS_INLINE void write_page(const PageWriteParams<T>& p, int64_t i, const Rotation<Tile, T>& rotation) {
    const int64_t page = p.touched[i], filled = p.page_lengths[page], size = p.page_size * p.width;
    const int64_t* incoming = p.incoming + i * p.page_size;
    T *keys = p.key_pages + page * p.heads * size, *values = p.value_pages + page * p.heads * size;
    for (int64_t row = 0; row < filled; ++row) {
        const int64_t m = incoming[row];
        if (m < 0) continue;
        rotation.turn_to(p.position_ids[m]);
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t to = h * size + row * p.width;
            rotate_head(rotation, p.key + m * p.key_token_stride + h * p.key_head_stride, keys + to, p.width);
            copy_row<Tile, Stream>(p.value + m * p.value_token_stride + h * p.value_head_stride, values + to, p.width);
        }
    }
    for (int64_t h = 0; h < p.heads; ++h) {
        summarize_rows<Tile>(keys + h * size, filled, p.width, p.key_summary + (page * p.heads + h) * 3 * p.width);
    }
}

template <class Tile, class T>
ALWAYS_INLINE void write_pages(const PageWriteParams<T>& p, int64_t first, int64_t last) {
    const Rotation<Tile, T> rotation{p.inv_freq, p.frequencies, false};
    const int64_t row = p.width * sizeof(T);
    // The summary reads the keys, but nothing reads the values.
    const bool stream = streams<Tile>(p.value_pages, row, p.tokens * p.heads * row);
    for (int64_t i = first; i < last; ++i) {
        if (kStreams<Tile> && stream)
            write_page<kStreams<Tile>>(p, i, rotation);
        else
            write_page<false>(p, i, rotation);
    }
    finish_streams();
}

// Where a token's row begins in its page, for key head 0.
template <class T>
ALWAYS_INLINE int64_t row_of(const PageWriteBackwardParams<T>& p, int64_t token) {
    const int64_t page = p.slots[token] / p.page_size, row = p.slots[token] - page * p.page_size;
    return (page * p.heads * p.page_size + row) * p.width;
}

// Tokens between the row that is read and the one that is asked for.
constexpr int64_t kTokensAhead = 4;

template <class Tile, class T>
ALWAYS_INLINE void read_gradients(const PageWriteBackwardParams<T>& p, int64_t first, int64_t last) {
    const Rotation<Tile, T> rotation{p.inv_freq, p.frequencies, true};
    const int64_t size = p.page_size * p.width;
    for (int64_t m = first; m < last; ++m) {
        rotation.turn_to(p.position_ids[m]);
        const int64_t begin = row_of(p, m), next = row_of(p, std::min(m + kTokensAhead, last - 1));
        for (int64_t h = 0; h < p.heads; ++h) {
            prefetch_row(p.grad_key_pages + next + h * size, p.width);
            prefetch_row(p.grad_value_pages + next + h * size, p.width);
            const int64_t from = begin + h * size, to = (m * p.heads + h) * p.width;
            rotate_head(rotation, p.grad_key_pages + from, p.grad_key + to, p.width);
            copy_row<Tile>(p.grad_value_pages + from, p.grad_value + to, p.width);
        }
    }
}

CPU_KERNEL(page_write_cpu, PageWriteParams, write_pages, p.touched_pages, 2 * p.heads * p.page_size * p.width)
CPU_KERNEL(page_write_backward_cpu, PageWriteBackwardParams, read_gradients, p.tokens, 2 * p.heads * p.width)

}  // namespace hourllava_ext
