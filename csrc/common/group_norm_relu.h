// SPDX-License-Identifier: Apache-2.0
//
// Mathematics of group_norm_relu that CPU and CUDA share.
//
//   y = relu((x - mean) * rstd * weight + bias)
//
// The float64 mean is split into a number of the compute type (`shift`) and a remainder. x - shift is exact where x is
// near the mean, however large both are.
//
// Sums of squares are taken around a value of the data, the pivot. Around one of n numbers the sum of squares is at
// most n times the sum around their mean. So the subtraction that follows loses a factor of n at most.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// Largest count of numbers that is summed in the compute type; sums of more numbers are in float64.
constexpr int64_t kGroupNormRun = 64;

// sum(x - pivot) and sum((x - pivot)^2) of numbers x; the pivot is one of the numbers.
struct GroupSums {
    double sum, square;
};

// Adds `count` numbers of which the sums around `own_pivot` are `sum` and `square`.
SPATIALFLOW_HOST_DEVICE void add_run(
    GroupSums& sums, double pivot, double own_pivot, double count, double sum, double square) {
    const double step = own_pivot - pivot;
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

// y = (x - shift) * scale + offset, of one channel.
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

// sum(g * (x - mean) * rstd) from sum(g) and sum(g * (x - shift)).
SPATIALFLOW_HOST_DEVICE double normalized_product(
    double gradient, double product, double shift, const GroupStatistics& statistics) {
    return (product - (statistics.mean - shift) * gradient) * statistics.rstd;
}

// Gradient by the input: by_gradient * g + by_input * (x - shift) + constant, with g the gradient by what ReLU takes.
template <typename real_t>
struct GroupGradient {
    real_t shift, by_gradient, by_input, constant;
};

// `mean_gradient` and `mean_product`: means over the group of g * weight and g * weight * (x - mean) * rstd.
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

// Doubling an axis of `size` cells with aligned corners: result `index` lies at index * (size - 1) / (2 * size - 1),
// between the cells `low` and `high`.
template <typename real_t>
struct DoubledCell {
    int64_t low, high;
    real_t low_weight, high_weight;
};

template <typename real_t>
SPATIALFLOW_HOST_DEVICE DoubledCell<real_t> doubled_cell(int64_t index, int64_t size) {
    const int64_t place = index * (size - 1), parts = 2 * size - 1, low = place / parts;
    const real_t weight = static_cast<real_t>(place - low * parts) / static_cast<real_t>(parts);
    return {low, low + 1 < size ? low + 1 : low, real_t(1) - weight, weight};
}

// The first result whose `low` is `cell` or more. Cell i is read by those from that of i - 1 to that of i + 1.
SPATIALFLOW_HOST_DEVICE int64_t first_doubled(int64_t cell, int64_t size) {
    if (cell <= 0) {
        return 0;
    }
    return cell >= size ? 2 * size : (cell * (2 * size - 1) + size - 2) / (size - 1);
}

// The weight of `cell` in a result.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t weight_of_cell(const DoubledCell<real_t>& result, int64_t cell) {
    return (result.low == cell ? result.low_weight : real_t(0)) +
           (result.high == cell ? result.high_weight : real_t(0));
}

}  // namespace spatialflow
