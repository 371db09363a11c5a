// SPDX-License-Identifier: Apache-2.0
//
// The table of convolutions that a launch of conv3x3.cu works through, and where a tile lies in it.
#pragma once

#include <algorithm>

#include "cuda/conv3x3.h"

namespace spatialflow {

constexpr int kMaxJobs = 24;

// One convolution on one level.
template <typename scalar_t>
struct ConvJob {
    ConvSource<scalar_t> source;
    Global<const scalar_t> weights;        // (9, C, O padded)
    Global<const accum_t<scalar_t>> bias;  // (O) or null
    Global<const scalar_t> residual;       // (N, H, W, O) or null
    Global<scalar_t> out;                  // (N, H, W, O)
    int outputs;
    bool relu;
    bool wide;                                  // outputs and residual move 16 bytes at a time
    int tile_begin;                             // first tile in the launch
    int tile_rows, tile_columns, output_tiles;  // of an image
};

template <typename scalar_t>
struct ConvTable {
    ConvJob<scalar_t> jobs[kMaxJobs];
    int num_jobs, num_tiles;
    Global<const uint8_t> active;  // (N), zero for images that are left out; or null
};
#if defined(__CUDACC__)
static_assert(sizeof(ConvTable<double>) <= 4096, "kernel parameters fit on every toolkit and driver");
#endif

// A tile of pixels and outputs: its place in the launch, its entry of the table, its first output.
struct ConvTile {
    int tile, job, output;
};

template <int kOutputs, typename scalar_t>
__device__ __forceinline__ ConvTile conv_tile(const ConvTable<scalar_t>& table, int tile) {
    const int index = entry_of_tile(table.jobs, table.num_jobs, tile);
    return {tile, index, (tile - table.jobs[index].tile_begin) % table.jobs[index].output_tiles * kOutputs};
}

// Its pixels.
template <int kHeight, int kWidth, typename scalar_t>
__device__ __forceinline__ MapTile map_of(const ConvTable<scalar_t>& table, const ConvTile& tile) {
    const ConvJob<scalar_t>& job = table.jobs[tile.job];
    return map_tile<kHeight, kWidth>((tile.tile - job.tile_begin) / job.output_tiles, job.tile_rows, job.tile_columns);
}

__device__ __forceinline__ int padded_outputs(int outputs) {
    constexpr int kPadding = static_cast<int>(kPackedOutputs);
    return (outputs + kPadding - 1) / kPadding * kPadding;
}

// Where the outputs of a pixel begin.
template <typename scalar_t>
__device__ __forceinline__ int64_t output_at(const ConvJob<scalar_t>& job, int image, int y, int x) {
    return ((static_cast<int64_t>(image) * job.source.height + y) * job.source.width + x) * job.outputs;
}

// ---- tiles that are left out -------------------------------------------------------------------------------------
//
// With `active`, tiles of images without the flag are left out: their results become zeros, and nothing of them is read
// or multiplied. A block reads the flags of its tiles once, before the first of them. So all its threads go through the
// same tiles and meet at the same barriers, whatever happens to the flags meanwhile.

constexpr int kNotedTiles = 128;                      // of a block, which has a thread or more for each
constexpr int kNotedWords = kNotedTiles / kWarpSize;  // a bit for each tile of the block, in its order

__device__ __forceinline__ bool is_noted(const Shared<unsigned>& left_out, int tile) {
    const unsigned place = static_cast<unsigned>(tile - static_cast<int>(blockIdx.x)) / gridDim.x;
    const unsigned word = left_out[place / kWarpSize];
    return (word >> place % kWarpSize & 1u) != 0;
}

// By all threads of the block: notes those of its tiles for which is_left_out(tile), then calls clear(tile) for them.
template <typename IsLeftOut, typename Clear>
__device__ __forceinline__ void leave_out_tiles(
    const Shared<unsigned>& left_out, int num_tiles, const IsLeftOut& is_left_out, const Clear& clear) {
    const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
    const int place = static_cast<int>(threadIdx.x);
    const bool has_tile = place < kNotedTiles && first + place * step < num_tiles;
    const unsigned bits = __ballot_sync(kAllLanes, has_tile && is_left_out(first + place * step));
    if (place % kWarpSize == 0 && place < kNotedTiles) {
        left_out[place / kWarpSize] = bits;
    }
    __syncthreads();
#pragma unroll 1
    for (int tile = first; tile < num_tiles; tile += step) {
        if (is_noted(left_out, tile)) {
            clear(tile);
        }
    }
}

// The first tile of the block from `tile` on that is not left out; num_tiles or more if there is none.
template <typename Table>
__device__ __forceinline__ int next_tile(const Table& table, const Shared<unsigned>& left_out, int tile) {
    if (table.active) {
        while (tile < table.num_tiles && is_noted(left_out, tile)) {
            tile += static_cast<int>(gridDim.x);
        }
    }
    return tile;
}

// Zeros for a tile of a map (N, height, width, outputs), by all threads of the block.
template <int kHeight, int kWidth, int kOutputs, typename scalar_t>
__device__ __forceinline__ void clear_tile(
    const Global<scalar_t>& out, int height, int width, int outputs, bool wide, const MapTile& map, int output) {
    constexpr int kVector = kWideElements<scalar_t>;
    const int step = wide ? kVector : 1, threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * step; i < kHeight * kWidth * kOutputs; i += threads * step) {
        const int pixel = i / kOutputs, o = output + i % kOutputs;
        const int y = map.y + pixel / kWidth, x = map.x + pixel % kWidth;
        if (y < height && x < width && o < outputs) {
            const Global<scalar_t> target =
                out + (((static_cast<int64_t>(map.image) * height + y) * width + x) * outputs + o);
            const Vec<scalar_t, kVector> zeros{};
            if (wide) {
                store_vector(target, zeros);
            } else {
                target[0] = zeros[0];
            }
        }
    }
}

// For the kernels of conv3x3.cu: what `active` asks for, before a block's first tile.
template <typename Size, typename scalar_t>
__device__ __forceinline__ void leave_out_images(const ConvTable<scalar_t>& table, const Shared<unsigned>& left_out) {
    const auto map_at = [&](const ConvTile& tile) { return map_of<Size::kHeight, Size::kWidth>(table, tile); };
    leave_out_tiles(
        left_out, table.num_tiles,
        [&](int index) { return table.active[map_at(conv_tile<Size::kOutputs>(table, index)).image] == 0; },
        [&](int index) {
            const ConvTile tile = conv_tile<Size::kOutputs>(table, index);
            const ConvJob<scalar_t>& job = table.jobs[tile.job];
            clear_tile<Size::kHeight, Size::kWidth, Size::kOutputs>(
                job.out, job.source.height, job.source.width, job.outputs, job.wide, map_at(tile), tile.output);
        });
}

// Blocks that walk through the tiles of a table: as many as run at one time, and with `active` so many that each can
// note its tiles.
template <typename Table>
inline unsigned walking_blocks(const Table& table, int resident) {
    const int least = table.active ? static_cast<int>(ceil_div(table.num_tiles, kNotedTiles)) : 1;
    return static_cast<unsigned>(std::min(table.num_tiles, std::max(resident, least)));
}

}  // namespace spatialflow
