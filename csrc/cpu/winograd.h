// SPDX-License-Identifier: Apache-2.0
//
// Tiles of a pyramid for Winograd's F(4x4, 3x3) (common/winograd.h) and their two-dimensional transforms. Tile (ty, tx)
// of a map computes output rows 4 ty .. 4 ty + 3 from input rows 4 ty - 1 .. 4 ty + 4. The same holds for columns.
#pragma once

#include <vector>

#include "common/winograd.h"
#include "cpu/conv3x3.h"

namespace spatialflow {

struct WinogradTile {
    int64_t level, image, y, x;  // y, x: first output pixel
};

// List of the tiles of all levels: level by level, image by image, row by row.
class WinogradTiles {
public:
    void add_level(int64_t batch, int64_t height, int64_t width) {
        rows_.push_back((height + kWinogradOutput - 1) / kWinogradOutput);
        columns_.push_back((width + kWinogradOutput - 1) / kWinogradOutput);
        end_.push_back(count() + batch * rows_.back() * columns_.back());
    }
    int64_t count() const { return count(end_.size()); }
    // Number of tiles of the first `levels` levels.
    int64_t count(size_t levels) const { return levels == 0 ? 0 : end_[levels - 1]; }

    WinogradTile operator[](int64_t index) const {
        size_t level = 0;
        while (index >= end_[level]) {
            ++level;
        }
        index -= count(level);
        const int64_t row = index / columns_[level];
        return {
            static_cast<int64_t>(level), row / rows_[level], row % rows_[level] * kWinogradOutput,
            index % columns_[level] * kWinogradOutput};
    }

private:
    std::vector<int64_t> rows_, columns_, end_;
};

// Addresses of the 6x6 input pixels of a tile. Pixels outside the map have the address `zeros`, a pixel of zeros.
template <typename scalar_t>
inline void input_pixels(
    const scalar_t* map, int64_t height, int64_t width, int64_t channels, const WinogradTile& tile,
    const scalar_t* zeros, const scalar_t* (&pixels)[kWinogradProducts]) {
    const scalar_t* image = map + tile.image * height * width * channels;
    for (int64_t i = 0; i < kWinogradInput; ++i) {
        const int64_t y = tile.y - 1 + i;
        for (int64_t j = 0; j < kWinogradInput; ++j) {
            const int64_t x = tile.x - 1 + j;
            const bool inside = y >= 0 && y < height && x >= 0 && x < width;
            pixels[i * kWinogradInput + j] = inside ? image + (y * width + x) * channels : zeros;
        }
    }
}

// Compute B^T (x + flow) B. Element (i, j) of channel c is written to products[(6 i + j) * product_stride + c].
template <bool kFlow, typename scalar_t>
void transform_input(
    const scalar_t* const (&x)[kWinogradProducts], const scalar_t* const (&flow)[kWinogradProducts], int64_t channels,
    accum_t<scalar_t>* products, int64_t product_stride) {
    using real_t = accum_t<scalar_t>;
    for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto&) {
        Vector<real_t> half[6][6], line[6], result[6];
        for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                line[i] = load(x[6 * i + j] + c);
                if (kFlow) {
                    line[i] += load(flow[6 * i + j] + c);
                }
            }
            winograd_input(line, result);
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                half[i][j] = result[i];
            }
        }
        for (int i = 0; i < 6; ++i) {
            winograd_input(half[i], result);
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) {
                // Rows of products are padded to whole vectors.
                store_vector(products + (6 * i + j) * product_stride + c, result[j]);
            }
        }
    });
}

// Transform one tile of a level.
template <typename scalar_t>
void transform_input(
    const ConvLevel<scalar_t>& level, int64_t channels, const WinogradTile& tile, const scalar_t* zeros,
    accum_t<scalar_t>* products, int64_t product_stride) {
    const scalar_t *x[kWinogradProducts], *flow[kWinogradProducts];
    input_pixels(level.x, level.height, level.width, channels, tile, zeros, x);
    if (level.flow) {
        input_pixels(level.flow, level.height, level.width, channels, tile, zeros, flow);
        transform_input<true>(x, flow, channels, products, product_stride);
    } else {
        transform_input<false>(x, x, channels, products, product_stride);
    }
}

// Compute A^T products A plus bias and residual, with an optional ReLU. Only the first height x width pixels of the
// tile are written; the others lie outside the map.
template <typename scalar_t>
void transform_output(
    const accum_t<scalar_t>* products, int64_t product_stride, int64_t channels, const accum_t<scalar_t>* bias,
    bool relu, int64_t height, int64_t width,
    const scalar_t* residual,  // pixel (0, 0) of the tile, or null
    scalar_t* out,             // pixel (0, 0) of the tile
    int64_t row_stride) {      // values from one row of out and residual to the next; a pixel has `channels` values
    using real_t = accum_t<scalar_t>;
    for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto& store) {
        Vector<real_t> half[4][6], line[6], result[4];
        for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                line[i] = load_vector(products + (6 * i + j) * product_stride + c);
            }
            winograd_output(line, result);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                half[i][j] = result[i];
            }
        }
        const Vector<real_t> offset = bias ? load(bias + c) : Vector<real_t>{};
        for (int64_t i = 0; i < height; ++i) {
            winograd_output(half[i], result);
            const int64_t row = i * row_stride + c;
            for (int64_t j = 0; j < width; ++j) {
                Vector<real_t> value = result[j] + offset;
                if (residual) {
                    value += load(residual + row + j * channels);
                }
                store(out + row + j * channels, relu ? rectified(value) : value);
            }
        }
    });
}

}  // namespace spatialflow
