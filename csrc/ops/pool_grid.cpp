// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "ops/common.h"

namespace hourllava_ext {
namespace {

int64_t side_of(const char* op, int64_t count) {
    const int64_t side = std::llround(std::sqrt(static_cast<double>(count)));
    check(side >= 1 && side * side == count, op, ": patches must come from a square image, got ", count,
          " a frame; pass (T, S * S, C)");
    return side;
}

Tensor pool_grid(const Tensor& patches,  // (T, S * S, C)
                 int64_t grid) {
    check_dim("pool_grid", "patches", patches, 3, "(T, S * S, C)");
    const int64_t frames = patches.size(0), count = patches.size(1), width = patches.size(2);
    const int64_t side = side_of("pool_grid", count);
    check(grid >= 1, "pool_grid: grid must be at least 1, got ", grid);

    const Tensor source = dense(patches);
    Tensor out = allocate(patches, {frames, grid * grid, width});
    dispatch_dtype("pool_grid", "patches", patches, [&](auto type) {
        using T = decltype(type);
        const PoolGridParams<T> p{data<T>(source), mutable_data<T>(out), frames, side, grid, width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(patches)) return pool_grid_cuda(p, OnDevice(patches));
        }
        pool_grid_cpu(p);
    });
    return out;
}

Tensor pool_grid_backward(const Tensor& grad,  // (T, G * G, C)
                          int64_t grid,
                          int64_t count) {  // S * S
    const int64_t side = side_of("pool_grid_backward", count);
    check(grid >= 1, "pool_grid_backward: grid must be at least 1, got ", grid);
    check_shape("pool_grid_backward", "grad", grad, {-1, grid * grid, -1});
    const int64_t frames = grad.size(0), width = grad.size(2);

    const Tensor source = dense(grad);
    Tensor out = allocate(grad, {frames, count, width});
    dispatch_dtype("pool_grid_backward", "grad", grad, [&](auto type) {
        using T = decltype(type);
        const PoolGridBackwardParams<T> p{data<T>(source), mutable_data<T>(out), frames, side, grid, width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(grad)) return pool_grid_backward_cuda(p, OnDevice(grad));
        }
        pool_grid_backward_cpu(p);
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def("pool_grid(Tensor patches, SymInt grid) -> Tensor");
    m.def("pool_grid_backward(Tensor grad, SymInt grid, SymInt count) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("pool_grid", TORCH_BOX(&pool_grid));
    m.impl("pool_grid_backward", TORCH_BOX(&pool_grid_backward));
}
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) {
    m.impl("pool_grid", TORCH_BOX(&pool_grid));
    m.impl("pool_grid_backward", TORCH_BOX(&pool_grid_backward));
}
#endif

}  // namespace hourllava_ext
