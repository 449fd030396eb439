// SPDX-License-Identifier: Apache-2.0
// A row is read once and normalised in the cache. The backward sums what rows add to weight and bias by chunks, whose
// number depends on the shape alone, and then the chunks in their order.
#include "cpu/vectors.h"

namespace hourllava_ext {

// float16 alone is converted by the vector: of the others' conversions the compiler makes vectors itself.
template <class T>
constexpr bool kByVector = std::is_same_v<T, float16>;

template <class T>
ALWAYS_INLINE void widen_row(const T* from, int64_t count, accumulate_t<T>* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] = load<T>(from[i]);
}

// The sum of row[i] - shift, or of its squares, in a fixed order: 32 running sums, so that an addition need not wait
// for the last.
template <bool Squares, class A>
ALWAYS_INLINE A sum_row(const A* row, int64_t count, A shift) {
    constexpr int64_t kSums = 32;
    A sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int64_t l = 0; l < kSums; ++l) {
            const A apart = row[i + l] - shift;
            sums[l] += Squares ? apart * apart : apart;
        }
    }
    for (int64_t l = 0; i < count; ++i, ++l) {
        const A apart = row[i] - shift;
        sums[l] += Squares ? apart * apart : apart;
    }
    for (int64_t width = kSums / 2; width > 0; width /= 2) {
        for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    return sums[0];
}

// Rounded as the sum of two tensors is, which the model normalises.
template <class Tile, class T, class A>
ALWAYS_INLINE void add_rows(const T* __restrict x, const T* __restrict residual, int64_t count, A* __restrict sums) {
    int64_t i = 0;
    if constexpr (kByVector<T>) {
        constexpr int L = kLanes<Tile, A>;
        for (; i + L <= count; i += L) {
            const auto sum = narrow<Tile, T>(load_lanes<Tile>(x + i) + load_lanes<Tile>(residual + i));
            store_vector(sums + i, widen<Tile>(sum, T{}));
        }
    }
    for (; i < count; ++i) sums[i] = load<T>(store<T>(load<T>(x[i]) + load<T>(residual[i])));
}

template <class Tile, class T, class A>
ALWAYS_INLINE void write_row(const A* __restrict sums, const A* __restrict weight, const A* __restrict bias,
                             int64_t count, A mean, A rstd, T* __restrict out) {
    int64_t i = 0;
    if constexpr (kByVector<T>) {
        constexpr int L = kLanes<Tile, A>;
        for (; i + L <= count; i += L) {
            const auto normed = (load_vector<Tile>(sums + i) - mean) * rstd;
            const auto result = normed * load_vector<Tile>(weight + i) + load_vector<Tile>(bias + i);
            store_vector(out + i, narrow<Tile, T>(result));
        }
    }
    for (; i < count; ++i) out[i] = store<T>((sums[i] - mean) * rstd * weight[i] + bias[i]);
}

// Tasks: rows.
struct NormRows {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const AddNormParams<T>& p, int64_t first, int64_t last) {
        using A = accumulate_t<T>;
        const Scratch<A> sums(p.width), weight(p.width), bias(p.width);
        widen_row(p.weight, p.width, weight.get());
        widen_row(p.bias, p.width, bias.get());
        for (int64_t m = first; m < last; ++m) {
            add_rows<Tile>(p.x + m * p.width, p.residual + m * p.width, p.width, sums.get());
            // From the first column on: the sum of a row far from zero would round away what tells its columns apart.
            const A start = p.width > 0 ? sums.get()[0] : A(0);
            const A mean = start + sum_row<false>(sums.get(), p.width, start) / p.width;
            const A variance = sum_row<true>(sums.get(), p.width, mean) / p.width;
            const A rstd = 1 / std::sqrt(variance + static_cast<A>(p.eps));
            p.mean[m] = mean;
            p.rstd[m] = rstd;
            write_row<Tile>(sums.get(), weight.get(), bias.get(), p.width, mean, rstd, p.out + m * p.width);
        }
    }
};

// A row's normalised columns, its gradient times the weight, and what it adds to the gradients of weight and bias.
template <class Tile, class T, class A>
ALWAYS_INLINE void add_gradients(const T* __restrict grad, const A* __restrict weight, int64_t count, A mean, A rstd,
                                 A* __restrict normed, A* __restrict scaled, A* __restrict to_weight,
                                 A* __restrict to_bias) {
    int64_t i = 0;
    if constexpr (kByVector<T>) {
        constexpr int L = kLanes<Tile, A>;
        for (; i + L <= count; i += L) {
            const auto g = load_lanes<Tile>(grad + i);
            const auto row = (load_vector<Tile>(normed + i) - mean) * rstd;
            store_vector(normed + i, row);
            store_vector(scaled + i, g * load_vector<Tile>(weight + i));
            store_vector(to_weight + i, load_vector<Tile>(to_weight + i) + g * row);
            store_vector(to_bias + i, load_vector<Tile>(to_bias + i) + g);
        }
    }
    for (; i < count; ++i) {
        const A g = load<T>(grad[i]);
        normed[i] = (normed[i] - mean) * rstd;
        scaled[i] = g * weight[i];
        to_weight[i] += g * normed[i];
        to_bias[i] += g;
    }
}

template <class Tile, class T, class A>
ALWAYS_INLINE void write_gradient(const A* __restrict normed, const A* __restrict scaled, int64_t count, A rstd,
                                  T* __restrict out) {
    const A shift = sum_row<false>(scaled, count, A(0)) / count, slope = dot<A>(scaled, normed, count) / count;
    int64_t i = 0;
    if constexpr (kByVector<T>) {
        constexpr int L = kLanes<Tile, A>;
        for (; i + L <= count; i += L) {
            const auto apart = load_vector<Tile>(scaled + i) - shift - slope * load_vector<Tile>(normed + i);
            store_vector(out + i, narrow<Tile, T>(rstd * apart));
        }
    }
    for (; i < count; ++i) out[i] = store<T>(rstd * (scaled[i] - shift - slope * normed[i]));
}

// Tasks: chunks of rows.
struct NormGradients {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const AddNormBackwardParams<T>& p, int64_t first, int64_t last) {
        using A = accumulate_t<T>;
        const Scratch<A> weight(p.width), normed(p.width), scaled(p.width);
        widen_row(p.weight, p.width, weight.get());
        for (int64_t k = first; k < last; ++k) {
            A* to_weight = p.partial + 2 * k * p.width;
            std::fill(to_weight, to_weight + 2 * p.width, A(0));
            for (int64_t m = k * p.chunk_rows; m < std::min(p.tokens, (k + 1) * p.chunk_rows); ++m) {
                add_rows<Tile>(p.x + m * p.width, p.residual + m * p.width, p.width, normed.get());
                add_gradients<Tile>(p.grad + m * p.width, weight.get(), p.width, p.mean[m], p.rstd[m], normed.get(),
                                    scaled.get(), to_weight, to_weight + p.width);
                write_gradient<Tile>(normed.get(), scaled.get(), p.width, p.rstd[m], p.grad_sum + m * p.width);
            }
        }
    }
};

// Tasks: columns of (2, C). Hundreds of chunks add to each, so they are summed in double.
struct ChunkSums {
    template <class Tile, class T>
    ALWAYS_INLINE static void run(const AddNormBackwardParams<T>& p, int64_t first, int64_t last) {
        const Scratch<double> buffer(last - first);
        double* __restrict sum = buffer.get();
        std::fill(sum, sum + (last - first), 0.0);
        for (int64_t k = 0; k < p.chunks; ++k) {
            const accumulate_t<T>* __restrict partial = p.partial + 2 * k * p.width + first;
            for (int64_t c = 0; c < last - first; ++c) sum[c] += partial[c];
        }
        for (int64_t c = first; c < last; ++c) {
            T& out = c < p.width ? p.grad_weight[c] : p.grad_bias[c - p.width];
            out = store<T>(sum[c - first]);
        }
    }
};

template <class Body, class Params>
static void in_parallel(const Params& p, int64_t tasks, int64_t work) {
    parallel_for(0, tasks, grain_of(work), [&p](int64_t b, int64_t e) { run_on_tier<Body>(p, b, e); });
}

#define ADD_NORM(T)                                                                               \
    void add_norm_cpu(const AddNormParams<T>& p) { in_parallel<NormRows>(p, p.tokens, p.width); } \
    void add_norm_backward_cpu(const AddNormBackwardParams<T>& p) {                               \
        in_parallel<NormGradients>(p, p.chunks, p.chunk_rows * p.width);                          \
        in_parallel<ChunkSums>(p, 2 * p.width, p.chunks);                                         \
    }
FOR_EACH_DTYPE(ADD_NORM)

}  // namespace hourllava_ext
