// SPDX-License-Identifier: Apache-2.0
#include "ops/common.h"

namespace hourllava_ext {
namespace {

// Rows that come in, and where they go.
struct Rows {
    Tensor key;           // (M, Hkv, D)
    Tensor value;         // (M, Hkv, D)
    Tensor position_ids;  // (M,) int64
    Tensor slots;         // (M,) int64
    Tensor inv_freq;      // (F,) float32
};

struct Pools {
    Tensor key_pages;     // (P, Hkv, S, D)
    Tensor value_pages;   // (P, Hkv, S, D)
    Tensor key_summary;   // (P, Hkv, 3, D) float32 (float64 for float64)
    Tensor page_lengths;  // (P,) int32
};

void check_places(const char* op, const Tensor& position_ids, const Tensor& slots, const Tensor& inv_freq,
                  int64_t width) {
    check_dim(op, "position_ids", position_ids, 1, "(M,)");
    check_dim(op, "slots", slots, 1, "(M,)");
    check_dim(op, "inv_freq", inv_freq, 1, "(F,)");
    check_int64(op, "position_ids", position_ids);
    check_int64(op, "slots", slots);
    check_float32(op, "inv_freq", inv_freq);
    check(position_ids.size(0) == slots.size(0), op, ": slots must have one entry per token, got ", slots.size(0),
          " for ", position_ids.size(0), " tokens");
    check(2 * inv_freq.size(0) <= width, op, ": inv_freq rotates 2 * ", inv_freq.size(0), " dims, but a head has ",
          width);
}

void check_rows(const char* op, const Rows& r) {
    check_devices(op, {"key", r.key},
                  {{"value", r.value}, {"position_ids", r.position_ids}, {"slots", r.slots}, {"inv_freq", r.inv_freq}});
    check_dim(op, "key", r.key, 3, "(M, Hkv, D)");
    check(shape_of(r.key) == shape_of(r.value), op, ": value must have the shape of key, got ", shape_of(r.value),
          " and ", shape_of(r.key));
    check_same_dtype(op, "value", r.value, "key", r.key);
    check_places(op, r.position_ids, r.slots, r.inv_freq, r.key.size(2));
    check(r.position_ids.size(0) == r.key.size(0), op, ": position_ids must have one entry per token, got ",
          r.position_ids.size(0), " for ", r.key.size(0), " tokens");
}

// The pages that tokens go to, in the order of their first token, and the token that each of their rows gets, -1 for
// none.
struct Places {
    std::vector<int64_t> touched, incoming;
};

// Of a dense tensor. Two tokens in one row would leave the winner to chance; on a GPU the host would have to wait to
// know, and the places are found there.
Places checked_places(const char* op, const Tensor& slots, int64_t pages, int64_t page_size) {
    Places places;
    if (on_gpu(slots)) return places;
    const int64_t* slot = data<int64_t>(slots);
    std::vector<int64_t> rows_of(pages, -1);  // where a touched page's rows begin
    for (int64_t m = 0; m < slots.size(0); ++m) {
        check(slot[m] >= 0 && slot[m] < pages * page_size, op, ": slots[", m, "] is ", slot[m], ", but ", pages,
              " pages of ", page_size, " rows have slots 0 to ", pages * page_size - 1);
        const int64_t page = slot[m] / page_size;
        if (rows_of[page] < 0) {
            rows_of[page] = places.incoming.size();
            places.touched.push_back(page);
            places.incoming.resize(places.incoming.size() + page_size, -1);
        }
        int64_t& token = places.incoming[rows_of[page] + slot[m] - page * page_size];
        check(token < 0, op, ": slots[", m, "] is ", slot[m], " for a second time; give each token its own row");
        token = m;
    }
    return places;
}

// Raises the lengths of the pages that get rows.
void extend_pages(const Places& places, int64_t page_size, int32_t* page_lengths) {
    for (size_t i = 0; i < places.touched.size(); ++i) {
        int64_t row = page_size;
        while (places.incoming[i * page_size + row - 1] < 0) --row;
        int32_t& length = page_lengths[places.touched[i]];
        length = std::max(length, static_cast<int32_t>(row));
    }
}

Tensor last_dim_dense(const Tensor& rows) { return rows.stride(2) == 1 ? rows : dense(rows); }

// The one writer behind both variants; everything has been checked but the slots.
void write(const char* op, const Rows& r, const Pools& pools) {
    const int64_t pages = pools.key_pages.size(0), page_size = pools.key_pages.size(2);
    const Tensor slots = dense(r.slots), positions = dense(r.position_ids), frequencies = dense(r.inv_freq);
    const Places places = checked_places(op, slots, pages, page_size);
    const Tensor key = last_dim_dense(r.key), value = last_dim_dense(r.value);
    dispatch_dtype(op, "key", key, [&](auto type) {
        using T = decltype(type);
        PageWriteParams<T> p{};
        p.key = data<T>(key);
        p.value = data<T>(value);
        p.position_ids = data<int64_t>(positions);
        p.slots = data<int64_t>(slots);
        p.inv_freq = data<float>(frequencies);
        p.touched = places.touched.data();
        p.incoming = places.incoming.data();
        p.key_pages = mutable_data<T>(pools.key_pages);
        p.value_pages = mutable_data<T>(pools.value_pages);
        p.key_summary = mutable_data<accumulate_t<T>>(pools.key_summary);
        p.page_lengths = mutable_data<int32_t>(pools.page_lengths);
        p.tokens = key.size(0);
        p.pages = pages;
        p.heads = key.size(1);
        p.width = key.size(2);
        p.page_size = page_size;
        p.frequencies = frequencies.size(0);
        p.touched_pages = places.touched.size();
        p.key_token_stride = key.stride(0), p.key_head_stride = key.stride(1);
        p.value_token_stride = value.stride(0), p.value_head_stride = value.stride(1);
        if constexpr (kHasCuda<T>) {
            if (on_gpu(key)) {
                const int64_t entries = page_write_cuda_scratch(p.tokens, pages, page_size);
                const Tensor scratch = allocate(key, {entries}, ScalarType::Long);
                return page_write_cuda(p, mutable_data<int64_t>(scratch), OnDevice(key));
            }
        }
        extend_pages(places, page_size, p.page_lengths);
        page_write_cpu(p);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> page_write(const Tensor& key, const Tensor& value,
                                                      const Tensor& position_ids, const Tensor& slots,
                                                      const Tensor& inv_freq, int64_t num_pages, int64_t page_size) {
    const char* op = "page_write";
    const Rows rows{key, value, position_ids, slots, inv_freq};
    check_rows(op, rows);
    check(num_pages >= 0 && page_size > 0, op, ": num_pages must be at least 0 and page_size at least 1, got ",
          num_pages, " and ", page_size);
    const int64_t heads = key.size(1), width = key.size(2);
    const Pools pools{allocate(key, {num_pages, heads, page_size, width}),
                      allocate(key, {num_pages, heads, page_size, width}),
                      allocate(key, {num_pages, heads, 3, width}, accumulate_dtype(key)),
                      allocate(key, {num_pages}, ScalarType::Int)};
    for (Tensor pool : {pools.key_pages, pools.value_pages, pools.key_summary, pools.page_lengths}) {
        torch::stable::zero_(pool);
    }
    write(op, rows, pools);
    return {pools.key_pages, pools.value_pages, pools.key_summary, pools.page_lengths};
}

void check_pools(const char* op, const Rows& r, const Pools& pools) {
    check_dim(op, "key_pages", pools.key_pages, 4, "(P, Hkv, S, D)");
    check(shape_of(pools.key_pages) == shape_of(pools.value_pages), op,
          ": value_pages must have the shape of key_pages, got ", shape_of(pools.value_pages), " and ",
          shape_of(pools.key_pages));
    const int64_t pages = pools.key_pages.size(0), heads = r.key.size(1), width = r.key.size(2);
    check(pools.key_pages.size(1) == heads && pools.key_pages.size(3) == width, op,
          ": key_pages must have the heads and the head size of key, got ", shape_of(pools.key_pages), " and ",
          shape_of(r.key));
    check_dim(op, "key_summary", pools.key_summary, 4, "(P, Hkv, 3, D)");
    check(pools.key_summary.size(0) == pages && pools.key_summary.size(1) == heads && pools.key_summary.size(2) == 3 &&
              pools.key_summary.size(3) == width,
          op, ": key_summary must be (P, Hkv, 3, D) for the pages, got ", shape_of(pools.key_summary));
    check_dim(op, "page_lengths", pools.page_lengths, 1, "(P,)");
    check(pools.page_lengths.size(0) == pages, op, ": page_lengths must have one entry per page, got ",
          pools.page_lengths.size(0), " for ", pages, " pages");
    check_same_dtype(op, "key_pages", pools.key_pages, "key", r.key);
    check_same_dtype(op, "value_pages", pools.value_pages, "key", r.key);
    check_int32(op, "page_lengths", pools.page_lengths);
    const ScalarType wide = accumulate_dtype(r.key);
    check_dtype(op, "key_summary", pools.key_summary, wide, wide == ScalarType::Double ? "float64" : "float32");
    check_devices(op, {"key", r.key},
                  {{"key_pages", pools.key_pages},
                   {"value_pages", pools.value_pages},
                   {"key_summary", pools.key_summary},
                   {"page_lengths", pools.page_lengths}});
    for (const Tensor& pool : {pools.key_pages, pools.value_pages, pools.key_summary, pools.page_lengths}) {
        check(pool.is_contiguous(), op, ": pools are written in place and must be contiguous");
    }
}

void page_write_(const Tensor& key, const Tensor& value, const Tensor& position_ids, const Tensor& slots,
                 const Tensor& inv_freq, Tensor key_pages, Tensor value_pages, Tensor key_summary,
                 Tensor page_lengths) {
    const char* op = "page_write_";
    const Rows rows{key, value, position_ids, slots, inv_freq};
    const Pools pools{key_pages, value_pages, key_summary, page_lengths};
    check_rows(op, rows);
    check_pools(op, rows, pools);
    write(op, rows, pools);
}

std::tuple<Tensor, Tensor> page_write_backward(const Tensor& grad_key_pages,    // (P, Hkv, S, D)
                                               const Tensor& grad_value_pages,  // (P, Hkv, S, D)
                                               const Tensor& position_ids, const Tensor& slots,
                                               const Tensor& inv_freq) {
    const char* op = "page_write_backward";
    check_dim(op, "grad_key_pages", grad_key_pages, 4, "(P, Hkv, S, D)");
    check(shape_of(grad_key_pages) == shape_of(grad_value_pages), op,
          ": grad_value_pages must have the shape of grad_key_pages");
    check_same_dtype(op, "grad_value_pages", grad_value_pages, "grad_key_pages", grad_key_pages);
    const int64_t heads = grad_key_pages.size(1), page_size = grad_key_pages.size(2), width = grad_key_pages.size(3);
    check_places(op, position_ids, slots, inv_freq, width);
    check_devices(op, {"grad_key_pages", grad_key_pages},
                  {{"grad_value_pages", grad_value_pages},
                   {"position_ids", position_ids},
                   {"slots", slots},
                   {"inv_freq", inv_freq}});
    const Tensor places = dense(slots), positions = dense(position_ids), frequencies = dense(inv_freq);
    checked_places(op, places, grad_key_pages.size(0), page_size);
    const Tensor keys = dense(grad_key_pages), values = dense(grad_value_pages);
    Tensor grad_key = allocate(keys, {slots.size(0), heads, width});
    Tensor grad_value = allocate(keys, {slots.size(0), heads, width});
    dispatch_dtype(op, "grad_key_pages", keys, [&](auto type) {
        using T = decltype(type);
        const PageWriteBackwardParams<T> p{data<T>(keys),
                                           data<T>(values),
                                           data<int64_t>(positions),
                                           data<int64_t>(places),
                                           data<float>(frequencies),
                                           mutable_data<T>(grad_key),
                                           mutable_data<T>(grad_value),
                                           slots.size(0),
                                           heads,
                                           width,
                                           page_size,
                                           frequencies.size(0)};
        if constexpr (kHasCuda<T>) {
            if (on_gpu(keys)) return page_write_backward_cuda(p, OnDevice(keys));
        }
        page_write_backward_cpu(p);
    });
    return {grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hourllava_ext, m) {
    m.def(
        "page_write(Tensor key, Tensor value, Tensor position_ids, Tensor slots, Tensor inv_freq, SymInt num_pages, "
        "int page_size=128) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "page_write_(Tensor key, Tensor value, Tensor position_ids, Tensor slots, Tensor inv_freq, "
        "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!) key_summary, Tensor(d!) page_lengths) -> ()");
    m.def(
        "page_write_backward(Tensor grad_key_pages, Tensor grad_value_pages, Tensor position_ids, Tensor slots, "
        "Tensor inv_freq) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CPU, m) {
    m.impl("page_write", TORCH_BOX(&page_write));
    m.impl("page_write_", TORCH_BOX(&page_write_));
    m.impl("page_write_backward", TORCH_BOX(&page_write_backward));
}
#ifdef HOURLLAVA_EXT_CUDA
STABLE_TORCH_LIBRARY_IMPL(hourllava_ext, CUDA, m) {
    m.impl("page_write", TORCH_BOX(&page_write));
    m.impl("page_write_", TORCH_BOX(&page_write_));
    m.impl("page_write_backward", TORCH_BOX(&page_write_backward));
}
#endif

}  // namespace hourllava_ext
