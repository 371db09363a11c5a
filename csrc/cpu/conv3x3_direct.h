// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions as an implicit matrix product, (pixels x 9 C_in) * (9 C_in x C_out), exact up to the order of sums.
//
// A strip of output rows is one task: x + flow with a border of zeros is copied once (and converted from 16 bits); then
// the nine taps are nine views of the copy with one row stride, and a tile of outputs stays in registers over all of
// them. Panels of weights run outermost: one panel (295 KB at 256 channels) stays in the second-level cache.
#pragma once

#include "cpu/conv3x3.h"

namespace spatialflow {

constexpr int64_t kStripPixels = 336;
constexpr int64_t kStripWidth = 84;

// Packs weights for conv3x3_direct: gemm_pack of (9 C_in, C_out), rows tap by tap.
template <typename scalar_t>
void pack_conv3x3_direct(
    const scalar_t* weight, const int64_t strides[4],  // (C_out, C_in, 3, 3)
    int64_t out_channels, int64_t in_channels,
    accum_t<scalar_t>* packed) {  // gemm_packed_size(9 C_in, C_out)
    constexpr int64_t kColumns = kGemmColumns<accum_t<scalar_t>>;
    const int64_t panels = gemm_padded_columns(out_channels) / kColumns;
    run_tasks(panels, 32 * in_channels * out_channels, [&](int64_t panel, int64_t) {
        const int64_t first = panel * kColumns;
        const int64_t valid = std::max<int64_t>(0, std::min(kColumns, out_channels - first));
        accum_t<scalar_t>* target = packed + first * 9 * in_channels;
        for (int64_t tap = 0; tap < 9; ++tap) {
            const scalar_t* source = weight + tap / 3 * strides[2] + tap % 3 * strides[3] + first * strides[0];
            for (int64_t c = 0; c < in_channels; ++c, target += kColumns) {
                for (int64_t o = 0; o < kColumns; ++o) {
                    target[o] = o < valid ? load(source[o * strides[0] + c * strides[1]]) : 0;
                }
            }
        }
    });
}

struct ConvStrip {
    size_t job;
    size_t level;
    int64_t image, y_begin, y_end, x_begin, x_end;  // output pixels

    int64_t padded_width() const { return x_end - x_begin + 2; }
    int64_t padded_pixels() const { return (y_end - y_begin + 2) * padded_width(); }
};

// Cuts one level of a job into strips of about `pixels` pixels, whole rows where these are not very long.
inline void append_strips(
    size_t job, size_t level, int64_t batch, int64_t height, int64_t width, int64_t pixels,
    std::vector<ConvStrip>& strips) {
    if (batch * height * width == 0) {
        return;
    }
    const int64_t across = (width + kStripWidth - 1) / kStripWidth;
    const int64_t strip_rows = std::max<int64_t>(1, pixels / ((width + across - 1) / across));
    const int64_t down = (height + strip_rows - 1) / strip_rows;
    for (int64_t image = 0; image < batch; ++image) {
        for (int64_t i = 0; i < down; ++i) {
            for (int64_t j = 0; j < across; ++j) {
                strips.push_back({job, level, image, i * height / down, (i + 1) * height / down, j * width / across,
                                  (j + 1) * width / across});
            }
        }
    }
}

// x + flow of a strip and the pixels around it, zeros outside the map: (rows + 2, columns + 2, C) with padded pixels.
template <typename scalar_t>
void copy_strip(
    const ConvLevel<scalar_t>& level, const ConvStrip& strip, int64_t channels,
    accum_t<scalar_t>* copy) {  // padded_pixels * padded_row(channels)
    using real_t = accum_t<scalar_t>;
    const int64_t pixel_stride = padded_row(channels);
    for (int64_t y = strip.y_begin - 1; y <= strip.y_end; ++y) {
        for (int64_t x = strip.x_begin - 1; x <= strip.x_end; ++x, copy += pixel_stride) {
            if (y < 0 || y >= level.height || x < 0 || x >= level.width) {
                std::fill(copy, copy + channels, real_t(0));
                continue;
            }
            const int64_t at = ((strip.image * level.height + y) * level.width + x) * channels;
            for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto& store) {
                const Vector<real_t> value = load(level.x + at + c);
                store(copy + c, level.flow ? value + load(level.flow + at + c) : value);
            });
        }
    }
}

// Outputs of `kRows` pixels of one image row for one panel of output channels.
template <int kRows, typename scalar_t>
void convolve_pixels(
    const accum_t<scalar_t>* copy,  // tap (0, 0) of the first pixel
    int64_t pixel_stride, int64_t row_stride, int64_t in_channels,
    const accum_t<scalar_t>* panel,  // (9 C_in, kColumns)
    const ConvBranch<scalar_t>& branch, int64_t first_channel,
    const scalar_t* residual,  // first pixel, or null
    scalar_t* out) {           // first pixel
    using real_t = accum_t<scalar_t>;
    constexpr int64_t lanes = kLanes<real_t>;
    GemmTile<kRows, real_t> tile = {};
    for (int64_t tap = 0; tap < 9; ++tap) {
        multiply_tile<kRows, false>(
            copy + tap / 3 * row_stride + tap % 3 * pixel_stride, pixel_stride,
            panel + tap * in_channels * kGemmColumns<real_t>, in_channels, tile);
    }
    for (int v = 0; v < kGemmVectors; ++v) {
        const int64_t c = first_channel + v * lanes;
        const int64_t count = std::min(lanes, branch.channels - c);
        if (count <= 0) {
            break;
        }
        const bool whole = count == lanes;
        const int part = static_cast<int>(count);
        Vector<real_t> bias = {};
        if (branch.bias) {
            bias = whole ? load_vector(branch.bias + c) : load_partial(branch.bias + c, part);
        }
        for (int r = 0; r < kRows; ++r) {
            const int64_t at = r * branch.channels + c;
            Vector<real_t> value = tile[r][v] + bias;
            if (residual) {
                value += whole ? load_vector(residual + at) : load_partial(residual + at, part);
            }
            value = branch.relu ? rectified(value) : value;
            if (whole) {
                store_vector(out + at, value);
            } else {
                store_partial(out + at, value, part);
            }
        }
    }
}

template <typename scalar_t>
void convolve_strip(
    const ConvJob<scalar_t>& job, const ConvStrip& strip, int64_t part, int64_t parts, accum_t<scalar_t>* copy) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    const ConvLevel<scalar_t>& level = job.levels[strip.level];
    copy_strip(level, strip, job.channels, copy);
    const int64_t pixel_stride = padded_row(job.channels), row_stride = strip.padded_width() * pixel_stride;
    for (const ConvBranch<scalar_t>& branch : job.branches) {
        if (strip.level >= branch.out.size()) {
            continue;
        }
        const int64_t panels = (branch.channels + kColumns - 1) / kColumns;
        for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
            for (int64_t y = strip.y_begin; y < strip.y_end; ++y) {
                const int64_t row_at =
                    ((strip.image * level.height + y) * level.width + strip.x_begin) * branch.channels;
                for_row_blocks(strip.x_end - strip.x_begin, [&](int64_t x, int64_t count) {
                    with_rows(count, [&](auto rows) {
                        const int64_t at = row_at + x * branch.channels;
                        convolve_pixels<decltype(rows)::value, scalar_t>(
                            copy + (y - strip.y_begin) * row_stride + x * pixel_stride, pixel_stride, row_stride,
                            job.channels, branch.packed + panel * kColumns * 9 * job.channels, branch, panel * kColumns,
                            branch.residual.empty() ? nullptr : branch.residual[strip.level] + at,
                            branch.out[strip.level] + at);
                    });
                });
            }
        }
    }
}

template <typename scalar_t>
void conv3x3_direct(const std::vector<ConvJob<scalar_t>>& jobs) {
    using real_t = accum_t<scalar_t>;
    int64_t pixels = 0, work = 0;
    for (const ConvJob<scalar_t>& job : jobs) {
        int64_t own = 0, columns = 0;
        for (const ConvLevel<scalar_t>& level : job.levels) {
            own += level.batch * level.height * level.width;
        }
        for (const ConvBranch<scalar_t>& branch : job.branches) {
            columns += gemm_padded_columns(branch.channels);
        }
        pixels += own;
        work += own * 9 * job.channels * columns;
    }
    // Several strips per thread, to even out their differences.
    const int64_t target = std::min(kStripPixels, std::max<int64_t>(1, pixels / (4 * num_threads())));
    std::vector<ConvStrip> strips;
    int64_t largest = 0;
    for (size_t j = 0; j < jobs.size(); ++j) {
        for (size_t l = 0; l < jobs[j].levels.size(); ++l) {
            const ConvLevel<scalar_t>& level = jobs[j].levels[l];
            const size_t first = strips.size();
            append_strips(j, l, level.batch, level.height, level.width, target, strips);
            for (size_t s = first; s < strips.size(); ++s) {
                largest = std::max(largest, strips[s].padded_pixels() * padded_row(jobs[j].channels));
            }
        }
    }
    if (strips.empty()) {
        return;
    }
    // Where there are fewer strips than threads, each is cut by output channels.
    const int64_t count = static_cast<int64_t>(strips.size());
    const int64_t parts = (num_threads() + count - 1) / count;
    const int64_t tasks = count * parts;
    Scratch<real_t> scratch(largest * num_workers(tasks, work));
    run_tasks(tasks, work, [&](int64_t task, int64_t worker) {
        const ConvStrip& strip = strips[static_cast<size_t>(task / parts)];
        convolve_strip(jobs[strip.job], strip, task % parts, parts, scratch.get() + worker * largest);
    });
}

}  // namespace spatialflow
