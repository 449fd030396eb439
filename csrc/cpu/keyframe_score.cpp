// SPDX-License-Identifier: Apache-2.0
// Products of frames that lie in one another's windows, each once for both: O(T * window * C).
#include "cpu/vectors.h"

namespace hourllava_ext {

// Frames that one task scores: many beside the neighbours that it shares with other tasks, and all in a cache.
constexpr int64_t kBlock = 64;

// The window slides inside the video: at both ends it still holds window - 1 neighbours.
template <class T>
ALWAYS_INLINE int64_t window_begin(const KeyframeScoreParams<T>& p, int64_t frame) {
    return std::clamp<int64_t>(frame - p.window / 2, 0, p.frames - p.window);
}
// The last frame that is in this one's window, or has this one in its own.
template <class T>
ALWAYS_INLINE int64_t last_partner(const KeyframeScoreParams<T>& p, int64_t frame) {
    const int64_t sees_it = frame < p.frames - p.window ? frame + p.window / 2 : p.frames - 1;
    return std::max(window_begin(p, frame) + p.window - 1, sees_it);
}

// What float can hold of a sum is spent within the lanes: their own sum is of double, and so is all that follows,
// because cosines lie close to one another.
template <class V>
ALWAYS_INLINE double sum_in_double(V v) {
    if constexpr (std::is_same_v<element_t<V>, double>)
        return sum_of_lanes(v);
    else
        return sum_of_lanes(as_doubles<false>(v) + as_doubles<true>(v));
}
template <class T>
ALWAYS_INLINE double product_from(const T* a, const T* b, int64_t i, int64_t width) {
    double sum = 0;
    for (; i < width; ++i) sum += static_cast<double>(load<T>(a[i])) * load<T>(b[i]);
    return sum;
}

// The rows follow one another, and little is computed of each: what is read soon is asked for.
template <class T>
constexpr int64_t kAhead = 2048 / sizeof(T);

// Sums of several vectors at once, so that none waits for the one before.
template <class Tile, class T>
ALWAYS_INLINE double squares_of(const T* x, int64_t width) {
    using L = Line<Tile, T>;
    constexpr int kLines = 4 / L::kParts;
    typename L::V sums[4] = {};
    int64_t i = 0;
    for (; i + kLines * L::kCount <= width; i += kLines * L::kCount) {
#pragma GCC unroll 4
        for (int l = 0; l < kLines; ++l) {
            __builtin_prefetch(x + i + l * L::kCount + kAhead<T>);
            const L line = L::load(x + i + l * L::kCount);
            for (int part = 0; part < L::kParts; ++part) {
                sums[l * L::kParts + part] += line.parts[part] * line.parts[part];
            }
        }
    }
    return sum_in_double(sums[0]) + sum_in_double(sums[1]) + sum_in_double(sums[2]) + sum_in_double(sums[3]) +
           product_from(x, x, i, width);
}

// Frames and offsets whose products stay in registers.
template <class Tile>
constexpr int kFrames = Tile::bytes == 64 ? 4 : 2;
constexpr int kOffsets = 4;

// products[r][o]: of frame t + r with frame t + r + apart + o. Where that is past the end, of some other frame.
template <class Tile, class T>
ALWAYS_INLINE void multiply_frames(const KeyframeScoreParams<T>& p, int64_t t, int64_t apart,
                                   double (&products)[kFrames<Tile>][kOffsets]) {
    using L = Line<Tile, T>;
    constexpr int R = kFrames<Tile>, S = R + kOffsets - 1;
    const T *rows[R], *others[S];
    for (int r = 0; r < R; ++r) rows[r] = p.features + std::min(t + r, p.frames - 1) * p.width;
    for (int s = 0; s < S; ++s) others[s] = p.features + std::min(t + apart + s, p.frames - 1) * p.width;
    typename L::V sum[R][kOffsets] = {};
    int64_t i = 0;
    for (; i + L::kCount <= p.width; i += L::kCount) {
#pragma GCC unroll 2
        for (int part = 0; part < L::kParts; ++part) {
            typename L::V other[S];
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) other[s] = L::load(others[s] + i).parts[part];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const auto x = L::load(rows[r] + i).parts[part];
#pragma GCC unroll 4
                for (int o = 0; o < kOffsets; ++o) sum[r][o] += x * other[r + o];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int o = 0; o < kOffsets; ++o) {
            products[r][o] = sum_in_double(sum[r][o]) + product_from(rows[r], others[r + o], i, p.width);
        }
    }
}

// The scores of frames [begin, end).
template <class Tile, class T>
ALWAYS_INLINE void score_block(const KeyframeScoreParams<T>& p, int64_t begin, int64_t end) {
    const int64_t low = window_begin(p, begin), high = window_begin(p, end - 1) + p.window;
    const Scratch<double> inverse_norms(high - low);
    for (int64_t t = low; t < high; ++t) {
        const double norm = std::sqrt(squares_of<Tile>(p.features + t * p.width, p.width));
        // A frame of zeros has no direction: the floor makes its cosines 0.
        inverse_norms.get()[t - low] = 1 / std::max(norm, 1e-12);
    }
    double score[kBlock] = {};
    double products[kFrames<Tile>][kOffsets];
    for (int64_t t = low; t < end; t += kFrames<Tile>) {
        const int64_t last = std::min(t + kFrames<Tile>, end) - 1, partner = std::min(last_partner(p, last), high - 1);
        // One of the two is in the block.
        const int64_t nearest = std::max<int64_t>(1, begin - (t + kFrames<Tile> - 1));
        for (int64_t apart = nearest; t + apart <= partner; apart += kOffsets) {
            multiply_frames<Tile>(p, t, apart, products);
            for (int64_t a = t; a <= last; ++a) {
                for (int64_t b = a + apart; b < std::min(a + apart + kOffsets, high); ++b) {
                    const double product = products[a - t][b - a - apart];
                    if (a >= begin && b < window_begin(p, a) + p.window) {
                        score[a - begin] += product * inverse_norms.get()[b - low];
                    }
                    if (b >= begin && b < end && window_begin(p, b) <= a) {
                        score[b - begin] += product * inverse_norms.get()[a - low];
                    }
                }
            }
        }
    }
    for (int64_t t = begin; t < end; ++t) {
        p.score[t] = p.window < 2 ? 0 : score[t - begin] * inverse_norms.get()[t - low] / (p.window - 1);
    }
}

template <class Tile, class T>
ALWAYS_INLINE void score_blocks(const KeyframeScoreParams<T>& p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        score_block<Tile>(p, block * kBlock, std::min((block + 1) * kBlock, p.frames));
    }
}

CPU_KERNEL(keyframe_score_cpu, KeyframeScoreParams, score_blocks, (p.frames + kBlock - 1) / kBlock,
           kBlock* p.window* p.width)

}  // namespace hourllava_ext
