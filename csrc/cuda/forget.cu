// SPDX-License-Identifier: Apache-2.0
// A block copies one kept row. The backward finds, for each token, the rows it became, so no two warps add to one
// place.
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

constexpr int kInFlight = 4;  // vectors of a row that a thread has read and not yet written

template <class T, int N>
__global__ void keep_rows(ForgetParams<T> p) {
    const int64_t row = blockIdx.x, i = row / (p.kept_patches + 1), j = row % (p.kept_patches + 1);
    const int64_t frame = p.frames[i];
    const bool newline = j == p.kept_patches;
    const int64_t patch = newline ? p.per_frame : p.patches[i * p.kept_patches + j];
    if (threadIdx.x == 0) p.position_ids[row] = frame * (p.per_frame + 1) + patch;
    const T* from = newline ? p.newline : p.tokens + (frame * p.per_frame + patch) * p.width;
    T* to = p.kept + row * p.width;
    const int64_t step = blockDim.x;
    for (int64_t first = threadIdx.x; first * N < p.width; first += kInFlight * step) {
        Pack<T, N> packs[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int64_t at = (first + u * step) * N;
            if (at < p.width) packs[u] = read<T, N>(from + at);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int64_t at = (first + u * step) * N;
            if (at < p.width) write(to + at, packs[u]);
        }
    }
}

// Calls visit(row) for the kept rows (n, k + 1) that a token became, ascending; every lane of a warp gets each.
template <class T, class Visit>
__device__ void for_each_row(const ForgetBackwardParams<T>& p, int64_t frame, int64_t patch, const Visit& visit) {
    const int64_t lane = threadIdx.x % kWarp;
    for (int64_t first = 0; first < p.kept_frames; first += kWarp) {
        const int64_t mine = first + lane;
        unsigned frames = __ballot_sync(kWholeWarp, mine < p.kept_frames && p.frames[mine] == frame);
        for (; frames != 0; frames &= frames - 1) {
            const int64_t i = first + __ffs(frames) - 1;
            for (int64_t begin = 0; begin < p.kept_patches; begin += kWarp) {
                const int64_t own = begin + lane;
                const bool picked = own < p.kept_patches && p.patches[i * p.kept_patches + own] == patch;
                unsigned picks = __ballot_sync(kWholeWarp, picked);
                for (; picks != 0; picks &= picks - 1) visit(i * (p.kept_patches + 1) + begin + __ffs(picks) - 1);
            }
        }
    }
}

// A token that was kept more than once: the sum of its rows, in their order.
template <class T, int N>
__device__ void sum_row(const ForgetBackwardParams<T>& p, int64_t frame, int64_t patch, T* out) {
    for (int64_t first = 0; first < p.width; first += kWarp * N) {
        const int64_t at = first + threadIdx.x % kWarp * N;
        float sum[N] = {};
        for_each_row(p, frame, patch, [&](int64_t row) {
            if (at >= p.width) return;
            const Pack<T, N> pack = read<T, N>(p.grad + row * p.width + at);
            for (int e = 0; e < N; ++e) sum[e] += load(pack.at[e]);
        });
        Pack<T, N> pack;
        for (int e = 0; e < N; ++e) pack.at[e] = store<T>(sum[e]);
        if (at < p.width) write(out + at, pack);
    }
}

// Block: frame. Most are forgotten: their tokens get zeros at once.
template <class T, int N>
__global__ void scatter_rows(ForgetBackwardParams<T> p) {
    const int64_t frame = blockIdx.x;
    bool here = false;
    for (int64_t i = threadIdx.x; i < p.kept_frames; i += kThreads) here |= p.frames[i] == frame;
    const bool kept = __syncthreads_or(here);
    for (int64_t patch = threadIdx.x / kWarp; patch < p.per_frame; patch += kThreads / kWarp) {
        T* out = p.grad_tokens + (frame * p.per_frame + patch) * p.width;
        int64_t count = 0, last = 0;
        if (kept) for_each_row(p, frame, patch, [&](int64_t row) { ++count, last = row; });
        if (count > 1) {
            sum_row<T, N>(p, frame, patch, out);
            continue;
        }
        for (int64_t at = threadIdx.x % kWarp * N; at < p.width; at += kWarp * N) {
            write(out + at, count == 0 ? Pack<T, N>{} : read<T, N>(p.grad + last * p.width + at));
        }
    }
}

// Every kept frame adds to the one newline: hundreds of terms, so they are summed in double.
template <class T>
__global__ void sum_newlines(ForgetBackwardParams<T> p) {
    __shared__ double sums[kThreads];
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
    double sum = 0;
    for (int64_t i = threadIdx.x / kWarp; i < p.kept_frames && at < p.width; i += kThreads / kWarp) {
        sum += load(p.grad[(i * (p.kept_patches + 1) + p.kept_patches) * p.width + at]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kWarp || at >= p.width) return;
    for (int other = threadIdx.x + kWarp; other < kThreads; other += kWarp) sum += sums[other];
    p.grad_newline[at] = store<T>(static_cast<float>(sum));
}

template <class T, int N>
void keep(const ForgetParams<T>& p, Stream stream) {
    const Grid grid{p.kept_frames * (p.kept_patches + 1)};
    launch(keep_rows<T, N>, grid, threads_for(divide_up(p.width / N, kInFlight)), stream, p);
}

}  // namespace

template <class T>
void forget_cuda(const ForgetParams<T>& p, Stream stream) {
    if (in_vectors<T>({p.tokens, p.newline, p.kept}, {p.width})) {
        keep<T, kVector<T>>(p, stream);
    } else {
        keep<T, 1>(p, stream);
    }
}

template <class T>
void forget_backward_cuda(const ForgetBackwardParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.grad, p.grad_tokens}, {p.width});
    const auto kernel = vectors ? scatter_rows<T, kVector<T>> : scatter_rows<T, 1>;
    launch(kernel, {p.total_frames}, kThreads, stream, p);
    launch(sum_newlines<T>, {divide_up(p.width, kWarp)}, kThreads, stream, p);
}

#define FORGET(T)                                              \
    template void forget_cuda(const ForgetParams<T>&, Stream); \
    template void forget_backward_cuda(const ForgetBackwardParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(FORGET)

}  // namespace hourllava_ext
