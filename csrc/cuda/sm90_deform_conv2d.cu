// SPDX-License-Identifier: Apache-2.0
//
// Forward pass of deform_conv2d.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A block computes 64 or 128 pixels by 128 or 256 outputs; a step of the sum is 64 channels of a tap, in the order of
// the packed weight. Eight warps gather columns, (pixels, 64 channels) with 128-byte swizzle. One of their threads
// loads weights, (64 channels, outputs), by TMA. One or two warpgroups multiply, 64 pixels each. Cells of the next step
// are loaded into registers while those of this step are interpolated in float32 and rounded once. For few pixels,
// blocks split the steps of a tile, write partial sums in float32, and deform_conv2d.cu adds them. 256 outputs are
// computed by two instructions of 128 outputs. One instruction of 256 outputs needs 154 registers per thread, and a
// block of 512 threads starts with 128 registers per thread.
#include "cuda/sm90_deform_conv2d.h"

#include <algorithm>

#include "cuda/sm90_pipeline.cuh"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

constexpr int kStepChannels = 64;
constexpr int kRowBytes = kStepChannels * 2;             // 64 channels of a pixel, or 64 outputs of a channel
constexpr int kWeightBytes = kStepChannels * kRowBytes;  // 64 channels by 64 outputs of a tap
constexpr int kProducers = 256;                          // threads
constexpr int kSharedLimit = 227 * 1024;                 // of a block, static memory included

// Sizes of the kernel. A consumer is a warpgroup that multiplies 64 pixels.
template <int kOutputs, int kConsumers>
struct Sm90DeformConfig {
    static constexpr int kPixels = 64 * kConsumers, kThreads = kProducers + 128 * kConsumers;
    static constexpr int kStages = 5 - kConsumers;  // more stages would leave too little L1 cache for the cells
    static constexpr int kColumnStage = kPixels * kRowBytes, kWeightStage = kOutputs / 64 * kWeightBytes;
    static constexpr int kStage = kColumnStage + kWeightStage;
    using Table = TapTable<float, kTableTaps * kPixels>;
    static constexpr size_t kTableBytes = Table::kSize * sizeof(float);
    static constexpr size_t kSharedBytes =
        kStages * kStage + kTableBytes + 1024;  // the first stage starts at a multiple of 1024
    static_assert(kSharedBytes + 4096 <= kSharedLimit, "dynamic and static shared memory of a block must fit");
};

// ---- device ------------------------------------------------------------------------------------------------------

#if SPATIALFLOW_HAS_SM90

// Block of the kernel: its tile, its shared memory, and the roles of its warps.
template <typename scalar_t, int kOutputs, int kConsumers>
struct Sm90DeformBlock {
    using Config = Sm90DeformConfig<kOutputs, kConsumers>;
    static constexpr int kStages = Config::kStages, kPixels = Config::kPixels, kHalves = kOutputs / 128;
    // A thread gathers kItems items of 16 bytes per step, in rows at a distance of kItemRows.
    static constexpr int kItemChannels = kVectorElements<scalar_t>, kRowItems = kStepChannels / kItemChannels;
    static constexpr int kItemRows = kProducers / kRowItems, kItems = kPixels / kItemRows;
    using Sums = WgmmaSums<64>[kHalves];

    const DeformProblem<scalar_t>& problem;
    const TensorMap& weights;
    Shared<int> pixels;    // (kPixels), output pixels of the tile
    Shared<float> biases;  // (kOutputs)
    unsigned begin;        // address of the first stage
    unsigned full, empty;  // addresses of the mbarriers for stages that are ready for wgmma, and for free stages
    Shared<unsigned char> stages;
    typename Config::Table table;
    int first_output, thread, lane;

    __device__ __forceinline__ Sm90DeformBlock(
        const DeformProblem<scalar_t>& problem, const TensorMap& weights, const Shared<unsigned char>& memory,
        const Shared<uint64_t>& barriers, const Shared<int>& pixels, const Shared<float>& biases)
        : problem(problem),
          weights(weights),
          pixels(pixels),
          biases(biases),
          begin((shared_address(memory) + 1023) / 1024 * 1024),
          full(shared_address(barriers)),
          empty(full + 8 * kStages),
          stages(memory + (begin - shared_address(memory))),
          table(pointer_cast<float>(stages + kStages * Config::kStage)),
          first_output(static_cast<int>(blockIdx.y) * kOutputs),
          thread(static_cast<int>(threadIdx.x)),
          lane(thread % kWarpSize) {}

    // Initialize mbarriers, pixels and biases, and synchronize the block.
    __device__ __forceinline__ void init(Global<const scalar_t> bias) const {
        if (thread == 0) {
            for (int i = 0; i < kStages; ++i) {
                mbarrier_init(full + 8 * i, kProducers / kWarpSize + 1);
                mbarrier_init(empty + 8 * i, 4 * kConsumers);
            }
            mbarrier_init_fence();
        }
        if (thread < kPixels) {
            const int index = static_cast<int>(blockIdx.x) * kPixels + thread;
            pixels[thread] = index < problem.pixels ? tiled_pixel(problem, index) : problem.pixels;
        }
        if (thread < kOutputs) {
            float value = 0;
            if (bias && first_output + thread < problem.out_channels) {
                value = load(bias[first_output + thread]);
            }
            biases[thread] = value;
        }
        __syncthreads();
    }

    // ---- producers: eight warps ------------------------------------------------------------------------------------

    // Gather the columns of the steps [first, end), and load their weights.
    __device__ __forceinline__ void produce(int first, int end) const {
        const int thread_row = thread / kRowItems, thread_channel = thread % kRowItems * kItemChannels;
        // A row of columns has 128 bytes, and the rows of a thread differ by multiples of eight. So they all have the
        // same swizzle.
        const Shared<unsigned char> thread_target =
            stages + thread_row * kRowBytes + (thread % kRowItems ^ thread_row % 8) * 16;
        const int group_steps = problem.offset_group_channels / kStepChannels * problem.taps;
        PipelineState<kStages> state(1);
        for (int step = first; step < end;) {
            const int group = step / group_steps, tap = step % problem.taps;
            const int group_end = (group + 1) * group_steps, last = group_end < end ? group_end : end;
            // Fill the table with the taps of the next steps: from `tap` on if these steps are in one chunk of
            // channels, else all taps.
            const bool adjacent = tap + last - step <= problem.taps;
            const int first_tap = adjacent ? tap : 0, slots = adjacent ? last - step : problem.taps;
            named_barrier<1, kProducers>();
            table.template fill_tile<kPixels, kProducers>(
                problem, group, first_tap, slots, [&](int position) -> int { return pixels[position]; });
            named_barrier<1, kProducers>();
            int channel = step / problem.taps * kStepChannels + thread_channel, slot = tap - first_tap;
            ColumnItem<scalar_t, kItemChannels> items[kItems];
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                items[i].begin(problem, table, channel, slot * kPixels + thread_row + i * kItemRows, true);
            }
#pragma unroll 1
            for (; step < last; ++step) {
                if (++slot == slots) {
                    slot = 0;
                    channel += kStepChannels;
                }
                mbarrier_wait(empty + 8 * state.stage, state.parity);
                if (thread == 0) {
                    load_weights(step, state.stage);
                }
                const bool more = step + 1 < last;
#pragma unroll
                for (int i = 0; i < kItems; ++i) {
                    store_vector(
                        pointer_cast<scalar_t>(
                            thread_target + state.stage * Config::kStage + i * kItemRows * kRowBytes),
                        items[i].finish(table));
                    items[i].begin(
                        problem, table, more ? channel : thread_channel,
                        (more ? slot : 0) * kPixels + thread_row + i * kItemRows, more);
                    __syncwarp();  // otherwise ptxas delays the loads until the other items are done
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) {
                    mbarrier_arrive(full + 8 * state.stage);
                }
                state.advance();
            }
        }
    }

    // Start the copies of a step's weights; called by one thread.
    __device__ __forceinline__ void load_weights(int step, int stage) const {
        mbarrier_expect(full + 8 * stage, Config::kWeightStage);
#pragma unroll
        for (int i = 0; i < kOutputs / 64; ++i) {
            tma_load_3d(
                begin + stage * Config::kStage + Config::kColumnStage + i * kWeightBytes, &weights,
                first_output + i * 64, 0, step, full + 8 * stage);
        }
    }

    // ---- consumers: one or two warpgroups --------------------------------------------------------------------------

    // Multiply the steps [first, end) for the 64 pixels of a warpgroup.
    __device__ __forceinline__ void multiply(int first, int end, int consumer, Sums& sums) const {
        PipelineState<kStages> state(0);
        int read_stage = -1;  // the stage that the previous group of products has read
#pragma unroll 1
        for (int step = first; step < end; ++step) {
            mbarrier_wait(full + 8 * state.stage, state.parity);
            const unsigned columns = begin + state.stage * Config::kStage;
            const uint64_t a = matrix_descriptor(columns + consumer * 64 * kRowBytes, 16, 8 * kRowBytes);
            const uint64_t b = matrix_descriptor(columns + Config::kColumnStage, kWeightBytes, 8 * kRowBytes);
            multiply_step(a, b, step != first, sums);
            if (lane == 0 && read_stage >= 0) {
                mbarrier_arrive(empty + 8 * read_stage);
            }
            read_stage = state.stage;
            state.advance();
        }
        finish_products(sums);
    }

    // Start the products of a step: add them to the sums, or replace the sums.
    __device__ __forceinline__ void multiply_step(uint64_t a, uint64_t b, bool add, Sums& sums) const {
        run_product_group(sums, [&] {
        // Sixteen channels are 32 bytes of a pixel, and 16 rows of weights.
#pragma unroll
            for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
                for (int i = 0; i < kHalves; ++i) {
                    Wgmma<128>::multiply(
                        sums[i], a + k * 32 / 16, b + (k * 16 * kRowBytes + i * 2 * kWeightBytes) / 16, add || k != 0,
                        scalar_t{});
                }
            }
        });
    }

    // Store the results of a warpgroup. A lane has two of the 64 pixels, those in rows first_row and first_row + 8 of
    // the tile. Of every eight outputs, it has outputs pair * 2 and pair * 2 + 1.
    __device__ __forceinline__ void store(
        const Sums& sums, int first_row, int pair, const Global<scalar_t>& output, const Global<float>& parts) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pixel = pixels[first_row + half * 8];
            if (parts) {
                store_part(sums, half, pixel, pair, parts);
            } else {
                store_outputs(sums, half, pixel, pair, output);
            }
        }
    }

    // Store partial sums of a pixel, without bias.
    __device__ __forceinline__ void store_part(
        const Sums& sums, int half, int pixel, int pair, const Global<float>& parts) const {
        // Number of outputs from first_output on.
        const int count = pixel < problem.pixels ? problem.out_channels - first_output : 0;
        const Global<float> target =
            parts + (static_cast<int64_t>(blockIdx.z) * problem.pixels + pixel) * problem.out_channels + first_output +
            pair * 2;
#pragma unroll
        for (int j = 0; j < kOutputs / 8; ++j) {
            if (j * 8 < count) {
                const int at = j % 16 * 4 + half * 2;
                store_vector(target + j * 8, Vec<float, 2>{{sums[j / 16][at], sums[j / 16][at + 1]}});
            }
        }
    }

    // Add the bias to the sums of a pixel, apply ReLU, and store the outputs. Adjacent lanes exchange words: each then
    // has four adjacent outputs of one of two groups of eight.
    __device__ __forceinline__ void store_outputs(
        const Sums& sums, int half, int pixel, int pair, const Global<scalar_t>& output) const {
        const bool odd = pair % 2 != 0;
        const int count = pixel < problem.pixels ? problem.out_channels - first_output - odd * 8 : 0;
        const int lane_output = odd * 8 + pair / 2 * 4;
        const Global<scalar_t> target =
            output + static_cast<int64_t>(pixel) * problem.out_channels + first_output + lane_output;
#pragma unroll
        for (int j = 0; j < kOutputs / 8; j += 2) {
            unsigned words[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const auto offsets = load_vector<2>(biases + ((j + i) * 8 + pair * 2));
                const int at = (j + i) % 16 * 4 + half * 2;
                words[i] = pack_pair(sums[j / 16][at] + offsets[0], sums[j / 16][at + 1] + offsets[1], scalar_t{});
                words[i] = problem.relu ? rectify_pairs(words[i], scalar_t{}) : words[i];
            }
            const unsigned exchanged = __shfl_xor_sync(kAllLanes, odd ? words[0] : words[1], 1);
            const Vec<unsigned, 2> result = {{odd ? exchanged : words[0], odd ? words[1] : exchanged}};
            if (j * 8 < count) {
                store_vector(pointer_cast<unsigned>(target + j * 8), result);
            }
        }
    }
};

#endif

// The kernel is empty for architectures other than 9.0a. The host queries its static shared memory to detect this.
template <typename scalar_t, int kOutputs, int kConsumers>
__global__ void __launch_bounds__(Sm90DeformConfig<kOutputs, kConsumers>::kThreads, 1) deform_conv2d_sm90_kernel(
    const __grid_constant__ DeformProblem<scalar_t> problem,
    const __grid_constant__ TensorMap weights,  // boxes of 64 channels by 64 outputs
    Global<const scalar_t> bias,                // (O) or null
    Global<scalar_t> output,                    // (pixels, O); not written if `parts` is given
    Global<float> parts,                        // (parts, pixels, O) or null
    const int steps, const int part_steps) {
#if SPATIALFLOW_HAS_SM90
    using Block = Sm90DeformBlock<scalar_t, kOutputs, kConsumers>;
    constexpr bool kLimitedRegisters = kOutputs == 256 && kConsumers == 2;  // a consumer thread has 128 sums
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * Block::kStages);
    SPATIALFLOW_SHARED(float, biases, kOutputs);
    SPATIALFLOW_SHARED(int, pixels, Block::kPixels);
    const Block block(problem, weights, memory, barriers, pixels, biases);
    const int first = static_cast<int>(blockIdx.z) * part_steps;
    const int end = first + part_steps < steps ? first + part_steps : steps;
    block.init(bias);

    // Shuffles tell the compiler that all lanes of a warp have the same values.
    const int warpgroup = __shfl_sync(kAllLanes, block.thread / 128, 0);
    const int warp = __shfl_sync(kAllLanes, block.thread / kWarpSize, 0);
    if (warpgroup < kProducers / 128) {
        decrease_registers<kLimitedRegisters ? 96 : 120>();
        block.produce(first, end);
        return;
    }
    // With two consumers, these are all the registers that are left.
    increase_registers<kLimitedRegisters ? 160 : kConsumers == 2 ? 136 : 232>();
    const int consumer = warpgroup - kProducers / 128;
    typename Block::Sums sums = {};
    block.multiply(first, end, consumer, sums);
    const int pair = block.lane % 4, first_row = consumer * 64 + warp % 4 * 16 + block.lane / 4;
    block.store(sums, first_row, pair, output, parts);
#endif
}

}  // namespace

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
bool deform_conv2d_sm90(
    const char* op, const DeformProblem<scalar_t>& problem, const Tensor& packed, const std::optional<Tensor>& bias,
    const Tensor& output, std::optional<Tensor>& parts, Stream stream) {
    if (problem.groups != 1 || problem.chunk != kStepChannels || problem.channels == 0 || problem.taps > kTableTaps ||
        problem.out_channels <= 64 || problem.out_channels % 8 != 0 || !is_aligned(problem.input, 16) ||
        !runs_sm90<&deform_conv2d_sm90_kernel<scalar_t, 128, 1>>(stream)) {
        return false;
    }
    bind_context(stream);
    const int64_t steps = static_cast<int64_t>(problem.channels) / kStepChannels * problem.taps;
    const int64_t row = problem.packed_outputs;
    TensorMap weights;
    if (!encode_map<scalar_t, 3>(
            weights, data<scalar_t>(packed), {row, kStepChannels, steps}, {row, kStepChannels * row},
            {64, kStepChannels, 1})) {
        return false;
    }
    // The number of parts depends on shapes only, so results do not depend on the device.
    constexpr int64_t kWantedBlocks = 132, kMinSteps = 4;
    const bool outputs_256 = problem.out_channels > 128;
    const int64_t tiles = ceil_div(problem.pixels, 64),
                  output_tiles = ceil_div(problem.out_channels, outputs_256 ? 256 : 128);
    const bool small = tiles * output_tiles <= kWantedBlocks;
    const int64_t wanted =
        small ? std::max<int64_t>(1, std::min(kWantedBlocks / (tiles * output_tiles), steps / kMinSteps)) : 1;
    const int64_t part_steps = ceil_div(steps, wanted), num_parts = ceil_div(steps, part_steps);
    if (num_parts > 1) {
        parts = empty_like_sized(output, {num_parts, output.numel()}, ScalarType::Float);
    }
    const auto launch_tiles = [&](auto outputs, auto consumers) {
        constexpr int kOutputs = decltype(outputs)::value, kConsumers = decltype(consumers)::value;
        using Config = Sm90DeformConfig<kOutputs, kConsumers>;
        launch<deform_conv2d_sm90_kernel<scalar_t, kOutputs, kConsumers>>(
            deform_grid(op, ceil_div(problem.pixels, Config::kPixels), output_tiles, num_parts), dim3(Config::kThreads),
            Config::kSharedBytes, stream, problem, weights,
            bias ? data<scalar_t>(*bias) : Global<const scalar_t>(nullptr), mutable_data<scalar_t>(output),
            parts ? mutable_data<float>(*parts) : Global<float>(nullptr), static_cast<int>(steps),
            static_cast<int>(part_steps));
    };
    const auto launch_outputs = [&](auto outputs) {
        if (small) {
            launch_tiles(outputs, std::integral_constant<int, 1>{});
        } else {
            launch_tiles(outputs, std::integral_constant<int, 2>{});
        }
    };
    if (outputs_256) {
        launch_outputs(std::integral_constant<int, 256>{});
    } else {
        launch_outputs(std::integral_constant<int, 128>{});
    }
    return true;
}

#define SPATIALFLOW_INSTANTIATE(scalar_t)                                                                        \
    template bool deform_conv2d_sm90<scalar_t>(                                                                  \
        const char*, const DeformProblem<scalar_t>&, const Tensor&, const std::optional<Tensor>&, const Tensor&, \
        std::optional<Tensor>&, Stream);
SPATIALFLOW_INSTANTIATE(float16)
SPATIALFLOW_INSTANTIATE(bfloat16)
#undef SPATIALFLOW_INSTANTIATE

}  // namespace spatialflow
