// SPDX-License-Identifier: Apache-2.0
//
// What the 3x3 convolution and its weight gradient share on the device: maps read as x + flow, and tiles of maps.
#pragma once

#include <cstring>

#include "cuda/tensor_core.h"

namespace spatialflow {

constexpr int kTaps = 9;

// Where output `o` lies in a row of weights for tensor cores. Within 32 outputs, eight side by side are two in each of
// four blocks of eight, which is what a lane holds of a product: it stores its results as they are.
__device__ __forceinline__ int64_t packed_position(int64_t o) {
    return o / 32 * 32 + o % 8 / 2 * 8 + o % 32 / 8 * 2 + o % 2;
}

// x + flow of one level; channels adjacent, the rest by strides.
template <typename scalar_t>
struct ConvSource {
    Global<const scalar_t> x, flow;        // (N, H, W, C); flow: null for none
    int64_t x_n, x_h, x_w, f_n, f_h, f_w;  // strides
    int height, width, channels;
};

// kCount channels of x + flow from `c` on, rounded to scalar_t; zeros outside the map and beyond the channels. With
// kWidth > 1 that many channels are one access, and the number of channels is a multiple of it.
template <int kCount, int kWidth, typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, kCount> load_sum(
    const ConvSource<scalar_t>& source, int image, int y, int x, int c) {
    Vec<scalar_t, kCount> sum{};
    if (y < 0 || y >= source.height || x < 0 || x >= source.width) {
        return sum;
    }
    const Global<const scalar_t> features = source.x + (image * source.x_n + y * source.x_h + x * source.x_w + c);
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
        if (c + i < source.channels) {
            const Vec<scalar_t, kWidth> some = load_vector<kWidth>(features + i);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                sum[i + j] = some[j];
            }
        }
    }
    if (source.flow) {
        const Global<const scalar_t> flows =
            source.flow + (image * source.f_n + y * source.f_h + x * source.f_w + c);
#pragma unroll
        for (int i = 0; i < kCount; i += kWidth) {
            if (c + i < source.channels) {
                const Vec<scalar_t, kWidth> some = load_vector<kWidth>(flows + i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    store(sum[i + j], load(sum[i + j]) + load(some[j]));
                }
            }
        }
    }
    return sum;
}

// Eight 16-bit channels as they lie in memory; zeros beyond the `left` ones. kWidth as in load_sum.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ Vec<unsigned, 4> load_words(const Global<const scalar_t>& source, int left) {
    Vec<unsigned, 4> words{};
    if constexpr (kWidth == 8) {
        if (left > 0) {
            words = load_vector<4>(pointer_cast<const unsigned>(source));
        }
    } else {
        Vec<scalar_t, 8> values{};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < left) {
                values[i] = source[i];
            }
        }
        memcpy(&words, &values, sizeof(words));
    }
    return words;
}

// load_sum<8> in two halves: loads on their way, to be added once they are needed.
struct SumTerms {
    Vec<unsigned, 4> x, flow;
};

template <int kWidth, typename scalar_t>
__device__ __forceinline__ SumTerms load_terms(
    const ConvSource<scalar_t>& source, int image, int y, int x, int c) {
    SumTerms terms{};
    if (y >= 0 && y < source.height && x >= 0 && x < source.width) {
        terms.x = load_words<kWidth>(
            source.x + (image * source.x_n + y * source.x_h + x * source.x_w + c), source.channels - c);
        if (source.flow) {
            terms.flow = load_words<kWidth>(
                source.flow + (image * source.f_n + y * source.f_h + x * source.f_w + c), source.channels - c);
        }
    }
    return terms;
}

// Without a flow its words are zeros, which change no value.
template <typename scalar_t>
__device__ __forceinline__ Vec<unsigned, 4> sum_of(const SumTerms& terms) {
    Vec<unsigned, 4> sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[i] = add_pairs(terms.x[i], terms.flow[i], scalar_t{});
    }
    return sum;
}

// A rectangle of a map; parts of it may lie outside.
struct MapTile {
    int image, y, x;  // of its first pixel
};

// Tile `index` of a level that has `rows` x `columns` of them in each image.
template <int kHeight, int kWidth>
__device__ __forceinline__ MapTile map_tile(int index, int rows, int columns) {
    const int row = index / columns;
    return {row / rows, row % rows * kHeight, (index - row * columns) * kWidth};
}

// The entry of a table, ordered by `tile_begin`, that a tile belongs to.
template <typename Entry>
__device__ __forceinline__ int entry_of_tile(const Entry* entries, int count, int tile) {
    int entry = 0;
    while (entry + 1 < count && tile >= entries[entry + 1].tile_begin) {
        ++entry;
    }
    return entry;
}

}  // namespace spatialflow
