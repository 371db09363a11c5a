// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions over all levels of their pyramids in one launch, on CUDA.
//
//   out[p, o] = relu?(sum over taps t, channels c of (x + flow)[p + t, c] * weights[t, c, o]
//                     + bias[o] + residual[p, o])
//
// An implicit GEMM: rows are pixels, columns are output channels, and the sum runs over 9 C. Sources are (N, H, W, C)
// with adjacent channels and any other strides. Weights are (9, C, O padded to 32); out and residual are (N, H, W, O).
// A table in the kernel's parameters has an entry per convolution and level, largest maps first. Blocks are persistent:
// each takes every gridDim.x-th tile. In 16-bit types, x + flow and the weights are rounded to the type. Results are
// deterministic.
//
// float64, and float32 with "direct": a block of 256 threads computes 8 x 8 pixels by 64 outputs, 4 x 4 sums per
// thread. 16-bit types, Tf32 and Tf32x3: conv3x3_tensor_core.cuh. 16-bit types on compute capability 9.0a:
// sm90_conv3x3.cu, if it supports the sizes.
#include <algorithm>

#include "cuda/conv3x3_tensor_core.cuh"
#include "cuda/sm90_conv3x3.h"

namespace spatialflow {
namespace {

constexpr int kMaxTiles = 1 << 30;  // the index of a tile beyond the last one still fits into an int

// ---- device ------------------------------------------------------------------------------------------------------

// Sizes of the kernel for float64, and for float32 with "direct".
struct SimtConfig {
    static constexpr int kThreads = 256;
    static constexpr int kSide = 8, kPixels = kSide * kSide, kOutputs = 64;
    static constexpr int kHeight = kSide, kWidth = kSide;
    static constexpr size_t kSharedBytes = 0;
    static constexpr int kChannels = 16;  // channels per step
    static constexpr int kGroup = 4;      // channels per iteration of the product loop
    static constexpr int kInputRow = kPixels + 4;
};

// Add bias and residual to the sums of a thread, apply ReLU, and store them. The sums are those of 4 pixels of the tile
// by 4 outputs.
template <typename scalar_t>
__device__ __forceinline__ void store_thread_sums(
    const ConvEntry<scalar_t>& entry, const MapTile& map, int first_pixel, int first_output,
    const scalar_t (&sums)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int pixel = first_pixel + i;
        const int y = map.y + pixel / SimtConfig::kSide, x = map.x + pixel % SimtConfig::kSide;
        const bool inside = y < entry.source.height && x < entry.source.width;
        const int64_t at = output_at(entry, map.image, y, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int output = first_output + j;
            if (inside && output < entry.outputs) {
                scalar_t value = sums[i][j];
                if (entry.bias) {
                    value += entry.bias[output];
                }
                if (entry.residual) {
                    value += entry.residual[at + output];
                }
                entry.out[at + output] = rectified(value, entry.relu);
            }
        }
    }
}

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(SimtConfig::kThreads, 2)
    conv3x3_kernel(const __grid_constant__ ConvTable<scalar_t> table) {
    constexpr int kVector = kVectorElements<scalar_t>;
    SPATIALFLOW_SHARED(scalar_t, input_tile, SimtConfig::kChannels * SimtConfig::kInputRow);  // [channel][pixel]
    SPATIALFLOW_SHARED(scalar_t, weight_tile, SimtConfig::kChannels * SimtConfig::kOutputs);  // [channel][output]
    SPATIALFLOW_SHARED(unsigned, skipped, kSkippedWords);
    const int thread = static_cast<int>(threadIdx.x);
    const int thread_row = thread / 16 * 4, thread_column = thread % 16 * 4;
    const int input_row = thread / 4, input_channel = thread % 4 * 4;
    const int weight_channel = thread / 16, weight_output = thread % 16 * 4;
    if (table.active) {
        skip_inactive_images<SimtConfig>(table, skipped);
    }
    for (int index = static_cast<int>(blockIdx.x); index < table.num_tiles; index += static_cast<int>(gridDim.x)) {
        if (table.active && is_skipped(skipped, index)) {
            continue;
        }
        const ConvTile tile = conv_tile<SimtConfig::kOutputs>(table, index);
        const MapTile map = map_of<SimtConfig::kSide, SimtConfig::kSide>(table, tile);
        const ConvEntry<scalar_t>& entry = table.entries[tile.entry];
        const int channels = entry.source.channels, row_size = padded_outputs(entry.outputs);
        Vec<scalar_t, 4> inputs;
        scalar_t weights[4];
        const auto fetch = [&](int tap, int c0) {
            inputs = load_sum<4, kAccess>(
                entry.source, map.image, map.y + input_row / SimtConfig::kSide + tap / 3 - 1,
                map.x + input_row % SimtConfig::kSide + tap % 3 - 1, c0 + input_channel);
            const int c = c0 + weight_channel, output = tile.output + weight_output;
            const auto source = entry.weights + ((static_cast<int64_t>(tap) * channels + c) * row_size + output);
#pragma unroll
            for (int i = 0; i < 4; i += kVector) {
                Vec<scalar_t, kVector> values{};
                if (c < channels && output < row_size) {
                    values = load_vector<kVector>(source + i);
                }
#pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    weights[i + j] = values[j];
                }
            }
        };
        // A thread without outputs, or with all its pixels below the map, only loads tiles.
        const bool busy =
            tile.output + thread_column < entry.outputs && map.y + thread_row / SimtConfig::kSide < entry.source.height;
        scalar_t sums[4][4] = {};
        const auto multiply = [&](int k) {
            scalar_t a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i += kVector) {
                const auto input_values =
                    load_vector<kVector>(input_tile + (k * SimtConfig::kInputRow + thread_row + i));
                const auto weight_values =
                    load_vector<kVector>(weight_tile + (k * SimtConfig::kOutputs + thread_column + i));
#pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    a[i + j] = input_values[j];
                    b[i + j] = weight_values[j];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[i][j] += a[i] * b[j];
                }
            }
        };
        int tap = 0, c0 = 0;
        fetch(tap, c0);
        while (tap < kTaps) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                input_tile[(input_channel + i) * SimtConfig::kInputRow + input_row] = inputs[i];
                weight_tile[weight_channel * SimtConfig::kOutputs + weight_output + i] = weights[i];
            }
            __syncthreads();
            const int present = channels - c0 < SimtConfig::kChannels ? channels - c0 : SimtConfig::kChannels;
            c0 += SimtConfig::kChannels;
            if (c0 >= channels) {
                c0 = 0;
                ++tap;
            }
            if (tap < kTaps) {
                fetch(tap, c0);
            }
            for (int group = 0; busy && group < present; group += SimtConfig::kGroup) {
#pragma unroll
                for (int k = group; k < group + SimtConfig::kGroup; ++k) {
                    multiply(k);
                }
            }
            __syncthreads();
        }
        store_thread_sums(entry, map, thread_row, tile.output + thread_column, sums);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Kernel for tiles of kOutputs outputs, and its sizes. Without tensor cores, kOutputs is always 64.
template <typename operand_t, int kOutputs>
struct Kernel {
    using scalar_t = element_t<operand_t>;
    using Config = std::conditional_t<kIsSimt<operand_t>, SimtConfig, TensorCoreConfig<operand_t, kOutputs>>;

    template <int kAccess>
    static constexpr auto with_access() {
        if constexpr (!kIsSimt<operand_t>) {
            return &conv3x3_tensor_core_kernel<operand_t, kAccess, kOutputs>;
        } else {
            return &conv3x3_kernel<scalar_t, kAccess>;
        }
    }
    // The number of resident blocks does not depend on the width of accesses.
    static int resident(Stream stream) {
        return resident_blocks<with_access<kVectorElements<scalar_t>>()>(
            Config::kThreads, Config::kSharedBytes, stream);
    }
    static int64_t output_tiles(const Tensor& out) { return ceil_div(out.size(1), Config::kOutputs); }
    static int64_t tiles(const Tensor& out) {
        return out.numel() == 0 ? 0
                                : out.size(0) * ceil_div(out.size(2), Config::kHeight) *
                                      ceil_div(out.size(3), Config::kWidth) * output_tiles(out);
    }
    static void launch_table(const ConvTable<scalar_t>& table, bool vectorized, Stream stream) {
        const dim3 blocks(persistent_blocks(table, resident(stream))), threads(Config::kThreads);
        if (vectorized) {
            launch<with_access<kVectorElements<scalar_t>>()>(blocks, threads, Config::kSharedBytes, stream, table);
        } else {
            launch<with_access<1>()>(blocks, threads, Config::kSharedBytes, stream, table);
        }
    }
    // Estimated time of all tiles, in quarters of the time of a tile. n concurrent tiles on a multiprocessor take the
    // time of n + 1/4 tiles.
    static int64_t cost(const std::vector<Convolution>& convolutions, Stream stream) {
        int64_t num_tiles = 0;
        for (const Convolution& conv : convolutions) {
            for (const Tensor& out : conv.out) {
                num_tiles += tiles(out);
            }
        }
        const int64_t blocks = resident(stream), multiprocessors = std::max<int64_t>(1, blocks / Config::kResident);
        const int64_t remaining = num_tiles % blocks;
        return num_tiles / blocks * (4 * Config::kResident + 1) +
               (remaining > 0 ? 4 * ceil_div(remaining, multiprocessors) + 1 : 0);
    }
};

// Entry of the table for level `level` of a convolution.
template <typename Tiles>
ConvEntry<typename Tiles::scalar_t> conv_entry(
    const char* op, const Convolution& conv, size_t level, const Global<const typename Tiles::scalar_t>& weights) {
    using scalar_t = typename Tiles::scalar_t;
    using real_t = accum_t<scalar_t>;
    using Config = typename Tiles::Config;
    const Tensor& out = conv.out[level];
    ConvEntry<scalar_t> entry{};
    entry.source = conv_source<scalar_t>(op, conv.x[level], conv.flow.empty() ? nullptr : &conv.flow[level]);
    entry.weights = weights;
    entry.bias = conv.bias ? data<real_t>(*conv.bias) : Global<const real_t>(nullptr);
    entry.residual = conv.residual.empty() ? Global<const scalar_t>(nullptr) : data<scalar_t>(conv.residual[level]);
    entry.out = mutable_data<scalar_t>(out);
    entry.outputs = static_cast<int>(out.size(1));
    entry.relu = conv.relu;
    entry.vectorized = out.size(1) % kVectorElements<scalar_t> == 0 &&
                       (conv.residual.empty() || is_aligned(conv.residual[level].const_data_ptr(), 16));
    entry.tile_rows = static_cast<int>(ceil_div(out.size(2), Config::kHeight));
    entry.tile_columns = static_cast<int>(ceil_div(out.size(3), Config::kWidth));
    entry.output_tiles = static_cast<int>(Tiles::output_tiles(out));
    return entry;
}

template <typename operand_t, int kOutputs>
void convolve(
    const char* op, const std::vector<Convolution>& convolutions, Stream stream, const std::optional<Tensor>& active) {
    using scalar_t = element_t<operand_t>;
    using Tiles = Kernel<operand_t, kOutputs>;
    struct SizedEntry {
        ConvEntry<scalar_t> entry;
        int64_t pixels, tiles;
    };
    std::vector<SizedEntry> sized_entries;
    bool vectorized = true;
    for (const Convolution& conv : convolutions) {
        vectorized =
            vectorized && has_vectorizable_channels<scalar_t>(conv.x) && has_vectorizable_channels<scalar_t>(conv.flow);
        if (conv.out.empty()) {
            continue;
        }
        const Global<const scalar_t> weights = kernel_weights<scalar_t>(conv);
        for (size_t i = 0; i < conv.out.size(); ++i) {
            const Tensor& out = conv.out[i];
            const int64_t tiles = Tiles::tiles(out);
            check(tiles <= kMaxTiles, op, ": a level of shape ", out, " holds too many tiles for a launch");
            if (tiles > 0) {
                sized_entries.push_back(
                    {conv_entry<Tiles>(op, conv, i, weights), out.size(0) * out.size(2) * out.size(3), tiles});
            }
        }
    }
    std::stable_sort(sized_entries.begin(), sized_entries.end(), [](const SizedEntry& a, const SizedEntry& b) {
        return a.pixels > b.pixels;
    });
    for (size_t next = 0; next < sized_entries.size();) {
        ConvTable<scalar_t> table{};
        table.active = active ? data<uint8_t>(*active) : Global<const uint8_t>(nullptr);
        for (; next < sized_entries.size() && table.num_entries < kMaxEntries; ++next) {
            if (sized_entries[next].tiles > kMaxTiles - table.num_tiles) {
                break;
            }
            table.entries[table.num_entries] = sized_entries[next].entry;
            table.entries[table.num_entries++].tile_begin = table.num_tiles;
            table.num_tiles += static_cast<int>(sized_entries[next].tiles);
        }
        Tiles::launch_table(table, vectorized, stream);
    }
}

// Choose the tiles and launch the kernel; results do not depend on the tiles. Narrow tiles waste less work for few
// outputs and small maps, but need more than half the time of wide ones.
template <typename operand_t>
void convolve(
    const char* op, std::vector<Convolution> convolutions, Stream stream, const std::optional<Tensor>& active) {
    if constexpr (sizeof(element_t<operand_t>) == 2) {
        convolutions = convolve3x3_sm90<operand_t>(convolutions, stream, active);
    }
    if (convolutions.empty()) {
        return;
    }
    if constexpr (kIsSimt<operand_t> || std::is_same_v<operand_t, Tf32x3>) {
        convolve<operand_t, 64>(op, convolutions, stream, active);
    } else if (
        10 * Kernel<operand_t, 128>::cost(convolutions, stream) <
        6 * Kernel<operand_t, 64>::cost(convolutions, stream)) {
        convolve<operand_t, 128>(op, convolutions, stream, active);
    } else {
        convolve<operand_t, 64>(op, convolutions, stream, active);
    }
}

}  // namespace

void convolve3x3(
    const char* op, std::vector<Convolution> convolutions, Stream stream, const std::optional<Tensor>& active) {
    for (Convolution& convolution : convolutions) {
        convolution.packed = aligned(convolution.packed);
        convolution.algorithm = cuda_algorithm(convolution.algorithm, convolution.x[0].scalar_type());
    }
    while (!convolutions.empty()) {
        const int64_t algorithm = convolutions[0].algorithm;
        const auto group_end = std::stable_partition(
            convolutions.begin(), convolutions.end(),
            [&](const Convolution& convolution) { return convolution.algorithm == algorithm; });
        std::vector<Convolution> group(convolutions.begin(), group_end);
        convolutions.erase(convolutions.begin(), group_end);
        dispatch_floating(op, group[0].x[0].scalar_type(), [&](auto zero) {
            dispatch_operand<decltype(zero)>(
                algorithm, [&](auto operand) { convolve<decltype(operand)>(op, std::move(group), stream, active); });
        });
    }
}

}  // namespace spatialflow
