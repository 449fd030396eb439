// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ops/common.h"

namespace hourllava_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> add_norm(const Tensor& x,         // (M, C)
                                            const Tensor& residual,  // (M, C)
                                            const Tensor& weight,    // (C,)
                                            const Tensor& bias,      // (C,)
                                            double eps) {
    check_dim("add_norm", "x", x, 2, "(M, C)");
    const int64_t tokens = x.size(0), width = x.size(1);
    check_shape("add_norm", "residual", residual, {tokens, width});
    check_shape("add_norm", "weight", weight, {width});
    check_shape("add_norm", "bias", bias, {width});
    check_same_dtype("add_norm", "residual", residual, "x", x);
    check_same_dtype("add_norm", "weight", weight, "x", x);
    check_same_dtype("add_norm", "bias", bias, "x", x);
    check_devices("add_norm", {"x", x}, {{"residual", residual}, {"weight", weight}, {"bias", bias}});

    const Tensor rows = dense(x), others = dense(residual), scale = dense(weight), shift = dense(bias);
    Tensor out = allocate(x, {tokens, width});
    Tensor mean = allocate(x, {tokens}, accumulate_dtype(x)), rstd = allocate(x, {tokens}, accumulate_dtype(x));
    dispatch_dtype("add_norm", "x", x, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const AddNormParams<T> p{
            data<T>(rows),         data<T>(others),       data<T>(scale), data<T>(shift), mutable_data<T>(out),
            mutable_data<A>(mean), mutable_data<A>(rstd), tokens,         width,          eps};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(x)) return add_norm_cuda(p, OnDevice(x));
        }
        add_norm_cpu(p);
    });
    return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_norm_backward(const Tensor& grad,      // (M, C)
                                                     const Tensor& x,         // (M, C)
                                                     const Tensor& residual,  // (M, C)
                                                     const Tensor& weight,    // (C,)
                                                     const Tensor& mean,      // (M,)
                                                     const Tensor& rstd       // (M,)
) {
    const char* op = "add_norm_backward";
    check_dim(op, "grad", grad, 2, "(M, C)");
    const int64_t tokens = grad.size(0), width = grad.size(1);
    check_shape(op, "x", x, {tokens, width});
    check_shape(op, "residual", residual, {tokens, width});
    check_shape(op, "weight", weight, {width});
    check_shape(op, "mean", mean, {tokens});
    check_shape(op, "rstd", rstd, {tokens});
    for (const Argument& other : {Argument{"x", x}, Argument{"residual", residual}, Argument{"weight", weight}}) {
        check_same_dtype(op, other.name, other.tensor, "grad", grad);
    }
    for (const Argument& other : {Argument{"mean", mean}, Argument{"rstd", rstd}}) {
        check(other.tensor.scalar_type() == accumulate_dtype(grad), op, ": ", other.name,
              " must be float32, float64 for float64");
    }
    check_devices(op, {"grad", grad},
                  {{"x", x}, {"residual", residual}, {"weight", weight}, {"mean", mean}, {"rstd", rstd}});

    // Neither threads nor the device decide who adds to what: equal shapes give equal bits.
    const int64_t chunk_rows = std::max<int64_t>(8, (tokens + 511) / 512);
    const int64_t chunks = (tokens + chunk_rows - 1) / chunk_rows;
    const Tensor grads = dense(grad), rows = dense(x), others = dense(residual), scale = dense(weight);
    const Tensor means = dense(mean), rstds = dense(rstd);
    Tensor grad_sum = allocate(grad, {tokens, width});
    Tensor grad_weight = allocate(grad, {width}), grad_bias = allocate(grad, {width});
    const Tensor partial = allocate(grad, {chunks, 2, width}, accumulate_dtype(grad));
    dispatch_dtype(op, "grad", grad, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const AddNormBackwardParams<T> p{data<T>(grads),
                                         data<T>(rows),
                                         data<T>(others),
                                         data<T>(scale),
                                         data<A>(means),
                                         data<A>(rstds),
                                         mutable_data<T>(grad_sum),
                                         mutable_data<T>(grad_weight),
                                         mutable_data<T>(grad_bias),
                                         mutable_data<A>(partial),
                                         tokens,
                                         width,
                                         chunks,
                                         chunk_rows};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(grad)) return add_norm_backward_cuda(p, OnDevice(grad));
        }
        add_norm_backward_cpu(p);
    });
    return {grad_sum, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def(
        "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps=1e-05) -> (Tensor, Tensor, "
        "Tensor)");
    m.def(
        "add_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd) -> "
        "(Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("add_norm", TORCH_BOX(&add_norm));
    m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
}
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) {
    m.impl("add_norm", TORCH_BOX(&add_norm));
    m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
}
#endif

}  // namespace hourllava_ext
