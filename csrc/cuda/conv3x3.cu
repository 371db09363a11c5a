// SPDX-License-Identifier: Apache-2.0
//
// Many 3x3 convolutions over all levels of their pyramids in one launch, on CUDA.
//
//   out[p, o] = relu?(sum over taps t, channels c of (x + flow)[p + t, c] * weights[t, c, o] + bias[o]
//                     + residual[p, o])
//
// An implicit GEMM: rows are pixels, columns output channels, and the sum runs over 9 C. Sources (N, H, W, C) by
// strides, channels adjacent; weights (9, C, O padded to 32); out and residual (N, H, W, O). A table in the kernel's
// parameters holds one entry per convolution and level, largest maps first, so that small levels fill the tail. Blocks
// stay: each takes every gridDim.x-th tile. Those of images that are not active are left out, and filled with zeros
// before a block's first tile. No atomics, results depend on the inputs alone.
//
//   16-bit types   8 x 16 pixels by 128 or 64 outputs per block of 4 warps, by mma.sync with float32 sums
//                  (conv3x3_tensor_core.h). A step over 32 channels brings the tile and its halo into shared memory
//                  once, as x + flow, for all nine taps: ldmatrix takes the rows of a tap wherever they lie, and a row
//                  serves the three taps of a column from registers. Meanwhile the next step's inputs come in through
//                  registers and the next weights by cp.async, on across tiles: only a block's first step waits.
//   float32        the same kernel by m16n8k8 of TF32, a step of 16 channels, weights on the left side; or three such
//                  products (Tf32x3 in tensor_core.h), tiles of 64 outputs. For "direct", as float64:
//   float64        8 x 8 pixels by 64 outputs per block of 256 threads, 16 channels of a tap a step, 4 x 4 sums a
//                  thread by fused multiply-adds; the next step is fetched into registers meanwhile.
//
// x + flow and the weights are rounded to the 16-bit type, as tensor cores read it. On compute capability 9.0a, 16-bit
// convolutions of whole steps of 64 channels run in sm90_conv3x3.cu.
//
// Floor (H100, 790 TFLOP/s bf16, 3.0 TB/s) of 256 -> 256 channels on P3..P7 of 800 x 1333: 26 GFLOP: 33 us; x, flow and
// out 34 MB: 11 us. Expected: mma.sync gives about 60 % of that rate, and rectangles cover 15 % more pixels than there
// are: 65 us. Beside it weights cross L2 once per tile: 0.24 GB, 45 us at 5.5 TB/s. In TF32, at half that rate: 66 us;
// by three products 200 us; by multiply-adds at 50 TFLOP/s 520 us.
#include <algorithm>

#include "cuda/conv3x3_tensor_core.h"
#include "cuda/sm90_conv3x3.h"

namespace spatialflow {
namespace {

constexpr int kMaxTiles = 1 << 30;  // a tile beyond the last one is still an int

// ---- device ------------------------------------------------------------------------------------------------------

// Sizes of the kernel for float32 and float64.
struct Plain {
    static constexpr int kThreads = 256;
    static constexpr int kSide = 8, kPixels = kSide * kSide, kOutputs = 64;
    static constexpr int kHeight = kSide, kWidth = kSide;
    static constexpr size_t kSharedBytes = 0;
    static constexpr int kChannels = 16;  // of a step
    static constexpr int kGroup = 4;      // of them multiplied in one go
    static constexpr int kInputRow = kPixels + 4;
};

template <typename scalar_t, int kAccess>
__global__ void __launch_bounds__(Plain::kThreads, 2)
    conv3x3_kernel(const __grid_constant__ ConvTable<scalar_t> table) {
    constexpr int kPart = kWideElements<scalar_t>;
    SPATIALFLOW_SHARED(scalar_t, input_tile, Plain::kChannels * Plain::kInputRow);  // [channel][pixel]
    SPATIALFLOW_SHARED(scalar_t, weight_tile, Plain::kChannels * Plain::kOutputs);  // [channel][output]
    SPATIALFLOW_SHARED(unsigned, left_out, kNotedWords);
    const int thread = static_cast<int>(threadIdx.x);
    const int own_row = thread / 16 * 4, own_column = thread % 16 * 4;
    const int input_row = thread / 4, input_channel = thread % 4 * 4;
    const int weight_channel = thread / 16, weight_output = thread % 16 * 4;
    if (table.active) {
        leave_out_images<Plain>(table, left_out);
    }
    for (int tile = static_cast<int>(blockIdx.x); tile < table.num_tiles; tile += static_cast<int>(gridDim.x)) {
        if (table.active && is_noted(left_out, tile)) {
            continue;
        }
        const ConvTile place = conv_tile<Plain::kOutputs>(table, tile);
        const MapTile map = map_of<Plain::kSide, Plain::kSide>(table, place);
        const ConvJob<scalar_t>& job = table.jobs[place.job];
        const int channels = job.source.channels, row_size = padded_outputs(job.outputs);
        Vec<scalar_t, 4> inputs;
        scalar_t weights[4];
        const auto fetch = [&](int tap, int c0) {
            inputs = load_sum<4, kAccess>(
                job.source, map.image, map.y + input_row / Plain::kSide + tap / 3 - 1,
                map.x + input_row % Plain::kSide + tap % 3 - 1, c0 + input_channel);
            const int c = c0 + weight_channel, output = place.output + weight_output;
            const auto source = job.weights + ((static_cast<int64_t>(tap) * channels + c) * row_size + output);
#pragma unroll
            for (int i = 0; i < 4; i += kPart) {
                Vec<scalar_t, kPart> some{};
                if (c < channels && output < row_size) {
                    some = load_vector<kPart>(source + i);
                }
#pragma unroll
                for (int j = 0; j < kPart; ++j) {
                    weights[i + j] = some[j];
                }
            }
        };
        // A thread without an output, or with all its pixels below the map, only helps to fetch.
        const bool busy = place.output + own_column < job.outputs && map.y + own_row / Plain::kSide < job.source.height;
        scalar_t sums[4][4] = {};
        int tap = 0, c0 = 0;
        fetch(tap, c0);
        while (tap < kTaps) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                input_tile[(input_channel + i) * Plain::kInputRow + input_row] = inputs[i];
                weight_tile[weight_channel * Plain::kOutputs + weight_output + i] = weights[i];
            }
            __syncthreads();
            const int present = channels - c0 < Plain::kChannels ? channels - c0 : Plain::kChannels;
            c0 += Plain::kChannels;
            if (c0 >= channels) {
                c0 = 0;
                ++tap;
            }
            if (tap < kTaps) {
                fetch(tap, c0);
            }
            for (int group = 0; busy && group < present; group += Plain::kGroup) {
#pragma unroll
                for (int k = group; k < group + Plain::kGroup; ++k) {
                    scalar_t a[4], b[4];
#pragma unroll
                    for (int i = 0; i < 4; i += kPart) {
                        const auto some_inputs = load_vector<kPart>(input_tile + (k * Plain::kInputRow + own_row + i));
                        const auto some_weights =
                            load_vector<kPart>(weight_tile + (k * Plain::kOutputs + own_column + i));
#pragma unroll
                        for (int j = 0; j < kPart; ++j) {
                            a[i + j] = some_inputs[j];
                            b[i + j] = some_weights[j];
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            sums[i][j] += a[i] * b[j];
                        }
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int pixel = own_row + i;
            const int y = map.y + pixel / Plain::kSide, x = map.x + pixel % Plain::kSide;
            const bool inside = y < job.source.height && x < job.source.width;
            const int64_t at = output_at(job, map.image, y, x);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int output = place.output + own_column + j;
                if (inside && output < job.outputs) {
                    scalar_t value = sums[i][j];
                    if (job.bias) {
                        value += job.bias[output];
                    }
                    if (job.residual) {
                        value += job.residual[at + output];
                    }
                    job.out[at + output] = rectified(value, job.relu);
                }
            }
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// The kernel whose tiles have kOutputs outputs, and its sizes; without tensor cores there is one kernel.
template <typename operand_t, int kOutputs>
struct Kernel {
    using scalar_t = element_t<operand_t>;
    using Size = std::conditional_t<kIsPlain<operand_t>, Plain, WideConv<operand_t, kOutputs>>;

    template <int kAccess>
    static constexpr auto with_access() {
        if constexpr (!kIsPlain<operand_t>) {
            return &conv3x3_tensor_core_kernel<operand_t, kAccess, kOutputs>;
        } else {
            return &conv3x3_kernel<scalar_t, kAccess>;
        }
    }
    // Whether channels are read 16 bytes at a time matters to the kernel, not to how many blocks run.
    static int resident(Stream stream) {
        return resident_blocks<with_access<kWideElements<scalar_t>>()>(Size::kThreads, Size::kSharedBytes, stream);
    }
    static int64_t output_tiles(const Tensor& out) { return ceil_div(out.size(1), Size::kOutputs); }
    static int64_t tiles(const Tensor& out) {
        return out.numel() == 0 ? 0
                                : out.size(0) * ceil_div(out.size(2), Size::kHeight) *
                                      ceil_div(out.size(3), Size::kWidth) * output_tiles(out);
    }
    static void launch_table(const ConvTable<scalar_t>& table, bool wide, Stream stream) {
        const dim3 blocks(walking_blocks(table, resident(stream))), threads(Size::kThreads);
        if (wide) {
            launch<with_access<kWideElements<scalar_t>>()>(blocks, threads, Size::kSharedBytes, stream, table);
        } else {
            launch<with_access<1>()>(blocks, threads, Size::kSharedBytes, stream, table);
        }
    }
    // Time of all tiles, roughly: a multiprocessor with n of them at work takes as long as for n and a quarter.
    static int64_t cost(const std::vector<Convolution>& convolutions, Stream stream) {
        int64_t all = 0;
        for (const Convolution& conv : convolutions) {
            for (const Tensor& out : conv.out) {
                all += tiles(out);
            }
        }
        const int64_t blocks = resident(stream), multiprocessors = std::max<int64_t>(1, blocks / Size::kResident);
        const int64_t rest = all % blocks;
        return all / blocks * (4 * Size::kResident + 1) + (rest > 0 ? 4 * ceil_div(rest, multiprocessors) + 1 : 0);
    }
};

template <typename operand_t, int kOutputs>
void convolve(
    const char* op, const std::vector<Convolution>& convolutions, Stream stream, const std::optional<Tensor>& active) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Tiles = Kernel<operand_t, kOutputs>;
    using Size = typename Tiles::Size;
    struct Entry {
        ConvJob<scalar_t> job;
        int64_t pixels, tiles;
    };
    std::vector<Entry> entries;
    bool wide = true;
    for (const Convolution& conv : convolutions) {
        wide = wide && has_wide_channels<scalar_t>(conv.x) && has_wide_channels<scalar_t>(conv.flow);
        if (conv.out.empty()) {
            continue;
        }
        const Global<const scalar_t> weights = kernel_weights<scalar_t>(conv);
        for (size_t i = 0; i < conv.out.size(); ++i) {
            const Tensor& out = conv.out[i];
            const int64_t tiles = Tiles::tiles(out);
            check(
                tiles <= kMaxTiles, op, ": a level of shape ", shape_string(out), " holds too many tiles for a launch");
            if (tiles > 0) {
                entries.push_back(
                    {{conv_source<scalar_t>(op, conv.x[i], conv.flow.empty() ? nullptr : &conv.flow[i]), weights,
                      conv.bias ? data<real_t>(*conv.bias) : Global<const real_t>(nullptr),
                      conv.residual.empty() ? Global<const scalar_t>(nullptr) : data<scalar_t>(conv.residual[i]),
                      mutable_data<scalar_t>(out), static_cast<int>(out.size(1)), conv.relu,
                      out.size(1) % kWideElements<scalar_t> == 0 &&
                          (conv.residual.empty() || is_aligned(conv.residual[i].const_data_ptr(), 16)),
                      0, static_cast<int>(ceil_div(out.size(2), Size::kHeight)),
                      static_cast<int>(ceil_div(out.size(3), Size::kWidth)),
                      static_cast<int>(Tiles::output_tiles(out))},
                     out.size(0) * out.size(2) * out.size(3),
                     tiles});
            }
        }
    }
    std::stable_sort(
        entries.begin(), entries.end(), [](const Entry& one, const Entry& other) { return one.pixels > other.pixels; });
    for (size_t next = 0; next < entries.size();) {
        ConvTable<scalar_t> table{};
        table.active = active ? data<uint8_t>(*active) : Global<const uint8_t>(nullptr);
        for (; next < entries.size() && table.num_jobs < kMaxJobs; ++next) {
            if (entries[next].tiles > kMaxTiles - table.num_tiles) {
                break;
            }
            table.jobs[table.num_jobs] = entries[next].job;
            table.jobs[table.num_jobs++].tile_begin = table.num_tiles;
            table.num_tiles += static_cast<int>(entries[next].tiles);
        }
        Tiles::launch_table(table, wide, stream);
    }
}

// The same sums in the same order whichever tiles are taken: narrow ones waste less on few outputs and small maps, but
// take more than half the time of wide ones.
template <typename operand_t>
void convolve(
    const char* op, std::vector<Convolution> convolutions, Stream stream, const std::optional<Tensor>& active) {
    if constexpr (sizeof(element_t<operand_t>) == 2) {
        convolutions = convolve3x3_sm90<operand_t>(convolutions, stream, active);
    }
    if (convolutions.empty()) {
        return;
    }
    if constexpr (kIsPlain<operand_t> || std::is_same_v<operand_t, Tf32x3>) {
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
        const auto others = std::stable_partition(
            convolutions.begin(), convolutions.end(),
            [&](const Convolution& convolution) { return convolution.algorithm == algorithm; });
        std::vector<Convolution> own(convolutions.begin(), others);
        convolutions.erase(convolutions.begin(), others);
        dispatch_floating(op, own[0].x[0].scalar_type(), [&](auto zero) {
            dispatch_operand<decltype(zero)>(
                algorithm, [&](auto operand) { convolve<decltype(operand)>(op, std::move(own), stream, active); });
        });
    }
}

}  // namespace spatialflow
