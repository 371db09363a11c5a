// SPDX-License-Identifier: Apache-2.0
//
// Gradient of flow_conv2d with respect to its weights, over all levels:
//
//   grad_weight[o, c, tap] = sum over levels, images, pixels p of grad_output[p, o] * (x + flow)[p + tap, c]
//
// The gradient with respect to x and flow is flow_conv2d with rotated weights. Both algorithms process chunks: they
// transform a chunk of inputs and of gradients, then add the product of the two to blocks of the result. The order of
// these sums does not depend on the number of threads. Winograd is the transpose of the forward pass. Let V = B^T d B
// and D = A dY A^T for each tile. The gradient of the transformed weights is the sum of V^T D over tiles. These are 36
// matrix products; the transform by G^T and G gives nine taps. The direct algorithm computes one product per tap and
// row of pixels.
#include "cpu/conv3x3_direct.h"
#include "cpu/conv3x3_tensors.h"
#include "cpu/winograd.h"

namespace spatialflow {
namespace {

constexpr int64_t kChunkTiles = 128;    // Winograd tiles per chunk
constexpr int64_t kTaskTiles = 8;       // tiles that a task transforms
constexpr int64_t kChunkPixels = 1024;  // minimum output pixels per chunk of the direct algorithm, except the last
constexpr int64_t kTaskInputs = 4 * kGemmRows;  // input channels per block of the result

template <typename scalar_t>
struct WeightGradient {
    int64_t in_channels, out_channels;
    std::vector<ConvLevel<scalar_t>> levels;
    std::vector<const scalar_t*> gradients;  // per level (N, H, W, C_out)
    scalar_t* out;                           // (C_out, C_in, 3, 3)

    int64_t slices() const { return (in_channels + kTaskInputs - 1) / kTaskInputs; }
};

// Compute A dY A^T of one tile; product f of channels [c, c + kColumns) goes to products[f * product_stride + c *
// tiles].
template <typename scalar_t>
void transform_gradient(
    const scalar_t* gradient, int64_t height, int64_t width, int64_t channels, const WinogradTile& tile, int64_t tiles,
    accum_t<scalar_t>* products, int64_t product_stride) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    const scalar_t* first = gradient + ((tile.image * height + tile.y) * width + tile.x) * channels;
    const int64_t rows = std::min<int64_t>(kWinogradOutput, height - tile.y);
    const int64_t columns = std::min<int64_t>(kWinogradOutput, width - tile.x);
    for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto&) {
        Vector<real_t> half[6][4] = {}, line[4], result[6];
        for (int64_t j = 0; j < columns; ++j) {
            for (int64_t i = 0; i < 4; ++i) {
                line[i] = i < rows ? load(first + (i * width + j) * channels + c) : Vector<real_t>{};
            }
            winograd_output_transposed(line, result);
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                half[i][j] = result[i];
            }
        }
        real_t* target = products + c / kColumns * kColumns * tiles + c % kColumns;
        for (int i = 0; i < 6; ++i) {
            winograd_output_transposed(half[i], result);
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) {
                store_vector(target + (6 * i + j) * product_stride, result[j]);
            }
        }
    });
}

template <typename scalar_t>
void weight_gradient_winograd(const WeightGradient<scalar_t>& problem) {
    constexpr int64_t kColumns = kGemmColumns<float>;
    WinogradTiles tiles;
    for (const ConvLevel<scalar_t>& level : problem.levels) {
        tiles.add_level(level.batch, level.height, level.width);
    }
    const int64_t columns = gemm_padded_columns(problem.out_channels);
    const int64_t in_row = padded_row(problem.in_channels), in_stride = kChunkTiles * in_row + 16;
    const int64_t gradient_stride = kChunkTiles * columns + 16, sum_stride = problem.in_channels * columns;
    Scratch<float> inputs(kWinogradProducts * in_stride);           // (36, tiles, C_in)
    Scratch<float> gradients(kWinogradProducts * gradient_stride);  // (36, panel, tiles, kColumns)
    Scratch<float> sums(kWinogradProducts * sum_stride);            // (36, C_in, C_out)
    const std::vector<scalar_t> zeros(static_cast<size_t>(problem.in_channels));
    for (int64_t begin = 0; begin < tiles.count(); begin += kChunkTiles) {
        const int64_t count = std::min(kChunkTiles, tiles.count() - begin);
        const int64_t transforms = count * 512 * (problem.in_channels + columns);
        run_tasks((count + kTaskTiles - 1) / kTaskTiles, transforms, [&](int64_t task, int64_t) {
            for (int64_t t = task * kTaskTiles; t < std::min(count, (task + 1) * kTaskTiles); ++t) {
                const WinogradTile tile = tiles[begin + t];
                const size_t l = static_cast<size_t>(tile.level);
                const ConvLevel<scalar_t>& level = problem.levels[l];
                transform_input(level, problem.in_channels, tile, zeros.data(), inputs.get() + t * in_row, in_stride);
                transform_gradient(
                    problem.gradients[l], level.height, level.width, problem.out_channels, tile, count,
                    gradients.get() + t * kColumns, gradient_stride);
            }
        });
        run_tasks(
            kWinogradProducts * problem.slices(), kWinogradProducts * count * sum_stride, [&](int64_t task, int64_t) {
                const int64_t f = task / problem.slices(), first = task % problem.slices() * kTaskInputs;
                gemm<true>(
                    std::min(kTaskInputs, problem.in_channels - first), problem.out_channels, count,
                    inputs.get() + f * in_stride + first, in_row, gradients.get() + f * gradient_stride,
                    sums.get() + f * sum_stride + first * columns, columns, begin > 0);
            });
    }
    run_tasks(problem.in_channels, 256 * sum_stride, [&](int64_t c, int64_t) {
        for (int64_t o = 0; o < problem.out_channels; ++o) {
            double half[3][6], line[6], result[3];
            for (int j = 0; j < 6; ++j) {
                for (int i = 0; i < 6; ++i) {
                    line[i] = double(sums.get()[(6 * i + j) * sum_stride + c * columns + o]);
                }
                winograd_weight_transposed(line, result);
                for (int i = 0; i < 3; ++i) {
                    half[i][j] = result[i];
                }
            }
            scalar_t* target = problem.out + (o * problem.in_channels + c) * 9;
            for (int i = 0; i < 3; ++i) {
                winograd_weight_transposed(half[i], result);
                for (int j = 0; j < 3; ++j) {
                    store(target[3 * i + j], static_cast<accum_t<scalar_t>>(result[j]));
                }
            }
        }
    });
}

// Pack the gradients of a strip as one matrix per row of pixels: (row, panel, column, kColumns).
template <typename scalar_t>
void pack_gradient_strip(
    const scalar_t* gradient, const ConvLevel<scalar_t>& level, const ConvStrip& strip, int64_t channels,
    accum_t<scalar_t>* packed) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    const int64_t width = strip.x_end - strip.x_begin;
    for (int64_t y = strip.y_begin; y < strip.y_end; ++y, packed += gemm_packed_size(width, channels)) {
        const scalar_t* row = gradient + ((strip.image * level.height + y) * level.width + strip.x_begin) * channels;
        for (int64_t x = 0; x < width; ++x) {
            for_channel_vectors<real_t>(channels, [&](int64_t c, const auto& load, const auto&) {
                store_vector(
                    packed + (c / kColumns * width + x) * kColumns + c % kColumns, load(row + x * channels + c));
            });
        }
    }
}

template <typename scalar_t>
void weight_gradient_direct(const WeightGradient<scalar_t>& problem) {
    using real_t = accum_t<scalar_t>;
    std::vector<ConvStrip> strips;
    for (size_t l = 0; l < problem.levels.size(); ++l) {
        const ConvLevel<scalar_t>& level = problem.levels[l];
        append_strips(0, l, level.batch, level.height, level.width, kStripPixels, strips);
    }
    // Form chunks of consecutive strips with about kChunkPixels pixels, and compute the offsets of each strip's copies
    // within its chunk.
    const int64_t in_row = padded_row(problem.in_channels), columns = gemm_padded_columns(problem.out_channels);
    std::vector<size_t> chunk_end;
    std::vector<int64_t> input_offset, gradient_offset;
    int64_t inputs_size = 0, gradients_size = 0;
    for (size_t begin = 0; begin < strips.size(); begin = chunk_end.back()) {
        int64_t pixels = 0, inputs_end = 0, gradients_end = 0;
        size_t s = begin;
        for (; s < strips.size() && pixels < kChunkPixels; ++s) {
            const ConvStrip& strip = strips[s];
            const int64_t strip_pixels = (strip.y_end - strip.y_begin) * (strip.x_end - strip.x_begin);
            input_offset.push_back(inputs_end);
            gradient_offset.push_back(gradients_end);
            pixels += strip_pixels;
            inputs_end += strip.padded_pixels() * in_row;
            gradients_end += strip_pixels * columns;
        }
        chunk_end.push_back(s);
        inputs_size = std::max(inputs_size, inputs_end);
        gradients_size = std::max(gradients_size, gradients_end);
    }
    const int64_t sum_stride = problem.in_channels * columns;
    Scratch<real_t> inputs(inputs_size), gradients(gradients_size), sums(9 * sum_stride);
    std::fill(sums.get(), sums.get() + 9 * sum_stride, real_t(0));
    size_t begin = 0;
    for (const size_t end : chunk_end) {
        run_tasks(static_cast<int64_t>(end - begin), 8 * (inputs_size + gradients_size), [&](int64_t task, int64_t) {
            const size_t s = begin + static_cast<size_t>(task), l = strips[s].level;
            copy_strip(problem.levels[l], strips[s], problem.in_channels, inputs.get() + input_offset[s]);
            pack_gradient_strip(
                problem.gradients[l], problem.levels[l], strips[s], problem.out_channels,
                gradients.get() + gradient_offset[s]);
        });
        run_tasks(9 * problem.slices(), gradients_size * 9 * problem.in_channels, [&](int64_t task, int64_t) {
            const int64_t tap = task / problem.slices(), first = task % problem.slices() * kTaskInputs;
            for (size_t s = begin; s < end; ++s) {
                const ConvStrip& strip = strips[s];
                const int64_t width = strip.x_end - strip.x_begin;
                for (int64_t y = 0; y < strip.y_end - strip.y_begin; ++y) {
                    gemm<true>(
                        std::min(kTaskInputs, problem.in_channels - first), problem.out_channels, width,
                        inputs.get() + input_offset[s] + ((y + tap / 3) * strip.padded_width() + tap % 3) * in_row +
                            first,
                        in_row, gradients.get() + gradient_offset[s] + y * width * columns,
                        sums.get() + tap * sum_stride + first * columns, columns, true);
                }
            }
        });
        begin = end;
    }
    run_tasks(problem.in_channels, 32 * sum_stride, [&](int64_t c, int64_t) {
        for (int64_t o = 0; o < problem.out_channels; ++o) {
            for (int64_t tap = 0; tap < 9; ++tap) {
                store(
                    problem.out[(o * problem.in_channels + c) * 9 + tap],
                    sums.get()[tap * sum_stride + c * columns + o]);
            }
        }
    });
}

Tensor weight_gradient_cpu(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t algorithm) {
    check_conv_weight_gradient(x, flow, grad_output, algorithm);
    const int64_t in_channels = x[0].size(1), out_channels = grad_output[0].size(1);
    Tensor out = empty_like_sized(x[0], {out_channels, in_channels, 3, 3});
    const std::vector<Tensor> dense_x = channels_last(x), dense_flow = channels_last(flow),
                              dense_grad = channels_last(grad_output);
    int64_t pixels = 0;
    for (const Tensor& level : x) {
        pixels += level.size(0) * level.size(2) * level.size(3);
    }
    if (out.numel() == 0 || pixels == 0) {
        return torch::stable::zero_(out);
    }
    const int64_t resolved =
        resolve_algorithm(algorithm, x[0].scalar_type() == ScalarType::Double, in_channels, out_channels);
    dispatch_floating("flow_conv2d_weight_gradient", x[0].scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        WeightGradient<scalar_t> problem = {
            in_channels, out_channels, conv_levels<scalar_t>(dense_x, dense_flow), {}, mutable_data<scalar_t>(out)};
        for (const Tensor& level : dense_grad) {
            problem.gradients.push_back(data<scalar_t>(level));
        }
        if constexpr (!std::is_same_v<scalar_t, double>) {
            if (resolved == kConvWinograd) {
                return weight_gradient_winograd(problem);
            }
        }
        weight_gradient_direct(problem);
    });
    return out;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("_flow_conv2d_weight_gradient", TORCH_BOX(&spatialflow::weight_gradient_cpu));
}
