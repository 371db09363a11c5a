// SPDX-License-Identifier: Apache-2.0
//
// Gradients of deformable convolution on the CPU, deterministic without atomics.
//
// Data (input, offset, mask): a task is a slice of channels of an image. For a block of pixels the gradient of the
// columns is grad_output x weight of the slice. Per tap, its products with the four cells of the sample give the
// gradients of offset and mask. The same pass adds it to these four cells of grad_input, which no other task writes.
// All slices contribute to the gradients of offset and mask; these parts are added in order.
//
// Weight: a task is (taps, slice of channels), with grad_weight = columns^T x grad_output. It gathers its columns block
// by block over the whole batch, so each sum is computed by one thread in a fixed order.
#include "cpu/deform_conv2d.h"
#include "cpu/gemm.h"

namespace spatialflow {
namespace {

constexpr int64_t kColumnValues = 32 * 1024;  // gradients of a block's columns of one tap: 128 KiB of float
constexpr int64_t kMaxBlockPixels = 16 * kGemmRows;
constexpr int64_t kWeightBlock = kGemmDepth;  // pixels per product of the weight gradient
constexpr int64_t kWeightChannels = 128;      // columns per product
constexpr int64_t kWeightSums = 32 * 1024;    // sums of a task: 128 KiB of float

// Channels [begin, end) of one weight group.
struct Segment {
    int64_t begin, end, group;
    int64_t packed;  // offset of its packed weight: per tap (outputs, channels)
};

struct Slice {
    int64_t begin, end;
    std::vector<Segment> segments;
};

// Split the channels into at most `count` slices of whole vectors. `packed_size` is the length of all their packed
// weights.
std::vector<Slice> channel_slices(const DeformConvShape& shape, int64_t lanes, int64_t count, int64_t& packed_size) {
    const int64_t vectors = (shape.channels + lanes - 1) / lanes;
    count = std::min(vectors, count);
    const int64_t inputs = shape.group_channels();
    std::vector<Slice> slices;
    packed_size = 0;
    for (int64_t s = 0; s < count; ++s) {
        Slice slice{s * vectors / count * lanes, std::min(shape.channels, (s + 1) * vectors / count * lanes), {}};
        for (int64_t c = slice.begin; c < slice.end;) {
            const int64_t end = std::min(slice.end, (c / inputs + 1) * inputs);
            slice.segments.push_back({c, end, c / inputs, packed_size});
            packed_size += shape.taps() * gemm_packed_size(shape.group_outputs(), end - c);
            c = end;
        }
        slices.push_back(std::move(slice));
    }
    return slices;
}

// Contribution of one tap of a pixel to the gradients of its offset and its mask.
template <typename real_t>
struct SamplingGradient {
    real_t y, x, mask;
};

// dot[i] = sum of grad * corner[i] over channels; grad_cell[i] += weight[i] * grad, unless grad_cell is null.
template <typename scalar_t, typename real_t>
inline void scatter_channels(
    const real_t* grad, const scalar_t* const corner[4], const real_t weight[4], real_t* const* grad_cell,
    int64_t count, real_t dot[4]) {
    Vector<real_t> sum[4] = {};
    Vector<real_t> factor[4];
    for (int i = 0; i < 4; ++i) {
        factor[i] = broadcast(weight[i]);
    }
    int64_t c = 0;
    for (; c + kLanes<real_t> <= count; c += kLanes<real_t>) {
        const Vector<real_t> value = load_vector(grad + c);
        for (int i = 0; i < 4; ++i) {
            sum[i] += value * load_vector(corner[i] + c);
            if (grad_cell) {
                store_vector(grad_cell[i] + c, load_vector(grad_cell[i] + c) + factor[i] * value);
            }
        }
    }
    if (c < count) {
        const int rest = static_cast<int>(count - c);
        const Vector<real_t> value = load_partial(grad + c, rest);
        for (int i = 0; i < 4; ++i) {
            sum[i] += value * load_partial(corner[i] + c, rest);
            if (grad_cell) {
                store_partial(grad_cell[i] + c, load_partial(grad_cell[i] + c, rest) + factor[i] * value, rest);
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        dot[i] = 0;
        for (int lane = 0; lane < kLanes<real_t>; ++lane) {
            dot[i] += sum[i][lane];
        }
    }
}

// Compute the sampling gradients of one tap of one pixel over channels [c_begin, c_begin + count). Add the tap's part
// of grad_input (one image, channels-last; null: not requested).
template <typename scalar_t, typename real_t>
SamplingGradient<real_t> scatter_tap(
    const Sampler<scalar_t>& sampler, const OutputPixel& at, int64_t offset_group, int64_t number,
    const real_t* grad_columns,  // (count)
    int64_t c_begin, int64_t count, real_t* grad_input, real_t* ignored) {
    SamplingGradient<real_t> result{};
    typename Sampler<scalar_t>::Tap tap;
    if (!sampler.tap(at, offset_group, number, tap)) {
        return result;
    }
    const scalar_t* corner[4];
    real_t* grad_cell[4];
    real_t weight[4], dot[4], slope_y[4], slope_x[4];
    for (int i = 0; i < 4; ++i) {
        corner[i] = tap.corner[i] + c_begin;
        weight[i] = tap.mask * tap.value[i];
        grad_cell[i] =
            tap.cell[i] < 0 || !grad_input ? ignored : grad_input + tap.cell[i] * sampler.shape().channels + c_begin;
    }
    scatter_channels(grad_columns, corner, weight, grad_input ? grad_cell : nullptr, count, dot);
    sampler.slopes(at, offset_group, number, tap, slope_y, slope_x);
    for (int i = 0; i < 4; ++i) {
        result.y += tap.mask * slope_y[i] * dot[i];
        result.x += tap.mask * slope_x[i] * dot[i];
        result.mask += tap.value[i] * dot[i];
    }
    return result;
}

template <typename scalar_t>
void deform_conv2d_backward_data(
    const Sampler<scalar_t>& sampler,
    const accum_t<scalar_t>* grad_output,  // (N, H_out, W_out, O)
    const scalar_t* weight,                // (O, C / groups, taps)
    accum_t<scalar_t>* grad_input,         // (N, H, W, C), zero on entry; null: not requested
    accum_t<scalar_t>* grad_offset,        // (N, 2 * offset_groups * taps, H_out, W_out)
    accum_t<scalar_t>* grad_mask) {        // (N, offset_groups * taps, H_out, W_out) or null
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = sampler.shape();
    const int64_t taps = shape.taps(), outputs = shape.group_outputs(), inputs = shape.group_channels();
    const int64_t per_group = shape.offset_group_channels();
    int64_t packed_size = 0;
    const std::vector<Slice> slices =
        channel_slices(shape, kLanes<real_t>, (num_threads() + shape.batch - 1) / shape.batch, packed_size);
    const int64_t num_slices = static_cast<int64_t>(slices.size());

    const Scratch<real_t> packed(packed_size);
    parallel_for(0, num_slices * taps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (const Segment& segment : slices[static_cast<size_t>(i / taps)].segments) {
                const int64_t tap = i % taps, width = segment.end - segment.begin;
                gemm_pack(
                    weight + (segment.group * outputs * inputs + segment.begin % inputs) * taps + tap, inputs * taps,
                    taps, outputs, width, packed.get() + segment.packed + tap * gemm_packed_size(outputs, width));
            }
        }
    });

    // Each pair of a slice and an offset group with common channels has a partial sampling gradient. Both are in
    // ascending order of channels, so slice + offset group is a unique index of such a pair.
    const int64_t pixels = shape.pixels();
    const int64_t part = shape.batch * pixels * taps;
    const Scratch<SamplingGradient<real_t>> parts(
        grad_offset ? (num_slices + shape.offset_groups - 1) * part : 0);  // (pair, N, pixel, tap)

    parallel_for(0, shape.batch * num_slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / num_slices;
            const Slice& slice = slices[static_cast<size_t>(task % num_slices)];
            const int64_t width = slice.end - slice.begin;
            const int64_t block = std::clamp<int64_t>(kColumnValues / width, kGemmRows, kMaxBlockPixels);
            const Scratch<real_t> columns(block * width);
            const Scratch<real_t> ignored(width);  // receives contributions outside the map
            std::fill_n(ignored.get(), width, real_t(0));
            real_t* image_gradient =
                grad_input ? grad_input + image * shape.height * shape.width * shape.channels : nullptr;
            for (int64_t first = 0; first < pixels; first += block) {
                const int64_t count = std::min(block, pixels - first);
                const real_t* source = grad_output + (image * pixels + first) * shape.out_channels;
                for (int64_t tap = 0; tap < taps; ++tap) {
                    for (const Segment& segment : slice.segments) {
                        const int64_t size = segment.end - segment.begin;
                        gemm(
                            count, size, outputs, source + segment.group * outputs, shape.out_channels,
                            packed.get() + segment.packed + tap * gemm_packed_size(outputs, size),
                            columns.get() + (segment.begin - slice.begin), width);
                    }
                    for (int64_t p = 0; p < count; ++p) {
                        const OutputPixel at = output_pixel(shape, image * pixels + first + p);
                        for (int64_t c = slice.begin; c < slice.end;) {
                            const int64_t group = c / per_group;
                            const int64_t size = std::min(slice.end, (group + 1) * per_group) - c;
                            const SamplingGradient<real_t> result = scatter_tap(
                                sampler, at, group, tap, columns.get() + p * width + (c - slice.begin), c, size,
                                image_gradient, ignored.get());
                            if (grad_offset) {
                                const int64_t pair = task % num_slices + group;
                                parts.get()[pair * part + (image * pixels + first + p) * taps + tap] = result;
                            }
                            c += size;
                        }
                    }
                }
            }
        }
    });
    if (!grad_offset) {
        return;
    }
    parallel_for(0, shape.batch * shape.offset_groups * taps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t tap = i % taps, group = i / taps % shape.offset_groups;
            const int64_t image = i / (taps * shape.offset_groups);
            real_t* target_y = grad_offset + 2 * i * pixels;
            real_t* target_x = target_y + pixels;
            for (int64_t p = 0; p < pixels; ++p) {
                SamplingGradient<real_t> sum{};
                for (int64_t s = 0; s < num_slices; ++s) {
                    const Slice& slice = slices[static_cast<size_t>(s)];
                    if (slice.begin < (group + 1) * per_group && slice.end > group * per_group) {
                        const SamplingGradient<real_t>& one =
                            parts.get()[(s + group) * part + (image * pixels + p) * taps + tap];
                        sum.y += one.y;
                        sum.x += one.x;
                        sum.mask += one.mask;
                    }
                }
                target_y[p] = sum.y;
                target_x[p] = sum.x;
                if (grad_mask) {
                    grad_mask[i * pixels + p] = sum.mask;
                }
            }
        }
    });
}

template <typename scalar_t>
void deform_conv2d_backward_weight(
    const Sampler<scalar_t>& sampler,
    const View4<scalar_t>& grad_output,  // (N, O, H_out, W_out)
    int64_t pixel_stride,                // of all pixels of an image of grad_output
    scalar_t* grad_weight) {             // (O, C / groups, taps)
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = sampler.shape();
    const int64_t taps = shape.taps(), inputs = shape.group_channels(), outputs = shape.group_outputs();

    // Pack grad_output as (pixels, outputs) per image, block of pixels and group.
    const int64_t image_blocks = (shape.pixels() + kWeightBlock - 1) / kWeightBlock;
    const int64_t blocks = shape.batch * image_blocks;
    const auto pixels_of = [&](int64_t block) {
        return std::min(kWeightBlock, shape.pixels() - block % image_blocks * kWeightBlock);
    };
    const int64_t packed_size = gemm_packed_size(kWeightBlock, outputs);
    const Scratch<real_t> packed(blocks * shape.groups * packed_size);
    parallel_for(0, blocks * shape.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t block = i / shape.groups, group = i % shape.groups;
            const int64_t image = block / image_blocks, first = block % image_blocks * kWeightBlock;
            gemm_pack(
                grad_output.data + image * grad_output.stride[0] + first * pixel_stride +
                    group * outputs * grad_output.stride[1],
                pixel_stride, grad_output.stride[1], pixels_of(block), outputs, packed.get() + i * packed_size);
        }
    });

    const int64_t wanted =
        std::max((shape.channels + kWeightChannels - 1) / kWeightChannels, (4 * num_threads() + taps - 1) / taps);
    int64_t unused = 0;
    const std::vector<Slice> slices = channel_slices(shape, kLanes<real_t>, wanted, unused);
    const int64_t num_slices = static_cast<int64_t>(slices.size());
    // With few outputs per group (many groups) a task takes several taps, to read grad_output less often.
    const int64_t per_tap = (shape.channels + num_slices - 1) / num_slices * outputs;
    const int64_t task_taps =
        std::clamp<int64_t>(std::min(kWeightSums / per_tap, taps * num_slices / (4 * num_threads())), 1, taps);
    const int64_t tap_tasks = (taps + task_taps - 1) / task_taps;
    parallel_for(0, tap_tasks * num_slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first_tap = task / num_slices * task_taps;
            const int64_t last_tap = std::min(taps, first_tap + task_taps);
            const Slice& slice = slices[static_cast<size_t>(task % num_slices)];
            const int64_t width = slice.end - slice.begin;
            const Scratch<real_t> columns(kWeightBlock * width);
            const Scratch<real_t> sums((last_tap - first_tap) * width * outputs);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = block / image_blocks * shape.pixels() + block % image_blocks * kWeightBlock;
                const int64_t pixels = pixels_of(block);
                for (int64_t tap = first_tap; tap < last_tap; ++tap) {
                    for (int64_t p = 0; p < pixels; ++p) {
                        sampler.gather(
                            output_pixel(shape, first + p), tap, slice.begin, slice.end, columns.get() + p * width);
                    }
                    for (const Segment& segment : slice.segments) {
                        const int64_t at = segment.begin - slice.begin;
                        gemm<true>(
                            segment.end - segment.begin, outputs, pixels, columns.get() + at, width,
                            packed.get() + (block * shape.groups + segment.group) * packed_size,
                            sums.get() + ((tap - first_tap) * width + at) * outputs, outputs, block > 0);
                    }
                }
            }
            for (int64_t c = slice.begin; c < slice.end; ++c) {
                scalar_t* target = grad_weight + (c / inputs * outputs * inputs + c % inputs) * taps;
                for (int64_t o = 0; o < outputs; ++o) {
                    for (int64_t tap = first_tap; tap < last_tap; ++tap) {
                        store(
                            target[o * inputs * taps + tap],
                            sums.get()[((tap - first_tap) * width + c - slice.begin) * outputs + o]);
                    }
                }
            }
        }
    });
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward_data_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm, bool need_input,
    bool need_sampling, bool /* deterministic: it always is */) {
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const DeformConvShape shape =
        check_deform_conv2d(input, offset, weight, std::nullopt, mask, offset_tangent, options);
    check_deform_grad_output("deform_conv2d_backward", grad_output, input, shape);
    const ScalarType dtype = input.scalar_type(), accum = accum_dtype(dtype);
    DeformGradients gradients = empty_deform_gradients(shape, input, offset, mask, accum, need_input, need_sampling);
    torch::stable::zero_(gradients.input);
    if (shape.channels == 0 || shape.out_channels == 0) {
        torch::stable::zero_(gradients.offset);
        torch::stable::zero_(gradients.mask);
    } else if (shape.batch > 0) {
        const Tensor source = to_contiguous(as_dtype(grad_output, accum), MemoryFormat::ChannelsLast);
        const Tensor dense_weight = to_contiguous(weight);
        dispatch_floating("deform_conv2d_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            const Sampler<scalar_t> sampler(shape, options, input, offset, mask, offset_tangent);
            deform_conv2d_backward_data<scalar_t>(
                sampler, data<real_t>(source), data<scalar_t>(dense_weight),
                need_input ? mutable_data<real_t>(gradients.input) : nullptr,
                need_sampling ? mutable_data<real_t>(gradients.offset) : nullptr,
                need_sampling && mask ? mutable_data<real_t>(gradients.mask) : nullptr);
        });
    }
    return finished_deform_gradients(gradients, input, offset, mask);
}

Tensor deform_conv2d_backward_weight_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm, int64_t group_channels,
    int64_t kernel_h, int64_t kernel_w) {
    const char* op = "deform_conv2d_backward";
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const auto checked = check_deform_grad_weight(
        op, grad_output, input, offset, mask, offset_tangent, options, group_channels, kernel_h, kernel_w);
    const DeformConvShape& shape = checked.first;
    Tensor grad_weight = checked.second;
    if (shape.batch == 0) {
        return torch::stable::zero_(grad_weight);
    }
    if (grad_weight.numel() == 0) {
        return grad_weight;
    }
    // One stride suffices for all pixels of an image if rows are adjacent, or if there is only one row or column.
    const int64_t row_stride = stride_of(grad_output, 2), column_stride = stride_of(grad_output, 3);
    const bool dense = shape.out_height == 1 || shape.out_width == 1 || row_stride == shape.out_width * column_stride;
    const Tensor source = dense ? grad_output : to_contiguous(grad_output, MemoryFormat::ChannelsLast);
    const int64_t pixel_stride = !dense ? shape.out_channels : shape.out_width > 1 ? column_stride : row_stride;
    dispatch_floating(op, input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const Sampler<scalar_t> sampler(shape, options, input, offset, mask, offset_tangent);
        deform_conv2d_backward_weight<scalar_t>(
            sampler, View4<scalar_t>(source), pixel_stride, mutable_data<scalar_t>(grad_weight));
    });
    return grad_weight;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("_deform_conv2d_backward_data", TORCH_BOX(&spatialflow::deform_conv2d_backward_data_cpu));
    library.impl("_deform_conv2d_backward_weight", TORCH_BOX(&spatialflow::deform_conv2d_backward_weight_cpu));
}
