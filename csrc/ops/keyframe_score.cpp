// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ops/common.h"

namespace hourllava_ext {
namespace {

Tensor keyframe_score(const Tensor& features,  // (T, C)
                      int64_t window) {
    check_dim("keyframe_score", "features", features, 2, "(T, C)");
    check(window >= 1, "keyframe_score: window must be at least 1 frame, got ", window);

    const Tensor source = dense(features);
    const int64_t frames = features.size(0), width = features.size(1);
    Tensor norms = allocate(features, {frames}, accumulate_dtype(features));
    Tensor score = allocate(features, {frames}, accumulate_dtype(features));
    dispatch_dtype("keyframe_score", "features", features, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const KeyframeScoreParams<T> p{data<T>(source), mutable_data<A>(norms),  mutable_data<A>(score), frames,
                                       width,           std::min(window, frames)};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(features)) return keyframe_score_cuda(p, OnDevice(features));
        }
        keyframe_score_cpu(p);
    });
    return score;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) { m.def("keyframe_score(Tensor features, int window=9) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) { m.impl("keyframe_score", TORCH_BOX(&keyframe_score)); }
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) { m.impl("keyframe_score", TORCH_BOX(&keyframe_score)); }
#endif

}  // namespace hourllava_ext
