// SPDX-License-Identifier: Apache-2.0
#include "png.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "inflate.h"

namespace spatialflow::evaluation {
namespace {

constexpr uint8_t kSignature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
constexpr size_t kHeaderEnd = 33;  // signature, and IHDR with its length, type and checksum
constexpr size_t kGroup = 8;       // pixels tested at once for the short cuts

uint32_t big_endian(const uint8_t* data) {
    return static_cast<uint32_t>(data[0]) << 24 | data[1] << 16 | data[2] << 8 | data[3];
}

// CRC-32 by eight tables, eight bytes a step.
uint32_t checksum(const uint8_t* data, size_t size) {
    static const auto tables = [] {
        std::array<std::array<uint32_t, 256>, 8> result{};
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t value = byte;
            for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0u);
            result[0][byte] = value;
        }
        for (int t = 1; t < 8; ++t) {
            for (int byte = 0; byte < 256; ++byte) {
                const uint32_t value = result[t - 1][byte];
                result[t][byte] = value >> 8 ^ result[0][value & 0xFF];
            }
        }
        return result;
    }();
    uint32_t crc = 0xFFFFFFFFu;
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t next = 0;
        for (int i = 0; i < 4; ++i) next ^= tables[7 - i][data[i] ^ (crc >> 8 * i & 0xFF)] ^ tables[3 - i][data[4 + i]];
        crc = next;
    }
    for (; size > 0; ++data, --size) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 0xFF];
    return ~crc;
}

// The compressed pixels: the content of all IDAT chunks, less the two bytes of the zlib header.
std::vector<uint8_t> compressed_pixels(const uint8_t* data, size_t size) {
    std::vector<uint8_t> stream;
    for (size_t at = kHeaderEnd; at + 12 <= size;) {
        const size_t length = big_endian(data + at);
        if (length > size - at - 12) throw PngError("damaged PNG: a chunk is longer than the file");
        const bool is_pixels = std::memcmp(data + at + 4, "IDAT", 4) == 0;
        if (is_pixels || std::memcmp(data + at + 4, "IEND", 4) == 0) {
            if (checksum(data + at + 4, length + 4) != big_endian(data + at + 8 + length)) {
                throw PngError("damaged PNG: a checksum does not match");
            }
            if (!is_pixels) {
                if (stream.size() < 2 || (stream[0] & 0xF) != 8 || (stream[0] << 8 | stream[1]) % 31 != 0) {
                    throw PngError("damaged PNG: no compressed pixels");
                }
                stream.erase(stream.begin(), stream.begin() + 2);
                return stream;
            }
            stream.insert(stream.end(), data + at + 8, data + at + 8 + length);
        }
        at += length + 12;
    }
    throw PngError("truncated PNG: the file ends before its last chunk");
}

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
    if (to_left <= to_above && to_left <= to_corner) return static_cast<uint8_t>(left);
    return static_cast<uint8_t>(to_above <= to_corner ? above : corner);
}

// The next kGroup pixels repeat the one before them.
template <size_t kBytes>
void repeat_left(uint8_t* row) {
    uint8_t pixel[kBytes];
    std::memcpy(pixel, row - kBytes, kBytes);
    for (size_t i = 0; i < kGroup * kBytes; i += kBytes) std::memcpy(row + i, pixel, kBytes);
}

template <size_t kBytes>
void unfilter_sub(const uint8_t* residual, uint8_t* row, size_t bytes) {
    constexpr size_t kStep = kGroup * kBytes;
    size_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
        if (all_zero(residual + i, kStep)) {
            repeat_left<kBytes>(row + i);
        } else {
            for (size_t j = i; j < i + kStep; ++j) row[j] = static_cast<uint8_t>(residual[j] + row[j - kBytes]);
        }
    }
    for (; i < bytes; ++i) row[i] = static_cast<uint8_t>(residual[i] + row[i - kBytes]);
}

// With a zero residual: if left equals corner the result is the pixel above, and so it stays to the right of it; if
// the pixels above are all equal the result is the pixel to the left.
template <size_t kBytes>
void unfilter_paeth(const uint8_t* residual, const uint8_t* above, uint8_t* row, size_t bytes) {
    constexpr size_t kStep = kGroup * kBytes;
    const auto plain = [&](size_t begin, size_t end) {
        for (size_t j = begin; j < end; ++j) {
            row[j] = static_cast<uint8_t>(residual[j] + paeth(row[j - kBytes], above[j], above[j - kBytes]));
        }
    };
    size_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
        if (!all_zero(residual + i, kStep)) {
            plain(i, i + kStep);
        } else if (std::memcmp(row + i - kBytes, above + i - kBytes, kBytes) == 0) {
            std::memcpy(row + i, above + i, kStep);
        } else if (std::memcmp(above + i, above + i - kBytes, kStep) == 0) {
            repeat_left<kBytes>(row + i);
        } else {
            plain(i, i + kStep);
        }
    }
    plain(i, bytes);
}

// One line: residual (bytes), above and row (bytes) with one zero pixel before each.
template <size_t kBytes>
void unfilter(int filter, const uint8_t* residual, const uint8_t* above, uint8_t* row, size_t bytes) {
    switch (filter) {
        case 0: std::memcpy(row, residual, bytes); break;
        case 1: unfilter_sub<kBytes>(residual, row, bytes); break;
        case 2:
            for (size_t i = 0; i < bytes; ++i) row[i] = static_cast<uint8_t>(residual[i] + above[i]);
            break;
        case 3:
            for (size_t i = 0; i < bytes; ++i) {
                row[i] = static_cast<uint8_t>(residual[i] + ((row[i - kBytes] + above[i]) >> 1));
            }
            break;
        case 4: unfilter_paeth<kBytes>(residual, above, row, bytes); break;
        default: throw PngError("damaged PNG: unknown filter " + std::to_string(filter));
    }
}

template <size_t kBytes>
void unfilter_image(const uint8_t* lines, PngSize size, uint8_t* pixels) {
    const size_t bytes = size.width * kBytes;
    // Two lines in turn, each with the zero pixel that the format puts to the left of the image.
    std::vector<uint8_t> buffer(2 * (bytes + kBytes));
    uint8_t* above = buffer.data() + kBytes;
    uint8_t* row = above + bytes + kBytes;
    for (size_t y = 0; y < size.height; ++y) {
        const uint8_t* line = lines + y * (bytes + 1);
        unfilter<kBytes>(line[0], line + 1, above, row, bytes);
        uint8_t* target = pixels + y * size.width * 3;
        if constexpr (kBytes == 3) {
            std::memcpy(target, row, bytes);
        } else {
            for (size_t x = 0; x < size.width; ++x) std::memcpy(target + 3 * x, row + kBytes * x, 3);
        }
        std::swap(above, row);
    }
}

}  // namespace

PngSize read_png_header(const uint8_t* data, size_t size) {
    if (size < kHeaderEnd || std::memcmp(data, kSignature, sizeof kSignature) != 0) throw PngError("not a PNG file");
    if (std::memcmp(data + 12, "IHDR", 4) != 0 || checksum(data + 12, 17) != big_endian(data + 29)) {
        throw PngError("damaged PNG: bad header");
    }
    const PngSize result{big_endian(data + 20), big_endian(data + 16)};
    const int depth = data[24], colour = data[25];
    if (depth != 8 || (colour != 2 && colour != 6)) {
        const char* kind = colour == 0 ? "grey" : colour == 3 ? "palette" : colour == 4 ? "grey with alpha" : "RGB";
        throw PngError("a panoptic PNG is 8-bit RGB, this one is " + std::to_string(depth) + "-bit " + kind);
    }
    if (data[28] != 0) throw PngError("interlaced PNG; a panoptic PNG must not be interlaced");
    if (result.height == 0 || result.width == 0) throw PngError("damaged PNG: the image has no pixels");
    // DEFLATE gains at most a factor of 1032. A header that promises more is not worth the memory it asks for.
    const size_t line = 1 + result.width * (colour == 2 ? 3 : 4);
    if (line > 1032 * size / result.height + 1032) throw PngError("damaged PNG: the file is too short for its image");
    return result;
}

void decode_png(const uint8_t* data, size_t size, uint8_t* pixels) {
    const PngSize image = read_png_header(data, size);
    const bool alpha = data[25] == 6;
    const size_t total = image.height * (1 + image.width * (alpha ? 4 : 3));
    const std::vector<uint8_t> stream = compressed_pixels(data, size);
    const std::unique_ptr<uint8_t[]> lines(new uint8_t[total + kInflateSlack]);
    if (const char* error = inflate(stream.data(), stream.size(), lines.get(), total)) {
        throw PngError(std::string("damaged PNG: ") + error);
    }
    if (alpha) {
        unfilter_image<4>(lines.get(), image, pixels);
    } else {
        unfilter_image<3>(lines.get(), image, pixels);
    }
}

}  // namespace spatialflow::evaluation
