// SPDX-License-Identifier: Apache-2.0
//
// GroupNorm, ReLU and optional 2x upsampling on the CPU, channels-last. The input is read twice: first for the
// statistics, then for the output. Upsampling keeps two normalized rows in the cache and interpolates along rows in
// registers.
#include "cpu/group_norm_relu.h"

#include "cpu/huge_pages.h"
#include "cpu/row_pair.h"
#include "cpu/scratch.h"

namespace spatialflow {
namespace {

// ---- statistics --------------------------------------------------------------------------------------------------

// Add the sums of a run of pixels, around the pivot of each channel's group.
template <typename scalar_t>
void add_pixels(
    const scalar_t* run, int64_t pixel_stride, int64_t count, int64_t channels, const double* pivots, double* sums,
    double* squares) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        Vector<real_t> pivot[kVectors], sum[kVectors] = {}, square[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) {
            pivot[v] = lanes.load(run + c + v * kLanes<real_t>);
        }
        const scalar_t* pixel = run + c;
        for (int64_t p = 0; p < count; ++p, pixel += pixel_stride) {
            for (int v = 0; v < kVectors; ++v) {
                const Vector<real_t> difference = lanes.load(pixel + v * kLanes<real_t>) - pivot[v];
                sum[v] += difference;
                square[v] += difference * difference;
            }
        }
        const LanesOf<kVectors, real_t> run_pivots(pivot), run_sums(sum), run_squares(square);
        for (int i = 0; i < run_sums.count; ++i) {
            GroupSums total{sums[c + i], squares[c + i]};
            add_run(
                total, pivots[c + i], run_pivots.values[i], static_cast<double>(count), run_sums.values[i],
                run_squares.values[i]);
            sums[c + i] = total.sum;
            squares[c + i] = total.square;
        }
    });
}

template <typename scalar_t>
void compute_statistics(
    NormMap<const scalar_t> input, const NormShape& shape, double eps,
    double* statistics) {  // (N, groups, 2)
    const int64_t stride = padded(shape.channels);
    std::vector<double> pivots(static_cast<size_t>(shape.batch * stride));
    for (int64_t image = 0; image < shape.batch; ++image) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const int64_t first = c / shape.group_channels() * shape.group_channels();
            pivots[image * stride + c] = load(input.row(image, 0)[first]);
        }
    }
    const NormBlocks blocks(shape.pixels(), kBlockPixels);
    SumsOfBlocks sums(shape, blocks);
    const bool adjacent_rows = input.has_adjacent_rows(shape);
    blocks.for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t block) {
        for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
            add_pixels(
                input.row(image, y) + x * input.pixel_stride, input.pixel_stride, count, shape.channels,
                &pivots[image * stride], sums.first(block), sums.second(block));
        });
    });
    for (int64_t g = 0; g < shape.batch * shape.groups; ++g) {
        const int64_t image = g / shape.groups, begin = g % shape.groups * shape.group_channels();
        GroupSums total{};
        for (int64_t block = image * blocks.count; block < (image + 1) * blocks.count; ++block) {
            for (int64_t c = begin; c < begin + shape.group_channels(); ++c) {
                total.sum += sums.first(block)[c];
                total.square += sums.second(block)[c];
            }
        }
        const GroupStatistics group =
            group_statistics(total, pivots[image * stride + begin], static_cast<double>(shape.group_size()), eps);
        statistics[2 * g] = group.mean;
        statistics[2 * g + 1] = group.rstd;
    }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// Normalize pixels with a constant stride and apply ReLU.
template <typename scalar_t, typename target_t>
inline void normalize(
    const scalar_t* pixels, int64_t pixel_stride, const Affine<accum_t<scalar_t>>& affine, target_t* target,
    int64_t target_stride, int64_t channels, int64_t count) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> coefficients(affine, c);
        for (int64_t x = 0; x < count; ++x) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = c + v * kLanes<real_t>;
                const Vector<real_t> value = coefficients.apply(v, lanes.load(pixels + x * pixel_stride + at));
                lanes.store(target + x * target_stride + at, lane_max(Vector<real_t>{}, value));  // NaN stays NaN
            }
        }
    });
}

// Interpolate one row of the doubled map from the two adjacent normalized rows.
template <typename scalar_t, typename real_t>
void interpolate_row(
    const real_t* low, const real_t* high, const DoubledCell<real_t>& row,
    const std::vector<DoubledCell<real_t>>& columns, int64_t stride, int64_t channels, scalar_t* target) {
    const Vector<real_t> low_row = broadcast(row.low_weight), high_row = broadcast(row.high_weight);
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        Vector<real_t> left[kVectors], right[kVectors];
        const auto blend = [&](int64_t x, Vector<real_t>(&result)[kVectors]) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = x * stride + c + v * kLanes<real_t>;
                result[v] = load_vector(low + at) * low_row + load_vector(high + at) * high_row;
            }
        };
        int64_t cell = -1;
        for (const DoubledCell<real_t>& column : columns) {
            if (column.low != cell) {  // cell + 1: adjacent columns are less than half a cell apart
                if (cell < 0) {
                    blend(column.low, left);
                } else {
                    std::copy(right, right + kVectors, left);
                }
                blend(column.high, right);
                cell = column.low;
            }
            const Vector<real_t> low_column = broadcast(column.low_weight), high_column = broadcast(column.high_weight);
            for (int v = 0; v < kVectors; ++v) {
                lanes.store(target + c + v * kLanes<real_t>, left[v] * low_column + right[v] * high_column);
            }
            target += channels;
        }
        target -= channels * static_cast<int64_t>(columns.size());
    });
}

// Compute the rows of the doubled map whose `low` is in rows [first, last) of the input.
template <typename scalar_t>
void upsample_rows(
    NormMap<const scalar_t> input, const NormShape& shape, const Affine<accum_t<scalar_t>>& affine,
    const std::vector<DoubledCell<accum_t<scalar_t>>>& columns, NormMap<scalar_t> output, int64_t image, int64_t first,
    int64_t last,
    accum_t<scalar_t>* memory) {  // (2, W, padded C)
    using real_t = accum_t<scalar_t>;
    const int64_t stride = padded(shape.channels);
    RowPair<real_t> normalized(memory, stride * shape.width);
    const auto normalize_row = [&](int64_t y, real_t* row) {
        normalize(input.row(image, y), input.pixel_stride, affine, row, stride, shape.channels, shape.width);
    };
    for (int64_t i = first_doubled(first, shape.height); i < first_doubled(last, shape.height); ++i) {
        const DoubledCell<real_t> row = doubled_cell<real_t>(i, shape.height);
        const real_t* low = normalized.row(row.low, normalize_row);
        const real_t* high = normalized.row(row.high, normalize_row);
        interpolate_row(low, high, row, columns, stride, shape.channels, output.row(image, i));
    }
}

template <typename scalar_t>
void forward(
    NormMap<const scalar_t> input, const NormShape& shape, const double* statistics, const double* weight,
    const double* bias, bool upsample, scalar_t* output) {
    using real_t = accum_t<scalar_t>;
    const int64_t factor = upsample ? 2 : 1;
    const NormMap<scalar_t> target = dense_map(output, shape.channels, factor * shape.height, factor * shape.width);
    advise_huge_pages(output, sizeof(scalar_t) * static_cast<size_t>(shape.batch * target.image_stride));
    const std::vector<Affine<real_t>> affine = affine_of_images<real_t>(shape, statistics, weight, bias);
    if (!upsample) {
        const bool adjacent_rows = input.has_adjacent_rows(shape);
        NormBlocks(shape.pixels(), kBlockPixels)
            .for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t) {
                for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
                    normalize(
                        input.row(image, y) + x * input.pixel_stride, input.pixel_stride, affine[image],
                        target.row(image, y) + x * shape.channels, shape.channels, shape.channels, count);
                });
            });
        return;
    }
    const std::vector<DoubledCell<real_t>> columns = doubled_axis<real_t>(shape.width);
    const int64_t rows = shape.batch * shape.height, grain = std::max<int64_t>(1, kBlockPixels / shape.width);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        const Scratch<real_t> memory(2 * padded(shape.channels) * shape.width);
        while (begin < end) {  // a range of rows of one image
            const int64_t image = begin / shape.height, y = begin % shape.height;
            const int64_t count = std::min(shape.height - y, end - begin);
            upsample_rows(input, shape, affine[image], columns, target, image, y, y + count, memory.get());
            begin += count;
        }
    });
}

// ---- operator ----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> group_norm_relu_cpu(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t num_groups,
    double eps, bool upsample) {
    check_group_norm_relu(input, weight, bias, num_groups, eps);
    const NormShape shape = shape_of(input, num_groups);
    Tensor statistics = empty_like_sized(input, {shape.batch, num_groups, 2}, ScalarType::Double);
    const Tensor output = empty_norm_map(input, upsample ? 2 : 1);
    if (input.numel() == 0) {
        return {output, torch::stable::zero_(statistics)};
    }
    const Tensor source = channels_adjacent(input);
    const auto scale = float64_values(weight, shape.channels, 1.0), shift = float64_values(bias, shape.channels, 0.0);
    dispatch_floating("group_norm_relu", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const NormMap<const scalar_t> map = map_of<scalar_t>(source);
        compute_statistics(map, shape, eps, mutable_data<double>(statistics));
        forward(
            map, shape, data<double>(statistics), scale.data(), shift.data(), upsample, mutable_data<scalar_t>(output));
    });
    return {to_contiguous(output, memory_format_of(input)), statistics};
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("group_norm_relu", TORCH_BOX(&spatialflow::group_norm_relu_cpu));
}
