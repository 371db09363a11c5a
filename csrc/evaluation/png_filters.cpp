// SPDX-License-Identifier: Apache-2.0
#include "evaluation/png_filters.h"

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "evaluation/id_maps.h"

namespace spatialflow {
namespace {

constexpr size_t kGroupPixels = 8;  // pixels whose residuals are compared with zero at once

bool all_zero(const uint8_t* data, size_t size) {
    uint64_t any = 0;
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word;
        std::memcpy(&word, data + i, 8);
        any |= word;
    }
    return any == 0;
}

uint8_t paeth(int left, int above, int corner) {
    const int to_left = std::abs(above - corner);
    const int to_above = std::abs(left - corner);
    const int to_corner = std::abs(left + above - 2 * corner);
    if (to_left <= to_above && to_left <= to_corner) {
        return static_cast<uint8_t>(left);
    }
    return static_cast<uint8_t>(to_above <= to_corner ? above : corner);
}

// Set the next kGroupPixels pixels to the pixel before them.
template <size_t kBytes>
void repeat_left(uint8_t* row) {
    uint8_t pixel[kBytes];
    std::memcpy(pixel, row - kBytes, kBytes);
    for (size_t i = 0; i < kGroupPixels * kBytes; i += kBytes) {
        std::memcpy(row + i, pixel, kBytes);
    }
}

template <size_t kBytes>
void unfilter_sub(const uint8_t* residual, uint8_t* row, size_t bytes) {
    constexpr size_t kStep = kGroupPixels * kBytes;
    size_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
        if (all_zero(residual + i, kStep)) {
            repeat_left<kBytes>(row + i);
        } else {
            for (size_t j = i; j < i + kStep; ++j) {
                row[j] = static_cast<uint8_t>(residual[j] + row[j - kBytes]);
            }
        }
    }
    for (; i < bytes; ++i) {
        row[i] = static_cast<uint8_t>(residual[i] + row[i - kBytes]);
    }
}

// Undo the Paeth filter, with two shortcuts for a group of pixels whose residuals are zero. If the pixels to the left
// and to the upper left of the group are equal, each pixel of the group equals the pixel above. The other shortcut is
// for a group whose upper left pixel and pixels above are all equal. Each pixel of such a group equals the pixel to the
// left of the group.
template <size_t kBytes>
void unfilter_paeth(const uint8_t* residual, const uint8_t* above, uint8_t* row, size_t bytes) {
    constexpr size_t kStep = kGroupPixels * kBytes;
    const auto unfilter_range = [&](size_t begin, size_t end) {
        for (size_t j = begin; j < end; ++j) {
            row[j] = static_cast<uint8_t>(residual[j] + paeth(row[j - kBytes], above[j], above[j - kBytes]));
        }
    };
    size_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
        if (!all_zero(residual + i, kStep)) {
            unfilter_range(i, i + kStep);
        } else if (std::memcmp(row + i - kBytes, above + i - kBytes, kBytes) == 0) {
            std::memcpy(row + i, above + i, kStep);
        } else if (std::memcmp(above + i, above + i - kBytes, kStep) == 0) {
            repeat_left<kBytes>(row + i);
        } else {
            unfilter_range(i, i + kStep);
        }
    }
    unfilter_range(i, bytes);
}

// Decode one line. `residual`, `above` and `row` have `bytes` bytes. One zero pixel must precede `above` and `row`.
// `filter` must be below kPngFilters.
template <size_t kBytes>
void unfilter(int filter, const uint8_t* residual, const uint8_t* above, uint8_t* row, size_t bytes) {
    switch (filter) {
        case 0:
            std::memcpy(row, residual, bytes);
            break;
        case 1:
            unfilter_sub<kBytes>(residual, row, bytes);
            break;
        case 2:
            for (size_t i = 0; i < bytes; ++i) {
                row[i] = static_cast<uint8_t>(residual[i] + above[i]);
            }
            break;
        case 3:
            for (size_t i = 0; i < bytes; ++i) {
                row[i] = static_cast<uint8_t>(residual[i] + ((row[i - kBytes] + above[i]) >> 1));
            }
            break;
        default:
            unfilter_paeth<kBytes>(residual, above, row, bytes);
            break;
    }
}

template <size_t kBytes>
size_t unfilter_image(const uint8_t* lines, size_t height, size_t width, int32_t* ids) {
    const size_t bytes = width * kBytes;
    // Allocate two alternating lines, each after the zero pixel that the format defines to the left of the image.
    std::vector<uint8_t> buffer(2 * (bytes + kBytes));
    uint8_t* above = buffer.data() + kBytes;
    uint8_t* row = above + bytes + kBytes;
    for (size_t y = 0; y < height; ++y) {
        const uint8_t* line = lines + y * (bytes + 1);
        if (line[0] >= kPngFilters) {
            return y;
        }
        unfilter<kBytes>(line[0], line + 1, above, row, bytes);
        int32_t* target = ids + y * width;
        if constexpr (kBytes == 3) {
            decode_ids(row, width, false, target);
        } else {
            for (size_t x = 0; x < width; ++x) {
                target[x] = row[4 * x] | row[4 * x + 1] << 8 | row[4 * x + 2] << 16;
            }
        }
        std::swap(above, row);
    }
    return height;
}

}  // namespace

size_t unfilter_png(const uint8_t* lines, size_t height, size_t width, int channels, int32_t* ids) {
    return channels == 4 ? unfilter_image<4>(lines, height, width, ids) : unfilter_image<3>(lines, height, width, ids);
}

}  // namespace spatialflow
