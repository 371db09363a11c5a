// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps of TMA for interpreted kernels, with the rules of cuTensorMapEncodeTiled.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "simt/source_location.h"

namespace spatialflow {
namespace simt {

constexpr int kMaxTensorMapDimensions = 5;

enum class Swizzle : uint8_t { kNone, k128, k64, k32 };  // as numbered in descriptors of matrices

// Return the width of the swizzle in bytes, 16 without a swizzle. The pattern repeats after eight times as many bytes.
inline size_t swizzle_span(Swizzle swizzle) {
    return swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 16;
}
inline const char* name_of(Swizzle swizzle) {
    return swizzle == Swizzle::k128  ? "128-byte swizzle"
           : swizzle == Swizzle::k64 ? "64-byte swizzle"
           : swizzle == Swizzle::k32 ? "32-byte swizzle"
                                     : "no swizzle";
}
// Return the address of a byte after the swizzle.
inline int64_t swizzled(int64_t address, Swizzle swizzle) {
    const int64_t mask = static_cast<int64_t>(swizzle_span(swizzle)) / 16 - 1;
    return address ^ ((address >> 7 & mask) << 4);
}

struct TensorMap {
    const char* address;
    int dimensions;
    size_t element_bytes;
    int64_t sizes[kMaxTensorMapDimensions];    // in elements, innermost dimension first
    int64_t strides[kMaxTensorMapDimensions];  // in bytes
    int box[kMaxTensorMapDimensions];
    Swizzle swizzle;

    size_t row_bytes() const { return static_cast<size_t>(box[0]) * element_bytes; }
    size_t rows() const {
        size_t count = 1;
        for (int d = 1; d < dimensions; ++d) {
            count *= static_cast<size_t>(box[d]);
        }
        return count;
    }
};

// Throw for boxes that are invalid for every tensor.
inline void check_box(const TensorMap& map, SourceLocation location) {
    const auto refuse = [&](const std::string& what) {
        throw std::runtime_error(concatenate("simt: ", location.text(), ": tensor map: ", what));
    };
    for (int d = 0; d < map.dimensions; ++d) {
        if (map.box[d] < 1 || map.box[d] > 256) {
            refuse(concatenate("the box has ", map.box[d], " elements in dimension ", d, "; must be 1 to 256"));
        }
    }
    if (map.row_bytes() % 16 != 0) {
        refuse(concatenate("a row of the box has ", map.row_bytes(), " bytes, not a multiple of 16"));
    }
    if (map.swizzle != Swizzle::kNone && map.row_bytes() > swizzle_span(map.swizzle)) {
        refuse(concatenate(
            "a row of the box has ", map.row_bytes(), " bytes, more than the ", swizzle_span(map.swizzle), " of ",
            name_of(map.swizzle)));
    }
    // A narrower row needs as much shared memory as the swizzle's width; its position in that memory is not documented.
    if (map.row_bytes() < swizzle_span(map.swizzle)) {
        refuse(concatenate(
            "a row of the box has ", map.row_bytes(), " bytes, fewer than the ", swizzle_span(map.swizzle), " of ",
            name_of(map.swizzle), ", which the interpreter does not support"));
    }
}

// Return whether TMA supports sizes, strides and address of the tensor. Strides need not be ascending or multiples of
// each other (benchmarks/hopper_probes). Strides of zero were not tested on hardware and are rejected.
inline bool is_readable(const TensorMap& map) {
    if (reinterpret_cast<uintptr_t>(map.address) % 16 != 0) {
        return false;
    }
    for (int d = 0; d < map.dimensions; ++d) {
        if (map.sizes[d] < 1 || map.sizes[d] > int64_t(1) << 32) {
            return false;
        }
        if (d > 0 && (map.strides[d] % 16 != 0 || map.strides[d] <= 0 || map.strides[d] >= int64_t(1) << 40)) {
            return false;
        }
    }
    return true;
}

}  // namespace simt
}  // namespace spatialflow
