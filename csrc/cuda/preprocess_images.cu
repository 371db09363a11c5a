// SPDX-License-Identifier: Apache-2.0
//
// Resize, normalize and pad 8-bit images on CUDA, in one launch for every 16 images:
//
//   output[n, y, x, c] = (resized(images[n])[y, x, 2 - c] - mean[c]) / std[c], zeros right of and below the image
//
// Images (H, W, 3) of any sizes, output channels-last. A thread computes adjacent pixels of a row, 4 in float32 or 8 in
// a 16-bit type. It stores their 48 bytes in three 16-byte accesses if is_vectorizable, else value by value. Source
// bytes are read one by one; adjacent threads share cache lines in L1. blockIdx.y is the image. Without fused
// multiply-adds, the result is equal to that of the CPU bit for bit.
#include "common/preprocess_images.h"

#include "cuda/launch.h"
#include "ops/preprocess_images.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 128;
constexpr int kImagesPerLaunch = 16;

struct SourceImage {
    Global<const uint8_t> pixels;  // (H, W, 3)
    ImageResize resize;
};

struct SourceImages {
    SourceImage images[kImagesPerLaunch];
};

struct ImageBatch {
    int64_t height, width;  // padded
    bool is_vectorizable;   // rows consist of whole, aligned groups of pixels
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) preprocess_images_kernel(
    const __grid_constant__ SourceImages sources, Global<scalar_t> output,  // (images, height, width, 3)
    const ImageBatch batch, const ImageNormalization normalization) {
    constexpr int kPixels = kVectorElements<scalar_t>;
    const int64_t groups = (batch.width + kPixels - 1) / kPixels;  // of pixels in a row
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (index >= batch.height * groups) {
        return;
    }
    const SourceImage& image = sources.images[blockIdx.y];
    const ImageResize& resize = image.resize;
    const int64_t y = index / groups, first_x = index % groups * kPixels;
    Vec<scalar_t, kPixels> values[3];
#pragma unroll
    for (int i = 0; i < 3 * kPixels; ++i) {
        store(values[i / kPixels][i % kPixels], 0.0f);
    }
    if (y < resize.y.target) {
        const ResizeTap rows = resize_tap(y, resize.y, resize.halves);
        const Global<const uint8_t> upper = image.pixels + rows.first * resize.x.source * 3;
        const Global<const uint8_t> lower = image.pixels + rows.second * resize.x.source * 3;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
            if (first_x + p >= resize.x.target) {
                break;
            }
            const ResizeTap columns = resize_tap(first_x + p, resize.x, resize.halves);
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                const int64_t left = columns.first * 3 + 2 - c, right = columns.second * 3 + 2 - c;
                const int above = resize_columns<int>(
                    upper[left], upper[right], columns.first_weight, columns.second_weight, resize.halves);
                const int below = resize_columns<int>(
                    lower[left], lower[right], columns.first_weight, columns.second_weight, resize.halves);
                const int value = resize_rows(above, below, rows.first_weight, rows.second_weight, resize.halves);
                const int i = 3 * p + c;
                store(values[i / kPixels][i % kPixels], normalize(value, normalization.channels[c]));
            }
        }
    }
    const int64_t row = static_cast<int64_t>(blockIdx.y) * batch.height + y;
    Global<scalar_t> target = output + (row * batch.width + first_x) * 3;
    if (batch.is_vectorizable) {
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            store_vector(target + part * kPixels, values[part]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 3 * kPixels; ++i) {
            if (first_x + i / 3 < batch.width) {
                target[i] = values[i / kPixels][i % kPixels];
            }
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

Tensor preprocess_images_cuda(
    const std::vector<Tensor>& images, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
    const std::vector<double>& mean, const std::vector<double>& std, int64_t divisor, ScalarType dtype) {
    check_preprocess_images(images, heights, widths, mean, std, divisor, dtype);
    const DeviceScope device(images[0]);
    Tensor output = empty_image_batch(images, heights, widths, divisor, dtype);
    const int64_t count = output.size(0), height = output.size(2), width = output.size(3);
    const ImageNormalization normalization = image_normalization(mean, std);
    dispatch_image_dtype<float16, bfloat16>(dtype, [&](auto zero) {
        using scalar_t = decltype(zero);
        constexpr int kPixels = kVectorElements<scalar_t>;
        const ImageBatch batch{height, width, width % kPixels == 0};
        const unsigned blocks = grid_size("preprocess_images", ceil_div(height * ceil_div(width, kPixels), kThreads));
        for (int64_t first = 0; first < count; first += kImagesPerLaunch) {
            SourceImages sources{};
            std::vector<Tensor> contiguous;
            int64_t launch_images = 0;
            for (; launch_images < kImagesPerLaunch && first + launch_images < count; ++launch_images) {
                const size_t n = static_cast<size_t>(first + launch_images);
                contiguous.push_back(to_contiguous(images[n]));
                sources.images[launch_images] = {
                    data<uint8_t>(contiguous.back()),
                    image_resize(images[n].size(0), images[n].size(1), heights[n], widths[n])};
            }
            launch<preprocess_images_kernel<scalar_t>>(
                dim3(blocks, static_cast<unsigned>(launch_images)), dim3(kThreads), 0, device.stream(), sources,
                mutable_data<scalar_t>(output) + first * height * width * 3, batch, normalization);
        }
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("preprocess_images", TORCH_BOX(&spatialflow::preprocess_images_cuda)); }
