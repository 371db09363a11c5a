// SPDX-License-Identifier: Apache-2.0
//
// Host side of the 3x3 convolutions in 16-bit types on compute capability 9.0a. It fills the table of a launch, and
// chooses tiles by an estimate of cycles. The kernel is in sm90_conv3x3_kernel.cuh.
#include "cuda/sm90_conv3x3.h"

#include <algorithm>
#include <limits>

#include "cuda/sm90_conv3x3_kernel.cuh"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

template <typename scalar_t>
bool encode_level(TensorMap& map, const Tensor& level) {
    const int64_t sizes[] = {level.size(1), level.size(3), level.size(2), level.size(0)};
    const int64_t level_strides[] = {stride_of(level, 3), stride_of(level, 2), stride_of(level, 0)};
    int64_t strides[3];
    return nested_strides(sizes, level_strides, strides) &&
           encode_map<scalar_t, 4>(
               map, data<scalar_t>(level), sizes, strides, {kStepChannels, kHaloSide, kHaloSide, 1});
}

// Kernel for tiles of kOutputs outputs and kSubTiles sub-tiles.
template <typename scalar_t, int kOutputs, int kSubTiles>
struct Sm90Kernel {
    using Config = Sm90Conv3x3Config<kOutputs, kSubTiles>;
    static constexpr auto kKernel = &conv3x3_sm90_kernel<scalar_t, kOutputs, kSubTiles>;

    static int64_t tiles(const Sm90Convolution& convolution) {
        return ceil_div(convolution.sub_tile_end - convolution.sub_tile_begin, kSubTiles) *
               ceil_div(convolution.outputs, kOutputs);
    }
    static int64_t tiles(const Sm90Table<scalar_t>& table) {
        int64_t all = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            all += tiles(table.convolutions[i]);
        }
        return all;
    }
    // Estimated cycles of a tile, averaged over the tiles of the table. A step takes the maximum of three times:
    // products, traffic of shared memory (128 bytes per cycle) and traffic of L2 (32). The start and the stores of a
    // tile are added.
    static double tile_cost(const Sm90Table<scalar_t>& table) {
        constexpr double kProducts = 36.0 * kSubTiles * kOutputs / 2, kInputBytes = kSubTiles * kHaloBytes;
        constexpr double kWeights = kTaps * Config::kWeightStage, kOperands = 36.0 * kSubTiles * (2048 + 32 * kOutputs);
        double cycles = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            const Sm90Convolution& convolution = table.convolutions[i];
            const double flow = convolution.has_flow;
            const double step = std::max(
                {kProducts, (kOperands + kWeights + (1 + 4 * flow) * kInputBytes) / 128,
                 (kWeights + (1 + flow) * kInputBytes) / 32});
            cycles += static_cast<double>(tiles(convolution)) *
                      (convolution.steps * step + 1000 + 4.0 * kSubTiles * kOutputs);
        }
        return cycles / static_cast<double>(tiles(table));
    }
    static double cost(const Sm90Table<scalar_t>& table, int64_t tiles, Stream stream) {
        return static_cast<double>(ceil_div(tiles, multiprocessors(stream))) * tile_cost(table);
    }
    static void run(Sm90Table<scalar_t>& table, Stream stream) {
        table.num_tiles = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            Sm90Convolution& convolution = table.convolutions[i];
            convolution.tile_begin = table.num_tiles;
            convolution.output_tiles = static_cast<int>(ceil_div(convolution.outputs, kOutputs));
            table.num_tiles += static_cast<int>(tiles(convolution));
        }
        const unsigned blocks =
            persistent_blocks(table, resident_blocks<kKernel>(kThreads, Config::kSharedBytes, stream));
        launch<kKernel>(dim3(blocks), dim3(kThreads), Config::kSharedBytes, stream, table);
    }
};

// Choice of two launches. A round is one tile per multiprocessor. The first launch runs all full rounds of tiles of
// four sub-tiles; the second runs the remaining sub-tiles in tiles of two. So a last round of few tiles takes half the
// time.
template <typename scalar_t, int kOutputs>
struct Sm90Rounds {
    using Large = Sm90Kernel<scalar_t, kOutputs, 4>;
    using Small = Sm90Kernel<scalar_t, kOutputs, 2>;

    // Return the number of tiles of the first launch, rounded down so that all outputs of a sub-tile are in one launch.
    // `remainder` returns the convolutions of the second launch.
    static int64_t whole_rounds(const Sm90Table<scalar_t>& table, Stream stream, Sm90Table<scalar_t>& remainder) {
        const int64_t whole = Large::tiles(table) / multiprocessors(stream) * multiprocessors(stream);
        int64_t tiles = 0;
        remainder.num_convolutions = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            const Sm90Convolution& convolution = table.convolutions[i];
            const int64_t output_tiles = ceil_div(convolution.outputs, kOutputs);
            const int64_t available_tiles =
                remainder.num_convolutions == 0 ? (whole - tiles) / output_tiles * output_tiles : 0;
            const int64_t cut_tiles = std::min(Large::tiles(convolution), available_tiles);
            tiles += cut_tiles;
            if (cut_tiles < Large::tiles(convolution)) {
                Sm90Convolution& remaining = remainder.convolutions[remainder.num_convolutions++] = convolution;
                remaining.sub_tile_begin += static_cast<int>(cut_tiles / output_tiles * 4);
            }
        }
        return tiles;
    }
    static double cost(const Sm90Table<scalar_t>& table, Stream stream) {
        constexpr double kLaunch = 5000;  // cycles, with the first loads and the last stores of its blocks
        Sm90Table<scalar_t> remainder = table;
        const int64_t tiles = whole_rounds(table, stream, remainder);
        return tiles == 0 || remainder.num_convolutions == 0
                   ? std::numeric_limits<double>::infinity()
                   : Large::cost(table, tiles, stream) + kLaunch +
                         Small::cost(remainder, Small::tiles(remainder), stream);
    }
    static void run(Sm90Table<scalar_t>& table, Stream stream) {
        Sm90Table<scalar_t> remainder = table;
        whole_rounds(table, stream, remainder);
        // The remainder consists of the last convolutions. The first of them may be divided between the launches.
        table.num_convolutions -= remainder.num_convolutions;
        const Sm90Convolution& divided = remainder.convolutions[0];
        Sm90Convolution& last = table.convolutions[table.num_convolutions];
        if (divided.sub_tile_begin > last.sub_tile_begin) {
            last.sub_tile_end = divided.sub_tile_begin;
            ++table.num_convolutions;
        }
        Large::run(table, stream);
        Small::run(remainder, stream);
    }
};

// Append a convolution with at least one non-empty level; return false if the kernel cannot run it.
template <typename scalar_t>
bool append(Sm90Table<scalar_t>& table, const Convolution& conv) {
    const int64_t channels = conv.x[0].size(1), outputs = conv.out[0].size(1);
    if (channels == 0 || channels % kStepChannels != 0) {
        return false;
    }
    const int64_t max_sub_tiles = (int64_t(1) << 26) / ceil_div(outputs, 64);  // tile indices are ints
    const Global<const scalar_t> weights = kernel_weights<scalar_t>(conv);
    const int64_t row = packed_tap_size(1, outputs);
    Sm90Convolution added{};
    if (!encode_map<scalar_t, 3>(
            added.weights, weights, {row, channels, kTaps}, {row, channels * row}, {64, kStepChannels, 1})) {
        return false;
    }
    added.bias = conv.bias ? data<float>(*conv.bias) : nullptr;
    added.first_level = table.num_levels;
    added.steps = static_cast<int>(channels / kStepChannels);
    added.outputs = static_cast<int>(outputs);
    added.has_flow = !conv.flow.empty();
    added.relu = conv.relu;
    added.vectorized = outputs % 8 == 0;
    for (size_t i = 0; i < conv.out.size(); ++i) {
        const Tensor& out = conv.out[i];
        if (out.numel() == 0) {
            continue;
        }
        const int64_t rows = ceil_div(out.size(2), kSubTileSide), columns = ceil_div(out.size(3), kSubTileSide);
        if (added.first_level + added.levels == kMaxEntries ||
            out.size(0) * rows * columns > max_sub_tiles - added.sub_tile_end) {
            return false;
        }
        Sm90Level<scalar_t>& level = table.levels[added.first_level + added.levels];
        if (!encode_level<scalar_t>(level.x, conv.x[i]) ||
            (added.has_flow && !encode_level<scalar_t>(level.flow, conv.flow[i]))) {
            return false;
        }
        level.residual = conv.residual.empty() ? nullptr : data<scalar_t>(conv.residual[i]);
        level.out = mutable_data<scalar_t>(out);
        level.height = static_cast<int>(out.size(2));
        level.width = static_cast<int>(out.size(3));
        level.tile_begin = added.sub_tile_end;
        level.tile_rows = static_cast<int>(rows);
        level.tile_columns = static_cast<int>(columns);
        added.vectorized =
            added.vectorized && is_aligned(level.out, 16) && (!level.residual || is_aligned(level.residual, 16));
        added.sub_tile_end += static_cast<int>(out.size(0) * rows * columns);
        ++added.levels;
    }
    table.num_levels += added.levels;
    table.convolutions[table.num_convolutions++] = added;
    return true;
}

// Choose tiles and launch the kernel; results do not depend on the choice.
template <typename scalar_t>
void run(Sm90Table<scalar_t>& table, Stream stream) {
    if (table.num_convolutions == 0) {
        return;
    }
    struct Choice {
        double cost;
        void (*run)(Sm90Table<scalar_t>&, Stream);
    };
    const auto one_size = [&](auto kernel) {
        return Choice{kernel.cost(table, kernel.tiles(table), stream), &decltype(kernel)::run};
    };
    const auto two_sizes = [&](auto rounds) { return Choice{rounds.cost(table, stream), &decltype(rounds)::run}; };
    const Choice choices[] = {one_size(Sm90Kernel<scalar_t, 128, 4>{}), one_size(Sm90Kernel<scalar_t, 128, 2>{}),
                              one_size(Sm90Kernel<scalar_t, 64, 4>{}),  one_size(Sm90Kernel<scalar_t, 64, 2>{}),
                              two_sizes(Sm90Rounds<scalar_t, 128>{}),   two_sizes(Sm90Rounds<scalar_t, 64>{})};
    std::min_element(std::begin(choices), std::end(choices), [](const Choice& a, const Choice& b) {
        return a.cost < b.cost;
    })->run(table, stream);
    table.num_levels = table.num_convolutions = 0;
}

}  // namespace

template <typename scalar_t>
std::vector<Convolution> convolve3x3_sm90(
    const std::vector<Convolution>& convolutions, Stream stream, const std::optional<Tensor>& active) {
    if (!runs_sm90<Sm90Kernel<scalar_t, 128, 4>::kKernel>(stream)) {
        return convolutions;
    }
    bind_context(stream);
    std::vector<Convolution> unsupported;
    Sm90Table<scalar_t> table{};
    table.active = active ? data<uint8_t>(*active) : nullptr;
    for (const Convolution& conv : convolutions) {
        const auto levels =
            std::count_if(conv.out.begin(), conv.out.end(), [](const Tensor& out) { return out.numel() > 0; });
        if (levels == 0) {
            continue;
        }
        if (table.num_levels + levels > kMaxEntries) {
            run(table, stream);
        }
        if (!append(table, conv)) {
            unsupported.push_back(conv);
        }
    }
    run(table, stream);
    return unsupported;
}

template std::vector<Convolution> convolve3x3_sm90<float16>(
    const std::vector<Convolution>&, Stream, const std::optional<Tensor>&);
template std::vector<Convolution> convolve3x3_sm90<bfloat16>(
    const std::vector<Convolution>&, Stream, const std::optional<Tensor>&);

}  // namespace spatialflow
