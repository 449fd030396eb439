// SPDX-License-Identifier: Apache-2.0
// The GPU of a tensor and torch's current stream there. Part of builds with CUDA alone.
#include <dlfcn.h>

#include "ops/common.h"

namespace hourllava_ext {

bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }

namespace {

using StreamGetter = AOTITorchError (*)(int32_t device, Stream* stream);

// Asked of the library that `import torch` has loaded, and only when a tensor is on a GPU: the binary also serves a
// torch that has no such library.
StreamGetter stream_getter() {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    check(torch_cuda != nullptr, "hourllava_ext: the installed torch has no CUDA, install one that has");
    void* getter = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    check(getter != nullptr,
          "hourllava_ext: the installed torch has another CUDA interface, install torch 2.10 or newer");
    return reinterpret_cast<StreamGetter>(getter);
}

Stream current_stream(int32_t device) {
    static const StreamGetter get = stream_getter();
    Stream stream = nullptr;
    check(get(device, &stream) == AOTI_TORCH_SUCCESS, "hourllava_ext: torch has no stream on GPU ", device);
    return stream;
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor)
    : guard_(std::make_unique<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index())),
      stream_(current_stream(tensor.get_device_index())) {}

}  // namespace hourllava_ext
