// SPDX-License-Identifier: Apache-2.0
// Four taps a pooled cell; the backward gathers the cells that touched a patch, so no two blocks add to one place.
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

// The two patches that a cell reads along one axis.
struct Tap {
    int64_t low, high;
    float high_weight;

    __device__ Tap(int64_t cell, int64_t side, int64_t grid) {
        // Centres of cells on the patch axis, in halves of a cell; those before the first centre read the first patch.
        const int64_t halves = (2 * cell + 1) * side - grid, centre = halves > 0 ? halves : 0;
        low = centre / (2 * grid);
        high = low + 1 < side ? low + 1 : low;
        high_weight = static_cast<float>(centre - low * 2 * grid) / static_cast<float>(2 * grid);
    }
    // How much of a patch is in the cell.
    __device__ float weight_of(int64_t patch) const {
        return (low == patch ? 1 - high_weight : 0) + (high == patch ? high_weight : 0);
    }
};

// Block: cell.
template <class T, int N>
__global__ void pool(PoolGridParams<T> p) {
    const int64_t place = blockIdx.x, cells = p.grid * p.grid;  // in (T, G * G)
    const Tap y(place % cells / p.grid, p.side, p.grid), x(place % p.grid, p.side, p.grid);
    const T* frame = p.patches + place / cells * p.side * p.side * p.width;
    const T* from[4] = {frame + (y.low * p.side + x.low) * p.width, frame + (y.low * p.side + x.high) * p.width,
                        frame + (y.high * p.side + x.low) * p.width, frame + (y.high * p.side + x.high) * p.width};
    const float weight[4] = {(1 - y.high_weight) * (1 - x.high_weight), (1 - y.high_weight) * x.high_weight,
                             y.high_weight * (1 - x.high_weight), y.high_weight * x.high_weight};
    for (int64_t at = threadIdx.x * N; at < p.width; at += blockDim.x * N) {
        Pack<T, N> taps[4], cell;
#pragma unroll
        for (int i = 0; i < 4; ++i) taps[i] = read<T, N>(from[i] + at);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            float sum = weight[0] * load(taps[0].at[e]);
            for (int i = 1; i < 4; ++i) sum += weight[i] * load(taps[i].at[e]);
            cell.at[e] = store<T>(sum);
        }
        write(p.out + place * p.width + at, cell);
    }
}

// A range of cells along one axis that holds all that read a patch.
struct Readers {
    int64_t first, last;

    __device__ Readers(int64_t patch, int64_t side, int64_t grid) {
        const int64_t begin = (2 * patch - 1) * grid - side, end = ((2 * patch + 3) * grid + side) / (2 * side) + 1;
        first = begin > 0 ? begin / (2 * side) : 0;
        last = end < grid ? end : grid;
    }
};

// Block: patch.
template <class T, int N>
__global__ void gather_cells(PoolGridBackwardParams<T> p) {
    const int64_t place = blockIdx.x, patches = p.side * p.side;  // in (T, S * S)
    const int64_t y = place % patches / p.side, x = place % p.side;
    const Readers rows(y, p.side, p.grid), columns(x, p.side, p.grid);
    const T* cells = p.grad + place / patches * p.grid * p.grid * p.width;
    for (int64_t at = threadIdx.x * N; at < p.width; at += blockDim.x * N) {
        float sum[N] = {};
        for (int64_t gy = rows.first; gy < rows.last; ++gy) {
            const float row_weight = Tap(gy, p.side, p.grid).weight_of(y);
            for (int64_t gx = columns.first; gx < columns.last; ++gx) {
                const float weight = row_weight * Tap(gx, p.side, p.grid).weight_of(x);
                if (weight == 0) continue;
                const Pack<T, N> cell = read<T, N>(cells + (gy * p.grid + gx) * p.width + at);
                for (int e = 0; e < N; ++e) sum[e] += weight * load(cell.at[e]);
            }
        }
        Pack<T, N> pack;
        for (int e = 0; e < N; ++e) pack.at[e] = store<T>(sum[e]);
        write(p.grad_patches + place * p.width + at, pack);
    }
}

}  // namespace

template <class T>
void pool_grid_cuda(const PoolGridParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.patches, p.out}, {p.width});
    const auto kernel = vectors ? pool<T, kVector<T>> : pool<T, 1>;
    const int threads = threads_for(vectors ? p.width / kVector<T> : p.width);
    launch(kernel, {p.frames * p.grid * p.grid}, threads, stream, p);
}

template <class T>
void pool_grid_backward_cuda(const PoolGridBackwardParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.grad, p.grad_patches}, {p.width});
    const auto kernel = vectors ? gather_cells<T, kVector<T>> : gather_cells<T, 1>;
    const int threads = threads_for(vectors ? p.width / kVector<T> : p.width);
    launch(kernel, {p.frames * p.side * p.side}, threads, stream, p);
}

#define POOL_GRID(T)                                                \
    template void pool_grid_cuda(const PoolGridParams<T>&, Stream); \
    template void pool_grid_backward_cuda(const PoolGridBackwardParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(POOL_GRID)

}  // namespace hourllava_ext
