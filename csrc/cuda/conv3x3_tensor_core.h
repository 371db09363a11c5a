// SPDX-License-Identifier: Apache-2.0
//
// The kernel of conv3x3.cu for 16-bit types, on the tensor cores.
#pragma once

#include <cstring>

#include "cuda/conv3x3_jobs.h"
#include "cuda/tensor_core.h"

namespace spatialflow {

// Sizes of the tensor-core kernel.
struct WideConv {
    static constexpr int kThreads = 128;
    static constexpr int kHeight = 8, kWidth = 16, kOutputs = 128;
    static constexpr int kWarpRows = 4, kWarpOutputs = 64;  // rows of the tile
    static constexpr int kChannels = 32;  // of a step
    static constexpr int kRimWidth = kWidth + 2, kInputs = (kHeight + 2) * kRimWidth;
    static constexpr int kInputRow = kChannels + 8, kWeightRow = kOutputs + 8;
    static constexpr int kInputVectors = kInputs * kChannels / 8;
    static constexpr int kPieces = (kInputVectors + kThreads - 1) / kThreads;
    static constexpr int kWeightStages = 3;
    static constexpr int kInputBuffer = kInputs * kInputRow, kWeightStage = kChannels * kWeightRow;  // elements
    static constexpr size_t kSharedBytes = 2 * (2 * kInputBuffer + kWeightStages * kWeightStage);
    static_assert(kTaps % kWeightStages == 0, "every step begins with the first stage");
};

// Lane q of four has values[j] for column block j; afterwards values[r] is what lane r had for block q.
__device__ __forceinline__ void turn_quads(unsigned (&values)[4], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int low = distance == 1 ? 2 * pair : pair, high = low + distance;
            const unsigned received = __shfl_xor_sync(kAllLanes, upper ? values[low] : values[high], distance);
            values[low] = upper ? received : values[low];
            values[high] = upper ? values[high] : received;
        }
    }
}

// The pixels and outputs of which a lane holds 4 x 8 x 4 sums: of i and half the pixel, of j and e the output.
template <typename scalar_t>
struct SumPlaces {
    int64_t first;  // the first pixel's outputs
    int y, x, output;
    int height, width, outputs;

    __device__ __forceinline__ SumPlaces(
        const ConvJob<scalar_t>& job, const MapTile& map, int warp_row, int warp_output, int lane)
        : y(map.y + warp_row),
          x(map.x + lane / 4),
          output(warp_output + lane % 4 * 2),
          height(job.source.height),
          width(job.source.width),
          outputs(job.outputs) {
        first = output_at(job, map.image, y, x);
    }
    __device__ __forceinline__ bool is_inside(int i, int half) const { return y + i < height && x + half * 8 < width; }
    __device__ __forceinline__ int64_t pixel(int i, int half) const {
        return first + (static_cast<int64_t>(i) * width + half * 8) * outputs;
    }
};

// What a tile's sums start from: the residual, or zero.
template <typename scalar_t>
__device__ __forceinline__ void start_sums(
    const ConvJob<scalar_t>& job, const MapTile& map, int warp_row, int warp_output, int lane,
    float (&sums)[4][8][4]) {
    const SumPlaces<scalar_t> places(job, map, warp_row, warp_output, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int output = places.output + j * 8 + e % 2;
                sums[i][j][e] = 0.0f;
                if (job.residual && places.is_inside(i, e / 2) && output < places.outputs) {
                    const scalar_t added = job.residual[places.pixel(i, e / 2) + output];
                    sums[i][j][e] = load(added);
                }
            }
        }
    }
}

// Bias and ReLU of a warp's 64 x 64 sums, and their way out.
template <typename scalar_t>
__device__ __forceinline__ void store_sums(
    const ConvJob<scalar_t>& job, const MapTile& map, int warp_row, int warp_output, int lane,
    float (&sums)[4][8][4]) {
    const SumPlaces<scalar_t> places(job, map, warp_row, warp_output, lane);
    const int outputs = places.outputs;
    if (job.bias) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int output = places.output + j * 8 + e;
                const float bias = output < outputs ? job.bias[output] : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[i][j][e] += bias;
                    sums[i][j][2 + e] += bias;
                }
            }
        }
    }
    const bool relu = job.relu, wide = outputs % 8 == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool inside = places.is_inside(i, half);
            const Global<scalar_t> pixel = job.out + places.pixel(i, half);
#pragma unroll
            for (int block = 0; block < 2; ++block) {
                unsigned packed[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    Vec<scalar_t, 2> pair;
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        store(pair[e], rectified(sums[i][block * 4 + j][half * 2 + e], relu));
                    }
                    memcpy(&packed[j], &pair, sizeof(pair));
                    const int output = places.output + block * 32 + j * 8;
                    if (!wide && inside) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            if (output + e < outputs) {
                                pixel[output + e] = pair[e];
                            }
                        }
                    }
                }
                if (wide) {
                    turn_quads(packed, lane);
                    const int output = warp_output + block * 32 + lane % 4 * 8;
                    if (inside && output < outputs) {
                        Vec<scalar_t, 8> values;
                        memcpy(&values, packed, sizeof(values));
                        store_vector(pixel + output, values);
                    }
                }
            }
        }
    }
}

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(WideConv::kThreads, 2)
    conv3x3_tensor_core_kernel(const __grid_constant__ ConvTable<scalar_t> table) {
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, inputs);  // 2 x [pixel with rim][channel]
    const auto weights = inputs + 2 * WideConv::kInputBuffer;  // stages x [channel][output]
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int warp_row = warp / 2 * WideConv::kWarpRows, warp_output = warp % 2 * WideConv::kWarpOutputs;

    const auto step_after = [&](ConvStep step) {
        step.channel += WideConv::kChannels;
        if (step.channel < table.jobs[step.job].source.channels) {
            return step;
        }
        return first_step<WideConv::kOutputs>(table, step.tile + static_cast<int>(gridDim.x));
    };
    const auto fetch_inputs = [&](const ConvStep& step, const MapTile& map, int piece) {
        const int index = piece * WideConv::kThreads + thread, pixel = index / (WideConv::kChannels / 8);
        if (step.tile >= table.num_tiles || pixel >= WideConv::kInputs) {
            return Vec<scalar_t, 8>{};
        }
        return load_sum<8, kAccess>(
            table.jobs[step.job].source, map.image, map.y + pixel / WideConv::kRimWidth - 1,
            map.x + pixel % WideConv::kRimWidth - 1, step.channel + index % (WideConv::kChannels / 8) * 8);
    };
    const auto keep_inputs = [&](int buffer, int piece, const Vec<scalar_t, 8>& values) {
        const int index = piece * WideConv::kThreads + thread, pixel = index / (WideConv::kChannels / 8);
        if (pixel < WideConv::kInputs) {
            store_vector(inputs + (buffer * WideConv::kInputBuffer + pixel * WideConv::kInputRow +
                                   index % (WideConv::kChannels / 8) * 8), values);
        }
    };
    const auto copy_weights = [&](const ConvStep& step, int tap, int stage) {
        if (step.tile < table.num_tiles) {
            const ConvJob<scalar_t>& job = table.jobs[step.job];
            const int row_size = padded_outputs(job.outputs);
#pragma unroll
            for (int i = 0; i < WideConv::kChannels * WideConv::kOutputs / 8 / WideConv::kThreads; ++i) {
                const int index = i * WideConv::kThreads + thread;
                const int row = index / (WideConv::kOutputs / 8), column = index % (WideConv::kOutputs / 8) * 8;
                const int channel = step.channel + row, output = step.output + column;
                const bool valid = channel < job.source.channels && output < row_size;
                cp_async_16(
                    weights + (stage * WideConv::kWeightStage + row * WideConv::kWeightRow + column),
                    job.weights +
                        (valid ? (static_cast<int64_t>(tap) * job.source.channels + channel) * row_size + output : 0),
                    valid);
            }
        }
        cp_async_commit();
    };

    ConvStep step = first_step<WideConv::kOutputs>(table, static_cast<int>(blockIdx.x));
    for (int piece = 0; piece < WideConv::kPieces; ++piece) {
        keep_inputs(0, piece, fetch_inputs(step, map_of<WideConv::kHeight, WideConv::kWidth>(table, step), piece));
    }
    for (int tap = 0; tap < WideConv::kWeightStages - 1; ++tap) {
        copy_weights(step, tap, tap);
    }
    float sums[4][8][4] = {};
    int buffer = 0;
    while (step.tile < table.num_tiles) {
        const ConvJob<scalar_t>& job = table.jobs[step.job];
        const bool busy = step.output + warp_output < job.outputs;
        if (step.channel == 0) {
            start_sums(job, map_of<WideConv::kHeight, WideConv::kWidth>(table, step), warp_row,
                       step.output + warp_output, lane, sums);
        }
        const ConvStep next = step_after(step);
        const MapTile next_map = map_of<WideConv::kHeight, WideConv::kWidth>(table, next);
        int stage = 0;
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
            cp_async_wait<WideConv::kWeightStages - 2>();
            __syncthreads();
            // The stage that the tap before has read is free.
            const int ahead = tap + WideConv::kWeightStages - 1;
            const int free = stage == 0 ? WideConv::kWeightStages - 1 : stage - 1;
            if (ahead < kTaps) {
                copy_weights(step, ahead, free);
            } else {
                copy_weights(next, ahead - kTaps, free);
            }
            Vec<scalar_t, 8> piece{};
            if (tap < WideConv::kPieces) {
                piece = fetch_inputs(next, next_map, tap);
            }
            if (busy) {
                const int first_pixel = (warp_row + tap / 3) * WideConv::kRimWidth + tap % 3;
                const auto tap_inputs = inputs + (buffer * WideConv::kInputBuffer +
                                                  (first_pixel + lane % 16) * WideConv::kInputRow + lane / 16 * 8);
                const auto tap_weights = weights + (stage * WideConv::kWeightStage + lane % 16 * WideConv::kWeightRow +
                                                    warp_output + lane / 16 * 8);
#pragma unroll
                for (int k = 0; k < WideConv::kChannels; k += 16) {
                    unsigned b[4][4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        ldmatrix_x4_trans(b[j], tap_weights + (k * WideConv::kWeightRow + j * 16));
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        unsigned a[4];
                        ldmatrix_x4(a, tap_inputs + (i * WideConv::kRimWidth * WideConv::kInputRow + k));
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            const unsigned column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                            mma_16816(sums[i][j], a, column, scalar_t{});
                        }
                    }
                }
            }
            if (tap < WideConv::kPieces) {
                keep_inputs(1 - buffer, tap, piece);
            }
            stage = stage == WideConv::kWeightStages - 1 ? 0 : stage + 1;
        }
        if (busy && next.tile != step.tile) {
            store_sums(job, map_of<WideConv::kHeight, WideConv::kWidth>(table, step), warp_row,
                       step.output + warp_output, lane, sums);
        }
        step = next;
        buffer = 1 - buffer;
    }
    cp_async_wait<0>();
}

}  // namespace spatialflow
