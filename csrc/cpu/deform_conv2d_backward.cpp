// SPDX-License-Identifier: Apache-2.0
//
// Gradients of deformable convolution on the CPU, deterministic without atomics.
//
// Data (input, offset, mask): a task is a slice of channels of an image. For a block of pixels the gradient of the
// columns is grad_output x weight of the slice. Per tap, products of this gradient with the four cells of the sample
// give the gradients of offset and mask. The same pass adds the weighted gradient to the four cells of grad_input,
// which no other task writes. All slices contribute to the gradients of offset and mask; their parts are added in
// order.
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

// Channels [begin, end) that a task computes, as the segments of the weight groups.
struct Slice {
    int64_t begin, end;
    std::vector<Segment> segments;
};

// Split the channels into at most `count` slices of whole vectors. Set `packed_size` to the length of the packed
// weights of all slices.
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

// Compute the sampling gradients of one tap of one pixel over channels [c_begin, c_begin + count). Add this tap's part
// of the input gradient to grad_input (one image, channels-last; null: not requested). Contributions outside the map
// are added to `discarded`.
template <typename scalar_t, typename real_t>
SamplingGradient<real_t> scatter_tap(
    const Sampler<scalar_t>& sampler, const OutputPixel& pixel, int64_t offset_group, int64_t tap_index,
    const real_t* grad_columns,  // (count)
    int64_t c_begin, int64_t count, real_t* grad_input, real_t* discarded) {
    SamplingGradient<real_t> result{};
    typename Sampler<scalar_t>::Tap tap;
    if (!sampler.tap(pixel, offset_group, tap_index, tap)) {
        return result;
    }
    const scalar_t* corner[4];
    real_t* grad_cell[4];
    real_t weight[4], dot[4], slope_y[4], slope_x[4];
    for (int i = 0; i < 4; ++i) {
        corner[i] = tap.corner[i] + c_begin;
        weight[i] = tap.mask * tap.value[i];
        grad_cell[i] =
            tap.cell[i] < 0 || !grad_input ? discarded : grad_input + tap.cell[i] * sampler.shape().channels + c_begin;
    }
    scatter_channels(grad_columns, corner, weight, grad_input ? grad_cell : nullptr, count, dot);
    sampler.slopes(pixel, offset_group, tap_index, tap, slope_y, slope_x);
    for (int i = 0; i < 4; ++i) {
        result.y += tap.mask * slope_y[i] * dot[i];
        result.x += tap.mask * slope_x[i] * dot[i];
        result.mask += tap.value[i] * dot[i];
    }
    return result;
}

// Partial sampling gradients. Each pair of a slice and an offset group with common channels has one per image, pixel
// and tap. Slices and offset groups are in ascending order of channels, so slice + offset group is a unique index of
// such a pair.
template <typename real_t>
class PartialGradients {
public:
    PartialGradients(const DeformConvShape& shape, int64_t num_slices, bool requested)
        : pixels_(shape.batch * shape.pixels()),
          taps_(shape.taps()),
          partials_(requested ? (num_slices + shape.offset_groups - 1) * pixels_ * taps_ : 0) {}

    // `pixel` is an index among the output pixels of all images.
    SamplingGradient<real_t>& at(int64_t slice, int64_t offset_group, int64_t pixel, int64_t tap) const {
        return partials_.get()[((slice + offset_group) * pixels_ + pixel) * taps_ + tap];
    }

private:
    int64_t pixels_, taps_;
    Scratch<SamplingGradient<real_t>> partials_;
};

// Arguments of the data gradients.
template <typename scalar_t>
struct DataGradient {
    using real_t = accum_t<scalar_t>;

    const Sampler<scalar_t>& sampler;
    const real_t* grad_output;  // (N, H_out, W_out, O)
    const scalar_t* weight;     // (O, C / groups, taps)
    real_t* grad_input;         // (N, H, W, C), zero on entry; null: not requested
    real_t* grad_offset;        // (N, 2 * offset_groups * taps, H_out, W_out); null: not requested
    real_t* grad_mask;          // (N, offset_groups * taps, H_out, W_out) or null
};

// Pack the weights of all segments and taps.
template <typename scalar_t>
void pack_slices(
    const DeformConvShape& shape, const std::vector<Slice>& slices, const scalar_t* weight, accum_t<scalar_t>* packed) {
    const int64_t taps = shape.taps(), outputs = shape.group_outputs(), inputs = shape.group_channels();
    parallel_for(0, static_cast<int64_t>(slices.size()) * taps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (const Segment& segment : slices[static_cast<size_t>(i / taps)].segments) {
                const int64_t tap = i % taps, width = segment.end - segment.begin;
                gemm_pack(
                    weight + (segment.group * outputs * inputs + segment.begin % inputs) * taps + tap, inputs * taps,
                    taps, outputs, width, packed + segment.packed + tap * gemm_packed_size(outputs, width));
            }
        }
    });
}

// Add the gradients of the columns of one tap and `count` pixels to grad_input of an image, and write their partial
// sampling gradients. `pixel` is the index of the first pixel among the output pixels of all images.
template <typename scalar_t>
void scatter_columns(
    const DataGradient<scalar_t>& problem, const Slice& slice, int64_t slice_index, int64_t pixel, int64_t count,
    int64_t tap,
    const accum_t<scalar_t>* columns,  // (count, channels of the slice)
    accum_t<scalar_t>* grad_input, accum_t<scalar_t>* discarded, const PartialGradients<accum_t<scalar_t>>& partials) {
    const DeformConvShape& shape = problem.sampler.shape();
    const int64_t group_channels = shape.offset_group_channels(), width = slice.end - slice.begin;
    for (int64_t p = 0; p < count; ++p) {
        const OutputPixel output = output_pixel(shape, pixel + p);
        for (int64_t c = slice.begin; c < slice.end;) {
            const int64_t group = c / group_channels;
            const int64_t size = std::min(slice.end, (group + 1) * group_channels) - c;
            const auto gradient = scatter_tap(
                problem.sampler, output, group, tap, columns + p * width + (c - slice.begin), c, size, grad_input,
                discarded);
            if (problem.grad_offset) {
                partials.at(slice_index, group, pixel + p, tap) = gradient;
            }
            c += size;
        }
    }
}

// Compute the data gradients of a slice of channels of an image.
template <typename scalar_t>
void backward_slice(
    const DataGradient<scalar_t>& problem, const Slice& slice, int64_t slice_index, int64_t image,
    const accum_t<scalar_t>* packed,  // see pack_slices
    const PartialGradients<accum_t<scalar_t>>& partials) {
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = problem.sampler.shape();
    const int64_t outputs = shape.group_outputs(), pixels = shape.pixels(), width = slice.end - slice.begin;
    const int64_t block = std::clamp<int64_t>(kColumnValues / width, kGemmRows, kMaxBlockPixels);
    const Scratch<real_t> columns(block * width);
    const Scratch<real_t> discarded(width);  // sum of contributions outside the map
    std::fill_n(discarded.get(), width, real_t(0));
    real_t* grad_input =
        problem.grad_input ? problem.grad_input + image * shape.height * shape.width * shape.channels : nullptr;
    for (int64_t first = 0; first < pixels; first += block) {
        const int64_t count = std::min(block, pixels - first);
        const real_t* source = problem.grad_output + (image * pixels + first) * shape.out_channels;
        for (int64_t tap = 0; tap < shape.taps(); ++tap) {
            for (const Segment& segment : slice.segments) {
                const int64_t size = segment.end - segment.begin;
                gemm(
                    count, size, outputs, source + segment.group * outputs, shape.out_channels,
                    packed + segment.packed + tap * gemm_packed_size(outputs, size),
                    columns.get() + (segment.begin - slice.begin), width);
            }
            scatter_columns(
                problem, slice, slice_index, image * pixels + first, count, tap, columns.get(), grad_input,
                discarded.get(), partials);
        }
    }
}

// Add the partial gradients of a sample, in order of the slices.
template <typename real_t>
SamplingGradient<real_t> sum_partials(
    const PartialGradients<real_t>& partials, const std::vector<Slice>& slices, const DeformConvShape& shape,
    int64_t offset_group, int64_t pixel, int64_t tap) {
    const int64_t begin = offset_group * shape.offset_group_channels(), end = begin + shape.offset_group_channels();
    SamplingGradient<real_t> sum{};
    for (size_t s = 0; s < slices.size(); ++s) {
        if (slices[s].begin < end && slices[s].end > begin) {
            const SamplingGradient<real_t>& partial = partials.at(static_cast<int64_t>(s), offset_group, pixel, tap);
            sum.y += partial.y;
            sum.x += partial.x;
            sum.mask += partial.mask;
        }
    }
    return sum;
}

template <typename scalar_t>
void deform_conv2d_backward_data(const DataGradient<scalar_t>& problem) {
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = problem.sampler.shape();
    const int64_t taps = shape.taps(), pixels = shape.pixels();
    int64_t packed_size = 0;
    const std::vector<Slice> slices =
        channel_slices(shape, kLanes<real_t>, (num_threads() + shape.batch - 1) / shape.batch, packed_size);
    const int64_t num_slices = static_cast<int64_t>(slices.size());
    const Scratch<real_t> packed(packed_size);
    pack_slices(shape, slices, problem.weight, packed.get());
    const PartialGradients<real_t> partials(shape, num_slices, problem.grad_offset != nullptr);
    parallel_for(0, shape.batch * num_slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t slice = task % num_slices;
            backward_slice(
                problem, slices[static_cast<size_t>(slice)], slice, task / num_slices, packed.get(), partials);
        }
    });
    if (!problem.grad_offset) {
        return;
    }
    parallel_for(0, shape.batch * shape.offset_groups * taps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t tap = i % taps, group = i / taps % shape.offset_groups;
            const int64_t image = i / (taps * shape.offset_groups);
            real_t* target_y = problem.grad_offset + 2 * i * pixels;
            real_t* target_x = target_y + pixels;
            for (int64_t p = 0; p < pixels; ++p) {
                const SamplingGradient<real_t> sum =
                    sum_partials(partials, slices, shape, group, image * pixels + p, tap);
                target_y[p] = sum.y;
                target_x[p] = sum.x;
                if (problem.grad_mask) {
                    problem.grad_mask[i * pixels + p] = sum.mask;
                }
            }
        }
    });
}

// grad_output packed as one matrix (pixels, outputs) per block of pixels and weight group. A block is a range of at
// most kWeightBlock pixels of an image.
template <typename scalar_t>
class PackedGradient {
public:
    using real_t = accum_t<scalar_t>;

    PackedGradient(
        const DeformConvShape& shape,
        const View4<scalar_t>& grad_output,  // (N, O, H_out, W_out)
        int64_t pixel_stride)                // between successive pixels of an image of grad_output, across rows too
        : shape_(shape),
          image_blocks_((shape.pixels() + kWeightBlock - 1) / kWeightBlock),
          size_(gemm_packed_size(kWeightBlock, shape.group_outputs())),
          packed_(blocks() * shape.groups * size_) {
        const int64_t outputs = shape.group_outputs();
        parallel_for(0, blocks() * shape.groups, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t block = i / shape.groups, group = i % shape.groups;
                const int64_t image = block / image_blocks_, first = block % image_blocks_ * kWeightBlock;
                gemm_pack(
                    grad_output.data + image * grad_output.stride[0] + first * pixel_stride +
                        group * outputs * grad_output.stride[1],
                    pixel_stride, grad_output.stride[1], pixels(block), outputs, packed_.get() + i * size_);
            }
        });
    }

    int64_t blocks() const { return shape_.batch * image_blocks_; }
    // First pixel of a block, among the output pixels of all images.
    int64_t first_pixel(int64_t block) const {
        return block / image_blocks_ * shape_.pixels() + block % image_blocks_ * kWeightBlock;
    }
    int64_t pixels(int64_t block) const {
        return std::min(kWeightBlock, shape_.pixels() - block % image_blocks_ * kWeightBlock);
    }
    const real_t* matrix(int64_t block, int64_t group) const {
        return packed_.get() + (block * shape_.groups + group) * size_;
    }

private:
    const DeformConvShape& shape_;
    int64_t image_blocks_, size_;
    Scratch<real_t> packed_;
};

// Compute the weight gradient of taps [first_tap, last_tap) for a slice of channels.
template <typename scalar_t>
void backward_weight_slice(
    const Sampler<scalar_t>& sampler, const PackedGradient<scalar_t>& grad_output, const Slice& slice,
    int64_t first_tap, int64_t last_tap,
    scalar_t* grad_weight) {  // (O, C / groups, taps)
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = sampler.shape();
    const int64_t taps = shape.taps(), inputs = shape.group_channels(), outputs = shape.group_outputs();
    const int64_t width = slice.end - slice.begin;
    const Scratch<real_t> columns(kWeightBlock * width);
    const Scratch<real_t> sums((last_tap - first_tap) * width * outputs);  // (tap, channel, output)
    for (int64_t block = 0; block < grad_output.blocks(); ++block) {
        const int64_t first = grad_output.first_pixel(block), pixels = grad_output.pixels(block);
        for (int64_t tap = first_tap; tap < last_tap; ++tap) {
            for (int64_t p = 0; p < pixels; ++p) {
                sampler.gather(output_pixel(shape, first + p), tap, slice.begin, slice.end, columns.get() + p * width);
            }
            for (const Segment& segment : slice.segments) {
                const int64_t channel = segment.begin - slice.begin;
                gemm<true>(
                    segment.end - segment.begin, outputs, pixels, columns.get() + channel, width,
                    grad_output.matrix(block, segment.group),
                    sums.get() + ((tap - first_tap) * width + channel) * outputs, outputs, block > 0);
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

template <typename scalar_t>
void deform_conv2d_backward_weight(
    const Sampler<scalar_t>& sampler,
    const View4<scalar_t>& grad_output,  // (N, O, H_out, W_out)
    int64_t pixel_stride,                // between successive pixels of an image of grad_output, across rows too
    scalar_t* grad_weight) {             // (O, C / groups, taps)
    const DeformConvShape& shape = sampler.shape();
    const int64_t taps = shape.taps();
    const PackedGradient<scalar_t> packed(shape, grad_output, pixel_stride);

    const int64_t slice_count =
        std::max((shape.channels + kWeightChannels - 1) / kWeightChannels, (4 * num_threads() + taps - 1) / taps);
    int64_t unused = 0;
    const std::vector<Slice> slices = channel_slices(shape, kLanes<accum_t<scalar_t>>, slice_count, unused);
    const int64_t num_slices = static_cast<int64_t>(slices.size());
    // With few outputs per group (many groups) a task takes several taps, to read grad_output less often.
    const int64_t tap_sums = (shape.channels + num_slices - 1) / num_slices * shape.group_outputs();
    const int64_t task_taps =
        std::clamp<int64_t>(std::min(kWeightSums / tap_sums, taps * num_slices / (4 * num_threads())), 1, taps);
    const int64_t tap_tasks = (taps + task_taps - 1) / task_taps;
    parallel_for(0, tap_tasks * num_slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first_tap = task / num_slices * task_taps;
            backward_weight_slice(
                sampler, packed, slices[static_cast<size_t>(task % num_slices)], first_tap,
                std::min(taps, first_tap + task_taps), grad_weight);
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
                {sampler, data<real_t>(source), data<scalar_t>(dense_weight),
                 need_input ? mutable_data<real_t>(gradients.input) : nullptr,
                 need_sampling ? mutable_data<real_t>(gradients.offset) : nullptr,
                 need_sampling && mask ? mutable_data<real_t>(gradients.mask) : nullptr});
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
