// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign geometry, shared by CPU and CUDA: positions of the samples of a bin, and the four cells that each sample
// reads. See He et al., Mask R-CNN; the sampling rule is that of torchvision and detectron2.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// One level of a feature pyramid: (N, H, W, C) with adjacent channels; strides are in elements.
template <typename pointer_t, typename extent_t>
struct RoiLevel {
    pointer_t data;
    extent_t height, width;
    int64_t image_stride, row_stride, column_stride;
    double scale;  // cells per pixel
};

// One axis of a RoI in feature coordinates: bin b has `grid` samples at start + b * bin + (i + 0.5) * step.
// `valid` is false for a RoI whose coordinates are not finite: it has no samples.
template <typename real_t>
struct RoiAxis {
    real_t start;
    real_t bin;
    real_t step;
    real_t grid;
    bool valid;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE RoiAxis<real_t> roi_axis(
    real_t low, real_t high, real_t scale, int64_t bins, int64_t sampling_ratio, bool aligned) {
    RoiAxis<real_t> axis;
    const real_t offset = aligned ? real_t(0.5) : real_t(0);
    axis.start = low * scale - offset;
    real_t extent = (high * scale - offset) - axis.start;
    if (!aligned && !(extent >= real_t(1))) {
        extent = real_t(1);  // the rule without `aligned`: a RoI is at least one cell wide
    }
    axis.bin = extent / real_t(bins);
    axis.grid = sampling_ratio > 0 ? real_t(sampling_ratio) : std::ceil(extent / real_t(bins));
    axis.step = axis.bin / axis.grid;
    // value - value is zero only for a finite value. Products can overflow, so `start` and `extent` are tested too.
    axis.valid = (low - low) == real_t(0) && (high - high) == real_t(0) && (axis.start - axis.start) == real_t(0) &&
                 (extent - extent) == real_t(0);
    return axis;
}

// Samples [begin, end) of bin `bin` that can read an axis of `size` cells. A sample is valid within [-1, size]. The
// bounds are widened by two samples because of rounding, and `linear_sample` tests each sample exactly. So the work is
// bounded by the feature's size, however large the RoI is. All samples are included if there are at most four, or if
// the RoI is reversed or empty.
struct SampleRange {
    int64_t begin;
    int64_t end;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE SampleRange sample_range(const RoiAxis<real_t>& axis, int64_t bin, int64_t size) {
    const real_t first = axis.start + real_t(bin) * axis.bin;
    real_t begin = real_t(0);
    real_t end = axis.grid;
    if (axis.grid > real_t(4) && axis.step > real_t(0)) {
        begin = std::floor((real_t(-1) - first) / axis.step) - real_t(2);
        end = std::ceil((real_t(size) - first) / axis.step) + real_t(2);
        begin = begin > real_t(0) ? begin : real_t(0);
        end = end < axis.grid ? end : axis.grid;
    }
    if (!(begin < end) || !(begin < real_t(1e15))) {
        return {0, 0};
    }
    return {static_cast<int64_t>(begin), static_cast<int64_t>(end < real_t(1e15) ? end : real_t(1e15))};
}

// The two cells of a linear interpolation and their weights.
template <typename real_t>
struct LinearSample {
    int64_t low;
    int64_t high;
    real_t low_weight;
    real_t high_weight;
};

// Compute the cells and weights at coordinate `at` on an axis of `size` cells. Return false outside [-1, size] and for
// NaN: such a sample reads nothing.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool linear_sample(real_t at, int64_t size, LinearSample<real_t>& sample) {
    if (!(at >= real_t(-1) && at <= real_t(size))) {
        return false;
    }
    at = at > real_t(0) ? at : real_t(0);
    sample.low = static_cast<int64_t>(at);
    if (sample.low >= size - 1) {
        sample.low = sample.high = size - 1;
        at = real_t(sample.low);
    } else {
        sample.high = sample.low + 1;
    }
    sample.high_weight = at - real_t(sample.low);
    sample.low_weight = real_t(1) - sample.high_weight;
    return true;
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t sample_position(const RoiAxis<real_t>& axis, int64_t bin, int64_t index) {
    return axis.start + real_t(bin) * axis.bin + (real_t(index) + real_t(0.5)) * axis.step;
}

// Cells [begin, end) of an axis that the samples of bin `bin` can read.
struct CellRange {
    int64_t begin;
    int64_t end;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE CellRange bin_cells(const RoiAxis<real_t>& axis, int64_t bin, int64_t size) {
    const SampleRange samples = sample_range(axis, bin, size);
    if (samples.begin >= samples.end) {
        return {0, 0};
    }
    const real_t first_sample = sample_position(axis, bin, samples.begin);
    const real_t last_sample = sample_position(axis, bin, samples.end - 1);
    const real_t last_cell = real_t(size - 1);
    real_t low = std::floor(first_sample < last_sample ? first_sample : last_sample);
    real_t high = std::floor(first_sample < last_sample ? last_sample : first_sample) + real_t(1);
    low = low > real_t(0) ? (low < last_cell ? low : last_cell) : real_t(0);
    high = high > real_t(0) ? (high < last_cell ? high : last_cell) : real_t(0);
    return {static_cast<int64_t>(low), static_cast<int64_t>(high) + 1};
}

// Weight of cell `cell` in the mean over the samples of bin `bin`, on one axis. The weight in two dimensions is the
// product over the axes. Of more than four samples, only those within one cell of `cell` are visited, plus two on each
// side because of rounding.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t cell_weight(const RoiAxis<real_t>& axis, int64_t bin, int64_t cell, int64_t size) {
    SampleRange samples = sample_range(axis, bin, size);
    if (axis.grid > real_t(4) && axis.step > real_t(0)) {
        const real_t first = axis.start + real_t(bin) * axis.bin;
        const real_t begin = std::floor((real_t(cell - 1) - first) / axis.step) - real_t(2);
        const real_t end = std::ceil((real_t(cell + 1) - first) / axis.step) + real_t(2);
        samples.begin = begin > real_t(samples.begin) ? static_cast<int64_t>(begin) : samples.begin;
        samples.end = end < real_t(samples.end) ? static_cast<int64_t>(end) : samples.end;
    }
    real_t weight = real_t(0);
    for (int64_t i = samples.begin; i < samples.end; ++i) {
        LinearSample<real_t> sample;
        if (linear_sample(sample_position(axis, bin, i), size, sample)) {
            weight += sample.low == cell ? sample.low_weight : real_t(0);
            weight += sample.high == cell ? sample.high_weight : real_t(0);
        }
    }
    return weight / (axis.grid > real_t(1) ? axis.grid : real_t(1));
}

// Level of a feature pyramid for a box in image pixels (Lin et al., Feature Pyramid Networks, equation 1). It is
// clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, levels - 1), the rule of mmdetection's SingleRoIExtractor.
// floor(log2(q)) >= l is computed as q >= 2^l, so all back ends give equal levels. A negative area (one side reversed)
// and a NaN give level 0, the finest.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE int64_t
roi_level(real_t x1, real_t y1, real_t x2, real_t y2, real_t finest_scale, int64_t levels) {
    const real_t ratio = std::sqrt((x2 - x1) * (y2 - y1)) / finest_scale + real_t(1e-6);
    int64_t level = 0;
    for (real_t bound = real_t(2); level < levels - 1 && ratio >= bound; bound *= real_t(2)) {
        ++level;
    }
    return level;
}

}  // namespace spatialflow
