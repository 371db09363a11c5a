// SPDX-License-Identifier: Apache-2.0
//
// SIMD vectors with the width of the target instruction set (one library per instruction set, see CMakeLists.txt). They
// are GCC/Clang vector extensions, whose arithmetic operators work on lanes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/scalar.h"

namespace spatialflow {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename real_t>
struct VectorOf {
    typedef real_t type __attribute__((vector_size(kVectorBytes)));
};
template <typename real_t>
using Vector = typename VectorOf<real_t>::type;

template <typename real_t>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(real_t));

template <typename real_t>
inline Vector<real_t> broadcast(real_t value) {
    return Vector<real_t>{} + value;
}

// Maximum or minimum per lane; `b` if either is NaN, as the x86 instructions do.
template <typename vector_t>
inline vector_t lane_max(vector_t a, vector_t b) {
    return a > b ? a : b;
}
template <typename vector_t>
inline vector_t lane_min(vector_t a, vector_t b) {
    return a < b ? a : b;
}

// Largest lane; no lane may be NaN.
inline float largest_lane(Vector<float> value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(bit_cast<__m512>(value));
#else
    float best = value[0];
    for (int lane = 1; lane < kLanes<float>; ++lane) {
        best = value[lane] > best ? value[lane] : best;
    }
    return best;
#endif
}
inline double largest_lane(Vector<double> value) {
    double best = value[0];
    for (int lane = 1; lane < kLanes<double>; ++lane) {
        best = value[lane] > best ? value[lane] : best;
    }
    return best;
}

// Whether any lane of a comparison's result (all bits or no bit per lane) is set.
template <typename mask_t>
inline bool any_lane(mask_t mask) {
    static_assert(sizeof(mask) == kVectorBytes, "any_lane takes the result of comparing two vectors");
#if defined(__AVX512F__)
    const __m512i bits = bit_cast<__m512i>(mask);
    return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_epi8(bit_cast<__m128i>(mask)) != 0;
#else
    uint64_t words[kVectorBytes / 8], any = 0;
    std::memcpy(words, &mask, sizeof(words));
    for (uint64_t word : words) {
        any |= word;
    }
    return any != 0;
#endif
}

// Load kLanes<accum_t<scalar_t>> consecutive values, converted to the compute type. No alignment is needed.
inline Vector<float> load_vector(const float* source) {
    Vector<float> value;
    std::memcpy(&value, source, sizeof(value));
    return value;
}
inline Vector<double> load_vector(const double* source) {
    Vector<double> value;
    std::memcpy(&value, source, sizeof(value));
    return value;
}
inline Vector<float> load_vector(const bfloat16* source) {
    typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
    Bits16 bits;
    std::memcpy(&bits, source, sizeof(bits));
    return bit_cast<Vector<float>>(__builtin_convertvector(bits, Bits32) << 16);
}
inline Vector<float> load_vector(const float16* source) {
#if defined(__AVX512F__)
    // Avoid _mm512_cvtph_ps, the same instruction: GCC 12 emits a warning in its header.
    return _mm512_maskz_cvtph_ps(
        static_cast<__mmask16>(0xffff), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Vector<float> value;
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        value[lane] = load(source[lane]);
    }
    return value;
#endif
}

inline void store_vector(float* target, Vector<float> value) { std::memcpy(target, &value, sizeof(value)); }
inline void store_vector(double* target, Vector<double> value) { std::memcpy(target, &value, sizeof(value)); }
inline void store_vector(bfloat16* target, Vector<float> value) {
    typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
    const Bits32 bits = bit_cast<Bits32>(value);
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits32 nan = Bits32{} + 0x7fc0u;
    const Bits16 result = __builtin_convertvector(value != value ? nan : rounded, Bits16);
    std::memcpy(target, &result, sizeof(result));
}
inline void store_vector(float16* target, Vector<float> value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        store(target[lane], value[lane]);
    }
#endif
}

// Load or store only the first `count` lanes. The other lanes are loaded as zero and not stored.
template <typename scalar_t>
inline Vector<accum_t<scalar_t>> load_partial(const scalar_t* source, int count) {
    scalar_t lanes[kLanes<accum_t<scalar_t>>] = {};
    std::memcpy(lanes, source, sizeof(scalar_t) * static_cast<size_t>(count));
    return load_vector(lanes);
}
template <typename scalar_t>
inline void store_partial(scalar_t* target, Vector<accum_t<scalar_t>> value, int count) {
    scalar_t lanes[kLanes<accum_t<scalar_t>>];
    store_vector(lanes, value);
    std::memcpy(target, lanes, sizeof(scalar_t) * static_cast<size_t>(count));
}

#if defined(__AVX512F__)
inline Vector<float> load_partial(const float* source, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), source);
}
inline Vector<double> load_partial(const double* source, int count) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), source);
}
inline void store_partial(float* target, Vector<float> value, int count) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), value);
}
inline void store_partial(double* target, Vector<double> value, int count) {
    _mm512_mask_storeu_pd(target, static_cast<__mmask8>((1u << count) - 1u), value);
}
#endif

}  // namespace spatialflow
