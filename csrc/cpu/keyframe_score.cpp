// SPDX-License-Identifier: Apache-2.0
// Inverse norms first, then each frame's cosines with its neighbours only: O(T * window * C).
#include "cpu/common.h"

namespace hourllava_ext {

template <class Tile, class T>
ALWAYS_INLINE void norm_frames(const KeyframeScoreParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    for (int64_t t = first; t < last; ++t) {
        const T* x = p.features + t * p.width;
        // A frame of zeros has no direction: the floor makes its cosines 0.
        p.inverse_norms[t] = 1 / std::max(std::sqrt(dot<T>(x, x, p.width)), A(1e-12));
    }
}

template <class Tile, class T>
ALWAYS_INLINE void score_frames(const KeyframeScoreParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    for (int64_t t = first; t < last; ++t) {
        // The window slides inside the video: at both ends it still holds window - 1 neighbours.
        const int64_t begin = std::clamp<int64_t>(t - p.window / 2, 0, p.frames - p.window);
        A sum = 0;
        for (int64_t s = begin; s < begin + p.window; ++s) {
            if (s == t) continue;
            sum += p.inverse_norms[s] * dot<T>(p.features + s * p.width, p.features + t * p.width, p.width);
        }
        p.score[t] = p.window < 2 ? A(0) : sum * p.inverse_norms[t] / (p.window - 1);
    }
}

CPU_KERNEL(keyframe_norms_cpu, KeyframeScoreParams, norm_frames, p.frames, p.width)
CPU_KERNEL(keyframe_neighbours_cpu, KeyframeScoreParams, score_frames, p.frames, p.window* p.width)

#define KEYFRAME_SCORE(T)                                      \
    void keyframe_score_cpu(const KeyframeScoreParams<T>& p) { \
        keyframe_norms_cpu(p);                                 \
        keyframe_neighbours_cpu(p);                            \
    }
FOR_EACH_DTYPE(KEYFRAME_SCORE)

}  // namespace hourllava_ext
