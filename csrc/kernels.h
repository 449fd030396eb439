// SPDX-License-Identifier: Apache-2.0
// What csrc/ops hands to the kernels: parameter structs with shapes, and one launcher an operator and dtype. Those of
// the GPU exist for float, float16 and bfloat16; they return as soon as the work is in the stream.
// Pointers are to contiguous memory unless a stride is given; offsets are 64 bits. No framework header here.
#pragma once

#include <cstdint>
#include <functional>

namespace hourllava_ext {

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

// Sums, rotations and log-sum-exps are computed in float (double for double) and rounded once when stored.
template <class T>
struct accumulate {
    using type = float;
};
template <>
struct accumulate<double> {
    using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

// Calls body(first, last) on disjoint ranges of at least `grain` that cover [begin, end), on the caller's thread pool.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int64_t thread_count();  // of that pool

// A cudaStream_t.
using Stream = void*;

template <class T>
struct PoolGridParams {
    const T* patches;  // (T, S * S, C)
    T* out;            // (T, G * G, C)
    int64_t frames;    // T
    int64_t side;      // S
    int64_t grid;      // G
    int64_t width;     // C
};
void pool_grid_cpu(const PoolGridParams<float>&);
void pool_grid_cpu(const PoolGridParams<double>&);
void pool_grid_cpu(const PoolGridParams<float16>&);
void pool_grid_cpu(const PoolGridParams<bfloat16>&);
template <class T>
void pool_grid_cuda(const PoolGridParams<T>&, Stream);

template <class T>
struct PoolGridBackwardParams {
    const T* grad;    // (T, G * G, C)
    T* grad_patches;  // (T, S * S, C)
    int64_t frames;   // T
    int64_t side;     // S
    int64_t grid;     // G
    int64_t width;    // C
};
void pool_grid_backward_cpu(const PoolGridBackwardParams<float>&);
void pool_grid_backward_cpu(const PoolGridBackwardParams<double>&);
void pool_grid_backward_cpu(const PoolGridBackwardParams<float16>&);
void pool_grid_backward_cpu(const PoolGridBackwardParams<bfloat16>&);
template <class T>
void pool_grid_backward_cuda(const PoolGridBackwardParams<T>&, Stream);

template <class T>
struct KeyframeScoreParams {
    const T* features;               // (T, C)
    accumulate_t<T>* inverse_norms;  // (T,), scratch of the GPU
    accumulate_t<T>* score;          // (T,)
    int64_t frames;                  // T
    int64_t width;                   // C
    int64_t window;                  // at most T
};
void keyframe_score_cpu(const KeyframeScoreParams<float>&);
void keyframe_score_cpu(const KeyframeScoreParams<double>&);
void keyframe_score_cpu(const KeyframeScoreParams<float16>&);
void keyframe_score_cpu(const KeyframeScoreParams<bfloat16>&);
template <class T>
void keyframe_score_cuda(const KeyframeScoreParams<T>&, Stream);

template <class T>
struct ForgetParams {
    const T* tokens;         // (T, N, C)
    const int64_t* frames;   // (n,), each in [0, T)
    const int64_t* patches;  // (n, k), each in [0, N)
    const T* newline;        // (C,)
    T* kept;                 // (n, k + 1, C)
    int64_t* position_ids;   // (n, k + 1)
    int64_t kept_frames;     // n
    int64_t kept_patches;    // k
    int64_t per_frame;       // N
    int64_t width;           // C
};
void forget_cpu(const ForgetParams<float>&);
void forget_cpu(const ForgetParams<double>&);
void forget_cpu(const ForgetParams<float16>&);
void forget_cpu(const ForgetParams<bfloat16>&);
template <class T>
void forget_cuda(const ForgetParams<T>&, Stream);

template <class T>
struct ForgetBackwardParams {
    const T* grad;           // (n, k + 1, C)
    const int64_t* frames;   // (n,), each in [0, T)
    const int64_t* patches;  // (n, k), each in [0, N)
    T* grad_tokens;          // (T, N, C)
    T* grad_newline;         // (C,)
    int64_t total_frames;    // T
    int64_t kept_frames;     // n
    int64_t kept_patches;    // k
    int64_t per_frame;       // N
    int64_t width;           // C
};
void forget_backward_cpu(const ForgetBackwardParams<float>&);
void forget_backward_cpu(const ForgetBackwardParams<double>&);
void forget_backward_cpu(const ForgetBackwardParams<float16>&);
void forget_backward_cpu(const ForgetBackwardParams<bfloat16>&);
template <class T>
void forget_backward_cuda(const ForgetBackwardParams<T>&, Stream);

template <class T>
struct RopeParams {
    const T* x;                   // (M, H, D), last dim dense
    const int64_t* position_ids;  // (M,)
    const float* inv_freq;        // (F,), 2F <= D
    T* out;                       // (M, H, D)
    int64_t tokens;               // M
    int64_t heads;                // H
    int64_t width;                // D
    int64_t frequencies;          // F
    int64_t token_stride;         // of x, in elements
    int64_t head_stride;          // of x, in elements
    bool inverse;
};
void rope_cpu(const RopeParams<float>&);
void rope_cpu(const RopeParams<double>&);
void rope_cpu(const RopeParams<float16>&);
void rope_cpu(const RopeParams<bfloat16>&);
template <class T>
void rope_cuda(const RopeParams<T>&, Stream);

template <class T>
struct AddNormParams {
    const T* x;             // (M, C)
    const T* residual;      // (M, C)
    const T* weight;        // (C,)
    const T* bias;          // (C,)
    T* out;                 // (M, C)
    accumulate_t<T>* mean;  // (M,)
    accumulate_t<T>* rstd;  // (M,), one over the standard deviation
    int64_t tokens;         // M
    int64_t width;          // C
    double eps;
};
void add_norm_cpu(const AddNormParams<float>&);
void add_norm_cpu(const AddNormParams<double>&);
void add_norm_cpu(const AddNormParams<float16>&);
void add_norm_cpu(const AddNormParams<bfloat16>&);
template <class T>
void add_norm_cuda(const AddNormParams<T>&, Stream);

template <class T>
struct AddNormBackwardParams {
    const T* grad;                // (M, C)
    const T* x;                   // (M, C)
    const T* residual;            // (M, C)
    const T* weight;              // (C,)
    const accumulate_t<T>* mean;  // (M,)
    const accumulate_t<T>* rstd;  // (M,)
    T* grad_sum;                  // (M, C), of x + residual
    T* grad_weight;               // (C,)
    T* grad_bias;                 // (C,)
    accumulate_t<T>* partial;     // (K, 2, C), scratch: what each chunk of rows adds to weight and bias
    int64_t tokens;               // M
    int64_t width;                // C
    int64_t chunks;               // K
    int64_t chunk_rows;           // rows of a chunk; the last may have fewer
};
void add_norm_backward_cpu(const AddNormBackwardParams<float>&);
void add_norm_backward_cpu(const AddNormBackwardParams<double>&);
void add_norm_backward_cpu(const AddNormBackwardParams<float16>&);
void add_norm_backward_cpu(const AddNormBackwardParams<bfloat16>&);
template <class T>
void add_norm_backward_cuda(const AddNormBackwardParams<T>&, Stream);

template <class T>
struct MergeAttentionParams {
    const T* out;                 // (S, M, H, D)
    const accumulate_t<T>* lse;   // (S, H, M)
    T* merged;                    // (M, H, D)
    accumulate_t<T>* merged_lse;  // (H, M)
    int64_t parts;                // S
    int64_t tokens;               // M
    int64_t heads;                // H
    int64_t width;                // D
};
void merge_attention_cpu(const MergeAttentionParams<float>&);
void merge_attention_cpu(const MergeAttentionParams<double>&);
void merge_attention_cpu(const MergeAttentionParams<float16>&);
void merge_attention_cpu(const MergeAttentionParams<bfloat16>&);
template <class T>
void merge_attention_cuda(const MergeAttentionParams<T>&, Stream);

template <class T>
struct MergeAttentionBackwardParams {
    const T* grad_merged;                    // (M, H, D)
    const accumulate_t<T>* grad_merged_lse;  // (H, M)
    const T* out;                            // (S, M, H, D)
    const accumulate_t<T>* lse;              // (S, H, M)
    T* grad_out;                             // (S, M, H, D)
    accumulate_t<T>* grad_lse;               // (S, H, M)
    int64_t parts;                           // S
    int64_t tokens;                          // M
    int64_t heads;                           // H
    int64_t width;                           // D
};
void merge_attention_backward_cpu(const MergeAttentionBackwardParams<float>&);
void merge_attention_backward_cpu(const MergeAttentionBackwardParams<double>&);
void merge_attention_backward_cpu(const MergeAttentionBackwardParams<float16>&);
void merge_attention_backward_cpu(const MergeAttentionBackwardParams<bfloat16>&);
template <class T>
void merge_attention_backward_cuda(const MergeAttentionBackwardParams<T>&, Stream);

template <class T>
struct PageWriteParams {
    const T* key;                  // (M, Hkv, D), last dim dense
    const T* value;                // (M, Hkv, D), last dim dense
    const int64_t* position_ids;   // (M,)
    const int64_t* slots;          // (M,), page * S + row, no two alike
    const float* inv_freq;         // (F,), 2F <= D
    const int64_t* touched;        // (touched_pages,), those that get a row; null on a GPU, as is the next
    const int64_t* incoming;       // (touched_pages, S): the token that each row gets, -1 for none
    T* key_pages;                  // (P, Hkv, S, D)
    T* value_pages;                // (P, Hkv, S, D)
    accumulate_t<T>* key_summary;  // (P, Hkv, 3, D): mean, minimum, maximum
    int32_t* page_lengths;         // (P,), on the CPU with the new rows
    int64_t tokens;                // M
    int64_t pages;                 // P
    int64_t heads;                 // Hkv
    int64_t width;                 // D
    int64_t page_size;             // S
    int64_t frequencies;           // F
    int64_t touched_pages;
    int64_t key_token_stride, key_head_stride;      // in elements
    int64_t value_token_stride, value_head_stride;  // in elements
};
void page_write_cpu(const PageWriteParams<float>&);
void page_write_cpu(const PageWriteParams<double>&);
void page_write_cpu(const PageWriteParams<float16>&);
void page_write_cpu(const PageWriteParams<bfloat16>&);
// Raises the lengths, and writes rows and summaries together. `scratch`: as many int64 as page_write_cuda_scratch says.
template <class T>
void page_write_cuda(const PageWriteParams<T>&, int64_t* scratch, Stream);
int64_t page_write_cuda_scratch(int64_t tokens, int64_t pages, int64_t page_size);

template <class T>
struct PageWriteBackwardParams {
    const T* grad_key_pages;      // (P, Hkv, S, D)
    const T* grad_value_pages;    // (P, Hkv, S, D)
    const int64_t* position_ids;  // (M,)
    const int64_t* slots;         // (M,)
    const float* inv_freq;        // (F,)
    T* grad_key;                  // (M, Hkv, D)
    T* grad_value;                // (M, Hkv, D)
    int64_t tokens;               // M
    int64_t heads;                // Hkv
    int64_t width;                // D
    int64_t page_size;            // S
    int64_t frequencies;          // F
};
void page_write_backward_cpu(const PageWriteBackwardParams<float>&);
void page_write_backward_cpu(const PageWriteBackwardParams<double>&);
void page_write_backward_cpu(const PageWriteBackwardParams<float16>&);
void page_write_backward_cpu(const PageWriteBackwardParams<bfloat16>&);
template <class T>
void page_write_backward_cuda(const PageWriteBackwardParams<T>&, Stream);

template <class T>
struct RetrieveParams {
    const T* query;                      // (M, Hq, D)
    const int64_t* position_ids;         // (M,)
    const int64_t* cu_seqlens;           // (B + 1,)
    const float* inv_freq;               // (F,), 2F <= D
    const accumulate_t<T>* key_summary;  // (P, Hkv, 3, D): mean, minimum, maximum
    const int32_t* page_table;           // (B, W), -1 for a hole
    const int32_t* page_lengths;         // (P,)
    const bool* keep;                    // (P,), may be null
    int32_t* shorter;                    // (B, K)
    int64_t tokens;                      // M
    int64_t query_heads;                 // Hq
    int64_t key_heads;                   // Hkv
    int64_t head_dim;                    // D
    int64_t pages;                       // P
    int64_t batch;                       // B
    int64_t listed;                      // W
    int64_t kept;                        // K
    int64_t frequencies;                 // F
    int64_t first_dim, last_dim;         // dims that count
};
void retrieve_cpu(const RetrieveParams<float>&);
void retrieve_cpu(const RetrieveParams<double>&);
void retrieve_cpu(const RetrieveParams<float16>&);
void retrieve_cpu(const RetrieveParams<bfloat16>&);
// `scratch`: as many bytes as retrieve_cuda_scratch says.
template <class T>
void retrieve_cuda(const RetrieveParams<T>&, void* scratch, Stream);
template <class T>
int64_t retrieve_cuda_scratch(const RetrieveParams<T>&);

template <class T>
struct PagedAttentionParams {
    const T* query;                      // (M, Hq, D)
    const T* key_pages;                  // (P, Hkv, S, D), rotated
    const T* value_pages;                // (P, Hkv, S, D)
    const int32_t* page_table;           // (B, W), -1 for a hole
    const int32_t* page_lengths;         // (P,)
    const int64_t* position_ids;         // (M,)
    const int64_t* cu_seqlens;           // (B + 1,)
    const float* inv_freq;               // (F,), 2F <= D
    const accumulate_t<T>* mass_weight;  // (M,), may be null
    T* out;                              // (M, Hq, D)
    accumulate_t<T>* lse;                // (Hq, M)
    accumulate_t<T>* mass;               // (B, W), null without mass_weight
    double scale;
    int64_t tokens;       // M
    int64_t query_heads;  // Hq
    int64_t key_heads;    // Hkv
    int64_t head_dim;     // D
    int64_t pages;        // P
    int64_t page_size;    // S
    int64_t batch;        // B
    int64_t listed;       // W
    int64_t frequencies;  // F
};
void paged_attention_cpu(const PagedAttentionParams<float>&);
void paged_attention_cpu(const PagedAttentionParams<double>&);
void paged_attention_cpu(const PagedAttentionParams<float16>&);
void paged_attention_cpu(const PagedAttentionParams<bfloat16>&);

template <class T>
struct PagedAttentionBackwardParams {
    PagedAttentionParams<T> forward;  // out and lse as the forward left them
    const T* grad_out;                // (M, Hq, D)
    const accumulate_t<T>* grad_lse;  // (Hq, M)
    T* grad_query;                    // (M, Hq, D)
    T* grad_key_pages;                // (P, Hkv, S, D)
    T* grad_value_pages;              // (P, Hkv, S, D)
};
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<float>&);
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<double>&);
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<float16>&);
void paged_attention_backward_cpu(const PagedAttentionBackwardParams<bfloat16>&);

}  // namespace hourllava_ext
