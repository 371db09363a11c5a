// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolution with bias, residual and ReLU, on the CPU:
//
//   out[p, o] = relu(sum_c x[p, c] * weight[o, c] + bias[o] + residual[p, o])
//
// for pixels p; channels-last. Each thread computes a range of pixels, by matrix products of a few pixels at a time.
// The networks use oneDNN on the CPU instead (spatialflow/models/optimized/conv.py).
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "ops/conv1x1.h"

namespace spatialflow {
namespace {

constexpr int64_t kPixels = 32;  // pixels per matrix product

Tensor conv1x1_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    bool relu) {
    check_conv1x1(x, weight, bias, residual);
    const Tensor out = empty_conv1x1(x, weight);
    const Tensor pixels = to_contiguous(x, MemoryFormat::ChannelsLast), rows = to_contiguous(weight);
    const auto offsets = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
    const auto terms =
        residual ? std::make_optional(to_contiguous(*residual, MemoryFormat::ChannelsLast)) : std::nullopt;
    const int64_t channels = x.size(1), outputs = weight.size(0), count = x.size(0) * x.size(2) * x.size(3);
    dispatch_floating("conv1x1", x.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        const scalar_t* own_bias = offsets ? data<scalar_t>(*offsets) : nullptr;
        const scalar_t* own_terms = terms ? data<scalar_t>(*terms) : nullptr;
        const Scratch<real_t> packed(gemm_packed_size(channels, outputs));
        gemm_pack(data<scalar_t>(rows), 1, channels, channels, outputs, packed.get());
        parallel_for(0, count, kPixels, [&](int64_t begin, int64_t end) {
            const Scratch<real_t> values(kPixels * channels), sums(kPixels * outputs);
            for (int64_t first = begin; first < end; first += kPixels) {
                const int64_t some = std::min(kPixels, end - first);
                const scalar_t* source = data<scalar_t>(pixels) + first * channels;
                for (int64_t i = 0; i < some * channels; ++i) {
                    values.get()[i] = load(source[i]);
                }
                gemm(some, outputs, channels, values.get(), channels, packed.get(), sums.get(), outputs);
                for (int64_t i = 0; i < some * outputs; ++i) {
                    const int64_t at = first * outputs + i;
                    real_t sum = sums.get()[i];
                    sum += own_bias ? load(own_bias[i % outputs]) : real_t(0);
                    sum += own_terms ? load(own_terms[at]) : real_t(0);
                    store(mutable_data<scalar_t>(out)[at], relu && sum < 0 ? real_t(0) : sum);
                }
            }
        });
    });
    return out;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) { library.impl("_conv1x1", TORCH_BOX(&spatialflow::conv1x1_cpu)); }
