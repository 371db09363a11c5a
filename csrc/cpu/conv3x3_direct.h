// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions as an implicit matrix product, (pixels x 9 C_in) * (9 C_in x C_out), exact up to the order of sums.
//
// A task is a strip of output pixels; the last strips are split by output channels into several tasks. The nine taps
// are nine views of the map with the same pixel stride. A tile of outputs stays in registers for all taps; taps outside
// the map are skipped. A strip is copied only to add a flow or to convert 16-bit values. The outermost loop of a task
// is over panels of weights: one panel (295 KB at 256 channels with AVX-512) stays in the L2 cache.
#pragma once

#include "cpu/conv3x3.h"

namespace spatialflow {

constexpr int64_t kStripPixels = 336;  // output pixels of a strip; fewer for small pyramids
constexpr int64_t kStripWidth = 84;    // wider maps are split into columns of strips
constexpr int64_t kLastParts = 4;      // tasks of each of the last strips; more for few strips, at most one per panel

// Number of input channels that are processed at a time for the three taps of a row. 16 pixels of these channels stay
// in the L1 cache.
constexpr int64_t kTapChannels = 64;

// Pack weights for conv3x3_direct: gemm_pack of (9 C_in, C_out), rows tap by tap.
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

// Rectangle of output pixels of one image and level.
struct ConvStrip {
    size_t group;
    size_t level;
    int64_t image, y_begin, y_end, x_begin, x_end;  // output pixels

    int64_t padded_width() const { return x_end - x_begin + 2; }
    int64_t padded_pixels() const { return (y_end - y_begin + 2) * padded_width(); }
};

// Split one level of a group into strips of about `pixels` pixels. A strip has whole rows, unless the level is wider
// than kStripWidth.
inline void append_strips(
    size_t group, size_t level, int64_t batch, int64_t height, int64_t width, int64_t pixels,
    std::vector<ConvStrip>& strips) {
    if (batch * height * width == 0) {
        return;
    }
    const int64_t strips_x = (width + kStripWidth - 1) / kStripWidth;
    const int64_t strip_rows = std::max<int64_t>(1, pixels / ((width + strips_x - 1) / strips_x));
    const int64_t strips_y = (height + strip_rows - 1) / strip_rows;
    for (int64_t image = 0; image < batch; ++image) {
        for (int64_t i = 0; i < strips_y; ++i) {
            for (int64_t j = 0; j < strips_x; ++j) {
                strips.push_back(
                    {group, level, image, i * height / strips_y, (i + 1) * height / strips_y, j * width / strips_x,
                     (j + 1) * width / strips_x});
            }
        }
    }
}

// Copy x + flow of a strip and its halo to (rows + 2, columns + 2, C), with pixel stride padded_row(C). Outside the map
// the copy is zero.
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
            const int64_t pixel = ((strip.image * level.height + y) * level.width + x) * channels;
            for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto& store) {
                const Vector<real_t> value = load(level.x + pixel + c);
                store(copy + c, level.flow ? value + load(level.flow + pixel + c) : value);
            });
        }
    }
}

// View through which the kernel reads x + flow. Outside the map a copy has zeros, but a view of the map itself must not
// be read.
template <typename real_t>
struct ConvView {
    const real_t* pixels;  // pixel (y, x)
    int64_t y, x;
    int64_t pixel_stride, row_stride;

    const real_t* at(int64_t row, int64_t column) const {
        return pixels + (row - y) * row_stride + (column - x) * pixel_stride;
    }
};

// Whether the kernel can read the level without a copy.
template <typename scalar_t>
bool reads_in_place(const ConvLevel<scalar_t>& level) {
    return std::is_same_v<scalar_t, accum_t<scalar_t>> && !level.flow;
}

// View of the map, or of a copy of the strip and its halo. `copy` has space for padded_pixels() * padded_row(channels)
// values.
template <typename scalar_t>
ConvView<accum_t<scalar_t>> view_strip(
    const ConvLevel<scalar_t>& level, const ConvStrip& strip, int64_t channels, accum_t<scalar_t>* copy) {
    if constexpr (std::is_same_v<scalar_t, accum_t<scalar_t>>) {
        if (reads_in_place(level)) {
            return {
                level.x + strip.image * level.height * level.width * channels, 0, 0, channels, level.width * channels};
        }
    }
    copy_strip(level, strip, channels, copy);
    return {
        copy, strip.y_begin - 1, strip.x_begin - 1, padded_row(channels), strip.padded_width() * padded_row(channels)};
}

// Add the products of one tap and channels [first_channel, first_channel + depth) to a tile of kRows adjacent pixels.
// The tap of the first pixel is (row, x + dx). Pixels whose tap is outside the map are skipped.
template <int kRows, typename real_t>
__attribute__((always_inline)) inline void multiply_tap(
    const ConvView<real_t>& view, int64_t width, int64_t row, int64_t x, int64_t dx, int64_t first_channel,
    const real_t* weights, int64_t depth, GemmTile<kRows, real_t>& tile) {
    if (dx < 0 && x == 0) {
        if constexpr (kRows > 1) {
            multiply_tile<kRows, false, 1>(view.at(row, 0) + first_channel, view.pixel_stride, weights, depth, tile);
        }
    } else if (dx > 0 && x + kRows == width) {
        if constexpr (kRows > 1) {
            multiply_tile<kRows, false, 0, kRows - 1>(
                view.at(row, x + 1) + first_channel, view.pixel_stride, weights, depth, tile);
        }
    } else {
        multiply_tile<kRows, false>(view.at(row, x + dx) + first_channel, view.pixel_stride, weights, depth, tile);
    }
}

// Add bias and residual to the sums of kRows adjacent pixels, apply an optional ReLU, and store them.
template <int kRows, typename scalar_t>
__attribute__((always_inline)) inline void store_pixels(
    const GemmTile<kRows, accum_t<scalar_t>>& tile, const ConvBranch<scalar_t>& branch, int64_t first_channel,
    const scalar_t* residual,  // first pixel, or null
    scalar_t* out) {           // first pixel
    using real_t = accum_t<scalar_t>;
    constexpr int64_t lanes = kLanes<real_t>;
    for (int v = 0; v < kGemmVectors; ++v) {
        const int64_t c = first_channel + v * lanes;
        const int64_t count = std::min(lanes, branch.channels - c);
        if (count <= 0) {
            break;
        }
        const bool is_whole = count == lanes;
        const int part = static_cast<int>(count);
        Vector<real_t> bias = {};
        if (branch.bias) {
            bias = is_whole ? load_vector(branch.bias + c) : load_partial(branch.bias + c, part);
        }
        for (int r = 0; r < kRows; ++r) {
            const int64_t index = r * branch.channels + c;
            Vector<real_t> value = tile[r][v] + bias;
            if (residual) {
                value += is_whole ? load_vector(residual + index) : load_partial(residual + index, part);
            }
            value = branch.relu ? rectified(value) : value;
            if (is_whole) {
                store_vector(out + index, value);
            } else {
                store_partial(out + index, value, part);
            }
        }
    }
}

// Compute kRows adjacent pixels, the first of which is (y, x), for one panel of output channels.
template <int kRows, typename scalar_t>
void convolve_pixels(
    const ConvView<accum_t<scalar_t>>& view, const ConvLevel<scalar_t>& level, int64_t y, int64_t x,
    int64_t in_channels,
    const accum_t<scalar_t>* panel,  // (9 C_in, kColumns)
    const ConvBranch<scalar_t>& branch, int64_t first_channel,
    const scalar_t* residual,  // first pixel, or null
    scalar_t* out) {           // first pixel
    using real_t = accum_t<scalar_t>;
    GemmTile<kRows, real_t> tile = {};
    for (int64_t dy = -1; dy <= 1; ++dy) {
        if (y + dy < 0 || y + dy >= level.height) {
            continue;
        }
        for (int64_t first = 0; first < in_channels; first += kTapChannels) {
            const int64_t depth = std::min(kTapChannels, in_channels - first);
            for (int64_t dx = -1; dx <= 1; ++dx) {
                const real_t* weights = panel + ((3 * (dy + 1) + dx + 1) * in_channels + first) * kGemmColumns<real_t>;
                multiply_tap<kRows>(view, level.width, y + dy, x, dx, first, weights, depth, tile);
            }
        }
    }
    store_pixels<kRows>(tile, branch, first_channel, residual, out);
}

// Compute row `y` of a strip for one panel of output channels.
template <typename scalar_t>
void convolve_row(
    const ConvGroup<scalar_t>& group, const ConvStrip& strip, const ConvView<accum_t<scalar_t>>& view,
    const ConvBranch<scalar_t>& branch, int64_t panel, int64_t y) {
    constexpr int64_t kColumns = kGemmColumns<accum_t<scalar_t>>;
    const ConvLevel<scalar_t>& level = group.levels[strip.level];
    const int64_t row_begin = (strip.image * level.height + y) * level.width * branch.channels;
    for_row_blocks(strip.x_end - strip.x_begin, [&](int64_t begin, int64_t count) {
        const int64_t x = strip.x_begin + begin;
        with_rows(count, [&](auto rows) {
            const int64_t index = row_begin + x * branch.channels;
            convolve_pixels<decltype(rows)::value>(
                view, level, y, x, group.channels, branch.packed + panel * kColumns * 9 * group.channels, branch,
                panel * kColumns, branch.residual.empty() ? nullptr : branch.residual[strip.level] + index,
                branch.out[strip.level] + index);
        });
    });
}

// Compute part `part` of `parts` of the output channels of a strip.
template <typename scalar_t>
void convolve_strip(
    const ConvGroup<scalar_t>& group, const ConvStrip& strip, int64_t part, int64_t parts, accum_t<scalar_t>* copy) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    const ConvView<real_t> view = view_strip(group.levels[strip.level], strip, group.channels, copy);
    for (const ConvBranch<scalar_t>& branch : group.branches) {
        if (strip.level >= branch.out.size()) {
            continue;
        }
        const int64_t panels = (branch.channels + kColumns - 1) / kColumns;
        for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
            for (int64_t y = strip.y_begin; y < strip.y_end; ++y) {
                convolve_row(group, strip, view, branch, panel, y);
            }
        }
    }
}

template <typename scalar_t>
void conv3x3_direct(const std::vector<ConvGroup<scalar_t>>& groups) {
    using real_t = accum_t<scalar_t>;
    int64_t pixels = 0, work = 0, panels = 1;
    for (const ConvGroup<scalar_t>& group : groups) {
        int64_t group_pixels = 0, columns = 0;
        for (const ConvLevel<scalar_t>& level : group.levels) {
            group_pixels += level.batch * level.height * level.width;
        }
        for (const ConvBranch<scalar_t>& branch : group.branches) {
            columns += gemm_padded_columns(branch.channels);
            panels = std::max(panels, gemm_padded_columns(branch.channels) / kGemmColumns<real_t>);
        }
        pixels += group_pixels;
        work += group_pixels * 9 * group.channels * columns;
    }
    // Aim at several strips per thread to balance the load.
    const int64_t threads = num_threads();
    const int64_t target = std::min(kStripPixels, std::max<int64_t>(1, pixels / (4 * threads)));
    std::vector<ConvStrip> strips;
    int64_t copy_size = 0;
    for (size_t j = 0; j < groups.size(); ++j) {
        for (size_t l = 0; l < groups[j].levels.size(); ++l) {
            const ConvLevel<scalar_t>& level = groups[j].levels[l];
            const size_t first = strips.size();
            append_strips(j, l, level.batch, level.height, level.width, target, strips);
            for (size_t s = first; s < strips.size(); ++s) {
                if (!reads_in_place(level)) {
                    copy_size = std::max(copy_size, strips[s].padded_pixels() * padded_row(groups[j].channels));
                }
            }
        }
    }
    if (strips.empty()) {
        return;
    }
    // Split the last strips by output channels, too, to balance the load of the threads at the end.
    const int64_t count = static_cast<int64_t>(strips.size());
    const int64_t num_split = std::min(count, 2 * threads), num_whole = count - num_split;
    const int64_t parts = std::min(panels, std::max(kLastParts, (threads + count - 1) / count));
    const int64_t tasks = num_whole + num_split * parts;
    Scratch<real_t> scratch(copy_size * num_workers(tasks, work));
    run_tasks(tasks, work, [&](int64_t task, int64_t worker) {
        const bool is_whole = task < num_whole;
        const ConvStrip& strip = strips[static_cast<size_t>(is_whole ? task : num_whole + (task - num_whole) / parts)];
        convolve_strip(
            groups[strip.group], strip, is_whole ? 0 : (task - num_whole) % parts, is_whole ? 1 : parts,
            scratch.get() + worker * copy_size);
    });
}

}  // namespace spatialflow
