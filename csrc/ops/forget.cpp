// SPDX-License-Identifier: Apache-2.0
#include "ops/common.h"

namespace hourllava_ext {
namespace {

// Indices in memory order, checked against the tokens they pick: a kernel never reads out of bounds.
struct Picks {
    Tensor frames, patches;
};

Picks checked_picks(const char* op, const Tensor& frames, const Tensor& patches, int64_t total, int64_t per_frame) {
    check_dim(op, "frames", frames, 1, "(n,)");
    check_dim(op, "patches", patches, 2, "(n, k)");
    check_int64(op, "frames", frames);
    check_int64(op, "patches", patches);
    check(patches.size(0) == frames.size(0), op, ": patches must have one row per kept frame, got ", patches.size(0),
          " for ", frames.size(0), " frames");
    Picks picks{dense(frames), dense(patches)};
    check_range(op, "frames", picks.frames, total);
    check_range(op, "patches", picks.patches, per_frame);
    return picks;
}

std::tuple<Tensor, Tensor> forget(const Tensor& tokens,   // (T, N, C)
                                  const Tensor& frames,   // (n,) int64
                                  const Tensor& patches,  // (n, k) int64
                                  const Tensor& newline   // (C,)
) {
    check_dim("forget", "tokens", tokens, 3, "(T, N, C)");
    check_dim("forget", "newline", newline, 1, "(C,)");
    check_same_dtype("forget", "newline", newline, "tokens", tokens);
    check_devices("forget", {"tokens", tokens}, {{"frames", frames}, {"patches", patches}, {"newline", newline}});
    const int64_t per_frame = tokens.size(1), width = tokens.size(2);
    check(newline.size(0) == width, "forget: newline must be as wide as a token, got ", newline.size(0), " for ",
          width);
    const Picks picks = checked_picks("forget", frames, patches, tokens.size(0), per_frame);

    const int64_t n = frames.size(0), k = patches.size(1);
    const Tensor source = dense(tokens), last = dense(newline);
    Tensor kept = allocate(tokens, {n, k + 1, width});
    Tensor position_ids = allocate(frames, {n, k + 1});
    dispatch_dtype("forget", "tokens", tokens, [&](auto type) {
        using T = decltype(type);
        const ForgetParams<T> p{data<T>(source),
                                data<int64_t>(picks.frames),
                                data<int64_t>(picks.patches),
                                data<T>(last),
                                mutable_data<T>(kept),
                                mutable_data<int64_t>(position_ids),
                                n,
                                k,
                                per_frame,
                                width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(tokens)) return forget_cuda(p, OnDevice(tokens));
        }
        forget_cpu(p);
    });
    return {kept, position_ids};
}

std::tuple<Tensor, Tensor> forget_backward(const Tensor& grad,     // (n, k + 1, C)
                                           const Tensor& frames,   // (n,) int64
                                           const Tensor& patches,  // (n, k) int64
                                           int64_t total,          // T
                                           int64_t per_frame       // N
) {
    check_devices("forget_backward", {"grad", grad}, {{"frames", frames}, {"patches", patches}});
    const Picks picks = checked_picks("forget_backward", frames, patches, total, per_frame);
    const int64_t n = frames.size(0), k = patches.size(1);
    check_shape("forget_backward", "grad", grad, {n, k + 1, -1});
    const int64_t width = grad.size(2);

    const Tensor source = dense(grad);
    Tensor grad_tokens = allocate(grad, {total, per_frame, width});
    Tensor grad_newline = allocate(grad, {width});
    dispatch_dtype("forget_backward", "grad", grad, [&](auto type) {
        using T = decltype(type);
        const ForgetBackwardParams<T> p{data<T>(source),
                                        data<int64_t>(picks.frames),
                                        data<int64_t>(picks.patches),
                                        mutable_data<T>(grad_tokens),
                                        mutable_data<T>(grad_newline),
                                        total,
                                        n,
                                        k,
                                        per_frame,
                                        width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(grad)) return forget_backward_cuda(p, OnDevice(grad));
        }
        forget_backward_cpu(p);
    });
    return {grad_tokens, grad_newline};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def("forget(Tensor tokens, Tensor frames, Tensor patches, Tensor newline) -> (Tensor, Tensor)");
    m.def(
        "forget_backward(Tensor grad, Tensor frames, Tensor patches, SymInt total, SymInt per_frame) -> (Tensor, "
        "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("forget", TORCH_BOX(&forget));
    m.impl("forget_backward", TORCH_BOX(&forget_backward));
}
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) {
    m.impl("forget", TORCH_BOX(&forget));
    m.impl("forget_backward", TORCH_BOX(&forget_backward));
}
#endif

}  // namespace hourllava_ext
