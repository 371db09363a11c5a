// SPDX-License-Identifier: Apache-2.0
//
// GroupNorm, ReLU and optional 2x upsampling on the CPU, channels-last: vectors of channels, blocks of pixels or rows.
//
// Forward reads the input twice: once for the statistics, once to normalize and write. Upsampling keeps two normalized
// rows in the cache and interpolates along rows in registers. Backward: one pass for the gradient by what ReLU takes
// and its sums by channel, one for the gradient by the input. Upsampling's transpose gathers, so nothing is added
// twice.
//
// Threads take blocks whose size depends on the shape alone. Each gives one row of sums, and rows are added in order:
// results do not depend on the number of threads.
#include "ops/group_norm_relu.h"

#include <algorithm>
#include <vector>

#include "common/group_norm_relu.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace spatialflow {
namespace {

constexpr int64_t kBlockPixels = 256;
constexpr int kWide = 4;  // vectors of channels at a time

struct Shape {
    int64_t batch, channels, height, width, groups;

    int64_t pixels() const { return height * width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t group_size() const { return group_channels() * pixels(); }
};

// (N, H, W, C) by strides, C adjacent.
template <typename scalar_t>
struct Map {
    scalar_t* data;
    int64_t image_stride, row_stride, pixel_stride;

    scalar_t* row(int64_t image, int64_t y) const { return data + image * image_stride + y * row_stride; }
    bool has_adjacent_rows(const Shape& shape) const {
        return shape.height == 1 || row_stride == shape.width * pixel_stride;
    }
};

template <typename scalar_t>
Map<const scalar_t> map_of(const Tensor& tensor) {
    const int64_t pixel_dimension = tensor.size(3) > 1 ? 3 : 2;  // of one column: from row to row
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, pixel_dimension)};
}

template <typename scalar_t>
Map<scalar_t> dense_map(scalar_t* data, int64_t channels, int64_t height, int64_t width) {
    return {data, height * width * channels, width * channels, channels};
}

// The pixels, or rows, of every image in blocks, whose sums are added in order.
struct Blocks {
    int64_t count, extent;  // of an image; of a block

    Blocks(int64_t size, int64_t extent) : count((size + extent - 1) / extent), extent(extent) {}

    // body(image, begin, end, number of the block) on all threads.
    template <typename Body>
    void for_each(const Shape& shape, int64_t size, const Body& body) const {
        parallel_for(0, shape.batch * count, 1, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t begin = block % count * extent;
                body(block / count, begin, std::min(size, begin + extent), block);
            }
        });
    }
};

// Pixels [begin, end) of an image as runs along rows, at most kGroupNormRun long: run(y, x, count). Where all maps have
// adjacent rows the image is one row.
template <typename Run>
inline void for_runs(const Shape& shape, bool adjacent_rows, int64_t begin, int64_t end, const Run& run) {
    const int64_t width = adjacent_rows ? shape.pixels() : shape.width;
    while (begin < end) {
        const int64_t x = begin % width, count = std::min({kGroupNormRun, width - x, end - begin});
        run(begin / width, x, count);
        begin += count;
    }
}

// kVectors whole vectors of channels, or where kRest one vector of which `count` lanes are channels.
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

// visit(channels, first channel): kWide vectors at a time, then one, then what is left.
template <typename real_t, typename Visit>
inline void for_channels(int64_t channels, const Visit& visit) {
    int64_t c = 0;
    for (; c + kWide * kLanes<real_t> <= channels; c += kWide * kLanes<real_t>) {
        visit(Channels<kWide, false>{}, c);
    }
    for (; c + kLanes<real_t> <= channels; c += kLanes<real_t>) {
        visit(Channels<1, false>{}, c);
    }
    if (c < channels) {
        visit(Channels<1, true>{static_cast<int>(channels - c)}, c);
    }
}

// Numbers by channel are read and written in whole vectors.
inline int64_t padded(int64_t channels) { return (channels + 63) / 64 * 64; }

// One number per channel, as vectors.
template <typename real_t>
using PerChannel = std::vector<real_t>;

// y = (x - shift) * scale + offset by channel, of one image.
template <typename real_t>
struct Affine {
    PerChannel<real_t> shift, scale, offset;

    Affine(const Shape& shape, const double* statistics, const double* weight, const double* bias)
        : shift(padded(shape.channels)), scale(shift.size()), offset(shift.size()) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const double* own = statistics + c / shape.group_channels() * 2;
            const GroupAffine<real_t> affine =
                group_affine<real_t>({own[0], own[1]}, weight[c], bias[c]);
            shift[c] = affine.shift;
            scale[c] = affine.scale;
            offset[c] = affine.offset;
        }
    }
};

// kVectors vectors of numbers by channel, from channel c on.
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

// ---- statistics --------------------------------------------------------------------------------------------------

// Lanes of kVectors vectors, which loops over numbers in float64 read one by one.
template <int kVectors, typename real_t>
struct LanesOf {
    static constexpr int count = kVectors * kLanes<real_t>;
    real_t values[count];

    explicit LanesOf(const Vector<real_t> (&vectors)[kVectors]) { std::memcpy(values, vectors, sizeof(values)); }
};

// Two sums by channel for every block, in float64.
class SumsOfBlocks {
public:
    SumsOfBlocks(const Shape& shape, const Blocks& blocks)
        : stride_(padded(shape.channels)), sums_(static_cast<size_t>(shape.batch * blocks.count * 2 * stride_)) {}

    double* first(int64_t block) { return &sums_[block * 2 * stride_]; }
    double* second(int64_t block) { return first(block) + stride_; }

private:
    int64_t stride_;
    std::vector<double> sums_;
};

// Adds the sums of a run of pixels, around the pivot of each channel's group.
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
                const Vector<real_t> from = lanes.load(pixel + v * kLanes<real_t>) - pivot[v];
                sum[v] += from;
                square[v] += from * from;
            }
        }
        const LanesOf<kVectors, real_t> own_pivots(pivot), own_sums(sum), own_squares(square);
        for (int i = 0; i < own_sums.count; ++i) {
            GroupSums total{sums[c + i], squares[c + i]};
            add_run(total, pivots[c + i], own_pivots.values[i], static_cast<double>(count), own_sums.values[i],
                    own_squares.values[i]);
            sums[c + i] = total.sum;
            squares[c + i] = total.square;
        }
    });
}

template <typename scalar_t>
void compute_statistics(
    Map<const scalar_t> input, const Shape& shape, double eps,
    double* statistics) {  // (N, groups, 2)
    const int64_t stride = padded(shape.channels);
    std::vector<double> pivots(static_cast<size_t>(shape.batch * stride));
    for (int64_t image = 0; image < shape.batch; ++image) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const int64_t first = c / shape.group_channels() * shape.group_channels();
            pivots[image * stride + c] = load(input.row(image, 0)[first]);
        }
    }
    const Blocks blocks(shape.pixels(), kBlockPixels);
    SumsOfBlocks sums(shape, blocks);
    const bool adjacent_rows = input.has_adjacent_rows(shape);
    blocks.for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t block) {
        for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
            add_pixels(input.row(image, y) + x * input.pixel_stride, input.pixel_stride, count, shape.channels,
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
        const GroupStatistics found = group_statistics(
            total, pivots[image * stride + begin], static_cast<double>(shape.group_size()), eps);
        statistics[2 * g] = found.mean;
        statistics[2 * g + 1] = found.rstd;
    }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// Normalizes and clamps pixels at equal distances.
template <typename scalar_t, typename target_t>
inline void normalize(
    const scalar_t* pixels, int64_t pixel_stride, const Affine<accum_t<scalar_t>>& affine, target_t* target,
    int64_t target_stride, int64_t channels, int64_t count) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> own(affine, c);
        for (int64_t x = 0; x < count; ++x) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = c + v * kLanes<real_t>;
                const Vector<real_t> value = own.apply(v, lanes.load(pixels + x * pixel_stride + at));
                lanes.store(target + x * target_stride + at, lane_max(Vector<real_t>{}, value));  // NaN stays
            }
        }
    });
}

// One row of the doubled map from the two normalized rows that it lies between.
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
            if (column.low != cell) {  // the next one, as columns ascend by less than half a cell
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

template <typename real_t>
std::vector<DoubledCell<real_t>> doubled_axis(int64_t size) {
    std::vector<DoubledCell<real_t>> cells;
    for (int64_t i = 0; i < 2 * size; ++i) {
        cells.push_back(doubled_cell<real_t>(i, size));
    }
    return cells;
}

// Rows of the doubled map that begin between rows [first, last) of the input.
template <typename scalar_t>
void upsample_rows(
    Map<const scalar_t> input, const Shape& shape, const Affine<accum_t<scalar_t>>& affine,
    const std::vector<DoubledCell<accum_t<scalar_t>>>& columns, Map<scalar_t> output, int64_t image, int64_t first,
    int64_t last, accum_t<scalar_t>* rows) {
    using real_t = accum_t<scalar_t>;
    const int64_t stride = padded(shape.channels), row_size = stride * shape.width;
    int64_t held[2] = {-1, -1};  // row y is kept at y % 2
    const auto row_of = [&](int64_t y) {
        real_t* row = rows + y % 2 * row_size;
        if (held[y % 2] != y) {
            normalize(input.row(image, y), input.pixel_stride, affine, row, stride, shape.channels, shape.width);
            held[y % 2] = y;
        }
        return row;
    };
    for (int64_t i = first_doubled(first, shape.height); i < first_doubled(last, shape.height); ++i) {
        const DoubledCell<real_t> row = doubled_cell<real_t>(i, shape.height);
        const real_t *low = row_of(row.low), *high = row_of(row.high);
        interpolate_row(low, high, row, columns, stride, shape.channels, output.row(image, i));
    }
}

template <typename real_t>
std::vector<Affine<real_t>> affine_of_images(
    const Shape& shape, const double* statistics, const double* weight, const double* bias) {
    std::vector<Affine<real_t>> affine;
    for (int64_t image = 0; image < shape.batch; ++image) {
        affine.emplace_back(shape, statistics + image * shape.groups * 2, weight, bias);
    }
    return affine;
}

template <typename scalar_t>
void forward(
    Map<const scalar_t> input, const Shape& shape, const double* statistics, const double* weight, const double* bias,
    bool upsample, scalar_t* output) {
    using real_t = accum_t<scalar_t>;
    const int64_t factor = upsample ? 2 : 1;
    const Map<scalar_t> target = dense_map(output, shape.channels, factor * shape.height, factor * shape.width);
    advise_huge_pages(output, sizeof(scalar_t) * static_cast<size_t>(shape.batch * target.image_stride));
    const std::vector<Affine<real_t>> affine = affine_of_images<real_t>(shape, statistics, weight, bias);
    if (!upsample) {
        const bool adjacent_rows = input.has_adjacent_rows(shape);
        Blocks(shape.pixels(), kBlockPixels)
            .for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t) {
                for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
                    normalize(input.row(image, y) + x * input.pixel_stride, input.pixel_stride, affine[image],
                              target.row(image, y) + x * shape.channels, shape.channels, shape.channels, count);
                });
            });
        return;
    }
    const std::vector<DoubledCell<real_t>> columns = doubled_axis<real_t>(shape.width);
    const int64_t rows = shape.batch * shape.height, grain = std::max<int64_t>(1, kBlockPixels / shape.width);
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        const Scratch<real_t> kept(2 * padded(shape.channels) * shape.width);
        while (begin < end) {  // a part of one image
            const int64_t image = begin / shape.height, y = begin % shape.height;
            const int64_t count = std::min(shape.height - y, end - begin);
            upsample_rows(input, shape, affine[image], columns, target, image, y, y + count, kept.get());
            begin += count;
        }
    });
}

// ---- backward ----------------------------------------------------------------------------------------------------

// The transpose of doubling, for one row of the input: sums of rows of the gradient, then of their pixels.
template <typename scalar_t>
void gather_row(
    Map<const scalar_t> grad_output, const Shape& shape, const std::vector<DoubledCell<accum_t<scalar_t>>>& rows,
    const std::vector<DoubledCell<accum_t<scalar_t>>>& columns, int64_t image, int64_t y,
    accum_t<scalar_t>* summed,    // (2 W, padded C)
    accum_t<scalar_t>* target) {  // (W, padded C)
    using real_t = accum_t<scalar_t>;
    const int64_t stride = padded(shape.channels), width = 2 * shape.width;
    const int64_t begin = first_doubled(y - 1, shape.height), end = first_doubled(y + 1, shape.height);
    for_channels<real_t>(shape.channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        for (int64_t x = 0; x < width; ++x) {
            Vector<real_t> sum[kVectors] = {};
            for (int64_t i = begin; i < end; ++i) {
                const Vector<real_t> weight = broadcast(weight_of_cell(rows[i], y));
                const scalar_t* pixel = grad_output.row(image, i) + x * grad_output.pixel_stride + c;
                for (int v = 0; v < kVectors; ++v) {
                    sum[v] += weight * lanes.load(pixel + v * kLanes<real_t>);
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                store_vector(summed + x * stride + c + v * kLanes<real_t>, sum[v]);
            }
        }
        for (int64_t x = 0; x < shape.width; ++x) {
            Vector<real_t> sum[kVectors] = {};
            for (int64_t i = first_doubled(x - 1, shape.width); i < first_doubled(x + 1, shape.width); ++i) {
                const Vector<real_t> weight = broadcast(weight_of_cell(columns[i], x));
                for (int v = 0; v < kVectors; ++v) {
                    sum[v] += weight * load_vector(summed + i * stride + c + v * kLanes<real_t>);
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                store_vector(target + x * stride + c + v * kLanes<real_t>, sum[v]);
            }
        }
    });
}

template <typename vector_t>
inline vector_t where_active(vector_t before_relu, vector_t gradient) {
    return before_relu <= vector_t{} ? vector_t{} : gradient;  // NaN passes
}

// Adds the sums of g and of g * (x - shift) over a run of pixels, g the gradient by what ReLU takes; `masked`, where it
// is wanted, gets g.
template <typename scalar_t, typename gradient_t>
void add_gradients(
    const scalar_t* input, int64_t input_stride, const gradient_t* gradient, int64_t gradient_stride, int64_t count,
    const Affine<accum_t<scalar_t>>& affine, int64_t channels, accum_t<scalar_t>* masked, double* gradients,
    double* products) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> own(affine, c);
        Vector<real_t> sum[kVectors] = {}, product[kVectors] = {};
        for (int64_t x = 0; x < count; ++x) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = c + v * kLanes<real_t>;
                const Vector<real_t> value = lanes.load(input + x * input_stride + at);
                const Vector<real_t> g =
                    where_active(own.apply(v, value), lanes.load(gradient + x * gradient_stride + at));
                sum[v] += g;
                product[v] += g * (value - own.shift[v]);
                if (masked) {
                    lanes.store(masked + x * channels + at, g);
                }
            }
        }
        const LanesOf<kVectors, real_t> own_gradients(sum), own_products(product);
        for (int i = 0; i < own_gradients.count; ++i) {
            gradients[c + i] += own_gradients.values[i];
            products[c + i] += own_products.values[i];
        }
    });
}

// Numbers of `GroupGradient` by channel, of one image.
template <typename real_t>
struct ByInput {
    PerChannel<real_t> by_gradient, by_input, constant;

    // `gradients` and `products`: sums over the image of g, and of g times the normalized input.
    ByInput(
        const Shape& shape, const double* statistics, const double* weight, const double* gradients,
        const double* products)
        : by_gradient(padded(shape.channels)), by_input(by_gradient.size()), constant(by_gradient.size()) {
        const double count = static_cast<double>(shape.group_size());
        for (int64_t g = 0; g < shape.groups; ++g) {
            double mean_gradient = 0, mean_product = 0;
            const int64_t begin = g * shape.group_channels(), end = begin + shape.group_channels();
            for (int64_t c = begin; c < end; ++c) {
                mean_gradient += gradients[c] * weight[c] / count;
                mean_product += products[c] * weight[c] / count;
            }
            for (int64_t c = begin; c < end; ++c) {
                const GroupGradient<real_t> found = group_gradient<real_t>(
                    {statistics[2 * g], statistics[2 * g + 1]}, weight[c], mean_gradient, mean_product);
                by_gradient[c] = found.by_gradient;
                by_input[c] = found.by_input;
                constant[c] = found.constant;
            }
        }
    }
};

// The gradient by a run of pixels of the input. kMasked: the gradient is that by what ReLU takes already.
template <bool kMasked, typename scalar_t, typename gradient_t>
void input_gradient(
    const scalar_t* input, int64_t input_stride, const gradient_t* gradient, int64_t gradient_stride, int64_t count,
    const Affine<accum_t<scalar_t>>& affine, const ByInput<accum_t<scalar_t>>& factors, int64_t channels,
    scalar_t* target) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> own(affine, c);
        Vector<real_t> by_gradient[kVectors], by_input[kVectors], constant[kVectors];
        load_channels(factors.by_gradient, c, by_gradient);
        load_channels(factors.by_input, c, by_input);
        load_channels(factors.constant, c, constant);
        for (int64_t x = 0; x < count; ++x) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = c + v * kLanes<real_t>;
                const Vector<real_t> value = lanes.load(input + x * input_stride + at);
                Vector<real_t> g = lanes.load(gradient + x * gradient_stride + at);
                if constexpr (!kMasked) {
                    g = where_active(own.apply(v, value), g);
                }
                lanes.store(target + x * channels + at,
                            (value - own.shift[v]) * by_input[v] + (g * by_gradient[v] + constant[v]));
            }
        }
    });
}

template <typename scalar_t>
void backward(
    Map<const scalar_t> grad_output, Map<const scalar_t> input, const Shape& shape, const double* statistics,
    const double* weight, const double* bias, bool upsample,
    accum_t<scalar_t>* masked,  // (N, H, W, C), where upsampled; it may be grad_input
    scalar_t* grad_input, double* grad_weight, double* grad_bias) {
    using real_t = accum_t<scalar_t>;
    const int64_t channels = shape.channels, stride = padded(channels);
    const std::vector<Affine<real_t>> affine = affine_of_images<real_t>(shape, statistics, weight, bias);
    const bool adjacent_rows =
        input.has_adjacent_rows(shape) && (upsample || grad_output.has_adjacent_rows(shape));
    const Map<real_t> masked_map = dense_map(masked, channels, shape.height, shape.width);
    const int64_t size = upsample ? shape.height : shape.pixels();
    const Blocks blocks(size, upsample ? std::max<int64_t>(1, kBlockPixels / shape.width) : kBlockPixels);
    SumsOfBlocks sums(shape, blocks);
    const auto rows = doubled_axis<real_t>(upsample ? shape.height : 0);
    const auto columns = doubled_axis<real_t>(upsample ? shape.width : 0);
    blocks.for_each(shape, size, [&](int64_t image, int64_t begin, int64_t end, int64_t block) {
        const auto add = [&](int64_t y, int64_t x, int64_t count, const auto* gradient, int64_t gradient_stride,
                             real_t* kept) {
            add_gradients(input.row(image, y) + x * input.pixel_stride, input.pixel_stride, gradient, gradient_stride,
                          count, affine[image], channels, kept, sums.first(block), sums.second(block));
        };
        if (!upsample) {
            for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
                add(y, x, count, grad_output.row(image, y) + x * grad_output.pixel_stride, grad_output.pixel_stride,
                    static_cast<real_t*>(nullptr));
            });
            return;
        }
        const Scratch<real_t> summed(2 * shape.width * stride), gathered(shape.width * stride);
        for (int64_t y = begin; y < end; ++y) {
            gather_row(grad_output, shape, rows, columns, image, y, summed.get(), gathered.get());
            for_runs(shape, false, 0, shape.width, [&](int64_t, int64_t x, int64_t count) {
                add(y, x, count, gathered.get() + x * stride, stride, masked_map.row(image, y) + x * channels);
            });
        }
    });
    std::vector<ByInput<real_t>> factors;
    std::vector<double> gradients(static_cast<size_t>(channels)), products(gradients.size());
    for (int64_t image = 0; image < shape.batch; ++image) {
        const double* own = statistics + image * shape.groups * 2;
        std::fill(gradients.begin(), gradients.end(), 0.0);
        std::fill(products.begin(), products.end(), 0.0);
        for (int64_t block = image * blocks.count; block < (image + 1) * blocks.count; ++block) {
            for (int64_t c = 0; c < channels; ++c) {
                gradients[c] += sums.first(block)[c];
                products[c] += sums.second(block)[c];
            }
        }
        for (int64_t c = 0; c < channels; ++c) {
            const double* of_group = own + c / shape.group_channels() * 2;
            products[c] = normalized_product(
                gradients[c], products[c], static_cast<double>(affine[image].shift[c]), {of_group[0], of_group[1]});
            grad_weight[c] += products[c];
            grad_bias[c] += gradients[c];
        }
        factors.emplace_back(shape, own, weight, gradients.data(), products.data());
    }
    const Map<scalar_t> target = dense_map(grad_input, channels, shape.height, shape.width);
    Blocks(shape.pixels(), kBlockPixels)
        .for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t) {
            for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
                const auto apply = [&](auto is_masked, const auto& gradient) {
                    input_gradient<decltype(is_masked)::value>(
                        input.row(image, y) + x * input.pixel_stride, input.pixel_stride,
                        gradient.row(image, y) + x * gradient.pixel_stride, gradient.pixel_stride, count,
                        affine[image], factors[image], channels, target.row(image, y) + x * channels);
                };
                upsample ? apply(std::true_type{}, masked_map) : apply(std::false_type{}, grad_output);
            });
        });
}

// ---- operators ---------------------------------------------------------------------------------------------------

Shape shape_of(const Tensor& input, int64_t num_groups) {
    return {input.size(0), input.size(1), input.size(2), input.size(3), num_groups};
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& size) {
    Tensor result = empty_like_sized(like, size, ScalarType::Double);
    return torch::stable::zero_(result);
}

// The numbers of weight or bias; `fill` for each channel where there is none.
std::vector<double> numbers_of(const std::optional<Tensor>& tensor, int64_t channels, double fill) {
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

std::tuple<Tensor, Tensor> group_norm_relu_cpu(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t num_groups,
    double eps, bool upsample) {
    check_group_norm_relu(input, weight, bias, num_groups, eps);
    const Shape shape = shape_of(input, num_groups);
    const int64_t factor = upsample ? 2 : 1;
    Tensor statistics = empty_like_sized(input, {shape.batch, num_groups, 2}, ScalarType::Double);
    const MemoryFormat format = memory_format_of(input);
    const Tensor output = empty_like_sized(
        input, {shape.batch, shape.channels, factor * shape.height, factor * shape.width}, std::nullopt,
        input.numel() ? MemoryFormat::ChannelsLast : format);
    if (input.numel() == 0) {
        return {output, torch::stable::zero_(statistics)};
    }
    const Tensor source = channels_adjacent(input);
    const auto scale = numbers_of(weight, shape.channels, 1.0), shift = numbers_of(bias, shape.channels, 0.0);
    dispatch_floating("group_norm_relu", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const Map<const scalar_t> map = map_of<scalar_t>(source);
        compute_statistics(map, shape, eps, mutable_data<double>(statistics));
        forward(map, shape, data<double>(statistics), scale.data(), shift.data(), upsample,
                mutable_data<scalar_t>(output));
    });
    return {to_contiguous(output, format), statistics};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, bool upsample) {
    check_group_norm_relu_backward(grad_output, input, statistics, weight, bias, num_groups, upsample);
    const Shape shape = shape_of(input, num_groups);
    const ScalarType dtype = input.scalar_type();
    const MemoryFormat format = memory_format_of(input);
    const std::vector<int64_t> size(input.sizes().begin(), input.sizes().end());
    const Tensor grad_input =
        empty_like_sized(input, size, std::nullopt, input.numel() ? MemoryFormat::ChannelsLast : format);
    const Tensor grad_weight = zeros(input, {shape.channels}), grad_bias = zeros(input, {shape.channels});
    if (input.numel() != 0) {
        const Tensor source = channels_adjacent(input), gradient = channels_adjacent(as_dtype(grad_output, dtype));
        const auto scale = numbers_of(weight, shape.channels, 1.0), shift = numbers_of(bias, shape.channels, 0.0);
        const Tensor own_statistics = to_contiguous(statistics);
        const bool in_place = accum_dtype(dtype) == dtype;
        const Tensor masked = in_place || !upsample
            ? grad_input
            : empty_like_sized(input, size, accum_dtype(dtype), MemoryFormat::ChannelsLast);
        dispatch_floating("group_norm_relu_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            backward(map_of<scalar_t>(gradient), map_of<scalar_t>(source), shape, data<double>(own_statistics),
                     scale.data(), shift.data(), upsample,
                     upsample ? mutable_data<real_t>(masked) : nullptr, mutable_data<scalar_t>(grad_input),
                     mutable_data<double>(grad_weight), mutable_data<double>(grad_bias));
        });
    }
    return {to_contiguous(grad_input, format), as_dtype(grad_weight, weight ? weight->scalar_type() : dtype),
            as_dtype(grad_bias, bias ? bias->scalar_type() : dtype)};
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("group_norm_relu", TORCH_BOX(&spatialflow::group_norm_relu_cpu));
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::group_norm_relu_backward_cpu));
}
