// SPDX-License-Identifier: Apache-2.0
//
// relu(conv3x3(x + flow) + bias) over all levels of a pyramid in one launch, on CUDA.
//
//   out[p, o] = relu(sum over taps t, channels c of (x + flow)[p + t, c] * weight[t, c, o] + bias[o])
//
// An implicit GEMM: rows are pixels of all levels, columns output channels, and the sum runs over 9 C. x and flow (N, H,
// W, C) by strides, channels adjacent; weights (9, C, O) with O padded to 32, float32 (float64 for float64), made by
// _pack_conv3x3; output (N, H, W, O). No im2col buffer: the tile of a step is gathered from the feature, x + flow is added
// on the way into shared memory, and bias and ReLU are applied on the way out.
//
//   16-bit types   64 pixels x 64 outputs per block of 4 warps, 32 channels a step; each warp 32 x 32 by mma.sync, float32
//                  sums; x + flow and the weights are rounded to the 16-bit type for it
//   float32, 64    64 x 64 per block of 256 threads, 16 channels a step, 4 x 4 sums a thread by fused multiply-adds
// Both fetch the next step into registers while they compute this one. Tiles count through the levels, largest first as
// they come, so that small levels fill the tail. Results do not depend on anything but the inputs: no atomics.
//
// Every algorithm but "direct" names a way to compute on the CPU; here all are direct.
//
// Floor (H100, 790 TFLOP/s bf16, 3.0 TB/s), 256 -> 256 channels on P3..P7 of 800 x 1333: 26 GFLOP: 33 us; features in, out
// and flow 34 MB: 11 us.
#include "cuda/launch.h"
#include "cuda/tensor_core.h"
#include "ops/flow_conv2d.h"

namespace spatialflow {
namespace {

constexpr int kMaxLevels = 8;
constexpr int kTile = 64;  // pixels and outputs of a block
constexpr int kTaps = 9;
constexpr int kPackedMultiple = 32;

template <typename scalar_t>
struct ConvLevel {
    Global<const scalar_t> x, flow;  // flow: null for none
    Global<scalar_t> out;            // (N, H, W, O)
    int height, width;
    int64_t pixels;                       // N * H * W
    int64_t x_n, x_h, x_w, f_n, f_h, f_w;  // strides
    int tile_begin;                       // first row of tiles of this level
};

template <typename scalar_t>
struct ConvProblem {
    ConvLevel<scalar_t> levels[kMaxLevels];
    int num_levels, in_channels, out_channels, packed_channels;
    bool relu;
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t>
__device__ __forceinline__ int level_of_tile(const ConvProblem<scalar_t>& problem, int tile) {
    int level = 0;
    while (level + 1 < problem.num_levels && tile >= problem.levels[level + 1].tile_begin) {
        ++level;
    }
    return level;
}

// A pixel of a level, or none beyond its end.
struct Pixel {
    int64_t image;
    int y, x;
    bool valid;
};

template <typename scalar_t>
__device__ __forceinline__ Pixel pixel_of(const ConvLevel<scalar_t>& level, int64_t index) {
    if (index >= level.pixels) {
        return {0, 0, 0, false};
    }
    const int64_t row = index / level.width;
    return {row / level.height, static_cast<int>(row % level.height), static_cast<int>(index - row * level.width), true};
}

// kCount channels from `c` on of x + flow at a tap of the pixel; zeros outside the map and beyond the channels. With
// kWidth > 1 that many channels are one access, and the number of channels is a multiple of it.
template <int kCount, int kWidth, typename scalar_t>
__device__ __forceinline__ void load_input(
    const ConvLevel<scalar_t>& level, const Pixel& pixel, int tap, int c, int channels,
    accum_t<scalar_t> (&values)[kCount]) {
    const int y = pixel.y + tap / 3 - 1, x = pixel.x + tap % 3 - 1;
    const bool inside = pixel.valid && y >= 0 && y < level.height && x >= 0 && x < level.width;
    Global<const scalar_t> source = level.x + (pixel.image * level.x_n + y * level.x_h + x * level.x_w);
    Global<const scalar_t> flow = level.flow + (pixel.image * level.f_n + y * level.f_h + x * level.f_w);
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
        const bool present = inside && c + i < channels;
        Vec<scalar_t, kWidth> one{}, other{};
        if (present) {
            one = load_vector<kWidth>(source + (c + i));
            if (level.flow) {
                other = load_vector<kWidth>(flow + (c + i));
            }
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            values[i + j] = static_cast<accum_t<scalar_t>>(load(one[j])) + static_cast<accum_t<scalar_t>>(load(other[j]));
        }
    }
}

// kCount packed weights from output `o` on; zeros beyond the channels. O is padded, so rows are whole vectors.
template <int kCount, typename real_t>
__device__ __forceinline__ void load_weights(
    Global<const real_t> packed, int tap, int c, int o, int channels, int packed_channels, real_t (&values)[kCount]) {
    constexpr int kWidth = kWideElements<real_t>;
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
        Vec<real_t, kWidth> some{};
        if (c < channels && o + i < packed_channels) {
            some = load_vector<kWidth>(
                packed + ((static_cast<int64_t>(tap) * channels + c) * packed_channels + o + i));
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            values[i + j] = some[j];
        }
    }
}

template <typename scalar_t, typename real_t>
__device__ __forceinline__ void store_output(
    const ConvLevel<scalar_t>& level, Global<const real_t> bias, int64_t pixel, int o, int out_channels, bool relu,
    real_t sum) {
    if (pixel >= level.pixels || o >= out_channels) {
        return;
    }
    const real_t value = bias ? sum + bias[o] : sum;
    scalar_t result;
    store(result, relu && value < real_t(0) ? real_t(0) : value);  // NaN stays
    level.out[pixel * out_channels + o] = result;
}

// 16-bit types on the tensor cores.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(128, 3) flow_conv2d_tensor_core_kernel(
    const __grid_constant__ ConvProblem<scalar_t> problem,
    Global<const float> packed,  // (9, C, packed_channels)
    Global<const float> bias) {  // (O) or null
    constexpr int kStep = 32;                                // channels
    constexpr int kInputRow = kStep + 8, kWeightRow = kTile + 8;  // padded, so that 8 rows lie in different banks
    SPATIALFLOW_SHARED(scalar_t, input_tile, kTile * kInputRow);    // [pixel][channel]
    SPATIALFLOW_SHARED(scalar_t, weight_tile, kStep * kWeightRow);  // [channel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    const ConvLevel<scalar_t>& level = problem.levels[level_of_tile(problem, static_cast<int>(blockIdx.x))];
    const int64_t first_pixel = (static_cast<int64_t>(blockIdx.x) - level.tile_begin) * kTile;
    const int first_output = static_cast<int>(blockIdx.y) * kTile;
    // What this thread fetches: 16 channels of a pixel, 16 outputs of a channel.
    const int input_row = thread / 2, input_channel = thread % 2 * 16;
    const int weight_channel = thread / 4, weight_output = thread % 4 * 16;
    const Pixel pixel = pixel_of(level, first_pixel + input_row);

    float inputs[16], weights[16];
    const auto fetch = [&](int tap, int c0) {
        load_input<16, kWidth>(level, pixel, tap, c0 + input_channel, problem.in_channels, inputs);
        load_weights<16>(packed, tap, c0 + weight_channel, first_output + weight_output, problem.in_channels,
                         problem.packed_channels, weights);
    };
    float sums[2][4][4] = {};
    int tap = 0, c0 = 0;
    fetch(tap, c0);
    while (tap < kTaps) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Vec<scalar_t, 8> some_inputs, some_weights;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                store(some_inputs[i], inputs[half * 8 + i]);
                store(some_weights[i], weights[half * 8 + i]);
            }
            store_vector(input_tile + (input_row * kInputRow + input_channel + half * 8), some_inputs);
            store_vector(weight_tile + (weight_channel * kWeightRow + weight_output + half * 8), some_weights);
        }
        __syncthreads();
        c0 += kStep;
        if (c0 >= problem.in_channels) {
            c0 = 0;
            ++tap;
        }
        if (tap < kTaps) {
            fetch(tap, c0);
        }
#pragma unroll
        for (int k = 0; k < kStep; k += 16) {
            unsigned a[2][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ldmatrix_x4(a[i], input_tile + ((warp_row + i * 16 + lane % 16) * kInputRow + k + lane / 16 * 8));
                ldmatrix_x4_trans(b[i], weight_tile + ((k + lane % 16) * kWeightRow + warp_column + i * 16 + lane / 16 * 8));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    mma_16816(sums[i][j], a[i], column, scalar_t{});
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                store_output(level, bias, first_pixel + warp_row + i * 16 + lane / 4 + e / 2 * 8,
                             first_output + warp_column + j * 8 + lane % 4 * 2 + e % 2, problem.out_channels,
                             problem.relu, sums[i][j][e]);
            }
        }
    }
}

// float32 and float64.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(256, 2) flow_conv2d_kernel(
    const __grid_constant__ ConvProblem<scalar_t> problem,
    Global<const scalar_t> packed,  // (9, C, packed_channels)
    Global<const scalar_t> bias) {  // (O) or null
    constexpr int kStep = 16;  // channels
    constexpr int kRow = kTile + 4;
    constexpr int kPart = kWideElements<scalar_t> < 4 ? kWideElements<scalar_t> : 4;
    SPATIALFLOW_SHARED(scalar_t, input_tile, kStep * kRow);    // [channel][pixel]
    SPATIALFLOW_SHARED(scalar_t, weight_tile, kStep * kTile);  // [channel][output]
    const int thread = static_cast<int>(threadIdx.x);
    const int own_row = thread / 16 * 4, own_column = thread % 16 * 4;
    const ConvLevel<scalar_t>& level = problem.levels[level_of_tile(problem, static_cast<int>(blockIdx.x))];
    const int64_t first_pixel = (static_cast<int64_t>(blockIdx.x) - level.tile_begin) * kTile;
    const int first_output = static_cast<int>(blockIdx.y) * kTile;
    const int input_row = thread / 4, input_channel = thread % 4 * 4;
    const int weight_channel = thread / 16, weight_output = thread % 16 * 4;
    const Pixel pixel = pixel_of(level, first_pixel + input_row);

    scalar_t inputs[4], weights[4];
    const auto fetch = [&](int tap, int c0) {
        load_input<4, kWidth>(level, pixel, tap, c0 + input_channel, problem.in_channels, inputs);
        load_weights<4>(packed, tap, c0 + weight_channel, first_output + weight_output, problem.in_channels,
                        problem.packed_channels, weights);
    };
    scalar_t sums[4][4] = {};
    int tap = 0, c0 = 0;
    fetch(tap, c0);
    while (tap < kTaps) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            input_tile[(input_channel + i) * kRow + input_row] = inputs[i];
            weight_tile[weight_channel * kTile + weight_output + i] = weights[i];
        }
        __syncthreads();
        c0 += kStep;
        if (c0 >= problem.in_channels) {
            c0 = 0;
            ++tap;
        }
        if (tap < kTaps) {
            fetch(tap, c0);
        }
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
            scalar_t a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i += kPart) {
                const auto some_inputs = load_vector<kPart>(input_tile + (k * kRow + own_row + i));
                const auto some_weights = load_vector<kPart>(weight_tile + (k * kTile + own_column + i));
#pragma unroll
                for (int j = 0; j < kPart; ++j) {
                    a[i + j] = some_inputs[j];
                    b[i + j] = some_weights[j];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[i][j] += a[i] * b[j];
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            store_output(level, bias, first_pixel + own_row + i, first_output + own_column + j, problem.out_channels,
                         problem.relu, sums[i][j]);
        }
    }
}

template <typename scalar_t>
__global__ void __launch_bounds__(256) pack_conv3x3_kernel(
    Global<const scalar_t> weight,          // (O, C, 3, 3)
    Global<accum_t<scalar_t>> packed,       // (9, C, packed_channels), then zeros up to `size`
    const int64_t channels, const int64_t out_channels, const int64_t packed_channels, const int64_t size) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int64_t o = index % packed_channels, c = index / packed_channels % channels;
    const int64_t tap = index / packed_channels / channels;
    accum_t<scalar_t> value = 0;
    if (o < out_channels && tap < kTaps) {
        const scalar_t stored = weight[(o * channels + c) * kTaps + tap];
        value = load(stored);
    }
    packed[index] = value;
}

// ---- host --------------------------------------------------------------------------------------------------------

ScalarType packed_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

int64_t padded_outputs(int64_t out_channels) { return ceil_div(out_channels, kPackedMultiple) * kPackedMultiple; }

// The size is that of the CPU's packed weights, so that a size needs no word about the device: where those are
// Winograd's 36 numbers, the first 9 are used.
int64_t packed_size(int64_t algorithm, bool is_double, int64_t channels, int64_t out_channels) {
    const bool winograd = !is_double && (algorithm == kConvWinograd ||
                                         (algorithm == kConvAuto && channels >= 32 && out_channels >= 32));
    return (winograd ? 36 : kTaps) * channels * padded_outputs(out_channels);
}

Tensor pack(const Tensor& weight, int64_t size, Stream stream) {
    Tensor packed = empty_like_sized(weight, {size}, packed_type(weight.scalar_type()));
    const Tensor dense = to_contiguous(weight);
    dispatch_floating("pack_conv3x3", weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        launch<pack_conv3x3_kernel<scalar_t>>(
            dim3(grid_size("pack_conv3x3", ceil_div(size, 256))), dim3(256), 0, stream, data<scalar_t>(dense),
            mutable_data<accum_t<scalar_t>>(packed), weight.size(1), weight.size(0), padded_outputs(weight.size(0)),
            size);
    });
    return packed;
}

Tensor pack_conv3x3_cuda(const Tensor& weight, int64_t algorithm) {
    check_conv_weight("pack_conv3x3", weight);
    check_algorithm("pack_conv3x3", algorithm);
    const DeviceScope device(weight);
    const int64_t size =
        packed_size(algorithm, weight.scalar_type() == ScalarType::Double, weight.size(1), weight.size(0));
    return pack(weight, size, device.stream());
}

bool is_wide(const std::vector<Tensor>& levels, int64_t width) {
    for (const Tensor& level : levels) {
        if (level.stride(0) % width != 0 || level.stride(2) % width != 0 || level.stride(3) % width != 0 ||
            !is_aligned(level.const_data_ptr(), 16)) {
            return false;
        }
    }
    return true;
}

std::vector<Tensor> channels_adjacent(const std::vector<Tensor>& levels) {
    std::vector<Tensor> dense;
    for (const Tensor& level : levels) {
        dense.push_back(level.stride(1) == 1 ? level : to_contiguous(level, MemoryFormat::ChannelsLast));
    }
    return dense;
}

template <typename scalar_t, int kWidth>
void launch_convolution(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed, const Tensor* bias,
    const std::vector<Tensor>& out, bool relu, Stream stream) {
    using real_t = accum_t<scalar_t>;
    const int64_t out_channels = out[0].size(1);
    for (size_t first = 0; first < x.size(); first += kMaxLevels) {
        ConvProblem<scalar_t> problem{};
        int64_t tiles = 0;
        for (size_t i = first; i < x.size() && i < first + kMaxLevels; ++i) {
            const Tensor& from = x[i];
            const Tensor& added = flow.empty() ? from : flow[i];
            const int64_t pixels = from.size(0) * from.size(2) * from.size(3);
            problem.levels[problem.num_levels++] = {
                data<scalar_t>(from), flow.empty() ? Global<const scalar_t>(nullptr) : data<scalar_t>(added),
                mutable_data<scalar_t>(out[i]), static_cast<int>(from.size(2)), static_cast<int>(from.size(3)), pixels,
                from.stride(0), from.stride(2), from.stride(3), added.stride(0), added.stride(2), added.stride(3),
                static_cast<int>(tiles)};
            tiles += ceil_div(pixels, kTile);
            check(tiles <= 0x7fffffff, "flow_conv2d: the levels hold too many pixels for one launch");
        }
        problem.in_channels = static_cast<int>(x[0].size(1));
        problem.out_channels = static_cast<int>(out_channels);
        problem.packed_channels = static_cast<int>(padded_outputs(out_channels));
        problem.relu = relu;
        const dim3 grid(grid_size("flow_conv2d", tiles), static_cast<unsigned>(ceil_div(out_channels, kTile)));
        const Global<const real_t> biases = bias ? data<real_t>(*bias) : Global<const real_t>(nullptr);
        if constexpr (sizeof(scalar_t) == 2) {
            launch<flow_conv2d_tensor_core_kernel<scalar_t, kWidth>>(
                grid, dim3(128), 0, stream, problem, data<float>(packed), biases);
        } else {
            launch<flow_conv2d_kernel<scalar_t, kWidth>>(
                grid, dim3(256), 0, stream, problem, data<scalar_t>(packed), biases);
        }
    }
}

std::vector<Tensor> convolve(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, Stream stream) {
    check(x[0].size(1) <= 0x7fffffff && out_channels <= 65535 * int64_t(kTile), "flow_conv2d: too many channels for CUDA");
    std::vector<Tensor> out;
    for (const Tensor& level : x) {
        check(level.size(2) <= 0x7fffffff && level.size(3) <= 0x7fffffff, "flow_conv2d: x must have sides below 2^31");
        out.push_back(empty_like_sized(
            level, {level.size(0), out_channels, level.size(2), level.size(3)}, std::nullopt,
            MemoryFormat::ChannelsLast));
    }
    if (out_channels != 0) {
        const std::vector<Tensor> dense_x = channels_adjacent(x), dense_flow = channels_adjacent(flow);
        const std::optional<Tensor> wide_bias =
            bias ? std::optional<Tensor>(contiguous_as(*bias, packed.scalar_type())) : std::nullopt;
        const Tensor* biases = wide_bias ? &*wide_bias : nullptr;
        dispatch_floating("flow_conv2d", x[0].scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            constexpr int kWidth = std::is_same_v<scalar_t, double> ? 2 : sizeof(scalar_t) == 4 ? 4 : 8;
            if (x[0].size(1) % kWidth == 0 && is_wide(dense_x, kWidth) && is_wide(dense_flow, kWidth)) {
                launch_convolution<scalar_t, kWidth>(dense_x, dense_flow, packed, biases, out, relu, stream);
            } else {
                launch_convolution<scalar_t, 1>(dense_x, dense_flow, packed, biases, out, relu, stream);
            }
        });
    }
    for (size_t i = 0; i < x.size(); ++i) {
        if (memory_format_of(x[i]) == MemoryFormat::Contiguous) {
            out[i] = to_contiguous(out[i]);
        }
    }
    return out;
}

std::vector<Tensor> flow_conv2d_cuda(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& weight,
    const std::optional<Tensor>& bias, bool relu, int64_t algorithm) {
    check_flow_conv2d(x, flow, weight, bias, algorithm);
    if (x.empty()) {
        return {};
    }
    const DeviceScope device(weight);
    const Tensor packed = pack(weight, kTaps * weight.size(1) * padded_outputs(weight.size(0)), device.stream());
    return convolve(x, flow, packed, bias, weight.size(0), relu, device.stream());
}

std::vector<Tensor> flow_conv2d_packed_cuda(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t algorithm) {
    check_algorithm("flow_conv2d", algorithm);
    if (x.empty()) {
        return {};
    }
    check_dim("flow_conv2d", "x[0]", x[0], 4, "(N, C, H, W)");
    check_floating("flow_conv2d", "x[0]", x[0]);
    const int64_t in_channels = x[0].size(1);
    check_conv_inputs("flow_conv2d", x, flow, in_channels, x[0], "x[0]");
    check_conv_bias("flow_conv2d", bias, out_channels, x[0], "x[0]");
    check_dtype("flow_conv2d", "packed weight", packed, packed_type(x[0].scalar_type()));
    check_same_device("flow_conv2d", "packed weight", packed, "x[0]", x[0]);
    const bool is_double = packed.scalar_type() == ScalarType::Double;
    check(out_channels >= 0 && packed.is_contiguous() &&
              packed.numel() == packed_size(algorithm, is_double, in_channels, out_channels),
          "flow_conv2d: the packed weight was made for other channels or another algorithm than x with ", in_channels,
          " channels and ", out_channels, " outputs");
    const DeviceScope device(x[0]);
    return convolve(x, flow, packed, bias, out_channels, relu, device.stream());
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("flow_conv2d", TORCH_BOX(&spatialflow::flow_conv2d_cuda));
    library.impl("_pack_conv3x3", TORCH_BOX(&spatialflow::pack_conv3x3_cuda));
    library.impl("_flow_conv2d_packed", TORCH_BOX(&spatialflow::flow_conv2d_packed_cuda));
}
