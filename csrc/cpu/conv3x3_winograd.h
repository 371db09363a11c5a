// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions by Winograd's F(4x4, 3x3): a quarter of the multiplications. Float tiles (16-bit maps are converted
// on the way in and out); products of 36 frequencies are 36 matrix products (tiles x C_in) * (C_in x C_out).
//
// A group of consecutive tiles, of any levels, goes through input transform, products and output transform on one
// thread. Groups are as large as kGroupTiles: the weights (9.4 MB for 256 -> 256) are read once per group, and the rows
// of one frequency (a tile's 1 KiB in, 1 KiB out) stay in the second-level cache beside that frequency's weights.
#pragma once

#include "cpu/winograd.h"

namespace spatialflow {

constexpr int64_t kGroupTiles = 56;

// Packs weights for conv3x3_winograd: packed[frequency][gemm_pack of (C_in, C_out)].
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
            // Double lanes: what is left of the weights' rounding is that of the transformed values themselves.
            double taps[9][kColumns] = {}, half[6][3][kColumns], lines[6];
            for (int64_t o = 0; o < valid; ++o) {
                const scalar_t* source = weight + (first + o) * strides[0] + c * strides[1];
                for (int tap = 0; tap < 9; ++tap) {
                    taps[tap][o] = load(source[tap / 3 * strides[2] + tap % 3 * strides[3]]);
                }
            }
            for (int j = 0; j < 3; ++j) {
                for (int64_t o = 0; o < kColumns; ++o) {
                    winograd_weight<double>({taps[j][o], taps[3 + j][o], taps[6 + j][o]}, lines);
                    for (int i = 0; i < 6; ++i) {
                        half[i][j][o] = lines[i];
                    }
                }
            }
            for (int i = 0; i < 6; ++i) {
                float* target = packed + 6 * i * size + first * in_channels + c * kColumns;
                for (int64_t o = 0; o < kColumns; ++o) {
                    winograd_weight<double>({half[i][0][o], half[i][1][o], half[i][2][o]}, lines);
                    for (int j = 0; j < 6; ++j) {
                        target[j * size + o] = static_cast<float>(lines[j]);
                    }
                }
            }
        }
    });
}

template <typename scalar_t>
class WinogradConvolution {
public:
    explicit WinogradConvolution(const std::vector<ConvJob<scalar_t>>& jobs) : jobs_(jobs) {
        int64_t widest = 0, widest_out = 0;
        for (const ConvJob<scalar_t>& job : jobs) {
            WinogradTiles tiles;
            for (const ConvLevel<scalar_t>& level : job.levels) {
                tiles.add_level(level.batch, level.height, level.width);
            }
            tiles_.push_back(tiles);
            widest = std::max(widest, job.channels);
            for (const ConvBranch<scalar_t>& branch : job.branches) {
                const int64_t columns = gemm_padded_columns(branch.channels);
                widest_out = std::max(widest_out, columns);
                work_ += kWinogradProducts * tiles.count(branch.out.size()) * job.channels * columns;
            }
        }
        // As many groups as fill the threads evenly, of nearly equal size.
        const int64_t threads = num_threads();
        for (size_t j = 0; j < jobs.size(); ++j) {
            const int64_t count = tiles_[j].count();
            const int64_t share = std::min<int64_t>(threads, (count + 7) / 8);
            const int64_t groups = std::max((count + kGroupTiles - 1) / kGroupTiles, share);
            for (int64_t g = 0; g < groups; ++g) {
                groups_.push_back({j, g * count / groups, (g + 1) * count / groups});
                largest_ = std::max(largest_, groups_.back().end - groups_.back().begin);
            }
        }
        in_row_ = padded_row(widest);
        out_row_ = padded_row(widest_out);
        zeros_.resize(static_cast<size_t>(widest));
    }

    void run() {
        const int64_t tasks = static_cast<int64_t>(groups_.size());
        // One line more per frequency, for the same reason as in padded_row.
        in_stride_ = largest_ * in_row_ + 16;
        out_stride_ = largest_ * out_row_ + 16;
        const int64_t per_worker = kWinogradProducts * (in_stride_ + out_stride_);
        Scratch<float> scratch(per_worker * num_workers(tasks, work_));
        run_tasks(tasks, work_, [&](int64_t task, int64_t worker) {
            const Group& group = groups_[static_cast<size_t>(task)];
            float* inputs = scratch.get() + worker * per_worker;
            run_group(
                jobs_[group.job], tiles_[group.job], group.begin, group.end, inputs,
                inputs + kWinogradProducts * in_stride_);
        });
    }

private:
    struct Group {
        size_t job;
        int64_t begin, end;  // tiles
    };

    void run_group(
        const ConvJob<scalar_t>& job, const WinogradTiles& tiles, int64_t begin, int64_t end,
        float* inputs,           // (36, tiles, C_in)
        float* outputs) const {  // (36, tiles, C_out)
        for (int64_t t = begin; t < end; ++t) {
            const WinogradTile tile = tiles[t];
            transform_input(
                job.levels[static_cast<size_t>(tile.level)], job.channels, tile, zeros_.data(),
                inputs + (t - begin) * in_row_, in_stride_);
        }
        for (const ConvBranch<scalar_t>& branch : job.branches) {
            const int64_t rows = std::min(end, tiles.count(branch.out.size())) - begin;
            if (rows <= 0) {
                continue;
            }
            const int64_t columns = gemm_padded_columns(branch.channels);
            for (int64_t f = 0; f < kWinogradProducts; ++f) {
                gemm(
                    rows, columns, job.channels, inputs + f * in_stride_, in_row_,
                    branch.packed + f * job.channels * columns, outputs + f * out_stride_, out_row_);
            }
            for (int64_t t = begin; t < begin + rows; ++t) {
                const WinogradTile tile = tiles[t];
                const size_t l = static_cast<size_t>(tile.level);
                const ConvLevel<scalar_t>& level = job.levels[l];
                const int64_t row_stride = level.width * branch.channels;
                const int64_t at = (tile.image * level.height + tile.y) * row_stride + tile.x * branch.channels;
                transform_output<scalar_t>(
                    outputs + (t - begin) * out_row_, out_stride_, branch.channels, branch.bias, branch.relu,
                    std::min<int64_t>(kWinogradOutput, level.height - tile.y),
                    std::min<int64_t>(kWinogradOutput, level.width - tile.x),
                    branch.residual.empty() ? nullptr : branch.residual[l] + at, branch.out[l] + at, row_stride);
            }
        }
    }

    const std::vector<ConvJob<scalar_t>>& jobs_;
    std::vector<WinogradTiles> tiles_;
    std::vector<Group> groups_;
    int64_t largest_ = 0, work_ = 0;
    int64_t in_row_, out_row_, in_stride_ = 0, out_stride_ = 0;
    std::vector<scalar_t> zeros_;
};

template <typename scalar_t>
void conv3x3_winograd(const std::vector<ConvJob<scalar_t>>& jobs) {
    WinogradConvolution<scalar_t>(jobs).run();
}

}  // namespace spatialflow
