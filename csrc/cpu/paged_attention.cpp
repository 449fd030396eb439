// SPDX-License-Identifier: Apache-2.0
// Flash attention over a page table. The heads of a group and the tokens of a sample are packed into rows; a task holds
// some rows and walks pages (forward), or holds some pages and walks rows (backward). The scale is folded into the
// packed queries. Work is cut by shape alone, so threads cannot change a result.
#include <vector>

#include "cpu/tile.h"

namespace hourllava_ext {
namespace {

constexpr int64_t kTileRows = 128;    // rows of a forward task: what one packing of a page is spread over
constexpr int64_t kBlockRows = 64;    // rows and keys of a backward step: the scores stay in the first two caches
constexpr int64_t kBlockKeys = 64;    // keys packed at a time
constexpr int64_t kMostWidth = 256;   // of a head
constexpr int64_t kEnoughTasks = 64;  // cut further until there are this many
constexpr int64_t kPartialElements = int64_t{1} << 28;  // most memory that partial query gradients may take

struct Listing {
    int64_t page, column, length;
};

struct Sample {
    int64_t token_begin, tokens;
    int64_t row_begin, rows;          // packed rows; row_begin is a multiple of kRowStep
    int64_t listing_begin, listings;  // non-empty pages of the table, ascending
    int64_t padded_rows() const { return round_up(rows, kRowStep); }
};

struct RowTile {
    int64_t sample, first, rows;  // rows [first, first + rows) of the sample
};

struct Plan {
    std::vector<Sample> samples;
    std::vector<Listing> listings;
    std::vector<RowTile> tiles;
    int64_t rows = 0;    // packed rows of all samples, with padding
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
    for (int64_t first = 0; first < s.rows; first += kTileRows) {
        plan.tiles.push_back({b, first, std::min(kTileRows, s.rows - first)});
    }
    plan.rows += s.padded_rows();
    plan.samples.push_back(s);
}

template <class T>
Plan make_plan(const PagedAttentionParams<T>& p) {
    Plan plan;
    plan.width = round_up(p.head_dim, kLine<accumulate_t<T>>);
    plan.group = p.query_heads / p.key_heads;
    for (int64_t b = 0; b < p.batch; ++b) plan_sample(p, b, plan);
    int64_t longest = 0;
    for (const Sample& s : plan.samples) longest = std::max(longest, s.listings);
    const int64_t tasks = std::max<int64_t>(1, plan.tiles.size() * p.key_heads);
    plan.splits = std::clamp<int64_t>(kEnoughTasks / tasks, 1, std::max<int64_t>(1, longest / 8));
    return plan;
}

template <class T>
Scratch<T> rotated_queries(const PagedAttentionParams<T>& p) {
    Scratch<T> turned(p.tokens * p.query_heads * p.head_dim);
    rope_cpu(RopeParams<T>{p.query, p.position_ids, p.inv_freq, turned.get(), p.tokens, p.query_heads, p.head_dim,
                           p.frequencies, p.query_heads * p.head_dim, p.head_dim, false});
    return turned;
}

// Packs a tile's rows of (M, Hq, D) for one key head: (rows padded to kRowStep, width), zeros in the padding.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void pack_tile(const PagedAttentionParams<T>& p, const Plan& plan, const RowTile& tile, int64_t head,
                             const T* from, A factor, A* out) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t token = plan.token_of(tile, r), q = head * plan.group + plan.member_of(tile, r);
        pack_rows<Tile>(from + (token * p.query_heads + q) * p.head_dim, 1, p.head_dim, out + r * plan.width, factor);
    }
    std::fill(out + tile.rows * plan.width, out + round_up(tile.rows, kRowStep) * plan.width, A{0});
}

// Rows of a page as a packed matrix: in place where they already are one, else converted into `space`.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE Matrix<const A> packed_rows(const T* rows, int64_t count, int64_t head_dim, int64_t width, A* space) {
    if constexpr (std::is_same_v<T, A>) {
        if (head_dim == width) return {rows, width};
    }
    pack_rows<Tile>(rows, count, head_dim, space, A{1});
    return {space, width};
}

// scores (rows x count) = rows (rows x head_dim) keys (head_dim x count); a long sum is cut, which lessens its
// rounding.
template <class Tile, class A>
ALWAYS_INLINE void score(const A* rows, int64_t width, const A* keys, A* scores, int64_t count_rows, int64_t count,
                         int64_t head_dim) {
    constexpr int64_t kLongSum = 64;
    const int64_t columns = round_up(count, kLine<A>);
    const Matrix<A> to{scores, kBlockKeys};
    multiply<Tile, Start::zero, A>({rows, width}, {keys, kBlockKeys}, to, count_rows, columns,
                                   std::min(head_dim, kLongSum));
    for (int64_t d = kLongSum; d < head_dim; d += kLongSum) {
        multiply<Tile, Start::add, A>({rows + d, width}, {keys + d * kBlockKeys, kBlockKeys}, to, count_rows, columns,
                                      std::min(head_dim - d, kLongSum));
    }
}

template <class T>
struct Forward {
    using A = accumulate_t<T>;
    const PagedAttentionParams<T>& p;
    Plan plan = make_plan(p);
    Scratch<T> turned = rotated_queries(p);  // (M, Hq, D)
    // Per split, key head and packed row: the unnormalised output, the largest score, and the sum of weights below it.
    Scratch<A> partial{plan.splits * p.key_heads * plan.rows * plan.width};
    Scratch<A> largest{plan.splits * p.key_heads * plan.rows};
    Scratch<A> total{plan.splits * p.key_heads * plan.rows};
    // For the page mass. Per key head, sample, listing and row: the largest score so far and the page's sum below it.
    std::vector<int64_t> page_begin = page_offsets();
    Scratch<A> page_largest{p.mass ? p.key_heads * page_begin.back() : 0};
    Scratch<A> page_total{p.mass ? p.key_heads * page_begin.back() : 0};

    std::vector<int64_t> page_offsets() const {
        std::vector<int64_t> offsets{0};
        for (const Sample& s : plan.samples) offsets.push_back(offsets.back() + s.listings * s.padded_rows());
        return offsets;
    }
    int64_t row_index(int64_t split, int64_t head, int64_t row) const {
        return (split * p.key_heads + head) * plan.rows + row;
    }
    int64_t page_index(int64_t head, int64_t sample, int64_t listing, int64_t row) const {
        return head * page_begin.back() + page_begin[sample] + listing * plan.samples[sample].padded_rows() + row;
    }
};

// One tile of rows and what its pages have left so far.
template <class Tile, class A>
struct TileState {
    Matrix<const A> query;
    Matrix<A> out;
    A* largest;                     // (rows,)
    vector_t<Tile, A>* total;       // (rows,) sums kept a vector wide
    vector_t<Tile, A>* page_total;  // (rows,) the same for the page at hand; null when no mass is asked for
};

// Turns a strip of scores (Tile::rows x count) into weights below the running maximum; factor gets each row's
// rescaling.
template <class Tile, class A>
ALWAYS_INLINE void soften(A* scores, int64_t count, const TileState<Tile, A>& state, int64_t first_row, A* factor) {
    using V = vector_t<Tile, A>;
    constexpr int64_t L = kLanes<Tile, A>;
    const int64_t vectors = (count + L - 1) / L;
    const integers_t<V> beyond = lanes_from<V>(count - (vectors - 1) * L);
    const V nothing = V{} - std::numeric_limits<A>::infinity();
    A* largest = state.largest + first_row;
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
        A* line = scores + r * kBlockKeys;
        A* last = line + (vectors - 1) * L;
        V most = beyond ? nothing : load_vector<Tile>(last);
        store_vector(last, most);
        for (int64_t v = 0; v < vectors - 1; ++v) {
            const V s = load_vector<Tile>(line + v * L);
            most = s > most ? s : most;
        }
        const A before = largest[r];
        largest[r] = std::max(before, largest_lane(most));
        factor[r] = before - largest[r];
    }
    for (int r = 0; r < Tile::rows; r += L) store_vector(factor + r, exp_vector(load_vector<Tile>(factor + r)));
#pragma GCC unroll 8
    for (int r = 0; r < Tile::rows; ++r) {
        A* line = scores + r * kBlockKeys;
        V sum{};
        for (int64_t v = 0; v < vectors; ++v) {
            const V weight = exp_vector(load_vector<Tile>(line + v * L) - largest[r]);
            store_vector(line + v * L, weight);
            sum += weight;
        }
        V *total = state.total + first_row + r, *page_total = state.page_total + first_row + r;
        *total = *total * factor[r] + sum;
        if (state.page_total) *page_total = *page_total * factor[r] + sum;
    }
}

template <class Tile, class A>
struct ForwardSpace {
    Scratch<A> query, keys, values, scores;
    Scratch<vector_t<Tile, A>> total{kTileRows}, page_total{kTileRows};
    explicit ForwardSpace(int64_t width)
        : query(kTileRows * width),
          keys(width * kBlockKeys),
          values(kBlockKeys * width),
          scores(kRowStep * kBlockKeys) {}
};

template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void attend_page(const Forward<T>& f, const ForwardSpace<Tile, A>& space, const TileState<Tile, A>& state,
                               int64_t rows, int64_t head, const Listing& listing) {
    const PagedAttentionParams<T>& p = f.p;
    const int64_t offset = (listing.page * p.key_heads + head) * p.page_size;
    for (int64_t begin = 0; begin < listing.length; begin += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, listing.length - begin);
        pack_transposed<Tile>(p.key_pages + (offset + begin) * p.head_dim, count, p.head_dim, space.keys.get(),
                              kBlockKeys);
        const Matrix<const A> values = packed_rows<Tile>(p.value_pages + (offset + begin) * p.head_dim, count,
                                                         p.head_dim, f.plan.width, space.values.get());
        A* scores = space.scores.get();
        // Read and written in whole vectors.
        A factor[kRowStep + kLine<A>] = {};
        for (int64_t r = 0; r < rows; r += Tile::rows) {
            score<Tile>(state.query.at + r * f.plan.width, f.plan.width, space.keys.get(), scores, Tile::rows, count,
                        p.head_dim);
            soften<Tile>(scores, count, state, r, factor);
            multiply_strip<Tile, Start::scale, A>({scores, kBlockKeys}, values,
                                                  {state.out.at + r * f.plan.width, f.plan.width}, f.plan.width, count,
                                                  factor);
        }
    }
}

// Task: split of a key head of a row tile.
struct ForwardTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Forward<T>& f, int64_t task) {
        using A = accumulate_t<T>;
        const int64_t splits = f.plan.splits, split = task % splits, head = task / splits % f.p.key_heads;
        const RowTile& tile = f.plan.tiles[task / splits / f.p.key_heads];
        const Sample& s = f.plan.samples[tile.sample];
        const int64_t rows = round_up(tile.rows, kRowStep), at = f.row_index(split, head, f.plan.row_of(tile));

        const ForwardSpace<Tile, A> space(f.plan.width);
        pack_tile<Tile>(f.p, f.plan, tile, head, f.turned.get(), static_cast<A>(f.p.scale), space.query.get());
        const TileState<Tile, A> state{{space.query.get(), f.plan.width},
                                       {f.partial.get() + at * f.plan.width, f.plan.width},
                                       f.largest.get() + at,
                                       space.total.get(),
                                       f.p.mass ? space.page_total.get() : nullptr};
        std::fill(state.out.at, state.out.at + rows * f.plan.width, A{0});
        std::fill(state.largest, state.largest + rows, -std::numeric_limits<A>::infinity());
        std::fill(state.total, state.total + rows, vector_t<Tile, A>{});
        for (int64_t i = s.listings * split / splits; i < s.listings * (split + 1) / splits; ++i) {
            if (state.page_total) std::fill(state.page_total, state.page_total + rows, vector_t<Tile, A>{});
            attend_page<Tile>(f, space, state, rows, head, f.plan.listings[s.listing_begin + i]);
            if (!state.page_total) continue;
            const int64_t stored = f.page_index(head, tile.sample, i, tile.first);
            for (int64_t r = 0; r < rows; ++r) {
                f.page_largest.get()[stored + r] = state.largest[r];
                f.page_total.get()[stored + r] = sum_of_lanes(state.page_total[r]);
            }
        }
        for (int64_t r = 0; r < rows; ++r) f.total.get()[at + r] = sum_of_lanes(state.total[r]);
    }
};

// Merges the splits of one row in order: into its stored output, and into `largest` and `total` of the first split.
template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void merge_row(const Forward<T>& f, int64_t head, int64_t row, T* out) {
    A largest = -std::numeric_limits<A>::infinity(), total = 0;
    for (int64_t i = 0; i < f.plan.splits; ++i) largest = std::max(largest, f.largest.get()[f.row_index(i, head, row)]);
    A merged[kMostWidth] = {};
    for (int64_t i = 0; i < f.plan.splits; ++i) {
        const int64_t at = f.row_index(i, head, row);
        // A split without keys adds nothing, also when none has any.
        if (f.total.get()[at] == 0) continue;
        const A weight = std::exp(f.largest.get()[at] - largest);
        total += f.total.get()[at] * weight;
        for (int64_t d = 0; d < f.p.head_dim; ++d) merged[d] += f.partial.get()[at * f.plan.width + d] * weight;
    }
    const A inverse = total == 0 ? 0 : 1 / total;
    for (int64_t d = 0; d < f.p.head_dim; ++d) out[d] = store<T>(merged[d] * inverse);
    f.largest.get()[f.row_index(0, head, row)] = largest;
    f.total.get()[f.row_index(0, head, row)] = total;
}

// Task: key head of a row tile.
struct MergeTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Forward<T>& f, int64_t task) {
        using A = accumulate_t<T>;
        const int64_t head = task % f.p.key_heads;
        const RowTile& tile = f.plan.tiles[task / f.p.key_heads];
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t token = f.plan.token_of(tile, r), q = head * f.plan.group + f.plan.member_of(tile, r);
            const int64_t row = f.plan.row_of(tile) + r, merged = f.row_index(0, head, row);
            merge_row(f, head, row, f.p.out + (token * f.p.query_heads + q) * f.p.head_dim);
            const double total = std::log(static_cast<double>(f.total.get()[merged]));
            f.p.lse[q * f.p.tokens + token] = static_cast<A>(f.largest.get()[merged] + total);
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
        for (int64_t head = 0; head < f.p.key_heads; ++head) {
            const int64_t page = f.page_index(head, sample, task - s.listing_begin, 0);
            for (int64_t r = 0; r < s.rows; ++r) {
                const A weight = f.p.mass_weight[s.token_begin + r / f.plan.group];
                const int64_t row = f.row_index(0, head, s.row_begin + r);
                const A share = std::exp(f.page_largest.get()[page + r] - f.largest.get()[row]) / f.total.get()[row];
                mass += weight * f.page_total.get()[page + r] * share;
            }
        }
        f.p.mass[sample * f.p.listed + f.plan.listings[task].column] =
            static_cast<A>(weights == 0 ? 0 : mass / (weights * f.p.query_heads));
    }
};

template <class T>
void forward(const PagedAttentionParams<T>& p) {
    const Forward<T> f{p};
    const int64_t tiles = f.plan.tiles.size() * p.key_heads;
    for_each_task<ForwardTask>(tiles * f.plan.splits, f);
    for_each_task<MergeTask>(tiles, f);
    if (!p.mass) return;
    std::fill(p.mass, p.mass + p.batch * p.listed, accumulate_t<T>{0});
    for_each_task<MassTask>(f.plan.listings.size(), f);
}

// Where a chunk of pages leaves its share of one sample's query gradients.
struct Slot {
    int64_t sample, row_begin;
};

// Pages owned by one task. Their key and value gradients are whole when the task ends.
struct Chunk {
    std::vector<int64_t> pages;
    std::vector<Slot> slots;  // of every sample that lists one of the pages, ascending
};

// Cuts the listed pages into chunks: a page belongs to the first sample that lists it, whoever else reads it.
struct Ownership {
    std::vector<int64_t> user_begin, users;  // samples that list a page are users[user_begin[page] ... [page + 1])
    std::vector<Chunk> chunks;
    int64_t slot_rows = 0;

    Ownership(const Plan& plan, int64_t pages, int64_t key_heads) : user_begin(pages + 1) {
        for (const Listing& listing : plan.listings) ++user_begin[listing.page + 1];
        for (int64_t page = 0; page < pages; ++page) user_begin[page + 1] += user_begin[page];
        users.resize(plan.listings.size());
        std::vector<int64_t> next(user_begin.begin(), user_begin.end() - 1);
        for (size_t b = 0; b < plan.samples.size(); ++b) {
            const Sample& s = plan.samples[b];
            for (int64_t i = 0; i < s.listings; ++i) users[next[plan.listings[s.listing_begin + i].page]++] = b;
        }
        const int64_t tasks = std::max<int64_t>(1, plan.samples.size() * key_heads);
        const int64_t most = kPartialElements / std::max<int64_t>(1, plan.rows * plan.width * key_heads);
        const int64_t cuts = std::clamp<int64_t>(kEnoughTasks / 2 / tasks, 1, std::max<int64_t>(1, most));
        for (size_t b = 0; b < plan.samples.size(); ++b) cut_sample(plan, b, cuts);
    }

    void cut_sample(const Plan& plan, int64_t b, int64_t cuts) {
        const Sample& s = plan.samples[b];
        std::vector<int64_t> own;
        for (int64_t i = 0; i < s.listings; ++i) {
            const int64_t page = plan.listings[s.listing_begin + i].page;
            if (users[user_begin[page]] == b && (own.empty() || own.back() != page)) own.push_back(page);
        }
        const int64_t count = own.size();
        for (int64_t cut = 0; cut < std::min(cuts, count); ++cut) {
            const int64_t begin = count * cut / std::min(cuts, count), end = count * (cut + 1) / std::min(cuts, count);
            Chunk chunk{{own.begin() + begin, own.begin() + end}, {}};
            add_slots(plan, chunk);
            chunks.push_back(std::move(chunk));
        }
    }

    void add_slots(const Plan& plan, Chunk& chunk) {
        std::vector<int64_t> readers;
        for (const int64_t page : chunk.pages) {
            readers.insert(readers.end(), users.begin() + user_begin[page], users.begin() + user_begin[page + 1]);
        }
        std::sort(readers.begin(), readers.end());
        readers.erase(std::unique(readers.begin(), readers.end()), readers.end());
        for (const int64_t sample : readers) {
            chunk.slots.push_back({sample, slot_rows});
            slot_rows += plan.samples[sample].padded_rows();
        }
    }
};

template <class T>
struct Backward {
    using A = accumulate_t<T>;
    const PagedAttentionBackwardParams<T>& b;
    const PagedAttentionParams<T>& p = b.forward;
    Plan plan = make_plan(p);
    Ownership ownership{plan, p.pages, p.key_heads};
    Scratch<T> turned = rotated_queries(p);
    Scratch<A> query{p.key_heads * plan.rows * plan.width};     // (Hkv, rows, width) times scale
    Scratch<A> grad_out{p.key_heads * plan.rows * plan.width};  // (Hkv, rows, width)
    Scratch<A> lse{p.key_heads * plan.rows};                    // (Hkv, rows)
    Scratch<A> delta{p.key_heads * plan.rows};                  // (Hkv, rows): what a weight's gradient is relative to
    Scratch<A> partial{p.key_heads * ownership.slot_rows * plan.width};  // (Hkv, slot rows, width)
};

// Task: key head of a row tile. Packs what every page needs of the rows.
struct PackTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const PagedAttentionParams<T>& p = w.p;
        const int64_t head = task % p.key_heads;
        const RowTile& tile = w.plan.tiles[task / p.key_heads];
        const int64_t at = head * w.plan.rows + w.plan.row_of(tile);
        pack_tile<Tile>(p, w.plan, tile, head, w.turned.get(), static_cast<A>(p.scale),
                        w.query.get() + at * w.plan.width);
        pack_tile<Tile>(p, w.plan, tile, head, w.b.grad_out, A{1}, w.grad_out.get() + at * w.plan.width);
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t token = w.plan.token_of(tile, r), q = head * w.plan.group + w.plan.member_of(tile, r);
            const T* out = p.out + (token * p.query_heads + q) * p.head_dim;
            const A* grad = w.grad_out.get() + (at + r) * w.plan.width;
            double delta = 0;
            for (int64_t d = 0; d < p.head_dim; ++d) delta += static_cast<double>(load<T>(out[d])) * grad[d];
            w.delta.get()[at + r] = delta - w.b.grad_lse[q * p.tokens + token];
            w.lse.get()[at + r] = p.lse[q * p.tokens + token];
        }
        // Padded rows get no weight anywhere.
        const int64_t padded = round_up(tile.rows, kRowStep);
        std::fill(w.lse.get() + at + tile.rows, w.lse.get() + at + padded, std::numeric_limits<A>::infinity());
        std::fill(w.delta.get() + at + tile.rows, w.delta.get() + at + padded, A{0});
    }
};

template <class A>
struct BackwardSpace {
    Scratch<A> keys_across, values_across;  // (width, kBlockKeys): transposed
    Scratch<A> keys;                        // (kBlockKeys, width), unless the page itself will do
    Scratch<A> grad_keys, grad_values;      // (kBlockKeys, width)
    Scratch<A> weights, grad_scores;        // (kBlockRows, kBlockKeys)
    explicit BackwardSpace(int64_t width)
        : keys_across(width * kBlockKeys),
          values_across(width * kBlockKeys),
          keys(width * kBlockKeys),
          grad_keys(width * kBlockKeys),
          grad_values(width * kBlockKeys),
          weights(kBlockRows * kBlockKeys),
          grad_scores(kBlockRows * kBlockKeys) {}
};

// Scores to weights and, in `grads`, gradients of weights to gradients of scores: (rows x count), zeros to the line's
// end.
template <class Tile, class A>
ALWAYS_INLINE void differentiate(A* scores, A* grads, int64_t rows, int64_t count, const A* lse, const A* delta) {
    using V = vector_t<Tile, A>;
    constexpr int64_t L = kLanes<Tile, A>;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < round_up(count, kLine<A>); j += L) {
            A *score = scores + r * kBlockKeys + j, *grad = grads + r * kBlockKeys + j;
            V weight = exp_vector(load_vector<Tile>(score) - lse[r]);
            if (j + L > count) weight = lanes_from<V>(count - j) ? V{} : weight;
            store_vector(score, weight);
            store_vector(grad, weight * (load_vector<Tile>(grad) - delta[r]));
        }
    }
}

// Adds what one sample's rows contribute to a block of keys, and the block to the rows' query gradients.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void visit_sample(const Backward<T>& w, const BackwardSpace<A>& space, Matrix<const A> keys,
                                int64_t count, int64_t head, const Slot& slot) {
    const Sample& s = w.plan.samples[slot.sample];
    const int64_t width = w.plan.width, keys_padded = round_up(count, kLine<A>);
    A *weights = space.weights.get(), *grads = space.grad_scores.get();
    for (int64_t first = 0; first < s.padded_rows(); first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, s.padded_rows() - first);
        const int64_t at = head * w.plan.rows + s.row_begin + first;
        const Matrix<const A> query{w.query.get() + at * width, width}, grad_out{w.grad_out.get() + at * width, width};
        A* grad_query = w.partial.get() + (head * w.ownership.slot_rows + slot.row_begin + first) * width;
        score<Tile>(query.at, width, space.keys_across.get(), weights, rows, count, w.p.head_dim);
        score<Tile>(grad_out.at, width, space.values_across.get(), grads, rows, count, w.p.head_dim);
        differentiate<Tile>(weights, grads, rows, count, w.lse.get() + at, w.delta.get() + at);
        multiply<Tile, Start::add, A>({weights, 1, kBlockKeys}, grad_out, {space.grad_values.get(), width}, keys_padded,
                                      width, rows);
        multiply<Tile, Start::add, A>({grads, 1, kBlockKeys}, query, {space.grad_keys.get(), width}, keys_padded, width,
                                      rows);
        multiply<Tile, Start::add, A>({grads, kBlockKeys}, keys, {grad_query, width}, rows, width, count);
    }
}

template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void store_rows(const A* from, int64_t count, int64_t head_dim, int64_t width, A factor, T* to) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < head_dim; ++d) to[i * head_dim + d] = store<T>(from[i * width + d] * factor);
    }
}

// All gradients through one page of one key head.
template <class Tile, class T, class A = accumulate_t<T>>
ALWAYS_INLINE void differentiate_page(const Backward<T>& w, const BackwardSpace<A>& space, const Chunk& chunk,
                                      int64_t page, int64_t head) {
    const PagedAttentionParams<T>& p = w.p;
    const int64_t width = w.plan.width, length = p.page_lengths[page];
    for (int64_t begin = 0; begin < length; begin += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, length - begin);
        const int64_t offset = ((page * p.key_heads + head) * p.page_size + begin) * p.head_dim;
        pack_transposed<Tile>(p.key_pages + offset, count, p.head_dim, space.keys_across.get(), kBlockKeys);
        pack_transposed<Tile>(p.value_pages + offset, count, p.head_dim, space.values_across.get(), kBlockKeys);
        const Matrix<const A> keys =
            packed_rows<Tile>(p.key_pages + offset, count, p.head_dim, width, space.keys.get());
        std::fill(space.grad_keys.get(), space.grad_keys.get() + kBlockKeys * width, A{0});
        std::fill(space.grad_values.get(), space.grad_values.get() + kBlockKeys * width, A{0});
        for (int64_t u = w.ownership.user_begin[page]; u < w.ownership.user_begin[page + 1]; ++u) {
            const auto slot = std::lower_bound(chunk.slots.begin(), chunk.slots.end(), w.ownership.users[u],
                                               [](const Slot& s, int64_t sample) { return s.sample < sample; });
            visit_sample<Tile>(w, space, keys, count, head, *slot);
        }
        store_rows(space.grad_keys.get(), count, p.head_dim, width, A{1}, w.b.grad_key_pages + offset);
        store_rows(space.grad_values.get(), count, p.head_dim, width, A{1}, w.b.grad_value_pages + offset);
    }
}

// Task: key head of a chunk of pages.
struct PageTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const int64_t head = task % w.p.key_heads, width = w.plan.width;
        const Chunk& chunk = w.ownership.chunks[task / w.p.key_heads];
        for (const Slot& slot : chunk.slots) {
            A* rows = w.partial.get() + (head * w.ownership.slot_rows + slot.row_begin) * width;
            std::fill(rows, rows + w.plan.samples[slot.sample].padded_rows() * width, A{0});
        }
        const BackwardSpace<A> space(width);
        for (const int64_t page : chunk.pages) differentiate_page<Tile>(w, space, chunk, page, head);
    }
};

// Task: key head of a row tile. Adds the chunks' shares in order.
struct GatherTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const PagedAttentionParams<T>& p = w.p;
        const int64_t head = task % p.key_heads;
        const RowTile& tile = w.plan.tiles[task / p.key_heads];
        Scratch<A> sum(tile.rows * w.plan.width);
        std::fill(sum.get(), sum.get() + tile.rows * w.plan.width, A{0});
        for (const Chunk& chunk : w.ownership.chunks) {
            for (const Slot& slot : chunk.slots) {
                if (slot.sample != tile.sample) continue;
                const int64_t row = head * w.ownership.slot_rows + slot.row_begin + tile.first;
                const A* share = w.partial.get() + row * w.plan.width;
                for (int64_t i = 0; i < tile.rows * w.plan.width; ++i) sum.get()[i] += share[i];
            }
        }
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t token = w.plan.token_of(tile, r), q = head * w.plan.group + w.plan.member_of(tile, r);
            store_rows(sum.get() + r * w.plan.width, 1, p.head_dim, w.plan.width, static_cast<A>(p.scale),
                       w.b.grad_query + (token * p.query_heads + q) * p.head_dim);
        }
    }
};

// Task: page. Zeros what no query read: whole pages, and the free rows of the others.
struct ClearTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t page) {
        const PagedAttentionParams<T>& p = w.p;
        const bool read = w.ownership.user_begin[page] < w.ownership.user_begin[page + 1];
        const int64_t length = read ? p.page_lengths[page] : 0, free = (p.page_size - length) * p.head_dim;
        for (int64_t head = 0; head < p.key_heads; ++head) {
            const int64_t offset = ((page * p.key_heads + head) * p.page_size + length) * p.head_dim;
            std::fill(w.b.grad_key_pages + offset, w.b.grad_key_pages + offset + free, T{});
            std::fill(w.b.grad_value_pages + offset, w.b.grad_value_pages + offset + free, T{});
        }
    }
};

template <class T>
void backward(const PagedAttentionBackwardParams<T>& b) {
    const PagedAttentionParams<T>& p = b.forward;
    const Backward<T> w{b};
    const int64_t tiles = w.plan.tiles.size() * p.key_heads;
    for_each_task<PackTask>(tiles, w);
    for_each_task<ClearTask>(p.pages, w);
    for_each_task<PageTask>(w.ownership.chunks.size() * p.key_heads, w);
    for_each_task<GatherTask>(tiles, w);
    rope_cpu(RopeParams<T>{b.grad_query, p.position_ids, p.inv_freq, b.grad_query, p.tokens, p.query_heads, p.head_dim,
                           p.frequencies, p.query_heads * p.head_dim, p.head_dim, true});
}

}  // namespace

void paged_attention_cpu(const PagedAttentionParams<float>& p) { forward(p); }
void paged_attention_cpu(const PagedAttentionParams<double>& p) { forward(p); }
void paged_attention_cpu(const PagedAttentionParams<bfloat16>& p) { forward(p); }
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<float>& b) { backward(b); }
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<double>& b) { backward(b); }
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<bfloat16>& b) { backward(b); }

}  // namespace hourllava_ext
