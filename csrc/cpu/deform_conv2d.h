// SPDX-License-Identifier: Apache-2.0
//
// Sampling for deformable convolution on the CPU, shared by the forward and the backward kernels. A `Sampler` computes
// the sampling position of a tap and the samples of its channels.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/deform_conv2d.h"
#include "common/sigmoid.h"
#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "ops/deform_conv2d.h"

namespace spatialflow {

// View of a 4-D tensor with any strides.
template <typename value_t>
struct View4 {
    const value_t* data = nullptr;
    int64_t stride[4] = {};

    View4() = default;
    explicit View4(const Tensor& tensor) : data(spatialflow::data<value_t>(tensor)) {
        for (int d = 0; d < 4; ++d) {
            stride[d] = stride_of(tensor, d);
        }
    }
    const value_t& at(int64_t n, int64_t c, int64_t y, int64_t x) const {
        return data[n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]];
    }
};

struct OutputPixel {
    int64_t image, y, x;
};

// Pixel with a row-major index over all images.
inline OutputPixel output_pixel(const DeformConvShape& shape, int64_t index) {
    const int64_t pixel = index % shape.pixels();
    return {index / shape.pixels(), pixel / shape.out_width, pixel % shape.out_width};
}

// Compute target[c] = sum over i of weight[i] * corner[i][c], for kVectors vectors of channels from `c` on.
template <int kVectors, typename scalar_t, typename real_t>
inline void gather_vectors(const scalar_t* const corner[4], const real_t weight[4], int64_t c, real_t* target) {
    Vector<real_t> sum[kVectors] = {};
    for (int i = 0; i < 4; ++i) {
        const Vector<real_t> factor = broadcast(weight[i]);
        for (int v = 0; v < kVectors; ++v) {
            sum[v] += factor * load_vector(corner[i] + c + v * kLanes<real_t>);
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        store_vector(target + c + v * kLanes<real_t>, sum[v]);
    }
}

template <typename scalar_t, typename real_t>
inline void gather_channels(const scalar_t* const corner[4], const real_t weight[4], int64_t count, real_t* target) {
    constexpr int kWide = 4;
    int64_t c = 0;
    for (; c + kWide * kLanes<real_t> <= count; c += kWide * kLanes<real_t>) {
        gather_vectors<kWide>(corner, weight, c, target);
    }
    for (; c + kLanes<real_t> <= count; c += kLanes<real_t>) {
        gather_vectors<1>(corner, weight, c, target);
    }
    if (c < count) {
        const int rest = static_cast<int>(count - c);
        Vector<real_t> sum = {};
        for (int i = 0; i < 4; ++i) {
            sum += broadcast(weight[i]) * load_partial(corner[i] + c, rest);
        }
        store_partial(target + c, sum, rest);
    }
}

template <typename scalar_t>
class Sampler {
public:
    using real_t = accum_t<scalar_t>;

    // One tap of one pixel: the cells of its sample and their weights.
    struct Tap {
        DeformTap<real_t> position;
        const scalar_t* corner[4];  // channels of the four cells; `zeros_` for a cell outside the map
        int64_t cell[4];            // row-major index of the four cells in the image, or -1
        real_t value[4];
        real_t mask;
    };

    Sampler(
        const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input, const Tensor& offset,
        const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent)
        : shape_(shape),
          options_(options),
          zeros_(static_cast<size_t>(shape.channels) + kLanes<real_t>),
          feature_(channels_adjacent(input)),
          offset_tensor_(as_dtype(offset, accum_dtype(input.scalar_type()))),
          input_(feature_),
          offset_(offset_tensor_) {
        if (mask) {
            mask_tensor_ = as_dtype(*mask, accum_dtype(input.scalar_type()));
            mask_ = View4<real_t>(*mask_tensor_);
        }
        if (offset_tangent) {
            tangent_tensor_ = as_dtype(*offset_tangent, accum_dtype(input.scalar_type()));
            tangent_ = View4<real_t>(*tangent_tensor_);
        }
    }

    // Compute a tap. Return false if it reads nothing: its position is outside [-1, height) x [-1, width) or NaN, or
    // its mask is not finite.
    bool tap(const OutputPixel& pixel, int64_t offset_group, int64_t tap_index, Tap& tap) const {
        const int64_t index = offset_group * shape_.taps() + tap_index;
        const int64_t row = tap_index / shape_.kernel_width, column = tap_index % shape_.kernel_width;
        const real_t y = real_t(pixel.y * options_.stride[0] - options_.padding[0] + row * options_.dilation[0]) +
                         offset_.at(pixel.image, 2 * index, pixel.y, pixel.x);
        const real_t x = real_t(pixel.x * options_.stride[1] - options_.padding[1] + column * options_.dilation[1]) +
                         offset_.at(pixel.image, 2 * index + 1, pixel.y, pixel.x);
        tap.mask = mask_.data ? mask_.at(pixel.image, index, pixel.y, pixel.x) : real_t(1);
        if (options_.mask_sigmoid && mask_.data) {
            tap.mask = sigmoid<real_t, ScalarMath>(tap.mask);
        }
        if (!deform_tap(y, x, shape_.height, shape_.width, tap.position) || !(tap.mask - tap.mask == real_t(0))) {
            return false;
        }
        const scalar_t* image = input_.data + pixel.image * input_.stride[0];
        for (int i = 0; i < 4; ++i) {
            tap.cell[i] = deform_corner(tap.position, i, shape_.height, shape_.width);
            tap.corner[i] = tap.cell[i] < 0 ? zeros_.data()
                                            : image + (tap.position.y + (i >> 1)) * input_.stride[2] +
                                                  (tap.position.x + (i & 1)) * input_.stride[3];
        }
        if (tangent_.data) {
            deform_tangent_values(
                tap.position, tangent_.at(pixel.image, 2 * index, pixel.y, pixel.x),
                tangent_.at(pixel.image, 2 * index + 1, pixel.y, pixel.x), tap.value);
        } else {
            deform_values(tap.position, tap.value);
        }
        return true;
    }

    // Compute the derivatives of the tap's values with respect to its offset.
    void slopes(
        const OutputPixel& pixel, int64_t offset_group, int64_t tap_index, const Tap& tap, real_t slope_y[4],
        real_t slope_x[4]) const {
        if (tangent_.data) {
            const int64_t index = 2 * (offset_group * shape_.taps() + tap_index);
            deform_tangent_slopes(
                tangent_.at(pixel.image, index, pixel.y, pixel.x),
                tangent_.at(pixel.image, index + 1, pixel.y, pixel.x), slope_y, slope_x);
        } else {
            deform_slopes(tap.position, slope_y, slope_x);
        }
    }

    // target[c - c_begin] = mask * sample, for channels [c_begin, c_end) of one tap of one pixel.
    void gather(const OutputPixel& pixel, int64_t tap_index, int64_t c_begin, int64_t c_end, real_t* target) const {
        const int64_t group_channels = shape_.offset_group_channels();
        for (int64_t c = c_begin; c < c_end;) {
            const int64_t group = c / group_channels;
            const int64_t count = std::min(c_end, (group + 1) * group_channels) - c;
            Tap tap;
            if (this->tap(pixel, group, tap_index, tap)) {
                const scalar_t* corner[4];
                real_t weight[4];
                for (int i = 0; i < 4; ++i) {
                    corner[i] = tap.corner[i] + c;
                    weight[i] = tap.mask * tap.value[i];
                }
                gather_channels(corner, weight, count, target + (c - c_begin));
            } else {
                std::memset(target + (c - c_begin), 0, sizeof(real_t) * static_cast<size_t>(count));
            }
            c += count;
        }
    }

    const DeformConvShape& shape() const { return shape_; }

private:
    DeformConvShape shape_;
    DeformConvOptions options_;
    std::vector<scalar_t> zeros_;
    Tensor feature_, offset_tensor_;
    std::optional<Tensor> mask_tensor_, tangent_tensor_;
    View4<scalar_t> input_;
    View4<real_t> offset_, mask_, tangent_;
};

}  // namespace spatialflow
