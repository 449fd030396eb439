// SPDX-License-Identifier: Apache-2.0
// Scores the pages of each sample by the largest product any of their keys could have with a query, and keeps the best.
// Each sample's pages are put in order first, sums have a fixed order, and counts alone use atomics: neither the order
// of a table nor a second run changes a choice. Nothing waits for the device.
#include "cuda/common.cuh"

namespace hourllava_ext {
namespace {

constexpr int kTile = 64, kDims = 16;  // rows and pages of a tile of bounds, and dims that are loaded at a time
constexpr int kSide = 4;               // rows and pages of a tile that one thread has
constexpr int kLine = kTile + 4;       // a line of shared memory, padded so that columns lie in different banks
constexpr int kDigits = 256;
constexpr int64_t kBlocks = 528;  // enough to fill a GPU

// Scratch on the device; rows are tokens x query heads of a key head.
template <class T>
struct Retrieval {
    T* turned;        // (M, Hq, D)
    float* lse;       // (splits, Hkv, M * G)
    float* scores;    // (B, parts, W), part: share of the rows, and key head
    uint32_t* order;  // (B, W), scores as integers in the same order
    int32_t* listed;  // (B, P), how often a sample lists a page that has rows
    int32_t* pages;   // (B, W), those pages, ascending
    int32_t* found;   // (B,), how many
    int64_t splits;   // of the pages, where queries are few
    int64_t shares;   // of the rows
    int64_t rows;     // M * G
    int64_t bytes = 0;

    Retrieval(const RetrieveParams<T>& p, void* scratch) : rows(p.tokens * (p.query_heads / p.key_heads)) {
        const int64_t row_tiles = divide_up(rows, kTile) + p.batch, page_tiles = divide_up(p.listed, kTile);
        splits = clamp(kBlocks / (row_tiles * p.key_heads + 1), page_tiles < 16 ? page_tiles : 16);
        shares = clamp(kBlocks / (page_tiles * p.key_heads * p.batch + 1), row_tiles < 64 ? row_tiles : 64);
        char* next = static_cast<char*>(scratch);
        turned = take<T>(next, p.tokens * p.query_heads * p.head_dim);
        lse = take<float>(next, splits * p.key_heads * rows);
        scores = take<float>(next, p.batch * parts(p) * p.listed);
        order = take<uint32_t>(next, p.batch * p.listed);
        listed = take<int32_t>(next, p.batch * p.pages);
        pages = take<int32_t>(next, p.batch * p.listed);
        found = take<int32_t>(next, p.batch);
    }
    __host__ __device__ int64_t parts(const RetrieveParams<T>& p) const { return shares * p.key_heads; }

  private:
    static int64_t clamp(int64_t count, int64_t most) { return count > most ? most : count < 1 ? 1 : count; }
    template <class Entry>
    Entry* take(char* scratch, int64_t count) {
        Entry* begin = reinterpret_cast<Entry*>(scratch + bytes);
        bytes += divide_up(count * sizeof(Entry), 16) * 16;
        return begin;
    }
};

// The sum of the values of earlier threads, and `total` of all; for blocks of kThreads.
__device__ int exclusive_sum(int value, int& total) {
    __shared__ int sums[kThreads / kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int inclusive = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == kWarp - 1) sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    __syncthreads();
    return before + inclusive - value;
}

// Thread: entry of the table.
template <class T>
__global__ void count_pages(RetrieveParams<T> p, Retrieval<T> w) {
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (entry >= p.batch * p.listed) return;
    const int64_t page = p.page_table[entry];
    if (page >= 0 && p.page_lengths[page] > 0) atomicAdd(w.listed + entry / p.listed * p.pages + page, 1);
}

// Block: sample.
template <class T>
__global__ void order_pages(RetrieveParams<T> p, Retrieval<T> w) {
    const int64_t sample = blockIdx.x;
    int32_t* pages = w.pages + sample * p.listed;
    int found = 0;
    for (int64_t first = 0; first < p.pages; first += kThreads) {
        const int64_t page = first + threadIdx.x;
        const int times = page < p.pages ? w.listed[sample * p.pages + page] : 0;
        int total;
        const int place = found + exclusive_sum(times, total);
        for (int i = 0; i < times; ++i) pages[place + i] = static_cast<int32_t>(page);
        found += total;
    }
    if (threadIdx.x == 0) w.found[sample] = found;
}

// kTile rows of one sample.
struct RowTile {
    int64_t sample = -1, token = 0;  // the sample's first token
    int64_t first = 0, rows = 0;     // the tile's first row, and the sample's rows

    __device__ RowTile(const int64_t* cu_seqlens, int64_t sample, int64_t group, int64_t tile)
        : sample(sample),
          token(cu_seqlens[sample]),
          first(tile * kTile),
          rows((cu_seqlens[sample + 1] - cu_seqlens[sample]) * group) {}
    // The samples' tiles follow each other, so that the host need not know lengths.
    __device__ RowTile(const int64_t* cu_seqlens, int64_t batch, int64_t group, int64_t tile, bool) {
        int64_t begin = 0;
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t all = (cu_seqlens[b + 1] - cu_seqlens[b]) * group, tiles = (all + kTile - 1) / kTile;
            if (tile >= begin && tile < begin + tiles) {
                sample = b, token = cu_seqlens[b], first = (tile - begin) * kTile, rows = all;
            }
            begin += tiles;
        }
    }
};

struct TileMemory {
    alignas(16) float query[kDims][kLine], low[kDims][kLine], high[kDims][kLine];
    int64_t query_at[kTile], summary_at[kTile];  // offsets, -1 where there is no row or page
    float log_length[kTile], joint[kTile];
};

// Where the rows and pages of a tile lie.
template <class T>
__device__ void place_tile(const RetrieveParams<T>& p, const Retrieval<T>& w, const RowTile& tile, int64_t head,
                           int64_t first_page, TileMemory& memory) {
    const int64_t group = p.query_heads / p.key_heads;
    __syncthreads();
    if (threadIdx.x < kTile) {
        const int64_t row = tile.first + threadIdx.x, place = first_page + threadIdx.x;
        const int64_t token = tile.token + row / group, member = head * group + row % group;
        memory.query_at[threadIdx.x] = row < tile.rows ? (token * p.query_heads + member) * p.head_dim : -1;
        const bool there = place < w.found[tile.sample];
        const int64_t page = there ? w.pages[tile.sample * p.listed + place] : 0;
        memory.summary_at[threadIdx.x] = there ? (page * p.key_heads + head) * 3 * p.head_dim : -1;
        memory.log_length[threadIdx.x] = there ? logf(static_cast<float>(p.page_lengths[page])) : 0;
    }
    __syncthreads();
}

// Scaled bounds plus the logarithms of the lengths, of the kSide rows and pages of a thread; minus infinity where there
// is no page.
template <class T>
__device__ void bounds(const RetrieveParams<T>& p, const Retrieval<T>& w, TileMemory& memory,
                       float (&weight)[kSide][kSide]) {
    const int row = threadIdx.x / (kTile / kSide) * kSide, page = threadIdx.x % (kTile / kSide) * kSide;
    float sum[kSide][kSide] = {};
    for (int64_t first = p.first_dim; first < p.last_dim; first += kDims) {
        for (int i = threadIdx.x; i < kTile * kDims; i += kThreads) {
            const int line = i % kDims, place = i / kDims;
            const int64_t dim = first + line, query = memory.query_at[place], box = memory.summary_at[place];
            const bool inside = dim < p.last_dim;
            memory.query[line][place] = inside && query >= 0 ? load(w.turned[query + dim]) : 0;
            memory.low[line][place] = inside && box >= 0 ? p.key_summary[box + p.head_dim + dim] : 0;
            memory.high[line][place] = inside && box >= 0 ? p.key_summary[box + 2 * p.head_dim + dim] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int line = 0; line < kDims; ++line) {
            const Pack<float, kSide> query = read<float, kSide>(memory.query[line] + row);
            const Pack<float, kSide> low = read<float, kSide>(memory.low[line] + page);
            const Pack<float, kSide> high = read<float, kSide>(memory.high[line] + page);
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
                const float up = query.at[i] > 0 ? query.at[i] : 0, down = query.at[i] < 0 ? query.at[i] : 0;
#pragma unroll
                for (int j = 0; j < kSide; ++j) sum[i][j] += up * high.at[j] + down * low.at[j];
            }
        }
        __syncthreads();
    }
    const float scale = 1 / sqrtf(static_cast<float>(p.head_dim));
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
            const bool there = memory.summary_at[page + j] >= 0;
            weight[i][j] = there ? sum[i][j] * scale + memory.log_length[page + j] : -INFINITY;
        }
    }
}

// exp(a) + exp(b), as a logarithm.
__device__ float log_add(float a, float b) {
    const float largest = fmaxf(a, b);
    return largest == -INFINITY ? largest : largest + logf(expf(a - largest) + expf(b - largest));
}

// Block: row tile, key head, split of the pages. Each row's log-sum-exp over the pages of the split.
template <class T>
__global__ void normalize(RetrieveParams<T> p, Retrieval<T> w) {
    __shared__ TileMemory memory;
    const RowTile tile(p.cu_seqlens, p.batch, p.query_heads / p.key_heads, blockIdx.x, true);
    if (tile.sample < 0) return;
    const int64_t head = blockIdx.y, split = blockIdx.z;
    float largest[kSide], total[kSide];
    for (int i = 0; i < kSide; ++i) largest[i] = -INFINITY, total[i] = 0;
    for (int64_t first = split * kTile; first < w.found[tile.sample]; first += w.splits * kTile) {
        place_tile(p, w, tile, head, first, memory);
        float weight[kSide][kSide];
        bounds(p, w, memory, weight);
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
            float most = largest[i];
            for (int j = 0; j < kSide; ++j) most = fmaxf(most, weight[i][j]);
            if (most == -INFINITY) continue;
            total[i] *= expf(largest[i] - most);
            for (int j = 0; j < kSide; ++j) total[i] += expf(weight[i][j] - most);
            largest[i] = most;
        }
    }
    for (int i = 0; i < kSide; ++i) {
        float joint = largest[i] + logf(total[i]);
        // The threads of a row are side by side in half a warp.
        for (int step = kTile / kSide / 2; step > 0; step /= 2) {
            joint = log_add(joint, __shfl_xor_sync(kWholeWarp, joint, step));
        }
        const int64_t row = tile.first + threadIdx.x / (kTile / kSide) * kSide + i;
        if (threadIdx.x % (kTile / kSide) != 0 || row >= tile.rows) continue;
        w.lse[(split * p.key_heads + head) * w.rows + tile.token * (p.query_heads / p.key_heads) + row] = joint;
    }
}

// Each row's log-sum-exp over all pages; infinity for rows that are not there, whose softmax is then zero.
template <class T>
__device__ void join_splits(const RetrieveParams<T>& p, const Retrieval<T>& w, const RowTile& tile, int64_t head,
                            TileMemory& memory) {
    if (threadIdx.x >= kTile) return;
    const int64_t row = tile.first + threadIdx.x, group = p.query_heads / p.key_heads;
    float joint = -INFINITY;
    for (int64_t split = 0; split < w.splits && row < tile.rows; ++split) {
        joint = log_add(joint, w.lse[(split * p.key_heads + head) * w.rows + tile.token * group + row]);
    }
    memory.joint[threadIdx.x] = row < tile.rows ? joint : INFINITY;
}

// Block: sample, part, page tile. What the rows of the part give to each page.
template <class T>
__global__ void score(RetrieveParams<T> p, Retrieval<T> w) {
    __shared__ TileMemory memory;
    __shared__ float sums[kTile / kSide][kTile];
    const int64_t sample = blockIdx.x, part = blockIdx.y, first_page = static_cast<int64_t>(blockIdx.z) * kTile;
    const int64_t head = part % p.key_heads, share = part / p.key_heads, found = w.found[sample];
    if (first_page >= found) return;
    const int lane = threadIdx.x / (kTile / kSide), page = threadIdx.x % (kTile / kSide) * kSide;
    float total[kSide] = {};
    for (int64_t t = share;; t += w.shares) {
        const RowTile tile(p.cu_seqlens, sample, p.query_heads / p.key_heads, t);
        if (tile.first >= tile.rows) break;
        place_tile(p, w, tile, head, first_page, memory);
        join_splits(p, w, tile, head, memory);
        __syncthreads();
        float weight[kSide][kSide];
        bounds(p, w, memory, weight);
        for (int i = 0; i < kSide; ++i) {
            const float joint = memory.joint[lane * kSide + i];
            if (joint == INFINITY) continue;
            for (int j = 0; j < kSide; ++j) total[j] += expf(weight[i][j] - joint);
        }
    }
    for (int j = 0; j < kSide; ++j) sums[lane][page + j] = total[j];
    __syncthreads();
    if (threadIdx.x >= kTile || first_page + threadIdx.x >= found) return;
    float all = 0;
    for (int l = 0; l < kTile / kSide; ++l) all += sums[l][threadIdx.x];
    w.scores[(sample * w.parts(p) + part) * p.listed + first_page + threadIdx.x] = all;
}

// Larger floats have larger integers.
__device__ uint32_t order_of(float score) {
    const uint32_t bits = __float_as_uint(score);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The scores of a sample's pages: (W,) of `order`.
template <class T>
__device__ void add_parts(const RetrieveParams<T>& p, const Retrieval<T>& w, int64_t sample, int found) {
    for (int i = threadIdx.x; i < found; i += kThreads) {
        float score = 0;
        for (int64_t part = 0; part < w.parts(p); ++part) {
            score += w.scores[(sample * w.parts(p) + part) * p.listed + i];
        }
        // A NaN has no place in an order: such a page comes last.
        if (score != score) score = -INFINITY;
        if (p.keep && p.keep[w.pages[sample * p.listed + i]]) score = INFINITY;
        w.order[sample * p.listed + i] = order_of(score);
    }
    __syncthreads();
}

// The `rank`-th largest of `order` (found,), digit by digit; `rank` becomes how many equal to it are among the largest.
__device__ uint32_t select(const uint32_t* order, int found, int& rank) {
    __shared__ int counts[kDigits];
    uint32_t prefix = 0, known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < found; i += kThreads) {
            if ((order[i] & known) == prefix) atomicAdd(counts + (order[i] >> shift) % kDigits, 1);
        }
        __syncthreads();
        uint32_t digit = kDigits - 1;
        for (; counts[digit] < rank; --digit) rank -= counts[digit];
        prefix |= digit << shift;
        known |= static_cast<uint32_t>(kDigits - 1) << shift;
        __syncthreads();
    }
    return prefix;
}

// Block: sample. The best pages, ascending; of equal scores the lower page wins.
template <class T>
__global__ void choose(RetrieveParams<T> p, Retrieval<T> w) {
    const int64_t sample = blockIdx.x;
    const int found = w.found[sample], kept = found < p.kept ? found : static_cast<int>(p.kept);
    const uint32_t* order = w.order + sample * p.listed;
    int32_t* shorter = p.shorter + sample * p.kept;
    for (int64_t i = kept + threadIdx.x; i < p.kept; i += kThreads) shorter[i] = -1;
    if (kept == 0) return;
    add_parts(p, w, sample, found);
    int ties = kept;
    const uint32_t threshold = select(order, found, ties);
    int equals = 0, chosen = 0;
    for (int first = 0; first < found; first += kThreads) {
        const int i = first + threadIdx.x;
        const bool equal = i < found && order[i] == threshold;
        int total;
        const bool tie_wins = equals + exclusive_sum(equal, total) < ties;
        equals += total;
        const bool wins = i < found && (order[i] > threshold || (equal && tie_wins));
        const int place = chosen + exclusive_sum(wins, total);
        if (wins) shorter[place] = w.pages[sample * p.listed + i];
        chosen += total;
    }
}

}  // namespace

template <class T>
int64_t retrieve_cuda_scratch(const RetrieveParams<T>& p) {
    return Retrieval<T>(p, nullptr).bytes;
}

template <class T>
void retrieve_cuda(const RetrieveParams<T>& p, void* scratch, Stream stream) {
    if (p.kept == 0) return;
    const Retrieval<T> w(p, scratch);
    rope_cuda(RopeParams<T>{p.query, p.position_ids, p.inv_freq, w.turned, p.tokens, p.query_heads, p.head_dim,
                            p.frequencies, p.query_heads * p.head_dim, p.head_dim, false},
              stream);
    fill_bytes(w.listed, 0, p.batch * p.pages * sizeof(int32_t), stream);
    launch(count_pages<T>, {divide_up(p.batch * p.listed, kThreads)}, kThreads, stream, p, w);
    launch(order_pages<T>, {p.batch}, kThreads, stream, p, w);
    const int64_t row_tiles = divide_up(w.rows, kTile) + p.batch, page_tiles = divide_up(p.listed, kTile);
    launch(normalize<T>, {row_tiles, p.key_heads, w.splits}, kThreads, stream, p, w);
    launch(score<T>, {p.batch, w.parts(p), page_tiles}, kThreads, stream, p, w);
    launch(choose<T>, {p.batch}, kThreads, stream, p, w);
}

#define RETRIEVE(T)                                                       \
    template void retrieve_cuda(const RetrieveParams<T>&, void*, Stream); \
    template int64_t retrieve_cuda_scratch(const RetrieveParams<T>&);
FOR_EACH_GPU_DTYPE(RETRIEVE)

}  // namespace hourllava_ext
