// SPDX-License-Identifier: Apache-2.0
// Plain C functions that hourllava_ext/library.py reads with ctypes.
#include <torch/csrc/stable/version.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT uint64_t hourllava_ext_torch_target() { return TORCH_FEATURE_VERSION; }

EXPORT bool hourllava_ext_cuda_built() {
#ifdef HOURLLAVA_EXT_CUDA
    return true;
#else
    return false;
#endif
}
