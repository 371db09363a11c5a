// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps of TMA, encoded on the host (compute capability 9.0). The interpreter's versions of
// runs_sm90, bind_context and encode_map are in csrc/simt/sm90.h.
#pragma once

#include "cuda/platform.h"

namespace spatialflow {

// Compute the strides of W, H and N for TMA, in elements, from sizes (C, W, H, N) of a channels-last tensor of 16-bit
// numbers. The stride of a dimension of size 1 is arbitrary, so it is replaced by that of the next dimension of size 2
// or more. If there is none, it is the extent of the previous dimension, rounded up to a multiple of the previous
// stride (8 for the first). Return false unless each stride is at least the extent of the previous dimension and a
// multiple of the previous stride. Also return false if the whole extent is 2^39 elements or more. TMA is known to
// support strides that pass these checks.
inline bool nested_strides(const int64_t (&sizes)[4], const int64_t (&tensor_strides)[3], int64_t (&strides)[3]) {
    int64_t stride = 8, span = sizes[0];  // 8 elements have 16 bytes
    for (int i = 0; i < 3; ++i) {
        int longer = i;
        while (longer < 3 && sizes[longer + 1] <= 1) {
            ++longer;
        }
        const int64_t next = longer < 3 ? tensor_strides[longer] : (span + stride - 1) / stride * stride;
        if (next < span || next % stride != 0) {
            return false;
        }
        strides[i] = stride = next;
        span = stride * sizes[i + 1];
    }
    return span < int64_t(1) << 39;
}

}  // namespace spatialflow

#if defined(__CUDACC__)

#include <cuda.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace spatialflow {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Return the driver's cuTensorMapEncodeTiled, or null if the driver does not have it. The library does not link to the
// driver.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled encode = [] {
        void* address_of_entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &address_of_entry, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess) {
            cudaGetLastError();  // clear the error, or the next launch reports it
            return EncodeTiled(nullptr);
        }
        return result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(address_of_entry) : nullptr;
    }();
    return encode;
}

// Return whether the device of `stream` can run kKernel and the driver can encode tensor maps. For architectures other
// than 9.0a the kernel is empty, without static shared memory.
template <auto kKernel>
inline bool runs_sm90(Stream stream) {
    static DeviceNumbers known;  // 1: false, 2: true
    if (known.at(stream) == 0) {
        cudaFuncAttributes attributes{};
        check_cuda(cudaFuncGetAttributes(&attributes, kKernel), "attributes of a kernel for 9.0a");
        known.set(stream, attributes.sharedSizeBytes > 0 && encode_tiled() ? 2 : 1);
    }
    return known.at(stream) == 2;
}

// Bind the context of the device to this thread. Driver functions need it, and a thread that has not used CUDA yet does
// not have a context, even if the device is current.
inline void bind_context(Stream stream) { check_cuda(cudaSetDevice(stream.device), "binding a device to a thread"); }

// Encode a tensor map; return false if TMA cannot read such a tensor. Call `bind_context` first. Sizes, strides and
// box are in elements, innermost dimension first.
template <typename scalar_t, int kDimensions>
inline bool encode_map(
    CUtensorMap& map, const scalar_t* address, const int64_t (&sizes)[kDimensions],
    const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions]) {
    cuuint64_t all_sizes[kDimensions], byte_strides[kDimensions - 1];
    cuuint32_t box_sizes[kDimensions], steps[kDimensions];
    for (int d = 0; d < kDimensions; ++d) {
        all_sizes[d] = static_cast<cuuint64_t>(sizes[d]);
        box_sizes[d] = static_cast<cuuint32_t>(box[d]);
        steps[d] = 1;
    }
    for (int d = 0; d < kDimensions - 1; ++d) {
        byte_strides[d] = static_cast<cuuint64_t>(strides[d]) * sizeof(scalar_t);
    }
    const auto type =
        std::is_same_v<scalar_t, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = encode_tiled()(
        &map, type, kDimensions, const_cast<scalar_t*>(address), all_sizes, byte_strides, box_sizes, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS && result != CUDA_ERROR_INVALID_VALUE && result != CUDA_ERROR_NOT_SUPPORTED) {
        throw std::runtime_error(
            "cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(static_cast<int>(result)));
    }
    return result == CUDA_SUCCESS;
}

}  // namespace spatialflow

#endif
