// SPDX-License-Identifier: Apache-2.0
// A thread has one column of a token: its cosines and sines, made once, turn that column of every head.
#include "cuda/rotate.cuh"

namespace hourllava_ext {
namespace {

template <class T, int N>
__global__ void rope_tokens(RopeParams<T> p, Lanes lanes) {
    const int64_t token = lanes.row();
    if (token >= p.tokens) return;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * kHeads;
    const int heads = static_cast<int>(p.heads - head < kHeads ? p.heads - head : kHeads);
    const HeadColumns<N> columns(p.width, p.frequencies);
    const T* x = p.x + token * p.token_stride + head * p.head_stride;
    T* out = p.out + (token * p.heads + head) * p.width;
    for (int64_t c = lanes.column(); c < columns.count; c += lanes.columns) {
        Rotation<N> r{};
        if (columns.turns(c)) r = rotation<T, N>(p.position_ids[token], p.inv_freq + c * N, p.inverse);
        turn_heads<T, N>(x, p.head_stride, out, p.width, heads, columns, c, &r);
    }
}

template <class T, int N>
void rope_columns(const RopeParams<T>& p, Stream stream) {
    const Lanes lanes(HeadColumns<N>(p.width, p.frequencies).count);
    const Grid grid{lanes.blocks(p.tokens), divide_up(p.heads, kHeads)};
    launch(rope_tokens<T, N>, grid, lanes.threads(), stream, p, lanes);
}

}  // namespace

template <class T>
void rope_cuda(const RopeParams<T>& p, Stream stream) {
    if (in_vectors<T>({p.x, p.out}, {p.width, p.frequencies, p.token_stride, p.head_stride})) {
        rope_columns<T, kVector<T>>(p, stream);
    } else {
        rope_columns<T, 1>(p, stream);
    }
}

#define ROPE(T) template void rope_cuda(const RopeParams<T>&, Stream);
FOR_EACH_GPU_DTYPE(ROPE)

}  // namespace hourllava_ext
