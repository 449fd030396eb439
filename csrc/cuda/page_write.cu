// SPDX-License-Identifier: Apache-2.0
// First the slots are inverted: which pages get rows, and which token each of their rows gets. Then a block has one
// page and head, and reads and writes each byte once: new rows are rotated, stored and summarised in one pass, old rows
// are read for the summary alone. It is made of the stored rows in a fixed order, so it does not depend on how the
// writes were grouped.
#include "cuda/rotate.cuh"

namespace hourllava_ext {
namespace {

constexpr int kColumns = 16, kRowLanes = kThreads / kColumns, kWarps = kThreads / kWarp;

// Everything in it starts at -1.
struct Inverse {
    int64_t* touched;  // (1,), how many pages get rows, less one
    int64_t* index;    // (P,), place of a page among those
    int64_t* pages;    // (L,), those pages, in any order; L = min(M, P)
    int64_t* tokens;   // (L, S), the token of each of their rows

    Inverse(int64_t* scratch, int64_t all_pages, int64_t most)
        : touched(scratch), index(scratch + 1), pages(index + all_pages), tokens(pages + most) {}
};

__device__ bool claim(int64_t* entry) {
    const unsigned long long nobody = static_cast<unsigned long long>(-1), taken = static_cast<unsigned long long>(-2);
    return atomicCAS(reinterpret_cast<unsigned long long*>(entry), nobody, taken) == nobody;
}

// Thread: token. The first to reach a page lists it.
template <class T>
__global__ void list_pages(PageWriteParams<T> p, Inverse inverse) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (token >= p.tokens) return;
    const int64_t page = p.slots[token] / p.page_size;
    atomicMax(p.page_lengths + page, static_cast<int32_t>(p.slots[token] % p.page_size + 1));
    if (!claim(inverse.index + page)) return;
    const auto count = reinterpret_cast<unsigned long long*>(inverse.touched);
    const int64_t place = static_cast<int64_t>(atomicAdd(count, 1ull)) + 1;
    inverse.pages[place] = page;
    inverse.index[page] = place;
}

// Thread: token.
template <class T>
__global__ void list_tokens(PageWriteParams<T> p, Inverse inverse) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (token >= p.tokens) return;
    const int64_t page = p.slots[token] / p.page_size, row = p.slots[token] % p.page_size;
    inverse.tokens[inverse.index[page] * p.page_size + row] = token;
}

// Sum, minimum and maximum of the rows that a thread has seen, for the 2N dims of its column.
template <int N>
struct Moments {
    float sum[2 * N], low[2 * N], high[2 * N];

    __device__ Moments() {
#pragma unroll
        for (int e = 0; e < 2 * N; ++e) sum[e] = 0, low[e] = INFINITY, high[e] = -INFINITY;
    }
    template <class T>
    __device__ void add(const Pack<T, N>& pack, int offset) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
            const float x = load(pack.at[e]);
            sum[offset + e] += x;
            low[offset + e] = x < low[offset + e] ? x : low[offset + e];
            high[offset + e] = x > high[offset + e] ? x : high[offset + e];
        }
    }
};

// What the warps of a block found, for kColumns columns.
template <int N>
struct SharedMoments {
    float sum[kWarps][kColumns * 2 * N], low[kWarps][kColumns * 2 * N], high[kWarps][kColumns * 2 * N];
};

// A column of one row: from the token that is new there to the page, or, without one, from the page.
template <class T, int N>
__device__ void take_row(const PageWriteParams<T>& p, int64_t token, int64_t head, T* keys, T* values,
                         const HeadColumns<N>& columns, int64_t column, Moments<N>& moments) {
    const bool pair = columns.turns(column);
    const int64_t first = columns.first(column), second = columns.second(column);
    const T* key = token < 0 ? keys : p.key + token * p.key_token_stride + head * p.key_head_stride;
    Pack<T, N> a = read<T, N>(key + first), b{};
    if (pair) b = read<T, N>(key + second);
    if (token >= 0) {
        const T* value = p.value + token * p.value_token_stride + head * p.value_head_stride;
        const Pack<T, N> c = read<T, N>(value + first);
        write(values + first, c);
        if (pair) {
            const Pack<T, N> d = read<T, N>(value + second);
            write(values + second, d);
            turn(a, b, rotation<T, N>(p.position_ids[token], p.inv_freq + column * N, false));
            write(keys + second, b);
        }
        write(keys + first, a);
    }
    moments.add(a, 0);
    if (pair) moments.add(b, N);
}

// The block's moments to the summary (3, D) of its page and head.
template <int N>
__device__ void summarize(Moments<N>& moments, SharedMoments<N>& shared, const HeadColumns<N>& columns, int64_t begin,
                          int64_t filled, float* summary, int64_t width) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int e = 0; e < 2 * N; ++e) {
        // A warp holds two row lanes of every column.
        moments.sum[e] += __shfl_xor_sync(kWholeWarp, moments.sum[e], kColumns);
        moments.low[e] = fminf(moments.low[e], __shfl_xor_sync(kWholeWarp, moments.low[e], kColumns));
        moments.high[e] = fmaxf(moments.high[e], __shfl_xor_sync(kWholeWarp, moments.high[e], kColumns));
        if (lane >= kColumns) continue;
        const int place = lane * 2 * N + e;
        shared.sum[warp][place] = moments.sum[e];
        shared.low[warp][place] = moments.low[e];
        shared.high[warp][place] = moments.high[e];
    }
    __syncthreads();
    for (int place = threadIdx.x; place < kColumns * 2 * N; place += kThreads) {
        const int64_t column = begin + place / (2 * N), e = place % (2 * N);
        if (column >= columns.count || (e >= N && !columns.turns(column))) continue;
        const int64_t dim = e < N ? columns.first(column) + e : columns.second(column) + e - N;
        double sum = 0;
        float low = INFINITY, high = -INFINITY;
        for (int w = 0; w < kWarps; ++w) {
            sum += shared.sum[w][place];
            low = fminf(low, shared.low[w][place]);
            high = fmaxf(high, shared.high[w][place]);
        }
        summary[dim] = static_cast<float>(sum / static_cast<double>(filled));
        summary[width + dim] = low;
        summary[2 * width + dim] = high;
    }
    __syncthreads();
}

// Block: page that gets rows, and head. kRowLanes rows at a time, kColumns threads a row; few enough registers that a
// multiprocessor has two blocks, to have reads of one in flight while the other writes.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2) write_pages(PageWriteParams<T> p, Inverse inverse) {
    __shared__ SharedMoments<N> shared;
    if (static_cast<int64_t>(blockIdx.x) > *inverse.touched) return;
    const int64_t page = inverse.pages[blockIdx.x], head = blockIdx.y, filled = p.page_lengths[page];
    const int64_t begin = (page * p.heads + head) * p.page_size * p.width;
    const int64_t* tokens = inverse.tokens + blockIdx.x * p.page_size;
    const HeadColumns<N> columns(p.width, p.frequencies);
    for (int64_t first = 0; first < columns.count; first += kColumns) {
        const int64_t column = first + threadIdx.x % kColumns;
        Moments<N> moments;
        for (int64_t row = threadIdx.x / kColumns; row < filled && column < columns.count; row += kRowLanes) {
            const int64_t at = begin + row * p.width;
            take_row(p, tokens[row], head, p.key_pages + at, p.value_pages + at, columns, column, moments);
        }
        summarize(moments, shared, columns, first, filled, p.key_summary + (page * p.heads + head) * 3 * p.width,
                  p.width);
    }
}

// A thread has one column of a token, as in rope.
template <class T, int N>
__global__ void read_gradients(PageWriteBackwardParams<T> p, Lanes lanes) {
    const int64_t token = lanes.row();
    if (token >= p.tokens) return;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * kHeads, stride = p.page_size * p.width;
    const int heads = static_cast<int>(p.heads - head < kHeads ? p.heads - head : kHeads);
    const HeadColumns<N> columns(p.width, p.frequencies);
    const int64_t page = p.slots[token] / p.page_size, row = p.slots[token] % p.page_size;
    const int64_t from = ((page * p.heads + head) * p.page_size + row) * p.width;
    const int64_t to = (token * p.heads + head) * p.width;
    for (int64_t c = lanes.column(); c < columns.count; c += lanes.columns) {
        Rotation<N> r{};
        if (columns.turns(c)) r = rotation<T, N>(p.position_ids[token], p.inv_freq + c * N, true);
        turn_heads<T, N>(p.grad_key_pages + from, stride, p.grad_key + to, p.width, heads, columns, c, &r);
        turn_heads<T, N>(p.grad_value_pages + from, stride, p.grad_value + to, p.width, heads, columns, c, nullptr);
    }
}

template <class T, int N>
void read_columns(const PageWriteBackwardParams<T>& p, Stream stream) {
    const Lanes lanes(HeadColumns<N>(p.width, p.frequencies).count);
    const Grid grid{lanes.blocks(p.tokens), divide_up(p.heads, kHeads)};
    launch(read_gradients<T, N>, grid, lanes.threads(), stream, p, lanes);
}

int64_t most_touched(int64_t tokens, int64_t pages) { return tokens < pages ? tokens : pages; }

}  // namespace

int64_t page_write_cuda_scratch(int64_t tokens, int64_t pages, int64_t page_size) {
    return 1 + pages + most_touched(tokens, pages) * (1 + page_size);
}

template <class T>
void page_write_cuda(const PageWriteParams<T>& p, int64_t* scratch, Stream stream) {
    const int64_t most = most_touched(p.tokens, p.pages);
    fill_bytes(scratch, 0xff, page_write_cuda_scratch(p.tokens, p.pages, p.page_size) * sizeof(int64_t), stream);
    const Inverse inverse(scratch, p.pages, most);
    launch(list_pages<T>, {divide_up(p.tokens, kThreads)}, kThreads, stream, p, inverse);
    launch(list_tokens<T>, {divide_up(p.tokens, kThreads)}, kThreads, stream, p, inverse);
    const bool vectors = in_vectors<T>(
        {p.key, p.value, p.key_pages, p.value_pages},
        {p.width, p.frequencies, p.key_token_stride, p.key_head_stride, p.value_token_stride, p.value_head_stride});
    const auto kernel = vectors ? write_pages<T, kVector<T>> : write_pages<T, 1>;
    launch(kernel, {most, p.heads}, kThreads, stream, p, inverse);
}

template <class T>
void page_write_backward_cuda(const PageWriteBackwardParams<T>& p, Stream stream) {
    if (in_vectors<T>({p.grad_key_pages, p.grad_value_pages, p.grad_key, p.grad_value}, {p.width, p.frequencies})) {
        read_columns<T, kVector<T>>(p, stream);
    } else {
        read_columns<T, 1>(p, stream);
    }
}

#define PAGE_WRITE(T)                                                           \
    template void page_write_cuda(const PageWriteParams<T>&, int64_t*, Stream); \
    template void page_write_backward_cuda(const PageWriteBackwardParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(PAGE_WRITE)

}  // namespace hourllava_ext
