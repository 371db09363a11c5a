// SPDX-License-Identifier: Apache-2.0
//
// Kernel of the 3x3 convolutions of conv3x3.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A block computes tiles of four or two sub-tiles of 8 x 8 pixels by 128 or 64 outputs. Sub-tiles are numbered over all
// levels of a convolution. For every 64 channels, sub-tiles with their halo are loaded once for nine taps: 10 x 10
// pixels of 128 bytes, 128-byte swizzle. The input matrix of tap (dy, dx) starts dy rows and dx pixels after the first
// pixel of the halo. A stage of weights holds one tap, (64 channels, outputs), with the outputs in the order of
// packed_position. Warp 0 loads inputs and flows, warp 1 weights. Warps 2 and 3 add the flow to the inputs in shared
// memory, with one rounding. Two warpgroups multiply, half of the sub-tiles each. A lane has eight adjacent outputs of
// each 32 (packed_position) and stores them as 16 bytes.
#pragma once

#include "cuda/conv3x3_table.cuh"
#include "cuda/sm90_pipeline.cuh"

namespace spatialflow {
namespace {

constexpr int kSubTileSide = 8, kHaloSide = kSubTileSide + 2;
constexpr int kStepChannels = 64;             // 128 bytes
constexpr int kRowBytes = kStepChannels * 2;  // 64 channels of a pixel, or 64 outputs of a channel
constexpr int kHaloBytes = kHaloSide * kHaloSide * kRowBytes;
constexpr int kHaloStride = (kHaloBytes + 1023) / 1024 * 1024;  // the swizzle repeats every 1024 bytes
constexpr int kWeightBytes = kStepChannels * kRowBytes;         // 64 channels by 64 outputs of a tap
constexpr int kSharedLimit = 227 * 1024;                        // of a block, static memory included
constexpr int kAddWarps = 2, kThreads = 3 * 128;

template <int kTileOutputs, int kTileSubTiles>
struct Sm90Conv3x3Config {
    static constexpr int kOutputs = kTileOutputs, kSubTiles = kTileSubTiles;
    static constexpr int kInputStages = 8 / kSubTiles, kWeightStages = 5 * 128 / kOutputs;
    static constexpr int kInputStage = kSubTiles * kHaloStride, kWeightStage = kOutputs / 64 * kWeightBytes;
    static constexpr int kBytes = kInputStages * kInputStage + kAddWarps * kHaloStride + kWeightStages * kWeightStage;
    static constexpr size_t kSharedBytes = kBytes + 1024;  // the first stage starts at a multiple of 1024
    static_assert(kSharedBytes + 1024 <= kSharedLimit, "dynamic and static shared memory of a block must fit");
};

// Level of a convolution.
template <typename scalar_t>
struct Sm90Level {
    TensorMap x, flow;                // boxes of 10 x 10 pixels and 64 channels
    Global<const scalar_t> residual;  // (N, H, W, O) or null
    Global<scalar_t> out;             // (N, H, W, O)
    int height, width;
    int tile_begin;               // number of the first sub-tile in the convolution
    int tile_rows, tile_columns;  // rows and columns of sub-tiles in an image
};

struct Sm90Convolution {
    TensorMap weights;         // boxes of 64 channels by 64 outputs
    Global<const float> bias;  // (O) or null
    int first_level, levels;
    int sub_tile_begin, sub_tile_end;
    int tile_begin;    // first tile in the launch
    int output_tiles;  // tiles with the same pixels
    int steps, outputs;
    bool has_flow, relu;
    bool vectorized;  // outputs and residual are accessed 16 bytes at a time
};

template <typename scalar_t>
struct Sm90Table {
    Sm90Level<scalar_t> levels[kMaxEntries];
    Sm90Convolution convolutions[kMaxEntries];
    int num_levels, num_convolutions, num_tiles;
    Global<const uint8_t> active;  // (N), zero for inactive images; or null
};
#if defined(__CUDACC__)
static_assert(sizeof(Sm90Table<bfloat16>) <= 32 * 1024 - 4, "kernel parameters");
#endif

#if SPATIALFLOW_HAS_SM90

// Block of the kernel: its tiles, its shared memory, and the roles of its warps.
template <typename scalar_t, typename Config>
struct Sm90Conv3x3Block {
    static constexpr int kInputStages = Config::kInputStages, kWeightStages = Config::kWeightStages;
    static constexpr int kSubTiles = Config::kSubTiles,
                         kBarriers = 3 * kInputStages + 2 * kWeightStages + 2 * kAddWarps;
    // Number of sub-tiles of a warpgroup, and of blocks of 32 outputs (packed_position) of a tile.
    static constexpr int kWarpgroupSubTiles = kSubTiles / 2, kBlocks = Config::kOutputs / 32;

    struct Tile {
        int convolution, sub_tile, output;  // first sub-tile and first output of the tile
    };
    struct SubTile {
        int level;
        MapTile map;
    };

    const Sm90Table<scalar_t>& table;
    Shared<unsigned char> memory;
    Shared<unsigned> skipped;
    unsigned begin, flow_memory, weight_memory;
    int first_tile, tile_step;
    // Addresses of the mbarriers. Inputs: ready for wgmma (input_full), free (input_empty), ready for the addition of
    // the flow (term_full). Weights and flows: ready, free.
    unsigned input_full, input_empty, term_full, weight_full, weight_empty, flow_full, flow_empty;

    __device__ __forceinline__ Sm90Conv3x3Block(
        const Sm90Table<scalar_t>& table, const Shared<unsigned char>& memory, const Shared<uint64_t>& barriers,
        const Shared<unsigned>& skipped)
        : table(table),
          memory(memory),
          skipped(skipped),
          first_tile(static_cast<int>(blockIdx.x)),
          tile_step(static_cast<int>(gridDim.x)) {
        begin = (shared_address(memory) + 1023) / 1024 * 1024;
        flow_memory = begin + kInputStages * Config::kInputStage;  // a sub-tile for each warp that adds
        weight_memory = flow_memory + kAddWarps * kHaloStride;
        input_full = shared_address(barriers), input_empty = input_full + 8 * kInputStages;
        term_full = input_empty + 8 * kInputStages;
        weight_full = term_full + 8 * kInputStages, weight_empty = weight_full + 8 * kWeightStages;
        flow_full = weight_empty + 8 * kWeightStages, flow_empty = flow_full + 8 * kAddWarps;
    }

    __device__ __forceinline__ void init_barriers() const {
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

    __device__ __forceinline__ Tile tile_at(int index) const {
        const int entry = entry_of_tile(table.convolutions, table.num_convolutions, index);
        const int local = index - table.convolutions[entry].tile_begin;
        const int output_tiles = table.convolutions[entry].output_tiles;
        return Tile{
            entry, table.convolutions[entry].sub_tile_begin + local / output_tiles * kSubTiles,
            local % output_tiles * Config::kOutputs};
    }

    // Position of a sub-tile. An index beyond the last one gives a sub-tile below the map, which loads zeros and stores
    // nothing.
    __device__ __forceinline__ SubTile sub_tile_at(const Sm90Convolution& convolution, int sub_tile) const {
        const int first = convolution.first_level;
        if (sub_tile >= convolution.sub_tile_end) {
            return SubTile{first, {0, table.levels[first].height + 1, 0}};
        }
        const int entry = first + entry_of_tile(table.levels + first, convolution.levels, sub_tile);
        const Sm90Level<scalar_t>& level = table.levels[entry];
        return SubTile{
            entry,
            map_tile<kSubTileSide, kSubTileSide>(sub_tile - level.tile_begin, level.tile_rows, level.tile_columns)};
    }

    __device__ __forceinline__ bool is_active(int image) const { return !table.active || table.active[image] != 0; }

    // Skip tiles without an active image, and fill their outputs with zeros.
    __device__ __forceinline__ void skip_inactive_tiles() const {
        skip_tiles(
            skipped, table.num_tiles,
            [&](int index) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                bool none = true;
                for (int i = 0; i < kSubTiles && tile.sub_tile + i < convolution.sub_tile_end; ++i) {
                    none = none && !is_active(sub_tile_at(convolution, tile.sub_tile + i).map.image);
                }
                return none;
            },
            [&](int index) {
                const Tile tile = tile_at(index);
                const Sm90Convolution& convolution = table.convolutions[tile.convolution];
                for (int i = 0; i < kSubTiles; ++i) {
                    const SubTile sub_tile = sub_tile_at(convolution, tile.sub_tile + i);
                    const Sm90Level<scalar_t>& level = table.levels[sub_tile.level];
                    clear_tile<kSubTileSide, kSubTileSide, Config::kOutputs>(
                        level.out, level.height, level.width, convolution.outputs, convolution.vectorized, sub_tile.map,
                        tile.output);
                }
            });
    }

    // Call body(tile, convolution) for the tiles of the block. All roles process the same tiles; a skipped tile uses no
    // barrier and no stage.
    template <typename Body>
    __device__ __forceinline__ void for_each_tile(const Body& body) const {
        for (int index = next_tile(table, skipped, first_tile); index < table.num_tiles;
             index = next_tile(table, skipped, index + tile_step)) {
            const Tile tile = tile_at(index);
            body(tile, table.convolutions[tile.convolution]);
        }
    }

    // ---- producers: one thread each --------------------------------------------------------------------------------

    __device__ __forceinline__ void load_inputs() const {
        PipelineState<kInputStages> state(1);
        unsigned flow_parity = 1;
        for_each_tile([&](const Tile& tile, const Sm90Convolution& convolution) {
            const bool has_flow = convolution.has_flow;
            SubTile sub_tiles[kSubTiles];
#pragma unroll
            for (int i = 0; i < kSubTiles; ++i) {
                sub_tiles[i] = sub_tile_at(convolution, tile.sub_tile + i);
            }
            for (int step = 0; step < convolution.steps; ++step) {
                mbarrier_wait(input_empty + 8 * state.stage, state.parity);
                const unsigned full = (has_flow ? term_full : input_full) + 8 * state.stage;
                mbarrier_expect(full, kSubTiles * kHaloBytes);
                if (!has_flow) {
                    mbarrier_arrive(full);  // in place of the second warp that adds flows
                }
#pragma unroll
                for (int i = 0; i < kSubTiles; ++i) {
                    tma_load_4d(
                        begin + state.stage * Config::kInputStage + i * kHaloStride,
                        &table.levels[sub_tiles[i].level].x, step * kStepChannels, sub_tiles[i].map.x - 1,
                        sub_tiles[i].map.y - 1, sub_tiles[i].map.image, full);
                }
                if (has_flow) {
                    load_flows(sub_tiles, step, flow_parity);
                }
                state.advance();
            }
        });
    }

    __device__ __forceinline__ void load_flows(
        const SubTile (&sub_tiles)[kSubTiles], int step, unsigned& flow_parity) const {
#pragma unroll
        for (int i = 0; i < kSubTiles; ++i) {
            const int buffer = i % kAddWarps;
            mbarrier_wait(flow_empty + 8 * buffer, flow_parity);
            mbarrier_expect(flow_full + 8 * buffer, kHaloBytes);
            tma_load_4d(
                flow_memory + buffer * kHaloStride, &table.levels[sub_tiles[i].level].flow, step * kStepChannels,
                sub_tiles[i].map.x - 1, sub_tiles[i].map.y - 1, sub_tiles[i].map.image, flow_full + 8 * buffer);
            flow_parity ^= buffer == kAddWarps - 1;
        }
    }

    __device__ __forceinline__ void load_weights() const {
        PipelineState<kWeightStages> state(1);
        for_each_tile([&](const Tile& tile, const Sm90Convolution& convolution) {
            for (int step = 0; step < convolution.steps; ++step) {
                for (int tap = 0; tap < kTaps; ++tap) {
                    mbarrier_wait(weight_empty + 8 * state.stage, state.parity);
                    mbarrier_expect(weight_full + 8 * state.stage, Config::kWeightStage);
#pragma unroll
                    for (int i = 0; i < Config::kOutputs / 64; ++i) {
                        tma_load_3d(
                            weight_memory + state.stage * Config::kWeightStage + i * kWeightBytes, &convolution.weights,
                            tile.output + i * 64, step * kStepChannels, tap, weight_full + 8 * state.stage);
                    }
                    state.advance();
                }
            }
        });
    }

    // ---- addition of flows: two warps ------------------------------------------------------------------------------

    __device__ __forceinline__ void add_flows(int adder, int lane) const {
        // Inputs and flows have the same layout in shared memory, swizzle and zeros outside the map included.
        const Shared<unsigned char> inputs = memory + (begin - shared_address(memory)) + lane * 16;
        const Shared<unsigned char> flow = inputs + kInputStages * Config::kInputStage + adder * kHaloStride;
        int stage = 0;
        unsigned parity = 0, flow_parity = 0;  // bit i of `parity` is the parity of stage i
        for_each_tile([&](const Tile&, const Sm90Convolution& convolution) {
            for (int step = 0; step < convolution.steps; ++step) {
                if (convolution.has_flow) {
                    mbarrier_wait(term_full + 8 * stage, parity >> stage & 1);
                    parity ^= 1u << stage;
                    add_step(inputs + stage * Config::kInputStage, flow, adder, lane, flow_parity);
                    if (lane == 0) {
                        mbarrier_arrive(input_full + 8 * stage);
                    }
                }
                if (++stage == kInputStages) {
                    stage = 0;
                }
            }
        });
    }

    // Add the flows of a step to this warp's sub-tiles of the inputs, and make the sums visible to wgmma.
    __device__ __forceinline__ void add_step(
        const Shared<unsigned char>& inputs, const Shared<unsigned char>& flow, int adder, int lane,
        unsigned& flow_parity) const {
#pragma unroll 1
        for (int sub_tile = adder; sub_tile < kSubTiles; sub_tile += kAddWarps) {
            mbarrier_wait(flow_full + 8 * adder, flow_parity);
            flow_parity ^= 1;
            add_sub_tile(inputs + sub_tile * kHaloStride, flow);
            __syncwarp();
            if (lane == 0) {
                mbarrier_arrive(flow_empty + 8 * adder);
            }
        }
        fence_async_proxy();
        __syncwarp();
    }

    __device__ __forceinline__ void add_sub_tile(
        const Shared<unsigned char>& input, const Shared<unsigned char>& flow) const {
        constexpr int kLine = kWarpSize * 16, kInFlight = 5;
        static_assert(kHaloBytes % (kLine * kInFlight) == 0, "whole lines");
#pragma unroll 1
        for (int line = 0; line < kHaloBytes; line += kLine * kInFlight) {
            SumTerms terms[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int at = line + i * kLine;
                terms[i].x = load_vector<4>(pointer_cast<const unsigned>(input + at));
                terms[i].flow = load_vector<4>(pointer_cast<const unsigned>(flow + at));
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                store_vector(pointer_cast<unsigned>(input + line + i * kLine), sum_of<scalar_t>(terms[i]));
            }
        }
    }

    // ---- consumers: two warpgroups ---------------------------------------------------------------------------------

    using Sums = WgmmaSums<Config::kOutputs / 2>[kWarpgroupSubTiles];

    __device__ __forceinline__ void multiply(int first_sub_tile, int warp, int lane) const {
        PipelineState<kInputStages> input(0);
        PipelineState<kWeightStages> weight(0);
        WgmmaSums<Config::kOutputs / 2> sums[kWarpgroupSubTiles] = {};
        for_each_tile([&](const Tile& tile, const Sm90Convolution& convolution) {
            const int first_output = tile.output + lane % 4 * 8;  // of this lane
            float bias[kBlocks][8];
#pragma unroll
            for (int i = 0; i < kBlocks * 8; ++i) {
                const int output = first_output + i / 8 * 32 + i % 8;
                bias[i / 8][i % 8] = convolution.bias && output < convolution.outputs ? convolution.bias[output] : 0.0f;
            }
            int read_stage = -1;  // stage of the weights that the previous group of products has read
#pragma unroll 1
            for (int step = 0; step < convolution.steps; ++step) {
                mbarrier_wait(input_full + 8 * input.stage, input.parity);
                const unsigned inputs = begin + input.stage * Config::kInputStage + first_sub_tile * kHaloStride;
                multiply_taps(inputs, step, lane, input, weight, read_stage, sums);
                input.advance();
            }
            finish_products(sums);
            if (lane == 0) {
                mbarrier_arrive(weight_empty + 8 * read_stage);
                release_inputs(input);
            }
#pragma unroll
            for (int i = 0; i < kWarpgroupSubTiles; ++i) {
                const SubTile sub_tile = sub_tile_at(convolution, tile.sub_tile + first_sub_tile + i);
                store_sub_tile(convolution, sub_tile, first_output, warp, lane, bias, sums[i]);
            }
        });
    }

    // Release the stage of inputs that precedes the one of `input`.
    __device__ __forceinline__ void release_inputs(const PipelineState<kInputStages>& input) const {
        mbarrier_arrive(input_empty + 8 * (input.stage == 0 ? kInputStages - 1 : input.stage - 1));
    }

    // Run the products of a step, a group per tap. After each group, release the stages that the group before it has
    // read. `read_stage` is the weight stage of the last group; -1 if the tile has none yet.
    __device__ __forceinline__ void multiply_taps(
        unsigned inputs, int step, int lane, const PipelineState<kInputStages>& input,
        PipelineState<kWeightStages>& weight, int& read_stage, Sums& sums) const {
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
            mbarrier_wait(weight_full + 8 * weight.stage, weight.parity);
            multiply_tap(inputs, weight_memory + weight.stage * Config::kWeightStage, step, tap, sums);
            if (lane == 0 && read_stage >= 0) {
                mbarrier_arrive(weight_empty + 8 * read_stage);
                if (tap == 0) {
                    release_inputs(input);
                }
            }
            read_stage = weight.stage;
            weight.advance();
        }
    }

    __device__ __forceinline__ void multiply_tap(
        unsigned inputs, unsigned weights, int step, int tap, Sums& sums) const {
        const int shift = tap / 3 * kHaloSide + tap % 3;
        const uint64_t a = matrix_descriptor(inputs + shift * kRowBytes, 16, kHaloSide * kRowBytes);
        const uint64_t b = matrix_descriptor(weights, kWeightBytes, 8 * kRowBytes);
        run_product_group(sums, [&] {
        // Sixteen channels are 32 bytes of a pixel, and 16 rows of weights.
#pragma unroll
            for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
                for (int i = 0; i < kWarpgroupSubTiles; ++i) {
                    Wgmma<Config::kOutputs>::multiply(
                        sums[i], a + (i * kHaloStride + k * 32) / 16, b + k * 16 * kRowBytes / 16,
                        (step | tap | k) != 0, scalar_t{});
                }
            }
        });
    }

    // Row warp * 16 + half * 8 + lane / 4 of a sub-tile's sums is pixel (warp * 2 + half, lane / 4).
    __device__ __forceinline__ void store_sub_tile(
        const Sm90Convolution& convolution, const SubTile& sub_tile, int first_output, int warp, int lane,
        const float (&bias)[kBlocks][8], const WgmmaSums<Config::kOutputs / 2>& sums) const {
        const bool relu = convolution.relu, vectorized = convolution.vectorized;
        const Sm90Level<scalar_t>& level = table.levels[sub_tile.level];
        const bool active = is_active(sub_tile.map.image);  // a tile with an active image may also have inactive ones
        const int x = sub_tile.map.x + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int y = sub_tile.map.y + warp * 2 + half;
            const bool inside = y < level.height && x < level.width;
            const int64_t pixel = (static_cast<int64_t>(sub_tile.map.image) * level.height + y) * level.width + x;
            const int64_t offset = pixel * convolution.outputs + first_output;
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const int count = inside ? convolution.outputs - first_output - block * 32 : 0;
                Vec<scalar_t, 8> residual{};
                if (level.residual) {
                    residual = load_present(level.residual + (offset + block * 32), vectorized, count);
                }
                Vec<unsigned, 4> words;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int element = (block * 4 + i) * 4 + half * 2;
                    words[i] = pack_pair(
                        sums[element] + bias[block][2 * i] + load(residual[2 * i]),
                        sums[element + 1] + bias[block][2 * i + 1] + load(residual[2 * i + 1]), scalar_t{});
                    words[i] = relu ? rectify_pairs(words[i], scalar_t{}) : words[i];
                    words[i] = active ? words[i] : 0;
                }
                store_present(level.out + (offset + block * 32), vectorized, count, words);
            }
        }
    }
};

#endif

// The kernel is empty for architectures other than 9.0a. The host queries its static shared memory to detect this.
template <typename scalar_t, int kTileOutputs, int kTileSubTiles>
__global__ void __launch_bounds__(kThreads, 1) conv3x3_sm90_kernel(const __grid_constant__ Sm90Table<scalar_t> table) {
#if SPATIALFLOW_HAS_SM90
    using Block = Sm90Conv3x3Block<scalar_t, Sm90Conv3x3Config<kTileOutputs, kTileSubTiles>>;
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, Block::kBarriers);
    SPATIALFLOW_SHARED(unsigned, skipped, kSkippedWords);
    const Block block(table, memory, barriers, skipped);
    if (threadIdx.x == 0) {
        block.init_barriers();
    }
    __syncthreads();
    if (table.active) {
        block.skip_inactive_tiles();
    }

    // Shuffles tell the compiler that all lanes of a warp have the same values.
    const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) % 128 / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if (warpgroup == 0) {
        decrease_registers<72>();
        if (warp == 0 && lane == 0) {
            block.load_inputs();
        } else if (warp == 1 && lane == 0) {
            block.load_weights();
        } else if (warp >= 2) {
            block.add_flows(warp - 2, lane);
        }
        return;
    }
    increase_registers<216>();
    block.multiply((warpgroup - 1) * Block::kWarpgroupSubTiles, warp, lane);
#endif
}

}  // namespace
}  // namespace spatialflow
