// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions by Winograd's F(4x4, 3x3), with a quarter of the multiplications. Tiles are float; 16-bit maps are
// converted. The products of 36 frequencies are 36 matrix products (tiles x C_in) * (C_in x C_out).
//
// A task is a chunk of at most kMaxChunkTiles consecutive tiles, possibly of several levels: input transform, products
// and output transform. The weights (9.4 MB for 256 -> 256) are read once per chunk. The rows of one frequency (1 KiB
// in and 1 KiB out per tile) stay in the L2 cache with the weights of that frequency.
#pragma once

#include "cpu/winograd.h"

namespace spatialflow {

constexpr int64_t kMaxChunkTiles = 56;

// Transform the taps of one input channel to the 36 frequencies, for one panel of output channels. The computation is
// in double, so that only the transformed values are rounded.
template <typename scalar_t>
void transform_weight(
    const scalar_t* weight, const int64_t strides[4],  // (output channels, 1, 3, 3)
    int64_t count,                                     // valid output channels of the panel
    float* target, int64_t frequency_stride) {
    constexpr int64_t kColumns = kGemmColumns<float>;
    double taps[9][kColumns] = {}, half[6][3][kColumns], line[6];
    for (int64_t o = 0; o < count; ++o) {
        for (int tap = 0; tap < 9; ++tap) {
            taps[tap][o] = load(weight[o * strides[0] + tap / 3 * strides[2] + tap % 3 * strides[3]]);
        }
    }
    for (int j = 0; j < 3; ++j) {
        for (int64_t o = 0; o < kColumns; ++o) {
            winograd_weight<double>({taps[j][o], taps[3 + j][o], taps[6 + j][o]}, line);
            for (int i = 0; i < 6; ++i) {
                half[i][j][o] = line[i];
            }
        }
    }
    for (int i = 0; i < 6; ++i) {
        for (int64_t o = 0; o < kColumns; ++o) {
            winograd_weight<double>({half[i][0][o], half[i][1][o], half[i][2][o]}, line);
            for (int j = 0; j < 6; ++j) {
                target[(6 * i + j) * frequency_stride + o] = static_cast<float>(line[j]);
            }
        }
    }
}

// Pack weights for conv3x3_winograd: packed[frequency][gemm_pack of (C_in, C_out)].
template <typename scalar_t>
void pack_conv3x3_winograd(
    const scalar_t* weight, const int64_t strides[4],  // (C_out, C_in, 3, 3)
    int64_t out_channels, int64_t in_channels,
    float* packed) {  // kWinogradProducts * gemm_packed_size(C_in, C_out)
    constexpr int64_t kColumns = kGemmColumns<float>;
    constexpr int64_t kInputs = 16;  // input channels per task
    const int64_t panels = gemm_padded_columns(out_channels) / kColumns;
    const int64_t slices = (in_channels + kInputs - 1) / kInputs;
    const int64_t size = gemm_packed_size(in_channels, out_channels);
    run_tasks(panels * slices, 256 * in_channels * out_channels, [&](int64_t task, int64_t) {
        const int64_t first = task / slices * kColumns, last = task % slices * kInputs + kInputs;
        const int64_t valid = std::max<int64_t>(0, std::min(kColumns, out_channels - first));
        for (int64_t c = last - kInputs; c < std::min(last, in_channels); ++c) {
            transform_weight(
                weight + first * strides[0] + c * strides[1], strides, valid,
                packed + first * in_channels + c * kColumns, size);
        }
    });
}

template <typename scalar_t>
class WinogradConvolution {
public:
    explicit WinogradConvolution(const std::vector<ConvGroup<scalar_t>>& groups) : groups_(groups) {
        int64_t max_in_channels = 0, max_out_columns = 0;
        for (const ConvGroup<scalar_t>& group : groups) {
            WinogradTiles tiles;
            for (const ConvLevel<scalar_t>& level : group.levels) {
                tiles.add_level(level.batch, level.height, level.width);
            }
            tiles_.push_back(tiles);
            max_in_channels = std::max(max_in_channels, group.channels);
            for (const ConvBranch<scalar_t>& branch : group.branches) {
                const int64_t columns = gemm_padded_columns(branch.channels);
                max_out_columns = std::max(max_out_columns, columns);
                work_ += kWinogradProducts * tiles.count(branch.out.size()) * group.channels * columns;
            }
        }
        // Form chunks of nearly equal size to balance the load of the threads.
        const int64_t threads = num_threads();
        for (size_t j = 0; j < groups.size(); ++j) {
            const int64_t count = tiles_[j].count();
            const int64_t parallel_chunks = std::min<int64_t>(threads, (count + 7) / 8);  // of at least about 8 tiles
            const int64_t chunks = std::max((count + kMaxChunkTiles - 1) / kMaxChunkTiles, parallel_chunks);
            for (int64_t g = 0; g < chunks; ++g) {
                chunks_.push_back({j, g * count / chunks, (g + 1) * count / chunks});
                max_tiles_ = std::max(max_tiles_, chunks_.back().end - chunks_.back().begin);
            }
        }
        in_row_ = padded_row(max_in_channels);
        out_row_ = padded_row(max_out_columns);
        zeros_.resize(static_cast<size_t>(max_in_channels));
    }

    void run() {
        const int64_t tasks = static_cast<int64_t>(chunks_.size());
        // Add a cache line per frequency, for the same reason as in padded_row.
        in_stride_ = max_tiles_ * in_row_ + 16;
        out_stride_ = max_tiles_ * out_row_ + 16;
        const int64_t per_worker = kWinogradProducts * (in_stride_ + out_stride_);
        Scratch<float> scratch(per_worker * num_workers(tasks, work_));
        run_tasks(tasks, work_, [&](int64_t task, int64_t worker) {
            const Chunk& chunk = chunks_[static_cast<size_t>(task)];
            float* inputs = scratch.get() + worker * per_worker;
            run_chunk(
                groups_[chunk.group], tiles_[chunk.group], chunk.begin, chunk.end, inputs,
                inputs + kWinogradProducts * in_stride_);
        });
    }

private:
    struct Chunk {
        size_t group;
        int64_t begin, end;  // tiles
    };

    void run_chunk(
        const ConvGroup<scalar_t>& group, const WinogradTiles& tiles, int64_t begin, int64_t end,
        float* inputs,           // (36, tiles, C_in)
        float* outputs) const {  // (36, tiles, C_out)
        for (int64_t t = begin; t < end; ++t) {
            const WinogradTile tile = tiles[t];
            transform_input(
                group.levels[static_cast<size_t>(tile.level)], group.channels, tile, zeros_.data(),
                inputs + (t - begin) * in_row_, in_stride_);
        }
        for (const ConvBranch<scalar_t>& branch : group.branches) {
            const int64_t rows = std::min(end, tiles.count(branch.out.size())) - begin;
            if (rows <= 0) {
                continue;
            }
            const int64_t columns = gemm_padded_columns(branch.channels);
            for (int64_t f = 0; f < kWinogradProducts; ++f) {
                gemm(
                    rows, columns, group.channels, inputs + f * in_stride_, in_row_,
                    branch.packed + f * group.channels * columns, outputs + f * out_stride_, out_row_);
            }
            for (int64_t t = begin; t < begin + rows; ++t) {
                const WinogradTile tile = tiles[t];
                const size_t l = static_cast<size_t>(tile.level);
                const ConvLevel<scalar_t>& level = group.levels[l];
                const int64_t row_stride = level.width * branch.channels;
                const int64_t index = (tile.image * level.height + tile.y) * row_stride + tile.x * branch.channels;
                transform_output<scalar_t>(
                    outputs + (t - begin) * out_row_, out_stride_, branch.channels, branch.bias, branch.relu,
                    std::min<int64_t>(kWinogradOutput, level.height - tile.y),
                    std::min<int64_t>(kWinogradOutput, level.width - tile.x),
                    branch.residual.empty() ? nullptr : branch.residual[l] + index, branch.out[l] + index, row_stride);
            }
        }
    }

    const std::vector<ConvGroup<scalar_t>>& groups_;
    std::vector<WinogradTiles> tiles_;
    std::vector<Chunk> chunks_;
    int64_t max_tiles_ = 0, work_ = 0;
    int64_t in_row_, out_row_, in_stride_ = 0, out_stride_ = 0;
    std::vector<scalar_t> zeros_;
};

template <typename scalar_t>
void conv3x3_winograd(const std::vector<ConvGroup<scalar_t>>& groups) {
    WinogradConvolution<scalar_t>(groups).run();
}

}  // namespace spatialflow
