// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolution on CUDA, with optional bias, residual and ReLU:
//
//   out[p, o] = relu(sum_c x[p, c] * weight[o, c] + bias[o] + residual[p, o])
//
// for pixels p of channels-last maps. This kernel runs for all dtypes, sizes and devices that sm90_conv1x1.cu does not
// support. It computes one output value per thread and is not optimized. Networks call conv1x1 only in 16 bits on
// compute capability 9.0 (spatialflow/models/optimized/conv.py).
#include "cuda/launch.h"
#include "cuda/sm90_conv1x1.h"
#include "ops/conv1x1.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) conv1x1_kernel(
    Global<const scalar_t> x,         // (pixels, C)
    Global<const scalar_t> weight,    // (O, C)
    Global<const scalar_t> bias,      // (O) or null
    Global<const scalar_t> residual,  // (pixels, O) or null
    Global<scalar_t> out,             // (pixels, O)
    const int64_t count, const int64_t channels, const int64_t outputs, const bool relu) {
    using real_t = accum_t<scalar_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (index >= count) {
        return;
    }
    const int64_t pixel = index / outputs, output = index % outputs;
    real_t sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
        sum += static_cast<real_t>(load(x[pixel * channels + c])) * load(weight[output * channels + c]);
    }
    sum += bias ? load(bias[output]) : real_t(0);
    sum += residual ? load(residual[index]) : real_t(0);
    store(out[index], relu && sum < real_t(0) ? real_t(0) : sum);
}

Tensor conv1x1_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    bool relu) {
    const char* op = "conv1x1";
    check_conv1x1(x, weight, bias, residual);
    const DeviceScope device(x);
    const Tensor out = empty_conv1x1(x, weight);
    if (out.numel() == 0) {
        return out;
    }
    const Tensor dense_weight = to_contiguous(weight);
    const auto dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
    const auto dense_residual =
        residual ? std::make_optional(to_contiguous(*residual, MemoryFormat::ChannelsLast)) : std::nullopt;
    dispatch_floating(op, x.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        if constexpr (sizeof(scalar_t) == 2) {
            if (conv1x1_sm90<scalar_t>(x, dense_weight, dense_bias, dense_residual, out, relu, device.stream())) {
                return;
            }
        }
        const Tensor pixels = to_contiguous(x, MemoryFormat::ChannelsLast);
        launch<conv1x1_kernel<scalar_t>>(
            dim3(grid_size(op, ceil_div(out.numel(), kThreads))), dim3(kThreads), 0, device.stream(),
            data<scalar_t>(pixels), data<scalar_t>(dense_weight),
            dense_bias ? data<scalar_t>(*dense_bias) : Global<const scalar_t>(nullptr),
            dense_residual ? data<scalar_t>(*dense_residual) : Global<const scalar_t>(nullptr),
            mutable_data<scalar_t>(out), out.numel(), x.size(1), weight.size(0), relu);
    });
    return out;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("_conv1x1", TORCH_BOX(&spatialflow::conv1x1_cuda)); }
