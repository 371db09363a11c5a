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
// A block owns a rectangle of outputs and channels for all nine taps and runs over a part of the tiles of pixels. It
// loads the gradients of a tile, and x + flow of the tile and its halo, into shared memory once for nine products.
// A second kernel adds the parts' sums (part, 9, O, C) in their order. The number of parts depends on the sizes alone,
// so the result has the same bits in every run and on every device.
//
//   16-bit types   64 outputs x 64 channels per block of 8 warps, each 32 x 16 for all taps by mma.sync with float32
//                  sums. A step is 2 rows of 8 pixels: rows of inputs, from ldmatrix.trans, serve all taps from
//                  registers, and the last ones the next step too. The next tile (16 x 8 pixels) comes into the other
//                  half of shared memory: gradients by cp.async, inputs through registers, a piece per step.
//   float32, 64    32 outputs x 32 channels per block of 8 warps: a lane a channel, a warp four outputs, 36 sums a
//                  thread; a window of 3 x 3 inputs slides along the row, so a pixel costs 3 inputs and a broadcast of
//                  4 gradients for 36 multiply-adds.
//
// A value that is not finite at the border of a map may reach all taps of its channel, also those that leave the map.
//
// Floor (H100, 790 TFLOP/s bf16, 3.0 TB/s), 256 to 256 channels, P3..P7 of 800 x 1333: 26 GFLOP: 33 us; x, flow and
// gradients 34 MB, parts 19 MB: 18 us. Expected: 65 us (mma.sync gives about 60 % of the rate, rectangles cover 15 %
// more pixels than there are), and 7 us of the second kernel.
#include <algorithm>

#include "cuda/conv3x3.h"
#include "cuda/tensor_core.h"

namespace spatialflow {
namespace {

constexpr int kMaxLevels = 16;

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

// The tiles of a part: every so many of all, so that parts take about as long as each other.
template <int kHeight, int kWidth, typename scalar_t>
struct TileReader {
    const GradientTable<scalar_t>& table;
    int tile, level;
    MapTile map;

    __device__ __forceinline__ explicit TileReader(const GradientTable<scalar_t>& table)
        : table(table), tile(static_cast<int>(blockIdx.z)) {
        locate();
    }
    __device__ __forceinline__ bool valid() const { return tile < table.num_tiles; }
    __device__ __forceinline__ void advance() {
        tile += table.parts;
        locate();
    }
    __device__ __forceinline__ void locate() {
        level = entry_of_tile(table.levels, table.num_levels, tile);
        const GradientLevel<scalar_t>& own = table.levels[level];
        map = map_tile<kHeight, kWidth>(tile - own.tile_begin, own.tile_rows, own.tile_columns);
    }
};

// Sizes of the tensor-core kernel.
struct Wide {
    static constexpr int kThreads = 256;
    static constexpr int kOutputs = 64, kChannels = 64;
    static constexpr int kHeight = 16, kWidth = 8, kPixels = kHeight * kWidth, kRimWidth = kWidth + 2;
    static constexpr int kSteps = kHeight / 2;                 // of 16 pixels
    static constexpr int kPiece = kThreads / (kChannels / 8);  // pixels
    static constexpr int kPieces = ((kHeight + 2) * kRimWidth + kPiece - 1) / kPiece;
    static constexpr int kInputs = kPieces * kPiece;  // pixels with halo, filled up to whole pieces
    static constexpr int kRow = 64 + 8;               // of both shared arrays: eight rows lie in different banks
    static constexpr int kBuffer = (kInputs + kPixels) * kRow;  // elements
    static constexpr size_t kSharedBytes = 2 * 2 * kBuffer;
    static_assert(kPieces <= kSteps, "a tile comes in while one is multiplied");
};

// 16-bit types on the tensor cores.
template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(Wide::kThreads, 1) conv3x3_weight_gradient_tensor_core_kernel(
    const __grid_constant__ GradientTable<scalar_t> table,
    Global<float> sums_out,  // (parts, 9, O, C)
    const int outputs, const int channels) {
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, shared);  // 2 x (inputs [pixel with halo][channel], gradients [pixel][output])
    SPATIALFLOW_SHARED(int64_t, places, 2 * Wide::kInputs);  // of InputReader
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int first_output = static_cast<int>(blockIdx.x) * Wide::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * Wide::kChannels;
    const int warp_output = warp % 2 * 32, warp_channel = warp / 2 * 16;

    // What this thread brings: eight channels, and eight outputs, of a pixel of each piece.
    const int own_vector = thread % 8 * 8, own_pixel = thread / 8;
    InputReader<Wide::kHeight, Wide::kWidth, Wide::kInputs, scalar_t> reader;
    auto input_target = pointer_cast<unsigned>(shared + (own_pixel * Wide::kRow + own_vector));
    auto gradient_target = shared + ((Wide::kInputs + own_pixel) * Wide::kRow + own_vector);
    const auto begin_inputs = [&](const GradientLevel<scalar_t>& level, const MapTile& map) {
        reader.begin(level.input, map, first_channel + own_vector, places);
    };
    const auto fetch_inputs = [&](int piece) {
        return reader.template fetch<kAccess>(places, piece * Wide::kPiece + own_pixel);
    };
    const auto keep_inputs = [&](int piece, const SumTerms& terms) {
        store_vector(input_target + piece * (Wide::kPiece * Wide::kRow / 2), sum_of<scalar_t>(terms));
    };
    const auto copy_gradients = [&](const GradientLevel<scalar_t>& level, const MapTile& map) {
        const ConvSource<scalar_t>& source = level.gradient;
        const int y = map.y + own_pixel / Wide::kWidth, x = map.x + own_pixel % Wide::kWidth;
        const int left = x < source.width ? source.channels - first_output - own_vector : 0;
        Global<const scalar_t> pixel =
            source.x + (map.image * source.x_n + y * source.x_h + x * source.x_w + first_output + own_vector);
#pragma unroll
        for (int i = 0; i < Wide::kPixels / Wide::kPiece; ++i) {
            constexpr int kRows = Wide::kPiece / Wide::kWidth;
            const auto target = gradient_target + i * Wide::kPiece * Wide::kRow;
            const int present = y + i * kRows < source.height ? left : 0;
            if constexpr (kAccess == 8) {
                cp_async_16(target, pixel, present > 0);
            } else {
                store_vector(pointer_cast<unsigned>(target), load_words<kAccess>(pixel, present));
            }
            pixel += kRows * source.x_h;
        }
        cp_async_commit();
    };

    TileReader<Wide::kHeight, Wide::kWidth, scalar_t> tiles(table);
    copy_gradients(table.levels[tiles.level], tiles.map);
    begin_inputs(table.levels[tiles.level], tiles.map);
    __syncthreads();
    {
        SumTerms pieces[Wide::kPieces];
#pragma unroll
        for (int piece = 0; piece < Wide::kPieces; ++piece) {
            pieces[piece] = fetch_inputs(piece);
        }
#pragma unroll
        for (int piece = 0; piece < Wide::kPieces; ++piece) {
            keep_inputs(piece, pieces[piece]);
        }
    }
    // The rows of shared memory that this lane points ldmatrix at.
    constexpr int kInputStep = 2 * Wide::kRimWidth * Wide::kRow, kGradientStep = 2 * Wide::kWidth * Wide::kRow;
    auto inputs = shared + ((lane / 8 % 2 * Wide::kRimWidth + lane % 8) * Wide::kRow + warp_channel + lane / 16 * 8);
    auto gradients =
        shared + ((Wide::kInputs + lane / 16 * 8 + lane % 8) * Wide::kRow + warp_output + lane / 8 % 2 * 8);
    int turn = Wide::kBuffer;  // to the other half
    float sums[kTaps][2][2][4] = {};
    while (tiles.valid()) {
        const int steps = (table.levels[tiles.level].gradient.height - tiles.map.y + 1) / 2;
        tiles.advance();
        cp_async_wait<0>();
        __syncthreads();
        input_target += turn / 2;
        gradient_target += turn;
        reader.end();
        if (tiles.valid()) {
            begin_inputs(table.levels[tiles.level], tiles.map);
            copy_gradients(table.levels[tiles.level], tiles.map);
        }
        __syncthreads();
        // Right sides of a step, by row of taps: rows[t][x] is rows t and t + 1 of inputs, for column x of taps.
        unsigned rows[3][3][4];
        const auto load_rows = [&](int row) {
#pragma unroll
            for (int x = 0; x < 3; ++x) {
                ldmatrix_x4_trans(rows[row][x], inputs + (row * Wide::kRimWidth + x) * Wide::kRow);
            }
        };
        load_rows(0);
#pragma unroll 1
        for (int step = 0; step < Wide::kSteps; ++step) {
            SumTerms terms{};
            if (step < Wide::kPieces) {
                terms = fetch_inputs(step);
            }
            if (step < steps) {
                unsigned a[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    ldmatrix_x4_trans(a[i], gradients + i * 16);
                }
                load_rows(1);
                load_rows(2);
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) {
                    const unsigned(&own)[4] = rows[tap / 3][tap % 3];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const unsigned column[2] = {own[i % 2 * 2], own[i % 2 * 2 + 1]};
                        mma_16816(sums[tap][i / 2][i % 2], a[i / 2], column, scalar_t{});
                    }
                }
                // The last row of taps has what the first one takes next.
#pragma unroll
                for (int i = 0; i < 12; ++i) {
                    rows[0][i / 4][i % 4] = rows[2][i / 4][i % 4];
                }
            }
            inputs += kInputStep;
            gradients += kGradientStep;
            if (step < Wide::kPieces) {
                keep_inputs(step, terms);
            }
        }
        inputs += turn - Wide::kSteps * kInputStep;
        gradients += turn - Wide::kSteps * kGradientStep;
        turn = -turn;
    }
    const bool paired = channels % 2 == 0;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int o = first_output + warp_output + i / 4 * 16 + i % 2 * 8 + lane / 4;
            const int c = first_channel + warp_channel + i / 2 % 2 * 8 + lane % 4 * 2;
            const float(&sum)[4] = sums[tap][i / 4][i / 2 % 2];
            const Vec<float, 2> pair = {{sum[i % 2 * 2], sum[i % 2 * 2 + 1]}};
            const Global<float> target =
                sums_out + (((static_cast<int64_t>(blockIdx.z) * kTaps + tap) * outputs + o) * channels + c);
            if (o < outputs && c < channels) {
                if (paired) {
                    store_vector(target, pair);
                } else {
                    target[0] = pair[0];
                    if (c + 1 < channels) {
                        target[1] = pair[1];
                    }
                }
            }
        }
    }
}

// Sizes of the kernel for float32 and float64.
struct Plain {
    static constexpr int kThreads = 256;
    static constexpr int kOutputs = 32, kChannels = kWarpSize;
    static constexpr int kSide = 8, kHeight = kSide, kWidth = kSide, kPixels = kSide * kSide;
    static constexpr int kHaloSide = kSide + 2, kHalo = kHaloSide * kHaloSide;
    static constexpr int kOwnOutputs = kOutputs / (kThreads / kWarpSize);  // of a warp
};

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(Plain::kThreads, 1) conv3x3_weight_gradient_kernel(
    const __grid_constant__ GradientTable<scalar_t> table,
    Global<scalar_t> sums_out,  // (parts, 9, O, C)
    const int outputs, const int channels) {
    constexpr int kPart = kWideElements<scalar_t>;
    SPATIALFLOW_SHARED(scalar_t, inputs, Plain::kHalo * Plain::kChannels);       // [pixel with halo][channel]
    SPATIALFLOW_SHARED(scalar_t, gradients, Plain::kPixels * Plain::kOutputs);  // [pixel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int own_output = thread / kWarpSize * Plain::kOwnOutputs;
    const int first_output = static_cast<int>(blockIdx.x) * Plain::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * Plain::kChannels;
    // A thread whose sums belong to no weight only helps to fetch.
    const bool busy = first_output + own_output < outputs && first_channel + lane < channels;
    scalar_t sums[Plain::kOwnOutputs][kTaps] = {};
    for (TileReader<Plain::kSide, Plain::kSide, scalar_t> tiles(table); tiles.valid(); tiles.advance()) {
        const GradientLevel<scalar_t>& level = table.levels[tiles.level];
        const MapTile& map = tiles.map;
        for (int i = thread; i < Plain::kHalo * Plain::kChannels / 4; i += Plain::kThreads) {
            const int pixel = i / (Plain::kChannels / 4), c = i % (Plain::kChannels / 4) * 4;
            const Vec<scalar_t, 4> values =
                load_sum<4, kAccess>(level.input, map.image, map.y + pixel / Plain::kHaloSide - 1,
                                     map.x + pixel % Plain::kHaloSide - 1, first_channel + c);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                inputs[pixel * Plain::kChannels + c + j] = values[j];
            }
        }
        for (int i = thread; i < Plain::kPixels * Plain::kOutputs / 4; i += Plain::kThreads) {
            const int pixel = i / (Plain::kOutputs / 4), o = i % (Plain::kOutputs / 4) * 4;
            const Vec<scalar_t, 4> values =
                load_sum<4, kAccess>(level.gradient, map.image, map.y + pixel / Plain::kSide,
                                     map.x + pixel % Plain::kSide, first_output + o);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                gradients[pixel * Plain::kOutputs + o + j] = values[j];
            }
        }
        __syncthreads();
        for (int y = 0; busy && y < Plain::kSide; ++y) {
            scalar_t window[3][3];  // [row][column] of inputs around the pixel
#pragma unroll
            for (int row = 0; row < 3; ++row) {
#pragma unroll
                for (int column = 1; column < 3; ++column) {
                    window[row][column] = inputs[((y + row) * Plain::kHaloSide + column - 1) * Plain::kChannels + lane];
                }
            }
#pragma unroll
            for (int x = 0; x < Plain::kSide; ++x) {
#pragma unroll
                for (int row = 0; row < 3; ++row) {
                    window[row][0] = window[row][1];
                    window[row][1] = window[row][2];
                    window[row][2] = inputs[((y + row) * Plain::kHaloSide + x + 2) * Plain::kChannels + lane];
                }
#pragma unroll
                for (int part = 0; part < Plain::kOwnOutputs; part += kPart) {
                    const auto some =
                        load_vector<kPart>(gradients + ((y * Plain::kSide + x) * Plain::kOutputs + own_output + part));
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

// Blocks in all that parts are made for: on a large card one for each multiprocessor, or eight small ones.
template <typename scalar_t>
constexpr int64_t kWantedBlocks = sizeof(scalar_t) == 2 ? 132 : 1056;

template <typename scalar_t>
std::vector<GradientTable<scalar_t>> gradient_tables(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t blocks_of_a_part) {
    using Size = std::conditional_t<sizeof(scalar_t) == 2, Wide, Plain>;
    const char* op = "flow_conv2d_weight_gradient";
    std::vector<GradientTable<scalar_t>> tables;
    for (size_t i = 0; i < x.size(); ++i) {
        const int64_t rows = ceil_div(x[i].size(2), Size::kHeight), columns = ceil_div(x[i].size(3), Size::kWidth);
        const int64_t tiles = x[i].size(0) * rows * columns;
        if (tiles == 0) {
            continue;
        }
        if (tables.empty() || tables.back().num_levels == kMaxLevels) {
            tables.emplace_back();
        }
        GradientTable<scalar_t>& table = tables.back();
        check(table.num_tiles + tiles <= 1 << 30, op, ": the levels hold too many pixels for one launch");
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
