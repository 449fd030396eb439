// SPDX-License-Identifier: Apache-2.0
// Scores the pages of each sample by the largest product any of their keys could have with a query, and keeps the best.
// Sums run over fixed tiles of rows, and tiles are added in order, so threads cannot change a choice.
#include <vector>

#include "cpu/products.h"

namespace hourllava_ext {
namespace {

constexpr int64_t kTileRows = 64;  // tokens x heads of a group that one task scores

template <class A>
struct RetrieveSample {
    std::vector<int64_t> pages;  // non-empty pages of the table, ascending
    std::vector<A> log_lengths;  // of each, to base 2, minus infinity in the padding
    int64_t token_begin, rows;   // rows: tokens x query heads of one key head
    int64_t width;               // pages, in whole lines
    int64_t box_begin;           // in `boxes`
    int64_t tile_begin, tiles;   // tiles of every key head
    int64_t score_begin;         // in `scores`
};

template <class T>
struct Retrieval {
    using A = accumulate_t<T>;
    const RetrieveParams<T>& p;
    int64_t group = p.query_heads / p.key_heads, dims = p.last_dim - p.first_dim;
    int64_t box_size = 0, score_size = 0, tile_count = 0;
    std::vector<RetrieveSample<A>> samples = list_samples();
    Scratch<T> turned{p.tokens * p.query_heads * p.head_dim};  // (M, Hq, D)
    Scratch<A> boxes{box_size};     // per sample and key head: maxima above minima, (2 dims, width)
    Scratch<A> scores{score_size};  // per sample and tile: (width,)

    std::vector<RetrieveSample<A>> list_samples() {
        std::vector<RetrieveSample<A>> list;
        for (int64_t b = 0; b < p.batch; ++b) list.push_back(list_sample(b));
        return list;
    }

    RetrieveSample<A> list_sample(int64_t b) {
        RetrieveSample<A> s{};
        for (int64_t i = 0; i < p.listed; ++i) {
            const int64_t page = p.page_table[b * p.listed + i];
            if (page >= 0 && p.page_lengths[page] > 0) s.pages.push_back(page);
        }
        std::sort(s.pages.begin(), s.pages.end());
        s.width = round_up(s.pages.size(), kLine<A>);
        s.log_lengths.assign(s.width, -std::numeric_limits<A>::infinity());
        for (size_t i = 0; i < s.pages.size(); ++i) s.log_lengths[i] = std::log2(A(p.page_lengths[s.pages[i]]));
        s.token_begin = p.cu_seqlens[b];
        s.rows = (p.cu_seqlens[b + 1] - s.token_begin) * group;
        s.box_begin = box_size, s.tile_begin = tile_count, s.score_begin = score_size;
        s.tiles = p.key_heads * ((s.rows + kTileRows - 1) / kTileRows);
        box_size += p.key_heads * 2 * dims * s.width;
        tile_count += s.tiles;
        score_size += s.tiles * s.width;
        return s;
    }
};

// Task: sample. Summaries side by side, so that pages are the lanes.
struct BoxTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Retrieval<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const RetrieveSample<A>& s = w.samples[task];
        for (int64_t head = 0; head < w.p.key_heads; ++head) {
            A* box = w.boxes.get() + s.box_begin + head * 2 * w.dims * s.width;
            std::fill(box, box + 2 * w.dims * s.width, A{0});
            for (size_t i = 0; i < s.pages.size(); ++i) {
                const A* summary = w.p.key_summary + (s.pages[i] * w.p.key_heads + head) * 3 * w.p.head_dim;
                const A *low = summary + w.p.head_dim + w.p.first_dim, *high = low + w.p.head_dim;
                for (int64_t d = 0; d < w.dims; ++d) {
                    box[d * s.width + i] = high[d];
                    box[(w.dims + d) * s.width + i] = low[d];
                }
            }
        }
    }
};

// Adds the softmax of a row of bounds (width,) to the scores.
template <class Tile, class A>
ALWAYS_INLINE void add_softmax(A* bounds, const RetrieveSample<A>& s, A scale, A* scores) {
    using V = vector_t<Tile, A>;
    constexpr int64_t L = kLanes<Tile, A>;
    V most = V{} - std::numeric_limits<A>::infinity(), sum{};
    for (int64_t i = 0; i < s.width; i += L) {
        const V weight = load_vector<Tile>(bounds + i) * scale + load_vector<Tile>(s.log_lengths.data() + i);
        store_vector(bounds + i, weight);
        most = weight > most ? weight : most;
    }
    const A largest = largest_lane(most);
    for (int64_t i = 0; i < s.width; i += L) {
        const V weight = exp2_vector(load_vector<Tile>(bounds + i) - largest);
        store_vector(bounds + i, weight);
        sum += weight;
    }
    const A inverse = 1 / sum_of_lanes(sum);
    for (int64_t i = 0; i < s.width; i += L) {
        store_vector(scores + i, load_vector<Tile>(scores + i) + load_vector<Tile>(bounds + i) * inverse);
    }
}

// Task: row tile of a key head of a sample.
struct ScoreTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Retrieval<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const auto next = std::upper_bound(w.samples.begin(), w.samples.end(), task,
                                           [](int64_t t, const RetrieveSample<A>& s) { return t < s.tile_begin; });
        const RetrieveSample<A>& s = *(next - 1);
        const int64_t tiles = s.tiles / w.p.key_heads, tile = task - s.tile_begin;
        const int64_t head = tile / tiles, first = tile % tiles * kTileRows, last = std::min(first + kTileRows, s.rows);
        A* scores = w.scores.get() + s.score_begin + tile * s.width;
        std::fill(scores, scores + s.width, A{0});
        const Matrix<const A> box{w.boxes.get() + s.box_begin + head * 2 * w.dims * s.width, s.width};
        const Scratch<A> signs(Tile::rows * 2 * w.dims), bounds(Tile::rows * s.width);
        for (int64_t strip = first; strip < last; strip += Tile::rows) {
            const int64_t rows = std::min<int64_t>(Tile::rows, last - strip);
            std::fill(signs.get(), signs.get() + Tile::rows * 2 * w.dims, A{0});
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t token = s.token_begin + (strip + r) / w.group, member = (strip + r) % w.group;
                const T* query = w.turned.get() + (token * w.p.query_heads + head * w.group + member) * w.p.head_dim;
                A* line = signs.get() + r * 2 * w.dims;
                for (int64_t d = 0; d < w.dims; ++d) {
                    const A x = load<T>(query[w.p.first_dim + d]);
                    line[d] = x > 0 ? x : 0;
                    line[w.dims + d] = x < 0 ? x : 0;
                }
            }
            multiply_strip<Tile, Start::zero, 0, true, A, A>({signs.get(), 2 * w.dims}, box, {bounds.get(), s.width},
                                                             Tile::rows, s.width, 2 * w.dims);
            // Weights are powers of two.
            const A scale = 1.4426950408889634 / std::sqrt(A(w.p.head_dim));
            for (int64_t r = 0; r < rows; ++r) add_softmax<Tile>(bounds.get() + r * s.width, s, scale, scores);
        }
    }
};

// Task: sample. The best pages, ascending; of equal scores the lower page wins.
struct ChooseTask {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const Retrieval<T>& w, int64_t task) {
        using A = accumulate_t<T>;
        const RetrieveSample<A>& s = w.samples[task];
        const int64_t count = s.pages.size(), kept = std::min(count, w.p.kept);
        std::vector<A> score(s.width, A{0});
        for (int64_t tile = 0; tile < s.tiles; ++tile) {
            const A* share = w.scores.get() + s.score_begin + tile * s.width;
            for (int64_t i = 0; i < s.width; ++i) score[i] += share[i];
        }
        std::vector<int64_t> order(count);
        for (int64_t i = 0; i < count; ++i) {
            order[i] = i;
            if (w.p.keep && w.p.keep[s.pages[i]]) score[i] = std::numeric_limits<A>::infinity();
            // A NaN has no place in an order: such a page comes last.
            else if (std::isnan(score[i]))
                score[i] = -std::numeric_limits<A>::infinity();
        }
        std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&score](int64_t a, int64_t b) {
            return score[a] != score[b] ? score[a] > score[b] : a < b;
        });
        std::sort(order.begin(), order.begin() + kept);
        int32_t* shorter = w.p.shorter + task * w.p.kept;
        for (int64_t i = 0; i < w.p.kept; ++i) shorter[i] = i < kept ? s.pages[order[i]] : -1;
    }
};

template <class T>
void choose_pages(const RetrieveParams<T>& p) {
    const Retrieval<T> w{p};
    rope_cpu(RopeParams<T>{p.query, p.position_ids, p.inv_freq, w.turned.get(), p.tokens, p.query_heads, p.head_dim,
                           p.frequencies, p.query_heads * p.head_dim, p.head_dim, false});
    for_each_task<BoxTask>(p.batch, w);
    for_each_task<ScoreTask>(w.tile_count, w);
    for_each_task<ChooseTask>(p.batch, w);
}

}  // namespace

void retrieve_cpu(const RetrieveParams<float>& p) { choose_pages(p); }
void retrieve_cpu(const RetrieveParams<double>& p) { choose_pages(p); }
void retrieve_cpu(const RetrieveParams<float16>& p) { choose_pages(p); }
void retrieve_cpu(const RetrieveParams<bfloat16>& p) { choose_pages(p); }

}  // namespace hourllava_ext
