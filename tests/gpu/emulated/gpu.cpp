// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/gpu.cpp, where every tensor is on the GPU, and for the CPU kernels, which nothing may call.
#include "cuda/device.cuh"
#include "ops/common.h"

extern "C" __attribute__((visibility("default"))) void emulated_order(int order) {
    hourllava_ext::emulated::order = order;
}

namespace hourllava_ext {

bool on_gpu(const Tensor&) { return true; }

OnDevice::OnDevice(const Tensor&) : stream_(nullptr) {}

static void refuse() { throw std::logic_error("emulated GPU: a kernel of the CPU was called"); }

#define NO_KERNEL(name, Params)                     \
    void name(const Params<float>&) { refuse(); }   \
    void name(const Params<double>&) { refuse(); }  \
    void name(const Params<float16>&) { refuse(); } \
    void name(const Params<bfloat16>&) { refuse(); }

NO_KERNEL(add_norm_cpu, AddNormParams)
NO_KERNEL(add_norm_backward_cpu, AddNormBackwardParams)
NO_KERNEL(forget_cpu, ForgetParams)
NO_KERNEL(forget_backward_cpu, ForgetBackwardParams)
NO_KERNEL(keyframe_score_cpu, KeyframeScoreParams)
NO_KERNEL(merge_attention_cpu, MergeAttentionParams)
NO_KERNEL(merge_attention_backward_cpu, MergeAttentionBackwardParams)
NO_KERNEL(page_write_cpu, PageWriteParams)
NO_KERNEL(page_write_backward_cpu, PageWriteBackwardParams)
NO_KERNEL(pool_grid_cpu, PoolGridParams)
NO_KERNEL(pool_grid_backward_cpu, PoolGridBackwardParams)
NO_KERNEL(retrieve_cpu, RetrieveParams)
NO_KERNEL(rope_cpu, RopeParams)

}  // namespace hourllava_ext
