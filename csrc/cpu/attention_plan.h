// SPDX-License-Identifier: Apache-2.0
// How attention to a page table is cut into tasks. The heads of a group and the tokens of a sample are packed into
// rows; rows are the lanes of the vectors, in strips of three cache lines. Cut by shape alone, so threads cannot change
// a result.
#pragma once

#include <vector>

#include "cpu/vectors.h"

namespace hourllava_ext {

// Rows whose scores for a page stay in the first cache, and whose sums fill the registers of a tile.
template <class A>
constexpr int64_t kStrip = 3 * kLine<A>;
constexpr int64_t kTileStrips = 4;    // strips of a forward task: what one packing of a page is spread over
constexpr int64_t kBlockKeys = 128;   // keys of a step: a page
constexpr int64_t kEnoughTasks = 64;  // cut further until there are this many

struct Listing {
    int64_t page, column, length;
};

struct Sample {
    int64_t token_begin, tokens;
    int64_t row_begin, rows, padded_rows;  // packed rows; row_begin and padded_rows are multiples of the strip
    int64_t listing_begin, listings;       // non-empty pages of the table, ascending
};

struct RowTile {
    int64_t sample, first, rows;  // rows [first, first + rows) of the sample
};

struct Plan {
    std::vector<Sample> samples;
    std::vector<Listing> listings;
    std::vector<RowTile> tiles;
    int64_t rows = 0;    // packed rows of all samples, with padding
    int64_t strip = 1;   // rows of a strip
    int64_t width = 0;   // head_dim in whole lines
    int64_t group = 1;   // query heads a key head serves
    int64_t splits = 1;  // page ranges per tile

    int64_t row_of(const RowTile& tile) const { return samples[tile.sample].row_begin + tile.first; }
    int64_t token_of(const RowTile& tile, int64_t r) const {
        return samples[tile.sample].token_begin + (tile.first + r) / group;
    }
    int64_t member_of(const RowTile& tile, int64_t r) const { return (tile.first + r) % group; }
};

template <class T>
void plan_sample(const PagedAttentionParams<T>& p, int64_t b, Plan& plan) {
    Sample s{};
    s.token_begin = p.cu_seqlens[b];
    s.tokens = p.cu_seqlens[b + 1] - s.token_begin;
    s.rows = s.tokens * plan.group;
    s.padded_rows = round_up(s.rows, plan.strip);
    s.row_begin = plan.rows;
    s.listing_begin = plan.listings.size();
    for (int64_t column = 0; column < p.listed; ++column) {
        const int64_t page = p.page_table[b * p.listed + column];
        if (page >= 0 && p.page_lengths[page] > 0) plan.listings.push_back({page, column, p.page_lengths[page]});
    }
    s.listings = plan.listings.size() - s.listing_begin;
    // In page order the order of the table cannot change a sum.
    std::stable_sort(plan.listings.begin() + s.listing_begin, plan.listings.end(),
                     [](const Listing& a, const Listing& b) { return a.page < b.page; });
    const int64_t most = kTileStrips * plan.strip;
    for (int64_t first = 0; first < s.rows; first += most) {
        plan.tiles.push_back({b, first, std::min(most, s.rows - first)});
    }
    plan.rows += s.padded_rows;
    plan.samples.push_back(s);
}

template <class T>
Plan make_plan(const PagedAttentionParams<T>& p) {
    using A = accumulate_t<T>;
    Plan plan;
    plan.strip = kStrip<A>;
    plan.width = round_up(p.head_dim, kLine<A>);
    plan.group = p.query_heads / p.key_heads;
    for (int64_t b = 0; b < p.batch; ++b) plan_sample(p, b, plan);
    int64_t longest = 0;
    for (const Sample& s : plan.samples) longest = std::max(longest, s.listings);
    const int64_t tasks = std::max<int64_t>(1, plan.tiles.size() * p.key_heads);
    plan.splits = std::clamp<int64_t>(kEnoughTasks / tasks, 1, std::max<int64_t>(1, longest / 8));
    return plan;
}

}  // namespace hourllava_ext
