// SPDX-License-Identifier: Apache-2.0
// Flash attention forward: a task holds a tile of rows and walks pages. Everything is transposed, rows being lanes:
//
//   scores^T (keys x rows) = K (keys x D, scalars in place) Q^T (D x rows, packed once a task)
//   out^T    (D x rows)   += V^T (D x keys, scalars) weights^T (keys x rows)
//
// so that keys and values need no transposing, the maxima and sums of the softmax are vertical, and its weights are the
// next product's operand where they lie. For a strip of 48 rows and a page of 128 keys the scores take 24 KB. The scale
// and log2(e) are folded into the exponent; bfloat16 queries stay exact.
#pragma once

#include "cpu/attention_operands.h"

namespace hourllava_ext {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
Scratch<T> rotated_queries(const PagedAttentionParams<T>& p) {
    Scratch<T> turned(p.tokens * p.query_heads * p.head_dim);
    rope_cpu(RopeParams<T>{p.query, p.position_ids, p.inv_freq, turned.get(), p.tokens, p.query_heads, p.head_dim,
                           p.frequencies, p.query_heads * p.head_dim, p.head_dim, false});
    return turned;
}

// The sign of the scale goes to the queries, so that the largest score is the largest exponent.
template <class T, class A = accumulate_t<T>>
A sign_of_scale(const PagedAttentionParams<T>& p) {
    return p.scale < 0 ? -1 : 1;
}
template <class T, class A = accumulate_t<T>>
A exponent_scale(const PagedAttentionParams<T>& p) {
    return static_cast<A>(std::abs(p.scale) * kLog2E);
}

template <class T>
struct Forward {
    using A = accumulate_t<T>;
    const PagedAttentionParams<T>& p;
    Plan plan = make_plan(p);
    Scratch<T> turned = rotated_queries(p);  // (M, Hq, D)
    // Per split, key head and packed row: the unnormalised output as strips of (D, kStrip), the largest exponent, and
    // the sum of weights below it.
    LargeScratch<A> partial{plan.splits * p.key_heads * plan.rows * p.head_dim};
    Scratch<A> largest{plan.splits * p.key_heads * plan.rows};
    Scratch<A> total{plan.splits * p.key_heads * plan.rows};
    // For the page mass. Per key head, sample, listing and row: the largest exponent so far, the page's sum below it.
    std::vector<int64_t> page_begin = page_offsets();
    Scratch<A> page_largest{p.mass ? p.key_heads * page_begin.back() : 0};
    Scratch<A> page_total{p.mass ? p.key_heads * page_begin.back() : 0};

    std::vector<int64_t> page_offsets() const {
        std::vector<int64_t> offsets{0};
        for (const Sample& s : plan.samples) offsets.push_back(offsets.back() + s.listings * s.padded_rows);
        return offsets;
    }
    int64_t row_index(int64_t split, int64_t head, int64_t row) const {
        return (split * p.key_heads + head) * plan.rows + row;
    }
    int64_t page_index(int64_t head, int64_t sample, int64_t listing, int64_t row) const {
        return head * page_begin.back() + page_begin[sample] + listing * plan.samples[sample].padded_rows + row;
    }
    // Whether any of a sample's rows [first, end) weighs anything in the page mass: of a question's, few do.
    bool weighs(const Sample& s, int64_t first, int64_t end) const {
        if (!p.mass) return false;
        const A* weight = p.mass_weight + s.token_begin;
        return std::any_of(weight + first / plan.group, weight + (end - 1) / plan.group + 1,
                           [](A w) { return w != 0; });
    }
};

// A task's rows and what its pages have left of them so far, a strip after the other.
template <class E, class A>
struct TileState {
    const E* query;                                    // per strip (elements(D), kStrip)
    A* out;                                            // per strip (D, kStrip)
    A *largest, *total;                                // (rows,)
    A *page_largest = nullptr, *page_total = nullptr;  // (rows,) of the page at hand; null when no mass is asked for
};

// The rows of the page that comes next, fetched line by line while the scores of this one are at hand.
struct Ahead {
    const char *keys = nullptr, *values = nullptr, *keys_end = nullptr;
    ALWAYS_INLINE void fetch_line() {
        if (keys >= keys_end) return;
        __builtin_prefetch(keys, 0, 2);
        __builtin_prefetch(values, 0, 2);
        keys += 64, values += 64;
    }
};

// Turns scores (count x kStrip) of one strip into weights below the running maximum, in place, and rescales the sums;
// factor (kStrip,) gets what the outputs so far must be multiplied with. Pairs of keys become pairs of weights.
template <class Tile, class E, class A>
ALWAYS_INLINE void soften(A* scores, int64_t count, A scale, A* largest, A* total, A* page_total, A* factor,
                          Ahead& ahead) {
    using V = vector_t<Tile, A>;
    constexpr int64_t R = kStrip<A>;
    for (int64_t lane = 0; lane < R; lane += kLanes<Tile, A>) {
        A* column = scores + lane;
        V most = load_vector<Tile>(column);
        for (int64_t k = 1; k < count; ++k) {
            const V s = load_vector<Tile>(column + k * R);
            most = s > most ? s : most;
        }
        const V before = load_vector<Tile>(largest + lane), now = most * scale;
        const V highest = now > before ? now : before;
        // Minus infinity from itself would be NaN: such scores weigh nothing, also where no other came before.
        const V shift = highest == -std::numeric_limits<A>::infinity() ? V{} : highest;
        const V rescale = exp2_vector(before - shift);
        V even{}, odd{};
        for (int64_t k = 0; k < count; k += 2) {
            ahead.fetch_line();
            const V first = exp2_vector(load_vector<Tile>(column + k * R) * scale - shift);
            V second{};
            if (k + 1 < count) second = exp2_vector(load_vector<Tile>(column + (k + 1) * R) * scale - shift);
            even += first, odd += second;
            if constexpr (std::is_same_v<E, Pair>) {
                store_vector(reinterpret_cast<Pair*>(scores) + k / 2 * R + lane, round_to_pairs(first, second));
            } else {
                store_vector(column + k * R, first);
                if (k + 1 < count) store_vector(column + (k + 1) * R, second);
            }
        }
        store_vector(largest + lane, highest);
        store_vector(factor + lane, rescale);
        store_vector(total + lane, load_vector<Tile>(total + lane) * rescale + (even + odd));
        if (page_total) store_vector(page_total + lane, load_vector<Tile>(page_total + lane) * rescale + (even + odd));
    }
}

template <class Tile, class T>
struct ForwardSpace {
    using A = accumulate_t<T>;
    using E = operand_t<Tile, T>;
    Scratch<E> query, keys, values, rows;
    Scratch<A> scores{kBlockKeys * kStrip<A>}, factor{kStrip<A>};
    ForwardSpace(int64_t width, int64_t strips)
        : query(strips * kStrip<A> * width),
          keys(kBlockKeys * width),
          values(kBlockKeys * width),
          rows(kStrip<A> * width) {}
};

template <class T>
Ahead ahead_of(const PagedAttentionParams<T>& p, const Listing& next, int64_t head) {
    const int64_t at = (next.page * p.key_heads + head) * p.page_size * p.head_dim, count = next.length * p.head_dim;
    return {reinterpret_cast<const char*>(p.key_pages + at), reinterpret_cast<const char*>(p.value_pages + at),
            reinterpret_cast<const char*>(p.key_pages + at + count)};
}

// All strips of a task against one page of one key head.
template <class Tile, class T>
ALWAYS_INLINE void attend_page(const Forward<T>& f, const ForwardSpace<Tile, T>& space,
                               const TileState<operand_t<Tile, T>, accumulate_t<T>>& state, int64_t strips,
                               int64_t head, const Listing& listing, Ahead ahead) {
    using A = accumulate_t<T>;
    using E = operand_t<Tile, T>;
    constexpr int64_t R = kStrip<A>;
    const PagedAttentionParams<T>& p = f.p;
    const int64_t offset = (listing.page * p.key_heads + head) * p.page_size, dims = p.head_dim;
    const A scale = exponent_scale(p);
    for (int64_t begin = 0; begin < listing.length; begin += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, listing.length - begin), at = (offset + begin) * dims;
        const Matrix<const E> keys = PageRows<Tile, T>{p.key_pages + at, count, dims, space.keys.get()}.along_dims();
        const Matrix<const E> values =
            PageRows<Tile, T>{p.value_pages + at, count, dims, space.values.get()}.along_keys();
        A* scores = space.scores.get();
        const E* weights = reinterpret_cast<const E*>(scores);
        for (int64_t s = 0; s < strips; ++s) {
            multiply_long<Tile, Start::zero, R, true, E, A>(keys, {state.query + s * elements<E>(dims) * R, R},
                                                            {scores, R}, count, R, elements<E>(dims));
            soften<Tile, E>(scores, count, scale, state.largest + s * R, state.total + s * R,
                            state.page_total ? state.page_total + s * R : nullptr, space.factor.get(), ahead);
            multiply_long<Tile, Start::scale, R, false, E, A>(values, {weights, R}, {state.out + s * dims * R, R}, dims,
                                                              R, elements<E>(count), space.factor.get());
        }
    }
}

// Task: split of a key head of a row tile.
struct ForwardTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Forward<T>& f, int64_t task) {
        using A = accumulate_t<T>;
        using E = operand_t<Tile, T>;
        constexpr int64_t R = kStrip<A>;
        const PagedAttentionParams<T>& p = f.p;
        const int64_t splits = f.plan.splits, split = task % splits, head = task / splits % p.key_heads;
        const RowTile& tile = f.plan.tiles[task / splits / p.key_heads];
        const Sample& sample = f.plan.samples[tile.sample];
        const int64_t strips = (tile.rows + R - 1) / R, at = f.row_index(split, head, f.plan.row_of(tile));
        const ForwardSpace<Tile, T> space(f.plan.width, strips);
        for (int64_t s = 0; s < strips; ++s) {
            const Strip<T> strip{p, f.plan, tile, head, s * R, std::min(R, tile.rows - s * R)};
            pack_strip<Tile>(strip, f.turned.get(), sign_of_scale(p), space.rows.get(),
                             space.query.get() + s * elements<E>(p.head_dim) * R, static_cast<E*>(nullptr));
        }
        TileState<E, A> state{space.query.get(), f.partial.get() + at * p.head_dim, f.largest.get() + at,
                              f.total.get() + at};
        std::fill(state.out, state.out + strips * R * p.head_dim, A{0});
        std::fill(state.largest, state.largest + strips * R, -std::numeric_limits<A>::infinity());
        std::fill(state.total, state.total + strips * R, A{0});
        const bool weighs = f.weighs(sample, tile.first, tile.first + tile.rows);
        const int64_t end = sample.listings * (split + 1) / splits;
        const Listing* listings = f.plan.listings.data() + sample.listing_begin;
        for (int64_t i = sample.listings * split / splits; i < end; ++i) {
            if (weighs) {
                const int64_t stored = f.page_index(head, tile.sample, i, tile.first);
                state.page_total = f.page_total.get() + stored;
                std::fill(state.page_total, state.page_total + strips * R, A{0});
            }
            const Ahead ahead = i + 1 < end ? ahead_of(p, listings[i + 1], head) : Ahead{};
            attend_page<Tile>(f, space, state, strips, head, listings[i], ahead);
            if (!weighs) continue;
            std::copy(state.largest, state.largest + strips * R,
                      f.page_largest.get() + f.page_index(head, tile.sample, i, tile.first));
        }
    }
};

// Merges the splits of a strip in order: into `merged` (D, kStrip), and into `largest` and `total` of the first split.
template <class Tile, class T, class A>
ALWAYS_INLINE void merge_strip(const Forward<T>& f, int64_t head, int64_t row, A* merged) {
    using V = vector_t<Tile, A>;
    constexpr int64_t R = kStrip<A>;
    const int64_t dims = f.p.head_dim;
    for (int64_t lane = 0; lane < R; lane += kLanes<Tile, A>) {
        V largest = V{} - std::numeric_limits<A>::infinity(), total{};
        for (int64_t i = 0; i < f.plan.splits; ++i) {
            const V other = load_vector<Tile>(f.largest.get() + f.row_index(i, head, row) + lane);
            largest = other > largest ? other : largest;
        }
        for (int64_t d = 0; d < dims; ++d) store_vector(merged + d * R + lane, V{});
        for (int64_t i = 0; i < f.plan.splits; ++i) {
            const int64_t at = f.row_index(i, head, row);
            const V share = load_vector<Tile>(f.total.get() + at + lane);
            V weight = exp2_vector(load_vector<Tile>(f.largest.get() + at + lane) - largest);
            // A split without keys adds nothing, also when none has any.
            weight = share == 0 ? V{} : weight;
            total += share * weight;
            const A* out = f.partial.get() + at * dims + lane;
            for (int64_t d = 0; d < dims; ++d) {
                store_vector(merged + d * R + lane,
                             load_vector<Tile>(merged + d * R + lane) + load_vector<Tile>(out + d * R) * weight);
            }
        }
        const V inverse = total == 0 ? V{} : 1 / total;
        for (int64_t d = 0; d < dims; ++d) {
            store_vector(merged + d * R + lane, load_vector<Tile>(merged + d * R + lane) * inverse);
        }
        store_vector(f.largest.get() + f.row_index(0, head, row) + lane, largest);
        store_vector(f.total.get() + f.row_index(0, head, row) + lane, total);
    }
}

// Task: key head of a row tile.
struct MergeTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Forward<T>& f, int64_t task) {
        using A = accumulate_t<T>;
        constexpr int64_t R = kStrip<A>;
        const PagedAttentionParams<T>& p = f.p;
        const int64_t head = task % p.key_heads;
        const RowTile& tile = f.plan.tiles[task / p.key_heads];
        const Scratch<A> merged(R * p.head_dim);
        for (int64_t first = 0; first < tile.rows; first += R) {
            const Strip<T> strip{p, f.plan, tile, head, first, std::min(R, tile.rows - first)};
            const int64_t row = f.plan.row_of(tile) + first, at = f.row_index(0, head, row);
            merge_strip<Tile>(f, head, row, merged.get());
            for (int64_t r = 0; r < strip.rows; ++r) {
                T* out = p.out + (strip.row_of(p.query, r) - p.query);
                for (int64_t d = 0; d < p.head_dim; ++d) out[d] = store<T>(merged.get()[d * R + r]);
                const int64_t token = f.plan.token_of(tile, first + r);
                const int64_t q = head * f.plan.group + f.plan.member_of(tile, first + r);
                const double total = std::log(static_cast<double>(f.total.get()[at + r]));
                p.lse[q * p.tokens + token] = static_cast<A>(f.largest.get()[at + r] * kLn2 + total);
            }
        }
    }
};

// Task: listing. Sums the weights of the rows that fell on the page, in row order.
struct MassTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Forward<T>& f, int64_t task) {
        using A = accumulate_t<T>;
        const auto owner = std::upper_bound(f.plan.samples.begin(), f.plan.samples.end(), task,
                                            [](int64_t t, const Sample& s) { return t < s.listing_begin; });
        const int64_t sample = owner - f.plan.samples.begin() - 1;
        const Sample& s = f.plan.samples[sample];
        double weights = 0, mass = 0;
        for (int64_t m = 0; m < s.tokens; ++m) weights += f.p.mass_weight[s.token_begin + m];
        A share[kStrip<A>];
        for (int64_t head = 0; head < f.p.key_heads; ++head) {
            for (int64_t first = 0; first < s.rows; first += kStrip<A>) {
                if (!f.weighs(s, first, std::min(first + kStrip<A>, s.rows))) continue;
                const int64_t page = f.page_index(head, sample, task - s.listing_begin, first);
                const int64_t row = f.row_index(0, head, s.row_begin + first);
                for (int64_t lane = 0; lane < kStrip<A>; lane += kLanes<Tile, A>) {
                    const auto fall = load_vector<Tile>(f.page_largest.get() + page + lane) -
                                      load_vector<Tile>(f.largest.get() + row + lane);
                    store_vector(share + lane, exp2_vector(fall) * load_vector<Tile>(f.page_total.get() + page + lane) /
                                                   load_vector<Tile>(f.total.get() + row + lane));
                }
                for (int64_t r = 0; r < std::min(kStrip<A>, s.rows - first); ++r) {
                    mass += f.p.mass_weight[s.token_begin + (first + r) / f.plan.group] * share[r];
                }
            }
        }
        f.p.mass[sample * f.p.listed + f.plan.listings[task].column] =
            static_cast<A>(weights == 0 ? 0 : mass / (weights * f.p.query_heads));
    }
};

template <class T>
void attend(const PagedAttentionParams<T>& p) {
    const Forward<T> f{p};
    const int64_t tiles = f.plan.tiles.size() * p.key_heads;
    for_each_task<ForwardTask>(tiles * f.plan.splits, f);
    for_each_task<MergeTask>(tiles, f);
    if (!p.mass) return;
    std::fill(p.mass, p.mass + p.batch * p.listed, accumulate_t<T>{0});
    for_each_task<MassTask>(f.plan.listings.size(), f);
}

}  // namespace hourllava_ext
