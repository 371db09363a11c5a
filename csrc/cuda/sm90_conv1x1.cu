// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolutions of conv1x1.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A matrix product of pixels (pixels, C) and weights (O, C), 64 channels per step. Persistent blocks compute tiles of
// 64 to 256 pixels by 64 or 128 outputs. One thread loads pixels and weights by TMA, several steps ahead; one or two
// warpgroups multiply, with equal shares of the pixels. Channels and outputs beyond the last are read as zeros. A tile
// is a rectangle of pixels. If all pixels of x are equally spaced in memory, as in a channels-last map, they are one
// row. TMA loads two rows of every eight of the weights at a time. So a lane has eight adjacent outputs of each 32 and
// stores them as 16 bytes. Loads of the residual start before the products. Sums are float32, rounded once.
#include "cuda/sm90_conv1x1.h"

#include <algorithm>
#include <cmath>

#include "cuda/raw_channels.cuh"
#include "cuda/sm90_pipeline.cuh"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

constexpr int kStepChannels = 64;
constexpr int kRowBytes = kStepChannels * 2;  // of a pixel, and of an output
constexpr int kSharedLimit = 227 * 1024;  // of a block; each block occupies 1 KB more, of 228 KB of a multiprocessor

// Each of kConsumers warpgroups computes kRowTiles tiles of 64 pixels.
template <int kTileOutputs, int kTileRowTiles, int kTileConsumers>
struct Sm90Conv1x1Config {
    static constexpr int kOutputs = kTileOutputs, kRowTiles = kTileRowTiles, kConsumers = kTileConsumers;
    static constexpr int kPixels = 64 * kRowTiles * kConsumers, kThreads = 128 * (kConsumers + 1);
    static constexpr int kBlocks = kConsumers == 1 ? 2 : 1;  // on a multiprocessor
    static constexpr int kPixelStage = kPixels * kRowBytes, kStage = kPixelStage + kOutputs * kRowBytes;
    static constexpr int kStages = 192 * 1024 / kBlocks / kStage;
    static constexpr size_t kSharedBytes = kStages * kStage + 1024;  // the first stage starts at a multiple of 1024
    static_assert(
        (kSharedBytes + 1024 + 1024) * kBlocks <= kSharedLimit,
        "dynamic and static shared memory of kBlocks blocks must fit");
};

template <typename scalar_t>
struct Conv1x1Problem {
    TensorMap x;                            // boxes of 64 channels and a tile of pixels
    TensorMap weights;                      // boxes of 64 channels and two of every eight outputs
    Global<const scalar_t> bias, residual;  // (O), (N, H, W, O), or null
    Global<scalar_t> out;                   // (N, H, W, O)
    int width, height;                      // of an image, after the merging by PixelGrid
    int log_tile_width;
    int tile_columns, tile_rows;  // of an image
    int output_tiles;             // tiles with the same pixels
    int num_tiles, steps, outputs;
    bool relu;
};

// ---- device ------------------------------------------------------------------------------------------------------

#if SPATIALFLOW_HAS_SM90

// Block of the kernel: its tiles, its shared memory, and the roles of its warps.
template <typename scalar_t, typename Config>
struct Sm90Conv1x1Block {
    static constexpr int kStages = Config::kStages, kRowTiles = Config::kRowTiles;
    static constexpr int kOutputBlocks = Config::kOutputs / 32;
    using Sums = WgmmaSums<Config::kOutputs / 2>[kRowTiles];

    struct Tile {
        int x, y, image, output;  // the first ones of the tile
    };

    const Conv1x1Problem<scalar_t>& problem;
    unsigned begin;        // address of the first stage
    unsigned full, empty;  // addresses of the mbarriers for stages that are ready for wgmma, and for free stages
    int tile_width, tile_height;
    int first_tile, tile_step;

    __device__ __forceinline__ Sm90Conv1x1Block(
        const Conv1x1Problem<scalar_t>& problem, const Shared<unsigned char>& memory, const Shared<uint64_t>& barriers)
        : problem(problem),
          begin((shared_address(memory) + 1023) / 1024 * 1024),
          full(shared_address(barriers)),
          empty(full + 8 * kStages),
          tile_width(1 << problem.log_tile_width),
          tile_height(Config::kPixels >> problem.log_tile_width),
          first_tile(static_cast<int>(blockIdx.x)),
          tile_step(static_cast<int>(gridDim.x)) {}

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, 4 * Config::kConsumers);
        }
        mbarrier_init_fence();
    }

    __device__ __forceinline__ Tile tile_at(int index) const {
        const int map = index / problem.output_tiles, row = map / problem.tile_columns;
        return Tile{
            map % problem.tile_columns * tile_width, row % problem.tile_rows * tile_height, row / problem.tile_rows,
            index % problem.output_tiles * Config::kOutputs};
    }

    // ---- producer: one thread --------------------------------------------------------------------------------------

    __device__ __forceinline__ void load_tiles() const {
        PipelineState<kStages> state(1);
        for (int index = first_tile; index < problem.num_tiles; index += tile_step) {
            const Tile tile = tile_at(index);
            for (int step = 0; step < problem.steps; ++step) {
                const unsigned pixels = begin + state.stage * Config::kStage, ready = full + 8 * state.stage;
                mbarrier_wait(empty + 8 * state.stage, state.parity);
                mbarrier_expect(ready, Config::kStage);
                tma_load_4d(pixels, &problem.x, step * kStepChannels, tile.x, tile.y, tile.image, ready);
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    tma_load_4d(
                        pixels + Config::kPixelStage + pair * (Config::kOutputs / 4 * kRowBytes), &problem.weights,
                        step * kStepChannels, 0, pair, tile.output / 8, ready);
                }
                state.advance();
            }
        }
    }

    // ---- consumers: one or two warpgroups --------------------------------------------------------------------------

    // Operands of a lane that are added to its sums, and the offsets of its results. Of every 64 pixels a lane has two;
    // of every 32 outputs, eight.
    struct LaneOperands {
        int64_t out_offsets[kRowTiles][2];  // of the first outputs; -1 outside the map
        RawChannels<scalar_t, 8> biases[kOutputBlocks], residuals[kRowTiles][2][kOutputBlocks];
        bool present[kOutputBlocks];
    };

    __device__ __forceinline__ void multiply_tiles(int warp, int lane) const {
        const int first_row = warp / 4 * (64 * kRowTiles);  // of the tile's pixels
        WgmmaSums<Config::kOutputs / 2> sums[kRowTiles] = {};
        PipelineState<kStages> state(0);
        for (int index = first_tile; index < problem.num_tiles; index += tile_step) {
            const Tile tile = tile_at(index);
            LaneOperands operands;
            load_biases(tile, lane, operands);
            load_residuals(tile, first_row + warp % 4 * 16 + lane / 4, lane, operands);
            multiply_tile(first_row, lane, state, sums);
            store_outputs(operands, sums);
        }
    }

    __device__ __forceinline__ int first_output(const Tile& tile, int lane) const { return tile.output + lane % 4 * 8; }

    __device__ __forceinline__ void load_biases(const Tile& tile, int lane, LaneOperands& operands) const {
#pragma unroll
        for (int block = 0; block < kOutputBlocks; ++block) {
            const int output = first_output(tile, lane) + block * 32;
            operands.present[block] = output < problem.outputs;
            operands.biases[block] = {};
            if (problem.bias && operands.present[block]) {
                operands.biases[block] = load_channels<8>(problem.bias + output);
            }
        }
    }

    // Load the residuals of a lane, and compute the offsets of its results. `lane_row` is its first pixel in the tile.
    __device__ __forceinline__ void load_residuals(
        const Tile& tile, int lane_row, int lane, LaneOperands& operands) const {
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = lane_row + row_tile * 64 + half * 8;
                const int x = tile.x + (row & (tile_width - 1)), y = tile.y + (row >> problem.log_tile_width);
                const int64_t pixel = (static_cast<int64_t>(tile.image) * problem.height + y) * problem.width + x;
                const bool inside = x < problem.width && y < problem.height;
                int64_t& offset = operands.out_offsets[row_tile][half];
                offset = inside ? pixel * problem.outputs + first_output(tile, lane) : -1;
#pragma unroll
                for (int block = 0; block < kOutputBlocks; ++block) {
                    RawChannels<scalar_t, 8>& residual = operands.residuals[row_tile][half][block];
                    residual = {};
                    if (problem.residual && inside && operands.present[block]) {
                        residual = load_channels<8>(problem.residual + (offset + block * 32));
                    }
                }
            }
        }
    }

    // Run the products of a tile, and release its stages.
    __device__ __forceinline__ void multiply_tile(
        int first_row, int lane, PipelineState<kStages>& state, Sums& sums) const {
        int read_stage = -1;  // the stage that the previous group of products has read
#pragma unroll 1
        for (int step = 0; step < problem.steps; ++step) {
            mbarrier_wait(full + 8 * state.stage, state.parity);
            const unsigned pixels = begin + state.stage * Config::kStage;
            const uint64_t a = matrix_descriptor(pixels + first_row * kRowBytes, 16, 8 * kRowBytes);
            const uint64_t b = matrix_descriptor(pixels + Config::kPixelStage, 16, 8 * kRowBytes);
            multiply_step(a, b, step, sums);
            if (lane == 0 && read_stage >= 0) {
                mbarrier_arrive(empty + 8 * read_stage);
            }
            read_stage = state.stage;
            state.advance();
        }
        finish_products(sums);
        if (lane == 0) {
            mbarrier_arrive(empty + 8 * read_stage);
        }
    }

    __device__ __forceinline__ void multiply_step(uint64_t a, uint64_t b, int step, Sums& sums) const {
        run_product_group(sums, [&] {
        // Sixteen channels are 32 bytes of a row.
#pragma unroll
            for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
                for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
                    Wgmma<Config::kOutputs, false>::multiply(
                        sums[row_tile], a + (row_tile * 64 * kRowBytes + k * 32) / 16, b + k * 32 / 16, (step | k) != 0,
                        scalar_t{});
                }
            }
        });
    }

    __device__ __forceinline__ void store_outputs(const LaneOperands& operands, const Sums& sums) const {
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t offset = operands.out_offsets[row_tile][half];
#pragma unroll
                for (int block = 0; block < kOutputBlocks; ++block) {
                    const Vec<unsigned, 4> words = results(
                        sums[row_tile], half, block, operands.biases[block], operands.residuals[row_tile][half][block]);
                    if (offset >= 0 && operands.present[block]) {
                        store_vector(pointer_cast<unsigned>(problem.out + (offset + block * 32)), words);
                    }
                }
            }
        }
    }

    // Add bias and residual to the sums of eight adjacent outputs, round the results, and apply ReLU. Pair i of the
    // eight outputs is in the columns of box i of the weights.
    __device__ __forceinline__ Vec<unsigned, 4> results(
        const WgmmaSums<Config::kOutputs / 2>& sums, int half, int block, const RawChannels<scalar_t, 8>& bias,
        const RawChannels<scalar_t, 8>& residual) const {
        Vec<unsigned, 4> words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int element = (i * kOutputBlocks + block) * 4 + half * 2;
            words[i] = pack_pair(
                sums[element] + bias.value(2 * i) + residual.value(2 * i),
                sums[element + 1] + bias.value(2 * i + 1) + residual.value(2 * i + 1), scalar_t{});
            words[i] = problem.relu ? rectify_pairs(words[i], scalar_t{}) : words[i];
        }
        return words;
    }
};

#endif

// The kernel is empty for architectures other than 9.0a. The host queries its static shared memory to detect this.
template <typename scalar_t, int kTileOutputs, int kTileRowTiles, int kTileConsumers>
__global__ void __launch_bounds__(
    Sm90Conv1x1Config<kTileOutputs, kTileRowTiles, kTileConsumers>::kThreads,
    Sm90Conv1x1Config<kTileOutputs, kTileRowTiles, kTileConsumers>::kBlocks)
    conv1x1_sm90_kernel(const __grid_constant__ Conv1x1Problem<scalar_t> problem) {
#if SPATIALFLOW_HAS_SM90
    using Config = Sm90Conv1x1Config<kTileOutputs, kTileRowTiles, kTileConsumers>;
    using Block = Sm90Conv1x1Block<scalar_t, Config>;
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * Block::kStages);
    const Block block(problem, memory, barriers);
    if (threadIdx.x == 0) {
        block.init_barriers();
    }
    __syncthreads();

    // The shuffle tells the compiler that all lanes of a warp have the same value.
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    // The sums of two row tiles need more registers than an equal division among all threads gives.
    constexpr bool kMovesRegisters = Config::kRowTiles > 1;
    if (warp >= 4 * Config::kConsumers) {
        if constexpr (kMovesRegisters) {
            decrease_registers<40>();
        }
        if (warp == 4 * Config::kConsumers && lane == 0) {
            block.load_tiles();
        }
        return;
    }
    if constexpr (kMovesRegisters) {
        increase_registers<232>();
    }
    block.multiply_tiles(warp, lane);
#endif
}

// ---- host --------------------------------------------------------------------------------------------------------

// Pixels of x: columns, rows and images from the innermost dimension on, merged as far as their strides allow.
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

// Kernel for tiles of kOutputs outputs and 64 * kRowTiles * kConsumers pixels.
template <typename scalar_t, int kOutputs, int kRowTiles, int kConsumers>
struct Sm90Conv1x1Kernel {
    using Config = Sm90Conv1x1Config<kOutputs, kRowTiles, kConsumers>;
    static constexpr auto kKernel = &conv1x1_sm90_kernel<scalar_t, kOutputs, kRowTiles, kConsumers>;

    // Tiles of a grid of pixels: the shape with the fewest tiles; of equal ones, the widest.
    struct Tiling {
        int log_width = 0;
        int64_t columns, rows, tiles;

        Tiling(const PixelGrid& grid, int64_t outputs) {
            for (int log = 0; Config::kPixels >> log > 0; ++log) {
                const int64_t columns_of_tiles = ceil_div(grid.sizes[0], int64_t(1) << log);
                const int64_t rows_of_tiles = ceil_div(grid.sizes[1], Config::kPixels >> log);
                if (log == 0 || columns_of_tiles * rows_of_tiles <= columns * rows) {
                    log_width = log;
                    columns = columns_of_tiles;
                    rows = rows_of_tiles;
                }
            }
            tiles = columns * rows * grid.sizes[2] * ceil_div(outputs, kOutputs);
        }
    };

    // Estimated cycles: tiles per multiprocessor, times the cycles of a tile. These are the larger of products and
    // memory traffic, plus a constant for start and end.
    static double cost(const Conv1x1Problem<scalar_t>& problem, const PixelGrid& grid, Stream stream) {
        constexpr double kBytesPerCycle = 45;
        const double products = 4.0 * problem.steps * kRowTiles * kConsumers * kOutputs / 2;
        const double stored = 2.0 * Config::kPixels * std::min(kOutputs, problem.outputs);
        const double bytes = 1.0 * problem.steps * Config::kStage + (problem.residual ? 2 : 1) * stored;
        const double tiles = static_cast<double>(Tiling(grid, problem.outputs).tiles);
        return std::ceil(tiles / multiprocessors(stream)) * (std::max(products, bytes / kBytesPerCycle) + 800);
    }

    // Launch the kernel; return false if TMA cannot read x.
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
                {kStepChannels, 1 << tiling.log_width, Config::kPixels >> tiling.log_width, 1}) ||
            !encode_map<scalar_t, 4>(
                problem.weights, data<scalar_t>(weight), {channels, 2, 4, outputs / 8},
                {channels, 2 * channels, 8 * channels}, {kStepChannels, 2, 1, kOutputs / 8})) {
            return false;
        }
        const int blocks = resident_blocks<kKernel>(Config::kThreads, Config::kSharedBytes, stream);
        launch<kKernel>(
            dim3(static_cast<unsigned>(std::min(problem.num_tiles, blocks))), dim3(Config::kThreads),
            Config::kSharedBytes, stream, problem);
        return true;
    }
};

// Launch the kernel; return false if TMA cannot read x. Results do not depend on the choice of tiles.
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
               std::begin(choices), std::end(choices), [](const Choice& a, const Choice& b) { return a.cost < b.cost; })
        ->run(problem, x, grid, weight, stream);
}

}  // namespace

template <typename scalar_t>
bool conv1x1_sm90(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& out, bool relu, Stream stream) {
    const int64_t channels = x.size(1), outputs = weight.size(0);
    constexpr int64_t kMax = (int64_t(1) << 31) - 1024;  // one more tile must fit into an int
    if (channels == 0 || channels % 8 != 0 || channels > kMax || outputs % 8 != 0 || outputs > kMax ||
        out.numel() / 8 > kMax || !runs_sm90<Sm90Conv1x1Kernel<scalar_t, 128, 1, 2>::kKernel>(stream)) {
        return false;
    }
    bind_context(stream);
    const Tensor dense_weight = aligned(weight);
    const auto dense_bias = bias ? std::make_optional(aligned(*bias)) : std::nullopt;
    const auto dense_residual = residual ? std::make_optional(aligned(*residual)) : std::nullopt;
    Conv1x1Problem<scalar_t> problem{};
    problem.bias = dense_bias ? data<scalar_t>(*dense_bias) : nullptr;
    problem.residual = dense_residual ? data<scalar_t>(*dense_residual) : nullptr;
    problem.out = mutable_data<scalar_t>(out);
    problem.steps = static_cast<int>(ceil_div(channels, kStepChannels));
    problem.outputs = static_cast<int>(outputs);
    problem.relu = relu;
    return run(problem, x, dense_weight, stream) ||
           run(problem, aligned(to_contiguous(x, MemoryFormat::ChannelsLast)), dense_weight, stream);
}

#define SPATIALFLOW_INSTANTIATE(scalar_t)                                                                              \
    template bool conv1x1_sm90<scalar_t>(                                                                              \
        const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&, bool, \
        Stream);
SPATIALFLOW_INSTANTIATE(float16)
SPATIALFLOW_INSTANTIATE(bfloat16)
#undef SPATIALFLOW_INSTANTIATE

}  // namespace spatialflow
