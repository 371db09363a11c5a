// SPDX-License-Identifier: Apache-2.0
//
// The forward pass of deform_conv2d.cu in 16-bit types on compute capability 9.0a, by TMA and wgmma.
//
// A block computes 64 or 128 pixels by 128 or 256 outputs; a step of the sum is 64 channels of a tap, in the order of
// the packed weight. Eight warps gather columns, (pixels, 64 channels) with 128-byte swizzle, and one of their threads
// loads weights, (64 channels, outputs), by TMA. One or two warpgroups multiply, 64 pixels each. The cells of the next
// step are on their way to registers while those of this one are blended in float32 and rounded once.
// Few pixels: blocks share the steps of a tile, each writes a part in float32, and deform_conv2d.cu adds them.
//
// Floor (H100, 790 TFLOP/s bf16), 256 to 256 channels on 100 x 168: 19.8 GFLOP: 25 us. Shared memory and L1, 128 bytes
// a cycle, bound a step of 128 pixels to 1700 cycles: operands 96 KB, cells 64 KB, weights 32 KB, columns 16 KB: 35 us.
// Operands would be 80 KB if one instruction had all 256 outputs. ptxas wants 154 registers for it, and 512 threads
// start with 128.
#include "cuda/sm90_deform_conv2d.h"

#include <algorithm>

#include "cuda/sm90_instructions.h"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {
namespace {

constexpr int kStepChannels = 64;
constexpr int kRowBytes = kStepChannels * 2;             // of a pixel, and of 64 outputs of a channel
constexpr int kWeightBytes = kStepChannels * kRowBytes;  // of 64 outputs
constexpr int kProducers = 256;
constexpr int kSharedLimit = 227 * 1024;  // of a block, static memory included

// Consumers are warpgroups of 64 pixels each.
template <int kOutputs, int kConsumers>
struct Sm90Deform {
    static constexpr int kPixels = 64 * kConsumers, kThreads = kProducers + 128 * kConsumers;
    static constexpr int kStages = 5 - kConsumers;  // more would take L1 from the cells
    static constexpr int kColumnStage = kPixels * kRowBytes, kWeightStage = kOutputs / 64 * kWeightBytes;
    static constexpr int kStage = kColumnStage + kWeightStage;
    using Table = TapTable<float, kTableTaps * kPixels>;
    static constexpr size_t kTableBytes = Table::kSize * sizeof(float);
    static constexpr size_t kSharedBytes = kStages * kStage + kTableBytes + 1024;  // to begin at a multiple of 1024
    static_assert(kSharedBytes + 4096 <= kSharedLimit, "dynamic and static shared memory of a block");
};

// ---- device ------------------------------------------------------------------------------------------------------

// Empty but for 9.0a. The host asks for the static shared memory to learn whether there is a kernel.
template <typename scalar_t, int kOutputs, int kConsumers>
__global__ void __launch_bounds__(Sm90Deform<kOutputs, kConsumers>::kThreads, 1) deform_conv2d_sm90_kernel(
    const __grid_constant__ DeformProblem<scalar_t> problem,
    const __grid_constant__ TensorMap weights,  // boxes of 64 channels by 64 outputs
    Global<const scalar_t> bias,                // (O) or null
    Global<scalar_t> output,                    // (pixels, O); not written if there are parts
    Global<float> parts,                        // (parts, pixels, O) or null
    const int steps, const int part_steps) {
#if SPATIALFLOW_HAS_SM90
    using Size = Sm90Deform<kOutputs, kConsumers>;
    constexpr int kStages = Size::kStages, kPixels = Size::kPixels, kHalves = kOutputs / 128;
    constexpr bool kTight = kOutputs == 256 && kConsumers == 2;  // in registers: sums take 128 of a consumer's
    SPATIALFLOW_DYNAMIC_SHARED(unsigned char, memory);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * kStages);
    SPATIALFLOW_SHARED(float, biases, kOutputs);
    SPATIALFLOW_SHARED(int, pixels, kPixels);
    const unsigned begin = (shared_address(memory) + 1023) / 1024 * 1024;
    const Shared<unsigned char> stages = memory + (begin - shared_address(memory));
    const typename Size::Table table(pointer_cast<float>(stages + kStages * Size::kStage));
    // Stages are ready for wgmma, or free.
    const unsigned full = shared_address(barriers), empty = full + 8 * kStages;
    const int first_output = static_cast<int>(blockIdx.y) * kOutputs;
    const int first = static_cast<int>(blockIdx.z) * part_steps;
    const int end = first + part_steps < steps ? first + part_steps : steps;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
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

    // The compiler must see that all lanes of a warp agree on these.
    const int warpgroup = __shfl_sync(kAllLanes, thread / 128, 0), warp = __shfl_sync(kAllLanes, thread / kWarpSize, 0);
    if (warpgroup < kProducers / 128) {
        give_registers<kTight ? 96 : 120>();
        constexpr int kItemChannels = kWideElements<scalar_t>, kRowItems = kStepChannels / kItemChannels;
        constexpr int kItemRows = kProducers / kRowItems, kItems = kPixels / kItemRows;  // of a thread and step
        const int own_row = thread / kRowItems, own_channel = thread % kRowItems * kItemChannels;
        // A row of columns is 128 bytes, and rows are eight further apart: the swizzle is the same for all of them.
        const Shared<unsigned char> own_target = stages + own_row * kRowBytes + (thread % kRowItems ^ own_row % 8) * 16;
        const int group_steps = problem.offset_group_channels / kStepChannels * problem.taps;
        int stage = 0;
        unsigned parity = 1;
        for (int step = first; step < end;) {
            const int group = step / group_steps, tap = step % problem.taps;
            const int group_end = (group + 1) * group_steps, last = group_end < end ? group_end : end;
            // A table of the taps that are needed: those from `tap` on if they are of the same channels, else all.
            const bool adjacent = tap + last - step <= problem.taps;
            const int first_tap = adjacent ? tap : 0, slots = adjacent ? last - step : problem.taps;
            named_barrier<1, kProducers>();
            table.template fill_tile<kPixels, kProducers>(
                problem, group, first_tap, slots, [&](int position) -> int { return pixels[position]; });
            named_barrier<1, kProducers>();
            int channel = step / problem.taps * kStepChannels + own_channel, slot = tap - first_tap;
            ColumnItem<scalar_t, kItemChannels> items[kItems];
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                items[i].begin(problem, table, channel, slot * kPixels + own_row + i * kItemRows, true);
            }
#pragma unroll 1
            for (; step < last; ++step) {
                if (++slot == slots) {
                    slot = 0;
                    channel += kStepChannels;
                }
                mbarrier_wait(empty + 8 * stage, parity);
                if (thread == 0) {
                    mbarrier_expect(full + 8 * stage, Size::kWeightStage);
#pragma unroll
                    for (int i = 0; i < kOutputs / 64; ++i) {
                        tma_load_3d(
                            begin + stage * Size::kStage + Size::kColumnStage + i * kWeightBytes, &weights,
                            first_output + i * 64, 0, step, full + 8 * stage);
                    }
                }
                const bool more = step + 1 < last;
#pragma unroll
                for (int i = 0; i < kItems; ++i) {
                    store_vector(
                        pointer_cast<scalar_t>(own_target + stage * Size::kStage + i * kItemRows * kRowBytes),
                        items[i].finish(table));
                    items[i].begin(
                        problem, table, more ? channel : own_channel,
                        (more ? slot : 0) * kPixels + own_row + i * kItemRows, more);
                    __syncwarp();  // or ptxas has the loads wait for the other items
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) {
                    mbarrier_arrive(full + 8 * stage);
                }
                if (++stage == kStages) {
                    stage = 0;
                    parity ^= 1;
                }
            }
        }
        return;
    }

    take_registers<kTight ? 160 : kConsumers == 2 ? 136 : 232>();  // what producers leave
    const int consumer = warpgroup - kProducers / 128;
    WgmmaSums<64> sums[kHalves] = {};
    const auto pin_sums = [&]() {
#pragma unroll
        for (int i = 0; i < kHalves; ++i) {
            pin(sums[i]);
        }
    };
    int stage = 0, read_stage = -1;  // a stage that the products before the running ones have read
    unsigned parity = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
        mbarrier_wait(full + 8 * stage, parity);
        const unsigned columns = begin + stage * Size::kStage;
        const uint64_t a = matrix_descriptor(columns + consumer * 64 * kRowBytes, 16, 8 * kRowBytes);
        const uint64_t b = matrix_descriptor(columns + Size::kColumnStage, kWeightBytes, 8 * kRowBytes);
        pin_sums();
        wgmma_fence();
        // Sixteen channels are 32 bytes of a pixel, and 16 rows of weights.
#pragma unroll
        for (int k = 0; k < kStepChannels / 16; ++k) {
#pragma unroll
            for (int i = 0; i < kHalves; ++i) {
                Wgmma<128>::multiply(
                    sums[i], a + k * 32 / 16, b + (k * 16 * kRowBytes + i * 2 * kWeightBytes) / 16,
                    step != first || k != 0, scalar_t{});
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        pin_sums();
        if (lane == 0 && read_stage >= 0) {
            mbarrier_arrive(empty + 8 * read_stage);
        }
        read_stage = stage;
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
    wgmma_wait<0>();
    pin_sums();

    // Of eight outputs, a lane has two: lane % 4 says which.
    const int pair = lane % 4, first_row = consumer * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int pixel = pixels[first_row + half * 8];
        const bool present = pixel < problem.pixels;
        if (parts) {
            const Global<float> target =
                parts + (static_cast<int64_t>(blockIdx.z) * problem.pixels + pixel) * problem.out_channels +
                first_output + pair * 2;
#pragma unroll
            for (int j = 0; j < kOutputs / 8; ++j) {
                if (present && first_output + j * 8 < problem.out_channels) {
                    const int at = j % 16 * 4 + half * 2;
                    store_vector(target + j * 8, Vec<float, 2>{{sums[j / 16][at], sums[j / 16][at + 1]}});
                }
            }
            continue;
        }
        // Neighbours exchange, so that each lane has four adjacent outputs of one of two groups of eight.
        const bool odd = pair % 2 != 0;
        const int own = odd * 8 + pair / 2 * 4;
        const Global<scalar_t> target =
            output + static_cast<int64_t>(pixel) * problem.out_channels + first_output + own;
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
            const unsigned other = __shfl_xor_sync(kAllLanes, odd ? words[0] : words[1], 1);
            const Vec<unsigned, 2> result = {{odd ? other : words[0], odd ? words[1] : other}};
            if (present && first_output + j * 8 + odd * 8 < problem.out_channels) {
                store_vector(pointer_cast<unsigned>(target + j * 8), result);
            }
        }
    }
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
    // The number of parts depends on shapes alone, so results do not depend on the card.
    constexpr int64_t kWantedBlocks = 132, kLeastSteps = 4;
    const bool wide = problem.out_channels > 128;
    const int64_t tiles = ceil_div(problem.pixels, 64), beside = ceil_div(problem.out_channels, wide ? 256 : 128);
    const bool small = tiles * beside <= kWantedBlocks;
    const int64_t wanted =
        small ? std::max<int64_t>(1, std::min(kWantedBlocks / (tiles * beside), steps / kLeastSteps)) : 1;
    const int64_t part_steps = ceil_div(steps, wanted), num_parts = ceil_div(steps, part_steps);
    if (num_parts > 1) {
        parts = empty_like_sized(output, {num_parts, output.numel()}, ScalarType::Float);
    }
    const auto launch_tiles = [&](auto outputs, auto consumers) {
        constexpr int kOutputs = decltype(outputs)::value, kConsumers = decltype(consumers)::value;
        using Size = Sm90Deform<kOutputs, kConsumers>;
        launch<deform_conv2d_sm90_kernel<scalar_t, kOutputs, kConsumers>>(
            deform_grid(op, ceil_div(problem.pixels, Size::kPixels), beside, num_parts), dim3(Size::kThreads),
            Size::kSharedBytes, stream, problem, weights,
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
    if (wide) {
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
