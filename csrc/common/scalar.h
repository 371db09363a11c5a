// SPDX-License-Identifier: Apache-2.0
//
// Storage types of features on the CPU, and their conversion to and from the types for arithmetic.
//
// Kernels load `scalar_t`, compute in `accum_t<scalar_t>` and store `scalar_t`. The 16-bit types here only store bits.
// float16 is converted by F16C instructions if the target has them. All other conversions are short arithmetic on bits,
// which the compiler can vectorize in loops over channels. The CUDA back end uses the types of the toolkit.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/accum_type.h"

namespace spatialflow {

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(bfloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float load(float16 value) {
#if defined(__F16C__)
    return static_cast<float>(bit_cast<_Float16>(value.bits));
#else
    // Shift exponent and mantissa, then multiply by 2^112, the difference of the exponent biases. The product is exact
    // and makes half subnormals normal floats. Infinity and NaN keep an all-ones exponent.
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t special = magnitude | 0x7f800000u;
    return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled)));
#endif
}

inline void store(float& target, float value) { target = value; }
inline void store(double& target, double value) { target = value; }
inline void store(bfloat16& target, float value) {
    // Round to nearest even; NaN stays NaN (rounding its bits could give infinity or zero).
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
inline void store(float16& target, float value) {
#if defined(__F16C__)
    target.bits = bit_cast<uint16_t>(static_cast<_Float16>(value));
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        result = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 lets the FPU round at the right bit
        result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    target.bits = static_cast<uint16_t>(sign | result);
#endif
}

}  // namespace spatialflow
