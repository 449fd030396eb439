// SPDX-License-Identifier: Apache-2.0
// Inverse norms first, then each frame's product with the sum of its neighbours' directions: O(T * window * C).
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

// Block: frame.
template <class T, int N>
__global__ void norms(KeyframeScoreParams<T> p) {
    const int64_t frame = blockIdx.x;
    float squares = 0;
    for (int64_t at = threadIdx.x * N; at < p.width; at += blockDim.x * N) {
        const Pack<T, N> pack = read<T, N>(p.features + frame * p.width + at);
        for (int e = 0; e < N; ++e) squares += load(pack.at[e]) * load(pack.at[e]);
    }
    const float norm = sqrtf(block_sum(squares));
    // A frame of zeros has no direction: the floor makes its cosines 0.
    if (threadIdx.x == 0) p.inverse_norms[frame] = 1 / (norm < 1e-12f ? 1e-12f : norm);
}

// Block: frame.
template <class T, int N>
__global__ void neighbours(KeyframeScoreParams<T> p) {
    const int64_t frame = blockIdx.x;
    // The window slides inside the video: at both ends it still holds window - 1 neighbours.
    const int64_t left = frame - p.window / 2 > 0 ? frame - p.window / 2 : 0;
    const int64_t first = left < p.frames - p.window ? left : p.frames - p.window;
    float products = 0;
    for (int64_t at = threadIdx.x * N; at < p.width; at += blockDim.x * N) {
        float sum[N] = {};
        for (int64_t other = first; other < first + p.window; ++other) {
            if (other == frame) continue;
            const float scale = p.inverse_norms[other];
            const Pack<T, N> pack = read<T, N>(p.features + other * p.width + at);
            for (int e = 0; e < N; ++e) sum[e] += scale * load(pack.at[e]);
        }
        const Pack<T, N> own = read<T, N>(p.features + frame * p.width + at);
        for (int e = 0; e < N; ++e) products += load(own.at[e]) * sum[e];
    }
    const float total = block_sum(products) * p.inverse_norms[frame];
    if (threadIdx.x == 0) p.score[frame] = p.window < 2 ? 0 : total / static_cast<float>(p.window - 1);
}

}  // namespace

template <class T>
void keyframe_score_cuda(const KeyframeScoreParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.features}, {p.width});
    const int threads = threads_for(vectors ? p.width / kVector<T> : p.width);
    launch(vectors ? norms<T, kVector<T>> : norms<T, 1>, {p.frames}, threads, stream, p);
    launch(vectors ? neighbours<T, kVector<T>> : neighbours<T, 1>, {p.frames}, threads, stream, p);
}

#define KEYFRAME_SCORE(T) template void keyframe_score_cuda(const KeyframeScoreParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(KEYFRAME_SCORE)

}  // namespace hourllava_ext
