// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on the CPU, over one feature map or a pyramid of feature maps (roi_align is a pyramid of one level).
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(level(k)[batch(k), c], y, x)
//                        = sum_y wy[y] sum_x wx[x] level(k)[batch(k), c, y, x]     over the cells that the bin reads
//
// For each axis of a RoI, a list of (cell, weight) taps is computed once. Samples of a bin that read the same cell
// share a tap. Features are channels-last; the sums of a bin stay in registers during the loop over its taps.
//
// Tasks of the forward pass are RoIs; tasks of the backward pass are (image, slice of channels). A backward task visits
// all RoIs of its image in order, so sums are deterministic without atomics.
#include "ops/roi_align.h"

#include <algorithm>
#include <vector>

#include "common/roi_align.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/simd.h"

namespace spatialflow {
namespace {

template <typename real_t>
struct Tap {
    int64_t offset;  // cell times the stride of its axis
    real_t weight;
};

// Taps of all bins of one axis; bin b has taps[begin[b]] .. taps[begin[b + 1] - 1].
template <typename real_t>
struct AxisTaps {
    std::vector<Tap<real_t>> taps;
    std::vector<int64_t> begin;

    void fill(const RoiAxis<real_t>& axis, int64_t bins, int64_t size, int64_t stride) {
        taps.clear();
        begin.assign(1, 0);
        const real_t sample_weight = real_t(1) / std::max(axis.grid, real_t(1));
        for (int64_t bin = 0; bin < bins; ++bin) {
            const size_t first = taps.size();
            const SampleRange range = sample_range(axis, bin, size);
            for (int64_t i = range.begin; i < range.end; ++i) {
                LinearSample<real_t> sample;
                if (linear_sample(sample_position(axis, bin, i), size, sample)) {
                    add(first, sample.low * stride, sample.low_weight * sample_weight);
                    add(first, sample.high * stride, sample.high_weight * sample_weight);
                }
            }
            begin.push_back(static_cast<int64_t>(taps.size()));
        }
    }

private:
    // Add a tap, or add to the tap of the same cell. Sample coordinates ascend, so only the last two taps can have the
    // same cell. Coordinates of a reversed RoI descend; a cell may then have two taps, whose weights add up to its
    // weight.
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

// Taps of one bin on one axis.
template <typename real_t>
struct TapRange {
    const Tap<real_t>* first;
    const Tap<real_t>* last;  // one past the end

    const Tap<real_t>* begin() const { return first; }
    const Tap<real_t>* end() const { return last; }
};

template <typename real_t>
inline TapRange<real_t> taps_of_bin(const AxisTaps<real_t>& axis, int64_t bin) {
    return {axis.taps.data() + axis.begin[bin], axis.taps.data() + axis.begin[bin + 1]};
}

// `element_t` is const in the forward pass.
template <typename element_t>
using CpuRoiLevel = RoiLevel<element_t*, int64_t>;

// Image, level and taps of a RoI. The object is reused, so that its lists are allocated once per thread.
template <typename real_t, typename element_t>
struct RoiTaps {
    const CpuRoiLevel<element_t>* level = nullptr;
    int64_t image = 0;
    AxisTaps<real_t> rows, columns;

    // Compute the taps of `box` = (batch index, x1, y1, x2, y2). Return false if the RoI reads nothing: for a
    // coordinate that is not finite, a batch index outside [first_image, last_image), or an empty level.
    bool fill(
        const real_t* box, const RoiAlignSettings& settings, const std::vector<CpuRoiLevel<element_t>>& levels,
        int64_t first_image, int64_t last_image) {
        const real_t index = box[0];
        if (!(index >= real_t(first_image) && index < real_t(last_image))) {
            return false;
        }
        image = static_cast<int64_t>(index);
        level = &levels[static_cast<size_t>(roi_level<real_t>(
            box[1], box[2], box[3], box[4], static_cast<real_t>(settings.finest_scale),
            static_cast<int64_t>(levels.size())))];
        const real_t scale = static_cast<real_t>(level->scale);
        const RoiAxis<real_t> y =
            roi_axis<real_t>(box[2], box[4], scale, settings.pooled_height, settings.sampling_ratio, settings.aligned);
        const RoiAxis<real_t> x =
            roi_axis<real_t>(box[1], box[3], scale, settings.pooled_width, settings.sampling_ratio, settings.aligned);
        if (!y.valid || !x.valid || level->height == 0 || level->width == 0) {
            return false;
        }
        rows.fill(y, settings.pooled_height, level->height, level->row_stride);
        columns.fill(x, settings.pooled_width, level->width, level->column_stride);
        return true;
    }
};

// ---- forward -----------------------------------------------------------------------------------------------------

// Compute kVectors vectors of channels of one bin; the sums stay in registers.
template <int kVectors, typename scalar_t, typename real_t>
inline void gather_bin(
    const scalar_t* feature,  // cell (0, 0), from the first channel to compute
    const TapRange<real_t>& rows, const TapRange<real_t>& columns,
    scalar_t* target) {  // kVectors * lanes values
    Vector<real_t> sum[kVectors] = {};
    for (const Tap<real_t>& row : rows) {
        for (const Tap<real_t>& column : columns) {
            const Vector<real_t> weight = broadcast(row.weight * column.weight);
            const scalar_t* cell = feature + row.offset + column.offset;
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
    const scalar_t* feature, const TapRange<real_t>& rows, const TapRange<real_t>& columns, scalar_t* target,
    int count) {
    Vector<real_t> sum = {};
    for (const Tap<real_t>& row : rows) {
        for (const Tap<real_t>& column : columns) {
            sum += broadcast(row.weight * column.weight) * load_partial(feature + row.offset + column.offset, count);
        }
    }
    store_partial(target, sum, count);
}

template <typename scalar_t, typename real_t>
inline void gather_roi(
    const RoiTaps<real_t, const scalar_t>& taps, const RoiAlignSettings& settings, int64_t channels,
    scalar_t* target) {         // (PH, PW, C)
    constexpr int kUnroll = 4;  // vectors of channels that share the weights of a tap
    const scalar_t* feature = taps.level->data + taps.image * taps.level->image_stride;
    for (int64_t ph = 0; ph < settings.pooled_height; ++ph) {
        const TapRange<real_t> rows = taps_of_bin(taps.rows, ph);
        for (int64_t pw = 0; pw < settings.pooled_width; ++pw, target += channels) {
            const TapRange<real_t> columns = taps_of_bin(taps.columns, pw);
            int64_t c = 0;
            for (; c + kUnroll * kLanes<real_t> <= channels; c += kUnroll * kLanes<real_t>) {
                gather_bin<kUnroll>(feature + c, rows, columns, target + c);
            }
            for (; c + kLanes<real_t> <= channels; c += kLanes<real_t>) {
                gather_bin<1>(feature + c, rows, columns, target + c);
            }
            if (c < channels) {
                gather_bin_tail(feature + c, rows, columns, target + c, static_cast<int>(channels - c));
            }
        }
    }
}

// target[c, bin] = source[bin, c].
template <typename scalar_t>
void transpose_bins(const scalar_t* source, int64_t bins, int64_t channels, scalar_t* target) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t bin = 0; bin < bins; ++bin) {
            target[c * bins + bin] = source[bin * channels + c];
        }
    }
}

template <typename scalar_t>
void gather_rois(
    const std::vector<CpuRoiLevel<const scalar_t>>& levels,
    const accum_t<scalar_t>* boxes,  // (K, 5)
    scalar_t* output,                // (K, PH, PW, C), or (K, C, PH, PW) if channels_first
    int64_t num_rois, int64_t batch, int64_t channels, const RoiAlignSettings& settings, bool channels_first) {
    using real_t = accum_t<scalar_t>;
    const int64_t bins = settings.pooled_height * settings.pooled_width;
    advise_huge_pages(output, sizeof(scalar_t) * static_cast<size_t>(num_rois * channels * bins));
    parallel_for(0, num_rois, 1, [&](int64_t roi_begin, int64_t roi_end) {
        RoiTaps<real_t, const scalar_t> taps;
        std::vector<scalar_t> bin_rows(channels_first ? static_cast<size_t>(bins * channels) : 0);  // (PH, PW, C)
        for (int64_t roi = roi_begin; roi < roi_end; ++roi) {
            scalar_t* target = output + roi * bins * channels;
            if (!taps.fill(boxes + roi * 5, settings, levels, 0, batch)) {
                std::memset(static_cast<void*>(target), 0, sizeof(scalar_t) * static_cast<size_t>(bins * channels));
                continue;
            }
            gather_roi(taps, settings, channels, channels_first ? bin_rows.data() : target);
            if (channels_first) {
                transpose_bins(bin_rows.data(), bins, channels, target);
            }
        }
    });
}

// ---- backward ----------------------------------------------------------------------------------------------------

template <typename scalar_t, typename real_t>
inline void scatter_bin(
    real_t* feature,         // channels of cell (0, 0)
    const scalar_t* source,  // channels of the bin's gradient
    const TapRange<real_t>& rows, const TapRange<real_t>& columns, int64_t c_begin, int64_t c_end) {
    for (const Tap<real_t>& row : rows) {
        for (const Tap<real_t>& column : columns) {
            const real_t weight = row.weight * column.weight;
            real_t* cell = feature + row.offset + column.offset;
            int64_t c = c_begin;
            for (; c + kLanes<real_t> <= c_end; c += kLanes<real_t>) {
                store_vector(cell + c, load_vector(cell + c) + broadcast(weight) * load_vector(source + c));
            }
            for (; c < c_end; ++c) {
                cell[c] += weight * load(source[c]);
            }
        }
    }
}

// Add the gradient of one RoI to channels [c_begin, c_end) of its level.
template <typename scalar_t, typename real_t>
inline void scatter_roi(
    const RoiTaps<real_t, real_t>& taps, const RoiAlignSettings& settings, int64_t channels,
    const scalar_t* source,  // (PH, PW, C)
    int64_t c_begin, int64_t c_end) {
    real_t* feature = taps.level->data + taps.image * taps.level->image_stride;
    for (int64_t ph = 0; ph < settings.pooled_height; ++ph) {
        const TapRange<real_t> rows = taps_of_bin(taps.rows, ph);
        for (int64_t pw = 0; pw < settings.pooled_width; ++pw, source += channels) {
            scatter_bin(feature, source, rows, taps_of_bin(taps.columns, pw), c_begin, c_end);
        }
    }
}

// Add the gradients to the levels, which are zero on entry.
template <typename scalar_t>
void scatter_rois(
    const scalar_t* grad_output,     // (K, PH, PW, C)
    const accum_t<scalar_t>* boxes,  // (K, 5)
    const std::vector<CpuRoiLevel<accum_t<scalar_t>>>& levels, int64_t num_rois, int64_t batch, int64_t channels,
    const RoiAlignSettings& settings) {
    using real_t = accum_t<scalar_t>;
    const int64_t bins = settings.pooled_height * settings.pooled_width;
    // Use slices of whole vectors, about one task per thread over all images. More slices would only repeat the
    // computation of taps.
    const int64_t vectors = (channels + kLanes<real_t> - 1) / kLanes<real_t>;
    const int64_t slices = std::min(vectors, std::max<int64_t>(1, (num_threads() + batch - 1) / batch));
    const int64_t slice_channels = (vectors + slices - 1) / slices * kLanes<real_t>;
    parallel_for(0, batch * slices, 1, [&](int64_t begin, int64_t end) {
        RoiTaps<real_t, real_t> taps;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / slices;
            const int64_t c_begin = std::min(channels, task % slices * slice_channels);
            const int64_t c_end = std::min(channels, c_begin + slice_channels);
            for (int64_t roi = 0; roi < num_rois; ++roi) {
                if (taps.fill(boxes + roi * 5, settings, levels, image, image + 1)) {
                    scatter_roi(taps, settings, channels, grad_output + roi * bins * channels, c_begin, c_end);
                }
            }
        }
    });
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename element_t>
std::vector<CpuRoiLevel<element_t>> levels_of(const std::vector<Tensor>& tensors, const std::vector<double>& scales) {
    std::vector<CpuRoiLevel<element_t>> levels;
    for (size_t l = 0; l < tensors.size(); ++l) {
        const Tensor& tensor = tensors[l];
        element_t* elements;
        if constexpr (std::is_const_v<element_t>) {
            elements = data<std::remove_const_t<element_t>>(tensor);
        } else {
            elements = mutable_data<element_t>(tensor);
        }
        levels.push_back(
            {elements, tensor.size(2), tensor.size(3), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3),
             scales[l]});
    }
    return levels;
}

}  // namespace

Tensor roi_align_forward(
    const char* op, const std::vector<Tensor>& features, const Tensor& boxes, const RoiAlignSettings& settings) {
    const Tensor& first = features[0];
    const int64_t num_rois = boxes.size(0), batch = first.size(0), channels = first.size(1);
    const MemoryFormat format = memory_format_of(first);
    Tensor output = empty_like_sized(
        first, {num_rois, channels, settings.pooled_height, settings.pooled_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    if (batch == 0) {
        return torch::stable::zero_(output);
    }
    std::vector<Tensor> sources;
    for (const Tensor& feature : features) {
        sources.push_back(channels_adjacent(feature));
    }
    const Tensor rois = contiguous_as(boxes, accum_dtype(first.scalar_type()));
    dispatch_floating(op, first.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        gather_rois<scalar_t>(
            levels_of<const scalar_t>(sources, settings.scales), data<accum_t<scalar_t>>(rois),
            mutable_data<scalar_t>(output), num_rois, batch, channels, settings, format == MemoryFormat::Contiguous);
    });
    return output;
}

std::vector<Tensor> roi_align_backward(
    const char* op, const Tensor& grad_output, const Tensor& boxes, const RoiAlignSettings& settings, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool /* deterministic: it always is */) {
    const ScalarType dtype = grad_output.scalar_type();
    std::vector<Tensor> gradients;
    for (size_t l = 0; l < heights.size(); ++l) {
        Tensor gradient = empty_like_sized(
            grad_output, {batch, channels, heights[l], widths[l]}, accum_dtype(dtype), MemoryFormat::ChannelsLast);
        gradients.push_back(torch::stable::zero_(gradient));
    }
    if (grad_output.numel() != 0 && batch != 0) {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = contiguous_as(boxes, accum_dtype(dtype));
        dispatch_floating(op, dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            scatter_rois<scalar_t>(
                data<scalar_t>(source), data<real_t>(rois), levels_of<real_t>(gradients, settings.scales),
                boxes.size(0), batch, channels, settings);
        });
    }
    return finished_level_gradients(std::move(gradients), dtype, channels_last);
}

}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::single_level_roi_align));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::single_level_roi_align_backward));
}
