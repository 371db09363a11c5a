// SPDX-License-Identifier: Apache-2.0
//
// Gradients of deformable convolution on CUDA, without a column buffer in global memory:
//
//   columns[p, k, c]      = mask[k, p] * sample(p, k, c),   sample = sum over corners i of value_i * input[cell_i, c]
//   grad_columns[p, k, c] = sum over o of grad_output[p, o] * weight[k, c, o]
//   grad_mask[k, p]       = sum over c of grad_columns * sample
//   grad_offset[k, p]     = sum over c of grad_columns * mask * derivative of the sample
//   grad_input[cell, c]   = sum over the (p, k, i) with cell_i = cell of mask * value_i * grad_columns
//   grad_weight[k, c, o]  = sum over p of columns * grad_output[p, o]
//
// p is an output pixel, k a tap, c a channel and o an output. grad_output is (N, H_out, W_out, O). Other layouts and
// operand types are those of the forward pass. The kernels of grad_weight are in deform_conv2d_weight_gradient.cuh,
// those of grad_input in deterministic mode and in float64 in deform_conv2d_input_gradient.cuh.
#include "cuda/deform_conv2d.cuh"
#include "cuda/deform_conv2d_input_gradient.cuh"
#include "cuda/deform_conv2d_weight_gradient.cuh"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename operand_t, int kColumns>
using DataProduct = TileProduct<operand_t, kColumns, false, false>;

// Shared memory of the kernel for the data gradient (of input, offset and mask), and the mapping of grad_columns to
// lanes.
template <typename operand_t, int kColumns, int kWidth>
struct DataMemory {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Product = DataProduct<operand_t, kColumns>;
    // With 256 columns, half of them are in shared memory at a time.
    static constexpr int kPasses = kColumns > 128 ? 2 : 1, kPassColumns = kColumns / kPasses;
    // Channels of a lane. With kWidth > 1 they are 16 bytes of grad_input, so that the reductions of adjacent lanes
    // fill whole sectors.
    static constexpr int kPart = kWidth == 1 ? kPassColumns / kWarpSize : kVectorElements<real_t>;
    static constexpr int kLanes = kPassColumns / kPart;                      // per pixel
    static constexpr int kPixels = kProductRows * kLanes / kProductThreads;  // per thread
    static_assert(kLanes <= kWarpSize && kPixels * 4 == kLanes, "each lane gets the sum for one corner of one pixel");
    // The tiles of a product, and later its result, use the same memory.
    static constexpr int kColumnsRow = kPassColumns + kVectorElements<real_t>;
    static constexpr int kTilesBegin = TapTable<real_t, kProductRows>::kSize;
    static constexpr size_t kColumnsBytes = kProductRows * kColumnsRow * sizeof(real_t);
    static constexpr size_t kTilesBytes = 2 * Product::kTilesSize * sizeof(scalar_t);
    static constexpr size_t kBytes =
        kTilesBegin * sizeof(real_t) + (kColumnsBytes > kTilesBytes ? kColumnsBytes : kTilesBytes);
};

// Item of kPart channels of the four cells that a pixel reads; loads are in flight between `begin` and `values`.
template <typename scalar_t, int kPart, bool kVectorized>
class CornerItem {
    static constexpr int kWords = static_cast<int>(kPart * sizeof(scalar_t) / sizeof(unsigned));

public:
    __device__ __forceinline__ void begin(
        const DeformProblem<scalar_t>& problem, const Vec<int, 4>& cells, int channel, int count) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            const auto source = in_cell<const scalar_t>(problem.input + channel, cells[corner], problem.cell_bytes);
            if constexpr (kVectorized) {
                words_[corner] = {};
                if (cells[corner] >= 0 && count > 0) {
                    words_[corner] = load_vector<kWords>(pointer_cast<const unsigned>(source));
                }
            } else {
                values_[corner] = {};
#pragma unroll
                for (int i = 0; i < kPart; ++i) {
                    if (cells[corner] >= 0 && i < count) {
                        values_[corner][i] = source[i];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ Vec<scalar_t, kPart> values(int corner) const {
        if constexpr (kVectorized) {
            Vec<scalar_t, kPart> values;
            std::memcpy(static_cast<void*>(&values), &words_[corner], sizeof(values));
            return values;
        } else {
            return values_[corner];
        }
    }

private:
    Vec<unsigned, kWords> words_[4];  // as words, so that two 16-bit values take one register
    Vec<scalar_t, kPart> values_[4];  // without kVectorized, instead of words_
};

// Process kPart channels of a pixel. Add the products of grad_columns (`columns`) with the four cells to `dots`, and
// the gradients of these cells to grad_input.
template <int kAccess, typename scalar_t, typename real_t, int kPart, bool kVectorized>
__device__ __forceinline__ void scatter_item(
    const DeformProblem<scalar_t>& problem, Shared<real_t> columns, const Vec<int, 4>& cells,
    const real_t (&weights)[4], const CornerItem<scalar_t, kPart, kVectorized>& item, int channel, int count,
    Global<real_t> grad_input, real_t* dots) {
    Vec<real_t, kPart> gradient;
#pragma unroll
    for (int part = 0; part < kPart; part += kAccess) {
        const auto vector = load_vector<kAccess>(columns + part);
#pragma unroll
        for (int v = 0; v < kAccess; ++v) {
            gradient[part + v] = vector[v];
        }
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        if (cells[corner] < 0) {
            continue;
        }
        const Vec<scalar_t, kPart> values = item.values(corner);
        const auto target = in_cell<real_t>(grad_input + channel, cells[corner], problem.sums_cell_bytes);
#pragma unroll
        for (int part = 0; part < kPart; part += kAccess) {
            if (part >= count) {
                continue;
            }
            Vec<real_t, kAccess> parts;
#pragma unroll
            for (int v = 0; v < kAccess; ++v) {
                dots[corner] += gradient[part + v] * static_cast<real_t>(load(values[part + v]));
                parts[v] = weights[corner] * gradient[part + v];
            }
            if (grad_input) {
                reduce_add(target + part, parts);
            }
        }
    }
}

// Compute kCount sums over kLanes adjacent lanes: lane i returns the sum of values[i % kCount].
template <int kLanes, int kCount, typename real_t>
__device__ __forceinline__ real_t sum_over_lanes(const real_t (&values)[kCount]) {
    if constexpr (kCount == 1) {
        return values[0];
    } else {
        constexpr int kHalf = kCount / 2;
        const bool upper = (static_cast<int>(threadIdx.x) & kHalf) != 0;
        real_t sums[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const real_t sent = upper ? values[i] : values[i + kHalf], retained = upper ? values[i + kHalf] : values[i];
            sums[i] = retained + __shfl_xor_sync(kAllLanes, sent, kHalf);
        }
        real_t sum = sum_over_lanes<kHalf>(sums);
#pragma unroll
        for (int distance = kCount; distance < kLanes; distance *= 2) {
            sum += __shfl_xor_sync(kAllLanes, sum, distance);
        }
        return sum;
    }
}

// Functions with which a block of the data gradient scatters grad_columns to grad_input, and multiplies it with the
// cells. Each of kLanes lanes processes kPart channels of a pixel.
template <typename operand_t, int kColumns, int kWidth>
struct DataGradientBlock {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Product = DataProduct<operand_t, kColumns>;
    using Memory = DataMemory<operand_t, kColumns, kWidth>;
    static constexpr int kLanes = Memory::kLanes, kPixels = Memory::kPixels, kPart = Memory::kPart;
    static constexpr int kAccess = kWidth == 1 ? 1 : kPart;
    // Registers limit the loads in flight. Only 16-bit types load the cells of two pixels at once (kPair). Of these,
    // only tiles with one pass load cells during the product (kEarly).
    static constexpr bool kEarly = sizeof(scalar_t) == 2 && Memory::kPasses == 1;
    static constexpr int kPair = sizeof(scalar_t) == 2 ? 2 : 1;
    using Items = CornerItem<scalar_t, kPart, kWidth != 1>[kPair];

    const DeformProblem<scalar_t>& problem;
    const TapTable<real_t, kProductRows>& table;
    Shared<real_t> columns;
    int lane;

    // Index in the tile of pixel i of this thread.
    static __device__ __forceinline__ int thread_pixel(int i) {
        return static_cast<int>(threadIdx.x) / kLanes + i * (kProductThreads / kLanes);
    }

    // Start to load the cells of kPair pixels, from pixel `first` of this thread on: at most `count` channels from
    // `channel` on.
    __device__ __forceinline__ void fetch(Items& items, int first, int channel, int count) const {
#pragma unroll
        for (int i = 0; i < kPair; ++i) {
            items[i].begin(problem, table.cells(thread_pixel(first + i)), channel, count);
        }
    }

    // Process part kPass of grad_columns for the channels of the run from `begin` on. Scatter gradients to grad_input,
    // and add products with the cells to `dot`. If kEarly, `next` already has the items of the first pixels.
    template <int kPass>
    __device__ __forceinline__ void scatter(
        const Product& product, Items& next, int first_channel, int begin, bool has_dots, Global<real_t> grad_input,
        real_t& dot) const {
        const int thread_column = lane * kPart;
        const int thread_channel = begin + Product::template column_of_part<kPass, Memory::kPasses>(thread_column);
        const int count = problem.run - thread_channel;
        product.template for_each_of_part<kPass, Memory::kPasses>(
            [&](int row, int column, const Vec<real_t, Product::kVisitColumns>& sums) {
                store_vector(columns + (row * Memory::kColumnsRow + column), sums);
            });
        if constexpr (!kEarly) {
            fetch(next, 0, first_channel + thread_channel, has_dots ? count : 0);
        }
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < kPixels; first += kPair) {
            Items items;
#pragma unroll
            for (int i = 0; i < kPair; ++i) {
                items[i] = next[i];
            }
            if (first + kPair < kPixels) {
                fetch(next, first + kPair, first_channel + thread_channel, has_dots ? count : 0);
            }
            real_t dots[kPair * 4] = {};
#pragma unroll
            for (int i = 0; i < kPair; ++i) {
                const int pixel = thread_pixel(first + i);
                const Vec<int, 4> cells = table.cells(pixel);
                real_t weights[4];
                table.weights(pixel, weights);
                scatter_item<kAccess>(
                    problem, columns + (pixel * Memory::kColumnsRow + thread_column), cells, weights, items[i],
                    first_channel + thread_channel, count, grad_input, dots + i * 4);
            }
            const real_t sum = sum_over_lanes<kLanes>(dots);
            if (lane / (kPair * 4) == first / kPair) {
                dot += sum;
            }
        }
        __syncthreads();
    }
};

// Store the gradients w.r.t. offset and mask of a tap of an output pixel. dots[corner] is the dot product of
// grad_columns and the cell of that corner.
template <typename scalar_t, typename real_t>
__device__ __forceinline__ void store_sampling_gradients(
    const DeformProblem<scalar_t>& problem, int pixel, int offset_group, int tap, Shared<real_t> dots,
    Global<real_t> grad_offset, Global<real_t> grad_mask) {
    real_t result_y = 0, result_x = 0, result_mask = 0;
    const OutputPixel output = output_pixel(problem, pixel);
    TapOperands<real_t> operands;
    operands.read(problem, output, offset_group, tap);
    DeformSample<real_t> sample;
    if (deform_sample(problem, output, offset_group, tap, operands, sample)) {
        real_t values[4], slope_y[4], slope_x[4];
        sample_values(problem, sample, values);
        sample_slopes(problem, sample, slope_y, slope_x);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            const real_t dot = dots[corner];
            result_y += sample.mask * slope_y[corner] * dot;
            result_x += sample.mask * slope_x[corner] * dot;
            result_mask += values[corner] * dot;
        }
    }
    const int image_pixels = problem.out_height * problem.out_width, image = pixel / image_pixels;
    const int64_t index = (static_cast<int64_t>(image) * gridDim.z + offset_group) * problem.taps + tap;
    grad_offset[2 * index * image_pixels + pixel % image_pixels] = result_y;
    grad_offset[(2 * index + 1) * image_pixels + pixel % image_pixels] = result_x;
    if (grad_mask) {
        grad_mask[index * image_pixels + pixel % image_pixels] = result_mask;
    }
}

// Gradients of input, offset and mask. A block computes 64 pixels at one tap and offset group. It first computes
// grad_columns in shared memory. For offset and mask, the lanes of a pixel then multiply grad_columns with the pixel's
// four cells. The same lanes add gradients to grad_input by float32 reductions in any order. For deterministic results,
// and in float64, deform_conv2d_input_gradient.cuh computes grad_input instead.
template <typename operand_t, int kColumns, int kWidth>
__global__ void __launch_bounds__(kProductThreads, 2) deform_conv2d_backward_data_kernel(
    const __grid_constant__ DeformProblem<element_t<operand_t>> problem,
    Global<const element_t<operand_t>> grad_output,    // (pixels, O)
    Global<const element_t<operand_t>> packed,         // (C * taps, packed_outputs)
    Global<accum_t<element_t<operand_t>>> grad_input,  // (N, H, W, C), zero on entry; null: not computed here
    Global<accum_t<element_t<operand_t>>>
        grad_offset,  // (N, 2 * offset_groups * taps, H_out, W_out); null: no gradient of offset or mask
    Global<accum_t<element_t<operand_t>>> grad_mask) {  // (N, offset_groups * taps, H_out, W_out) or null
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Block = DataGradientBlock<operand_t, kColumns, kWidth>;
    using Product = typename Block::Product;
    using Memory = typename Block::Memory;
    constexpr int kItem = Product::kItem, kDepth = Product::kDepth;
    SPATIALFLOW_DYNAMIC_SHARED(real_t, shared);
    const TapTable<real_t, kProductRows> table(shared);
    const Shared<real_t> columns = shared + Memory::kTilesBegin;
    const Shared<scalar_t> left = pointer_cast<scalar_t>(columns);
    const Shared<scalar_t> right = left + 2 * Product::kLeftSize;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % Block::kLanes;
    const int first_pixel = static_cast<int>(blockIdx.x) * kProductRows;
    const int tap = static_cast<int>(blockIdx.y), offset_group = static_cast<int>(blockIdx.z);
    constexpr int kRowItems = kDepth / kItem;
    const int thread_column = lane * Block::kPart;
    const int thread_row = thread / kRowItems, thread_item = thread % kRowItems * kItem;
    const bool has_dots = static_cast<bool>(grad_offset);
    const Block block{problem, table, columns, lane};

    table.fill(problem, offset_group, tap, 1, first_pixel, kProductRows);
    __syncthreads();
    real_t dot = 0;  // of grad_columns and a cell: corner lane % 4 of pixel thread_pixel(lane / 4)
    for (int first_channel = offset_group * problem.offset_group_channels;
         first_channel < (offset_group + 1) * problem.offset_group_channels; first_channel += problem.run) {
        const int group = first_channel / problem.group_channels;
        for (int begin = 0; begin < problem.run; begin += kColumns) {
            typename Block::Items next;
            if constexpr (Block::kEarly) {
                const int count = problem.run - begin - thread_column;
                block.fetch(next, 0, first_channel + begin + thread_column, has_dots ? count : 0);
            }
            const int weight_row = first_channel * problem.taps + tap * problem.run + begin + thread_row;
            const int weights = weight_row * problem.packed_outputs + thread_item;
            Product product;
            run_steps<kDepth>(
                problem.packed_outputs,
                [&](int k, int buffer) {
                    load_items<kProductRows, kDepth / kItem>(
                        left + buffer * Product::kLeftSize, Product::kLeftRow,
                        [&](int row, int element, Shared<scalar_t> target) {
                            load_outputs<kWidth>(
                                problem, grad_output, first_pixel + row, problem.pixels, group, k + element, target);
                        });
                    load_items<kColumns, kDepth / kItem>(
                        right + buffer * Product::kRightSize, Product::kRightRow,
                        [&](int row, int element, Shared<scalar_t> target) {
                            const bool present = row < problem.run - begin && k + element < problem.packed_outputs;
                            const int at = weights + (row - thread_row) * problem.packed_outputs + k;
                            cp_async_16(target, packed + at, present);
                        });
                },
                [&](int buffer) {
                    product.accumulate(left + buffer * Product::kLeftSize, right + buffer * Product::kRightSize);
                },
                [&](int buffer) {
                    prepare_items<operand_t, kProductRows, kDepth / kItem>(
                        left + buffer * Product::kLeftSize, Product::kLeftRow);
                });
            block.template scatter<0>(product, next, first_channel, begin, has_dots, grad_input, dot);
            if constexpr (Memory::kPasses == 2) {
                block.template scatter<1>(product, next, first_channel, begin, has_dots, grad_input, dot);
            }
        }
    }
    if (!has_dots) {
        return;
    }
    columns[Block::thread_pixel(lane / 4) * 4 + lane % 4] = dot;
    __syncthreads();
    if (thread < kProductRows && first_pixel + thread < problem.pixels) {
        store_sampling_gradients(
            problem, first_pixel + thread, offset_group, tap, columns + thread * 4, grad_offset, grad_mask);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

const char* const kOp = "deform_conv2d_backward";

template <typename scalar_t>
bool is_vectorizable(const DeformOperands& operands, const DeformConvShape& shape, const Tensor& grad_output) {
    return operands.is_vectorizable<scalar_t>() && shape.group_outputs() % kVectorElements<scalar_t> == 0 &&
           is_aligned(grad_output.const_data_ptr(), 16);
}

template <typename operand_t>
void launch_data_gradient(
    const DeformConvShape& shape, const DeformProblem<element_t<operand_t>>& problem, bool vectorized,
    const Tensor& grad_output, const Tensor& packed, const Global<accum_t<element_t<operand_t>>>& grad_input,
    const Global<accum_t<element_t<operand_t>>>& grad_offset, const Global<accum_t<element_t<operand_t>>>& grad_mask,
    Stream stream) {
    using scalar_t = element_t<operand_t>;
    with_tile<scalar_t, kMaxTileColumns<operand_t>>(vectorized, deform_run(shape), [&](auto columns, auto width) {
        constexpr int kColumns = decltype(columns)::value, kWidth = decltype(width)::value;
        launch<deform_conv2d_backward_data_kernel<operand_t, kColumns, kWidth>>(
            deform_grid(kOp, ceil_div(problem.pixels, kProductRows), shape.taps(), shape.offset_groups),
            dim3(kProductThreads), DataMemory<operand_t, kColumns, kWidth>::kBytes, stream, problem,
            data<scalar_t>(grad_output), data<scalar_t>(packed), grad_input, grad_offset, grad_mask);
    });
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward_data_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm, bool need_input,
    bool need_sampling, bool deterministic) {
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const DeformConvShape shape =
        check_deform_conv2d(input, offset, weight, std::nullopt, mask, offset_tangent, options);
    check_deform_grad_output(kOp, grad_output, input, shape);
    const DeviceScope device(input);
    const ScalarType dtype = input.scalar_type(), accum = accum_dtype(dtype);
    const bool gather = deterministic || dtype == ScalarType::Double;
    DeformGradients gradients =
        empty_deform_gradients(shape, input, offset, mask, gather ? dtype : accum, need_input, need_sampling);
    const bool empty = shape.channels == 0 || shape.out_channels == 0 || shape.batch == 0;
    if (empty || !gather) {
        torch::stable::zero_(gradients.input);
    }
    if (empty) {
        torch::stable::zero_(gradients.offset);
        torch::stable::zero_(gradients.mask);
    } else {
        const DeformOperands operands(kOp, shape, options, input, offset, mask, offset_tangent);
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor packed = pack_deform_weight(kOp, weight, shape, deform_run(shape), algorithm, 0, device.stream());
        dispatch_floating(kOp, dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            const DeformProblem<scalar_t> problem = operands.problem<scalar_t>();
            const bool vectorized = is_vectorizable<scalar_t>(operands, shape, source);
            const Global<real_t> none(nullptr);
            dispatch_operand<scalar_t>(cuda_algorithm(algorithm, dtype), [&](auto operand) {
                using operand_t = decltype(operand);
                if (need_sampling || (need_input && !gather)) {
                    launch_data_gradient<operand_t>(
                        shape, problem, vectorized, source, packed,
                        need_input && !gather ? mutable_data<real_t>(gradients.input) : none,
                        need_sampling ? mutable_data<real_t>(gradients.offset) : none,
                        need_sampling && mask ? mutable_data<real_t>(gradients.mask) : none, device.stream());
                }
                if (need_input && gather) {
                    gather_input_gradient<operand_t>(
                        kOp, problem, shape, vectorized, source, packed, gradients.input, device.stream());
                }
            });
        });
    }
    return finished_deform_gradients(gradients, input, offset, mask);
}

Tensor deform_conv2d_backward_weight_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm, int64_t group_channels,
    int64_t kernel_h, int64_t kernel_w) {
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const auto checked = check_deform_grad_weight(
        kOp, grad_output, input, offset, mask, offset_tangent, options, group_channels, kernel_h, kernel_w);
    const DeformConvShape& shape = checked.first;
    Tensor grad_weight = checked.second;
    const DeviceScope device(input);
    if (shape.batch == 0) {
        return torch::stable::zero_(grad_weight);
    }
    if (grad_weight.numel() == 0) {
        return grad_weight;
    }
    const DeformOperands operands(kOp, shape, options, input, offset, mask, offset_tangent);
    const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
    dispatch_floating(kOp, input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const DeformProblem<scalar_t> problem = operands.problem<scalar_t>();
        dispatch_operand<scalar_t>(cuda_algorithm(algorithm, input.scalar_type()), [&](auto operand) {
            using operand_t = decltype(operand);
            // float32 on the tensor cores uses half of kMaxTileColumns: more columns would spill registers for Tf32 on
            // compute capability 10.0 and 12.0.
            constexpr bool kHalvesColumns = sizeof(scalar_t) == 4 && !kIsSimt<operand_t>;
            constexpr int kMaxColumns = kHalvesColumns ? kMaxTileColumns<operand_t> / 2 : kMaxTileColumns<operand_t>;
            with_tile<scalar_t, kMaxColumns>(
                is_vectorizable<scalar_t>(operands, shape, source), shape.group_outputs(),
                [&](auto columns, auto width) {
                    compute_weight_gradient<operand_t, decltype(columns)::value, decltype(width)::value>(
                        kOp, shape, problem, source, grad_weight, device.stream());
                });
        });
    });
    return grad_weight;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("_deform_conv2d_backward_data", TORCH_BOX(&spatialflow::deform_conv2d_backward_data_cuda));
    library.impl("_deform_conv2d_backward_weight", TORCH_BOX(&spatialflow::deform_conv2d_backward_weight_cuda));
}
