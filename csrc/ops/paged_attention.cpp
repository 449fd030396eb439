// SPDX-License-Identifier: Apache-2.0
#include <optional>

#include "ops/common.h"
#include "ops/pages.h"

namespace hourllava_ext {
namespace {

constexpr int64_t kMostDims = 256;

struct Arguments {
    Tensor query;         // (M, Hq, D)
    Tensor key_pages;     // (P, Hkv, S, D)
    Tensor value_pages;   // (P, Hkv, S, D)
    Tensor page_table;    // (B, W) int32
    Tensor page_lengths;  // (P,) int32
    Tensor position_ids;  // (M,) int64
    Tensor cu_seqlens;    // (B + 1,) int64
    Tensor inv_freq;      // (F,) float32
};

void check_shapes(const char* op, const Arguments& a) {
    check_queries(op, a.query, a.position_ids, a.inv_freq);
    check_dim(op, "key_pages", a.key_pages, 4, "(P, Hkv, S, D)");
    check(shape_of(a.key_pages) == shape_of(a.value_pages), op, ": value_pages must have the shape of key_pages, got ",
          shape_of(a.value_pages), " and ", shape_of(a.key_pages));
    check_page_arguments(op, a.page_table, a.page_lengths, a.cu_seqlens, a.key_pages.size(0));
    check_groups(op, a.query.size(1), a.key_pages.size(1));
    const int64_t dims = a.query.size(2);
    check(a.key_pages.size(3) == dims, op, ": query and key_pages must have the same head size, got ", dims, " and ",
          a.key_pages.size(3));
    check(dims % 8 == 0 && dims > 0 && dims <= kMostDims, op, ": the head size must be a multiple of 8 up to ",
          kMostDims, ", got ", dims, "; pad the heads with zeros");
    check_same_dtype(op, "key_pages", a.key_pages, "query", a.query);
    check_same_dtype(op, "value_pages", a.value_pages, "query", a.query);
}

// Checks everything, and returns the arguments in the memory layout of the kernels.
Arguments checked(const char* op, const Arguments& a) {
    check_shapes(op, a);
    const Arguments d{dense(a.query),        dense(a.key_pages),    dense(a.value_pages), dense(a.page_table),
                      dense(a.page_lengths), dense(a.position_ids), dense(a.cu_seqlens),  dense(a.inv_freq)};
    check_page_ranges(op, d.page_table, d.page_lengths, d.key_pages.size(2));
    check_cu_seqlens(op, d.cu_seqlens, d.query.size(0));
    return d;
}

template <class T>
PagedAttentionParams<T> params_of(const Arguments& a, double scale) {
    PagedAttentionParams<T> p{};
    p.query = data<T>(a.query);
    p.key_pages = data<T>(a.key_pages);
    p.value_pages = data<T>(a.value_pages);
    p.page_table = data<int32_t>(a.page_table);
    p.page_lengths = data<int32_t>(a.page_lengths);
    p.position_ids = data<int64_t>(a.position_ids);
    p.cu_seqlens = data<int64_t>(a.cu_seqlens);
    p.inv_freq = data<float>(a.inv_freq);
    p.scale = scale;
    p.tokens = a.query.size(0);
    p.query_heads = a.query.size(1);
    p.head_dim = a.query.size(2);
    p.pages = a.key_pages.size(0);
    p.key_heads = a.key_pages.size(1);
    p.page_size = a.key_pages.size(2);
    p.batch = a.page_table.size(0);
    p.listed = a.page_table.size(1);
    p.frequencies = a.inv_freq.size(0);
    return p;
}

std::tuple<Tensor, Tensor, Tensor> paged_attention(const Tensor& query, const Tensor& key_pages,
                                                   const Tensor& value_pages, const Tensor& page_table,
                                                   const Tensor& page_lengths, const Tensor& position_ids,
                                                   const Tensor& cu_seqlens, const Tensor& inv_freq, double scale,
                                                   std::optional<Tensor> mass_weight) {
    const char* op = "paged_attention";
    const Arguments a =
        checked(op, {query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq});
    const ScalarType wide = accumulate_dtype(query);
    if (mass_weight) {
        check_dim(op, "mass_weight", *mass_weight, 1, "(M,)");
        check(mass_weight->size(0) == query.size(0), op, ": mass_weight must have one entry per query, got ",
              mass_weight->size(0), " for ", query.size(0), " queries");
        check_dtype(op, "mass_weight", *mass_weight, wide, wide == ScalarType::Double ? "float64" : "float32");
        mass_weight = dense(*mass_weight);
    }
    Tensor out = allocate(query, {query.size(0), query.size(1), query.size(2)});
    Tensor lse = allocate(query, {query.size(1), query.size(0)}, wide);
    Tensor mass = allocate(query, {mass_weight ? page_table.size(0) : 0, page_table.size(1)}, wide);
    dispatch_dtype(op, "query", query, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        PagedAttentionParams<T> p = params_of<T>(a, scale);
        p.out = mutable_data<T>(out);
        p.lse = mutable_data<A>(lse);
        if (mass_weight) {
            p.mass_weight = data<A>(*mass_weight);
            p.mass = mutable_data<A>(mass);
        }
        paged_attention_cpu(p);
    });
    return {out, lse, mass};
}

std::tuple<Tensor, Tensor, Tensor> paged_attention_backward(const Tensor& grad_out,  // (M, Hq, D)
                                                            const Tensor& grad_lse,  // (Hq, M)
                                                            const Tensor& query, const Tensor& key_pages,
                                                            const Tensor& value_pages, const Tensor& page_table,
                                                            const Tensor& page_lengths, const Tensor& position_ids,
                                                            const Tensor& cu_seqlens, const Tensor& inv_freq,
                                                            const Tensor& out,  // (M, Hq, D)
                                                            const Tensor& lse,  // (Hq, M)
                                                            double scale) {
    const char* op = "paged_attention_backward";
    const Arguments a =
        checked(op, {query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq});
    check(shape_of(grad_out) == shape_of(query) && shape_of(out) == shape_of(query), op,
          ": grad_out and out must have the shape of query ", shape_of(query));
    check(shape_of(grad_lse) == shape_of(lse) && lse.dim() == 2 && lse.size(0) == query.size(1) &&
              lse.size(1) == query.size(0),
          op, ": grad_lse and lse must be (Hq, M)");
    check_same_dtype(op, "grad_out", grad_out, "query", query);
    check_same_dtype(op, "out", out, "query", query);
    const ScalarType wide = accumulate_dtype(query);
    check(lse.scalar_type() == wide && grad_lse.scalar_type() == wide, op,
          ": grad_lse and lse must be float32 (float64 for float64)");
    const Tensor rows = dense(out), sums = dense(lse), grad_rows = dense(grad_out), grad_sums = dense(grad_lse);
    const auto& shape = a.key_pages;
    Tensor grad_query = allocate(query, {query.size(0), query.size(1), query.size(2)});
    Tensor grad_keys = allocate(key_pages, {shape.size(0), shape.size(1), shape.size(2), shape.size(3)});
    Tensor grad_values = allocate(key_pages, {shape.size(0), shape.size(1), shape.size(2), shape.size(3)});
    dispatch_dtype(op, "query", query, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        PagedAttentionBackwardParams<T> b{};
        b.forward = params_of<T>(a, scale);
        // Read only: the struct is the forward's, which wrote them.
        b.forward.out = const_cast<T*>(data<T>(rows));
        b.forward.lse = const_cast<A*>(data<A>(sums));
        b.grad_out = data<T>(grad_rows);
        b.grad_lse = data<A>(grad_sums);
        b.grad_query = mutable_data<T>(grad_query);
        b.grad_key_pages = mutable_data<T>(grad_keys);
        b.grad_value_pages = mutable_data<T>(grad_values);
        paged_attention_backward_cpu(b);
    });
    return {grad_query, grad_keys, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def(
        "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor page_lengths, "
        "Tensor position_ids, Tensor cu_seqlens, Tensor inv_freq, float scale, Tensor? mass_weight=None) "
        "-> (Tensor, Tensor, Tensor)");
    m.def(
        "paged_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key_pages, "
        "Tensor value_pages, Tensor page_table, Tensor page_lengths, Tensor position_ids, Tensor cu_seqlens, "
        "Tensor inv_freq, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("paged_attention", TORCH_BOX(&paged_attention));
    m.impl("paged_attention_backward", TORCH_BOX(&paged_attention_backward));
}

}  // namespace hourllava_ext
