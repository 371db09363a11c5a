// SPDX-License-Identifier: Apache-2.0
//
// Gradients of group_norm_relu on CUDA in three launches. Layouts: see group_norm_relu.cuh.
//
//   sums        sums of g and g * (x - shift) per channel and block; g is the gradient w.r.t. the input of ReLU, shift
//               the rounded mean. With upsampling, the transpose of upsampling is computed by a gather along columns of
//               the input, and g is stored.
//   channels    a warp per channel adds the sums of the blocks in a fixed order, so results are deterministic
//   gradient    gradient w.r.t. the input, from the sums of its groups
#include "cuda/group_norm_relu.cuh"

namespace spatialflow {
namespace {

constexpr int kReaders = 5;  // maximum number of outputs of 2x upsampling that read one cell of an axis

// ---- device ------------------------------------------------------------------------------------------------------

// Sums per channel of a thread: of g and g * (x - shift), where g is the gradient w.r.t. the input of ReLU.
template <typename real_t, int kWidth>
struct GradientSums {
    real_t gradient[kWidth] = {}, product[kWidth] = {};

    // Set g to zero where the input of ReLU is not positive, then add g to the sums.
    template <typename scalar_t>
    __device__ __forceinline__ void add(
        const AffineVector<real_t, kWidth>& affine, const RawChannels<scalar_t, kWidth>& input, real_t (&g)[kWidth]) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t x = input.value(i);
            g[i] = affine.before_relu(i, x) <= real_t(0) ? real_t(0) : g[i];  // NaN does not change g
            gradient[i] += g[i];
            product[i] += g[i] * (x - affine.channels[i].shift);
        }
    }
};

// Compute the transpose of upsampling, one column of the input per thread. The thread sums each row of the incoming
// gradient over the pixels that read the column. It adds each sum to the two cells from which that row is interpolated.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void gather_column(
    const NormMap<const scalar_t>& grad_output, const NormMap<const scalar_t>& input,
    Global<accum_t<scalar_t>> masked,  // (N, H, W, C)
    const AffineVector<accum_t<scalar_t>, kWidth>& affine, const NormShape& shape, const NormParts& parts,
    const NormPlace<kWidth>& place, GradientSums<accum_t<scalar_t>, kWidth>& sums) {
    using real_t = accum_t<scalar_t>;
    const int column = place.block % parts.column_blocks * kPixelLanes + place.pixel_lane;
    if (column >= shape.width) {
        return;
    }
    const int begin = place.block / parts.column_blocks * parts.extent;
    const int end = begin + parts.extent < shape.height ? begin + parts.extent : shape.height;
    const int first_column = static_cast<int>(first_doubled(column - 1, shape.width));
    const int columns = static_cast<int>(first_doubled(column + 1, shape.width)) - first_column;
    real_t weights[kReaders];
#pragma unroll
    for (int r = 0; r < kReaders; ++r) {
        weights[r] = weight_of_cell(doubled_cell<real_t>(first_column + r, shape.width), column);
    }
    const Global<const scalar_t> source =
        input.data + (place.image * input.stride_n + column * input.stride_w + place.channel);
    const Global<const scalar_t> incoming =
        grad_output.data + (place.image * grad_output.stride_n + first_column * grad_output.stride_w + place.channel);
    const Global<real_t> target =
        masked + (static_cast<int64_t>(place.image) * shape.pixels() + column) * shape.channels + place.channel;
    real_t above[kWidth] = {}, below[kWidth] = {};  // sums of rows walk.low and walk.low + 1
    const auto finish = [&](int y, real_t(&g)[kWidth]) {
        if (y < begin || y >= end) {
            return;
        }
        sums.add(affine, load_channels<kWidth>(source + y * input.stride_h), g);
        const Global<real_t> pixel = target + static_cast<int64_t>(y) * shape.width * shape.channels;
        constexpr int kStore = kWidth < kVectorElements<real_t> ? kWidth : kVectorElements<real_t>;
#pragma unroll
        for (int i = 0; i < kWidth; i += kStore) {
            Vec<real_t, kStore> part;
#pragma unroll
            for (int j = 0; j < kStore; ++j) {
                part[j] = g[i + j];
            }
            store_vector(pixel + i, part);
        }
    };
    const int first_row = static_cast<int>(first_doubled(begin - 1, shape.height));
    const int end_row = static_cast<int>(first_doubled(end, shape.height));
    DoubledWalk<real_t> walk(first_row, shape.height);
    int low = walk.low;
    for (int y = first_row; y < end_row; ++y) {
        if (walk.low != low) {
            finish(low, above);
            low = walk.low;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] = below[i];
                below[i] = 0;
            }
        }
        RawChannels<scalar_t, kWidth> values[kReaders];
#pragma unroll
        for (int r = 0; r < kReaders; ++r) {
            if (r < columns) {
                values[r] = load_channels<kWidth>(incoming + (y * grad_output.stride_h + r * grad_output.stride_w));
            }
        }
        real_t row[kWidth] = {};
#pragma unroll
        for (int r = 0; r < kReaders; ++r) {
            if (r < columns) {
                values[r].add_to(row, weights[r]);
            }
        }
        const real_t weight = walk.high_weight();
        if (walk.high() == low) {  // last cell of the axis
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] += row[i] * (real_t(1) - weight) + row[i] * weight;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] += row[i] * (real_t(1) - weight);
                below[i] += row[i] * weight;
            }
        }
        walk.step();
    }
    finish(low, above);
    finish(low + 1, below);
}

template <typename scalar_t, bool kUpsample, int kWidth>
__global__ void __launch_bounds__(kThreads, kUpsample ? 1 : 2) group_norm_relu_gradient_sums_kernel(
    const NormMap<const scalar_t> grad_output, const NormMap<const scalar_t> input, Global<const double> statistics,
    const ByChannel<accum_t<scalar_t>> by_channel,
    Global<accum_t<scalar_t>> masked,  // (N, H, W, C), only with upsampling
    Global<double> table,              // (N, blocks, C, 2)
    const NormShape shape, const NormParts parts) {
    using real_t = accum_t<scalar_t>;
    constexpr int kChannels = kSlice<kWidth>;
    SPATIALFLOW_SHARED(double, of_warps, kWarps * 2 * kChannels);
    SPATIALFLOW_SHARED(double, total, 2 * kChannels);
    const NormPlace<kWidth> place(shape, parts.blocks);
    GradientSums<real_t, kWidth> sums;
    if (place.has_channels(shape)) {
        const int64_t group_row = static_cast<int64_t>(place.image) * shape.groups;
        const AffineVector<real_t, kWidth> affine = affine_of(statistics, group_row, by_channel, shape, place);
        if constexpr (kUpsample) {
            gather_column(grad_output, input, masked, affine, shape, parts, place, sums);
        } else {
            struct Loaded {
                RawChannels<scalar_t, kWidth> value, gradient;
            };
            for_pixels(
                PixelRange(shape, place, parts),
                [&](int pixel) {
                    return Loaded{
                        load_channels<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel),
                        load_channels<kWidth>(pixel_of(grad_output, shape, place.image, pixel) + place.channel)};
                },
                [&](int, const Loaded& loaded, bool) {
                    real_t g[kWidth];
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        g[i] = loaded.gradient.value(i);
                    }
                    sums.add(affine, loaded.value, g);
                });
        }
    }
    double gradient[kWidth], product[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        gradient[i] = sums.gradient[i];
        product[i] = sums.product[i];
    }
    sum_block(gradient, product, of_warps, total);
    const int c = place.slice * kChannels + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < kChannels && c < shape.channels) {
        const int64_t row = static_cast<int64_t>(place.image) * parts.blocks + place.block;
        const double first = total[2 * threadIdx.x], second = total[2 * threadIdx.x + 1];
        store_vector(table + (row * shape.channels + c) * 2, Vec<double, 2>{{first, second}});
    }
}

// Add the sums of all blocks, one warp per channel.
template <typename real_t>
__global__ void __launch_bounds__(kThreads) group_norm_relu_channel_sums_kernel(
    Global<const double> table,       // (N, blocks, C, 2)
    Global<const double> statistics,  // (N, groups, 2)
    Global<double> sums,              // (N, C, 2): of g and g * (x - mean) * rstd
    Global<real_t> grad_weight, Global<real_t> grad_bias, const NormShape shape, const int blocks) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int c = static_cast<int>(blockIdx.x) * kWarps + thread / kWarpSize;
    if (c >= shape.channels) {
        return;
    }
    double by_weight = 0, by_bias = 0;
    for (int image = 0; image < shape.batch; ++image) {
        double gradient = 0, product = 0;
        for (int block = lane; block < blocks; block += kWarpSize) {
            const Vec<double, 2> partial =
                load_vector<2>(table + ((static_cast<int64_t>(image) * blocks + block) * shape.channels + c) * 2);
            gradient += partial[0];
            product += partial[1];
        }
        gradient = sum_lanes(gradient, 1);
        product = sum_lanes(product, 1);
        const int64_t group = static_cast<int64_t>(image) * shape.groups + c / shape.group_channels;
        const double mean = statistics[group * 2];
        product = normalized_product(
            gradient, product, static_cast<double>(static_cast<real_t>(mean)), {mean, statistics[group * 2 + 1]});
        if (lane == 0) {
            const int64_t at = static_cast<int64_t>(image) * shape.channels + c;
            store_vector(sums + at * 2, Vec<double, 2>{{gradient, product}});
        }
        by_weight += product;
        by_bias += gradient;
    }
    if (lane == 0) {
        grad_weight[c] = static_cast<real_t>(by_weight);
        grad_bias[c] = static_cast<real_t>(by_bias);
    }
}

// `gradient`, of type gradient_t, is the incoming gradient. With kMasked it is the gradient w.r.t. the input of ReLU,
// which group_norm_relu_gradient_sums_kernel stored.
template <typename scalar_t, typename gradient_t, bool kMasked, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_input_gradient_kernel(
    const NormMap<const gradient_t> gradient, const NormMap<const scalar_t> input, Global<const double> statistics,
    const ByChannel<accum_t<scalar_t>> by_channel,
    Global<const double> sums,    // (N, C, 2)
    Global<scalar_t> grad_input,  // (N, H, W, C)
    const NormShape shape, const NormParts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, means, 2 * kSlice<kWidth>);
    const NormPlace<kWidth> place(shape, parts.blocks);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    for (int group = place.first_group + thread / kWarpSize; group < place.end_group; group += kWarps) {
        double mean_gradient = 0, mean_product = 0;
        for (int i = lane; i < shape.group_channels; i += kWarpSize) {
            const int c = group * shape.group_channels + i;
            const Vec<double, 2> partial =
                load_vector<2>(sums + (static_cast<int64_t>(place.image) * shape.channels + c) * 2);
            mean_gradient += by_channel.weight_of(c) * partial[0];
            mean_product += by_channel.weight_of(c) * partial[1];
        }
        mean_gradient = sum_lanes(mean_gradient, 1) / shape.group_size();
        mean_product = sum_lanes(mean_product, 1) / shape.group_size();
        if (lane == 0) {
            means[(group - place.first_group) * 2] = mean_gradient;
            means[(group - place.first_group) * 2 + 1] = mean_product;
        }
    }
    __syncthreads();
    if (!place.has_channels(shape)) {
        return;
    }
    const int64_t group_row = static_cast<int64_t>(place.image) * shape.groups;
    const AffineVector<real_t, kWidth> affine = affine_of(statistics, group_row, by_channel, shape, place);
    GroupGradient<real_t> factors[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i, group = c / shape.group_channels, at = (group - place.first_group) * 2;
        const int64_t of_group = (group_row + group) * 2;
        factors[i] = group_gradient<real_t>(
            {statistics[of_group], statistics[of_group + 1]}, by_channel.weight_of(c), means[at], means[at + 1]);
    }
    constexpr int kLoad = kWidth < kVectorElements<gradient_t> ? kWidth : kVectorElements<gradient_t>;
    const PixelRange pixels(shape, place, parts);
    const Global<scalar_t> target =
        grad_input + (static_cast<int64_t>(place.image) * shape.pixels() * shape.channels + place.channel);
    for (int pixel = pixels.begin; pixel < pixels.end; pixel += kPixelLanes) {
        Vec<scalar_t, kWidth> value = load_vector<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel);
        const Global<const gradient_t> incoming = pixel_of(gradient, shape, place.image, pixel) + place.channel;
        Vec<gradient_t, kLoad> loaded[kWidth / kLoad];
#pragma unroll
        for (int i = 0; i < kWidth / kLoad; ++i) {
            loaded[i] = load_vector<kLoad>(incoming + i * kLoad);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t x = load(value[i]);
            real_t g = load(loaded[i / kLoad][i % kLoad]);
            if (!kMasked) {
                g = affine.before_relu(i, x) <= real_t(0) ? real_t(0) : g;
            }
            store(
                value[i],
                (x - factors[i].shift) * factors[i].by_input + (g * factors[i].by_gradient + factors[i].constant));
        }
        store_vector(target + static_cast<int64_t>(pixel) * shape.channels, value);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Tensors of a call in the layouts of the kernels, and the results.
struct NormGradientTensors {
    Tensor gradient, input, statistics;         // gradient: incoming, in the dtype of the input
    std::optional<Tensor> weight, bias;         // in accum_dtype
    std::optional<Tensor> masked;               // with upsampling: gradient w.r.t. the input of ReLU
    Tensor grad_input, grad_weight, grad_bias;  // grad_input is channels-last
};

template <typename scalar_t, int kWidth>
void launch_gradients(const NormGradientTensors& tensors, int64_t num_groups, Stream stream) {
    using real_t = accum_t<scalar_t>;
    const bool upsample = tensors.masked.has_value();
    const NormShape shape = shape_of<kWidth>(tensors.input, num_groups, 0);
    const ByChannel<real_t> by_channel = by_channel_of<real_t>(tensors.weight, tensors.bias);
    const NormParts parts =
        upsample ? column_parts(shape, shape.height, shape.width) : pixel_parts(shape, kGroupNormRun);
    const Tensor table =
        empty_like_sized(tensors.input, {shape.batch, parts.blocks, shape.channels, 2}, ScalarType::Double);
    const Tensor sums = empty_like_sized(tensors.input, {shape.batch, shape.channels, 2}, ScalarType::Double);
    const NormMap<const scalar_t> input = map_of<scalar_t>(tensors.input);
    const auto statistics = data<double>(tensors.statistics);
    const auto launch_sums = [&](auto upsampled, Global<real_t> masked) {
        launch<group_norm_relu_gradient_sums_kernel<scalar_t, decltype(upsampled)::value, kWidth>>(
            grid_of(shape, parts), dim3(kThreads), 0, stream, map_of<scalar_t>(tensors.gradient), input, statistics,
            by_channel, masked, mutable_data<double>(table), shape, parts);
    };
    if (upsample) {
        launch_sums(std::true_type{}, mutable_data<real_t>(*tensors.masked));
    } else {
        launch_sums(std::false_type{}, Global<real_t>(nullptr));
    }
    launch<group_norm_relu_channel_sums_kernel<real_t>>(
        dim3(grid_size("group_norm_relu", ceil_div(shape.channels, kWarps))), dim3(kThreads), 0, stream,
        data<double>(table), statistics, mutable_data<double>(sums), mutable_data<real_t>(tensors.grad_weight),
        mutable_data<real_t>(tensors.grad_bias), shape, parts.blocks);
    const NormParts pixels = pixel_parts(shape, kGroupNormRun);
    const auto launch_input_gradient = [&](auto is_masked, const auto& gradient) {
        constexpr bool kMasked = decltype(is_masked)::value;
        using gradient_t = std::conditional_t<kMasked, real_t, scalar_t>;
        launch<group_norm_relu_input_gradient_kernel<scalar_t, gradient_t, kMasked, kWidth>>(
            grid_of(shape, pixels), dim3(kThreads), 0, stream, gradient, input, statistics, by_channel,
            data<double>(sums), mutable_data<scalar_t>(tensors.grad_input), shape, pixels);
    };
    if (upsample) {
        launch_input_gradient(std::true_type{}, map_of<real_t>(*tensors.masked));
    } else {
        launch_input_gradient(std::false_type{}, map_of<scalar_t>(tensors.gradient));
    }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, bool upsample) {
    check_group_norm_relu_backward(grad_output, input, statistics, weight, bias, num_groups, upsample);
    const DeviceScope device(input);
    const ScalarType dtype = input.scalar_type(), accumulated = accum_dtype(dtype);
    const Tensor grad_input = empty_norm_map(input, 1);
    Tensor grad_weight = empty_like_sized(input, {input.size(1)}, accumulated);
    Tensor grad_bias = empty_like_sized(input, {input.size(1)}, accumulated);
    if (input.numel() == 0) {
        torch::stable::zero_(grad_weight);
        torch::stable::zero_(grad_bias);
    } else {
        // Without upsampling the gradient w.r.t. the input of ReLU is not stored, but computed from the incoming one.
        const std::vector<int64_t> size(input.sizes().begin(), input.sizes().end());
        const NormGradientTensors tensors{
            channels_adjacent(as_dtype(grad_output, dtype)),
            channels_adjacent(input),
            to_contiguous(statistics),
            in_dtype(weight, accumulated),
            in_dtype(bias, accumulated),
            upsample ? std::optional<Tensor>(empty_like_sized(input, size, accumulated, MemoryFormat::ChannelsLast))
                     : std::nullopt,
            grad_input,
            grad_weight,
            grad_bias};
        dispatch_floating("group_norm_relu_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            dispatch_width<scalar_t>({&tensors.input, &tensors.gradient, &grad_input}, [&](auto width) {
                launch_gradients<scalar_t, decltype(width)::value>(tensors, num_groups, device.stream());
            });
        });
    }
    return finished_norm_gradients(input, weight, bias, grad_input, grad_weight, grad_bias);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::group_norm_relu_backward_cuda));
}
