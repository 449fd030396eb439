// SPDX-License-Identifier: Apache-2.0
// Flash attention backward: a task holds pages and walks rows. Transposed like the forward, rows being lanes:
//
//   scores^T, dweights^T (keys x rows) = K Q^T, V dO^T   (a strip at a time: 24 KB each)
//   dV, dK (keys x D)     += weights^T dO, dscores^T Q   (a block of strips at a time: sums of 96 rows in registers)
//   dQ^T   (D x rows)     += K^T dscores^T               (a share per task, added in order afterwards)
//
// Gradients are accumulated in float. Every page is owned by one task, so dK and dV are whole when it ends. Tasks come
// in waves, after each of which its shares of dQ are added up: there are as many shares as threads can use, not tasks.
// A row brings 1.5 KB along, of which it takes 0.5 KB back: two pages stay in the second cache while rows pass by, so
// that this is paid once for both, and the part that is written is fetched while its strip is differentiated.
#pragma once

#include "cpu/attention_forward.h"

namespace hourllava_ext {

constexpr int64_t kBlockStrips = 2;                     // strips between two additions to dK and dV
constexpr int64_t kBlocksAtOnce = 2;                    // blocks of keys that rows meet while the cache has them
constexpr int64_t kChunkPages = 4;                      // pages that are worth a share of dQ of their own
constexpr int64_t kPartialElements = int64_t{1} << 28;  // most memory that shares of dQ may take
constexpr int64_t kWaveTasks = 2;                       // of each thread, so that none waits long for the last
constexpr int64_t kWaveElements = int64_t{1} << 22;     // that shares of a wave take before another wave is worth it

// Where a chunk of pages leaves its share of one sample's query gradients.
struct Slot {
    int64_t sample, row_begin;
};

// Chunks [begin, end), whose shares exist at the same time.
struct Wave {
    size_t begin, end;
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
    std::vector<Wave> waves;  // of all chunks, in order; one at least
    int64_t slot_rows = 0;    // of the wave that has most

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
        make_waves(plan, key_heads);
    }

    // How often a sample lists a page.
    int64_t listed(int64_t page, int64_t sample) const {
        return std::count(users.begin() + user_begin[page], users.begin() + user_begin[page + 1], sample);
    }

    void cut_sample(const Plan& plan, int64_t b, int64_t cuts) {
        const Sample& s = plan.samples[b];
        std::vector<int64_t> own;
        for (int64_t i = 0; i < s.listings; ++i) {
            const int64_t page = plan.listings[s.listing_begin + i].page;
            if (users[user_begin[page]] == b && (own.empty() || own.back() != page)) own.push_back(page);
        }
        const int64_t count = own.size();
        cuts = std::min(cuts, (count + kChunkPages - 1) / kChunkPages);
        for (int64_t cut = 0; cut < cuts; ++cut) {
            const int64_t begin = count * cut / cuts, end = count * (cut + 1) / cuts;
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
        for (const int64_t sample : readers) chunk.slots.push_back({sample, 0});
    }

    // Shares are added in the order of the chunks, however many make a wave: threads cannot change a result.
    void make_waves(const Plan& plan, int64_t key_heads) {
        waves.push_back({0, 0});
        int64_t rows = 0;
        for (Chunk& chunk : chunks) {
            const size_t tasks = (waves.back().end - waves.back().begin) * key_heads;
            if (tasks >= static_cast<size_t>(kWaveTasks * thread_count()) &&
                rows * plan.width * key_heads >= kWaveElements) {
                waves.push_back({waves.back().end, waves.back().end});
                rows = 0;
            }
            for (Slot& slot : chunk.slots) {
                slot.row_begin = rows;
                rows += plan.samples[slot.sample].padded_rows;
            }
            ++waves.back().end;
            slot_rows = std::max(slot_rows, rows);
        }
    }
};

// Operands of the four products that rows take part in; float where the tier has no pairs, so E is the tier's choice
// and the memory is sized for the larger.
template <class T>
struct Backward {
    using A = accumulate_t<T>;
    const PagedAttentionBackwardParams<T>& b;
    const PagedAttentionParams<T>& p = b.forward;
    Plan plan = make_plan(p);
    Ownership ownership{plan, p.pages, p.key_heads};
    Scratch<T> turned = rotated_queries(p);
    // Per key head and strip: (elements(D), kStrip), and down the rows (elements(kStrip), width).
    int64_t operand_size = p.key_heads * plan.rows * plan.width;
    LargeScratch<A> query_across{operand_size}, grad_across{operand_size};
    LargeScratch<A> query_down{operand_size}, grad_down{operand_size};
    // (Hkv, rows), in powers of two, and what rounding took from that: weights are as exact as the stored sums.
    Scratch<A> lse{p.key_heads * plan.rows}, lse_rest{p.key_heads * plan.rows};
    Scratch<A> delta{p.key_heads * plan.rows};  // (Hkv, rows): what a weight's gradient is relative to
    // Per key head and slot: strips of (D, kStrip).
    LargeScratch<A> partial{p.key_heads * ownership.slot_rows * p.head_dim};
    // Per key head and row, likewise: sums over the waves so far. In double: a share is a sum already, and there may be
    // many.
    LargeScratch<double> total{ownership.waves.size() > 1 ? p.key_heads * plan.rows * p.head_dim : 0};
    Wave wave{};  // that is computed now

    // Row `at` of all key heads' rows begins a strip; its operands.
    template <class E>
    E* across(const LargeScratch<A>& of, int64_t at) const {
        return reinterpret_cast<E*>(of.get()) + at * elements<E>(p.head_dim);
    }
    template <class E>
    E* down(const LargeScratch<A>& of, int64_t at) const {
        return reinterpret_cast<E*>(of.get()) + elements<E>(at) * plan.width;
    }
};

// Task: key head of a row tile. Packs what every page needs of the rows.
struct PackTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        using E = operand_t<Tile, T>;
        constexpr int64_t R = kStrip<A>;
        const PagedAttentionParams<T>& p = w.p;
        const int64_t head = task % p.key_heads;
        const RowTile& tile = w.plan.tiles[task / p.key_heads];
        const Scratch<E> space(R * w.plan.width);
        for (int64_t first = 0; first < tile.rows; first += R) {
            const Strip<T> strip{p, w.plan, tile, head, first, std::min(R, tile.rows - first)};
            const int64_t at = head * w.plan.rows + w.plan.row_of(tile) + first;
            pack_strip<Tile>(strip, w.turned.get(), sign_of_scale(p), space.get(),
                             w.template across<E>(w.query_across, at), w.template down<E>(w.query_down, at));
            pack_strip<Tile>(strip, w.b.grad_out, A{1}, space.get(), w.template across<E>(w.grad_across, at),
                             w.template down<E>(w.grad_down, at));
            for (int64_t r = 0; r < strip.rows; ++r) {
                const T *out = strip.row_of(p.out, r), *grad = strip.row_of(w.b.grad_out, r);
                const int64_t token = w.plan.token_of(tile, first + r);
                const int64_t q = head * w.plan.group + w.plan.member_of(tile, first + r);
                double delta = 0;
                for (int64_t d = 0; d < p.head_dim; ++d) {
                    delta += static_cast<double>(load<T>(out[d])) * load<T>(grad[d]);
                }
                w.delta.get()[at + r] = delta - w.b.grad_lse[q * p.tokens + token];
                const double lse = p.lse[q * p.tokens + token] * kLog2E;
                w.lse.get()[at + r] = lse;
                w.lse_rest.get()[at + r] = std::isfinite(lse) ? lse - w.lse.get()[at + r] : 0;
            }
            // Padded rows get no weight anywhere.
            std::fill(w.lse.get() + at + strip.rows, w.lse.get() + at + R, std::numeric_limits<A>::infinity());
            std::fill(w.lse_rest.get() + at + strip.rows, w.lse_rest.get() + at + R, A{0});
            std::fill(w.delta.get() + at + strip.rows, w.delta.get() + at + R, A{0});
        }
    }
};

// What runs down the rows of a block, as scalars: T itself where its pairs are multiplied, else the type of sums.
template <class Tile, class T>
using stored_t = std::conditional_t<std::is_same_v<operand_t<Tile, T>, Pair>, bfloat16, accumulate_t<T>>;

template <class Tile, class T>
struct BackwardSpace {
    using A = accumulate_t<T>;
    using E = operand_t<Tile, T>;
    static constexpr int64_t kBlockRows = kBlockStrips * kStrip<A>;
    Scratch<E> keys, values, keys_down;  // per block (kBlockKeys, width) where they are not read in place
    Scratch<A> grad_keys, grad_values;   // per block (kBlockKeys, width)
    Scratch<A> scores{kBlockKeys * kStrip<A>}, grads{kBlockKeys * kStrip<A>};  // of a strip
    Scratch<E> grad_pairs{kBlockKeys * kStrip<A>};                             // of a strip, pairs of keys
    Scratch<stored_t<Tile, T>> weights{kBlockKeys * kBlockRows}, grad_scores{kBlockKeys * kBlockRows};
    explicit BackwardSpace(int64_t width)
        : keys(kBlocksAtOnce * kBlockKeys * width),
          values(kBlocksAtOnce * kBlockKeys * width),
          keys_down(kBlocksAtOnce * kBlockKeys * width),
          grad_keys(kBlocksAtOnce * kBlockKeys * width),
          grad_values(kBlocksAtOnce * kBlockKeys * width) {}
};

// Scores to weights and gradients of weights to gradients of scores, for the strip of one block (count x kStrip) that
// begins at packed row `at`. Both go to columns of the block's matrices; the latter also, as pairs of keys, to
// grad_pairs where operands are pairs. Fetches the strip's query gradients (D, kStrip), which are next: two lines a
// step are all of them for 128 dims and as many keys.
template <class Tile, class T>
ALWAYS_INLINE void differentiate(const Backward<T>& w, const BackwardSpace<Tile, T>& space, int64_t count, int64_t at,
                                 int64_t column, const accumulate_t<T>* grad_query) {
    using A = accumulate_t<T>;
    using V = vector_t<Tile, A>;
    constexpr bool kPairs = std::is_same_v<operand_t<Tile, T>, Pair>;
    constexpr int64_t R = kStrip<A>, kRow = BackwardSpace<Tile, T>::kBlockRows;
    const A scale = exponent_scale(w.p);
    const A *lse = w.lse.get() + at, *lse_rest = w.lse_rest.get() + at, *delta = w.delta.get() + at;
    const A* fetched = grad_query + w.p.head_dim * R;
    for (int64_t k = 0; k < count; k += 2) {
        for (int64_t lane = 0; lane < R; lane += kLanes<Tile, A>) {
            if (grad_query < fetched) {
                __builtin_prefetch(grad_query, 1);
                __builtin_prefetch(grad_query + kLine<A>, 1);
                grad_query += 2 * kLine<A>;
            }
            V weight[2], grad[2];
#pragma GCC unroll 2
            for (int64_t i = 0; i < 2; ++i) {
                weight[i] = grad[i] = V{};
                if (k + i >= count) break;
                const int64_t from = (k + i) * R + lane, to = (k + i) * kRow + column + lane;
                const V exponent = load_vector<Tile>(space.scores.get() + from) * scale - load_vector<Tile>(lse + lane);
                weight[i] = exp2_vector(exponent - load_vector<Tile>(lse_rest + lane));
                grad[i] = weight[i] * (load_vector<Tile>(space.grads.get() + from) - load_vector<Tile>(delta + lane));
                if constexpr (kPairs) {
                    store_vector(space.weights.get() + to, round_to_bfloat16(weight[i]));
                    store_vector(space.grad_scores.get() + to, round_to_bfloat16(grad[i]));
                } else {
                    store_vector(space.weights.get() + to, weight[i]);
                    store_vector(space.grad_scores.get() + to, grad[i]);
                }
            }
            if constexpr (kPairs) {
                store_vector(space.grad_pairs.get() + k / 2 * R + lane, round_to_pairs(grad[0], grad[1]));
            }
        }
    }
}

// Keys and values of a block of a page in the three shapes that products take, and their gradients so far.
template <class E, class A>
struct Block {
    Matrix<const E> keys, values, keys_down;
    A *grad_keys, *grad_values;   // (count, width)
    int64_t page, offset, count;  // offset of the first row in the pools
};

// Adds what `rows` packed rows from `at` on contribute to a block of keys, and the block to the rows' query gradients.
template <class Tile, class T>
ALWAYS_INLINE void visit_rows(const Backward<T>& w, const BackwardSpace<Tile, T>& space,
                              const Block<operand_t<Tile, T>, accumulate_t<T>>& block, int64_t at, int64_t rows,
                              accumulate_t<T>* grad_query) {
    using A = accumulate_t<T>;
    using E = operand_t<Tile, T>;
    constexpr int64_t R = kStrip<A>, kRow = BackwardSpace<Tile, T>::kBlockRows;
    constexpr bool kPairs = std::is_same_v<E, Pair>;
    const int64_t dims = w.p.head_dim, width = w.plan.width, count = block.count, depth = elements<E>(dims);
    const E* weights = reinterpret_cast<const E*>(space.weights.get());
    const E* grad_scores = reinterpret_cast<const E*>(space.grad_scores.get());
    for (int64_t r = 0; r < rows; r += R) {
        A* grad_strip = grad_query + r * dims;
        multiply_long<Tile, Start::zero, R, true, E, A>(block.keys,
                                                        {w.template across<const E>(w.query_across, at + r), R},
                                                        {space.scores.get(), R}, count, R, depth);
        multiply_long<Tile, Start::zero, R, true, E, A>(block.values,
                                                        {w.template across<const E>(w.grad_across, at + r), R},
                                                        {space.grads.get(), R}, count, R, depth);
        differentiate<Tile>(w, space, count, at + r, r, grad_strip);
        const E* across = kPairs ? space.grad_pairs.get() : grad_scores + r;
        multiply_long<Tile, Start::add, R, false, E, A>(block.keys_down, {across, kPairs ? R : kRow}, {grad_strip, R},
                                                        dims, R, elements<E>(count));
    }
    multiply_long<Tile, Start::add, 0, true, E, A>({weights, elements<E>(kRow)},
                                                   {w.template down<const E>(w.grad_down, at), width},
                                                   {block.grad_values, width}, count, width, elements<E>(rows));
    multiply_long<Tile, Start::add, 0, true, E, A>({grad_scores, elements<E>(kRow)},
                                                   {w.template down<const E>(w.query_down, at), width},
                                                   {block.grad_keys, width}, count, width, elements<E>(rows));
}

template <class T, class A = accumulate_t<T>>
ALWAYS_INLINE void store_rows(const A* from, int64_t count, int64_t head_dim, int64_t width, A factor, T* to) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < head_dim; ++d) to[i * head_dim + d] = store<T>(from[i * width + d] * factor);
    }
}

// The block of keys from `begin` on of a page, of one key head, in part `part` of the space.
template <class Tile, class T, class E = operand_t<Tile, T>, class A = accumulate_t<T>>
ALWAYS_INLINE Block<E, A> open_block(const Backward<T>& w, const BackwardSpace<Tile, T>& space, int64_t head,
                                     int64_t page, int64_t begin, int64_t part) {
    const PagedAttentionParams<T>& p = w.p;
    const int64_t size = kBlockKeys * w.plan.width, count = std::min(kBlockKeys, p.page_lengths[page] - begin);
    const int64_t offset = ((page * p.key_heads + head) * p.page_size + begin) * p.head_dim;
    const PageRows<Tile, T> keys{p.key_pages + offset, count, p.head_dim, space.keys.get() + part * size};
    const PageRows<Tile, T> values{p.value_pages + offset, count, p.head_dim, space.values.get() + part * size};
    const PageRows<Tile, T> keys_down{p.key_pages + offset, count, p.head_dim, space.keys_down.get() + part * size};
    A *grad_keys = space.grad_keys.get() + part * size, *grad_values = space.grad_values.get() + part * size;
    std::fill(grad_keys, grad_keys + size, A{0});
    std::fill(grad_values, grad_values + size, A{0});
    return {
        keys.along_dims(), values.along_dims(), keys_down.along_keys(), grad_keys, grad_values, page, offset, count};
}

template <class Tile, class T, class E, class A>
ALWAYS_INLINE void close_block(const Backward<T>& w, const Block<E, A>& block) {
    const PagedAttentionParams<T>& p = w.p;
    store_rows(block.grad_keys, block.count, p.head_dim, w.plan.width, static_cast<A>(std::abs(p.scale)),
               w.b.grad_key_pages + block.offset);
    store_rows(block.grad_values, block.count, p.head_dim, w.plan.width, A{1}, w.b.grad_value_pages + block.offset);
}

// One sample's rows against the blocks that it lists, as often as it lists them. `begun` says whether the slot holds a
// share already; returns whether it does afterwards.
template <class Tile, class T>
ALWAYS_INLINE bool visit_sample(const Backward<T>& w, const BackwardSpace<Tile, T>& space,
                                const Block<operand_t<Tile, T>, accumulate_t<T>>* blocks, int64_t taken, int64_t head,
                                const Slot& slot, bool begun) {
    using A = accumulate_t<T>;
    constexpr int64_t kRows = BackwardSpace<Tile, T>::kBlockRows;
    const Sample& sample = w.plan.samples[slot.sample];
    int64_t times[kBlocksAtOnce], all = 0;
    for (int64_t t = 0; t < taken; ++t) all += times[t] = w.ownership.listed(blocks[t].page, slot.sample);
    if (all == 0) return begun;
    for (int64_t first = 0; first < sample.padded_rows; first += kRows) {
        const int64_t rows = std::min(kRows, sample.padded_rows - first);
        A* grad_query = w.partial.get() + (head * w.ownership.slot_rows + slot.row_begin + first) * w.p.head_dim;
        if (!begun) std::fill(grad_query, grad_query + rows * w.p.head_dim, A{0});
        for (int64_t t = 0; t < taken; ++t) {
            for (int64_t i = 0; i < times[t]; ++i) {
                visit_rows<Tile>(w, space, blocks[t], head * w.plan.rows + sample.row_begin + first, rows, grad_query);
            }
        }
    }
    return true;
}

// Task: key head of a chunk of the wave. Blocks of keys are taken a few at a time: what a sample's rows bring along is
// read once for all of them.
struct PageTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const int64_t head = task % w.p.key_heads;
        const Chunk& chunk = w.ownership.chunks[w.wave.begin + task / w.p.key_heads];
        const BackwardSpace<Tile, T> space(w.plan.width);
        std::vector<bool> begun(chunk.slots.size());
        Block<operand_t<Tile, T>, A> blocks[kBlocksAtOnce];
        int64_t taken = 0;
        for (size_t i = 0; i < chunk.pages.size(); ++i) {
            const int64_t page = chunk.pages[i], length = w.p.page_lengths[page];
            for (int64_t begin = 0; begin < length; begin += kBlockKeys) {
                blocks[taken] = open_block<Tile>(w, space, head, page, begin, taken);
                const bool last = i + 1 == chunk.pages.size() && begin + kBlockKeys >= length;
                if (++taken < kBlocksAtOnce && !last) continue;
                for (size_t s = 0; s < chunk.slots.size(); ++s) {
                    begun[s] = visit_sample<Tile>(w, space, blocks, taken, head, chunk.slots[s], begun[s]);
                }
                for (int64_t t = 0; t < taken; ++t) close_block<Tile>(w, blocks[t]);
                taken = 0;
            }
        }
    }
};

// Task: key head of a row tile. Adds the shares of the wave's chunks in order.
struct GatherTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Backward<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        constexpr int64_t R = kStrip<A>;
        const PagedAttentionParams<T>& p = w.p;
        const int64_t head = task % p.key_heads, count = R * p.head_dim;
        const RowTile& tile = w.plan.tiles[task / p.key_heads];
        const Scratch<double> sum(count);
        for (int64_t first = 0; first < tile.rows; first += R) {
            const int64_t at = (head * w.plan.rows + w.plan.row_of(tile) + first) * p.head_dim;
            if (w.wave.begin > 0) {
                std::copy_n(w.total.get() + at, count, sum.get());
            } else {
                std::fill(sum.get(), sum.get() + count, 0.0);
            }
            for (size_t i = w.wave.begin; i < w.wave.end; ++i) {
                for (const Slot& slot : w.ownership.chunks[i].slots) {
                    if (slot.sample != tile.sample) continue;
                    const int64_t row = head * w.ownership.slot_rows + slot.row_begin + tile.first + first;
                    const A* share = w.partial.get() + row * p.head_dim;
                    for (int64_t d = 0; d < count; ++d) sum.get()[d] += share[d];
                }
            }
            if (w.wave.end < w.ownership.chunks.size()) {
                std::copy_n(sum.get(), count, w.total.get() + at);
                continue;
            }
            const Strip<T> strip{p, w.plan, tile, head, first, std::min(R, tile.rows - first)};
            for (int64_t r = 0; r < strip.rows; ++r) {
                T* to = w.b.grad_query + (strip.row_of(p.query, r) - p.query);
                for (int64_t d = 0; d < p.head_dim; ++d) {
                    to[d] = store<T>(static_cast<A>(sum.get()[d * R + r] * p.scale));
                }
            }
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
void differentiate_attention(const PagedAttentionBackwardParams<T>& b) {
    const PagedAttentionParams<T>& p = b.forward;
    Backward<T> w{b};
    const int64_t tiles = w.plan.tiles.size() * p.key_heads;
    for_each_task<PackTask>(tiles, w);
    for_each_task<ClearTask>(p.pages, w);
    for (const Wave& wave : w.ownership.waves) {
        w.wave = wave;
        for_each_task<PageTask>((wave.end - wave.begin) * p.key_heads, w);
        for_each_task<GatherTask>(tiles, w);
    }
    rope_cpu(RopeParams<T>{b.grad_query, p.position_ids, p.inv_freq, b.grad_query, p.tokens, p.query_heads, p.head_dim,
                           p.frequencies, p.query_heads * p.head_dim, p.head_dim, true});
}

}  // namespace hourllava_ext
