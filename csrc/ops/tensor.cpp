// SPDX-License-Identifier: Apache-2.0
//
// Functions of tensor.h that need not be inlined. They are compiled once and linked into every library.
#include "ops/tensor.h"

#include <sstream>

namespace spatialflow {

namespace {

std::string joined(IntArrayRef sizes) {
    std::ostringstream text;
    for (size_t d = 0; d < sizes.size(); ++d) {
        text << (d ? ", " : "") << sizes[d];
    }
    return text.str();
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const MessagePart& part) {
    switch (part.kind_) {
        case MessagePart::Kind::kText:
            return stream << part.text_;
        case MessagePart::Kind::kReal:
            return stream << part.real_;
        case MessagePart::Kind::kInteger:
            return stream << part.integer_;
        default:
            return stream << '(' << joined(part.shape_->sizes()) << ')';
    }
}

void fail(std::initializer_list<MessagePart> parts) {
    std::ostringstream message;
    for (const MessagePart& part : parts) {
        message << part;
    }
    throw std::runtime_error(message.str());
}

const char* dtype_name(ScalarType dtype) {
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

void check_floating(const char* op, const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    check(
        is_floating(dtype), op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
    const ScalarType given = tensor.scalar_type();
    check(given == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ", dtype_name(given));
}

void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* meaning) {
    check(tensor.dim() == dim, op, ": ", name, " must be ", meaning, ", got shape ", tensor);
}

void check_same_device(
    const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    check(have_same_device(tensor, like), op, ": ", name, " must be on the device of ", like_name);
}

void fail_allocation(IntArrayRef sizes, ScalarType dtype) {
    fail(
        {"spatialflow: out of memory, or too large: a tensor of shape (", joined(sizes), ") and dtype ",
         dtype_name(dtype)});
}

Tensor to_contiguous(const Tensor& tensor, MemoryFormat format) {
    return allocated(tensor.sizes(), tensor.scalar_type(), [&] { return torch::stable::contiguous(tensor, format); });
}

Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
    return tensor.scalar_type() == dtype
               ? tensor
               : allocated(tensor.sizes(), dtype, [&] { return torch::stable::to(tensor, dtype); });
}

Tensor empty_like_sized(
    const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype, MemoryFormat format) {
    const ScalarType type = dtype ? *dtype : like.scalar_type();
    return allocated(sizes, type, [&] {
        return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
    });
}

}  // namespace spatialflow
