// SPDX-License-Identifier: Apache-2.0
//
// Helpers of group_norm_relu on the CPU, forward and backward: maps, blocks of pixels, vectors of channels, and values
// per channel.
//
// The size of a block depends only on the shape, and the sums of blocks are added in order. Therefore results do not
// depend on the number of threads.
#pragma once

#include "ops/group_norm_relu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/group_norm_relu.h"
#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace spatialflow {

constexpr int64_t kBlockPixels = 256;
constexpr int kUnroll = 4;  // vectors of channels at a time

struct NormShape {
    int64_t batch, channels, height, width, groups;

    int64_t pixels() const { return height * width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t group_size() const { return group_channels() * pixels(); }
};

// Map (N, H, W, C) with adjacent channels, given by strides.
template <typename scalar_t>
struct NormMap {
    scalar_t* data;
    int64_t image_stride, row_stride, pixel_stride;

    scalar_t* row(int64_t image, int64_t y) const { return data + image * image_stride + y * row_stride; }
    bool has_adjacent_rows(const NormShape& shape) const {
        return shape.height == 1 || row_stride == shape.width * pixel_stride;
    }
};

template <typename scalar_t>
NormMap<const scalar_t> map_of(const Tensor& tensor) {
    const int64_t pixel_dimension = tensor.size(3) > 1 ? 3 : 2;  // with one column, the next pixel is in the next row
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, pixel_dimension)};
}

template <typename scalar_t>
NormMap<scalar_t> dense_map(scalar_t* data, int64_t channels, int64_t height, int64_t width) {
    return {data, height * width * channels, width * channels, channels};
}

// Blocks of the pixels or rows of every image.
struct NormBlocks {
    int64_t count, extent;  // blocks per image; size of a block

    NormBlocks(int64_t size, int64_t extent) : count((size + extent - 1) / extent), extent(extent) {}

    // Call body(image, begin, end, index of the block) on all threads.
    template <typename Body>
    void for_each(const NormShape& shape, int64_t size, const Body& body) const {
        parallel_for(0, shape.batch * count, 1, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t begin = block % count * extent;
                body(block / count, begin, std::min(size, begin + extent), block);
            }
        });
    }
};

// Divide pixels [begin, end) of an image into runs of at most kGroupNormRun pixels of a row, and call run(y, x, count)
// for each. If all maps have adjacent rows, the image is treated as one row.
template <typename Run>
inline void for_runs(const NormShape& shape, bool adjacent_rows, int64_t begin, int64_t end, const Run& run) {
    const int64_t width = adjacent_rows ? shape.pixels() : shape.width;
    while (begin < end) {
        const int64_t x = begin % width, count = std::min({kGroupNormRun, width - x, end - begin});
        run(begin / width, x, count);
        begin += count;
    }
}

// Access to kVectors whole vectors of channels, or, if kRest, to the first `count` lanes of one vector.
template <int kVectors, bool kRest>
struct Channels {
    static constexpr int vectors = kVectors;
    int count;

    template <typename scalar_t>
    Vector<accum_t<scalar_t>> load(const scalar_t* source) const {
        if constexpr (kRest) {
            return load_partial(source, count);
        } else {
            return load_vector(source);
        }
    }
    template <typename scalar_t>
    void store(scalar_t* target, Vector<accum_t<scalar_t>> value) const {
        if constexpr (kRest) {
            store_partial(target, value, count);
        } else {
            store_vector(target, value);
        }
    }
};

// Call visit(channels, first channel) for kUnroll vectors at a time, then for single vectors, then for the remaining
// channels.
template <typename real_t, typename Visit>
inline void for_channels(int64_t channels, const Visit& visit) {
    int64_t c = 0;
    for (; c + kUnroll * kLanes<real_t> <= channels; c += kUnroll * kLanes<real_t>) {
        visit(Channels<kUnroll, false>{}, c);
    }
    for (; c + kLanes<real_t> <= channels; c += kLanes<real_t>) {
        visit(Channels<1, false>{}, c);
    }
    if (c < channels) {
        visit(Channels<1, true>{static_cast<int>(channels - c)}, c);
    }
}

// Padded number of channels, so that values per channel are accessed in whole vectors.
inline int64_t padded(int64_t channels) { return (channels + 63) / 64 * 64; }

// One value per channel, padded to whole vectors.
template <typename real_t>
using PerChannel = std::vector<real_t>;

// Coefficients of y = (x - shift) * scale + offset per channel of one image.
template <typename real_t>
struct Affine {
    PerChannel<real_t> shift, scale, offset;

    Affine(const NormShape& shape, const double* statistics, const double* weight, const double* bias)
        : shift(padded(shape.channels)), scale(shift.size()), offset(shift.size()) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const double* group = statistics + c / shape.group_channels() * 2;
            const GroupAffine<real_t> affine = group_affine<real_t>({group[0], group[1]}, weight[c], bias[c]);
            shift[c] = affine.shift;
            scale[c] = affine.scale;
            offset[c] = affine.offset;
        }
    }
};

// Load kVectors vectors of values per channel, starting at channel c.
template <int kVectors, typename real_t>
inline void load_channels(const PerChannel<real_t>& numbers, int64_t c, Vector<real_t> (&vectors)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
        vectors[v] = load_vector(&numbers[c + v * kLanes<real_t>]);
    }
}

template <int kVectors, typename real_t>
struct AffineVectors {
    Vector<real_t> shift[kVectors], scale[kVectors], offset[kVectors];

    AffineVectors(const Affine<real_t>& affine, int64_t c) {
        load_channels(affine.shift, c, shift);
        load_channels(affine.scale, c, scale);
        load_channels(affine.offset, c, offset);
    }
    Vector<real_t> apply(int v, Vector<real_t> x) const { return (x - shift[v]) * scale[v] + offset[v]; }
};

template <typename real_t>
std::vector<Affine<real_t>> affine_of_images(
    const NormShape& shape, const double* statistics, const double* weight, const double* bias) {
    std::vector<Affine<real_t>> affine;
    for (int64_t image = 0; image < shape.batch; ++image) {
        affine.emplace_back(shape, statistics + image * shape.groups * 2, weight, bias);
    }
    return affine;
}

// Lanes of kVectors vectors as an array, for loops that add them to float64 sums.
template <int kVectors, typename real_t>
struct LanesOf {
    static constexpr int count = kVectors * kLanes<real_t>;
    real_t values[count];

    explicit LanesOf(const Vector<real_t> (&vectors)[kVectors]) { std::memcpy(values, vectors, sizeof(values)); }
};

// Two float64 sums per channel and block.
class SumsOfBlocks {
public:
    SumsOfBlocks(const NormShape& shape, const NormBlocks& blocks)
        : stride_(padded(shape.channels)), sums_(static_cast<size_t>(shape.batch * blocks.count * 2 * stride_)) {}

    double* first(int64_t block) { return &sums_[block * 2 * stride_]; }
    double* second(int64_t block) { return first(block) + stride_; }

private:
    int64_t stride_;
    std::vector<double> sums_;
};

template <typename real_t>
std::vector<DoubledCell<real_t>> doubled_axis(int64_t size) {
    std::vector<DoubledCell<real_t>> cells;
    for (int64_t i = 0; i < 2 * size; ++i) {
        cells.push_back(doubled_cell<real_t>(i, size));
    }
    return cells;
}

inline NormShape shape_of(const Tensor& input, int64_t num_groups) {
    return {input.size(0), input.size(1), input.size(2), input.size(3), num_groups};
}

// Values of weight or bias in float64. If the tensor is absent, each channel has the value `fill`.
inline std::vector<double> float64_values(const std::optional<Tensor>& tensor, int64_t channels, double fill) {
    std::vector<double> numbers(static_cast<size_t>(channels), fill);
    if (tensor) {
        dispatch_floating("group_norm_relu", tensor->scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            const scalar_t* source = data<scalar_t>(*tensor);
            for (int64_t c = 0; c < channels; ++c) {
                numbers[c] = load(source[c * stride_of(*tensor, 0)]);
            }
        });
    }
    return numbers;
}

}  // namespace spatialflow
