// SPDX-License-Identifier: Apache-2.0
//
// Table of the convolutions of one launch of conv3x3.cu, their tiles, and skipping of inactive images.
#pragma once

#include <algorithm>

#include "cuda/conv3x3.h"

namespace spatialflow {

constexpr int kMaxEntries = 24;

// Convolution on one level.
template <typename scalar_t>
struct ConvEntry {
    ConvSource<scalar_t> source;
    Global<const scalar_t> weights;        // (9, C, O padded)
    Global<const accum_t<scalar_t>> bias;  // (O) or null
    Global<const scalar_t> residual;       // (N, H, W, O) or null
    Global<scalar_t> out;                  // (N, H, W, O)
    int outputs;
    bool relu;
    bool vectorized;                            // outputs and residual allow accesses of 16 bytes
    int tile_begin;                             // first tile in the launch
    int tile_rows, tile_columns, output_tiles;  // of an image
};

template <typename scalar_t>
struct ConvTable {
    ConvEntry<scalar_t> entries[kMaxEntries];
    int num_entries, num_tiles;
    Global<const uint8_t> active;  // (N), zero for inactive images; or null
};
#if defined(__CUDACC__)
static_assert(sizeof(ConvTable<double>) <= 4096, "kernel parameters fit on every toolkit and driver");
#endif

// A tile of pixels and outputs: its index in the launch, its entry in the table, and its first output.
struct ConvTile {
    int index, entry, output;
};

template <int kOutputs, typename scalar_t>
__device__ __forceinline__ ConvTile conv_tile(const ConvTable<scalar_t>& table, int tile) {
    const int index = entry_of_tile(table.entries, table.num_entries, tile);
    return {tile, index, (tile - table.entries[index].tile_begin) % table.entries[index].output_tiles * kOutputs};
}

// Pixels of a tile.
template <int kHeight, int kWidth, typename scalar_t>
__device__ __forceinline__ MapTile map_of(const ConvTable<scalar_t>& table, const ConvTile& tile) {
    const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
    return map_tile<kHeight, kWidth>(
        (tile.index - entry.tile_begin) / entry.output_tiles, entry.tile_rows, entry.tile_columns);
}

__device__ __forceinline__ int padded_outputs(int outputs) {
    constexpr int kPadding = static_cast<int>(kPackedOutputs);
    return (outputs + kPadding - 1) / kPadding * kPadding;
}

// Offset of the first output of a pixel.
template <typename scalar_t>
__device__ __forceinline__ int64_t output_at(const ConvEntry<scalar_t>& entry, int image, int y, int x) {
    return ((static_cast<int64_t>(image) * entry.source.height + y) * entry.source.width + x) * entry.outputs;
}

// Load eight adjacent outputs, of which the first `count` exist; others are zero. With `vectorized` all or none exist.
template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> load_present(
    const Global<const scalar_t>& source, bool vectorized, int count) {
    Vec<scalar_t, 8> values{};
    if (vectorized) {
        if (count > 0) {
            values = load_vector<8>(source);
        }
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if (e < count) {
                values[e] = source[e];
            }
        }
    }
    return values;
}

// Store the first `count` of eight adjacent 16-bit outputs; each word holds two. With `vectorized` all or none exist.
template <typename scalar_t>
__device__ __forceinline__ void store_present(
    const Global<scalar_t>& target, bool vectorized, int count, const Vec<unsigned, 4>& words) {
    if (vectorized) {
        if (count > 0) {
            store_vector(pointer_cast<unsigned>(target), words);
        }
        return;
    }
    Vec<scalar_t, 8> values;
    memcpy(&values, &words, sizeof(words));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if (e < count) {
            target[e] = values[e];
        }
    }
}

// ---- tiles of inactive images -------------------------------------------------------------------------------------
//
// With `active`, tiles without an active image are skipped: their results are set to zero, and their inputs are neither
// read nor multiplied. A block reads the flags of its tiles once, before its first tile. All its threads then process
// the same tiles and reach the same barriers, even if the flags change during the launch.

constexpr int kMaxBlockTiles = 128;                        // maximum tiles of a block; blocks have at least 128 threads
constexpr int kSkippedWords = kMaxBlockTiles / kWarpSize;  // one bit for each tile of the block, in order

__device__ __forceinline__ bool is_skipped(const Shared<unsigned>& skipped, int tile) {
    const unsigned slot = static_cast<unsigned>(tile - static_cast<int>(blockIdx.x)) / gridDim.x;
    const unsigned word = skipped[slot / kWarpSize];
    return (word >> slot % kWarpSize & 1u) != 0;
}

// Record the tiles of the block for which should_skip(tile) is true, and call clear(tile) for them. All threads of the
// block must call it.
template <typename ShouldSkip, typename Clear>
__device__ __forceinline__ void skip_tiles(
    const Shared<unsigned>& skipped, int num_tiles, const ShouldSkip& should_skip, const Clear& clear) {
    const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
    const int slot = static_cast<int>(threadIdx.x);
    const bool has_tile = slot < kMaxBlockTiles && first + slot * step < num_tiles;
    const unsigned bits = __ballot_sync(kAllLanes, has_tile && should_skip(first + slot * step));
    if (slot % kWarpSize == 0 && slot < kMaxBlockTiles) {
        skipped[slot / kWarpSize] = bits;
    }
    __syncthreads();
#pragma unroll 1
    for (int tile = first; tile < num_tiles; tile += step) {
        if (is_skipped(skipped, tile)) {
            clear(tile);
        }
    }
}

// First tile of the block from `tile` on that is not skipped; num_tiles or more if all of them are skipped.
template <typename Table>
__device__ __forceinline__ int next_tile(const Table& table, const Shared<unsigned>& skipped, int tile) {
    if (table.active) {
        while (tile < table.num_tiles && is_skipped(skipped, tile)) {
            tile += static_cast<int>(gridDim.x);
        }
    }
    return tile;
}

// Fill a tile of a map (N, height, width, outputs) with zeros; all threads of the block must call it.
template <int kHeight, int kWidth, int kOutputs, typename scalar_t>
__device__ __forceinline__ void clear_tile(
    const Global<scalar_t>& out, int height, int width, int outputs, bool vectorized, const MapTile& map, int output) {
    constexpr int kVector = kVectorElements<scalar_t>;
    const int step = vectorized ? kVector : 1, threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * step; i < kHeight * kWidth * kOutputs; i += threads * step) {
        const int pixel = i / kOutputs, o = output + i % kOutputs;
        const int y = map.y + pixel / kWidth, x = map.x + pixel % kWidth;
        if (y < height && x < width && o < outputs) {
            const Global<scalar_t> target =
                out + (((static_cast<int64_t>(map.image) * height + y) * width + x) * outputs + o);
            const Vec<scalar_t, kVector> zeros{};
            if (vectorized) {
                store_vector(target, zeros);
            } else {
                target[0] = zeros[0];
            }
        }
    }
}

// Skip the tiles of inactive images and clear their outputs, in the kernels of conv3x3.cu.
template <typename Config, typename scalar_t>
__device__ __forceinline__ void skip_inactive_images(
    const ConvTable<scalar_t>& table, const Shared<unsigned>& skipped) {
    const auto map_at = [&](const ConvTile& tile) { return map_of<Config::kHeight, Config::kWidth>(table, tile); };
    skip_tiles(
        skipped, table.num_tiles,
        [&](int index) { return table.active[map_at(conv_tile<Config::kOutputs>(table, index)).image] == 0; },
        [&](int index) {
            const ConvTile tile = conv_tile<Config::kOutputs>(table, index);
            const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
            clear_tile<Config::kHeight, Config::kWidth, Config::kOutputs>(
                entry.out, entry.source.height, entry.source.width, entry.outputs, entry.vectorized, map_at(tile),
                tile.output);
        });
}

// Number of persistent blocks: as many as are resident at one time. With `active`, at least so many that each block has
// at most kMaxBlockTiles tiles.
template <typename Table>
inline unsigned persistent_blocks(const Table& table, int resident) {
    const int min_blocks = table.active ? static_cast<int>(ceil_div(table.num_tiles, kMaxBlockTiles)) : 1;
    return static_cast<unsigned>(std::min(table.num_tiles, std::max(resident, min_blocks)));
}

}  // namespace spatialflow
