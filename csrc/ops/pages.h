// SPDX-License-Identifier: Apache-2.0
// Shared by the operators on pages: shapes, and on the CPU the ranges of what indexes memory; on a GPU
// the host would have to wait to know them.
#pragma once

#include "ops/common.h"

namespace hourllava_ext {

// page_table (B, W) and page_lengths (P,), both int32; cu_seqlens (B + 1,) int64.
inline void check_page_arguments(const char* op, const Tensor& page_table, const Tensor& page_lengths,
                                 const Tensor& cu_seqlens, int64_t pages) {
    check_dim(op, "page_table", page_table, 2, "(B, W)");
    check_dim(op, "page_lengths", page_lengths, 1, "(P,)");
    check_dim(op, "cu_seqlens", cu_seqlens, 1, "(B + 1,)");
    check_int32(op, "page_table", page_table);
    check_int32(op, "page_lengths", page_lengths);
    check_int64(op, "cu_seqlens", cu_seqlens);
    check(page_lengths.size(0) == pages, op, ": page_lengths must have one entry per page, got ", page_lengths.size(0),
          " for ", pages, " pages");
    check(cu_seqlens.size(0) == page_table.size(0) + 1, op,
          ": cu_seqlens must have one entry more than page_table has ", "rows, got ", cu_seqlens.size(0), " for ",
          page_table.size(0), " rows");
}

// queries (M, Hq, D) with their positions and rotation, packed sample after sample.
inline void check_queries(const char* op, const Tensor& query, const Tensor& position_ids, const Tensor& inv_freq) {
    check_dim(op, "query", query, 3, "(M, Hq, D)");
    check_dim(op, "position_ids", position_ids, 1, "(M,)");
    check_dim(op, "inv_freq", inv_freq, 1, "(F,)");
    check_int64(op, "position_ids", position_ids);
    check_float32(op, "inv_freq", inv_freq);
    check(position_ids.size(0) == query.size(0), op, ": position_ids must have one entry per query, got ",
          position_ids.size(0), " for ", query.size(0), " queries");
    check(2 * inv_freq.size(0) <= query.size(2), op, ": inv_freq rotates 2 * ", inv_freq.size(0),
          " dims, but a head of query has ", query.size(2));
}

inline void check_groups(const char* op, int64_t query_heads, int64_t key_heads) {
    check(key_heads > 0 && query_heads > 0 && query_heads % key_heads == 0, op,
          ": query heads must be a multiple of key heads, got ", query_heads, " and ", key_heads);
}

inline void check_page_length(const char* op, int64_t page, int32_t length, int64_t page_size) {
    check(length >= 0, op, ": page_lengths[", page, "] is ", length, ", but an empty page has 0 rows");
    check(length <= page_size, op, ": page_lengths[", page, "] is ", length, ", but a page has ", page_size, " rows");
}

// The arguments are dense from here on.
inline void check_page_ranges(const char* op, const Tensor& page_table, const Tensor& page_lengths, int64_t page_size) {
    if (on_gpu(page_table)) return;
    const int64_t pages = page_lengths.size(0), batch = page_table.size(0), listed = page_table.size(1);
    const int32_t* table = data<int32_t>(page_table);
    for (int64_t i = 0; i < batch * listed; ++i) {
        check(table[i] >= -1 && table[i] < pages, op, ": page_table[", i / listed, ", ", i % listed, "] is ", table[i],
              ", but page ids go from 0 to ", pages - 1, " (-1 for a hole)");
    }
    const int32_t* lengths = data<int32_t>(page_lengths);
    for (int64_t i = 0; i < pages; ++i) check_page_length(op, i, lengths[i], page_size);
}

inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
    if (on_gpu(cu_seqlens)) return;
    const int64_t* begin = data<int64_t>(cu_seqlens);
    const int64_t batch = cu_seqlens.size(0) - 1;
    check(begin[0] == 0 && begin[batch] == tokens, op, ": cu_seqlens must go from 0 to the number of queries ", tokens,
          ", got ", begin[0], " to ", begin[batch]);
    for (int64_t b = 0; b < batch; ++b) {
        check(begin[b] <= begin[b + 1], op, ": cu_seqlens must not decrease, got ", begin[b], " then ", begin[b + 1]);
    }
}

}  // namespace hourllava_ext
