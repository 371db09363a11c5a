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
#include <initializer_list>
#include <iosfwd>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace spatialflow {

using torch::headeronly::MemoryFormat;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of an error message. It refers to its value, so that passing it costs nothing if the check holds.
class MessagePart {
public:
    MessagePart(const char* text) : kind_(Kind::kText), text_(text) {}
    MessagePart(const std::string& text) : MessagePart(text.c_str()) {}
    MessagePart(double number) : kind_(Kind::kReal), real_(number) {}
    template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
    MessagePart(Integer number) : kind_(Kind::kInteger), integer_(static_cast<int64_t>(number)) {}
    MessagePart(const Tensor& shape) : kind_(Kind::kShape), shape_(&shape) {}

    friend std::ostream& operator<<(std::ostream& stream, const MessagePart& part);

private:
    enum class Kind { kText, kReal, kInteger, kShape };
    Kind kind_;
    union {
        const char* text_;
        double real_;
        int64_t integer_;
        const Tensor* shape_;
    };
};

// Throw an error that is a RuntimeError in Python. Its text is the concatenation of `parts`.
[[noreturn]] void fail(std::initializer_list<MessagePart> parts);

// Call fail(parts) unless `condition` holds: "<op>: <argument> must ..., got ...". A tensor stands for its shape.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
    if (__builtin_expect(!condition, 0)) {
        fail({MessagePart(parts)...});
    }
}

const char* dtype_name(ScalarType dtype);

inline bool is_floating(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
           dtype == ScalarType::BFloat16;
}

inline bool have_same_device(const Tensor& first, const Tensor& second) {
    return first.is_cuda() == second.is_cuda() && first.get_device() == second.get_device();
}

void check_floating(const char* op, const char* name, const Tensor& tensor);
void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype);
void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* meaning);
void check_same_device(
    const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

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

// Throw an out-of-memory error that names shape and dtype.
[[noreturn]] void fail_allocation(IntArrayRef sizes, ScalarType dtype);

// Return make(), a tensor of `sizes` and `dtype`, or raise an out-of-memory error. The stable ABI drops torch's error
// text. The arguments are checked already, so a failed allocation is the only possible cause.
template <typename Make>
inline Tensor allocated(IntArrayRef sizes, ScalarType dtype, const Make& make) {
    try {
        return make();
    } catch (const std::exception&) {
        fail_allocation(sizes, dtype);
    }
}

// Return the tensor, or a copy that is contiguous in `format`. Kernels then compute strides from sizes, because torch
// may report any stride for sizes of 1, see stride_of. The name is not `contiguous`, which argument-dependent lookup
// would find in torch.
Tensor to_contiguous(const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous);

// Return the (N, C, H, W) tensor if its channels are adjacent in memory, with any other strides; otherwise a
// channels-last copy.
inline Tensor channels_adjacent(const Tensor& tensor) {
    return has_adjacent_channels(tensor) ? tensor : to_contiguous(tensor, MemoryFormat::ChannelsLast);
}

Tensor as_dtype(const Tensor& tensor, ScalarType dtype);

// Accumulation dtype, also used for boxes and offsets: float64 for float64, otherwise float32.
inline ScalarType accum_dtype(ScalarType feature_dtype) {
    return feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) { return to_contiguous(as_dtype(tensor, dtype)); }

// Return an uninitialized tensor on the device of `like`; its dtype is that of `like` unless `dtype` is given.
Tensor empty_like_sized(
    const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype = std::nullopt,
    MemoryFormat format = MemoryFormat::Contiguous);

}  // namespace spatialflow
