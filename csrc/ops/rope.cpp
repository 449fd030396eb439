// SPDX-License-Identifier: Apache-2.0
#include "ops/common.h"

namespace hourllava_ext {
namespace {

Tensor rope(const Tensor& x,             // (M, H, D)
            const Tensor& position_ids,  // (M,) int64
            const Tensor& inv_freq,      // (F,) float32
            bool inverse) {
    check_dim("rope", "x", x, 3, "(M, H, D)");
    check_dim("rope", "position_ids", position_ids, 1, "(M,)");
    check_dim("rope", "inv_freq", inv_freq, 1, "(F,)");
    check_int64("rope", "position_ids", position_ids);
    check_float32("rope", "inv_freq", inv_freq);
    check_devices("rope", {"x", x}, {{"position_ids", position_ids}, {"inv_freq", inv_freq}});
    check(position_ids.size(0) == x.size(0), "rope: position_ids must have one entry per token, got ",
          position_ids.size(0), " for ", x.size(0), " tokens");
    check(2 * inv_freq.size(0) <= x.size(2), "rope: inv_freq rotates 2 * ", inv_freq.size(0),
          " dims, but a head of x has ", x.size(2));

    const Tensor rows = x.stride(2) == 1 ? x : dense(x);
    const Tensor positions = dense(position_ids), frequencies = dense(inv_freq);
    Tensor out = allocate(x, {x.size(0), x.size(1), x.size(2)});
    dispatch_dtype("rope", "x", x, [&](auto type) {
        using T = decltype(type);
        const RopeParams<T> p{data<T>(rows),
                              data<int64_t>(positions),
                              data<float>(frequencies),
                              mutable_data<T>(out),
                              x.size(0),
                              x.size(1),
                              x.size(2),
                              inv_freq.size(0),
                              rows.stride(0),
                              rows.stride(1),
                              inverse};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(x)) return rope_cuda(p, OnDevice(x));
        }
        rope_cpu(p);
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def("rope(Tensor x, Tensor position_ids, Tensor inv_freq, bool inverse=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) { m.impl("rope", TORCH_BOX(&rope)); }
#endif

}  // namespace hourllava_ext
