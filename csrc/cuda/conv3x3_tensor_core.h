// SPDX-License-Identifier: Apache-2.0
//
// The kernel of conv3x3.cu on the tensor cores: for 16-bit types, and for float32 by TF32.
#pragma once

#include "cuda/conv3x3_jobs.h"
#include "cuda/tensor_core.h"

namespace spatialflow {

// Sizes of the tensor-core kernel. A step is kChannels channels, and has a unit for each half of them and column of
// taps: kWeightRows rows of weights, multiplied while a piece of the next step's inputs is loaded. In bytes, all
// operands have the same sizes.
template <typename operand_t, int kTileOutputs>
struct WideConv {
    static constexpr int kVector = kWideElements<element_t<operand_t>>;
    static constexpr int kThreads = 128;
    static constexpr int kHeight = 8, kWidth = 16, kOutputs = kTileOutputs;
    static constexpr int kWarpRows = 4, kWarpOutputs = kOutputs / 2;  // rows of the tile
    static constexpr int kBlocks = kWarpOutputs / 32;                 // of packed_position
    // On a multiprocessor, by registers and shared memory.
    static constexpr int kResident = kOutputs == 128 || std::is_same_v<operand_t, Tf32x3> ? 2 : 3;
    static constexpr int kChannels = 4 * kVector, kUnitChannels = 2 * kVector;
    static constexpr int kUnits = kChannels / kUnitChannels * 3;
    static constexpr int kRimWidth = kWidth + 2;
    static constexpr int kPiece = kThreads / (kChannels / kVector);  // pixels
    static constexpr int kInputs = kUnits * kPiece;                  // pixels with halo, filled up to whole pieces
    static constexpr int kInputRow = kChannels + kVector, kWeightRow = kOutputs + 8;
    static constexpr int kWeightRows = 3 * kUnitChannels, kWeightStages = 3;
    static constexpr int kCopiedRows = kThreads / (kOutputs / kVector);  // by all threads at one time
    static constexpr int kInputBuffer = kInputs * kInputRow, kWeightStage = kWeightRows * kWeightRow;  // elements
    static constexpr size_t kSharedBytes =
        sizeof(element_t<operand_t>) * (2 * kInputBuffer + kWeightStages * kWeightStage);
    static_assert((kHeight + 2) * kRimWidth <= kInputs, "a piece per unit");
};

// The sums of a lane, of four rows. In 16 bits outputs are the columns of a product: sums[i][j][e] is pixel e / 2 * 8,
// output j / 4 * 32 + j % 4 * 2 + e % 2 from its first on. In float32 they are the rows: see FloatPlaces.
template <int kBlocks>
using Sums = float[4][kBlocks * 4][4];

// Pixels and outputs in 16 bits. A lane of four has eight outputs side by side in each block of 32 (packed_position).
template <typename scalar_t>
struct SumPlaces {
    int64_t first;  // the first pixel's outputs
    int y, x, output;
    int height, width, outputs;

    __device__ __forceinline__
    SumPlaces(const ConvJob<scalar_t>& job, const MapTile& map, int warp_row, int warp_output, int lane)
        : y(map.y + warp_row),
          x(map.x + lane / 4),
          output(warp_output + lane % 4 * 8),
          height(job.source.height),
          width(job.source.width),
          outputs(job.outputs) {
        first = output_at(job, map.image, y, x) + output;
    }
    __device__ __forceinline__ bool is_inside(int i, int half) const { return y + i < height && x + half * 8 < width; }
    // The first of eight outputs.
    __device__ __forceinline__ int64_t at(int i, int half, int block) const {
        return first + (static_cast<int64_t>(i) * width + half * 8) * outputs + block * 32;
    }
    __device__ __forceinline__ int left(int block) const { return outputs - output - block * 32; }
};

// What a tile's sums start from: bias and residual.
template <int kBlocks, typename scalar_t>
__device__ __forceinline__ void start_sums(
    const ConvJob<scalar_t>& job, const SumPlaces<scalar_t>& places, Sums<kBlocks>& sums) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float bias = 0.0f;
            if (job.bias && e < places.left(block)) {
                bias = job.bias[places.output + block * 32 + e];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[i / 2][block * 4 + e / 2][i % 2 * 2 + e % 2] = bias;
            }
        }
    }
    if (!job.residual) {
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const int left = places.is_inside(i / 2, i % 2) ? places.left(block) : 0;
            const Global<const scalar_t> source = job.residual + places.at(i / 2, i % 2, block);
            Vec<scalar_t, 8> values{};
            if (job.wide) {
                if (left > 0) {
                    values = load_vector<8>(source);
                }
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (e < left) {
                        values[e] = source[e];
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                sums[i / 2][block * 4 + e / 2][i % 2 * 2 + e % 2] += load(values[e]);
            }
        }
    }
}

// ReLU of a warp's sums, and their way out.
template <int kBlocks, typename scalar_t>
__device__ __forceinline__ void store_sums(
    const ConvJob<scalar_t>& job, const SumPlaces<scalar_t>& places, const Sums<kBlocks>& sums) {
    const bool relu = job.relu;
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
            const int left = places.is_inside(i / 2, i % 2) ? places.left(block) : 0;
            const Global<scalar_t> target = job.out + places.at(i / 2, i % 2, block);
            const Vec<unsigned, 4> words = outputs_of(i, block);
            if (job.wide) {
                if (left > 0) {
                    store_vector(pointer_cast<unsigned>(target), words);
                }
            } else {
                Vec<scalar_t, 8> values;
                memcpy(&values, &words, sizeof(words));
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (e < left) {
                        target[e] = values[e];
                    }
                }
            }
        }
    }
}

// In float32 sums[i][j][e] is column j / kProducts * 8 + e % 2, output j % kProducts * 16 + e / 2 from the lane's first
// on: two of eight columns, two of 16 outputs.
struct FloatPlaces {
    int64_t first;  // the first pixel's outputs
    int y, x, output;
    int height, width, outputs;

    __device__ __forceinline__
    FloatPlaces(const ConvJob<float>& job, const MapTile& map, int warp_row, int warp_output, int lane)
        : y(map.y + warp_row),
          x(map.x + lane % 4 * 2),
          output(warp_output + lane / 4 * 2),
          height(job.source.height),
          width(job.source.width),
          outputs(job.outputs) {
        first = output_at(job, map.image, y, x) + output;
    }
    // Calls body(sums of two outputs, where they lie, how many outputs there are from there on) for the pixels inside.
    // With a branch for each pixel, its loads are all that is on the way at one time: for more there are no registers.
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
                    auto& own = sums[row][half * kProducts + product];
                    body(own[pixel % 2], own[2 + pixel % 2], at + product * 16, outputs - output - product * 16);
                }
            }
        }
    }
};

// Bias and residual are added at the end, so that a residual gives the same number as an addition of maps.
template <int kBlocks>
__device__ __forceinline__ void start_sums(const ConvJob<float>&, const FloatPlaces&, Sums<kBlocks>& sums) {
#pragma unroll
    for (int i = 0; i < kBlocks * 64; ++i) {
        sums[i / (kBlocks * 16)][i / 4 % (kBlocks * 4)][i % 4] = 0.0f;
    }
}

template <int kBlocks>
__device__ __forceinline__ void store_sums(const ConvJob<float>& job, const FloatPlaces& places, Sums<kBlocks>& sums) {
    constexpr int kProducts = kBlocks * 2;
    // Read from the table once: the compiler may keep a register for each place that asks.
    const Global<const float> biases = job.bias, residuals = job.residual;
    const Global<float> out = job.out;
    const bool relu = job.relu, wide = job.wide;
    if (biases) {
#pragma unroll
        for (int i = 0; i < kProducts * 2; ++i) {
            const int product = i / 2, output = places.output + product * 16 + i % 2;
            const float bias = output < places.outputs ? biases[output] : 0.0f;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                sums[j / 4][j / 2 % 2 * kProducts + product][i % 2 * 2 + j % 2] += bias;
            }
        }
    }
    if (residuals && wide) {
        places.visit<kBlocks>(sums, [&](float& one, float& other, int64_t at, int left) {
            const Vec<float, 2> residual = left > 0 ? load_vector<2>(residuals + at) : Vec<float, 2>{};
            one += residual[0];
            other += residual[1];
        });
    } else if (residuals) {
        places.visit<kBlocks>(sums, [&](float& one, float& other, int64_t at, int left) {
            one += left > 0 ? residuals[at] : 0.0f;
            other += left > 1 ? residuals[at + 1] : 0.0f;
        });
    }
    places.visit<kBlocks>(sums, [&](float one, float other, int64_t at, int left) {
        const Vec<float, 2> values = {{rectified(one, relu), rectified(other, relu)}};
        if (wide) {
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

// The products of a unit: a column of taps, and channels that are the depth of a product. `inputs` and `weights` are
// where this lane reads for the first row of inputs and the first tap. In 16 bits a row of inputs serves its three taps
// before the next one is read, which keeps the weights of a column in registers.
template <typename Size, typename scalar_t>
__device__ __forceinline__ void multiply_unit(
    const Shared<scalar_t>& inputs, const Shared<scalar_t>& weights, Sums<Size::kBlocks>& sums,
    scalar_t /* operand type */) {
    unsigned b[3][Size::kBlocks * 2][4];
#pragma unroll
    for (int row = 0; row < Size::kWarpRows + 2; ++row) {
        if (row < 3) {
#pragma unroll
            for (int j = 0; j < Size::kBlocks * 2; ++j) {
                ldmatrix_x4_trans(b[row][j], weights + (row * Size::kUnitChannels * Size::kWeightRow + j * 16));
            }
        }
        unsigned a[4];
        ldmatrix_x4(a, inputs + row * Size::kRimWidth * Size::kInputRow);
        // This row of inputs under the tap of row t belongs to row i of the sums.
#pragma unroll
        for (int t = 0; t < 3; ++t) {
            const int i = row - t;
            if (i >= 0 && i < Size::kWarpRows) {
#pragma unroll
                for (int j = 0; j < Size::kBlocks * 4; ++j) {
                    const unsigned right[2] = {b[t][j / 2][j % 2 * 2], b[t][j / 2][j % 2 * 2 + 1]};
                    mma_16816(sums[i][j], a, right, scalar_t{});
                }
            }
        }
    }
}

// In float32 weights, which lie in order, are the left side; rows of inputs serve one tap after the other. For Tf32x3,
// which needs more registers, the compiler sees one tap at a time.
template <typename Size, typename operand_t>
__device__ __forceinline__ void multiply_unit(
    const Shared<float>& inputs, const Shared<float>& weights, Sums<Size::kBlocks>& sums, operand_t) {
    constexpr int kProducts = Size::kBlocks * 2;
    Fragment<operand_t, 2> b[Size::kWarpRows][2];
    const auto load_row = [&](int place, int row) {
        unsigned words[4];
        ldmatrix_x4(words, inputs + row * Size::kRimWidth * Size::kInputRow);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            b[place][e / 2].set(e % 2, words[e]);
        }
    };
#pragma unroll
    for (int row = 0; row < Size::kWarpRows - 1; ++row) {
        load_row(row, row);
    }
    const auto words = pointer_cast<const unsigned>(weights);
#pragma unroll(std::is_same_v<operand_t, Tf32> ? 3 : 1)
    for (int tap = 0; tap < 3; ++tap) {
        load_row(Size::kWarpRows - 1, Size::kWarpRows - 1 + tap);
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            Fragment<operand_t, 4> a;
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const Vec<unsigned, 2> pair =
                    load_vector<2>(words + ((tap * Size::kUnitChannels + e * 2) * Size::kWeightRow + product * 16));
                a.set(e, prepared(pair[0], operand_t{}));
                a.set(e + 1, prepared(pair[1], operand_t{}));
            }
#pragma unroll
            for (int row = 0; row < Size::kWarpRows; ++row) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    multiply_add(sums[row][half * kProducts + product], a, b[row][half]);
                }
            }
        }
#pragma unroll
        for (int row = 0; row < Size::kWarpRows - 1; ++row) {
            b[row][0] = b[row + 1][0];
            b[row][1] = b[row + 1][1];
        }
    }
}

template <typename operand_t, int kAccess, int kTileOutputs>
__global__ void __launch_bounds__(
    WideConv<operand_t, kTileOutputs>::kThreads, WideConv<operand_t, kTileOutputs>::kResident)
    conv3x3_tensor_core_kernel(const __grid_constant__ ConvTable<element_t<operand_t>> table) {
    using scalar_t = element_t<operand_t>;
    using Size = WideConv<operand_t, kTileOutputs>;
    using Places = std::conditional_t<sizeof(scalar_t) == 4, FloatPlaces, SumPlaces<scalar_t>>;
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, inputs);            // 2 x [pixel with halo][channel]
    SPATIALFLOW_SHARED(int64_t, places, 2 * Size::kInputs);  // of InputReader
    SPATIALFLOW_SHARED(unsigned, left_out, kNotedWords);
    const auto weights = inputs + 2 * Size::kInputBuffer;  // stages x [tap of the column][channel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int warp_row = warp / 2 * Size::kWarpRows, warp_output = warp % 2 * Size::kWarpOutputs;

    // Inputs to be fetched: this thread's 16 bytes of a step.
    constexpr int kInputThreads = Size::kChannels / Size::kVector;
    const int input_channel = thread % kInputThreads * Size::kVector, input_pixel = thread / kInputThreads;
    InputReader<Size::kHeight, Size::kWidth, Size::kInputs, scalar_t> reader;
    const auto begin_inputs = [&](const ConvTile& tile) {
        reader.end();
        if (tile.tile < table.num_tiles) {
            reader.begin(
                table.jobs[tile.job].source, map_of<Size::kHeight, Size::kWidth>(table, tile), input_channel, places);
        }
    };
    const auto fetch_inputs = [&](int piece) {
        return reader.template fetch<kAccess>(places, piece * Size::kPiece + input_pixel);
    };
    constexpr int kWord = static_cast<int>(sizeof(unsigned) / sizeof(scalar_t));  // elements
    auto input_target = pointer_cast<unsigned>(inputs + (input_pixel * Size::kInputRow + input_channel));
    const auto keep_inputs = [&](int piece, const SumTerms& terms) {
        Vec<unsigned, 4> words = sum_of<scalar_t>(terms);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = prepared(words[i], operand_t{});
        }
        store_vector(input_target + piece * (Size::kPiece * Size::kInputRow / kWord), words);
    };

    // Weights to be copied: this thread's 16 bytes of outputs, in some of a unit's rows.
    constexpr int kRowThreads = Size::kOutputs / Size::kVector;
    const int weight_row = thread / kRowThreads, weight_column = thread % kRowThreads * Size::kVector;
    const auto weight_target = weights + (weight_row * Size::kWeightRow + weight_column);
    Global<const scalar_t> weight(nullptr);
    int weight_left = 0, row_size = 0, tap_size = 0;  // channels from there on; elements of a channel, and of a tap
    const auto begin_weights = [&](const ConvTile& tile) {
        weight_left = 0;
        if (tile.tile < table.num_tiles) {
            const ConvJob<scalar_t>& job = table.jobs[tile.job];
            row_size = padded_outputs(job.outputs);
            tap_size = row_size * job.source.channels;
            weight = job.weights + (weight_row * row_size + tile.output + weight_column);
            weight_left = tile.output + weight_column < row_size ? job.source.channels - weight_row : 0;
        }
    };
    const auto copy_weights = [&](int column) {
#pragma unroll
        for (int row = 0; row < Size::kWeightRows; row += Size::kCopiedRows) {
            const int tap = row / Size::kUnitChannels * 3, channel = row % Size::kUnitChannels;
            cp_async_16(
                weight_target + (column * Size::kWeightStage + row * Size::kWeightRow),
                weight + (static_cast<int64_t>(tap) * tap_size + channel * row_size), channel < weight_left);
        }
        cp_async_commit();
        weight += tap_size;
        if (column == 2) {
            weight += Size::kUnitChannels * row_size - static_cast<int64_t>(3) * tap_size;
            weight_left -= Size::kUnitChannels;
        }
    };

    if (table.active) {
        leave_out_images<Size>(table, left_out);
    }
    ConvTile tile = conv_tile<Size::kOutputs>(table, next_tile(table, left_out, static_cast<int>(blockIdx.x)));
    if (tile.tile >= table.num_tiles) {
        return;
    }
    begin_weights(tile);
    copy_weights(0);
    copy_weights(1);
    begin_inputs(tile);
    __syncthreads();
    {
        SumTerms pieces[Size::kUnits];
#pragma unroll
        for (int piece = 0; piece < Size::kUnits; ++piece) {
            pieces[piece] = fetch_inputs(piece);
        }
#pragma unroll
        for (int piece = 0; piece < Size::kUnits; ++piece) {
            keep_inputs(piece, pieces[piece]);
        }
    }
    // Where this lane points ldmatrix, or loads its weights.
    int own_pixel = lane % 16, own_channel = lane / 16 * 8, own_row = lane % 16, own_output = lane / 16 * 8;
    if constexpr (sizeof(scalar_t) == 4) {
        own_pixel = lane / 16 * 8 + lane % 8;
        own_channel = lane / 8 % 2 * 4;
        own_row = lane % 4;
        own_output = lane / 4 * 2;
    }
    auto tap_inputs = inputs + ((warp_row * Size::kRimWidth + own_pixel) * Size::kInputRow + own_channel);
    const auto tap_weights = weights + (own_row * Size::kWeightRow + warp_output + own_output);
    int turn = Size::kInputBuffer;  // to the other buffer
    input_target += turn / kWord;
    Sums<Size::kBlocks> sums;
    while (tile.tile < table.num_tiles) {
        // A warp without an output, or with all its rows below the map, only helps to fetch.
        bool busy = false;
        {
            const ConvJob<scalar_t>& job = table.jobs[tile.job];
            const MapTile map = map_of<Size::kHeight, Size::kWidth>(table, tile);
            busy = tile.output + warp_output < job.outputs && map.y + warp_row < job.source.height;
            if (busy) {
                start_sums<Size::kBlocks>(job, Places(job, map, warp_row, tile.output + warp_output, lane), sums);
            }
        }
        ConvTile next = tile;
        int left = table.jobs[tile.job].source.channels;
#pragma unroll 1
        do {
            left -= Size::kChannels;
            if (left <= 0) {
                next = conv_tile<Size::kOutputs>(
                    table, next_tile(table, left_out, tile.tile + static_cast<int>(gridDim.x)));
                __syncthreads();  // before `places` is written again
                begin_inputs(next);
            } else {
                reader.advance(Size::kChannels);
            }
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int column = 0; column < 3; ++column) {
                    cp_async_wait<Size::kWeightStages - 2>();
                    __syncthreads();
                    // The stage that the unit before has read is free.
                    if (column == 1 && half == 1 && left <= 0) {
                        begin_weights(next);
                    }
                    copy_weights((column + 2) % Size::kWeightStages);
                    const SumTerms piece = fetch_inputs(half * 3 + column);
                    if (busy) {
                        multiply_unit<Size>(
                            tap_inputs + column * Size::kInputRow, tap_weights + column * Size::kWeightStage, sums,
                            operand_t{});
                    }
                    keep_inputs(half * 3 + column, piece);
                }
                tap_inputs += Size::kUnitChannels;
            }
            tap_inputs += turn - Size::kChannels;
            turn = -turn;
            input_target += turn / kWord;
        } while (left > 0);
        if (busy) {
            const ConvJob<scalar_t>& job = table.jobs[tile.job];
            const MapTile map = map_of<Size::kHeight, Size::kWidth>(table, tile);
            store_sums<Size::kBlocks>(job, Places(job, map, warp_row, tile.output + warp_output, lane), sums);
        }
        tile = next;
    }
    cp_async_wait<0>();
}

}  // namespace spatialflow
