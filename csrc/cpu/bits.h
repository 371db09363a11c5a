// SPDX-License-Identifier: Apache-2.0
//
// Bit masks: 64 pixels of a row per word, lowest bit first. Each row starts with a new word; bits past its end are 0.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace spatialflow {

constexpr int64_t kWordPixels = 64;

inline int64_t words_per_row(int64_t width) { return (width + kWordPixels - 1) / kWordPixels; }

inline int64_t bit_count(uint64_t word) { return __builtin_popcountll(word); }
inline int64_t lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
inline int64_t highest_bit(uint64_t word) { return 63 - __builtin_clzll(word); }

// Bits [begin, end) of a word, 0 <= begin < end <= 64.
inline uint64_t bit_range(int64_t begin, int64_t end) {
    return (~uint64_t{0} << begin) & (~uint64_t{0} >> (kWordPixels - end));
}

// Pack 64 bytes: bit i is set if byte i is not zero.
inline uint64_t pack_word(const uint8_t* bytes) {
#if defined(__AVX512BW__)
    const __m512i value = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(value, value);
#elif defined(__AVX2__)
    const __m256i zero = _mm256_setzero_si256();
    const auto low = static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), zero)));
    const auto high = static_cast<uint32_t>(_mm256_movemask_epi8(
        _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)), zero)));
    return ~(static_cast<uint64_t>(high) << 32 | low);
#elif defined(__SSE2__)
    uint64_t zeros = 0;
    for (int part = 0; part < 4; ++part) {
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * part));
        const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(value, _mm_setzero_si128())));
        zeros |= static_cast<uint64_t>(mask) << 16 * part;
    }
    return ~zeros;
#else
    uint64_t word = 0;
    for (int i = 0; i < kWordPixels; ++i) {
        word |= static_cast<uint64_t>(bytes[i] != 0) << i;
    }
    return word;
#endif
}

// Pack a row. Return the number of set bits.
inline int64_t pack_row(const uint8_t* bytes, int64_t width, uint64_t* words) {
    int64_t count = 0;
    int64_t x = 0;
    for (; x + kWordPixels <= width; x += kWordPixels) {
        count += bit_count(*words++ = pack_word(bytes + x));
    }
    if (x < width) {
        uint8_t rest[kWordPixels] = {};
        std::memcpy(rest, bytes + x, static_cast<size_t>(width - x));
        count += bit_count(*words = pack_word(rest));
    }
    return count;
}

// Set pixels[i] = value where bit i is set. Other pixels are neither written nor read, so the word may end past the
// row.
inline void paint_word(int32_t* pixels, uint64_t word, int32_t value) {
#if defined(__AVX512F__)
    const __m512i values = _mm512_set1_epi32(value);
    for (int part = 0; part < 4; ++part) {
        _mm512_mask_storeu_epi32(pixels + 16 * part, static_cast<__mmask16>(word >> 16 * part), values);
    }
#else
    if (word == ~uint64_t{0}) {
        for (int i = 0; i < kWordPixels; ++i) {
            pixels[i] = value;
        }
        return;
    }
    for (; word != 0; word &= word - 1) {
        pixels[lowest_bit(word)] = value;
    }
#endif
}

}  // namespace spatialflow
