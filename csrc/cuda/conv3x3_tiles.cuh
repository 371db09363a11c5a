// SPDX-License-Identifier: Apache-2.0
//
// Device code that the 3x3 convolution and its weight gradient share: loads of x + flow, and tiles of maps.
#pragma once

#include <cstring>

#include "cuda/tensor_core.cuh"

namespace spatialflow {

constexpr int kTaps = 9;

// Position of output `o` in a row of 16-bit weights for tensor cores. In every 32 positions, eight adjacent outputs
// have two positions in each of the four groups of eight. A lane holds the sums at these positions, so it stores eight
// adjacent outputs.
__device__ __forceinline__ int64_t packed_position(int64_t o) {
    return o / 32 * 32 + o % 8 / 2 * 8 + o % 32 / 8 * 2 + o % 2;
}

// x + flow of one level, with adjacent channels and any other strides.
template <typename scalar_t>
struct ConvSource {
    Global<const scalar_t> x, flow;        // (N, H, W, C); flow: null for none
    int64_t x_n, x_h, x_w, f_n, f_h, f_w;  // strides
    int height, width, channels;
};

// Load kCount channels of x + flow from `c` on, rounded to scalar_t; zeros outside the map and beyond the channels.
// With kWidth > 1, kWidth channels are one access, and the number of channels is a multiple of kWidth.
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
            const Vec<scalar_t, kWidth> values = load_vector<kWidth>(features + i);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                sum[i + j] = values[j];
            }
        }
    }
    if (source.flow) {
        const Global<const scalar_t> flows = source.flow + (image * source.f_n + y * source.f_h + x * source.f_w + c);
#pragma unroll
        for (int i = 0; i < kCount; i += kWidth) {
            if (c + i < source.channels) {
                const Vec<scalar_t, kWidth> values = load_vector<kWidth>(flows + i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    store(sum[i + j], load(sum[i + j]) + load(values[j]));
                }
            }
        }
    }
    return sum;
}

// Load 16 bytes of channels; channels from `left` on are zeros. kWidth as in load_sum.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ Vec<unsigned, 4> load_words(const Global<const scalar_t>& source, int left) {
    Vec<unsigned, 4> words{};
    constexpr int kCount = kVectorElements<scalar_t>;
    if constexpr (kWidth == kCount) {
        if (left > 0) {
            words = load_vector<4>(pointer_cast<const unsigned>(source));
        }
    } else {
        Vec<scalar_t, kCount> values{};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i < left) {
                values[i] = source[i];
            }
        }
        memcpy(&words, &values, sizeof(words));
    }
    return words;
}

// Terms of x + flow. They are added only when the sum is stored, so that their loads stay in flight until then.
struct SumTerms {
    Vec<unsigned, 4> x, flow;
};

// Add the terms; without a flow its words are zero.
template <typename scalar_t>
__device__ __forceinline__ Vec<unsigned, 4> sum_of(const SumTerms& terms) {
    Vec<unsigned, 4> sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(scalar_t) == 2) {
            sum[i] = add_pairs(terms.x[i], terms.flow[i], scalar_t{});
        } else {
            sum[i] = __float_as_uint(__uint_as_float(terms.x[i]) + __uint_as_float(terms.flow[i]));
        }
    }
    return sum;
}

// Rectangle of a map; parts of it may be outside.
struct MapTile {
    int image, y, x;  // of its first pixel
};

// Tile number `index` of a level with `rows` x `columns` tiles per image.
template <int kHeight, int kWidth>
__device__ __forceinline__ MapTile map_tile(int index, int rows, int columns) {
    const int row = index / columns;
    return {row / rows, row % rows * kHeight, (index - row * columns) * kWidth};
}

// Number of the entry that contains a tile; entries are ordered by `tile_begin`.
template <typename Entry>
__device__ __forceinline__ int entry_of_tile(const Entry* entries, int count, int tile) {
    int entry = 0;
    while (entry + 1 < count && tile >= entries[entry + 1].tile_begin) {
        ++entry;
    }
    return entry;
}

// Loader of 16 bytes of each pixel of a tile and its halo, for a thread of a tensor-core kernel. kCount is the number
// of pixels, including the padding of the last chunk. `pixel_offsets` in shared memory holds the offset of each pixel
// in x and in flow, -1 outside the map. So a load needs few instructions.
template <int kHeight, int kWidth, int kCount, typename scalar_t>
struct InputReader {
    Global<const scalar_t> x{nullptr}, flow{nullptr};
    int x_left = 0, flow_left = 0;  // remaining channels

    // All threads of the block must call it, with barriers before and after.
    __device__ __forceinline__ void begin(
        const ConvSource<scalar_t>& source, const MapTile& map, int channel, const Shared<int64_t>& pixel_offsets) {
        constexpr int kHaloWidth = kWidth + 2;
#pragma unroll 1
        for (int pixel = static_cast<int>(threadIdx.x); pixel < kCount; pixel += static_cast<int>(blockDim.x)) {
            const int row = pixel / kHaloWidth, map_y = map.y + row - 1, map_x = map.x + pixel % kHaloWidth - 1;
            const bool inside =
                row < kHeight + 2 && map_y >= 0 && map_y < source.height && map_x >= 0 && map_x < source.width;
            const Vec<int64_t, 2> offsets = {
                {inside ? map_y * source.x_h + map_x * source.x_w : -1,
                 inside ? map_y * source.f_h + map_x * source.f_w : -1}};
            store_vector(pixel_offsets + 2 * pixel, offsets);
        }
        x = source.x + (map.image * source.x_n + channel);
        x_left = source.channels - channel;
        flow_left = 0;
        if (source.flow) {
            flow = source.flow + (map.image * source.f_n + channel);
            flow_left = x_left;
        }
    }
    __device__ __forceinline__ void end() { x_left = flow_left = 0; }
    __device__ __forceinline__ void advance(int channels) {
        x += channels;
        flow += channels;
        x_left -= channels;
        flow_left -= channels;
    }
    template <int kAccess>
    __device__ __forceinline__ SumTerms fetch(const Shared<int64_t>& pixel_offsets, int pixel) const {
        const Vec<int64_t, 2> offsets = load_vector<2>(pixel_offsets + 2 * pixel);
        SumTerms terms{};
        if (offsets[0] >= 0) {
            terms.x = load_words<kAccess>(x + offsets[0], x_left);
            if (flow_left > 0) {
                terms.flow = load_words<kAccess>(flow + offsets[1], flow_left);
            }
        }
        return terms;
    }
};

}  // namespace spatialflow
