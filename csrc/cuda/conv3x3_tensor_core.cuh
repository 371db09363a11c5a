// SPDX-License-Identifier: Apache-2.0
//
// Kernel of conv3x3.cu on the tensor cores: 16-bit types by m16n8k16, float32 by m16n8k8 of TF32, with float32 sums.
//
// A block of four warps computes 8 x 16 pixels by 128 or 64 outputs. A K step has 32 channels (float32: 16). Each step
// loads the tile and its halo once, as x + flow, for all nine taps. ldmatrix reads the rows of each tap from the same
// buffer. In 16 bits the three taps of a column use a row of inputs while it is in registers. In float32 the weights
// are the left operand. Loads overlap with products, also across tiles: inputs of the next step go through registers,
// and weights are copied two units ahead by cp.async. Rows in shared memory are padded against bank conflicts.
#pragma once

#include "cuda/conv3x3_table.cuh"
#include "cuda/tensor_core.cuh"

namespace spatialflow {

// Sizes of the tensor-core kernel. A step of kChannels channels consists of units, one for each half of the channels
// and column of taps. A unit has kWeightRows rows of weights; during its products a chunk of the next step's inputs is
// loaded. The sizes of the buffers in bytes are equal for all operand types.
template <typename operand_t, int kTileOutputs>
struct TensorCoreConfig {
    static constexpr int kVector = kVectorElements<element_t<operand_t>>;
    static constexpr int kThreads = 128;
    static constexpr int kHeight = 8, kWidth = 16, kOutputs = kTileOutputs;
    static constexpr int kWarpRows = 4, kWarpOutputs = kOutputs / 2;  // kWarpRows: rows of pixels
    static constexpr int kBlocks = kWarpOutputs / 32;                 // groups of 32 outputs, see packed_position
    // Resident blocks of a multiprocessor, limited by registers and shared memory.
    static constexpr int kResident = kOutputs == 128 || std::is_same_v<operand_t, Tf32x3> ? 2 : 3;
    static constexpr int kChannels = 4 * kVector, kUnitChannels = 2 * kVector;
    static constexpr int kUnits = kChannels / kUnitChannels * 3;
    static constexpr int kHaloWidth = kWidth + 2;
    static constexpr int kChunkPixels = kThreads / (kChannels / kVector);  // pixels that all threads load in one pass
    static constexpr int kInputs = kUnits * kChunkPixels;                  // pixels with halo, padded to whole chunks
    static constexpr int kInputRow = kChannels + kVector, kWeightRow = kOutputs + 8;
    static constexpr int kWeightRows = 3 * kUnitChannels, kWeightStages = 3;
    static constexpr int kCopiedRows = kThreads / (kOutputs / kVector);  // rows that all threads copy in one pass
    static constexpr int kInputBuffer = kInputs * kInputRow, kWeightStage = kWeightRows * kWeightRow;  // elements
    static constexpr size_t kSharedBytes =
        sizeof(element_t<operand_t>) * (2 * kInputBuffer + kWeightStages * kWeightStage);
    static_assert((kHeight + 2) * kHaloWidth <= kInputs, "one chunk per unit covers a tile and its halo");
};

// Sums of a lane, for four rows of pixels. In 16 bits outputs are the columns of a product. sums[i][j][e] is in row i,
// at pixel e / 2 * 8 and output j / 4 * 32 + j % 4 * 2 + e % 2. These count from the lane's first pixel and output. In
// float32 outputs are the rows of a product: see FloatFragmentCoordinates.
template <int kBlocks>
using Sums = float[4][kBlocks * 4][4];

// Output pixels and channels of the sums of a lane, in 16 bits. Each of four lanes has eight adjacent outputs of every
// 32 (packed_position).
template <typename scalar_t>
struct FragmentCoordinates {
    int64_t first;  // offset of the outputs of the first pixel
    int y, x, output;
    int height, width, outputs;

    __device__ __forceinline__
    FragmentCoordinates(const ConvEntry<scalar_t>& entry, const MapTile& map, int warp_row, int warp_output, int lane)
        : y(map.y + warp_row),
          x(map.x + lane / 4),
          output(warp_output + lane % 4 * 8),
          height(entry.source.height),
          width(entry.source.width),
          outputs(entry.outputs) {
        first = output_at(entry, map.image, y, x) + output;
    }
    __device__ __forceinline__ bool is_inside(int i, int half) const { return y + i < height && x + half * 8 < width; }
    // Offset of the first of eight outputs.
    __device__ __forceinline__ int64_t at(int i, int half, int block) const {
        return first + (static_cast<int64_t>(i) * width + half * 8) * outputs + block * 32;
    }
    __device__ __forceinline__ int left(int block) const { return outputs - output - block * 32; }
};

// Initialize the sums of a tile with bias and residual.
template <int kBlocks, typename scalar_t>
__device__ __forceinline__ void start_sums(
    const ConvEntry<scalar_t>& entry, const FragmentCoordinates<scalar_t>& coordinates, Sums<kBlocks>& sums) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float bias = 0.0f;
            if (entry.bias && e < coordinates.left(block)) {
                bias = entry.bias[coordinates.output + block * 32 + e];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[i / 2][block * 4 + e / 2][i % 2 * 2 + e % 2] = bias;
            }
        }
    }
    if (!entry.residual) {
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const int left = coordinates.is_inside(i / 2, i % 2) ? coordinates.left(block) : 0;
            const Global<const scalar_t> source = entry.residual + coordinates.at(i / 2, i % 2, block);
            const Vec<scalar_t, 8> values = load_present(source, entry.vectorized, left);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                sums[i / 2][block * 4 + e / 2][i % 2 * 2 + e % 2] += load(values[e]);
            }
        }
    }
}

// Apply ReLU to the sums of a warp and store them.
template <int kBlocks, typename scalar_t>
__device__ __forceinline__ void store_sums(
    const ConvEntry<scalar_t>& entry, const FragmentCoordinates<scalar_t>& coordinates, const Sums<kBlocks>& sums) {
    const bool relu = entry.relu;
    const auto outputs_of = [&](int i, int block) {
        Vec<unsigned, 4> words;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float (&pair)[4] = sums[i / 2][block * 4 + j];
            words[j] = pack_pair(pair[i % 2 * 2], pair[i % 2 * 2 + 1], scalar_t{});
            words[j] = relu ? rectify_pairs(words[j], scalar_t{}) : words[j];
        }
        return words;
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const int left = coordinates.is_inside(i / 2, i % 2) ? coordinates.left(block) : 0;
            const Global<scalar_t> target = entry.out + coordinates.at(i / 2, i % 2, block);
            store_present(target, entry.vectorized, left, outputs_of(i, block));
        }
    }
}

// Output pixels and channels of the sums of a lane, in float32. sums[i][j][e] is in row i, at pixel j / kProducts * 8 +
// e % 2 and output j % kProducts * 16 + e / 2. These count from the lane's first pixel and output. A lane has two of
// every eight pixels and two of every 16 outputs.
struct FloatFragmentCoordinates {
    int64_t first;  // offset of the outputs of the first pixel
    int y, x, output;
    int height, width, outputs;

    __device__ __forceinline__
    FloatFragmentCoordinates(const ConvEntry<float>& entry, const MapTile& map, int warp_row, int warp_output, int lane)
        : y(map.y + warp_row),
          x(map.x + lane % 4 * 2),
          output(warp_output + lane / 4 * 2),
          height(entry.source.height),
          width(entry.source.width),
          outputs(entry.outputs) {
        first = output_at(entry, map.image, y, x) + output;
    }
    // Call body(two sums, offset of their outputs, number of outputs from there on) for the pixels inside the map. The
    // branch per pixel limits the loads in flight to those of one pixel; registers do not suffice for more.
    template <int kBlocks, typename AnySums, typename Body>
    __device__ __forceinline__ void visit(AnySums& sums, Body body) const {
        constexpr int kProducts = kBlocks * 2;  // for all outputs
#pragma unroll
        for (int pixel = 0; pixel < 16; ++pixel) {
            const int row = pixel / 4, half = pixel / 2 % 2, column = half * 8 + pixel % 2;
            if (y + row < height && x + column < width) {
                const int64_t at = first + (static_cast<int64_t>(row) * width + column) * outputs;
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    auto& fragment = sums[row][half * kProducts + product];
                    body(
                        fragment[pixel % 2], fragment[2 + pixel % 2], at + product * 16,
                        outputs - output - product * 16);
                }
            }
        }
    }
};

// Initialize the sums with zeros. store_sums adds bias and residual after the products, so the results are equal to
// those of a convolution and a separate addition of the residual.
template <int kBlocks>
__device__ __forceinline__ void start_sums(
    const ConvEntry<float>&, const FloatFragmentCoordinates&, Sums<kBlocks>& sums) {
#pragma unroll
    for (int i = 0; i < kBlocks * 64; ++i) {
        sums[i / (kBlocks * 16)][i / 4 % (kBlocks * 4)][i % 4] = 0.0f;
    }
}

template <int kBlocks>
__device__ __forceinline__ void store_sums(
    const ConvEntry<float>& entry, const FloatFragmentCoordinates& coordinates, Sums<kBlocks>& sums) {
    constexpr int kProducts = kBlocks * 2;
    // These values are read from the table once. Otherwise the compiler may keep a separate register for each use.
    const Global<const float> biases = entry.bias, residuals = entry.residual;
    const Global<float> out = entry.out;
    const bool relu = entry.relu, vectorized = entry.vectorized;
    if (biases) {
#pragma unroll
        for (int i = 0; i < kProducts * 2; ++i) {
            const int product = i / 2, output = coordinates.output + product * 16 + i % 2;
            const float bias = output < coordinates.outputs ? biases[output] : 0.0f;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                sums[j / 4][j / 2 % 2 * kProducts + product][i % 2 * 2 + j % 2] += bias;
            }
        }
    }
    if (residuals && vectorized) {
        coordinates.visit<kBlocks>(sums, [&](float& first, float& second, int64_t at, int left) {
            const Vec<float, 2> residual = left > 0 ? load_vector<2>(residuals + at) : Vec<float, 2>{};
            first += residual[0];
            second += residual[1];
        });
    } else if (residuals) {
        coordinates.visit<kBlocks>(sums, [&](float& first, float& second, int64_t at, int left) {
            first += left > 0 ? residuals[at] : 0.0f;
            second += left > 1 ? residuals[at + 1] : 0.0f;
        });
    }
    coordinates.visit<kBlocks>(sums, [&](float first, float second, int64_t at, int left) {
        const Vec<float, 2> values = {{rectified(first, relu), rectified(second, relu)}};
        if (vectorized) {
            if (left > 0) {
                store_vector(out + at, values);
            }
        } else {
            if (left > 0) {
                out[at] = values[0];
            }
            if (left > 1) {
                out[at + 1] = values[1];
            }
        }
    });
}

// Multiply a row of inputs by the weights of a tap, and add the products to the sums.
template <int kBlocks, typename scalar_t>
__device__ __forceinline__ void multiply_row(
    const unsigned (&a)[4], const unsigned (&b)[kBlocks * 2][4], float (&sums)[kBlocks * 4][4],
    scalar_t /* operand type */) {
#pragma unroll
    for (int j = 0; j < kBlocks * 4; ++j) {
        const unsigned right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_16816(sums[j], a, right, scalar_t{});
    }
}

// Multiply a unit: a column of taps, and as many channels as the depth of a product. This lane reads the first row of
// inputs at `inputs` and the first tap at `weights`. In 16 bits the column's weights stay in registers. A row of inputs
// is used for its three taps before the next row is read.
template <typename Config, typename scalar_t>
__device__ __forceinline__ void multiply_unit(
    const Shared<scalar_t>& inputs, const Shared<scalar_t>& weights, Sums<Config::kBlocks>& sums,
    scalar_t /* operand type */) {
    unsigned b[3][Config::kBlocks * 2][4];
#pragma unroll
    for (int row = 0; row < Config::kWarpRows + 2; ++row) {
        if (row < 3) {
#pragma unroll
            for (int j = 0; j < Config::kBlocks * 2; ++j) {
                ldmatrix_x4_trans(b[row][j], weights + (row * Config::kUnitChannels * Config::kWeightRow + j * 16));
            }
        }
        unsigned a[4];
        ldmatrix_x4(a, inputs + row * Config::kHaloWidth * Config::kInputRow);
        // This row of inputs with the tap in row t contributes to row i of the sums.
#pragma unroll
        for (int t = 0; t < 3; ++t) {
            const int i = row - t;
            if (i >= 0 && i < Config::kWarpRows) {
                multiply_row<Config::kBlocks>(a, b[t], sums[i], scalar_t{});
            }
        }
    }
}

// Multiply a unit in float32. The weights, whose outputs are not permuted by packed_position, are the left operand. The
// taps are processed one after another, each with kWarpRows rows of inputs. Tf32x3 needs more registers, so its loop
// over taps is not unrolled.
template <typename Config, typename operand_t>
__device__ __forceinline__ void multiply_unit(
    const Shared<float>& inputs, const Shared<float>& weights, Sums<Config::kBlocks>& sums, operand_t) {
    constexpr int kProducts = Config::kBlocks * 2;
    Fragment<operand_t, 2> b[Config::kWarpRows][2];
    const auto load_row = [&](int slot, int row) {
        unsigned words[4];
        ldmatrix_x4(words, inputs + row * Config::kHaloWidth * Config::kInputRow);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            b[slot][e / 2].set(e % 2, words[e]);
        }
    };
#pragma unroll
    for (int row = 0; row < Config::kWarpRows - 1; ++row) {
        load_row(row, row);
    }
    const auto words = pointer_cast<const unsigned>(weights);
#pragma unroll(std::is_same_v<operand_t, Tf32> ? 3 : 1)
    for (int tap = 0; tap < 3; ++tap) {
        load_row(Config::kWarpRows - 1, Config::kWarpRows - 1 + tap);
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            Fragment<operand_t, 4> a;
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const Vec<unsigned, 2> pair =
                    load_vector<2>(words + ((tap * Config::kUnitChannels + e * 2) * Config::kWeightRow + product * 16));
                a.set(e, prepared(pair[0], operand_t{}));
                a.set(e + 1, prepared(pair[1], operand_t{}));
            }
#pragma unroll
            for (int row = 0; row < Config::kWarpRows; ++row) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    multiply_add(sums[row][half * kProducts + product], a, b[row][half]);
                }
            }
        }
#pragma unroll
        for (int row = 0; row < Config::kWarpRows - 1; ++row) {
            b[row][0] = b[row + 1][0];
            b[row][1] = b[row + 1][1];
        }
    }
}

// Loader of the inputs of a thread: 16 bytes of the channels of a step, for a pixel of every chunk.
template <typename operand_t, int kAccess, int kTileOutputs>
struct InputLoader {
    using scalar_t = element_t<operand_t>;
    using Config = TensorCoreConfig<operand_t, kTileOutputs>;
    static constexpr int kThreads = Config::kChannels / Config::kVector;                 // threads per pixel
    static constexpr int kWord = static_cast<int>(sizeof(unsigned) / sizeof(scalar_t));  // elements per word

    const ConvTable<scalar_t>& table;
    Shared<int64_t> pixel_offsets;
    int channel, pixel;
    Shared<unsigned> target;
    InputReader<Config::kHeight, Config::kWidth, Config::kInputs, scalar_t> reader;

    __device__ __forceinline__ InputLoader(
        const ConvTable<scalar_t>& table, const Shared<scalar_t>& inputs, const Shared<int64_t>& pixel_offsets,
        int thread)
        : table(table),
          pixel_offsets(pixel_offsets),
          channel(thread % kThreads * Config::kVector),
          pixel(thread / kThreads),
          target(pointer_cast<unsigned>(inputs + (pixel * Config::kInputRow + channel))) {}

    // All threads of the block must call it, with barriers before and after.
    __device__ __forceinline__ void begin(const ConvTile& tile) {
        reader.end();
        if (tile.index < table.num_tiles) {
            reader.begin(
                table.entries[tile.entry].source, map_of<Config::kHeight, Config::kWidth>(table, tile), channel,
                pixel_offsets);
        }
    }
    __device__ __forceinline__ SumTerms fetch(int chunk) const {
        return reader.template fetch<kAccess>(pixel_offsets, chunk * Config::kChunkPixels + pixel);
    }
    __device__ __forceinline__ void store(int chunk, const SumTerms& terms) const {
        Vec<unsigned, 4> words = sum_of<scalar_t>(terms);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = prepared(words[i], operand_t{});
        }
        store_vector(target + chunk * (Config::kChunkPixels * Config::kInputRow / kWord), words);
    }
    // Load the first step of a tile, without products in between.
    __device__ __forceinline__ void load_step() const {
        SumTerms chunks[Config::kUnits];
#pragma unroll
        for (int chunk = 0; chunk < Config::kUnits; ++chunk) {
            chunks[chunk] = fetch(chunk);
        }
#pragma unroll
        for (int chunk = 0; chunk < Config::kUnits; ++chunk) {
            store(chunk, chunks[chunk]);
        }
    }
};

// Loader of the weights of a thread: 16 bytes of outputs in some rows of a unit, by cp.async.
template <typename operand_t, int kTileOutputs>
struct WeightLoader {
    using scalar_t = element_t<operand_t>;
    using Config = TensorCoreConfig<operand_t, kTileOutputs>;
    static constexpr int kThreads = Config::kOutputs / Config::kVector;  // threads per row

    const ConvTable<scalar_t>& table;
    int row, column;
    Shared<scalar_t> target;
    Global<const scalar_t> source{nullptr};
    int left = 0, row_size = 0, tap_size = 0;  // remaining channels; elements of a row (a channel), and of a tap

    __device__ __forceinline__
    WeightLoader(const ConvTable<scalar_t>& table, const Shared<scalar_t>& weights, int thread)
        : table(table),
          row(thread / kThreads),
          column(thread % kThreads * Config::kVector),
          target(weights + (row * Config::kWeightRow + column)) {}

    __device__ __forceinline__ void begin(const ConvTile& tile) {
        left = 0;
        if (tile.index < table.num_tiles) {
            const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
            row_size = padded_outputs(entry.outputs);
            tap_size = row_size * entry.source.channels;
            source = entry.weights + (row * row_size + tile.output + column);
            left = tile.output + column < row_size ? entry.source.channels - row : 0;
        }
    }
    // Start the copies of the next unit, in column `tap_column` of taps.
    __device__ __forceinline__ void copy(int tap_column) {
#pragma unroll
        for (int i = 0; i < Config::kWeightRows; i += Config::kCopiedRows) {
            const int tap = i / Config::kUnitChannels * 3, channel = i % Config::kUnitChannels;
            cp_async_16(
                target + (tap_column * Config::kWeightStage + i * Config::kWeightRow),
                source + (static_cast<int64_t>(tap) * tap_size + channel * row_size), channel < left);
        }
        cp_async_commit();
        source += tap_size;
        if (tap_column == 2) {
            source += Config::kUnitChannels * row_size - static_cast<int64_t>(3) * tap_size;
            left -= Config::kUnitChannels;
        }
    }
};

// Multiply a step if the warp is `busy`. During its products the inputs of the next step are loaded, and the weights of
// each unit are copied two units ahead. After the last step of a tile, the next step is the first one of tile `next`.
// This lane reads the first row of inputs at `inputs` and the first tap at `weights`.
template <
    typename operand_t, int kAccess, int kTileOutputs, typename Config = TensorCoreConfig<operand_t, kTileOutputs>>
__device__ __forceinline__ void multiply_step(
    InputLoader<operand_t, kAccess, kTileOutputs>& input_loader, WeightLoader<operand_t, kTileOutputs>& weight_loader,
    bool is_last, const ConvTile& next, bool busy, Shared<element_t<operand_t>>& inputs,
    const Shared<element_t<operand_t>>& weights, Sums<Config::kBlocks>& sums) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int column = 0; column < 3; ++column) {
            cp_async_wait<Config::kWeightStages - 2>();
            __syncthreads();
            // All warps have finished the previous unit, so its stage is free.
            if (column == 1 && half == 1 && is_last) {
                weight_loader.begin(next);
            }
            weight_loader.copy((column + 2) % Config::kWeightStages);
            const SumTerms chunk = input_loader.fetch(half * 3 + column);
            if (busy) {
                multiply_unit<Config>(
                    inputs + column * Config::kInputRow, weights + column * Config::kWeightStage, sums, operand_t{});
            }
            input_loader.store(half * 3 + column, chunk);
        }
        inputs += Config::kUnitChannels;
    }
}

template <typename operand_t, int kAccess, int kTileOutputs>
__global__ void __launch_bounds__(
    TensorCoreConfig<operand_t, kTileOutputs>::kThreads, TensorCoreConfig<operand_t, kTileOutputs>::kResident)
    conv3x3_tensor_core_kernel(const __grid_constant__ ConvTable<element_t<operand_t>> table) {
    using scalar_t = element_t<operand_t>;
    using Config = TensorCoreConfig<operand_t, kTileOutputs>;
    using Coordinates =
        std::conditional_t<sizeof(scalar_t) == 4, FloatFragmentCoordinates, FragmentCoordinates<scalar_t>>;
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, inputs);                     // 2 x [pixel with halo][channel]
    SPATIALFLOW_SHARED(int64_t, pixel_offsets, 2 * Config::kInputs);  // see InputReader
    SPATIALFLOW_SHARED(unsigned, skipped, kSkippedWords);
    const auto weights = inputs + 2 * Config::kInputBuffer;  // stages x [tap of the column][channel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int warp_row = warp / 2 * Config::kWarpRows, warp_output = warp % 2 * Config::kWarpOutputs;
    InputLoader<operand_t, kAccess, kTileOutputs> input_loader(table, inputs, pixel_offsets, thread);
    WeightLoader<operand_t, kTileOutputs> weight_loader(table, weights, thread);

    if (table.active) {
        skip_inactive_images<Config>(table, skipped);
    }
    ConvTile tile = conv_tile<Config::kOutputs>(table, next_tile(table, skipped, static_cast<int>(blockIdx.x)));
    if (tile.index >= table.num_tiles) {
        return;
    }
    weight_loader.begin(tile);
    weight_loader.copy(0);
    weight_loader.copy(1);
    input_loader.begin(tile);
    __syncthreads();
    input_loader.load_step();
    // Positions from which this lane reads: by ldmatrix, or for weights in float32 by loads.
    int lane_pixel = lane % 16, lane_channel = lane / 16 * 8, lane_row = lane % 16, lane_output = lane / 16 * 8;
    if constexpr (sizeof(scalar_t) == 4) {
        lane_pixel = lane / 16 * 8 + lane % 8;
        lane_channel = lane / 8 % 2 * 4;
        lane_row = lane % 4;
        lane_output = lane / 4 * 2;
    }
    Shared<scalar_t> lane_inputs =
        inputs + ((warp_row * Config::kHaloWidth + lane_pixel) * Config::kInputRow + lane_channel);
    const auto lane_weights = weights + (lane_row * Config::kWeightRow + warp_output + lane_output);
    constexpr int kWord = InputLoader<operand_t, kAccess, kTileOutputs>::kWord;
    int buffer_offset = Config::kInputBuffer;  // offset to the other buffer
    input_loader.target += buffer_offset / kWord;
    Sums<Config::kBlocks> sums;
    while (tile.index < table.num_tiles) {
        // A warp without outputs, or with all its rows below the map, only loads tiles.
        bool busy = false;
        {
            const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
            const MapTile map = map_of<Config::kHeight, Config::kWidth>(table, tile);
            busy = tile.output + warp_output < entry.outputs && map.y + warp_row < entry.source.height;
            if (busy) {
                start_sums<Config::kBlocks>(
                    entry, Coordinates(entry, map, warp_row, tile.output + warp_output, lane), sums);
            }
        }
        ConvTile next = tile;
        int left = table.entries[tile.entry].source.channels;
#pragma unroll 1
        do {
            left -= Config::kChannels;
            if (left <= 0) {
                next = conv_tile<Config::kOutputs>(
                    table, next_tile(table, skipped, tile.index + static_cast<int>(gridDim.x)));
                __syncthreads();  // before pixel_offsets is written again
                input_loader.begin(next);
            } else {
                input_loader.reader.advance(Config::kChannels);
            }
            multiply_step(input_loader, weight_loader, left <= 0, next, busy, lane_inputs, lane_weights, sums);
            lane_inputs += buffer_offset - Config::kChannels;
            buffer_offset = -buffer_offset;
            input_loader.target += buffer_offset / kWord;
        } while (left > 0);
        if (busy) {
            const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
            const MapTile map = map_of<Config::kHeight, Config::kWidth>(table, tile);
            store_sums<Config::kBlocks>(
                entry, Coordinates(entry, map, warp_row, tile.output + warp_output, lane), sums);
        }
        tile = next;
    }
    cp_async_wait<0>();
}

}  // namespace spatialflow
