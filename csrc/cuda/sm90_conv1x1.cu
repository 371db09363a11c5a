// SPDX-License-Identifier: Apache-2.0
//
// The 1x1 convolutions of conv1x1.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A matrix product of pixels (pixels, C) and weights (O, C), 64 channels a step. A block computes tiles of 64 to 256
// pixels by 64 or 128 outputs, and stays. One warp loads pixels and weights by TMA, steps ahead, over the ends of tiles
// too; one or two warpgroups multiply, half of the pixels each. Channels and outputs that are not there read as zeros.
//
// A tile is a rectangle of pixels. Where all pixels of x have one distance, as in a channels-last map, the map is one
// row; a strided view keeps its rows and images. TMA takes the weights two rows of every eight at a time, so that a
// lane has eight adjacent outputs of each 32: sums go from registers to memory, 16 bytes a store, and a lane's part of
// the residual is on its way in registers during the products. Sums are float32, rounded once.
//
// Floor (H200, 4.1 TB/s) of 64 -> 256 channels on 200 x 334 with residual: 77 MB: 19 us. Of 1024 -> 256 on 50 x 84: 2.2
// GFLOP: 3 us. What TMA brings bounds a step of 128 x 64 (24 KB, 46 bytes a cycle) to 530 cycles; products are 256.
#include "cuda/sm90_conv1x1.h"

#include <algorithm>
#include <cmath>

#include "cuda/raw_channels.cuh"
#include "cuda/sm90_instructions.h"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

constexpr int kStepChannels = 64;
constexpr int kRowBytes = kStepChannels * 2;  // of a pixel, and of an output
constexpr int kSharedLimit = 227 * 1024;      // of a multiprocessor; a block takes 1 KB more than it asks for

// Consumers are warpgroups of 64 pixels times kParts.
template <int kTileOutputs, int kTileParts, int kTileConsumers>
struct Sm90Conv1x1 {
    static constexpr int kOutputs = kTileOutputs, kParts = kTileParts, kConsumers = kTileConsumers;
    static constexpr int kPixels = 64 * kParts * kConsumers, kThreads = 128 * (kConsumers + 1);
    static constexpr int kBlocks = kConsumers == 1 ? 2 : 1;  // on a multiprocessor
    static constexpr int kPixelStage = kPixels * kRowBytes, kStage = kPixelStage + kOutputs * kRowBytes;
    static constexpr int kStages = 192 * 1024 / kBlocks / kStage;
    static constexpr size_t kSharedBytes = kStages * kStage + 1024;  // to begin at a multiple of 1024
    static_assert((kSharedBytes + 1024 + 1024) * kBlocks <= kSharedLimit, "dynamic and static shared memory of blocks");
};

template <typename scalar_t>
struct Conv1x1Problem {
    TensorMap x;                            // boxes of 64 channels and a tile of pixels
    TensorMap weights;                      // boxes of 64 channels and two of every eight outputs
    Global<const scalar_t> bias, residual;  // (O), (N, H, W, O), or null
    Global<scalar_t> out;                   // (N, H, W, O)
    int width, height;                      // of an image
    int log_tile_width;
    int tile_columns, tile_rows;  // of an image
    int output_tiles;             // beside each other
    int num_tiles, steps, outputs;
    bool relu;
};

// ---- device ------------------------------------------------------------------------------------------------------

// Empty but for 9.0a. The host asks for the static shared memory to learn whether there is a kernel.
template <typename scalar_t, int kTileOutputs, int kTileParts, int kTileConsumers>
__global__ void __launch_bounds__(
    Sm90Conv1x1<kTileOutputs, kTileParts, kTileConsumers>::kThreads,
    Sm90Conv1x1<kTileOutputs, kTileParts, kTileConsumers>::kBlocks)
    conv1x1_sm90_kernel(const __grid_constant__ Conv1x1Problem<scalar_t> problem) {
#if SPATIALFLOW_HAS_SM90
    using Size = Sm90Conv1x1<kTileOutputs, kTileParts, kTileConsumers>;
    constexpr int kStages = Size::kStages, kParts = Size::kParts, kGroups = Size::kOutputs / 32;
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * kStages);
    const unsigned begin = (shared_address(memory) + 1023) / 1024 * 1024;
    // Stages are ready for wgmma, or free.
    const unsigned full = shared_address(barriers), empty = full + 8 * kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, 4 * Size::kConsumers);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    struct Tile {
        int x, y, image, output;  // the first ones
    };
    const int tile_width = 1 << problem.log_tile_width, tile_height = Size::kPixels >> problem.log_tile_width;
    const auto tile_at = [&](int index) {
        const int map = index / problem.output_tiles, row = map / problem.tile_columns;
        return Tile{
            map % problem.tile_columns * tile_width, row % problem.tile_rows * tile_height, row / problem.tile_rows,
            index % problem.output_tiles * Size::kOutputs};
    };
    const int first = static_cast<int>(blockIdx.x), step_tiles = static_cast<int>(gridDim.x);

    // The compiler must see that all lanes of a warp agree on this.
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    int stage = 0;
    unsigned parity = 0;
    const auto next_stage = [&]() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    };
    constexpr bool kTrades = kParts > 1;  // two parts take more registers than all threads can have
    if (warp >= 4 * Size::kConsumers) {
        if constexpr (kTrades) {
            give_registers<40>();
        }
        if (warp == 4 * Size::kConsumers && lane == 0) {
            for (int index = first; index < problem.num_tiles; index += step_tiles) {
                const Tile tile = tile_at(index);
                for (int step = 0; step < problem.steps; ++step) {
                    const unsigned pixels = begin + stage * Size::kStage, ready = full + 8 * stage;
                    mbarrier_wait(empty + 8 * stage, parity ^ 1);
                    mbarrier_expect(ready, Size::kStage);
                    tma_load_4d(pixels, &problem.x, step * kStepChannels, tile.x, tile.y, tile.image, ready);
#pragma unroll
                    for (int pair = 0; pair < 4; ++pair) {
                        tma_load_4d(
                            pixels + Size::kPixelStage + pair * (Size::kOutputs / 4 * kRowBytes), &problem.weights,
                            step * kStepChannels, 0, pair, tile.output / 8, ready);
                    }
                    next_stage();
                }
            }
        }
        return;
    }

    if constexpr (kTrades) {
        take_registers<232>();
    }
    const int first_row = warp / 4 * (64 * kParts);  // of the tile's pixels
    WgmmaSums<Size::kOutputs / 2> sums[kParts] = {};
    const auto pin_sums = [&]() {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            pin(sums[part]);
        }
    };
    for (int index = first; index < problem.num_tiles; index += step_tiles) {
        const Tile tile = tile_at(index);
        const int first_output = tile.output + lane % 4 * 8;  // of this lane
        // A lane has two rows of 64; of eight outputs beyond the last one it has none.
        int64_t places[kParts][2];  // of its results, or -1
        RawChannels<scalar_t, 8> offsets[kGroups], terms[kParts][2][kGroups];
        bool present[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            present[group] = first_output + group * 32 < problem.outputs;
            offsets[group] = {};
            if (problem.bias && present[group]) {
                offsets[group] = load_channels<8>(problem.bias + (first_output + group * 32));
            }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + part * 64 + warp % 4 * 16 + half * 8 + lane / 4;
                const int x = tile.x + (row & (tile_width - 1)), y = tile.y + (row >> problem.log_tile_width);
                const int64_t pixel = (static_cast<int64_t>(tile.image) * problem.height + y) * problem.width + x;
                const bool inside = x < problem.width && y < problem.height;
                places[part][half] = inside ? pixel * problem.outputs + first_output : -1;
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    terms[part][half][group] = {};
                    if (problem.residual && inside && present[group]) {
                        terms[part][half][group] =
                            load_channels<8>(problem.residual + (places[part][half] + group * 32));
                    }
                }
            }
        }

        int read_stage = -1;  // that the products before the running ones have read
#pragma unroll 1
        for (int step = 0; step < problem.steps; ++step) {
            mbarrier_wait(full + 8 * stage, parity);
            const unsigned pixels = begin + stage * Size::kStage;
            const uint64_t a = matrix_descriptor(pixels + first_row * kRowBytes, 16, 8 * kRowBytes);
            const uint64_t b = matrix_descriptor(pixels + Size::kPixelStage, 16, 8 * kRowBytes);
            pin_sums();
            wgmma_fence();
            // Sixteen channels are 32 bytes of a row.
#pragma unroll
            for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    Wgmma<Size::kOutputs, false>::multiply(
                        sums[part], a + (part * 64 * kRowBytes + k * 32) / 16, b + k * 32 / 16, (step | k) != 0,
                        scalar_t{});
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            pin_sums();
            if (lane == 0 && read_stage >= 0) {
                mbarrier_arrive(empty + 8 * read_stage);
            }
            read_stage = stage;
            next_stage();
        }
        wgmma_wait<0>();
        pin_sums();
        if (lane == 0) {
            mbarrier_arrive(empty + 8 * read_stage);
        }

        // Pair i of a lane's eight outputs lies in the columns of the i-th box of weights.
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    const RawChannels<scalar_t, 8>&own = offsets[group], &added = terms[part][half][group];
                    Vec<unsigned, 4> words;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int element = (i * kGroups + group) * 4 + half * 2;
                        words[i] = pack_pair(
                            sums[part][element] + own.value(2 * i) + added.value(2 * i),
                            sums[part][element + 1] + own.value(2 * i + 1) + added.value(2 * i + 1), scalar_t{});
                        words[i] = problem.relu ? rectify_pairs(words[i], scalar_t{}) : words[i];
                    }
                    if (places[part][half] >= 0 && present[group]) {
                        store_vector(pointer_cast<unsigned>(problem.out + (places[part][half] + group * 32)), words);
                    }
                }
            }
        }
    }
#endif
}

// ---- host --------------------------------------------------------------------------------------------------------

// The pixels of x: columns, rows and images from the innermost on, as few dimensions as their strides allow.
struct PixelGrid {
    int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};

    explicit PixelGrid(const Tensor& x) {
        int dimensions = 0;
        for (const int d : {3, 2, 0}) {
            const int64_t size = x.size(d), stride = stride_of(x, d);
            if (size == 1) {
                continue;
            }
            if (dimensions > 0 && stride == strides[dimensions - 1] * sizes[dimensions - 1]) {
                sizes[dimensions - 1] *= size;
                continue;
            }
            sizes[dimensions] = size;
            strides[dimensions++] = stride;
        }
    }
};

// The kernel for tiles of kOutputs outputs and 64 * kParts * kConsumers pixels.
template <typename scalar_t, int kOutputs, int kParts, int kConsumers>
struct Sm90Conv1x1Kernel {
    using Size = Sm90Conv1x1<kOutputs, kParts, kConsumers>;
    static constexpr auto kKernel = &conv1x1_sm90_kernel<scalar_t, kOutputs, kParts, kConsumers>;

    // The tiles of a grid of pixels; of several shapes that give as few, the widest.
    struct Tiling {
        int log_width = 0;
        int64_t columns, rows, tiles;

        Tiling(const PixelGrid& grid, int64_t outputs) {
            for (int log = 0; Size::kPixels >> log > 0; ++log) {
                const int64_t across = ceil_div(grid.sizes[0], int64_t(1) << log);
                const int64_t down = ceil_div(grid.sizes[1], Size::kPixels >> log);
                if (log == 0 || across * down <= columns * rows) {
                    log_width = log;
                    columns = across;
                    rows = down;
                }
            }
            tiles = columns * rows * grid.sizes[2] * ceil_div(outputs, kOutputs);
        }
    };

    // Cycles, roughly: of a tile the products, or what is loaded and stored, and its beginning and end.
    static double cost(const Conv1x1Problem<scalar_t>& problem, const PixelGrid& grid, Stream stream) {
        constexpr double kBytesPerCycle = 45;
        const double products = 4.0 * problem.steps * kParts * kConsumers * kOutputs / 2;
        const double stored = 2.0 * Size::kPixels * std::min(kOutputs, problem.outputs);
        const double bytes = 1.0 * problem.steps * Size::kStage + (problem.residual ? 2 : 1) * stored;
        const double tiles = static_cast<double>(Tiling(grid, problem.outputs).tiles);
        return std::ceil(tiles / multiprocessors(stream)) * (std::max(products, bytes / kBytesPerCycle) + 800);
    }

    // False if TMA cannot read x.
    static bool run(
        Conv1x1Problem<scalar_t>& problem, const Tensor& x, const PixelGrid& grid, const Tensor& weight,
        Stream stream) {
        const int64_t channels = x.size(1), outputs = weight.size(0);
        const Tiling tiling(grid, outputs);
        problem.log_tile_width = tiling.log_width;
        problem.tile_columns = static_cast<int>(tiling.columns);
        problem.tile_rows = static_cast<int>(tiling.rows);
        problem.output_tiles = static_cast<int>(ceil_div(outputs, kOutputs));
        problem.num_tiles = static_cast<int>(tiling.tiles);
        const int64_t sizes[] = {channels, grid.sizes[0], grid.sizes[1], grid.sizes[2]};
        int64_t strides[3];
        if (!nested_strides(sizes, grid.strides, strides) ||
            !encode_map<scalar_t, 4>(
                problem.x, data<scalar_t>(x), sizes, strides,
                {kStepChannels, 1 << tiling.log_width, Size::kPixels >> tiling.log_width, 1}) ||
            !encode_map<scalar_t, 4>(
                problem.weights, data<scalar_t>(weight), {channels, 2, 4, outputs / 8},
                {channels, 2 * channels, 8 * channels}, {kStepChannels, 2, 1, kOutputs / 8})) {
            return false;
        }
        const int blocks = resident_blocks<kKernel>(Size::kThreads, Size::kSharedBytes, stream);
        launch<kKernel>(
            dim3(static_cast<unsigned>(std::min(problem.num_tiles, blocks))), dim3(Size::kThreads), Size::kSharedBytes,
            stream, problem);
        return true;
    }
};

// False if TMA cannot read x. The same sums in the same order whichever tiles are taken.
template <typename scalar_t>
bool run(Conv1x1Problem<scalar_t>& problem, const Tensor& x, const Tensor& weight, Stream stream) {
    if (!has_adjacent_channels(x)) {
        return false;
    }
    const PixelGrid grid(x);
    problem.width = static_cast<int>(grid.sizes[0]);
    problem.height = static_cast<int>(grid.sizes[1]);
    struct Choice {
        double cost;
        bool (*run)(Conv1x1Problem<scalar_t>&, const Tensor&, const PixelGrid&, const Tensor&, Stream);
    };
    const auto choice = [&](auto kernel) { return Choice{kernel.cost(problem, grid, stream), &decltype(kernel)::run}; };
    const Choice choices[] = {
        choice(Sm90Conv1x1Kernel<scalar_t, 128, 2, 2>{}), choice(Sm90Conv1x1Kernel<scalar_t, 128, 1, 2>{}),
        choice(Sm90Conv1x1Kernel<scalar_t, 64, 1, 2>{}), choice(Sm90Conv1x1Kernel<scalar_t, 64, 1, 1>{})};
    return std::min_element(
               std::begin(choices), std::end(choices),
               [](const Choice& one, const Choice& other) { return one.cost < other.cost; })
        ->run(problem, x, grid, weight, stream);
}

}  // namespace

template <typename scalar_t>
bool conv1x1_sm90(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& out, bool relu, Stream stream) {
    const int64_t channels = x.size(1), outputs = weight.size(0);
    constexpr int64_t kMost = (int64_t(1) << 31) - 1024;  // an int holds what lies a tile further, too
    if (channels == 0 || channels % 8 != 0 || channels > kMost || outputs % 8 != 0 || outputs > kMost ||
        out.numel() / 8 > kMost || !runs_sm90<Sm90Conv1x1Kernel<scalar_t, 128, 1, 2>::kKernel>(stream)) {
        return false;
    }
    bind_context(stream);
    const Tensor rows = aligned(weight);
    const auto offsets = bias ? std::make_optional(aligned(*bias)) : std::nullopt;
    const auto terms = residual ? std::make_optional(aligned(*residual)) : std::nullopt;
    Conv1x1Problem<scalar_t> problem{};
    problem.bias = offsets ? data<scalar_t>(*offsets) : nullptr;
    problem.residual = terms ? data<scalar_t>(*terms) : nullptr;
    problem.out = mutable_data<scalar_t>(out);
    problem.steps = static_cast<int>(ceil_div(channels, kStepChannels));
    problem.outputs = static_cast<int>(outputs);
    problem.relu = relu;
    return run(problem, x, rows, stream) ||
           run(problem, aligned(to_contiguous(x, MemoryFormat::ChannelsLast)), rows, stream);
}

#define SPATIALFLOW_INSTANTIATE(scalar_t)                                                                              \
    template bool conv1x1_sm90<scalar_t>(                                                                              \
        const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&, bool, \
        Stream);
SPATIALFLOW_INSTANTIATE(float16)
SPATIALFLOW_INSTANTIATE(bfloat16)
#undef SPATIALFLOW_INSTANTIATE

}  // namespace spatialflow
