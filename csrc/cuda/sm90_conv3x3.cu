// SPDX-License-Identifier: Apache-2.0
//
// The convolutions of conv3x3.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A block computes four or two sub-tiles of 8 x 8 pixels by 128 or 64 outputs; sub-tiles are numbered over all levels
// of a convolution, and blocks stay. For every 64 channels, sub-tiles with their halo (10 x 10 pixels, 128 bytes each,
// 128-byte swizzle) are loaded once and serve nine taps: the matrix of tap (dy, dx) begins dy rows and dx pixels later.
// Weights are (64 channels, outputs) of a tap, outputs adjacent as packed. Warp 0 loads inputs, warp 1 weights; warps 2
// and 3 add a flow to inputs in shared memory, one rounding each; two warpgroups multiply, half of the pixels each.
// A lane has eight adjacent outputs of each 32 (packed_position): sums go from registers to memory, 16 bytes a store.
// With `active` a tile is left out where all its images are; of one that is computed, sums of such images become zeros.
//
// Floor (H100, 790 TFLOP/s bf16) of 256 -> 256 channels on P3..P7 of 800 x 1333: 26 GFLOP: 33 us. Four sub-tiles by 128
// outputs take 26 us (H200), and 192 of them two rounds on 132 multiprocessors: 51 us. With two, 48 us were measured.
// Expected of one round with four and one with two: 44 us (docs/kernels.md has the model).
#include "cuda/sm90_conv3x3.h"

#include <algorithm>
#include <limits>

#include "cuda/conv3x3_jobs.h"
#include "cuda/sm90_instructions.h"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

constexpr int kSide = 8, kHaloSide = kSide + 2;  // of a sub-tile
constexpr int kStepChannels = 64;                // 128 bytes
constexpr int kRowBytes = kStepChannels * 2;     // of a pixel, and of 64 outputs of a channel
constexpr int kHaloBytes = kHaloSide * kHaloSide * kRowBytes;
constexpr int kRimStride = (kHaloBytes + 1023) / 1024 * 1024;  // the swizzle repeats every 1024 bytes
constexpr int kWeightBytes = kStepChannels * kRowBytes;        // of 64 outputs
constexpr int kSharedLimit = 227 * 1024;                       // of a block, static memory included
constexpr int kAddWarps = 2, kThreads = 3 * 128;

template <int kTileOutputs, int kTileParts>
struct Sm90Conv {
    static constexpr int kOutputs = kTileOutputs, kParts = kTileParts;  // sub-tiles
    static constexpr int kInputStages = 8 / kParts, kWeightStages = 5 * 128 / kOutputs;
    static constexpr int kInputStage = kParts * kRimStride, kWeightStage = kOutputs / 64 * kWeightBytes;
    static constexpr int kBytes = kInputStages * kInputStage + kAddWarps * kRimStride + kWeightStages * kWeightStage;
    static constexpr size_t kSharedBytes = kBytes + 1024;  // to begin at a multiple of 1024
    static_assert(kSharedBytes + 1024 <= kSharedLimit, "dynamic and static shared memory of a block");
};

// One convolution on one level.
template <typename scalar_t>
struct Sm90Level {
    TensorMap x, flow;                // boxes of 10 x 10 pixels and 64 channels
    Global<const scalar_t> residual;  // (N, H, W, O) or null
    Global<scalar_t> out;             // (N, H, W, O)
    int height, width;
    int tile_begin;               // first sub-tile in the convolution
    int tile_rows, tile_columns;  // of an image
};

struct Sm90Convolution {
    TensorMap weights;         // boxes of 64 channels by 64 outputs
    Global<const float> bias;  // (O) or null
    int first_level, levels;
    int part_begin, parts;  // sub-tiles from and to
    int tile_begin;         // first tile in the launch
    int output_tiles;       // beside each other
    int steps, outputs;
    bool has_flow, relu;
    bool wide;  // outputs and residual move 16 bytes at a time
};

template <typename scalar_t>
struct Sm90Table {
    Sm90Level<scalar_t> levels[kMaxJobs];
    Sm90Convolution convolutions[kMaxJobs];
    int num_levels, num_convolutions, num_tiles;
    Global<const uint8_t> active;  // (N), zero for images that are left out; or null
};
#if defined(__CUDACC__)
static_assert(sizeof(Sm90Table<bfloat16>) <= 32 * 1024 - 4, "kernel parameters");
#endif

// ---- device ------------------------------------------------------------------------------------------------------

// Empty but for 9.0a. The host asks for the static shared memory to learn whether there is a kernel.
template <typename scalar_t, int kTileOutputs, int kTileParts>
__global__ void __launch_bounds__(kThreads, 1) conv3x3_sm90_kernel(const __grid_constant__ Sm90Table<scalar_t> table) {
#if SPATIALFLOW_HAS_SM90
    using Size = Sm90Conv<kTileOutputs, kTileParts>;
    constexpr int kInputStages = Size::kInputStages, kWeightStages = Size::kWeightStages;
    constexpr int kOwnParts = Size::kParts / 2, kBlocks = Size::kOutputs / 32;  // of a warpgroup; of packed_position
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, 3 * kInputStages + 2 * kWeightStages + 2 * kAddWarps);
    SPATIALFLOW_SHARED(unsigned, left_out, kNotedWords);
    const unsigned begin = (shared_address(memory) + 1023) / 1024 * 1024;
    const unsigned flow_memory = begin + kInputStages * Size::kInputStage;  // one sub-tile for each warp that adds
    const unsigned weight_memory = flow_memory + kAddWarps * kRimStride;
    // Inputs are ready for wgmma, free, or ready to be added to; weights are ready, or free; flows the same.
    const unsigned input_full = shared_address(barriers), input_empty = input_full + 8 * kInputStages;
    const unsigned term_full = input_empty + 8 * kInputStages;
    const unsigned weight_full = term_full + 8 * kInputStages, weight_empty = weight_full + 8 * kWeightStages;
    const unsigned flow_full = weight_empty + 8 * kWeightStages, flow_empty = flow_full + 8 * kAddWarps;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kInputStages; ++i) {
            mbarrier_init(input_full + 8 * i, kAddWarps);
            mbarrier_init(input_empty + 8 * i, 8);
            mbarrier_init(term_full + 8 * i, 1);
        }
        for (int i = 0; i < kWeightStages; ++i) {
            mbarrier_init(weight_full + 8 * i, 1);
            mbarrier_init(weight_empty + 8 * i, 8);
        }
        for (int i = 0; i < kAddWarps; ++i) {
            mbarrier_init(flow_full + 8 * i, 1);
            mbarrier_init(flow_empty + 8 * i, 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    struct Tile {
        int convolution, part, output;  // the first ones
    };
    const auto tile_at = [&](int index) {
        const int entry = entry_of_tile(table.convolutions, table.num_convolutions, index);
        const int local = index - table.convolutions[entry].tile_begin, beside = table.convolutions[entry].output_tiles;
        return Tile{
            entry, table.convolutions[entry].part_begin + local / beside * Size::kParts,
            local % beside * Size::kOutputs};
    };
    struct Part {
        int level;
        MapTile map;
    };
    // Beyond the last sub-tile: one below the map, which loads zeros and stores nothing.
    const auto part_at = [&](const Sm90Convolution& convolution, int part) {
        const int first = convolution.first_level;
        if (part >= convolution.parts) {
            return Part{first, {0, table.levels[first].height + 1, 0}};
        }
        const int entry = first + entry_of_tile(table.levels + first, convolution.levels, part);
        const Sm90Level<scalar_t>& level = table.levels[entry];
        return Part{entry, map_tile<kSide, kSide>(part - level.tile_begin, level.tile_rows, level.tile_columns)};
    };
    const int first = static_cast<int>(blockIdx.x), step_tiles = static_cast<int>(gridDim.x);
    const auto is_active = [&](int image) { return !table.active || table.active[image] != 0; };
    if (table.active) {
        leave_out_tiles(
            left_out, table.num_tiles,
            [&](int index) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                bool none = true;
                for (int i = 0; i < Size::kParts && tile.part + i < convolution.parts; ++i) {
                    none = none && !is_active(part_at(convolution, tile.part + i).map.image);
                }
                return none;
            },
            [&](int index) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                for (int i = 0; i < Size::kParts; ++i) {
                    const Part part = part_at(convolution, tile.part + i);
                    const Sm90Level<scalar_t>& level = table.levels[part.level];
                    clear_tile<kSide, kSide, Size::kOutputs>(
                        level.out, level.height, level.width, convolution.outputs, convolution.wide, part.map,
                        tile.output);
                }
            });
    }
    // All roles go through the same tiles; one that is left out moves no barrier and no stage.
    const auto tile_from = [&](int index) { return next_tile(table, left_out, index); };

    // The compiler must see that all lanes of a warp agree on these.
    const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) % 128 / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if (warpgroup == 0) {
        give_registers<72>();
        if (warp == 0 && lane == 0) {
            int stage = 0;
            unsigned parity = 1, flow_parity = 1;
            for (int index = tile_from(first); index < table.num_tiles; index = tile_from(index + step_tiles)) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                const bool has_flow = convolution.has_flow;
                Part parts[Size::kParts];
#pragma unroll
                for (int i = 0; i < Size::kParts; ++i) {
                    parts[i] = part_at(convolution, tile.part + i);
                }
                for (int step = 0; step < convolution.steps; ++step) {
                    mbarrier_wait(input_empty + 8 * stage, parity);
                    const unsigned full = (has_flow ? term_full : input_full) + 8 * stage;
                    mbarrier_expect(full, Size::kParts * kHaloBytes);
                    if (!has_flow) {
                        mbarrier_arrive(full);  // for the second warp that adds
                    }
#pragma unroll
                    for (int i = 0; i < Size::kParts; ++i) {
                        tma_load_4d(
                            begin + stage * Size::kInputStage + i * kRimStride, &table.levels[parts[i].level].x,
                            step * kStepChannels, parts[i].map.x - 1, parts[i].map.y - 1, parts[i].map.image, full);
                    }
                    if (has_flow) {
#pragma unroll
                        for (int i = 0; i < Size::kParts; ++i) {
                            const int buffer = i % kAddWarps;
                            mbarrier_wait(flow_empty + 8 * buffer, flow_parity);
                            mbarrier_expect(flow_full + 8 * buffer, kHaloBytes);
                            tma_load_4d(
                                flow_memory + buffer * kRimStride, &table.levels[parts[i].level].flow,
                                step * kStepChannels, parts[i].map.x - 1, parts[i].map.y - 1, parts[i].map.image,
                                flow_full + 8 * buffer);
                            flow_parity ^= buffer == kAddWarps - 1;
                        }
                    }
                    if (++stage == kInputStages) {
                        stage = 0;
                        parity ^= 1;
                    }
                }
            }
        } else if (warp == 1 && lane == 0) {
            int stage = 0;
            unsigned parity = 1;
            for (int index = tile_from(first); index < table.num_tiles; index = tile_from(index + step_tiles)) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                for (int step = 0; step < convolution.steps; ++step) {
                    for (int tap = 0; tap < kTaps; ++tap) {
                        mbarrier_wait(weight_empty + 8 * stage, parity);
                        mbarrier_expect(weight_full + 8 * stage, Size::kWeightStage);
#pragma unroll
                        for (int i = 0; i < Size::kOutputs / 64; ++i) {
                            tma_load_3d(
                                weight_memory + stage * Size::kWeightStage + i * kWeightBytes, &convolution.weights,
                                tile.output + i * 64, step * kStepChannels, tap, weight_full + 8 * stage);
                        }
                        if (++stage == kWeightStages) {
                            stage = 0;
                            parity ^= 1;
                        }
                    }
                }
            }
        } else if (warp >= 2) {
            // Inputs and flows lie alike in shared memory, swizzle and zeros outside the map included.
            const int own = warp - 2;
            const Shared<unsigned char> inputs = memory + (begin - shared_address(memory)) + lane * 16;
            const Shared<unsigned char> flow = inputs + kInputStages * Size::kInputStage + own * kRimStride;
            int stage = 0;
            unsigned parity = 0, flow_parity = 0;  // a bit for each stage
            for (int index = tile_from(first); index < table.num_tiles; index = tile_from(index + step_tiles)) {
                const Sm90Convolution& convolution = table.convolutions[tile_at(index).convolution];
                for (int step = 0; step < convolution.steps; ++step) {
                    if (convolution.has_flow) {
                        mbarrier_wait(term_full + 8 * stage, parity >> stage & 1);
                        parity ^= 1u << stage;
#pragma unroll 1
                        for (int part = own; part < Size::kParts; part += kAddWarps) {
                            mbarrier_wait(flow_full + 8 * own, flow_parity);
                            flow_parity ^= 1;
                            const Shared<unsigned char> input = inputs + stage * Size::kInputStage + part * kRimStride;
                            constexpr int kLine = kWarpSize * 16, kAtOnce = 5;
                            static_assert(kHaloBytes % (kLine * kAtOnce) == 0, "whole lines");
#pragma unroll 1
                            for (int line = 0; line < kHaloBytes; line += kLine * kAtOnce) {
                                SumTerms terms[kAtOnce];
#pragma unroll
                                for (int i = 0; i < kAtOnce; ++i) {
                                    const int at = line + i * kLine;
                                    terms[i].x = load_vector<4>(pointer_cast<const unsigned>(input + at));
                                    terms[i].flow = load_vector<4>(pointer_cast<const unsigned>(flow + at));
                                }
#pragma unroll
                                for (int i = 0; i < kAtOnce; ++i) {
                                    store_vector(
                                        pointer_cast<unsigned>(input + line + i * kLine), sum_of<scalar_t>(terms[i]));
                                }
                            }
                            __syncwarp();
                            if (lane == 0) {
                                mbarrier_arrive(flow_empty + 8 * own);
                            }
                        }
                        fence_async_proxy();
                        __syncwarp();
                        if (lane == 0) {
                            mbarrier_arrive(input_full + 8 * stage);
                        }
                    }
                    if (++stage == kInputStages) {
                        stage = 0;
                    }
                }
            }
        }
        return;
    }

    take_registers<216>();
    const int own_part = (warpgroup - 1) * kOwnParts;
    int input_stage = 0, weight_stage = 0;
    unsigned input_parity = 0, weight_parity = 0;
    WgmmaSums<Size::kOutputs / 2> sums[kOwnParts] = {};
    const auto pin_sums = [&]() {
#pragma unroll
        for (int part = 0; part < kOwnParts; ++part) {
            pin(sums[part]);
        }
    };
    for (int index = tile_from(first); index < table.num_tiles; index = tile_from(index + step_tiles)) {
        const Tile tile = tile_at(index);
        const Sm90Convolution& convolution = table.convolutions[tile.convolution];
        const int first_output = tile.output + lane % 4 * 8;  // of this lane
        float bias[kBlocks][8];
#pragma unroll
        for (int i = 0; i < kBlocks * 8; ++i) {
            const int output = first_output + i / 8 * 32 + i % 8;
            bias[i / 8][i % 8] = convolution.bias && output < convolution.outputs ? convolution.bias[output] : 0.0f;
        }
        int read_stage = -1;  // of weights that the group of products before the running one has read
        const auto release_inputs = [&]() {
            mbarrier_arrive(input_empty + 8 * (input_stage == 0 ? kInputStages - 1 : input_stage - 1));
        };
#pragma unroll 1
        for (int step = 0; step < convolution.steps; ++step) {
            mbarrier_wait(input_full + 8 * input_stage, input_parity);
            const unsigned inputs = begin + input_stage * Size::kInputStage + own_part * kRimStride;
#pragma unroll 1
            for (int tap = 0; tap < kTaps; ++tap) {
                mbarrier_wait(weight_full + 8 * weight_stage, weight_parity);
                const int shift = tap / 3 * kHaloSide + tap % 3;
                const uint64_t a = matrix_descriptor(inputs + shift * kRowBytes, 16, kHaloSide * kRowBytes);
                const uint64_t b =
                    matrix_descriptor(weight_memory + weight_stage * Size::kWeightStage, kWeightBytes, 8 * kRowBytes);
                pin_sums();
                wgmma_fence();
                // Sixteen channels are 32 bytes of a pixel, and 16 rows of weights.
#pragma unroll
                for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
                    for (int part = 0; part < kOwnParts; ++part) {
                        Wgmma<Size::kOutputs>::multiply(
                            sums[part], a + (part * kRimStride + k * 32) / 16, b + k * 16 * kRowBytes / 16,
                            (step | tap | k) != 0, scalar_t{});
                    }
                }
                wgmma_commit();
                wgmma_wait<1>();
                pin_sums();
                if (lane == 0 && read_stage >= 0) {
                    mbarrier_arrive(weight_empty + 8 * read_stage);
                    if (tap == 0) {
                        release_inputs();
                    }
                }
                read_stage = weight_stage;
                if (++weight_stage == kWeightStages) {
                    weight_stage = 0;
                    weight_parity ^= 1;
                }
            }
            if (++input_stage == kInputStages) {
                input_stage = 0;
                input_parity ^= 1;
            }
        }
        wgmma_wait<0>();
        pin_sums();
        if (lane == 0) {
            mbarrier_arrive(weight_empty + 8 * read_stage);
            release_inputs();
        }

        // Row `warp * 16 + half * 8 + lane / 4` of a sub-tile's sums is pixel (warp * 2 + half, lane / 4).
        const bool relu = convolution.relu, wide = convolution.wide;
#pragma unroll
        for (int part = 0; part < kOwnParts; ++part) {
            const Part place = part_at(convolution, tile.part + own_part + part);
            const Sm90Level<scalar_t>& level = table.levels[place.level];
            const bool active = is_active(place.map.image);  // beside one that is, an image may not be
            const int x = place.map.x + lane / 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int y = place.map.y + warp * 2 + half;
                const bool inside = y < level.height && x < level.width;
                const int64_t pixel = (static_cast<int64_t>(place.map.image) * level.height + y) * level.width + x;
                const int64_t at = pixel * convolution.outputs + first_output;
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    const int left = inside ? convolution.outputs - first_output - block * 32 : 0;
                    Vec<scalar_t, 8> added{};
                    if (level.residual) {
                        const Global<const scalar_t> source = level.residual + (at + block * 32);
                        if (wide) {
                            if (left > 0) {
                                added = load_vector<8>(source);
                            }
                        } else {
#pragma unroll
                            for (int e = 0; e < 8; ++e) {
                                if (e < left) {
                                    added[e] = source[e];
                                }
                            }
                        }
                    }
                    Vec<unsigned, 4> words;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const auto& own = sums[part];
                        const int element = (block * 4 + i) * 4 + half * 2;
                        words[i] = pack_pair(
                            own[element] + bias[block][2 * i] + load(added[2 * i]),
                            own[element + 1] + bias[block][2 * i + 1] + load(added[2 * i + 1]), scalar_t{});
                        words[i] = relu ? rectify_pairs(words[i], scalar_t{}) : words[i];
                        words[i] = active ? words[i] : 0;
                    }
                    const Global<scalar_t> target = level.out + (at + block * 32);
                    if (wide) {
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
    }
#endif
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
bool encode_level(TensorMap& map, const Tensor& level) {
    const int64_t sizes[] = {level.size(1), level.size(3), level.size(2), level.size(0)};
    const int64_t own[] = {stride_of(level, 3), stride_of(level, 2), stride_of(level, 0)};
    int64_t strides[3];
    return nested_strides(sizes, own, strides) &&
           encode_map<scalar_t, 4>(
               map, data<scalar_t>(level), sizes, strides, {kStepChannels, kHaloSide, kHaloSide, 1});
}

// The kernel for tiles of kOutputs outputs and kParts sub-tiles.
template <typename scalar_t, int kOutputs, int kParts>
struct Sm90Kernel {
    using Size = Sm90Conv<kOutputs, kParts>;
    static constexpr auto kKernel = &conv3x3_sm90_kernel<scalar_t, kOutputs, kParts>;

    static int64_t tiles(const Sm90Convolution& convolution) {
        return ceil_div(convolution.parts - convolution.part_begin, kParts) * ceil_div(convolution.outputs, kOutputs);
    }
    static int64_t tiles(const Sm90Table<scalar_t>& table) {
        int64_t all = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            all += tiles(table.convolutions[i]);
        }
        return all;
    }
    // Cycles of a tile, roughly. Of a step: what products take, or the traffic of shared memory (128 bytes a cycle), or
    // that of L2 (32). Beside the steps, what a tile's beginning and its stores take.
    static double tile_cost(const Sm90Table<scalar_t>& table) {
        constexpr double kProducts = 36.0 * kParts * kOutputs / 2, kRims = kParts * kHaloBytes;
        constexpr double kWeights = kTaps * Size::kWeightStage, kOperands = 36.0 * kParts * (2048 + 32 * kOutputs);
        double cycles = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            const Sm90Convolution& convolution = table.convolutions[i];
            const double flow = convolution.has_flow;
            const double step = std::max(
                {kProducts, (kOperands + kWeights + (1 + 4 * flow) * kRims) / 128,
                 (kWeights + (1 + flow) * kRims) / 32});
            cycles +=
                static_cast<double>(tiles(convolution)) * (convolution.steps * step + 1000 + 4.0 * kParts * kOutputs);
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
        const unsigned blocks = walking_blocks(table, resident_blocks<kKernel>(kThreads, Size::kSharedBytes, stream));
        launch<kKernel>(dim3(blocks), dim3(kThreads), Size::kSharedBytes, stream, table);
    }
};

// Whole rounds of tiles of four sub-tiles, then a launch with tiles of two: a last round of few tiles takes half as
// long.
template <typename scalar_t, int kOutputs>
struct Sm90Rounds {
    using Large = Sm90Kernel<scalar_t, kOutputs, 4>;
    using Small = Sm90Kernel<scalar_t, kOutputs, 2>;

    // The tiles of whole rounds, less those of a convolution's sub-tiles that the cut would divide by outputs.
    static int64_t cut(const Sm90Table<scalar_t>& table, Stream stream, Sm90Table<scalar_t>& rest) {
        const int64_t whole = Large::tiles(table) / multiprocessors(stream) * multiprocessors(stream);
        int64_t tiles = 0;
        rest.num_convolutions = 0;
        for (int i = 0; i < table.num_convolutions; ++i) {
            const Sm90Convolution& convolution = table.convolutions[i];
            const int64_t beside = ceil_div(convolution.outputs, kOutputs);
            const int64_t room = rest.num_convolutions == 0 ? (whole - tiles) / beside * beside : 0;
            const int64_t own = std::min(Large::tiles(convolution), room);
            tiles += own;
            if (own < Large::tiles(convolution)) {
                Sm90Convolution& left = rest.convolutions[rest.num_convolutions++] = convolution;
                left.part_begin += static_cast<int>(own / beside * 4);
            }
        }
        return tiles;
    }
    static double cost(const Sm90Table<scalar_t>& table, Stream stream) {
        constexpr double kLaunch = 5000;  // with the first loads and the last stores of its blocks
        Sm90Table<scalar_t> rest = table;
        const int64_t tiles = cut(table, stream, rest);
        return tiles == 0 || rest.num_convolutions == 0
                   ? std::numeric_limits<double>::infinity()
                   : Large::cost(table, tiles, stream) + kLaunch + Small::cost(rest, Small::tiles(rest), stream);
    }
    static void run(Sm90Table<scalar_t>& table, Stream stream) {
        Sm90Table<scalar_t> rest = table;
        cut(table, stream, rest);
        // What is left begins in the convolution where whole rounds end.
        table.num_convolutions -= rest.num_convolutions;
        const Sm90Convolution& divided = rest.convolutions[0];
        Sm90Convolution& last = table.convolutions[table.num_convolutions];
        if (divided.part_begin > last.part_begin) {
            last.parts = divided.part_begin;
            ++table.num_convolutions;
        }
        Large::run(table, stream);
        Small::run(rest, stream);
    }
};

// Adds a convolution with at least one level that is not empty, if the kernel can run it.
template <typename scalar_t>
bool append(Sm90Table<scalar_t>& table, const Convolution& conv) {
    const int64_t channels = conv.x[0].size(1), outputs = conv.out[0].size(1);
    if (channels == 0 || channels % kStepChannels != 0) {
        return false;
    }
    const int64_t most_parts = (int64_t(1) << 26) / ceil_div(outputs, 64);  // tiles are ints
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
    added.wide = outputs % 8 == 0;
    for (size_t i = 0; i < conv.out.size(); ++i) {
        const Tensor& out = conv.out[i];
        if (out.numel() == 0) {
            continue;
        }
        const int64_t rows = ceil_div(out.size(2), kSide), columns = ceil_div(out.size(3), kSide);
        if (added.first_level + added.levels == kMaxJobs || out.size(0) * rows * columns > most_parts - added.parts) {
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
        level.tile_begin = added.parts;
        level.tile_rows = static_cast<int>(rows);
        level.tile_columns = static_cast<int>(columns);
        added.wide = added.wide && is_aligned(level.out, 16) && (!level.residual || is_aligned(level.residual, 16));
        added.parts += static_cast<int>(out.size(0) * rows * columns);
        ++added.levels;
    }
    table.num_levels += added.levels;
    table.convolutions[table.num_convolutions++] = added;
    return true;
}

// The same sums in the same order whichever tiles are taken.
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
    std::min_element(std::begin(choices), std::end(choices), [](const Choice& one, const Choice& other) {
        return one.cost < other.cost;
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
    std::vector<Convolution> others;
    Sm90Table<scalar_t> table{};
    table.active = active ? data<uint8_t>(*active) : nullptr;
    for (const Convolution& conv : convolutions) {
        const auto levels =
            std::count_if(conv.out.begin(), conv.out.end(), [](const Tensor& out) { return out.numel() > 0; });
        if (levels == 0) {
            continue;
        }
        if (table.num_levels + levels > kMaxJobs) {
            run(table, stream);
        }
        if (!append(table, conv)) {
            others.push_back(conv);
        }
    }
    run(table, stream);
    return others;
}

template std::vector<Convolution> convolve3x3_sm90<float16>(
    const std::vector<Convolution>&, Stream, const std::optional<Tensor>&);
template std::vector<Convolution> convolve3x3_sm90<bfloat16>(
    const std::vector<Convolution>&, Stream, const std::optional<Tensor>&);

}  // namespace spatialflow
