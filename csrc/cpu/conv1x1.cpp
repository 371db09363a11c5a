// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolution with optional bias, residual and ReLU, on the CPU:
//
//   out[p, o] = relu(sum_c x[p, c] * weight[o, c] + bias[o] + residual[p, o])
//
// for pixels p of channels-last maps. Each thread computes a range of pixels, by matrix products of 32 pixels.
// The networks do not use this kernel; on the CPU they call oneDNN or F.conv2d (spatialflow/models/optimized/conv.py).
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "ops/conv1x1.h"

namespace spatialflow {
namespace {

constexpr int64_t kBlockPixels = 32;  // pixels per matrix product

Tensor conv1x1_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    bool relu) {
    check_conv1x1(x, weight, bias, residual);
    const Tensor out = empty_conv1x1(x, weight);
    const Tensor dense_x = to_contiguous(x, MemoryFormat::ChannelsLast), dense_weight = to_contiguous(weight);
    const auto dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
    const auto dense_residual =
        residual ? std::make_optional(to_contiguous(*residual, MemoryFormat::ChannelsLast)) : std::nullopt;
    const int64_t channels = x.size(1), outputs = weight.size(0), pixels = x.size(0) * x.size(2) * x.size(3);
    dispatch_floating("conv1x1", x.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        const scalar_t* bias_values = dense_bias ? data<scalar_t>(*dense_bias) : nullptr;
        const scalar_t* residual_values = dense_residual ? data<scalar_t>(*dense_residual) : nullptr;
        const Scratch<real_t> packed(gemm_packed_size(channels, outputs));
        gemm_pack(data<scalar_t>(dense_weight), 1, channels, channels, outputs, packed.get());
        parallel_for(0, pixels, kBlockPixels, [&](int64_t begin, int64_t end) {
            const Scratch<real_t> values(kBlockPixels * channels), sums(kBlockPixels * outputs);
            for (int64_t first = begin; first < end; first += kBlockPixels) {
                const int64_t count = std::min(kBlockPixels, end - first);
                const scalar_t* source = data<scalar_t>(dense_x) + first * channels;
                for (int64_t i = 0; i < count * channels; ++i) {
                    values.get()[i] = load(source[i]);
                }
                gemm(count, outputs, channels, values.get(), channels, packed.get(), sums.get(), outputs);
                for (int64_t i = 0; i < count * outputs; ++i) {
                    const int64_t index = first * outputs + i;
                    real_t sum = sums.get()[i];
                    sum += bias_values ? load(bias_values[i % outputs]) : real_t(0);
                    sum += residual_values ? load(residual_values[index]) : real_t(0);
                    store(mutable_data<scalar_t>(out)[index], relu && sum < 0 ? real_t(0) : sum);
                }
            }
        });
    });
    return out;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) { library.impl("_conv1x1", TORCH_BOX(&spatialflow::conv1x1_cpu)); }
