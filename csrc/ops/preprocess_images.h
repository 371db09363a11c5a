// SPDX-License-Identifier: Apache-2.0
//
// preprocess_images: argument checks and the result, shared by all back ends. Schema in preprocess_images.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/preprocess_images.h"
#include "ops/tensor.h"

namespace spatialflow {

constexpr int64_t kMaxImageSide = int64_t(1) << 24;  // because positions in an image are float32

inline void check_preprocess_images(
    const std::vector<Tensor>& images, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
    const std::vector<double>& mean, const std::vector<double>& std, int64_t divisor, ScalarType dtype) {
    const char* op = "preprocess_images";
    check(!images.empty(), op, ": images must hold at least one image");
    check(
        heights.size() == images.size() && widths.size() == images.size(), op,
        ": sizes must hold one (H, W) for each of ", images.size(), " images, got ", heights.size());
    for (size_t n = 0; n < images.size(); ++n) {
        const Tensor& image = images[n];
        check(
            image.dim() == 3 && image.size(2) == 3 && image.numel() != 0, op, ": images[", n,
            "] must be (H, W, 3) with at least one pixel, got shape ", image);
        check_dtype(op, "images", image, ScalarType::Byte);
        check_same_device(op, "every image", image, "the first one", images[0]);
        check(
            image.size(0) <= kMaxImageSide && image.size(1) <= kMaxImageSide, op, ": images[", n,
            "] must have sides up to ", kMaxImageSide, ", got shape ", image);
        check(
            heights[n] >= 1 && widths[n] >= 1 && heights[n] <= kMaxImageSide && widths[n] <= kMaxImageSide, op,
            ": sizes[", n, "] must be from 1 to ", kMaxImageSide, ", got (", heights[n], ", ", widths[n], ")");
    }
    check(mean.size() == 3, op, ": mean must hold 3 numbers, got ", mean.size());
    check(std.size() == 3, op, ": std must hold 3 numbers, got ", std.size());
    for (int channel = 0; channel < 3; ++channel) {
        check(std::isfinite(mean[channel]), op, ": mean must be finite, got ", mean[channel]);
        check(
            std::isfinite(std[channel]) && std[channel] > 0.0, op, ": std must be positive and finite, got ",
            std[channel]);
    }
    check(
        divisor >= 1 && divisor <= kMaxImageSide, op, ": divisor must be from 1 to ", kMaxImageSide, ", got ", divisor);
    check(
        dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
        ": dtype must be float32, float16 or bfloat16, got ", dtype_name(dtype));
}

// Allocate the batch: channels-last, with the size of the largest image rounded up to multiples of `divisor`.
inline Tensor empty_image_batch(
    const std::vector<Tensor>& images, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
    int64_t divisor, ScalarType dtype) {
    const auto padded = [divisor](const std::vector<int64_t>& sides) {
        return (*std::max_element(sides.begin(), sides.end()) + divisor - 1) / divisor * divisor;
    };
    return empty_like_sized(
        images[0], {static_cast<int64_t>(images.size()), 3, padded(heights), padded(widths)}, dtype,
        MemoryFormat::ChannelsLast);
}

// Normalization of the red, green and blue channel.
struct ImageNormalization {
    Normalization channels[3];
};

inline ImageNormalization image_normalization(const std::vector<double>& mean, const std::vector<double>& std) {
    ImageNormalization result;
    for (int channel = 0; channel < 3; ++channel) {
        result.channels[channel] = {static_cast<float>(mean[channel]), 1.0 / std[channel]};
    }
    return result;
}

// Call body(scalar_t{}) with the type of the result; `dtype` has been checked.
template <typename float16_t, typename bfloat16_t, typename Body>
inline void dispatch_image_dtype(ScalarType dtype, Body&& body) {
    switch (dtype) {
        case ScalarType::Half:
            return body(float16_t{});
        case ScalarType::BFloat16:
            return body(bfloat16_t{});
        default:
            return body(float{});
    }
}

}  // namespace spatialflow
