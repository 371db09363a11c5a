// SPDX-License-Identifier: Apache-2.0
//
// Formulas of group_norm_relu, shared by CPU and CUDA.
//
//   y = relu((x - mean) * rstd * weight + bias)
//
// The float64 mean is split into a number of the compute type (`shift`) and a remainder. The difference x - shift is
// exact for x near the mean, however large both are.
//
// Sums of squares are taken around the pivot, one of the n numbers. Such a sum is at most n times the sum around their
// mean. So the cancellation in `group_statistics` amplifies rounding errors at most n times.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// Largest count of numbers that are summed in the compute type; longer sums are in float64.
constexpr int64_t kGroupNormRun = 64;

// sum(x - pivot) and sum((x - pivot)^2) of numbers x; the pivot is one of the numbers.
struct GroupSums {
    double sum, square;
};

// Add `count` numbers whose sums around `run_pivot` are `sum` and `square`.
SPATIALFLOW_HOST_DEVICE void add_run(
    GroupSums& sums, double pivot, double run_pivot, double count, double sum, double square) {
    const double step = run_pivot - pivot;
    sums.sum += sum + count * step;
    sums.square += square + step * (2 * sum + count * step);
}

struct GroupStatistics {
    double mean, rstd;
};

SPATIALFLOW_HOST_DEVICE GroupStatistics
group_statistics(const GroupSums& sums, double pivot, double count, double eps) {
    const double offset = sums.sum / count, variance = sums.square / count - offset * offset;
    return {pivot + offset, 1 / std::sqrt((variance < 0 ? 0 : variance) + eps)};  // NaN stays NaN
}

// Coefficients of y = (x - shift) * scale + offset for one channel.
template <typename real_t>
struct GroupAffine {
    real_t shift, scale, offset;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE GroupAffine<real_t> group_affine(
    const GroupStatistics& statistics, double weight, double bias) {
    const real_t shift = static_cast<real_t>(statistics.mean);
    const double scale = statistics.rstd * weight;
    return {
        shift, static_cast<real_t>(scale),
        static_cast<real_t>(bias - (statistics.mean - static_cast<double>(shift)) * scale)};
}

// Compute sum(g * (x - mean) * rstd) from `gradient` = sum(g) and `product` = sum(g * (x - shift)).
SPATIALFLOW_HOST_DEVICE double normalized_product(
    double gradient, double product, double shift, const GroupStatistics& statistics) {
    return (product - (statistics.mean - shift) * gradient) * statistics.rstd;
}

// Coefficients of the input gradient by_gradient * g + by_input * (x - shift) + constant for one channel. g is the
// gradient with respect to the input of ReLU.
template <typename real_t>
struct GroupGradient {
    real_t shift, by_gradient, by_input, constant;
};

// Compute the coefficients of `GroupGradient`. `mean_gradient` and `mean_product` are the means over the group of g *
// weight and of g * weight * (x - mean) * rstd.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE GroupGradient<real_t> group_gradient(
    const GroupStatistics& statistics, double weight, double mean_gradient, double mean_product) {
    const real_t shift = static_cast<real_t>(statistics.mean);
    const double by_input = -statistics.rstd * statistics.rstd * mean_product;
    return {
        shift, static_cast<real_t>(statistics.rstd * weight), static_cast<real_t>(by_input),
        static_cast<real_t>(
            -statistics.rstd * mean_gradient - by_input * (statistics.mean - static_cast<double>(shift)))};
}

// Linear interpolation of one result of an axis that is doubled with aligned corners. For `size` cells, result `index`
// lies at index * (size - 1) / (2 * size - 1), between the cells `low` and `high`.
template <typename real_t>
struct DoubledCell {
    int64_t low, high;
    real_t low_weight, high_weight;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE DoubledCell<real_t> doubled_cell(int64_t index, int64_t size) {
    const int64_t position = index * (size - 1), parts = 2 * size - 1, low = position / parts;
    const real_t weight = static_cast<real_t>(position - low * parts) / static_cast<real_t>(parts);
    return {low, low + 1 < size ? low + 1 : low, real_t(1) - weight, weight};
}

// Index of the first result whose `low` is at least `cell`. Cell i is read only by results from first_doubled(i - 1) up
// to, not including, first_doubled(i + 1).
SPATIALFLOW_HOST_DEVICE int64_t first_doubled(int64_t cell, int64_t size) {
    if (cell <= 0) {
        return 0;
    }
    return cell >= size ? 2 * size : (cell * (2 * size - 1) + size - 2) / (size - 1);
}

// Weight of `cell` in a result.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t weight_of_cell(const DoubledCell<real_t>& result, int64_t cell) {
    return (result.low == cell ? result.low_weight : real_t(0)) +
           (result.high == cell ? result.high_weight : real_t(0));
}

}  // namespace spatialflow
