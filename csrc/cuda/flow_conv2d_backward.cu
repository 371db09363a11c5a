// SPDX-License-Identifier: Apache-2.0
//
// Gradient of flow_conv2d w.r.t. its weights, over all levels, on CUDA:
//
//   grad_weight[o, c, t] = sum over levels, images, pixels p of grad_output[p, o] * (x + flow)[p + t, c]
//
// flow_conv2d with rotated weights computes the gradient w.r.t. x and flow; that w.r.t. the bias is a sum over pixels.
// The kernel computes nine matrix products (outputs x pixels) by (pixels x channels), one per tap. x and flow (N, H, W,
// C) and the incoming gradients (N, H, W, O) have adjacent channels and any other strides. The result is (O, C, 3, 3).
// A block computes a tile of outputs by channels for all taps, over a part of the pixel tiles. A second kernel adds the
// partial sums (part, 9, O, C) in order. The number of parts depends on sizes only, so results are deterministic. A
// non-finite value at the border of a map may affect the gradients of all taps of its channel. These include taps that
// pair the value with pixels outside the map.
#include <algorithm>

#include "cuda/conv3x3.h"
#include "cuda/tensor_core.cuh"

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
    int parts;  // number of parts (blockIdx.z) that the tiles are split into
};

// ---- device ------------------------------------------------------------------------------------------------------

// Iterator over the tiles of a part. A part consists of every table.parts-th tile, so that all parts need about the
// same time.
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
        const GradientLevel<scalar_t>& entry = table.levels[level];
        map = map_tile<kHeight, kWidth>(tile - entry.tile_begin, entry.tile_rows, entry.tile_columns);
    }
};

// Sizes of the tensor-core kernel. A step has as many pixels as the depth of a product.
template <typename operand_t>
struct TensorCoreGradientConfig {
    static constexpr int kVector = kVectorElements<element_t<operand_t>>;
    static constexpr int kThreads = 256;
    static constexpr int kOutputs = 64;
    // Number of blocks of 8 channels of a warp, limited by registers.
    static constexpr int kBlocks = std::is_same_v<operand_t, Tf32x3> ? 1 : 2;
    static constexpr int kWarpChannels = kBlocks * 8, kChannels = 4 * kWarpChannels;
    static constexpr int kSteps = 8, kStepRows = kVector / 4;
    static constexpr int kHeight = kSteps * kStepRows, kWidth = 8, kPixels = kHeight * kWidth;
    static constexpr int kHaloWidth = kWidth + 2, kHaloPixels = (kHeight + 2) * kHaloWidth;
    static constexpr int kChunkPixels = kThreads / (kChannels / kVector);  // pixels that all threads load in one pass
    static constexpr int kChunks = (kHaloPixels + kChunkPixels - 1) / kChunkPixels;
    static constexpr int kFetched = kChunks * kChunkPixels;  // pixels with halo, padded to whole chunks
    static constexpr int kInputs =
        kVector == 8 ? kFetched : kHaloPixels;                       // pixels stored; in float32 without the padding
    static constexpr int kCopied = kThreads / (kOutputs / kVector);  // gradient pixels copied by all threads per pass
    // Row lengths of the shared arrays, padded against bank conflicts.
    static constexpr int kInputRow = kChannels + 8, kGradientRow = kOutputs + 8;
    static constexpr int kGradients = kInputs * kInputRow;               // offset of the gradients
    static constexpr int kBuffer = kGradients + kPixels * kGradientRow;  // elements
    static constexpr size_t kSharedBytes = 2 * sizeof(element_t<operand_t>) * kBuffer;
    static_assert(kChunks <= kSteps, "a tile is loaded during the steps of the previous one");
};

// Sums of a lane, by tap, block of 16 outputs of the warp, block of 8 channels of the warp, and element of the product.
template <int kBlocks>
using GradientSums = float[kTaps][2][kBlocks][4];

// Products of a step in 16 bits. `inputs` and `gradients` are the addresses of the first rows that this lane gives to
// ldmatrix.
template <typename operand_t>
struct StepProducts {
    using Config = TensorCoreGradientConfig<operand_t>;

    // Inputs stay in registers while steps use them: rows[t][x] is rows t and t + 1 of inputs, for column x of taps.
    unsigned rows[3][3][4];

    __device__ __forceinline__ void load_row(const Shared<operand_t>& inputs, int row) {
#pragma unroll
        for (int x = 0; x < 3; ++x) {
            ldmatrix_x4_trans(rows[row][x], inputs + (row * Config::kHaloWidth + x) * Config::kInputRow);
        }
    }
    __device__ __forceinline__ void begin(const Shared<operand_t>& inputs) { load_row(inputs, 0); }
    __device__ __forceinline__ void multiply(
        const Shared<operand_t>& inputs, const Shared<operand_t>& gradients, GradientSums<2>& sums) {
        unsigned a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            ldmatrix_x4_trans(a[i], gradients + i * 16);
        }
        load_row(inputs, 1);
        load_row(inputs, 2);
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            const unsigned (&words)[4] = rows[tap / 3][tap % 3];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const unsigned column[2] = {words[i % 2 * 2], words[i % 2 * 2 + 1]};
                mma_16816(sums[tap][i / 2][i % 2], a[i / 2], column, operand_t{});
            }
        }
        // The inputs of the last row of taps are those of the first row in the next step.
#pragma unroll
        for (int i = 0; i < 12; ++i) {
            rows[0][i / 4][i % 4] = rows[2][i / 4][i % 4];
        }
    }
};

// Products of a step in float32, which is one row of eight pixels. Outputs 2 i and 2 i + 1 are rows i and i + 8 of a
// product.
template <typename operand_t>
struct FloatStepProducts {
    using Config = TensorCoreGradientConfig<operand_t>;

    unsigned rows[3][3][Config::kBlocks][2];  // by row and column of taps, 8 channels, and half of the pixels

    __device__ __forceinline__ void load_row(const Shared<float>& inputs, int row) {
        const auto words = pointer_cast<const unsigned>(inputs);
#pragma unroll
        for (int i = 0; i < 6 * Config::kBlocks; ++i) {
            const int x = i / 2 % 3, block = i / 6, half = i % 2;
            rows[row][x][block][half] =
                words[(row * Config::kHaloWidth + x + half * 4) * Config::kInputRow + block * 8];
        }
    }
    __device__ __forceinline__ void begin(const Shared<float>& inputs) {
        load_row(inputs, 0);
        load_row(inputs, 1);
    }
    __device__ __forceinline__ void multiply(
        const Shared<float>& inputs, const Shared<float>& gradients, GradientSums<Config::kBlocks>& sums) {
        const auto words = pointer_cast<const unsigned>(gradients);
        Fragment<operand_t, 4> a[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Vec<unsigned, 2> pair = load_vector<2>(words + (i % 2 * 4 * Config::kGradientRow + i / 2 * 16));
            a[i / 2].set(i % 2 * 2, prepared(pair[0], operand_t{}));
            a[i / 2].set(i % 2 * 2 + 1, prepared(pair[1], operand_t{}));
        }
        load_row(inputs, 2);
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
            for (int block = 0; block < Config::kBlocks; ++block) {
                Fragment<operand_t, 2> b;
                b.set(0, rows[tap / 3][tap % 3][block][0]);
                b.set(1, rows[tap / 3][tap % 3][block][1]);
                multiply_add(sums[tap][0][block], a[0], b);
                multiply_add(sums[tap][1][block], a[1], b);
            }
        }
        // The inputs of the last two rows of taps are those of the first two in the next step.
#pragma unroll
        for (int i = 0; i < 12 * Config::kBlocks; ++i) {
            const int row = i % 2, x = i / 2 % 3, block = i / 6 % Config::kBlocks, half = i / (6 * Config::kBlocks);
            rows[row][x][block][half] = rows[row + 1][x][block][half];
        }
    }
};

// Store the sums of two adjacent channels: by one access if `paired`, else separately, and the second one only if
// `has_second`.
__device__ __forceinline__ void store_pair(
    const Global<float>& target, const Vec<float, 2>& pair, bool paired, bool has_second) {
    if (paired) {
        store_vector(target, pair);
        return;
    }
    target[0] = pair[0];
    if (has_second) {
        target[1] = pair[1];
    }
}

// Kernel for 16-bit types on the tensor cores, and float32 by TF32. In 16 bits a block of 8 warps computes 64 outputs x
// 64 channels for all taps, a warp 32 x 16. The products are mma.sync with float32 sums. A step is 2 rows of 8 pixels.
// Rows of inputs are loaded by ldmatrix.trans and stay in registers for all taps. The last of them also stay for the
// next step. During these steps, the next tile (16 x 8 pixels) is loaded into the other buffer. Inputs are loaded
// through registers, a chunk per step; gradients by cp.async, or through registers if they are not vectorizable. In
// float32 a step is one row of 8 pixels, and a tile is 8 x 8. For Tf32x3 a block computes 32 channels, and a warp 8.
template <typename operand_t, int kAccess>
__global__ void __launch_bounds__(TensorCoreGradientConfig<operand_t>::kThreads, 1)
    conv3x3_weight_gradient_tensor_core_kernel(
        const __grid_constant__ GradientTable<element_t<operand_t>> table,
        Global<float> sums_out,  // (parts, 9, O, C)
        const int outputs, const int channels) {
    using scalar_t = element_t<operand_t>;
    using Config = TensorCoreGradientConfig<operand_t>;
    constexpr int kWord = static_cast<int>(sizeof(unsigned) / sizeof(scalar_t));  // elements
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, shared);  // 2 x (inputs [pixel with halo][channel], gradients [pixel][output])
    SPATIALFLOW_SHARED(int64_t, pixel_offsets, 2 * Config::kFetched);  // see InputReader
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int first_output = static_cast<int>(blockIdx.x) * Config::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * Config::kChannels;
    const int warp_output = warp % 2 * 32, warp_channel = warp / 2 * Config::kWarpChannels;

    // In each pass, this thread loads 16 bytes of channels of an input pixel, or 16 bytes of outputs of a gradient
    // pixel.
    constexpr int kInputThreads = Config::kChannels / Config::kVector,
                  kGradientThreads = Config::kOutputs / Config::kVector;
    const int thread_channel = thread % kInputThreads * Config::kVector, thread_input = thread / kInputThreads;
    const int thread_output = thread % kGradientThreads * Config::kVector, thread_pixel = thread / kGradientThreads;
    InputReader<Config::kHeight, Config::kWidth, Config::kFetched, scalar_t> reader;
    auto input_target = pointer_cast<unsigned>(shared + (thread_input * Config::kInputRow + thread_channel));
    auto gradient_target = shared + (Config::kGradients + thread_pixel * Config::kGradientRow + thread_output);
    const auto begin_inputs = [&](const GradientLevel<scalar_t>& level, const MapTile& map) {
        reader.begin(level.input, map, first_channel + thread_channel, pixel_offsets);
    };
    const auto fetch_inputs = [&](int chunk) {
        return reader.template fetch<kAccess>(pixel_offsets, chunk * Config::kChunkPixels + thread_input);
    };
    const auto store_inputs = [&](int chunk, const SumTerms& terms) {
        Vec<unsigned, 4> words = sum_of<scalar_t>(terms);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = prepared(words[i], operand_t{});
        }
        if (Config::kInputs == Config::kFetched || chunk * Config::kChunkPixels + thread_input < Config::kInputs) {
            store_vector(input_target + chunk * (Config::kChunkPixels * Config::kInputRow / kWord), words);
        }
    };
    const auto copy_gradients = [&](const GradientLevel<scalar_t>& level, const MapTile& map) {
        const ConvSource<scalar_t>& source = level.gradient;
        const int y = map.y + thread_pixel / Config::kWidth, x = map.x + thread_pixel % Config::kWidth;
        const int left = x < source.width ? source.channels - first_output - thread_output : 0;
        Global<const scalar_t> pixel =
            source.x + (map.image * source.x_n + y * source.x_h + x * source.x_w + first_output + thread_output);
#pragma unroll
        for (int i = 0; i < Config::kPixels / Config::kCopied; ++i) {
            constexpr int kRows = Config::kCopied / Config::kWidth;
            const auto target = gradient_target + i * Config::kCopied * Config::kGradientRow;
            const int present = y + i * kRows < source.height ? left : 0;
            if constexpr (kAccess == Config::kVector) {
                cp_async_16(target, pixel, present > 0);
            } else {
                store_vector(pointer_cast<unsigned>(target), load_words<kAccess>(pixel, present));
            }
            pixel += kRows * source.x_h;
        }
        cp_async_commit();
    };

    TileReader<Config::kHeight, Config::kWidth, scalar_t> tiles(table);
    copy_gradients(table.levels[tiles.level], tiles.map);
    begin_inputs(table.levels[tiles.level], tiles.map);
    __syncthreads();
    {
        SumTerms chunks[Config::kChunks];
#pragma unroll
        for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
            chunks[chunk] = fetch_inputs(chunk);
        }
#pragma unroll
        for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
            store_inputs(chunk, chunks[chunk]);
        }
    }
    // Offsets of the first rows that this lane gives to ldmatrix; in float32, of the first values that it loads.
    constexpr int kInputStep = Config::kStepRows * Config::kHaloWidth * Config::kInputRow;
    constexpr int kGradientStep = Config::kStepRows * Config::kWidth * Config::kGradientRow;
    int input_at = (lane / 8 % 2 * Config::kHaloWidth + lane % 8) * Config::kInputRow + lane / 16 * 8;
    int gradient_at = (lane / 16 * 8 + lane % 8) * Config::kGradientRow + lane / 8 % 2 * 8;
    if constexpr (sizeof(scalar_t) == 4) {
        input_at = lane % 4 * Config::kInputRow + lane / 4;
        gradient_at = lane % 4 * Config::kGradientRow + lane / 4 * 2;
    }
    auto inputs = shared + (input_at + warp_channel);
    auto gradients = shared + (Config::kGradients + gradient_at + warp_output);
    int buffer_offset = Config::kBuffer;  // offset to the other buffer
    GradientSums<Config::kBlocks> sums = {};
    while (tiles.valid()) {
        const int rows_left = table.levels[tiles.level].gradient.height - tiles.map.y;
        const int steps = (rows_left + Config::kStepRows - 1) / Config::kStepRows;
        tiles.advance();
        cp_async_wait<0>();
        __syncthreads();
        input_target += buffer_offset / kWord;
        gradient_target += buffer_offset;
        reader.end();
        if (tiles.valid()) {
            begin_inputs(table.levels[tiles.level], tiles.map);
            copy_gradients(table.levels[tiles.level], tiles.map);
        }
        __syncthreads();
        std::conditional_t<sizeof(scalar_t) == 2, StepProducts<operand_t>, FloatStepProducts<operand_t>> products;
        products.begin(inputs);
#pragma unroll 1
        for (int step = 0; step < Config::kSteps; ++step) {
            SumTerms terms{};
            if (step < Config::kChunks) {
                terms = fetch_inputs(step);
            }
            if (step < steps) {
                products.multiply(inputs, gradients, sums);
            }
            inputs += kInputStep;
            gradients += kGradientStep;
            if (step < Config::kChunks) {
                store_inputs(step, terms);
            }
        }
        inputs += buffer_offset - Config::kSteps * kInputStep;
        gradients += buffer_offset - Config::kSteps * kGradientStep;
        buffer_offset = -buffer_offset;
    }
    const bool paired = channels % 2 == 0;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int i = 0; i < 4 * Config::kBlocks; ++i) {
            const int half = i % 2, block = i / 2 % Config::kBlocks, rows = i / (2 * Config::kBlocks);
            const int row = sizeof(scalar_t) == 2 ? half * 8 + lane / 4 : lane / 4 * 2 + half;  // of a product
            const int o = first_output + warp_output + rows * 16 + row;
            const int c = first_channel + warp_channel + block * 8 + lane % 4 * 2;
            const float (&sum)[4] = sums[tap][rows][block];
            const Vec<float, 2> pair = {{sum[half * 2], sum[half * 2 + 1]}};
            const Global<float> target =
                sums_out + (((static_cast<int64_t>(blockIdx.z) * kTaps + tap) * outputs + o) * channels + c);
            if (o < outputs && c < channels) {
                store_pair(target, pair, paired, c + 1 < channels);
            }
        }
    }
}

// Sizes of the kernel for float64, and for float32 with "direct". A block of 8 warps computes 32 outputs x 32 channels:
// a lane per channel, four outputs per warp, 36 sums a thread. A window of 3 x 3 inputs slides along the row. So the 36
// multiply-adds of a pixel need only 3 loads of inputs and a broadcast of 4 gradients.
struct SimtGradientConfig {
    static constexpr int kThreads = 256;
    static constexpr int kOutputs = 32, kChannels = kWarpSize;
    static constexpr int kSide = 8, kHeight = kSide, kWidth = kSide, kPixels = kSide * kSide;
    static constexpr int kHaloSide = kSide + 2, kHaloPixels = kHaloSide * kHaloSide;
    static constexpr int kWarpOutputs = kOutputs / (kThreads / kWarpSize);  // of a warp
};

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(SimtGradientConfig::kThreads, 1) conv3x3_weight_gradient_kernel(
    const __grid_constant__ GradientTable<scalar_t> table,
    Global<scalar_t> sums_out,  // (parts, 9, O, C)
    const int outputs, const int channels) {
    constexpr int kVector = kVectorElements<scalar_t>;
    SPATIALFLOW_SHARED(
        scalar_t, inputs,
        SimtGradientConfig::kHaloPixels * SimtGradientConfig::kChannels);  // [pixel with halo][channel]
    SPATIALFLOW_SHARED(
        scalar_t, gradients, SimtGradientConfig::kPixels * SimtGradientConfig::kOutputs);  // [pixel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int thread_output = thread / kWarpSize * SimtGradientConfig::kWarpOutputs;
    const int first_output = static_cast<int>(blockIdx.x) * SimtGradientConfig::kOutputs;
    const int first_channel = static_cast<int>(blockIdx.y) * SimtGradientConfig::kChannels;
    // A thread whose sums are outside the weight only loads tiles.
    const bool has_sums = first_output + thread_output < outputs && first_channel + lane < channels;
    scalar_t sums[SimtGradientConfig::kWarpOutputs][kTaps] = {};
    const auto multiply_pixel = [&](int pixel, const scalar_t(&window)[3][3]) {
#pragma unroll
        for (int part = 0; part < SimtGradientConfig::kWarpOutputs; part += kVector) {
            const auto values =
                load_vector<kVector>(gradients + (pixel * SimtGradientConfig::kOutputs + thread_output + part));
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) {
                    sums[part + i][tap] += values[i] * window[tap / 3][tap % 3];
                }
            }
        }
    };
    for (TileReader<SimtGradientConfig::kSide, SimtGradientConfig::kSide, scalar_t> tiles(table); tiles.valid();
         tiles.advance()) {
        const GradientLevel<scalar_t>& level = table.levels[tiles.level];
        const MapTile& map = tiles.map;
        for (int i = thread; i < SimtGradientConfig::kHaloPixels * SimtGradientConfig::kChannels / 4;
             i += SimtGradientConfig::kThreads) {
            const int pixel = i / (SimtGradientConfig::kChannels / 4), c = i % (SimtGradientConfig::kChannels / 4) * 4;
            const Vec<scalar_t, 4> values = load_sum<4, kAccess>(
                level.input, map.image, map.y + pixel / SimtGradientConfig::kHaloSide - 1,
                map.x + pixel % SimtGradientConfig::kHaloSide - 1, first_channel + c);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                inputs[pixel * SimtGradientConfig::kChannels + c + j] = values[j];
            }
        }
        for (int i = thread; i < SimtGradientConfig::kPixels * SimtGradientConfig::kOutputs / 4;
             i += SimtGradientConfig::kThreads) {
            const int pixel = i / (SimtGradientConfig::kOutputs / 4), o = i % (SimtGradientConfig::kOutputs / 4) * 4;
            const Vec<scalar_t, 4> values = load_sum<4, kAccess>(
                level.gradient, map.image, map.y + pixel / SimtGradientConfig::kSide,
                map.x + pixel % SimtGradientConfig::kSide, first_output + o);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                gradients[pixel * SimtGradientConfig::kOutputs + o + j] = values[j];
            }
        }
        __syncthreads();
        for (int y = 0; has_sums && y < SimtGradientConfig::kSide; ++y) {
            scalar_t window[3][3];  // [row][column] of inputs around the pixel
#pragma unroll
            for (int row = 0; row < 3; ++row) {
#pragma unroll
                for (int column = 1; column < 3; ++column) {
                    window[row][column] = inputs
                        [((y + row) * SimtGradientConfig::kHaloSide + column - 1) * SimtGradientConfig::kChannels +
                         lane];
                }
            }
#pragma unroll
            for (int x = 0; x < SimtGradientConfig::kSide; ++x) {
#pragma unroll
                for (int row = 0; row < 3; ++row) {
                    window[row][0] = window[row][1];
                    window[row][1] = window[row][2];
                    window[row][2] = inputs
                        [((y + row) * SimtGradientConfig::kHaloSide + x + 2) * SimtGradientConfig::kChannels + lane];
                }
                multiply_pixel(y * SimtGradientConfig::kSide + x, window);
            }
        }
        __syncthreads();
    }
    const int c = first_channel + lane;
#pragma unroll
    for (int i = 0; i < SimtGradientConfig::kWarpOutputs; ++i) {
        const int o = first_output + thread_output + i;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            if (has_sums && o < outputs) {
                const int64_t row = (static_cast<int64_t>(blockIdx.z) * kTaps + tap) * outputs + o;
                sums_out[row * channels + c] = sums[i][tap];
            }
        }
    }
}

// Add the parts in order, one thread per output and channel.
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

// Wanted number of blocks, which determines the number of parts: per multiprocessor of a large GPU, one tensor-core
// block or eight of the smaller SIMT blocks.
template <typename operand_t>
constexpr int64_t kWantedBlocks = kIsSimt<operand_t> ? 1056 : 132;

template <typename operand_t>
std::vector<GradientTable<element_t<operand_t>>> gradient_tables(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t blocks_of_a_part) {
    using scalar_t = element_t<operand_t>;
    using Config = std::conditional_t<kIsSimt<operand_t>, SimtGradientConfig, TensorCoreGradientConfig<operand_t>>;
    const char* op = "flow_conv2d_weight_gradient";
    std::vector<GradientTable<scalar_t>> tables;
    for (size_t i = 0; i < x.size(); ++i) {
        const int64_t rows = ceil_div(x[i].size(2), Config::kHeight), columns = ceil_div(x[i].size(3), Config::kWidth);
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
        const int64_t wanted = std::max<int64_t>(1, kWantedBlocks<operand_t> / blocks_of_a_part);
        table.parts = static_cast<int>(std::min<int64_t>(wanted, table.num_tiles));
    }
    return tables;
}

template <typename operand_t>
void launch_gradient(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    const Tensor& grad_weight, Stream stream) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Config = std::conditional_t<kIsSimt<operand_t>, SimtGradientConfig, TensorCoreGradientConfig<operand_t>>;
    const int64_t outputs = grad_weight.size(0), channels = grad_weight.size(1);
    const int64_t output_blocks = ceil_div(outputs, Config::kOutputs);
    const int64_t channel_blocks = ceil_div(channels, Config::kChannels);
    check(channel_blocks <= 65535, "flow_conv2d_weight_gradient: too many channels for CUDA, got ", channels);
    const std::vector<GradientTable<scalar_t>> tables =
        gradient_tables<operand_t>(x, flow, grad_output, output_blocks * channel_blocks);
    int parts = 0;
    for (const GradientTable<scalar_t>& table : tables) {
        parts += table.parts;
    }
    const Tensor sums =
        empty_like_sized(grad_weight, {parts, kTaps, outputs, channels}, accum_dtype(grad_weight.scalar_type()));
    const bool vectorized = has_vectorizable_channels<scalar_t>(x) && has_vectorizable_channels<scalar_t>(flow) &&
                            has_vectorizable_channels<scalar_t>(grad_output);
    Global<real_t> target = mutable_data<real_t>(sums);
    for (const GradientTable<scalar_t>& table : tables) {
        const dim3 blocks(
            grid_size("flow_conv2d_weight_gradient", output_blocks), static_cast<unsigned>(channel_blocks),
            static_cast<unsigned>(table.parts));
        const auto run = [&](auto access) {
            constexpr int kAccess = decltype(access)::value;
            if constexpr (kIsSimt<operand_t>) {
                launch<conv3x3_weight_gradient_kernel<scalar_t, kAccess>>(
                    blocks, dim3(Config::kThreads), 0, stream, table, target, static_cast<int>(outputs),
                    static_cast<int>(channels));
            } else {
                launch<conv3x3_weight_gradient_tensor_core_kernel<operand_t, kAccess>>(
                    blocks, dim3(Config::kThreads), Config::kSharedBytes, stream, table, target,
                    static_cast<int>(outputs), static_cast<int>(channels));
            }
        };
        if (vectorized) {
            run(std::integral_constant<int, kVectorElements<scalar_t>>{});
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
            dispatch_operand<decltype(zero)>(cuda_algorithm(algorithm, x[0].scalar_type()), [&](auto operand) {
                launch_gradient<decltype(operand)>(
                    channels_adjacent(x), channels_adjacent(flow), channels_adjacent(grad_output), grad_weight,
                    device.stream());
            });
        });
    }
    return grad_weight;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("_flow_conv2d_weight_gradient", TORCH_BOX(&spatialflow::weight_gradient_cuda));
}
