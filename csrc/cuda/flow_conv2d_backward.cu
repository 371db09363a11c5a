// SPDX-License-Identifier: Apache-2.0
//
// Gradient of flow_conv2d for its weights, over all levels, on CUDA:
//
//   grad_weight[o, c, t] = sum over levels, images, pixels p of grad_output[p, o] * (x + flow)[p + t, c]
//
// (The gradient for x and flow is flow_conv2d itself with the weights turned round, that for the bias a sum of pixels.)
// Nine matrix products (outputs x pixels) by (pixels x channels), one per tap, that share their left side and, shifted,
// their right side. Sources (N, H, W, C) and gradients (N, H, W, O) by strides, channels adjacent; result (O, C, 3, 3).
//
// A block owns a rectangle of outputs and channels for all nine taps and runs over a part of the tiles of 8 x 8 pixels:
// it brings the gradients of a tile and x + flow of the tile and its rim into shared memory once for nine products. The
// parts' sums (part, 9, O, C) are added in their order by a second kernel. How many parts there are depends on the
// sizes alone, so the result has the same bits in every run and on every device.
//
//   16-bit types   64 outputs x 64 channels per block of 9 warps, a tap each: 64 x 64 by mma.sync with float32 sums;
//                  the transposed left side comes from ldmatrix.trans. The next tile comes into the other half of
//                  shared memory: gradients by cp.async, inputs through registers, a piece per step.
//   float32, 64    32 outputs x 32 channels per block of 8 warps: a lane a channel, a warp four outputs, 36 sums a
//                  thread; a window of 3 x 3 inputs slides along the row, so a pixel costs 3 inputs and a broadcast of
//                  4 gradients for 36 multiply-adds.
//
// A value that is not finite at the border of a map may reach all taps of its channel, also those that leave the map.
//
// Floor (H100, 790 TFLOP/s bf16, 3.0 TB/s), 256 to 256 channels, P3..P7 of 800 x 1333: 26 GFLOP: 33 us; x, flow and
// gradients 34 MB, parts 38 MB: 24 us. Expected: 70 us (mma.sync gives about 60 % of the rate, squares cover 9 % more
// pixels than there are), and 10 us of the second kernel.
#include <algorithm>

#include "cuda/conv3x3.h"
#include "cuda/tensor_core.h"

namespace spatialflow {
namespace {

constexpr int kMaxLevels = 16;
constexpr int kSide = 8, kPixels = kSide * kSide, kRimSide = kSide + 2, kRim = kRimSide * kRimSide;

template <typename scalar_t>
struct GradientLevel {
    ConvSource<scalar_t> input, gradient;
    int tile_begin, tile_rows, tile_columns;
};

template <typename scalar_t>
struct GradientTable {
    GradientLevel<scalar_t> levels[kMaxLevels];
    int num_levels, num_tiles;
    int parts;  // blockIdx.z of them share the tiles
};

// ---- device ------------------------------------------------------------------------------------------------------

// The tiles of a part, and what a block reads of one.
template <typename scalar_t>
struct TileReader {
    const GradientTable<scalar_t>& table;
    int tile, end, level;
    MapTile map;

    __device__ __forceinline__ explicit TileReader(const GradientTable<scalar_t>& table) : table(table) {
        const int64_t part = blockIdx.z, tiles = table.num_tiles;
        tile = static_cast<int>(tiles * part / table.parts);
        end = static_cast<int>(tiles * (part + 1) / table.parts);
        locate();
    }
    __device__ __forceinline__ bool valid() const { return tile < end; }
    __device__ __forceinline__ int buffer() const { return tile % 2; }  // half of shared memory that the tile goes to
    __device__ __forceinline__ void advance() {
        ++tile;
        locate();
    }
    __device__ __forceinline__ void locate() {
        level = entry_of_tile(table.levels, table.num_levels, tile);
        const GradientLevel<scalar_t>& own = table.levels[level];
        map = map_tile<kSide, kSide>(tile - own.tile_begin, own.tile_rows, own.tile_columns);
    }
    // Channels from `c` on of x + flow at a pixel of the tile and its rim.
    template <int kCount, int kAccess>
    __device__ __forceinline__ Vec<scalar_t, kCount> input(int pixel, int c) const {
        return load_sum<kCount, kAccess>(table.levels[level].input, map.image, map.y + pixel / kRimSide - 1,
                                         map.x + pixel % kRimSide - 1, c);
    }
    // Eight of them, not yet added.
    template <int kAccess>
    __device__ __forceinline__ SumTerms input_terms(int pixel, int c) const {
        return load_terms<kAccess>(table.levels[level].input, map.image, map.y + pixel / kRimSide - 1,
                                   map.x + pixel % kRimSide - 1, c);
    }
    // Outputs from `o` on of the gradient at a pixel of the tile.
    template <int kCount, int kAccess>
    __device__ __forceinline__ Vec<scalar_t, kCount> gradient(int pixel, int o) const {
        return load_sum<kCount, kAccess>(
            table.levels[level].gradient, map.image, map.y + pixel / kSide, map.x + pixel % kSide, o);
    }
    // Eight of them to shared memory, on their way until cp_async_wait.
    template <int kAccess>
    __device__ __forceinline__ void copy_gradient(const Shared<scalar_t>& target, int pixel, int o) const {
        if constexpr (kAccess == 8) {
            const ConvSource<scalar_t>& source = table.levels[level].gradient;
            const int y = map.y + pixel / kSide, x = map.x + pixel % kSide;
            const bool valid = y < source.height && x < source.width && o < source.channels;
            cp_async_16(
                target,
                source.x + (valid ? map.image * source.x_n + y * source.x_h + x * source.x_w + o : int64_t(0)), valid);
        } else {
            store_vector(target, gradient<8, kAccess>(pixel, o));
        }
    }
};

// Sizes of the tensor-core kernel.
struct Wide {
    static constexpr int kThreads = kTaps * kWarpSize;
    static constexpr int kOutputs = 64, kChannels = 64;
    static constexpr int kRow = 64 + 8;  // of both shared arrays: eight rows lie in different banks
    static constexpr int kInputVectors = kRim * kChannels / 8, kGradientVectors = kPixels * kOutputs / 8;
    static constexpr int kInputPieces = (kInputVectors + kThreads - 1) / kThreads;
    static constexpr int kSteps = kPixels / 16;
    static constexpr int kBuffer = (kRim + kPixels) * kRow;  // elements
    static constexpr size_t kSharedBytes = 2 * 2 * kBuffer;
    static_assert(kInputPieces <= kSteps, "a tile comes in while one is multiplied");
};

// 16-bit types on the tensor cores.
template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(Wide::kThreads, 1) conv3x3_weight_gradient_tensor_core_kernel(
    const __grid_constant__ GradientTable<scalar_t> table,
    Global<float> sums_out,  // (parts, 9, O, C)
    const int outputs, const int channels) {
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, shared);  // 2 x (inputs [pixel with rim][channel], gradients [pixel][output])
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, tap = thread / kWarpSize;
    const int first_output = static_cast<int>(blockIdx.x) * Wide::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * Wide::kChannels;

    const auto fetch_inputs = [&](const TileReader<scalar_t>& reader, int piece) {
        const int index = piece * Wide::kThreads + thread;
        return index < Wide::kInputVectors
                   ? reader.template input_terms<kAccess>(index / 8, first_channel + index % 8 * 8)
                   : SumTerms{};
    };
    const auto keep_inputs = [&](int buffer, int piece, const SumTerms& terms) {
        const int index = piece * Wide::kThreads + thread;
        if (index < Wide::kInputVectors) {
            store_vector(
                pointer_cast<unsigned>(shared + (buffer * Wide::kBuffer + index / 8 * Wide::kRow + index % 8 * 8)),
                sum_of<scalar_t>(terms));
        }
    };
    const auto copy_gradients = [&](const TileReader<scalar_t>& reader, int buffer) {
#pragma unroll 1
        for (int index = thread; index < Wide::kGradientVectors; index += Wide::kThreads) {
            reader.template copy_gradient<kAccess>(
                shared + (buffer * Wide::kBuffer + (kRim + index / 8) * Wide::kRow + index % 8 * 8), index / 8,
                first_output + index % 8 * 8);
        }
        cp_async_commit();
    };

    TileReader<scalar_t> reader(table);
    copy_gradients(reader, reader.buffer());
    for (int piece = 0; piece < Wide::kInputPieces; ++piece) {
        keep_inputs(reader.buffer(), piece, fetch_inputs(reader, piece));
    }
    // The rows of shared memory that this lane points ldmatrix at. A step is 16 pixels, two rows of the tile.
    constexpr int kInputStep = 2 * kRimSide * Wide::kRow, kGradientStep = 2 * kSide * Wide::kRow;
    auto inputs = shared + (reader.buffer() * Wide::kBuffer +
                            ((lane / 8 % 2 + tap / 3) * kRimSide + lane % 8 + tap % 3) * Wide::kRow + lane / 16 * 8);
    auto gradients = shared + (reader.buffer() * Wide::kBuffer +
                               (kRim + lane / 16 * 8 + lane % 8) * Wide::kRow + lane / 8 % 2 * 8);
    float sums[4][8][4] = {};
    while (reader.valid()) {
        reader.advance();
        cp_async_wait<0>();
        __syncthreads();
        if (reader.valid()) {
            copy_gradients(reader, reader.buffer());
        }
#pragma unroll 1
        for (int step = 0; step < Wide::kSteps; ++step) {
            const bool fetching = step < Wide::kInputPieces && reader.valid();
            SumTerms terms{};
            if (fetching) {
                terms = fetch_inputs(reader, step);
            }
            unsigned b[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                ldmatrix_x4_trans(b[j], inputs + j * 16);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned a[4];
                ldmatrix_x4_trans(a, gradients + i * 16);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const unsigned column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    mma_16816(sums[i][j], a, column, scalar_t{});
                }
            }
            if (fetching) {
                keep_inputs(reader.buffer(), step, terms);
            }
            inputs += kInputStep;
            gradients += kGradientStep;
        }
        // On to the other half: pointers that go back and forth take fewer registers than ones made anew.
        const int turn = reader.buffer() == 0 ? -Wide::kBuffer : Wide::kBuffer;
        inputs += turn - Wide::kSteps * kInputStep;
        gradients += turn - Wide::kSteps * kGradientStep;
    }
    const Global<float> target = sums_out + (static_cast<int64_t>(blockIdx.z) * kTaps + tap) * outputs * channels;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int o = first_output + i * 16 + lane / 4 + e / 2 * 8;
                const int c = first_channel + j * 8 + lane % 4 * 2 + e % 2;
                if (o < outputs && c < channels) {
                    target[static_cast<int64_t>(o) * channels + c] = sums[i][j][e];
                }
            }
        }
    }
}

// Sizes of the kernel for float32 and float64.
struct Plain {
    static constexpr int kThreads = 256;
    static constexpr int kOutputs = 32, kChannels = kWarpSize;
    static constexpr int kOwnOutputs = kOutputs / (kThreads / kWarpSize);  // of a warp
};

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(Plain::kThreads) conv3x3_weight_gradient_kernel(
    const __grid_constant__ GradientTable<scalar_t> table,
    Global<scalar_t> sums_out,  // (parts, 9, O, C)
    const int outputs, const int channels) {
    constexpr int kPart = kWideElements<scalar_t>;
    SPATIALFLOW_SHARED(scalar_t, inputs, kRim * Plain::kChannels);       // [pixel with rim][channel]
    SPATIALFLOW_SHARED(scalar_t, gradients, kPixels * Plain::kOutputs);  // [pixel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int own_output = thread / kWarpSize * Plain::kOwnOutputs;
    const int first_output = static_cast<int>(blockIdx.x) * Plain::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * Plain::kChannels;
    // A thread whose sums belong to no weight only helps to fetch.
    const bool busy = first_output + own_output < outputs && first_channel + lane < channels;
    scalar_t sums[Plain::kOwnOutputs][kTaps] = {};
    for (TileReader<scalar_t> reader(table); reader.valid(); reader.advance()) {
        for (int i = thread; i < kRim * Plain::kChannels / 4; i += Plain::kThreads) {
            const int pixel = i / (Plain::kChannels / 4), c = i % (Plain::kChannels / 4) * 4;
            const Vec<scalar_t, 4> values = reader.template input<4, kAccess>(pixel, first_channel + c);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                inputs[pixel * Plain::kChannels + c + j] = values[j];
            }
        }
        for (int i = thread; i < kPixels * Plain::kOutputs / 4; i += Plain::kThreads) {
            const int pixel = i / (Plain::kOutputs / 4), o = i % (Plain::kOutputs / 4) * 4;
            const Vec<scalar_t, 4> values = reader.template gradient<4, kAccess>(pixel, first_output + o);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                gradients[pixel * Plain::kOutputs + o + j] = values[j];
            }
        }
        __syncthreads();
        for (int y = 0; busy && y < kSide; ++y) {
            scalar_t window[3][3];  // [row][column] of inputs around the pixel
#pragma unroll
            for (int row = 0; row < 3; ++row) {
#pragma unroll
                for (int column = 1; column < 3; ++column) {
                    window[row][column] = inputs[((y + row) * kRimSide + column - 1) * Plain::kChannels + lane];
                }
            }
#pragma unroll
            for (int x = 0; x < kSide; ++x) {
#pragma unroll
                for (int row = 0; row < 3; ++row) {
                    window[row][0] = window[row][1];
                    window[row][1] = window[row][2];
                    window[row][2] = inputs[((y + row) * kRimSide + x + 2) * Plain::kChannels + lane];
                }
#pragma unroll
                for (int part = 0; part < Plain::kOwnOutputs; part += kPart) {
                    const auto some =
                        load_vector<kPart>(gradients + ((y * kSide + x) * Plain::kOutputs + own_output + part));
#pragma unroll
                    for (int i = 0; i < kPart; ++i) {
#pragma unroll
                        for (int tap = 0; tap < kTaps; ++tap) {
                            sums[part + i][tap] += some[i] * window[tap / 3][tap % 3];
                        }
                    }
                }
            }
        }
        __syncthreads();
    }
    const int c = first_channel + lane;
#pragma unroll
    for (int i = 0; i < Plain::kOwnOutputs; ++i) {
        const int o = first_output + own_output + i;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            if (busy && o < outputs) {
                const int64_t row = (static_cast<int64_t>(blockIdx.z) * kTaps + tap) * outputs + o;
                sums_out[row * channels + c] = sums[i][tap];
            }
        }
    }
}

// The sum over parts, in their order: a thread per output and channel.
template <typename scalar_t>
__global__ void __launch_bounds__(256) conv3x3_weight_gradient_sum_kernel(
    Global<const accum_t<scalar_t>> sums,  // (parts, 9, O, C)
    Global<scalar_t> grad_weight,          // (O, C, 9)
    const int64_t weights, const int parts) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= weights) {
        return;
    }
    accum_t<scalar_t> total[kTaps] = {};
    for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            total[tap] += sums[(static_cast<int64_t>(part) * kTaps + tap) * weights + index];
        }
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
        scalar_t value;
        store(value, total[tap]);
        grad_weight[index * kTaps + tap] = value;
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Blocks in all that parts are made for: twice what fills the multiprocessors of a large card.
template <typename scalar_t>
constexpr int64_t kWantedBlocks = sizeof(scalar_t) == 2 ? 264 : 1056;

template <typename scalar_t>
std::vector<GradientTable<scalar_t>> gradient_tables(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t blocks_of_a_part) {
    const char* op = "flow_conv2d_weight_gradient";
    std::vector<GradientTable<scalar_t>> tables;
    for (size_t i = 0; i < x.size(); ++i) {
        const int64_t rows = ceil_div(x[i].size(2), kSide), columns = ceil_div(x[i].size(3), kSide);
        const int64_t tiles = x[i].size(0) * rows * columns;
        if (tiles == 0) {
            continue;
        }
        if (tables.empty() || tables.back().num_levels == kMaxLevels) {
            tables.emplace_back();
        }
        GradientTable<scalar_t>& table = tables.back();
        check(table.num_tiles + tiles < 0x7fffffff, op, ": the levels hold too many pixels for one launch");
        table.levels[table.num_levels++] = {
            conv_source<scalar_t>(op, x[i], flow.empty() ? nullptr : &flow[i]),
            conv_source<scalar_t>(op, grad_output[i], nullptr), table.num_tiles, static_cast<int>(rows),
            static_cast<int>(columns)};
        table.num_tiles += static_cast<int>(tiles);
    }
    for (GradientTable<scalar_t>& table : tables) {
        const int64_t wanted = std::max<int64_t>(1, kWantedBlocks<scalar_t> / blocks_of_a_part);
        table.parts = static_cast<int>(std::min<int64_t>(wanted, table.num_tiles));
    }
    return tables;
}

template <typename scalar_t>
void launch_gradient(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    const Tensor& grad_weight, Stream stream) {
    using real_t = accum_t<scalar_t>;
    constexpr bool kIsWide = sizeof(scalar_t) == 2;
    const int64_t outputs = grad_weight.size(0), channels = grad_weight.size(1);
    const int64_t output_blocks = ceil_div(outputs, kIsWide ? Wide::kOutputs : Plain::kOutputs);
    const int64_t channel_blocks = ceil_div(channels, kIsWide ? Wide::kChannels : Plain::kChannels);
    check(channel_blocks <= 65535, "flow_conv2d_weight_gradient: too many channels for CUDA, got ", channels);
    const std::vector<GradientTable<scalar_t>> tables =
        gradient_tables<scalar_t>(x, flow, grad_output, output_blocks * channel_blocks);
    int parts = 0;
    for (const GradientTable<scalar_t>& table : tables) {
        parts += table.parts;
    }
    const Tensor sums = empty_like_sized(
        grad_weight, {parts, kTaps, outputs, channels}, accum_dtype(grad_weight.scalar_type()));
    const bool wide = has_wide_channels<scalar_t>(x) && has_wide_channels<scalar_t>(flow) &&
                      has_wide_channels<scalar_t>(grad_output);
    Global<real_t> target = mutable_data<real_t>(sums);
    for (const GradientTable<scalar_t>& table : tables) {
        const dim3 blocks(grid_size("flow_conv2d_weight_gradient", output_blocks),
                          static_cast<unsigned>(channel_blocks), static_cast<unsigned>(table.parts));
        const auto run = [&](auto access) {
            constexpr int kAccess = decltype(access)::value;
            if constexpr (kIsWide) {
                launch<conv3x3_weight_gradient_tensor_core_kernel<scalar_t, kAccess>>(
                    blocks, dim3(Wide::kThreads), Wide::kSharedBytes, stream, table, target, static_cast<int>(outputs),
                    static_cast<int>(channels));
            } else {
                launch<conv3x3_weight_gradient_kernel<scalar_t, kAccess>>(
                    blocks, dim3(Plain::kThreads), 0, stream, table, target, static_cast<int>(outputs),
                    static_cast<int>(channels));
            }
        };
        if (wide) {
            run(std::integral_constant<int, kWideElements<scalar_t>>{});
        } else {
            run(std::integral_constant<int, 1>{});
        }
        target = target + table.parts * kTaps * outputs * channels;
    }
    launch<conv3x3_weight_gradient_sum_kernel<scalar_t>>(
        dim3(grid_size("flow_conv2d_weight_gradient", ceil_div(outputs * channels, 256))), dim3(256), 0, stream,
        data<real_t>(sums), mutable_data<scalar_t>(grad_weight), outputs * channels, parts);
}

Tensor weight_gradient_cuda(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t algorithm) {
    check_conv_weight_gradient(x, flow, grad_output, algorithm);
    const DeviceScope device(x[0]);
    const Tensor grad_weight = empty_like_sized(x[0], {grad_output[0].size(1), x[0].size(1), 3, 3});
    if (grad_weight.numel() != 0) {
        dispatch_floating("flow_conv2d_weight_gradient", x[0].scalar_type(), [&](auto zero) {
            launch_gradient<decltype(zero)>(
                channels_adjacent(x), channels_adjacent(flow), channels_adjacent(grad_output), grad_weight,
                device.stream());
        });
    }
    return grad_weight;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("_flow_conv2d_weight_gradient", TORCH_BOX(&spatialflow::weight_gradient_cuda));
}
