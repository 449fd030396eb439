// SPDX-License-Identifier: Apache-2.0
#include "ops/common.h"

namespace hourllava_ext {
namespace {

void check_parts(const char* op, const Tensor& out, const Tensor& lse) {
    check_dim(op, "out", out, 4, "(S, M, H, D)");
    check_shape(op, "lse", lse, {out.size(0), out.size(2), out.size(1)});
    check(lse.scalar_type() == accumulate_dtype(out), op, ": lse must be float32, or float64 for a float64 out");
    check_devices(op, {"out", out}, {{"lse", lse}});
}

std::tuple<Tensor, Tensor> merge_attention(const Tensor& out,  // (S, M, H, D)
                                           const Tensor& lse   // (S, H, M) float32, float64 for float64
) {
    check_parts("merge_attention", out, lse);
    const int64_t parts = out.size(0), tokens = out.size(1), heads = out.size(2), width = out.size(3);
    const Tensor outs = dense(out), lses = dense(lse);
    Tensor merged = allocate(out, {tokens, heads, width});
    Tensor merged_lse = allocate(lse, {heads, tokens});
    dispatch_dtype("merge_attention", "out", out, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const MergeAttentionParams<T> p{
            data<T>(outs), data<A>(lses), mutable_data<T>(merged), mutable_data<A>(merged_lse), parts, tokens,
            heads,         width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(out)) return merge_attention_cuda(p, OnDevice(out));
        }
        merge_attention_cpu(p);
    });
    return {merged, merged_lse};
}

std::tuple<Tensor, Tensor> merge_attention_backward(const Tensor& grad_merged,      // (M, H, D)
                                                    const Tensor& grad_merged_lse,  // (H, M)
                                                    const Tensor& out,              // (S, M, H, D)
                                                    const Tensor& lse               // (S, H, M)
) {
    const char* op = "merge_attention_backward";
    check_parts(op, out, lse);
    const int64_t parts = out.size(0), tokens = out.size(1), heads = out.size(2), width = out.size(3);
    check_shape(op, "grad_merged", grad_merged, {tokens, heads, width});
    check_shape(op, "grad_merged_lse", grad_merged_lse, {heads, tokens});
    check_same_dtype(op, "grad_merged", grad_merged, "out", out);
    check_same_dtype(op, "grad_merged_lse", grad_merged_lse, "lse", lse);
    check_devices(op, {"out", out}, {{"grad_merged", grad_merged}, {"grad_merged_lse", grad_merged_lse}});

    const Tensor grads = dense(grad_merged), lse_grads = dense(grad_merged_lse), outs = dense(out), lses = dense(lse);
    Tensor grad_out = allocate(out, {parts, tokens, heads, width});
    Tensor grad_lse = allocate(lse, {parts, heads, tokens});
    dispatch_dtype(op, "out", out, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const MergeAttentionBackwardParams<T> p{data<T>(grads),
                                                data<A>(lse_grads),
                                                data<T>(outs),
                                                data<A>(lses),
                                                mutable_data<T>(grad_out),
                                                mutable_data<A>(grad_lse),
                                                parts,
                                                tokens,
                                                heads,
                                                width};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(out)) return merge_attention_backward_cuda(p, OnDevice(out));
        }
        merge_attention_backward_cpu(p);
    });
    return {grad_out, grad_lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def("merge_attention(Tensor out, Tensor lse) -> (Tensor, Tensor)");
    m.def(
        "merge_attention_backward(Tensor grad_merged, Tensor grad_merged_lse, Tensor out, Tensor lse)"
        " -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("merge_attention", TORCH_BOX(&merge_attention));
    m.impl("merge_attention_backward", TORCH_BOX(&merge_attention_backward));
}
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) {
    m.impl("merge_attention", TORCH_BOX(&merge_attention));
    m.impl("merge_attention_backward", TORCH_BOX(&merge_attention_backward));
}
#endif

}  // namespace hourllava_ext
