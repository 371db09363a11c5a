// SPDX-License-Identifier: Apache-2.0
//
// Resizing, normalization and padding of 8-bit images in one pass on the CPU:
//
//   output[n, y, x, c] = (resized(images[n])[y, x, 2 - c] - mean[c]) / std[c], zeros right of and below the image
//
// A task resizes a source row along x once, for all elements (pixel, channel) of a row of the result. The first and the
// last of 4 adjacent bytes are the values of one channel in two adjacent pixels, so one gather loads both. Two resized
// rows stay in the cache. They are interpolated, normalized and stored in blocks of 3 vectors, so a lane has the same
// channel in every block. Tasks are ranges of the rows of all images.
#include <array>
#include <cstring>

#include "common/preprocess_images.h"
#include "cpu/dispatch.h"
#include "cpu/row_pair.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "ops/preprocess_images.h"

namespace spatialflow {
namespace {

using IntVector = Vector<int32_t>;
constexpr int kVectorLanes = kLanes<float>;
constexpr int64_t kBlock = 3 * kVectorLanes;  // elements of three vectors

// Load four bytes from every offset.
inline IntVector gather_bytes(const uint8_t* source, const int32_t* offsets) {
    IntVector at;
    std::memcpy(&at, offsets, sizeof(at));
#if defined(__AVX512F__)
    return bit_cast<IntVector>(_mm512_i32gather_epi32(bit_cast<__m512i>(at), source, 1));
#elif defined(__AVX2__)
    return bit_cast<IntVector>(_mm256_i32gather_epi32(reinterpret_cast<const int*>(source), bit_cast<__m256i>(at), 1));
#else
    IntVector words;
    for (int lane = 0; lane < kVectorLanes; ++lane) {
        int32_t word;
        std::memcpy(&word, source + at[lane], sizeof(word));
        words[lane] = word;
    }
    return words;
#endif
}

// Source offsets and weights of the elements of a result row, common to all rows of an image.
struct ImagePlan {
    ImageResize resize;
    const uint8_t* pixels;
    int64_t elements;                                       // per row of the result
    Scratch<int32_t> offsets, left_weights, right_weights;  // padded to a multiple of kBlock

    ImagePlan(const Tensor& image, int64_t height, int64_t width)
        : resize(image_resize(image.size(0), image.size(1), height, width)),
          pixels(data<uint8_t>(image)),
          elements(3 * width),
          offsets(padded()),
          left_weights(padded()),
          right_weights(padded()) {
        for (int64_t x = 0; x < width; ++x) {
            ResizeTap tap = resize_tap(x, resize.x, resize.halves);
            if (tap.first == tap.second) {
                // At an edge, give one pixel the whole weight and keep the two pixels adjacent.
                const int all = tap.first_weight + tap.second_weight;
                const bool is_right = tap.first > 0;
                tap = {tap.first - is_right, tap.first, is_right ? 0 : all, is_right ? all : 0};
            }
            for (int64_t channel = 0; channel < 3; ++channel) {
                const int64_t element = 3 * x + channel;
                offsets.get()[element] = static_cast<int32_t>(3 * tap.first + 2 - channel);
                left_weights.get()[element] = tap.first_weight;
                right_weights.get()[element] = tap.second_weight;
            }
        }
        for (int64_t element = elements; element < padded(); ++element) {
            offsets.get()[element] = left_weights.get()[element] = right_weights.get()[element] = 0;
        }
    }

    int64_t padded() const { return (elements + kBlock - 1) / kBlock * kBlock; }
};

// Resize row `y` of the source along x.
void resize_row(const ImagePlan& plan, int64_t y, int32_t* row) {
    const uint8_t* source = plan.pixels + y * 3 * plan.resize.x.source;
    uint8_t narrow[6] = {};
    if (plan.resize.x.source == 1) {  // the right pixel does not exist
        std::memcpy(narrow, source, 3);
        source = narrow;
    }
    for (int64_t element = 0; element < plan.padded(); element += kVectorLanes) {
        const IntVector bytes = gather_bytes(source, plan.offsets.get() + element);
        IntVector left_weight, right_weight;
        std::memcpy(&left_weight, plan.left_weights.get() + element, sizeof(IntVector));
        std::memcpy(&right_weight, plan.right_weights.get() + element, sizeof(IntVector));
        const IntVector sum =
            resize_columns<IntVector>(bytes & 0xff, bytes >> 24 & 0xff, left_weight, right_weight, plan.resize.halves);
        std::memcpy(row + element, &sum, sizeof(IntVector));
    }
}

// Normalization (value - mean) * factor of vectors, with the product in double. The channels of lanes repeat every
// three vectors.
class BlockNormalization {
public:
    explicit BlockNormalization(const ImageNormalization& normalization) {
        for (int64_t element = 0; element < kBlock; ++element) {
            const Normalization& channel = normalization.channels[element % 3];
            means_[element] = channel.mean;
            factors_[element] = channel.factor;
        }
    }

    Vector<float> operator()(IntVector values, int part) const {
        const Vector<float> centered =
            __builtin_convertvector(values, Vector<float>) - load_vector(means_.data() + part * kVectorLanes);
        float lanes[kVectorLanes];
        store_vector(lanes, centered);
        for (int lane = 0; lane < kVectorLanes; ++lane) {
            lanes[lane] = static_cast<float>(static_cast<double>(lanes[lane]) * factors_[part * kVectorLanes + lane]);
        }
        return load_vector(lanes);
    }

private:
    std::array<float, kBlock> means_;
    std::array<double, kBlock> factors_;
};

// Interpolate between two resized rows of the source and normalize the result.
template <typename scalar_t>
void write_row(
    const ImagePlan& plan, const BlockNormalization& normalization, const ResizeTap& tap, const int32_t* upper,
    const int32_t* lower, scalar_t* output) {
    for (int64_t block = 0; block < plan.elements; block += kBlock) {
        for (int part = 0; part < 3; ++part) {
            const int64_t element = block + part * kVectorLanes;
            IntVector above, below;
            std::memcpy(&above, upper + element, sizeof(IntVector));
            std::memcpy(&below, lower + element, sizeof(IntVector));
            const Vector<float> values =
                normalization(resize_rows(above, below, tap.first_weight, tap.second_weight, plan.resize.halves), part);
            const int64_t rest = plan.elements - element;
            if (rest >= kVectorLanes) {
                store_vector(output + element, values);
            } else if (rest > 0) {
                store_partial(output + element, values, static_cast<int>(rest));
            }
        }
    }
}

template <typename scalar_t>
void write_images(
    const std::vector<ImagePlan>& plans, const ImageNormalization& channels, int64_t height, int64_t width,
    scalar_t* output) {  // (N, height, width, 3)
    const BlockNormalization normalization(channels);
    int64_t longest = 0;
    for (const ImagePlan& plan : plans) {
        longest = std::max(longest, plan.padded());
    }
    const int64_t row_elements = 3 * width, rows = static_cast<int64_t>(plans.size()) * height;
    const int64_t grain = std::max<int64_t>(1, 16384 / row_elements);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        const Scratch<int32_t> memory(2 * longest);
        RowPair<int32_t> resized(memory.get(), longest);  // rows of image `current`, resized along x
        for (int64_t row = begin, current = -1; row < end; ++row) {
            const int64_t n = row / height, y = row % height;
            const ImagePlan& plan = plans[n];
            scalar_t* target = output + row * row_elements;
            int64_t written = 0;
            if (n != current) {
                current = n;
                resized.clear();
            }
            if (y < plan.resize.y.target) {
                const ResizeTap tap = resize_tap(y, plan.resize.y, plan.resize.halves);
                const auto resize = [&](int64_t index, int32_t* values) { resize_row(plan, index, values); };
                const int32_t* upper = resized.row(tap.first, resize);
                const int32_t* lower = resized.row(tap.second, resize);
                write_row(plan, normalization, tap, upper, lower, target);
                written = plan.elements;
            }
            std::memset(static_cast<void*>(target + written), 0, sizeof(scalar_t) * (row_elements - written));
        }
    });
}

Tensor preprocess_images_cpu(
    const std::vector<Tensor>& images, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
    const std::vector<double>& mean, const std::vector<double>& std, int64_t divisor, ScalarType dtype) {
    check_preprocess_images(images, heights, widths, mean, std, divisor, dtype);
    Tensor output = empty_image_batch(images, heights, widths, divisor, dtype);
    std::vector<Tensor> sources;
    std::vector<ImagePlan> plans;
    for (size_t n = 0; n < images.size(); ++n) {
        sources.push_back(to_contiguous(images[n]));
        plans.emplace_back(sources.back(), heights[n], widths[n]);
    }
    dispatch_image_dtype<float16, bfloat16>(dtype, [&](auto zero) {
        write_images(
            plans, image_normalization(mean, std), output.size(2), output.size(3),
            mutable_data<decltype(zero)>(output));
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("preprocess_images", TORCH_BOX(&spatialflow::preprocess_images_cpu));
}
