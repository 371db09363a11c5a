// SPDX-License-Identifier: Apache-2.0
//
// Host side of a CUDA operator: device pointers of tensors, the current device and stream, and the registration.
// Without nvcc, the same for the SIMT interpreter (csrc/simt), which runs kernels on the CPU.
#pragma once

#include "cuda/platform.h"
#include "ops/dispatch.h"

#if defined(__CUDACC__)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/tensor_data.h"

#define SPATIALFLOW_DEVICE_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(spatialflow, CUDA, library)
#else
#define SPATIALFLOW_DEVICE_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library)
#endif

namespace spatialflow {

#if defined(__CUDACC__)

// Scope in which the device of a tensor is current, with the current stream of that device. Each operator creates one.
class DeviceScope {
public:
    explicit DeviceScope(const Tensor& tensor) : device_(tensor.get_device()), guard_(device_) {
        void* stream = nullptr;
        check(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "no CUDA stream on device ", device_);
        stream_ = {static_cast<cudaStream_t>(stream), device_};
    }
    Stream stream() const { return stream_; }

private:
    int device_;
    torch::stable::accelerator::DeviceGuard guard_;
    Stream stream_;
};

// Pointer to `count` elements of a contiguous tensor from element `begin` on. The version for the SIMT interpreter
// (below) checks the bounds of this part.
template <typename scalar_t>
inline scalar_t* mutable_data(const Tensor& tensor, int64_t begin, int64_t /*count*/) {
    return mutable_data<scalar_t>(tensor) + begin;
}

#else

class DeviceScope {
public:
    explicit DeviceScope(const Tensor&) {}
    Stream stream() const { return {}; }
};

// Number of elements from the first to the last one that the strides reach.
inline int64_t extent(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
        if (tensor.size(d) == 0) {
            return 0;
        }
        last += (tensor.size(d) - 1) * stride_of(tensor, d);
    }
    return last + 1;
}

template <typename scalar_t>
inline Global<const scalar_t> data(const Tensor& tensor) {
    return Global<const scalar_t>(static_cast<const scalar_t*>(tensor.const_data_ptr()), extent(tensor));
}

template <typename scalar_t>
inline Global<scalar_t> mutable_data(const Tensor& tensor) {
    return Global<scalar_t>(static_cast<scalar_t*>(tensor.mutable_data_ptr()), extent(tensor));
}

template <typename scalar_t>
inline Global<scalar_t> mutable_data(const Tensor& tensor, int64_t begin, int64_t count) {
    check(
        begin >= 0 && count >= 0 && begin + count <= extent(tensor), "elements ", begin, " to ", begin + count,
        " of a tensor of ", extent(tensor));
    return Global<scalar_t>(static_cast<scalar_t*>(tensor.mutable_data_ptr()) + begin, count);
}

#endif

// Call body(scalar_t{}) with the device type for `dtype`. A generic lambda gets the type as decltype of its parameter.
template <typename Body>
inline void dispatch_floating(const char* op, ScalarType dtype, Body&& body) {
    dispatch_floating_types<float16, bfloat16>(op, dtype, body);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Return a grid dimension; raise an error if a launch cannot have so many blocks.
inline unsigned grid_size(const char* op, int64_t blocks) {
    check(blocks <= 0x7fffffff, op, ": the problem needs ", blocks, " thread blocks, a launch can have 2147483647");
    return static_cast<unsigned>(blocks);
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

#if !defined(__CUDACC__)
template <typename T>
inline bool is_aligned(const Global<T>& pointer, size_t bytes) {
    return is_aligned(pointer.data(), bytes);
}
#endif

// Return `tensor` if its first element is aligned to 16 bytes, the widest access, otherwise an aligned copy.
inline Tensor aligned(const Tensor& tensor) {
    return is_aligned(tensor.const_data_ptr(), 16)
               ? tensor
               : allocated(tensor.sizes(), tensor.scalar_type(), [&] { return torch::stable::clone(tensor); });
}

}  // namespace spatialflow
