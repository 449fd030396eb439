// SPDX-License-Identifier: Apache-2.0
// Weighs each part of a query's attention by its share of the log-sum-exp.
#include "cpu/vectors.h"

namespace hourllava_ext {

// Tokens whose shares are computed side by side.
constexpr int64_t kTokens = 16;

// The shares of the parts in what up to kTokens tokens see, and their common log-sum-exps; zero shares and -inf where
// no part saw any key.
template <class Tile, class T>
struct Shares {
    using A = accumulate_t<T>;
    int64_t parts, heads, tokens;               // of all
    Scratch<A> share{heads * parts * kTokens};  // (H, S, kTokens)
    Scratch<A> total{heads * kTokens};          // (H, kTokens)

    ALWAYS_INLINE void of(const A* lse, int64_t first, int64_t count) const {
        constexpr int L = kLanes<Tile, A>;
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < count; i += L) {
                of_lanes(lse + h * tokens + first + i, std::min<int64_t>(L, count - i),
                         share.get() + h * parts * kTokens + i, total.get() + h * kTokens + i);
            }
        }
    }
    ALWAYS_INLINE void of_lanes(const A* lse, int64_t lanes, A* shares, A* totals) const {
        using V = vector_t<Tile, A>;
        constexpr A kInfinity = std::numeric_limits<A>::infinity(), kLog2E = 1.4426950408889634;
        V most = V{} - kInfinity, sum{};
        for (int64_t s = 0; s < parts; ++s) {
            const V x = load_values<Tile>(lse + s * heads * tokens, lanes);
            most = x > most ? x : most;
        }
        const V shift = most == -kInfinity ? V{} : most;
        for (int64_t s = 0; s < parts; ++s) {
            const V weight = exp2_vector((load_values<Tile>(lse + s * heads * tokens, lanes) - shift) * kLog2E);
            store_vector(shares + s * kTokens, weight);
            sum += weight;
        }
        for (int64_t s = 0; s < parts; ++s) {
            const V weight = load_vector<Tile>(shares + s * kTokens);
            store_vector(shares + s * kTokens, sum == A(0) ? V{} : weight / sum);
        }
        for (int64_t l = 0; l < lanes; ++l) totals[l] = shift[l] + std::log(sum[l]);
    }
};

// Several streams of short rows are more than the hardware looks ahead of.
template <class T>
constexpr int64_t kAhead = 1024 / sizeof(T);

// merged (width,) = the sum of the parts' rows, `stride` apart, each times its share.
template <class Tile, class T>
ALWAYS_INLINE void merge_rows(const T* out, int64_t stride, const accumulate_t<T>* share, int64_t parts, int64_t width,
                              T* merged) {
    using A = accumulate_t<T>;
    using L = Line<Tile, T>;
    int64_t i = 0;
    for (; i + L::kCount <= width; i += L::kCount) {
        L sum{};
        for (int64_t s = 0; s < parts; ++s) {
            // A part that saw no key has nothing to say, whatever lies in its rows.
            if (share[s * kTokens] == 0) continue;
            __builtin_prefetch(out + s * stride + i + kAhead<T>);
            const L line = L::load(out + s * stride + i);
            for (int part = 0; part < L::kParts; ++part) sum.parts[part] += line.parts[part] * share[s * kTokens];
        }
        sum.store(merged + i);
    }
    for (; i < width; ++i) {
        A sum = 0;
        for (int64_t s = 0; s < parts; ++s) {
            if (share[s * kTokens] != 0) sum += share[s * kTokens] * load<T>(out[s * stride + i]);
        }
        merged[i] = store<T>(sum);
    }
}

template <class Tile, class T>
ALWAYS_INLINE void merge_tokens(const MergeAttentionParams<T>& p, int64_t first, int64_t last) {
    const Shares<Tile, T> shares{p.parts, p.heads, p.tokens};
    for (int64_t begin = first; begin < last; begin += kTokens) {
        const int64_t count = std::min(kTokens, last - begin);
        shares.of(p.lse, begin, count);
        for (int64_t m = 0; m < count; ++m) {
            for (int64_t h = 0; h < p.heads; ++h) {
                const int64_t row = ((begin + m) * p.heads + h) * p.width;
                merge_rows<Tile>(p.out + row, p.tokens * p.heads * p.width,
                                 shares.share.get() + h * p.parts * kTokens + m, p.parts, p.width, p.merged + row);
                p.merged_lse[h * p.tokens + begin + m] = shares.total.get()[h * kTokens + m];
            }
        }
    }
}

// scaled (width,) = grad * share; returns the product of grad with out.
template <class Tile, class T>
ALWAYS_INLINE accumulate_t<T> scale_and_multiply(const T* grad, const T* out, accumulate_t<T> share, int64_t width,
                                                 T* scaled) {
    using A = accumulate_t<T>;
    using L = Line<Tile, T>;
    typename L::V sum{};
    int64_t i = 0;
    for (; i + L::kCount <= width; i += L::kCount) {
        __builtin_prefetch(out + i + kAhead<T>);
        __builtin_prefetch(scaled + i + kAhead<T>, 1);
        const L g = L::load(grad + i), x = L::load(out + i);
        L product;
        for (int part = 0; part < L::kParts; ++part) {
            sum += g.parts[part] * x.parts[part];
            product.parts[part] = g.parts[part] * share;
        }
        product.store(scaled + i);
    }
    A rest = 0;
    for (; i < width; ++i) {
        rest += load<T>(grad[i]) * load<T>(out[i]);
        scaled[i] = store<T>(load<T>(grad[i]) * share);
    }
    return sum_of_lanes(sum) + rest;
}

template <class Tile, class T>
ALWAYS_INLINE void merge_tokens_backward(const MergeAttentionBackwardParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    const Shares<Tile, T> shares{p.parts, p.heads, p.tokens};
    const Scratch<A> products(p.parts);
    for (int64_t begin = first; begin < last; begin += kTokens) {
        const int64_t count = std::min(kTokens, last - begin);
        shares.of(p.lse, begin, count);
        for (int64_t m = 0; m < count; ++m) {
            for (int64_t h = 0; h < p.heads; ++h) {
                const A* share = shares.share.get() + h * p.parts * kTokens + m;
                const int64_t place = h * p.tokens + begin + m, stride = p.heads * p.tokens;
                const int64_t row = ((begin + m) * p.heads + h) * p.width;
                A mean = 0;
                for (int64_t s = 0; s < p.parts; ++s) {
                    const int64_t at = row + s * stride * p.width;
                    const A product = scale_and_multiply<Tile>(p.grad_merged + row, p.out + at, share[s * kTokens],
                                                               p.width, p.grad_out + at);
                    // A part that saw no key has nothing to say, whatever lies in its rows.
                    products.get()[s] = share[s * kTokens] == 0 ? A(0) : product;
                    mean += share[s * kTokens] * products.get()[s];
                }
                for (int64_t s = 0; s < p.parts; ++s) {
                    p.grad_lse[s * stride + place] =
                        share[s * kTokens] * (products.get()[s] - mean + p.grad_merged_lse[place]);
                }
            }
        }
    }
}

CPU_KERNEL(merge_attention_cpu, MergeAttentionParams, merge_tokens, p.tokens, p.parts* p.heads* p.width)
CPU_KERNEL(merge_attention_backward_cpu, MergeAttentionBackwardParams, merge_tokens_backward, p.tokens,
           2 * p.parts * p.heads * p.width)

}  // namespace hourllava_ext
