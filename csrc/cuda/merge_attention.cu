// SPDX-License-Identifier: Apache-2.0
// Weighs each part of a query's attention by its share of the log-sum-exp; reads each part once.
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

// The shares of one query and head; all zero where no part saw a key.
struct Shares {
    const float* lse;  // of part 0
    int64_t parts, stride;
    float shift = 0, total = 0;

    __device__ Shares(const float* first, int64_t count, int64_t apart) : lse(first), parts(count), stride(apart) {
        float largest = -INFINITY;
        for (int64_t s = 0; s < parts; ++s) largest = fmaxf(largest, lse[s * stride]);
        // Minus infinity from itself would be NaN.
        shift = largest == -INFINITY ? 0 : largest;
        for (int64_t s = 0; s < parts; ++s) total += expf(lse[s * stride] - shift);
    }
    __device__ float operator[](int64_t s) const { return total == 0 ? 0 : expf(lse[s * stride] - shift) / total; }
    __device__ float joint() const { return shift + logf(total); }
};

template <class T, int N>
__global__ void merge(MergeAttentionParams<T> p, Lanes lanes) {
    const int64_t row = lanes.row(), rows = p.tokens * p.heads;  // in (M, H)
    if (row >= rows) return;
    const int64_t place = row % p.heads * p.tokens + row / p.heads;
    const Shares shares(p.lse + place, p.parts, rows);
    if (lanes.column() == 0) p.merged_lse[place] = shares.joint();
    for (int64_t at = lanes.column() * N; at < p.width; at += lanes.columns * N) {
        float sum[N] = {};
        for (int64_t s = 0; s < p.parts; ++s) {
            const float share = shares[s];
            // A part that saw no key has nothing to say, whatever lies in its rows.
            if (share == 0) continue;
            const Pack<T, N> pack = read<T, N>(p.out + (s * rows + row) * p.width + at);
            for (int e = 0; e < N; ++e) sum[e] += share * load(pack.at[e]);
        }
        Pack<T, N> pack;
        for (int e = 0; e < N; ++e) pack.at[e] = store<T>(sum[e]);
        write(p.merged + row * p.width + at, pack);
    }
}

// Warp: query and head.
template <class T, int N>
__global__ void merge_gradients(MergeAttentionBackwardParams<T> p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int64_t rows = p.tokens * p.heads, place = row % p.heads * p.tokens + row / p.heads;
    if (row >= rows) return;
    const int lane = threadIdx.x % kWarp;
    const Shares shares(p.lse + place, p.parts, rows);
    float mean = 0;
    for (int64_t s = 0; s < p.parts; ++s) {
        const float share = shares[s];
        float product = 0;
        for (int64_t at = lane * N; at < p.width; at += kWarp * N) {
            const int64_t to = (s * rows + row) * p.width + at;
            const Pack<T, N> grad = read<T, N>(p.grad_merged + row * p.width + at);
            const Pack<T, N> out = share == 0 ? Pack<T, N>{} : read<T, N>(p.out + to);
            Pack<T, N> grad_out;
            for (int e = 0; e < N; ++e) {
                product += load(grad.at[e]) * load(out.at[e]);
                grad_out.at[e] = store<T>(share * load(grad.at[e]));
            }
            write(p.grad_out + to, grad_out);
        }
        product = warp_sum(product);
        mean += share * product;
        if (lane == 0) p.grad_lse[s * rows + place] = product;
    }
    if (lane != 0) return;
    for (int64_t s = 0; s < p.parts; ++s) {
        float& grad = p.grad_lse[s * rows + place];
        grad = shares[s] * (grad - mean + p.grad_merged_lse[place]);
    }
}

}  // namespace

template <class T>
void merge_attention_cuda(const MergeAttentionParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.out, p.merged}, {p.width});
    const Lanes lanes(vectors ? p.width / kVector<T> : p.width);
    const Grid grid{lanes.blocks(p.tokens * p.heads)};
    launch(vectors ? merge<T, kVector<T>> : merge<T, 1>, grid, lanes.threads(), stream, p, lanes);
}

template <class T>
void merge_attention_backward_cuda(const MergeAttentionBackwardParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.grad_merged, p.out, p.grad_out}, {p.width});
    const auto kernel = vectors ? merge_gradients<T, kVector<T>> : merge_gradients<T, 1>;
    launch(kernel, {divide_up(p.tokens * p.heads, kThreads / kWarp)}, kThreads, stream, p);
}

#define MERGE_ATTENTION(T)                                                      \
    template void merge_attention_cuda(const MergeAttentionParams<T>&, Stream); \
    template void merge_attention_backward_cuda(const MergeAttentionBackwardParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(MERGE_ATTENTION)

}  // namespace hourllava_ext
