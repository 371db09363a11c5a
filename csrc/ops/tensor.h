// SPDX-License-Identifier: Apache-2.0
//
// Interface to libtorch: names of its stable ABI used in this project, layout queries and argument checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace spatialflow {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Unless `condition` holds, throw an error that is a RuntimeError in Python. Its text is the concatenation of `parts`:
// "<op>: <argument> must ..., got ...".
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
    if (__builtin_expect(!condition, 0)) {
        std::ostringstream message;
        (message << ... << parts);
        throw std::runtime_error(message.str());
    }
}

inline std::string shape_string(const Tensor& tensor) {
    std::ostringstream text;
    text << '(';
    for (int64_t d = 0; d < tensor.dim(); ++d) {
        text << (d ? ", " : "") << tensor.size(d);
    }
    text << ')';
    return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline bool is_floating(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
           dtype == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
    check(
        is_floating(tensor.scalar_type()), op, ": ", name, " must be float32, float64, float16 or bfloat16, got ",
        dtype_name(tensor.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
    check(
        tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
        dtype_name(tensor.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* meaning) {
    check(tensor.dim() == dim, op, ": ", name, " must be ", meaning, ", got shape ", shape_string(tensor));
}

inline bool have_same_device(const Tensor& first, const Tensor& second) {
    return first.is_cuda() == second.is_cuda() && first.get_device() == second.get_device();
}

inline void check_same_device(
    const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    check(have_same_device(tensor, like), op, ": ", name, " must be on the device of ", like_name);
}

// Stride of a dimension in elements, or 0 if its size is 0 or 1. Torch allows any stride for a dimension of such a
// size, also in a contiguous tensor. With 0, no address, alignment or layout depends on it. Only this header reads
// strides.
inline int64_t stride_of(const Tensor& tensor, int64_t dimension) {
    return tensor.size(dimension) > 1 ? tensor.stride(dimension) : 0;
}

inline bool has_adjacent_channels(const Tensor& tensor) { return tensor.size(1) <= 1 || tensor.stride(1) == 1; }

// Whether a tensor (N, C, H, W) is channels-last, or a slice of a channels-last tensor. Its channels are adjacent, the
// stride of pixels is at least C, and that of rows at least that of pixels. False if the tensor is also contiguous
// because of sizes of 1. `spatialflow/ops/layout.py` has the same rule.
inline bool prefers_channels_last(const Tensor& tensor) {
    if (tensor.dim() != 4 || tensor.is_contiguous() || stride_of(tensor, 1) != 1) {
        return false;
    }
    const int64_t pixel = tensor.size(3) > 1 ? tensor.stride(3) : tensor.size(1);
    return pixel >= tensor.size(1) && (tensor.size(2) <= 1 || tensor.stride(2) >= pixel);
}

inline MemoryFormat memory_format_of(const Tensor& tensor) {
    return prefers_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Return make(), a tensor of `sizes` and `dtype`, or raise an out-of-memory error. The stable ABI drops torch's error
// text. The arguments are checked already, so a failed allocation is the only possible cause.
template <typename Sizes, typename Make>
inline Tensor allocated(const Sizes& sizes, ScalarType dtype, const Make& make) {
    try {
        return make();
    } catch (const std::exception&) {
        std::ostringstream shape;
        for (const int64_t size : sizes) {
            shape << (shape.tellp() > 0 ? ", " : "") << size;
        }
        check(
            false, "spatialflow: out of memory, or too large: a tensor of shape (", shape.str(), ") and dtype ",
            dtype_name(dtype));
        throw;
    }
}

// Return the tensor, or a copy that is contiguous in `format`. Kernels then compute strides from sizes, because torch
// may report any stride for sizes of 1, see stride_of. The name is not `contiguous`, which argument-dependent lookup
// would find in torch.
inline Tensor to_contiguous(const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous) {
    return allocated(tensor.sizes(), tensor.scalar_type(), [&] { return torch::stable::contiguous(tensor, format); });
}

// Return the (N, C, H, W) tensor if its channels are adjacent in memory, with any other strides; otherwise a
// channels-last copy.
inline Tensor channels_adjacent(const Tensor& tensor) {
    return has_adjacent_channels(tensor) ? tensor : to_contiguous(tensor, MemoryFormat::ChannelsLast);
}

inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
    return tensor.scalar_type() == dtype
               ? tensor
               : allocated(tensor.sizes(), dtype, [&] { return torch::stable::to(tensor, dtype); });
}

// Accumulation dtype, also used for boxes and offsets: float64 for float64, otherwise float32.
inline ScalarType accum_dtype(ScalarType feature_dtype) {
    return feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) { return to_contiguous(as_dtype(tensor, dtype)); }

inline Tensor empty_like_sized(
    const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype = std::nullopt,
    MemoryFormat format = MemoryFormat::Contiguous) {
    const ScalarType type = dtype ? *dtype : like.scalar_type();
    return allocated(sizes, type, [&] {
        return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
    });
}

}  // namespace spatialflow
