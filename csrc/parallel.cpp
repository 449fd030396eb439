// SPDX-License-Identifier: Apache-2.0
// parallel_for over torch's threads, so that torch.set_num_threads is the one setting.
#include <torch/csrc/stable/ops.h>

#include "ops/common.h"

namespace hourllava_ext {

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (begin < end) {
        explained([&] { torch::stable::parallel_for(begin, end, grain, body); }, "out of memory. A thread failed");
    }
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace hourllava_ext
