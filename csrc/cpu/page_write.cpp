// SPDX-License-Identifier: Apache-2.0
// Rotated keys and values to their rows of the pages, then the summaries of the pages that were touched. A summary is
// recomputed from the stored rows, so it does not depend on how the writes were grouped.
#include <limits>
#include <vector>

#include "cpu/rotate.h"

namespace hourllava_ext {
namespace {

// First element of the row that a token has in its page, for key head 0.
template <class Params>
ALWAYS_INLINE int64_t row_offset(const Params& p, int64_t token) {
    const int64_t page = p.slots[token] / p.page_size, row = p.slots[token] % p.page_size;
    return (page * p.heads * p.page_size + row) * p.width;
}

}  // namespace

template <class T>
ALWAYS_INLINE void write_tokens(const PageWriteParams<T>& p, int64_t first, int64_t last) {
    std::vector<accumulate_t<T>> cosine(p.frequencies), sine(p.frequencies);
    for (int64_t m = first; m < last; ++m) {
        rotation_table<T>(p.position_ids[m], p.inv_freq, p.frequencies, cosine.data(), sine.data());
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t to = row_offset(p, m) + h * p.page_size * p.width;
            rotate_head(p.key + m * p.key_token_stride + h * p.key_head_stride, p.key_pages + to, p.frequencies,
                        p.width, cosine.data(), sine.data(), false);
            const T* value = p.value + m * p.value_token_stride + h * p.value_head_stride;
            std::copy(value, value + p.width, p.value_pages + to);
        }
    }
}

// Mean, minimum and maximum of a page's filled rows, for the touched pages [first, last).
template <class T>
ALWAYS_INLINE void summarize_pages(const PageWriteParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    std::vector<double> sum(p.width);
    for (int64_t i = first; i < last; ++i) {
        const int64_t page = p.touched[i], filled = p.page_lengths[page];
        for (int64_t h = 0; h < p.heads; ++h) {
            const T* keys = p.key_pages + (page * p.heads + h) * p.page_size * p.width;
            A* mean = p.key_summary + (page * p.heads + h) * 3 * p.width;
            A *low = mean + p.width, *high = low + p.width;
            std::fill(sum.begin(), sum.end(), 0);
            std::fill(low, low + p.width, std::numeric_limits<A>::infinity());
            std::fill(high, high + p.width, -std::numeric_limits<A>::infinity());
            for (int64_t row = 0; row < filled; ++row) {
                for (int64_t d = 0; d < p.width; ++d) {
                    const A x = load<T>(keys[row * p.width + d]);
                    sum[d] += x;
                    low[d] = x < low[d] ? x : low[d];
                    high[d] = x > high[d] ? x : high[d];
                }
            }
            for (int64_t d = 0; d < p.width; ++d) mean[d] = static_cast<A>(sum[d] / filled);
        }
    }
}

template <class T>
ALWAYS_INLINE void read_gradients(const PageWriteBackwardParams<T>& p, int64_t first, int64_t last) {
    std::vector<accumulate_t<T>> cosine(p.frequencies), sine(p.frequencies);
    for (int64_t m = first; m < last; ++m) {
        rotation_table<T>(p.position_ids[m], p.inv_freq, p.frequencies, cosine.data(), sine.data());
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t from = row_offset(p, m) + h * p.page_size * p.width, to = (m * p.heads + h) * p.width;
            rotate_head(p.grad_key_pages + from, p.grad_key + to, p.frequencies, p.width, cosine.data(), sine.data(),
                        true);
            const T* grad = p.grad_value_pages + from;
            std::copy(grad, grad + p.width, p.grad_value + to);
        }
    }
}

CPU_KERNEL(page_write_cpu, PageWriteParams, write_tokens, p.tokens, 2 * p.heads * p.width)
CPU_KERNEL(page_write_summary_cpu, PageWriteParams, summarize_pages, p.touched_pages, p.heads* p.page_size* p.width)
CPU_KERNEL(page_write_backward_cpu, PageWriteBackwardParams, read_gradients, p.tokens, 2 * p.heads * p.width)

}  // namespace hourllava_ext
