// SPDX-License-Identifier: Apache-2.0
// Shared by the operators' contracts: argument checks with one-line messages, dtype dispatch, and the way to a GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

// Torch's last error, of torch 2.13 and newer; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace hourllava_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// check(ok, "rope: x must be ..., got ", 3): RuntimeError with the parts joined, when not ok.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
    if (ok) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
    text << ")";
    return text.str();
}

// `shape` names the dimensions for the reader: check_dim("rope", "x", x, 3, "(M, H, D)").
inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* shape) {
    check(tensor.dim() == dim, op, ": ", name, " must be ", shape, ", got shape ", shape_of(tensor));
}

// Exact sizes, -1 for any.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    std::ostringstream wanted;
    for (size_t i = 0; i < shape.size(); ++i) {
        same = same && (shape[i] < 0 || tensor.size(i) == shape[i]);
        wanted << (i ? ", " : "") << (shape[i] < 0 ? "any" : std::to_string(shape[i]));
    }
    check(same, op, ": ", name, " must have shape (", wanted.str(), "), got ", shape_of(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, const char* label) {
    check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", label, "; convert it with .to(torch.", label,
          ")");
}
inline void check_int64(const char* op, const char* name, const Tensor& tensor) {
    check_dtype(op, name, tensor, ScalarType::Long, "int64");
}
inline void check_int32(const char* op, const char* name, const Tensor& tensor) {
    check_dtype(op, name, tensor, ScalarType::Int, "int32");
}
inline void check_float32(const char* op, const char* name, const Tensor& tensor) {
    check_dtype(op, name, tensor, ScalarType::Float, "float32");
}
inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
    check(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " must have the dtype of ", other_name);
}

// float32 for float32, float16 and bfloat16, float64 for float64: the dtype of sums and log-sum-exps.
inline ScalarType accumulate_dtype(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(), a function of torch's. When it fails, the stable interface says where in its own headers; this says
// why, which for a tensor that cannot be made is seldom anything else than `otherwise`.
template <class Body>
auto explained(const Body& body,
               const char* otherwise = "out of memory. Torch could not make a tensor; use fewer tokens") {
    try {
        return body();
    } catch (const std::exception&) {
        const char* why =
            torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
        throw std::runtime_error(std::string("hourllava_ext: ") + (*why ? why : otherwise));
    }
}

inline Tensor dense(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : explained([&] { return torch::stable::contiguous(tensor); });
}

// Asks for 2 MiB pages under the whole ones among these bytes of CPU memory.
void use_huge_pages(void* data, int64_t bytes);

inline Tensor allocate(const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType dtype) {
    const Tensor result = explained([&] { return torch::stable::new_empty(tensor, shape, dtype); });
    if (result.is_cpu()) use_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
    return result;
}
inline Tensor allocate(const Tensor& tensor, const std::vector<int64_t>& shape) {
    return allocate(tensor, shape, tensor.scalar_type());
}

#ifdef HOURLLAVA_EXT_CUDA
constexpr bool kCudaBuilt = true;
bool on_gpu(const Tensor& tensor);
#else
constexpr bool kCudaBuilt = false;
constexpr bool on_gpu(const Tensor&) { return false; }
#endif

// Whether a CUDA kernel for T is in this build.
template <class T>
constexpr bool kHasCuda = kCudaBuilt && !std::is_same_v<T, double>;

// Makes the GPU of a tensor the current one for as long as it lives, and stands for torch's current stream there.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& tensor);
    operator Stream() const { return stream_; }

  private:
    std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
    Stream stream_;
};

struct Argument {
    const char* name;
    const Tensor& tensor;
};

// The dispatcher takes an operator to a GPU as soon as one tensor is there.
inline void check_devices(const char* op, const Argument& first, std::initializer_list<Argument> others) {
    for (const Argument& other : others) {
        check(other.tensor.get_device_index() == first.tensor.get_device_index(), op, ": ", other.name,
              " must be on the device of ", first.name);
    }
}

// Every entry of a dense int64 tensor in [0, limit). On a GPU the host would have to wait to know.
inline void check_range(const char* op, const char* name, const Tensor& tensor, int64_t limit) {
    if (on_gpu(tensor)) return;
    const int64_t* entries = data<int64_t>(tensor);
    for (int64_t i = 0; i < tensor.numel(); ++i) {
        check(entries[i] >= 0 && entries[i] < limit, op, ": ", name, " must be in [0, ", limit, "), got ", entries[i]);
    }
}

// Calls body(T{}) with the C++ type of the tensor's dtype.
template <class Body>
void dispatch_dtype(const char* op, const char* name, const Tensor& tensor, const Body& body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return body(float{});
        case ScalarType::Double:
            check(!on_gpu(tensor), op, ": on a GPU ", name,
                  " must be float32, float16 or bfloat16; convert it with .to()");
            return body(double{});
        case ScalarType::Half:
            return body(float16{});
        case ScalarType::BFloat16:
            return body(bfloat16{});
        default:
            check(false, op, ": ", name, " must be float32, float16, bfloat16 or float64; convert it with .to()");
    }
}

}  // namespace hourllava_ext
