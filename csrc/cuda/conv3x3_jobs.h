// SPDX-License-Identifier: Apache-2.0
//
// The table of convolutions that a launch of conv3x3.cu works through, and where a tile lies in it.
#pragma once

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

template <typename real_t>
__device__ __forceinline__ real_t rectified(real_t value, bool relu) {
    return relu && value < real_t(0) ? real_t(0) : value;  // NaN stays
}

// Where the outputs of a pixel begin.
template <typename scalar_t>
__device__ __forceinline__ int64_t output_at(const ConvJob<scalar_t>& job, int image, int y, int x) {
    return ((static_cast<int64_t>(image) * job.source.height + y) * job.source.width + x) * job.outputs;
}

}  // namespace spatialflow
