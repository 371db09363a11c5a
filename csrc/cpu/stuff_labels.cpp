// SPDX-License-Identifier: Apache-2.0
//
// Best class of every pixel, from logits at a quarter of the network's input size, on the CPU:
//
//   output[y, x] = argmax_c bilinear(logits[c], y, x), the first such class; NaN is never the best
//
// logits (C, h, w) of any strides, output (H, W). A task copies each row of the logits that it needs to one row per
// class. The two rows adjacent to a row of the output stay in the cache and are interpolated for the whole row. Then
// the loop over classes keeps the best values and classes of a vector of pixels in registers. Per class, two loads and
// two permutations fetch the cells left and right of these pixels.
//
// Tasks are ranges of rows of the output. Multiply-adds are not fused, so labels are equal on all instruction sets and
// back ends.
#include "common/stuff_labels.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/row_pair.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "ops/stuff_labels.h"

namespace spatialflow {
namespace {

// Integer type as wide as real_t, the type of comparison results and permutation indices.
template <typename real_t>
using index_t = std::conditional_t<sizeof(real_t) == 8, int64_t, int32_t>;
template <typename real_t>
using Indices = Vector<index_t<real_t>>;

template <typename real_t>
constexpr bool kHasPermutation = false;
#if defined(__AVX2__)
template <>
constexpr bool kHasPermutation<float> = true;

// Return values[at[lane]] for every lane.
inline Vector<float> permute(Vector<float> values, Vector<int32_t> at) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps(bit_cast<__m512i>(at), values);
#else
    return _mm256_permutevar8x32_ps(values, bit_cast<__m256i>(at));
#endif
}
#endif

// Block of adjacent pixels of a row, one per lane.
template <typename real_t>
struct PixelBlock {
    int64_t first_cell;
    bool is_dense;         // all lanes lie between cells first_cell and first_cell + kLanes, and `permute` exists
    Indices<real_t> cell;  // first of the two cells of a pixel, relative to first_cell
    Vector<real_t> weight;
};

template <typename real_t>
std::vector<PixelBlock<real_t>> pixel_blocks(const LabelAxis& axis) {
    constexpr int64_t kWidth = kLanes<real_t>;
    std::vector<PixelBlock<real_t>> blocks(static_cast<size_t>((axis.pixels + kWidth - 1) / kWidth));
    int64_t pixel = 0;
    for (PixelBlock<real_t>& block : blocks) {
        block.first_cell = axis.tap(pixel).first;
        for (int lane = 0; lane < kWidth; ++lane, ++pixel) {
            const LabelTap tap = axis.tap(std::min(pixel, axis.pixels - 1));
            block.cell[lane] = static_cast<index_t<real_t>>(tap.first - block.first_cell);
            block.weight[lane] = tap.weight;
        }
        block.is_dense = kHasPermutation<real_t> && block.cell[kWidth - 1] < kWidth;
    }
    return blocks;
}

template <bool kIsDense, typename real_t>
inline Vector<real_t> fetch(const real_t* cells, Indices<real_t> at) {
    if constexpr (kIsDense && kHasPermutation<real_t>) {
        return permute(load_vector(cells), at);
    } else {
        Vector<real_t> values;
        for (int lane = 0; lane < kLanes<real_t>; ++lane) {
            values[lane] = cells[at[lane]];
        }
        return values;
    }
}

template <bool kIsDense, typename real_t>
inline Indices<real_t> best_classes(
    const real_t* cells,  // (classes, stride)
    int64_t stride, int64_t classes, const PixelBlock<real_t>& block) {
    const Indices<real_t> at = block.cell;
    const Vector<real_t> weight = block.weight;
    Vector<real_t> best = broadcast(-std::numeric_limits<real_t>::infinity());
    Indices<real_t> label{};
    cells += block.first_cell;
    for (index_t<real_t> c = 0; c < classes; ++c, cells += stride) {
        const Vector<real_t> left = fetch<kIsDense>(cells, at), right = fetch<kIsDense>(cells + 1, at);
        const Vector<real_t> value = left + weight * (right - left);
        label = value > best ? broadcast(c) : label;
        best = value > best ? value : best;
    }
    return label;
}

template <typename scalar_t>
class Logits {
public:
    using real_t = accum_t<scalar_t>;

    Logits(const Tensor& logits, const LabelAxis& columns)
        : classes(logits.size(0)),
          cells(columns.tap(columns.pixels - 1).first + 1),
          stride((cells + kLanes<real_t> + kLanes<real_t>) / kLanes<real_t> * kLanes<real_t>),
          data_(data<scalar_t>(logits)),
          class_stride_(stride_of(logits, 0)),
          row_stride_(stride_of(logits, 1)),
          column_stride_(stride_of(logits, 2)),
          has_next_(cells < columns.cells) {}

    // Copy row `y` to one row per class, (classes, stride). Each row also has the cell after the last one, and space
    // for reading a vector at the last cell.
    void fetch_row(int64_t y, real_t* row) const {
        const scalar_t* source = data_ + y * row_stride_;
        const int64_t count = cells + has_next_;
        // If classes are adjacent, copy a few cells at a time, which stay in the L1 cache.
        const int64_t tile = class_stride_ < column_stride_ ? kLanes<real_t> : count;
        for (int64_t begin = 0; begin < count; begin += tile) {
            const int64_t end = std::min(begin + tile, count);
            for (int64_t c = 0; c < classes; ++c) {
                const scalar_t* values = source + c * class_stride_;
                for (int64_t x = begin; x < end; ++x) {
                    row[c * stride + x] = load(values[x * column_stride_]);
                }
            }
        }
        for (int64_t c = 0; c < classes; ++c) {
            std::fill(row + c * stride + count, row + (c + 1) * stride, row[c * stride + count - 1]);
        }
    }

    const int64_t classes, cells, stride;

private:
    const scalar_t* data_;
    int64_t class_stride_, row_stride_, column_stride_;
    bool has_next_;
};

template <typename scalar_t, typename label_t>
void label_rows(const Tensor& input, const LabelAxis& rows, const LabelAxis& columns, label_t* output) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t kWidth = kLanes<real_t>;
    const Logits<scalar_t> logits(input, columns);
    const std::vector<PixelBlock<real_t>> blocks = pixel_blocks<real_t>(columns);
    const int64_t elements = logits.classes * logits.stride;
    const int64_t grain = std::max<int64_t>(1, 16384 / (logits.classes * columns.pixels));
    parallel_for(0, rows.pixels, grain, [&](int64_t begin, int64_t end) {
        const Scratch<real_t> memory(2 * elements), blended(elements);
        RowPair<real_t> fetched(memory.get(), elements);
        const auto fetch = [&](int64_t y, real_t* row) { logits.fetch_row(y, row); };
        for (int64_t y = begin; y < end; ++y) {
            const LabelTap tap = rows.tap(y);
            const real_t* upper = fetched.row(tap.first, fetch);
            const real_t* lower = fetched.row(tap.second, fetch);
            const Vector<real_t> weight = broadcast(static_cast<real_t>(tap.weight));
            for (int64_t i = 0; i < elements; i += kWidth) {
                const Vector<real_t> above = load_vector(upper + i);
                store_vector(blended.get() + i, above + weight * (load_vector(lower + i) - above));
            }
            label_t* target = output + y * columns.pixels;
            int64_t x = 0;
            for (const PixelBlock<real_t>& block : blocks) {
                const Indices<real_t> label =
                    block.is_dense ? best_classes<true>(blended.get(), logits.stride, logits.classes, block)
                                   : best_classes<false>(blended.get(), logits.stride, logits.classes, block);
                const int64_t count = std::min(kWidth, columns.pixels - x);
                for (int64_t lane = 0; lane < count; ++lane) {
                    target[x++] = static_cast<label_t>(label[lane]);
                }
            }
        }
    });
}

Tensor stuff_labels_cpu(
    const Tensor& logits, int64_t valid_height, int64_t valid_width, int64_t height, int64_t width) {
    check_stuff_labels(logits, valid_height, valid_width, height, width);
    Tensor output = empty_labels(logits, height, width);
    if (output.numel() == 0) {
        return output;
    }
    const LabelAxis rows(logits.size(1), valid_height, height), columns(logits.size(2), valid_width, width);
    dispatch_floating("stuff_labels", logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        if (output.scalar_type() == ScalarType::Byte) {
            label_rows<scalar_t>(logits, rows, columns, mutable_data<uint8_t>(output));
        } else {
            label_rows<scalar_t>(logits, rows, columns, mutable_data<int64_t>(output));
        }
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("stuff_labels", TORCH_BOX(&spatialflow::stuff_labels_cpu));
}
