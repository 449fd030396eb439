// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <optional>

#include "ops/common.h"
#include "ops/pages.h"

namespace hourllava_ext {
namespace {

void check_retrieve(const char* op, const Tensor& query, const Tensor& key_summary, const std::optional<Tensor>& keep) {
    check_dim(op, "key_summary", key_summary, 4, "(P, Hkv, 3, D)");
    check(key_summary.size(2) == 3 && key_summary.size(3) == query.size(2), op,
          ": key_summary must be (P, Hkv, 3, D) with the head size of query, got ", shape_of(key_summary), " for ",
          query.size(2), " dims");
    check_groups(op, query.size(1), key_summary.size(1));
    const ScalarType wide = accumulate_dtype(query);
    check_dtype(op, "key_summary", key_summary, wide, wide == ScalarType::Double ? "float64" : "float32");
    if (!keep) return;
    check_dim(op, "keep", *keep, 1, "(P,)");
    check_dtype(op, "keep", *keep, ScalarType::Bool, "bool");
    check(keep->size(0) == key_summary.size(0), op, ": keep must have one entry per page, got ", keep->size(0), " for ",
          key_summary.size(0), " pages");
}

Tensor retrieve(const Tensor& query,         // (M, Hq, D)
                const Tensor& position_ids,  // (M,) int64
                const Tensor& cu_seqlens,    // (B + 1,) int64
                const Tensor& inv_freq,      // (F,) float32
                const Tensor& key_summary,   // (P, Hkv, 3, D)
                const Tensor& page_table,    // (B, W) int32
                const Tensor& page_lengths,  // (P,) int32
                int64_t budget,
                std::optional<Tensor> keep,  // (P,) bool
                std::string mode) {
    const char* op = "retrieve";
    check_queries(op, query, position_ids, inv_freq);
    check_retrieve(op, query, key_summary, keep);
    check_page_arguments(op, page_table, page_lengths, cu_seqlens, key_summary.size(0));
    check(budget >= 1, op, ": budget must be at least 1 page, got ", budget);
    check(mode == "both" || mode == "rotated" || mode == "content", op,
          ": mode must be \"both\", \"rotated\" or \"content\", got \"", mode, "\"");
    const Tensor table = dense(page_table), lengths = dense(page_lengths), begins = dense(cu_seqlens);
    check_devices(op, {"query", query},
                  {{"position_ids", position_ids},
                   {"cu_seqlens", cu_seqlens},
                   {"inv_freq", inv_freq},
                   {"key_summary", key_summary},
                   {"page_table", page_table},
                   {"page_lengths", page_lengths}});
    if (keep) check_devices(op, {"query", query}, {{"keep", *keep}});
    check_page_ranges(op, table, lengths, std::numeric_limits<int32_t>::max());
    check_cu_seqlens(op, begins, query.size(0));

    const Tensor rows = dense(query), positions = dense(position_ids), frequencies = dense(inv_freq);
    const Tensor summary = dense(key_summary);
    if (keep) keep = dense(*keep);
    const int64_t rotated = 2 * inv_freq.size(0), kept = std::min(budget, table.size(1));
    Tensor shorter = allocate(table, {table.size(0), kept});
    dispatch_dtype(op, "query", query, [&](auto type) {
        using T = decltype(type);
        RetrieveParams<T> p{};
        p.query = data<T>(rows);
        p.position_ids = data<int64_t>(positions);
        p.cu_seqlens = data<int64_t>(begins);
        p.inv_freq = data<float>(frequencies);
        p.key_summary = data<accumulate_t<T>>(summary);
        p.page_table = data<int32_t>(table);
        p.page_lengths = data<int32_t>(lengths);
        p.keep = keep ? data<bool>(*keep) : nullptr;
        p.shorter = mutable_data<int32_t>(shorter);
        p.tokens = query.size(0), p.query_heads = query.size(1), p.head_dim = query.size(2);
        p.key_heads = summary.size(1), p.pages = summary.size(0);
        p.batch = table.size(0), p.listed = table.size(1), p.kept = kept;
        p.frequencies = frequencies.size(0);
        p.first_dim = mode == "content" ? rotated : 0;
        p.last_dim = mode == "rotated" ? rotated : query.size(2);
        if constexpr (kHasCuda<T>) {
            if (on_gpu(query)) {
                const Tensor scratch = allocate(query, {retrieve_cuda_scratch(p)}, ScalarType::Byte);
                return retrieve_cuda(p, mutable_data<uint8_t>(scratch), OnDevice(query));
            }
        }
        retrieve_cpu(p);
    });
    return shorter;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def(
        "retrieve(Tensor query, Tensor position_ids, Tensor cu_seqlens, Tensor inv_freq, Tensor key_summary, "
        "Tensor page_table, Tensor page_lengths, SymInt budget, Tensor? keep=None, str mode=\"both\") -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) { m.impl("retrieve", TORCH_BOX(&retrieve)); }
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) { m.impl("retrieve", TORCH_BOX(&retrieve)); }
#endif

}  // namespace hourllava_ext
