// SPDX-License-Identifier: Apache-2.0
//
// relu?(conv3x3(x + flow) + bias) over all levels of a pyramid on CUDA, in one launch if possible: packing of weights
// and host side. ReLU is optional. The kernels are described in conv3x3.cu.
//
//   packed[t, c, o] = weight[o, c, t]      (9, C, O padded to 32)
//
// For float64, packed weights are in float64. For other dtypes they are in float32, followed by the same weights in
// both 16-bit types (packed_halves). Zeros up to packed_conv_size and the tag (packed_tag) follow. Unpacked weights are
// packed for the call, in their dtype. In 16-bit weights, the outputs of a row are in the order of packed_position. All
// algorithms read the same float32 weights.
#include "cuda/conv3x3.h"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t, typename packed_t>
__global__ void __launch_bounds__(256) pack_conv3x3_kernel(
    Global<const scalar_t> weight,  // (O, C, 3, 3)
    Global<packed_t> packed,        // (9, C, O padded); if `has_zeros`, zeros from 2x to 4x that size
    Global<packed_t> tag,           // `tag_size` zeros
    Global<float16> halves,         // (9, C, O padded) or null; `bfloats` has the same layout
    Global<bfloat16> bfloats, const int64_t channels, const int64_t out_channels, const int64_t padded_channels,
    const int64_t size, const bool has_zeros, const int64_t tag_size) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int64_t row = index / padded_channels, o = index - row * padded_channels;
    const int64_t tap = row / channels, c = row - tap * channels;
    accum_t<scalar_t> value = 0;
    if (o < out_channels) {
        const scalar_t stored = weight[(o * channels + c) * kTaps + tap];
        value = load(stored);
    }
    const int64_t position = sizeof(packed_t) == 2 ? packed_position(o) : o;
    packed_t result;
    store(result, value);
    packed[row * padded_channels + position] = result;
    if (index < tag_size) {
        store(tag[index], accum_t<scalar_t>(0));
    }
    if constexpr (std::is_same_v<packed_t, float>) {
        if (halves) {
            float16 half;
            bfloat16 bfloat;
            store(half, value);
            store(bfloat, value);
            const int64_t half_index = row * padded_channels + packed_position(o);
            halves[half_index] = half;
            bfloats[half_index] = bfloat;
        }
        if (has_zeros) {
            packed[2 * size + index] = 0.0f;
            packed[3 * size + index] = 0.0f;
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Pack weights as packed_t into `size` elements (nine taps, or packed_conv_size) and a tag. With `size` 0 the
// tag is not filled.
template <typename scalar_t, typename packed_t>
Tensor pack(const Tensor& weight, int64_t size, int64_t tag, ScalarType packed_type, Stream stream) {
    const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
    const int64_t tap_size = packed_tap_size(in_channels, out_channels), taps = kTaps * tap_size;
    Tensor packed = empty_like_sized(weight, {size + tag}, packed_type);
    if (size > 0) {
        const Tensor dense = to_contiguous(weight);
        const Global<packed_t> target = mutable_data<packed_t>(packed);
        Global<float16> halves(nullptr);
        Global<bfloat16> bfloats(nullptr);
        if (size > taps) {
            halves = pointer_cast<float16>(target + packed_halves(ScalarType::Half, in_channels, out_channels));
            bfloats = pointer_cast<bfloat16>(target + packed_halves(ScalarType::BFloat16, in_channels, out_channels));
        }
        launch<pack_conv3x3_kernel<scalar_t, packed_t>>(
            dim3(grid_size("pack_conv3x3", ceil_div(taps, 256))), dim3(256), 0, stream, data<scalar_t>(dense), target,
            target + size, halves, bfloats, in_channels, out_channels, tap_size / in_channels, taps, size > 2 * taps,
            tag);
    }
    return packed;
}

Tensor pack_conv3x3_cuda(const Tensor& weight, int64_t algorithm) {
    check_conv_weight("pack_conv3x3", weight);
    check_algorithm("pack_conv3x3", algorithm);
    const DeviceScope device(weight);
    const ScalarType dtype = weight.scalar_type();
    const bool is_double = dtype == ScalarType::Double;
    const int64_t resolved = resolve_algorithm(algorithm, is_double, weight.size(1), weight.size(0));
    const int64_t size = packed_conv_size(resolved, is_double, weight.size(1), weight.size(0));
    Tensor packed = weight;
    dispatch_floating("pack_conv3x3", dtype, [&](auto zero) {
        using scalar_t = decltype(zero);
        packed = pack<scalar_t, accum_t<scalar_t>>(
            weight, size, packed_tag(kPackedColumns, is_double), accum_dtype(dtype), device.stream());
    });
    return packed;
}

// Convolution of `x`, with newly allocated results.
Convolution convolution(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t algorithm) {
    Convolution conv{
        channels_adjacent(x),
        channels_adjacent(flow),
        {},
        empty_channels_last(x, x.size(), out_channels),
        packed,
        std::nullopt,
        relu,
        algorithm};
    if (bias) {
        conv.bias = contiguous_as(*bias, accum_dtype(x[0].scalar_type()));
    }
    return conv;
}

std::vector<Tensor> convolve(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t algorithm, Stream stream,
    const std::optional<Tensor>& active = std::nullopt) {
    const Convolution conv = convolution(x, flow, packed, bias, out_channels, relu, algorithm);
    convolve3x3("flow_conv2d", {conv}, stream, active ? std::make_optional(to_contiguous(*active)) : std::nullopt);
    return in_format_of(x, conv.out);
}

std::vector<Tensor> flow_conv2d_cuda(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& weight,
    const std::optional<Tensor>& bias, bool relu, int64_t algorithm) {
    check_flow_conv2d(x, flow, weight, bias, algorithm);
    if (x.empty()) {
        return {};
    }
    const DeviceScope device(weight);
    std::vector<Tensor> out;
    dispatch_floating("flow_conv2d", weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const Tensor packed = pack<scalar_t, scalar_t>(
            weight, kTaps * packed_tap_size(weight.size(1), weight.size(0)), 0, weight.scalar_type(), device.stream());
        out = convolve(x, flow, packed, bias, weight.size(0), relu, algorithm, device.stream());
    });
    return out;
}

std::vector<Tensor> flow_conv2d_packed_cuda(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t algorithm,
    const std::optional<Tensor>& active) {
    check_algorithm("flow_conv2d", algorithm);
    if (x.empty()) {
        return {};
    }
    check_flow_conv2d_packed(x, flow, packed, bias, out_channels, algorithm, active);
    check_packed_layout("flow_conv2d", packed, kPackedColumns);
    const DeviceScope device(x[0]);
    return convolve(x, flow, packed, bias, out_channels, relu, algorithm, device.stream(), active);
}

std::vector<Tensor> flow_conv2d_group_cuda(
    const std::vector<Tensor>& x, const std::vector<int64_t>& counts, const std::vector<Tensor>& packed,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& out_channels, bool relu,
    const std::vector<int64_t>& algorithms) {
    std::vector<Convolution> convolutions;
    std::vector<Tensor> results;
    for_each_in_group(
        x, counts, packed, biases, out_channels, algorithms,
        [&](size_t i, const std::vector<Tensor>& maps, const std::optional<Tensor>& bias, int64_t) {
            check_packed_layout("flow_conv2d", packed[i], kPackedColumns);
            convolutions.push_back(convolution(maps, {}, packed[i], bias, out_channels[i], relu, algorithms[i]));
            results.insert(results.end(), convolutions[i].out.begin(), convolutions[i].out.end());
        });
    if (!convolutions.empty()) {
        const DeviceScope device(x[0]);
        convolve3x3("flow_conv2d", convolutions, device.stream());
        results = in_format_of(x, std::move(results));
    }
    return results;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("flow_conv2d", TORCH_BOX(&spatialflow::flow_conv2d_cuda));
    library.impl("_pack_conv3x3", TORCH_BOX(&spatialflow::pack_conv3x3_cuda));
    library.impl("_flow_conv2d_packed", TORCH_BOX(&spatialflow::flow_conv2d_packed_cuda));
    library.impl("_flow_conv2d_group", TORCH_BOX(&spatialflow::flow_conv2d_group_cuda));
}
