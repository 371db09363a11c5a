// SPDX-License-Identifier: Apache-2.0
//
// Gradients of group_norm_relu on the CPU. The first pass computes g, the gradient with respect to the input of ReLU,
// and its sums per channel. The second pass computes the gradient with respect to the operator's input. The transpose
// of upsampling gathers, so tasks never write the same element.
#include "cpu/group_norm_relu.h"

#include "cpu/scratch.h"

namespace spatialflow {
namespace {

// Transpose of 2x upsampling, for one row of the input: weighted sums over rows of the gradient, then over pixels of
// the result.
template <typename scalar_t>
void gather_row(
    NormMap<const scalar_t> grad_output, const NormShape& shape,
    const std::vector<DoubledCell<accum_t<scalar_t>>>& rows, const std::vector<DoubledCell<accum_t<scalar_t>>>& columns,
    int64_t image, int64_t y,
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
    return before_relu <= vector_t{} ? vector_t{} : gradient;  // a NaN input passes the gradient
}

// Add the sums of g and of g * (x - shift) over a run of pixels. Store g in `masked` unless that is null. Here g is the
// gradient with respect to the input of ReLU.
template <typename scalar_t, typename gradient_t>
void add_gradients(
    const scalar_t* input, int64_t input_stride, const gradient_t* gradient, int64_t gradient_stride, int64_t count,
    const Affine<accum_t<scalar_t>>& affine, int64_t channels, accum_t<scalar_t>* masked, double* gradients,
    double* products) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> coefficients(affine, c);
        Vector<real_t> sum[kVectors] = {}, product[kVectors] = {};
        for (int64_t x = 0; x < count; ++x) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = c + v * kLanes<real_t>;
                const Vector<real_t> value = lanes.load(input + x * input_stride + at);
                const Vector<real_t> g =
                    where_active(coefficients.apply(v, value), lanes.load(gradient + x * gradient_stride + at));
                sum[v] += g;
                product[v] += g * (value - coefficients.shift[v]);
                if (masked) {
                    lanes.store(masked + x * channels + at, g);
                }
            }
        }
        const LanesOf<kVectors, real_t> run_gradients(sum), run_products(product);
        for (int i = 0; i < run_gradients.count; ++i) {
            gradients[c + i] += run_gradients.values[i];
            products[c + i] += run_products.values[i];
        }
    });
}

// Coefficients of `GroupGradient` per channel of one image.
template <typename real_t>
struct GradientCoefficients {
    PerChannel<real_t> by_gradient, by_input, constant;

    // `gradients` and `products`: sums over the image of g, and of g times the normalized input.
    GradientCoefficients(
        const NormShape& shape, const double* statistics, const double* weight, const double* gradients,
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
                const GroupGradient<real_t> coefficients = group_gradient<real_t>(
                    {statistics[2 * g], statistics[2 * g + 1]}, weight[c], mean_gradient, mean_product);
                by_gradient[c] = coefficients.by_gradient;
                by_input[c] = coefficients.by_input;
                constant[c] = coefficients.constant;
            }
        }
    }
};

// Compute the gradient of a run of pixels of the input. If kMasked, `gradient` is already the gradient with respect to
// the input of ReLU.
template <bool kMasked, typename scalar_t, typename gradient_t>
void input_gradient(
    const scalar_t* input, int64_t input_stride, const gradient_t* gradient, int64_t gradient_stride, int64_t count,
    const Affine<accum_t<scalar_t>>& affine, const GradientCoefficients<accum_t<scalar_t>>& factors, int64_t channels,
    scalar_t* target) {
    using real_t = accum_t<scalar_t>;
    for_channels<real_t>(channels, [&](auto lanes, int64_t c) {
        constexpr int kVectors = decltype(lanes)::vectors;
        const AffineVectors<kVectors, real_t> coefficients(affine, c);
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
                    g = where_active(coefficients.apply(v, value), g);
                }
                lanes.store(
                    target + x * channels + at,
                    (value - coefficients.shift[v]) * by_input[v] + (g * by_gradient[v] + constant[v]));
            }
        }
    });
}

template <typename scalar_t>
void backward(
    NormMap<const scalar_t> grad_output, NormMap<const scalar_t> input, const NormShape& shape,
    const double* statistics, const double* weight, const double* bias, bool upsample,
    accum_t<scalar_t>* masked,  // (N, H, W, C), used with upsampling; may be grad_input
    scalar_t* grad_input, double* grad_weight, double* grad_bias) {
    using real_t = accum_t<scalar_t>;
    const int64_t channels = shape.channels, stride = padded(channels);
    const std::vector<Affine<real_t>> affine = affine_of_images<real_t>(shape, statistics, weight, bias);
    const bool adjacent_rows = input.has_adjacent_rows(shape) && (upsample || grad_output.has_adjacent_rows(shape));
    const NormMap<real_t> masked_map = dense_map(masked, channels, shape.height, shape.width);
    const int64_t size = upsample ? shape.height : shape.pixels();
    const NormBlocks blocks(size, upsample ? std::max<int64_t>(1, kBlockPixels / shape.width) : kBlockPixels);
    SumsOfBlocks sums(shape, blocks);
    const auto rows = doubled_axis<real_t>(upsample ? shape.height : 0);
    const auto columns = doubled_axis<real_t>(upsample ? shape.width : 0);
    blocks.for_each(shape, size, [&](int64_t image, int64_t begin, int64_t end, int64_t block) {
        const auto add = [&](int64_t y, int64_t x, int64_t count, const auto* gradient, int64_t gradient_stride,
                             real_t* masked_run) {
            add_gradients(
                input.row(image, y) + x * input.pixel_stride, input.pixel_stride, gradient, gradient_stride, count,
                affine[image], channels, masked_run, sums.first(block), sums.second(block));
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
    std::vector<GradientCoefficients<real_t>> factors;
    std::vector<double> gradients(static_cast<size_t>(channels)), products(gradients.size());
    for (int64_t image = 0; image < shape.batch; ++image) {
        const double* image_statistics = statistics + image * shape.groups * 2;
        std::fill(gradients.begin(), gradients.end(), 0.0);
        std::fill(products.begin(), products.end(), 0.0);
        for (int64_t block = image * blocks.count; block < (image + 1) * blocks.count; ++block) {
            for (int64_t c = 0; c < channels; ++c) {
                gradients[c] += sums.first(block)[c];
                products[c] += sums.second(block)[c];
            }
        }
        for (int64_t c = 0; c < channels; ++c) {
            const double* group = image_statistics + c / shape.group_channels() * 2;
            products[c] = normalized_product(
                gradients[c], products[c], static_cast<double>(affine[image].shift[c]), {group[0], group[1]});
            grad_weight[c] += products[c];
            grad_bias[c] += gradients[c];
        }
        factors.emplace_back(shape, image_statistics, weight, gradients.data(), products.data());
    }
    const NormMap<scalar_t> target = dense_map(grad_input, channels, shape.height, shape.width);
    NormBlocks(shape.pixels(), kBlockPixels)
        .for_each(shape, shape.pixels(), [&](int64_t image, int64_t begin, int64_t end, int64_t) {
            for_runs(shape, adjacent_rows, begin, end, [&](int64_t y, int64_t x, int64_t count) {
                const auto apply = [&](auto is_masked, const auto& gradient) {
                    input_gradient<decltype(is_masked)::value>(
                        input.row(image, y) + x * input.pixel_stride, input.pixel_stride,
                        gradient.row(image, y) + x * gradient.pixel_stride, gradient.pixel_stride, count, affine[image],
                        factors[image], channels, target.row(image, y) + x * channels);
                };
                upsample ? apply(std::true_type{}, masked_map) : apply(std::false_type{}, grad_output);
            });
        });
}

// ---- operator ----------------------------------------------------------------------------------------------------

Tensor zeros(const Tensor& like, const std::vector<int64_t>& size) {
    Tensor result = empty_like_sized(like, size, ScalarType::Double);
    return torch::stable::zero_(result);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, bool upsample) {
    check_group_norm_relu_backward(grad_output, input, statistics, weight, bias, num_groups, upsample);
    const NormShape shape = shape_of(input, num_groups);
    const ScalarType dtype = input.scalar_type();
    const Tensor grad_input = empty_norm_map(input, 1);
    const Tensor grad_weight = zeros(input, {shape.channels}), grad_bias = zeros(input, {shape.channels});
    if (input.numel() != 0) {
        const Tensor source = channels_adjacent(input), gradient = channels_adjacent(as_dtype(grad_output, dtype));
        const auto scale = float64_values(weight, shape.channels, 1.0),
                   shift = float64_values(bias, shape.channels, 0.0);
        const Tensor dense_statistics = to_contiguous(statistics);
        const bool in_place = accum_dtype(dtype) == dtype;
        const Tensor masked = in_place || !upsample
                                  ? grad_input
                                  : empty_like_sized(
                                        input, {shape.batch, shape.channels, shape.height, shape.width},
                                        accum_dtype(dtype), MemoryFormat::ChannelsLast);
        dispatch_floating("group_norm_relu_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            backward(
                map_of<scalar_t>(gradient), map_of<scalar_t>(source), shape, data<double>(dense_statistics),
                scale.data(), shift.data(), upsample, upsample ? mutable_data<real_t>(masked) : nullptr,
                mutable_data<scalar_t>(grad_input), mutable_data<double>(grad_weight), mutable_data<double>(grad_bias));
        });
    }
    return finished_norm_gradients(input, weight, bias, grad_input, grad_weight, grad_bias);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::group_norm_relu_backward_cpu));
}
