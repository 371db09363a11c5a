// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution (v1, and v2 with a mask) on the CPU.
//
//   output[n, o, p] = bias[o] + sum over taps k and channels c of
//                     weight[o, c, k] * mask[n, k, p] * bilinear(input[n, c], position(p, k) + offset[n, k, p])
//
// The samples of several taps of a block of output pixels are gathered into columns (pixel, tap, channel). The columns
// are multiplied by the packed weight of these taps. The sums of a block stay in the L2 cache until all taps are added.
// Buffer sizes do not depend on the image size. Each thread computes a range of output pixels.
#include "cpu/deform_conv2d.h"

#include "cpu/gemm.h"

namespace spatialflow {
namespace {

// Number of values of the columns of a block. These 256 KiB of float leave space for the sums of the block in an L2
// cache of 1 MiB.
constexpr int64_t kColumnValues = 64 * 1024;
constexpr int64_t kDepth = kGemmDepth;  // maximum taps * channels of a group in one product of several taps
constexpr int64_t kMaxBlockPixels = 16 * kGemmRows;
constexpr int64_t kPackedColumns = kGemmColumns<float>;  // see packed_tag

// Compute C = sum over taps t of A_t * B_t, or C += the sum if `accumulate`. A_t (m, k) starts at a + t * a_tap, the
// packed B_t (k, n) at packed + t * packed_tap.
template <typename real_t>
void multiply_taps(
    int64_t m, int64_t n, int64_t k, int64_t taps, const real_t* a, int64_t a_stride, int64_t a_tap,
    const real_t* packed, int64_t packed_tap, real_t* c, int64_t c_stride, bool accumulate) {
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    for (int64_t first = 0; first < n; first += kColumns) {
        const int64_t valid = std::min(kColumns, n - first);
        for_row_blocks(m, [&](int64_t row, int64_t rows) {
            with_rows(rows, [&](auto count) {
                constexpr int kRows = decltype(count)::value;
                GemmTile<kRows, real_t> tile = {};
                for (int64_t t = 0; t < taps; ++t) {
                    multiply_tile<kRows, false>(
                        a + row * a_stride + t * a_tap, a_stride, packed + t * packed_tap + first * k, k, tile);
                }
                store_tile<kRows>(tile, c + row * c_stride + first, c_stride, valid, accumulate);
            });
        });
    }
}

// Add bias to the sums of a block, apply ReLU if kRelu, and store them in the dtype and layout of the output.
template <bool kRelu, typename scalar_t, typename real_t>
void store_block(
    const real_t* sums,  // (pixels, O), row stride `stride`
    int64_t stride,
    const real_t* bias,  // (O)
    scalar_t* output,    // (N, H_out, W_out, O) or, if channels_first, (N, O, H_out, W_out)
    const DeformConvShape& shape, int64_t first_pixel, int64_t pixels, bool channels_first) {
    const int64_t outputs = shape.out_channels;
    const auto result = [](auto value) {
        if constexpr (kRelu) {
            value = value < decltype(value){} ? decltype(value){} : value;  // NaN stays NaN
        }
        return value;
    };
    if (!channels_first) {
        for (int64_t p = 0; p < pixels; ++p) {
            const real_t* row = sums + p * stride;
            scalar_t* target = output + (first_pixel + p) * outputs;
            int64_t o = 0;
            for (; o + kLanes<real_t> <= outputs; o += kLanes<real_t>) {
                store_vector(target + o, result(load_vector(row + o) + load_vector(bias + o)));
            }
            for (; o < outputs; ++o) {
                store(target[o], result(row[o] + bias[o]));
            }
        }
        return;
    }
    for (int64_t p = 0; p < pixels;) {
        const int64_t image = (first_pixel + p) / shape.pixels();
        const int64_t count = std::min(pixels - p, (image + 1) * shape.pixels() - (first_pixel + p));
        scalar_t* target = output + image * outputs * shape.pixels() + (first_pixel + p) % shape.pixels();
        for (int64_t o = 0; o < outputs; ++o) {
            for (int64_t i = 0; i < count; ++i) {
                store(target[o * shape.pixels() + i], result(sums[(p + i) * stride + o] + bias[o]));
            }
        }
        p += count;
    }
}

// Length of a weight packed per group and tap, (inputs, outputs) each.
int64_t packed_weight_size(const DeformConvShape& shape) {
    return shape.groups * shape.taps() * gemm_packed_size(shape.group_channels(), shape.group_outputs());
}

template <typename scalar_t>
void pack_weight(
    const DeformConvShape& shape,
    const scalar_t* weight,  // (O, C / groups, taps)
    accum_t<scalar_t>* packed) {
    const int64_t taps = shape.taps(), inputs = shape.group_channels(), outputs = shape.group_outputs();
    const int64_t packed_tap = gemm_packed_size(inputs, outputs);
    if (packed_tap == 0) {
        return;
    }
    parallel_for(0, shape.groups * taps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const scalar_t* source = weight + i / taps * outputs * inputs * taps + i % taps;
            gemm_pack(source, taps, inputs * taps, inputs, outputs, packed + i * packed_tap);
        }
    });
}

// Gather the columns (pixel, tap, channel) of taps [tap, tap + count) for a block of output pixels. `row` is the stride
// between pixels.
template <typename scalar_t>
void gather_block(
    const Sampler<scalar_t>& sampler, int64_t first_pixel, int64_t pixels, int64_t tap, int64_t count, int64_t row,
    accum_t<scalar_t>* columns) {
    const int64_t channels = sampler.shape().channels;
    for (int64_t p = 0; p < pixels; ++p) {
        const OutputPixel at = output_pixel(sampler.shape(), first_pixel + p);
        for (int64_t k = 0; k < count; ++k) {
            sampler.gather(at, tap + k, 0, channels, columns + p * row + k * channels);
        }
    }
}

template <bool kRelu, typename scalar_t>
void deform_conv2d_forward(
    const Sampler<scalar_t>& sampler,
    const accum_t<scalar_t>* packed,  // see pack_weight
    const scalar_t* bias,             // (O) or null
    scalar_t* output, bool channels_first) {
    using real_t = accum_t<scalar_t>;
    const DeformConvShape& shape = sampler.shape();
    const int64_t channels = shape.channels;
    const int64_t taps = channels > 0 ? shape.taps() : 1;  // without channels, a single tap sets the sums to zero
    const int64_t inputs = shape.group_channels(), outputs = shape.group_outputs();
    const int64_t packed_tap = gemm_packed_size(inputs, outputs);
    const Scratch<real_t> accum_bias(shape.out_channels);
    for (int64_t o = 0; o < shape.out_channels; ++o) {
        accum_bias.get()[o] = bias ? load(bias[o]) : real_t(0);
    }

    const int64_t chunk_taps = std::min(taps, std::max<int64_t>(1, kDepth / std::max<int64_t>(inputs, 1)));
    const int64_t row = chunk_taps * channels;
    const int64_t block = std::clamp<int64_t>(kColumnValues / std::max<int64_t>(row, 1), kGemmRows, kMaxBlockPixels);
    parallel_for(0, shape.batch * shape.pixels(), kGemmRows, [&](int64_t begin, int64_t end) {
        const Scratch<real_t> columns(block * row);
        const Scratch<real_t> sums(block * shape.out_channels);
        // Use blocks of equal size, so that the last one is not small.
        const int64_t blocks = (end - begin + block - 1) / block;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = begin + b * (end - begin) / blocks;
            const int64_t pixels = begin + (b + 1) * (end - begin) / blocks - first;
            for (int64_t tap = 0; tap < taps; tap += chunk_taps) {
                const int64_t count = std::min(chunk_taps, taps - tap);
                gather_block(sampler, first, pixels, tap, count, row, columns.get());
                for (int64_t group = 0; group < shape.groups; ++group) {
                    multiply_taps(
                        pixels, outputs, inputs, count, columns.get() + group * inputs, row, channels,
                        packed + (group * taps + tap) * packed_tap, packed_tap, sums.get() + group * outputs,
                        shape.out_channels, tap > 0);
                }
            }
            store_block<kRelu>(
                sums.get(), shape.out_channels, accum_bias.get(), output, shape, first, pixels, channels_first);
        }
    });
}

// Compute the output for checked arguments. `packed(zero)` returns the packed weight, as a Scratch or a PackedView.
template <typename Packed>
Tensor convolve(
    const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent,
    const Packed& packed) {
    const MemoryFormat format = memory_format_of(input);
    Tensor output = empty_like_sized(
        input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    const std::optional<Tensor> dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
    dispatch_floating("deform_conv2d", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const Sampler<scalar_t> sampler(shape, options, input, offset, mask, offset_tangent);
        const auto& weight = packed(zero);
        const auto run = options.relu ? deform_conv2d_forward<true, scalar_t> : deform_conv2d_forward<false, scalar_t>;
        run(sampler, weight.get(), dense_bias ? data<scalar_t>(*dense_bias) : nullptr, mutable_data<scalar_t>(output),
            format == MemoryFormat::Contiguous);
    });
    return output;
}

Tensor deform_conv2d_cpu(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm) {
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const DeformConvShape shape = check_deform_conv2d(input, offset, weight, bias, mask, offset_tangent, options);
    const Tensor dense = to_contiguous(weight);
    return convolve(shape, options, input, offset, bias, mask, offset_tangent, [&](auto zero) {
        using scalar_t = decltype(zero);
        Scratch<accum_t<scalar_t>> packed(packed_weight_size(shape));
        pack_weight(shape, data<scalar_t>(dense), packed.get());
        return packed;
    });
}

Tensor pack_deform_conv2d_cpu(const Tensor& weight, int64_t groups, int64_t offset_groups, int64_t algorithm) {
    const DeformConvShape shape = check_pack_deform_conv2d(weight, groups, offset_groups, algorithm);
    const ScalarType dtype = accum_dtype(weight.scalar_type());
    const int64_t size = packed_weight_size(shape), tag = packed_tag(kPackedColumns, dtype == ScalarType::Double);
    Tensor packed = empty_like_sized(weight, {size + tag}, dtype);
    const Tensor dense = to_contiguous(weight);
    dispatch_floating("pack_deform_conv2d", weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        real_t* values = mutable_data<real_t>(packed);
        pack_weight(shape, data<scalar_t>(dense), values);
        std::fill(values + size, values + size + tag, real_t(0));
    });
    return packed;
}

// Pointer to the values of a packed weight, with the interface of Scratch.
template <typename real_t>
struct PackedView {
    const real_t* values;
    const real_t* get() const { return values; }
};

Tensor deform_conv2d_packed_cpu(
    const Tensor& input, const Tensor& offset, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, int64_t algorithm, int64_t out_channels, int64_t groups,
    int64_t offset_groups, int64_t kernel_h, int64_t kernel_w, bool mask_sigmoid, bool relu) {
    const DeformConvOptions options{
        {stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm, mask_sigmoid, relu};
    const DeformConvShape shape = check_deform_conv2d_packed(
        input, offset, bias, mask, options, {out_channels, groups, offset_groups, kernel_h, kernel_w});
    check_packed_deform_weight(
        packed, input, accum_dtype(input.scalar_type()), packed_weight_size(shape), kPackedColumns);
    return convolve(shape, options, input, offset, bias, mask, std::nullopt, [&](auto zero) {
        using real_t = accum_t<decltype(zero)>;
        return PackedView<real_t>{data<real_t>(packed)};
    });
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("deform_conv2d", TORCH_BOX(&spatialflow::deform_conv2d_cpu));
    library.impl("_pack_deform_conv2d", TORCH_BOX(&spatialflow::pack_deform_conv2d_cpu));
    library.impl("_deform_conv2d_packed", TORCH_BOX(&spatialflow::deform_conv2d_packed_cpu));
}
