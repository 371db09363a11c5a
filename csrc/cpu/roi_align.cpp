// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on the CPU.
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(input[batch(k), c], y, x)
//
// Bilinear interpolation is a product of two linear ones and the samples of a bin form a grid, so a bin is
// sum_y wy[y] sum_x wx[x] input[y, x]: each axis is collapsed once per RoI into a short list of (cell, weight) taps in
// which samples that read the same cell are merged (two samples per axis read three cells, not four, when the RoI is
// small). Features are channels-last; the channels of a bin are vectors held in registers while the taps are walked.
//
// Threads: forward over RoIs; backward over (image, slice of channels), every thread walking all RoIs of its image in
// order, so that no two threads add to one element and the sum has one order: deterministic without atomics.
#include "ops/roi_align.h"

#include <algorithm>

#include "common/roi_align.h"
#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace spatialflow {
namespace {

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

// Geometry of RoI `row` = (batch index, x1, y1, x2, y2). False if it takes no part: a coordinate that is not finite, or
// a batch index outside the batch.
struct RoiOptions {
    int64_t pooled_height, pooled_width;
    double spatial_scale;
    int64_t sampling_ratio;
    bool aligned;
};

template <typename real_t, typename box_t>
bool roi_taps(
    const box_t* row, const RoiOptions& options, int64_t batch, int64_t height, int64_t width, int64_t stride_h,
    int64_t stride_w, int64_t& image, AxisTaps<real_t>& rows, AxisTaps<real_t>& columns) {
    const auto index = load(row[0]);
    if (!(index >= 0 && index < batch)) {
        return false;
    }
    image = static_cast<int64_t>(index);
    const real_t scale = static_cast<real_t>(options.spatial_scale);
    const RoiAxis<real_t> y = roi_axis<real_t>(
        load(row[2]), load(row[4]), scale, options.pooled_height, options.sampling_ratio, options.aligned);
    const RoiAxis<real_t> x = roi_axis<real_t>(
        load(row[1]), load(row[3]), scale, options.pooled_width, options.sampling_ratio, options.aligned);
    if (!y.valid || !x.valid) {
        return false;
    }
    rows.fill(y, options.pooled_height, height, stride_h);
    columns.fill(x, options.pooled_width, width, stride_w);
    return true;
}

// kVectors vectors of channels of one bin: sum of taps, accumulated in registers.
template <int kVectors, typename scalar_t, typename real_t>
inline void gather_bin(
    const scalar_t* feature,      // channels of cell (0, 0), from the first wanted one
    const Tap<real_t>* row_begin, const Tap<real_t>* row_end, const Tap<real_t>* column_begin,
    const Tap<real_t>* column_end,
    scalar_t* target) {           // kVectors * lanes values
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
    const scalar_t* feature, const Tap<real_t>* row_begin, const Tap<real_t>* row_end,
    const Tap<real_t>* column_begin, const Tap<real_t>* column_end, scalar_t* target, int count) {
    Vector<real_t> sum = {};
    for (const Tap<real_t>* row = row_begin; row != row_end; ++row) {
        for (const Tap<real_t>* column = column_begin; column != column_end; ++column) {
            sum += broadcast(row->weight * column->weight) *
                   load_partial(feature + row->offset + column->offset, count);
        }
    }
    store_partial(target, sum, count);
}

template <typename scalar_t, typename box_t>
void roi_align_forward(
    const scalar_t* input,  // (N, H, W, C) by strides, C adjacent
    const box_t* boxes,     // (K, 5) rows `box_stride` apart, adjacent columns
    scalar_t* output,       // (K, PH, PW, C) or, if planar, (K, C, PH, PW)
    int64_t num_rois, int64_t batch, int64_t channels, int64_t height, int64_t width, const int64_t strides[3],
    const RoiOptions& options, bool planar) {
    using real_t = accum_t<scalar_t>;
    constexpr int kWide = 4;
    const int64_t bins = options.pooled_height * options.pooled_width;
    parallel_for(0, num_rois, 1, [&](int64_t roi_begin, int64_t roi_end) {
        AxisTaps<real_t> rows, columns;
        std::vector<scalar_t> transposed(planar ? static_cast<size_t>(bins * channels) : 0);
        for (int64_t roi = roi_begin; roi < roi_end; ++roi) {
            scalar_t* target = output + roi * bins * channels;
            int64_t image = 0;
            if (!roi_taps<real_t>(
                    boxes + roi * 5, options, batch, height, width, strides[1], strides[2], image, rows, columns)) {
                std::memset(static_cast<void*>(target), 0, sizeof(scalar_t) * static_cast<size_t>(bins * channels));
                continue;
            }
            const scalar_t* feature = input + image * strides[0];
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
                        gather_bin_tail(feature + c, row_begin, row_end, column_begin, column_end, bin_target + c,
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

template <typename scalar_t, typename box_t>
void roi_align_scatter(
    const scalar_t* grad_output,  // (K, PH, PW, C)
    const box_t* boxes,           // (K, 5)
    accum_t<scalar_t>* grad_input,  // (N, H, W, C), zero on entry
    int64_t num_rois, int64_t batch, int64_t channels, int64_t height, int64_t width, const RoiOptions& options) {
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
            real_t* feature = grad_input + own_image * height * width * channels;
            for (int64_t roi = 0; roi < num_rois; ++roi) {
                const auto index = load(boxes[roi * 5]);
                int64_t image = 0;
                if (!(index >= own_image && index < own_image + 1) ||
                    !roi_taps<real_t>(boxes + roi * 5, options, batch, height, width, width * channels, channels,
                                      image, rows, columns)) {
                    continue;
                }
                const scalar_t* source = grad_output + roi * bins * channels;
                for (int64_t ph = 0; ph < options.pooled_height; ++ph) {
                    for (int64_t pw = 0; pw < options.pooled_width; ++pw, source += channels) {
                        for (int64_t y = rows.begin[ph]; y < rows.begin[ph + 1]; ++y) {
                            for (int64_t x = columns.begin[pw]; x < columns.begin[pw + 1]; ++x) {
                                const real_t weight = rows.taps[y].weight * columns.taps[x].weight;
                                real_t* cell = feature + rows.taps[y].offset + columns.taps[x].offset;
                                int64_t c = c_begin;
                                for (; c + kLanes<real_t> <= c_end; c += kLanes<real_t>) {
                                    store_vector(cell + c, load_vector(cell + c) +
                                                               broadcast(weight) * load_vector(source + c));
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

// Boxes keep their own precision: double for double features, else float32, whatever the features are.
Tensor boxes_as(const Tensor& boxes, ScalarType feature_dtype) {
    const ScalarType wanted = feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    return to_contiguous(boxes.scalar_type() == wanted ? boxes : torch::stable::to(boxes, wanted));
}

template <typename scalar_t>
using box_type = accum_t<scalar_t>;

Tensor roi_align_cpu(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned) {
    check_roi_align(input, boxes, pooled_height, pooled_width, spatial_scale);
    const int64_t num_rois = boxes.size(0), channels = input.size(1);
    const MemoryFormat format = memory_format_of(input);
    Tensor output = empty_like_sized(
        input, {num_rois, channels, pooled_height, pooled_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    if (input.numel() == 0) {
        return torch::stable::zero_(output);
    }
    const Tensor feature = input.stride(1) == 1 ? input : to_contiguous(input, MemoryFormat::ChannelsLast);
    const Tensor rois = boxes_as(boxes, input.scalar_type());
    const int64_t strides[3] = {feature.stride(0), feature.stride(2), feature.stride(3)};
    dispatch_floating("roi_align", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        roi_align_forward(
            data<scalar_t>(feature), data<box_type<scalar_t>>(rois), mutable_data<scalar_t>(output), num_rois,
            input.size(0), channels, input.size(2), input.size(3), strides,
            {pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned}, format == MemoryFormat::Contiguous);
    });
    return output;
}

Tensor roi_align_backward_cpu(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned, int64_t batch, int64_t channels, int64_t height, int64_t width,
    bool channels_last, bool /* deterministic: it always is */) {
    check_roi_align_backward(grad_output, boxes, pooled_height, pooled_width, spatial_scale, channels);
    const ScalarType dtype = grad_output.scalar_type();
    const ScalarType accum = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Tensor grad_input = empty_like_sized(
        grad_output, {batch, channels, height, width}, accum, MemoryFormat::ChannelsLast);
    torch::stable::zero_(grad_input);
    if (grad_output.numel() != 0 && grad_input.numel() != 0) {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = boxes_as(boxes, dtype);
        dispatch_floating("roi_align_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            roi_align_scatter(
                data<scalar_t>(source), data<box_type<scalar_t>>(rois), mutable_data<accum_t<scalar_t>>(grad_input),
                boxes.size(0), batch, channels, height, width,
                {pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned});
        });
    }
    if (dtype != accum) {
        grad_input = torch::stable::to(grad_input, dtype);
    }
    return channels_last ? grad_input : to_contiguous(grad_input);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::roi_align_cpu));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::roi_align_backward_cpu));
}
