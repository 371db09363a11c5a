// SPDX-License-Identifier: Apache-2.0
#include "evaluation/id_maps.h"

#include "evaluation/clones.h"

namespace spatialflow {

namespace {

SPATIALFLOW_CLONES void decode_portable(
    const uint8_t* __restrict__ pixels, size_t count, bool bgr, int32_t* __restrict__ ids) {
    const int red = bgr ? 2 : 0;
    const int blue = 2 - red;
    for (size_t i = 0; i < count; ++i) {
        ids[i] = pixels[3 * i + red] | pixels[3 * i + 1] << 8 | pixels[3 * i + blue] << 16;
    }
}

#ifdef SPATIALFLOW_AVX512
// Decode 16 pixels per step: distribute their 48 bytes over four 16-byte lanes, 12 bytes each, and shuffle them to ids.
// Return the number of decoded pixels. A step reads 64 bytes, so the caller must decode the last pixels.
SPATIALFLOW_AVX512 size_t decode_avx512(const uint8_t* pixels, size_t count, bool bgr, int32_t* ids) {
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m512i rgb_order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    const __m512i bgr_order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 1, 0, -1, 5, 4, 3, -1, 8, 7, 6, -1, 11, 10, 9, -1));
    const __m512i order = bgr ? bgr_order : rgb_order;
    size_t i = 0;
    for (; 3 * i + 64 <= 3 * count; i += 16) {
        const __m512i bytes = _mm512_loadu_si512(pixels + 3 * i);
        _mm512_storeu_si512(ids + i, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(spread, bytes), order));
    }
    return i;
}
#endif

}  // namespace

void decode_ids(const uint8_t* pixels, size_t count, bool bgr, int32_t* ids) {
    size_t decoded = 0;
#ifdef SPATIALFLOW_AVX512
    if (has_avx512()) {
        decoded = decode_avx512(pixels, count, bgr, ids);
    }
#endif
    decode_portable(pixels + 3 * decoded, count - decoded, bgr, ids + decoded);
}

SPATIALFLOW_CLONES size_t
encode_ids(const int32_t* __restrict__ ids, size_t count, bool bgr, uint8_t* __restrict__ pixels) {
    uint32_t bits = 0;
    for (size_t i = 0; i < count; ++i) {
        bits |= static_cast<uint32_t>(ids[i]);
    }
    if (bits > static_cast<uint32_t>(kLargestId)) {
        for (size_t i = 0; i < count; ++i) {
            if (static_cast<uint32_t>(ids[i]) > static_cast<uint32_t>(kLargestId)) {
                return i;
            }
        }
    }
    const int red = bgr ? 2 : 0;
    const int blue = 2 - red;
    for (size_t i = 0; i < count; ++i) {
        pixels[3 * i + red] = static_cast<uint8_t>(ids[i]);
        pixels[3 * i + 1] = static_cast<uint8_t>(ids[i] >> 8);
        pixels[3 * i + blue] = static_cast<uint8_t>(ids[i] >> 16);
    }
    return count;
}

}  // namespace spatialflow
