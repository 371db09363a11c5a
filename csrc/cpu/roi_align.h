// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on the CPU, over one feature map or a pyramid of them (roi_align is a pyramid of one level).
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(level(k)[batch(k), c], y, x)
//
// Bilinear interpolation is a product of two linear ones and the samples of a bin form a grid, so a bin is
// sum_y wy[y] sum_x wx[x] feature[y, x]: each axis is collapsed once per RoI into a short list of (cell, weight) taps
// in which samples that read the same cell are merged (two samples per axis read three cells, not four, when the RoI is
// small). Features are channels-last; the channels of a bin are vectors held in registers while the taps are walked.
//
// Threads: forward over RoIs; backward over (image, slice of channels), every thread walking all RoIs of its image in
// order, so that no two threads add to one element and the sum has one order: deterministic without atomics.
#pragma once

#include <algorithm>
#include <vector>

#include "common/roi_align.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/simd.h"

namespace spatialflow {

template <typename real_t>
struct Tap {
    int64_t offset;  // cell times the stride of its axis
    real_t weight;
};

// Taps of all bins of one axis: those of bin b are taps[begin[b]] .. taps[begin[b + 1]].
template <typename real_t>
struct AxisTaps {
    std::vector<Tap<real_t>> taps;
    std::vector<int64_t> begin;

    void fill(const RoiAxis<real_t>& axis, int64_t bins, int64_t size, int64_t stride) {
        taps.clear();
        begin.assign(1, 0);
        const real_t share = real_t(1) / std::max(axis.grid, real_t(1));
        for (int64_t bin = 0; bin < bins; ++bin) {
            const size_t first = taps.size();
            const SampleRange range = sample_range(axis, bin, size);
            for (int64_t i = range.begin; i < range.end; ++i) {
                LinearSample<real_t> sample;
                if (linear_sample(sample_position(axis, bin, i), size, sample)) {
                    add(first, sample.low * stride, sample.low_weight * share);
                    add(first, sample.high * stride, sample.high_weight * share);
                }
            }
            begin.push_back(static_cast<int64_t>(taps.size()));
        }
    }

private:
    // Samples ascend, so a cell seen before in this bin is one of the last two.
    void add(size_t first, int64_t offset, real_t weight) {
        if (weight == real_t(0)) {
            return;
        }
        for (size_t back = 1; back <= 2 && taps.size() >= first + back; ++back) {
            Tap<real_t>& tap = taps[taps.size() - back];
            if (tap.offset == offset) {
                tap.weight += weight;
                return;
            }
        }
        taps.push_back({offset, weight});
    }
};

// One feature map: (N, H, W, C) by strides, C adjacent. `scalar_t` is const in the forward pass.
template <typename scalar_t>
struct FeatureLevel {
    scalar_t* data;
    int64_t height, width;
    int64_t image_stride, row_stride, column_stride;
    double scale;  // cells per pixel
};

struct RoiOptions {
    int64_t pooled_height, pooled_width;
    int64_t sampling_ratio;
    bool aligned;
    double finest_scale;  // of the level rule; any number where there is one level
};

// Image and level of RoI `row` = (batch index, x1, y1, x2, y2), and its taps there. False if it takes no part: a
// coordinate that is not finite, a batch index outside [first_image, last_image), or an empty level.
template <typename real_t, typename scalar_t>
bool roi_taps(
    const real_t* row, const RoiOptions& options, const std::vector<FeatureLevel<scalar_t>>& levels,
    int64_t first_image, int64_t last_image, int64_t& image, const FeatureLevel<scalar_t>*& level,
    AxisTaps<real_t>& rows, AxisTaps<real_t>& columns) {
    const real_t index = row[0];
    if (!(index >= real_t(first_image) && index < real_t(last_image))) {
        return false;
    }
    image = static_cast<int64_t>(index);
    level = &levels[static_cast<size_t>(roi_level<real_t>(
        row[1], row[2], row[3], row[4], static_cast<real_t>(options.finest_scale),
        static_cast<int64_t>(levels.size())))];
    const real_t scale = static_cast<real_t>(level->scale);
    const RoiAxis<real_t> y =
        roi_axis<real_t>(row[2], row[4], scale, options.pooled_height, options.sampling_ratio, options.aligned);
    const RoiAxis<real_t> x =
        roi_axis<real_t>(row[1], row[3], scale, options.pooled_width, options.sampling_ratio, options.aligned);
    if (!y.valid || !x.valid || level->height == 0 || level->width == 0) {
        return false;
    }
    rows.fill(y, options.pooled_height, level->height, level->row_stride);
    columns.fill(x, options.pooled_width, level->width, level->column_stride);
    return true;
}

// kVectors vectors of channels of one bin: sum of taps, accumulated in registers.
template <int kVectors, typename scalar_t, typename real_t>
inline void gather_bin(
    const scalar_t* feature,  // channels of cell (0, 0), from the first wanted one
    const Tap<real_t>* row_begin, const Tap<real_t>* row_end, const Tap<real_t>* column_begin,
    const Tap<real_t>* column_end,
    scalar_t* target) {  // kVectors * lanes values
    Vector<real_t> sum[kVectors] = {};
    for (const Tap<real_t>* row = row_begin; row != row_end; ++row) {
        for (const Tap<real_t>* column = column_begin; column != column_end; ++column) {
            const Vector<real_t> weight = broadcast(row->weight * column->weight);
            const scalar_t* cell = feature + row->offset + column->offset;
            for (int v = 0; v < kVectors; ++v) {
                sum[v] += weight * load_vector(cell + v * kLanes<real_t>);
            }
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        store_vector(target + v * kLanes<real_t>, sum[v]);
    }
}

template <typename scalar_t, typename real_t>
inline void gather_bin_tail(
    const scalar_t* feature, const Tap<real_t>* row_begin, const Tap<real_t>* row_end, const Tap<real_t>* column_begin,
    const Tap<real_t>* column_end, scalar_t* target, int count) {
    Vector<real_t> sum = {};
    for (const Tap<real_t>* row = row_begin; row != row_end; ++row) {
        for (const Tap<real_t>* column = column_begin; column != column_end; ++column) {
            sum +=
                broadcast(row->weight * column->weight) * load_partial(feature + row->offset + column->offset, count);
        }
    }
    store_partial(target, sum, count);
}

// Forward. Boxes have the compute type of the features.
template <typename scalar_t>
void roi_align_forward(
    const std::vector<FeatureLevel<const scalar_t>>& levels,
    const accum_t<scalar_t>* boxes,  // (K, 5)
    scalar_t* output,                // (K, PH, PW, C) or, if planar, (K, C, PH, PW)
    int64_t num_rois, int64_t batch, int64_t channels, const RoiOptions& options, bool planar) {
    using real_t = accum_t<scalar_t>;
    constexpr int kWide = 4;
    const int64_t bins = options.pooled_height * options.pooled_width;
    advise_huge_pages(output, sizeof(scalar_t) * static_cast<size_t>(num_rois * channels * bins));
    parallel_for(0, num_rois, 1, [&](int64_t roi_begin, int64_t roi_end) {
        AxisTaps<real_t> rows, columns;
        std::vector<scalar_t> transposed(planar ? static_cast<size_t>(bins * channels) : 0);
        for (int64_t roi = roi_begin; roi < roi_end; ++roi) {
            scalar_t* target = output + roi * bins * channels;
            int64_t image = 0;
            const FeatureLevel<const scalar_t>* level = nullptr;
            if (!roi_taps(boxes + roi * 5, options, levels, 0, batch, image, level, rows, columns)) {
                std::memset(static_cast<void*>(target), 0, sizeof(scalar_t) * static_cast<size_t>(bins * channels));
                continue;
            }
            const scalar_t* feature = level->data + image * level->image_stride;
            scalar_t* bin_target = planar ? transposed.data() : target;
            for (int64_t ph = 0; ph < options.pooled_height; ++ph) {
                const Tap<real_t>* row_begin = rows.taps.data() + rows.begin[ph];
                const Tap<real_t>* row_end = rows.taps.data() + rows.begin[ph + 1];
                for (int64_t pw = 0; pw < options.pooled_width; ++pw, bin_target += channels) {
                    const Tap<real_t>* column_begin = columns.taps.data() + columns.begin[pw];
                    const Tap<real_t>* column_end = columns.taps.data() + columns.begin[pw + 1];
                    int64_t c = 0;
                    for (; c + kWide * kLanes<real_t> <= channels; c += kWide * kLanes<real_t>) {
                        gather_bin<kWide>(feature + c, row_begin, row_end, column_begin, column_end, bin_target + c);
                    }
                    for (; c + kLanes<real_t> <= channels; c += kLanes<real_t>) {
                        gather_bin<1>(feature + c, row_begin, row_end, column_begin, column_end, bin_target + c);
                    }
                    if (c < channels) {
                        gather_bin_tail(
                            feature + c, row_begin, row_end, column_begin, column_end, bin_target + c,
                            static_cast<int>(channels - c));
                    }
                }
            }
            if (planar) {
                for (int64_t c = 0; c < channels; ++c) {
                    for (int64_t bin = 0; bin < bins; ++bin) {
                        target[c * bins + bin] = transposed[bin * channels + c];
                    }
                }
            }
        }
    });
}

// Backward: adds to the levels, which are zero on entry.
template <typename scalar_t>
void roi_align_scatter(
    const scalar_t* grad_output,     // (K, PH, PW, C)
    const accum_t<scalar_t>* boxes,  // (K, 5)
    const std::vector<FeatureLevel<accum_t<scalar_t>>>& levels, int64_t num_rois, int64_t batch, int64_t channels,
    const RoiOptions& options) {
    using real_t = accum_t<scalar_t>;
    const int64_t bins = options.pooled_height * options.pooled_width;
    // Slices of whole vectors, at most as many as there are threads per image: narrower ones only repeat geometry.
    const int64_t vectors = (channels + kLanes<real_t> - 1) / kLanes<real_t>;
    const int64_t slices = std::min(vectors, std::max<int64_t>(1, (num_threads() + batch - 1) / batch));
    const int64_t slice_channels = (vectors + slices - 1) / slices * kLanes<real_t>;
    parallel_for(0, batch * slices, 1, [&](int64_t begin, int64_t end) {
        AxisTaps<real_t> rows, columns;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t own_image = task / slices;
            const int64_t c_begin = std::min(channels, task % slices * slice_channels);
            const int64_t c_end = std::min(channels, c_begin + slice_channels);
            for (int64_t roi = 0; roi < num_rois; ++roi) {
                int64_t image = 0;
                const FeatureLevel<real_t>* level = nullptr;
                if (!roi_taps(
                        boxes + roi * 5, options, levels, own_image, own_image + 1, image, level, rows, columns)) {
                    continue;
                }
                real_t* feature = level->data + image * level->image_stride;
                const scalar_t* source = grad_output + roi * bins * channels;
                for (int64_t ph = 0; ph < options.pooled_height; ++ph) {
                    for (int64_t pw = 0; pw < options.pooled_width; ++pw, source += channels) {
                        for (int64_t y = rows.begin[ph]; y < rows.begin[ph + 1]; ++y) {
                            for (int64_t x = columns.begin[pw]; x < columns.begin[pw + 1]; ++x) {
                                const real_t weight = rows.taps[y].weight * columns.taps[x].weight;
                                real_t* cell = feature + rows.taps[y].offset + columns.taps[x].offset;
                                int64_t c = c_begin;
                                for (; c + kLanes<real_t> <= c_end; c += kLanes<real_t>) {
                                    store_vector(
                                        cell + c, load_vector(cell + c) + broadcast(weight) * load_vector(source + c));
                                }
                                for (; c < c_end; ++c) {
                                    cell[c] += weight * load(source[c]);
                                }
                            }
                        }
                    }
                }
            }
        }
    });
}

template <typename element_t>
inline FeatureLevel<element_t> feature_level(const Tensor& tensor, element_t* data, double scale) {
    return {data, tensor.size(2), tensor.size(3), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3),
            scale};
}

// Channels-last zeros in the compute type of `dtype`, to scatter into.
inline Tensor gradient_buffer(
    const Tensor& like, ScalarType dtype, int64_t batch, int64_t channels, int64_t height, int64_t width) {
    Tensor buffer =
        empty_like_sized(like, {batch, channels, height, width}, accum_dtype(dtype), MemoryFormat::ChannelsLast);
    return torch::stable::zero_(buffer);
}

inline Tensor finished_gradient(const Tensor& buffer, ScalarType dtype, bool channels_last) {
    const Tensor gradient = as_dtype(buffer, dtype);
    return channels_last ? gradient : to_contiguous(gradient);
}

}  // namespace spatialflow
