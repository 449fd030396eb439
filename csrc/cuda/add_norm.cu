// SPDX-License-Identifier: Apache-2.0
// A block normalises a row that it reads once. The backward sums what rows add to weight and bias by chunks, whose
// number depends on the shape alone, and then the chunks in their order.
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

// Vectors of a row that a thread keeps in registers: 4096 halves a block. What lies behind them is read again.
constexpr int kHeld = 2;

// Where the vectors of a thread are: vector u of those it keeps, and the first behind them.
template <int N>
__device__ int64_t place_of(int u) {
    return (threadIdx.x + static_cast<int64_t>(u) * blockDim.x) * N;
}

// Sums of two rows, rounded as the sum of two tensors is, which the model normalises.
template <class T, int N>
__device__ void read_sums(const T* x, const T* residual, int64_t at, float (&sums)[N]) {
    const Pack<T, N> a = read<T, N>(x + at), b = read<T, N>(residual + at);
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e] = load(store<T>(load(a.at[e]) + load(b.at[e])));
}

// A thread's part of one row of x + residual.
template <class T, int N>
struct Row {
    const T *x, *residual;
    int64_t width;
    float held[kHeld][N];

    __device__ Row(const T* from, const T* other, int64_t columns) : x(from), residual(other), width(columns) {
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
            if (place_of<N>(u) < width) read_sums<T, N>(x, residual, place_of<N>(u), held[u]);
        }
    }
    // Calls visit(first column, sums) for each of its vectors.
    template <class Visit>
    __device__ void each(const Visit& visit) const {
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
            if (place_of<N>(u) < width) visit(place_of<N>(u), held[u]);
        }
        for (int64_t at = place_of<N>(kHeld); at < width; at += blockDim.x * N) {
            float sums[N];
            read_sums<T, N>(x, residual, at, sums);
            visit(at, sums);
        }
    }
};

// Block: row.
template <class T, int N>
__global__ void norm_rows(AddNormParams<T> p) {
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.width;
    const float width = static_cast<float>(p.width);
    const Row<T, N> row(p.x + begin, p.residual + begin, p.width);
    // From the first column on: the sum of a row far from zero would round away what tells its columns apart.
    float start[1] = {}, total = 0, squares = 0;
    if (p.width > 0) read_sums<T, 1>(row.x, row.residual, 0, start);
    row.each([&](int64_t, const float (&sums)[N]) {
        for (int e = 0; e < N; ++e) total += sums[e] - start[0];
    });
    const float mean = start[0] + block_sum(total) / width;
    row.each([&](int64_t, const float (&sums)[N]) {
        for (int e = 0; e < N; ++e) squares += (sums[e] - mean) * (sums[e] - mean);
    });
    const float rstd = 1 / sqrtf(block_sum(squares) / width + static_cast<float>(p.eps));
    if (threadIdx.x == 0) {
        p.mean[blockIdx.x] = mean;
        p.rstd[blockIdx.x] = rstd;
    }
    row.each([&](int64_t at, const float (&sums)[N]) {
        const Pack<T, N> weight = read<T, N>(p.weight + at), bias = read<T, N>(p.bias + at);
        Pack<T, N> out;
        for (int e = 0; e < N; ++e) {
            out.at[e] = store<T>((sums[e] - mean) * rstd * load(weight.at[e]) + load(bias.at[e]));
        }
        write(p.out + begin + at, out);
    });
}

// One vector of a row in the backward: the normalised row, and its gradient times the weight.
template <int N>
struct Part {
    float normed[N], scaled[N];
};

// Reads a vector, and adds what it has for weight and bias.
template <class T, int N>
__device__ Part<N> read_part(const AddNormBackwardParams<T>& p, int64_t row, int64_t at, float* to_weight,
                             float* to_bias) {
    float sums[N];
    read_sums<T, N>(p.x + row * p.width, p.residual + row * p.width, at, sums);
    const Pack<T, N> grad = read<T, N>(p.grad + row * p.width + at), weight = read<T, N>(p.weight + at);
    Part<N> part;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const float g = load(grad.at[e]);
        part.normed[e] = (sums[e] - p.mean[row]) * p.rstd[row];
        part.scaled[e] = g * load(weight.at[e]);
        to_weight[e] += g * part.normed[e];
        to_bias[e] += g;
    }
    return part;
}

// The two sums over a row that its gradient subtracts.
struct RowSums {
    float scaled = 0, product = 0;

    template <int N>
    __device__ void add(const Part<N>& part) {
        for (int e = 0; e < N; ++e) {
            scaled += part.scaled[e];
            product += part.scaled[e] * part.normed[e];
        }
    }
    __device__ void join(float width) {
        scaled = block_sum(scaled) / width;
        product = block_sum(product) / width;
    }
};

template <class T, int N>
__device__ void write_gradient(T* to, const Part<N>& part, const RowSums& means, float rstd) {
    Pack<T, N> out;
    for (int e = 0; e < N; ++e) {
        out.at[e] = store<T>(rstd * (part.scaled[e] - means.scaled - means.product * part.normed[e]));
    }
    write(to, out);
}

// Block: chunk of rows.
template <class T, int N>
__global__ void norm_gradients(AddNormBackwardParams<T> p) {
    float* weight_sums = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
    float* bias_sums = weight_sums + p.width;
    float to_weight[kHeld][N] = {}, to_bias[kHeld][N] = {}, nothing[2 * N] = {};
    for (int64_t at = place_of<N>(kHeld); at < p.width; at += blockDim.x * N) {
        for (int e = 0; e < N; ++e) weight_sums[at + e] = bias_sums[at + e] = 0;
    }
    const int64_t first = blockIdx.x * p.chunk_rows;
    const int64_t last = first + p.chunk_rows < p.tokens ? first + p.chunk_rows : p.tokens;
    for (int64_t row = first; row < last; ++row) {
        Part<N> held[kHeld];
        RowSums means;
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
            if (place_of<N>(u) >= p.width) continue;
            held[u] = read_part<T, N>(p, row, place_of<N>(u), to_weight[u], to_bias[u]);
            means.add(held[u]);
        }
        for (int64_t at = place_of<N>(kHeld); at < p.width; at += blockDim.x * N) {
            means.add(read_part<T, N>(p, row, at, weight_sums + at, bias_sums + at));
        }
        means.join(static_cast<float>(p.width));
        const float rstd = p.rstd[row];
        T* out = p.grad_sum + row * p.width;
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
            if (place_of<N>(u) < p.width) write_gradient<T, N>(out + place_of<N>(u), held[u], means, rstd);
        }
        for (int64_t at = place_of<N>(kHeld); at < p.width; at += blockDim.x * N) {
            write_gradient<T, N>(out + at, read_part<T, N>(p, row, at, nothing, nothing + N), means, rstd);
        }
    }
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
        if (place_of<N>(u) >= p.width) continue;
        for (int e = 0; e < N; ++e) {
            weight_sums[place_of<N>(u) + e] = to_weight[u][e];
            bias_sums[place_of<N>(u) + e] = to_bias[u][e];
        }
    }
}

// Hundreds of chunks add to a column of (2, C), so they are summed in double.
template <class T>
__global__ void sum_chunks(AddNormBackwardParams<T> p) {
    __shared__ double sums[kThreads];
    const int64_t columns = 2 * p.width, at = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
    double sum = 0;
    for (int64_t k = threadIdx.x / kWarp; k < p.chunks && at < columns; k += kThreads / kWarp) {
        sum += p.partial[k * columns + at];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kWarp || at >= columns) return;
    for (int other = threadIdx.x + kWarp; other < kThreads; other += kWarp) sum += sums[other];
    T* out = at < p.width ? p.grad_weight + at : p.grad_bias + (at - p.width);
    *out = store<T>(static_cast<float>(sum));
}

}  // namespace

template <class T>
void add_norm_cuda(const AddNormParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.x, p.residual, p.weight, p.bias, p.out}, {p.width});
    const auto kernel = vectors ? norm_rows<T, kVector<T>> : norm_rows<T, 1>;
    launch(kernel, {p.tokens}, threads_for(vectors ? p.width / kVector<T> : p.width), stream, p);
}

template <class T>
void add_norm_backward_cuda(const AddNormBackwardParams<T>& p, Stream stream) {
    const bool vectors = in_vectors<T>({p.grad, p.x, p.residual, p.weight, p.grad_sum}, {p.width});
    const auto kernel = vectors ? norm_gradients<T, kVector<T>> : norm_gradients<T, 1>;
    launch(kernel, {p.chunks}, threads_for(vectors ? p.width / kVector<T> : p.width), stream, p);
    launch(sum_chunks<T>, {divide_up(2 * p.width, kWarp)}, kThreads, stream, p);
}

#define ADD_NORM(T)                                               \
    template void add_norm_cuda(const AddNormParams<T>&, Stream); \
    template void add_norm_backward_cuda(const AddNormBackwardParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(ADD_NORM)

}  // namespace hourllava_ext
