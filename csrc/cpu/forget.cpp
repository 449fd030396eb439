// SPDX-License-Identifier: Apache-2.0
// Copies the kept rows; the backward finds, for each token, the rows it became, so no two tasks add to one place.
#include <vector>

#include "cpu/vectors.h"

namespace hourllava_ext {

template <class Tile, class T>
ALWAYS_INLINE void forget_frames(const ForgetParams<T>& p, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        const int64_t frame = p.frames[i];
        T* kept = p.kept + i * (p.kept_patches + 1) * p.width;
        int64_t* position_ids = p.position_ids + i * (p.kept_patches + 1);
        for (int64_t j = 0; j < p.kept_patches; ++j) {
            const int64_t patch = p.patches[i * p.kept_patches + j];
            const T* token = p.tokens + (frame * p.per_frame + patch) * p.width;
            if (j + 1 < p.kept_patches) {
                prefetch_row(p.tokens + (frame * p.per_frame + p.patches[i * p.kept_patches + j + 1]) * p.width,
                             p.width);
            }
            copy_row<Tile>(token, kept + j * p.width, p.width);
            position_ids[j] = frame * (p.per_frame + 1) + patch;
        }
        copy_row<Tile>(p.newline, kept + p.kept_patches * p.width, p.width);
        position_ids[p.kept_patches] = frame * (p.per_frame + 1) + p.per_frame;
    }
}

CPU_KERNEL(forget_cpu, ForgetParams, forget_frames, p.kept_frames, (p.kept_patches + 1) * p.width)

// Which kept rows each token became: those of token r are rows[starts[r]] ... rows[starts[r + 1]], ascending.
struct KeptRows {
    std::vector<int64_t> starts, rows;
};

template <class T>
static KeptRows kept_rows(const ForgetBackwardParams<T>& p) {
    const auto token_of = [&p](int64_t i, int64_t j) {
        return p.frames[i] * p.per_frame + p.patches[i * p.kept_patches + j];
    };
    KeptRows kept{std::vector<int64_t>(p.total_frames * p.per_frame + 1),
                  std::vector<int64_t>(p.kept_frames * p.kept_patches)};
    for (int64_t i = 0; i < p.kept_frames; ++i) {
        for (int64_t j = 0; j < p.kept_patches; ++j) ++kept.starts[token_of(i, j) + 1];
    }
    for (size_t r = 1; r < kept.starts.size(); ++r) kept.starts[r] += kept.starts[r - 1];
    std::vector<int64_t> next(kept.starts.begin(), kept.starts.end() - 1);
    for (int64_t i = 0; i < p.kept_frames; ++i) {
        for (int64_t j = 0; j < p.kept_patches; ++j) kept.rows[next[token_of(i, j)]++] = i * (p.kept_patches + 1) + j;
    }
    return kept;
}

template <class T>
struct TokenSums {
    const ForgetBackwardParams<T>& p;
    const KeptRows& kept;
};

template <class Tile, class T>
ALWAYS_INLINE void sum_rows(const TokenSums<T>& work, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    const ForgetBackwardParams<T>& p = work.p;
    const Scratch<A> sum(p.width);
    for (int64_t r = first; r < last; ++r) {
        T* out = p.grad_tokens + r * p.width;
        const int64_t begin = work.kept.starts[r], end = work.kept.starts[r + 1];
        if (begin == end) {
            std::memset(static_cast<void*>(out), 0, p.width * sizeof(T));
            continue;
        }
        const int64_t* rows = work.kept.rows.data();
        if (end - begin == 1) {
            copy_row<Tile>(p.grad + rows[begin] * p.width, out, p.width);
            continue;
        }
        std::fill(sum.get(), sum.get() + p.width, A{0});
        for (int64_t k = begin; k < end; ++k) {
            const T* row = p.grad + rows[k] * p.width;
            for (int64_t c = 0; c < p.width; ++c) sum.get()[c] += load<T>(row[c]);
        }
        for (int64_t c = 0; c < p.width; ++c) out[c] = store<T>(sum.get()[c]);
    }
}
CPU_KERNEL(sum_rows_cpu, TokenSums, sum_rows, p.p.total_frames* p.p.per_frame, p.p.width)

// Every kept frame adds to the one newline: hundreds of terms, so they are summed in double.
template <class T>
static void sum_newlines(const ForgetBackwardParams<T>& p, int64_t first, int64_t last) {
    std::vector<double> sum(last - first);
    for (int64_t i = 0; i < p.kept_frames; ++i) {
        const T* row = p.grad + (i * (p.kept_patches + 1) + p.kept_patches) * p.width;
        for (int64_t c = first; c < last; ++c) sum[c - first] += load<T>(row[c]);
    }
    for (int64_t c = first; c < last; ++c) p.grad_newline[c] = store<T>(sum[c - first]);
}

template <class T>
static void forget_backward(const ForgetBackwardParams<T>& p) {
    const KeptRows kept = kept_rows(p);
    sum_rows_cpu(TokenSums<T>{p, kept});
    parallel_for(0, p.width, grain_of(p.kept_frames), [&](int64_t b, int64_t e) { sum_newlines(p, b, e); });
}

#define FORGET_BACKWARD(T) \
    void forget_backward_cpu(const ForgetBackwardParams<T>& p) { forget_backward(p); }
FOR_EACH_DTYPE(FORGET_BACKWARD)

}  // namespace hourllava_ext
