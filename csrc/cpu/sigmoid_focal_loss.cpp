// SPDX-License-Identifier: Apache-2.0
//
// Sigmoid focal loss on the CPU, from class indices without a one-hot target.
//
// A block of rows is processed in a buffer that stays in the L1 cache. The logits are copied, negated for the label's
// class, and replaced by f or a derivative (common/sigmoid_focal_loss.h). The element of the label's class is
// multiplied by the positive weight, negated for odd derivatives; all others are multiplied by the negative weight. The
// label `classes` means background. Rows with a label outside [0, classes] give zeros. Each block has a partial sum in
// double. The partial sums are added in order, so the total does not depend on the number of threads.
#include "ops/sigmoid_focal_loss.h"

#include <algorithm>
#include <type_traits>

#include "common/sigmoid_focal_loss.h"
#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/vector_math.h"

namespace spatialflow {
namespace {

constexpr int64_t kBlockElements = 2048;

struct FocalOptions {
    double gamma, positive_weight, negative_weight;

    FocalOptions(double gamma, double alpha)
        : gamma(gamma), positive_weight(alpha < 0 ? 1 : alpha), negative_weight(alpha < 0 ? 1 : 1 - alpha) {}
};

template <int order, typename real_t>
void focal_terms(real_t* values, int64_t count, real_t gamma) {
    int64_t i = 0;
    if constexpr (sizeof(real_t) == sizeof(float)) {
        for (; i + kLanes<real_t> <= count; i += kLanes<real_t>) {
            store_vector(values + i, focal_term<order, VectorMath>(load_vector(values + i), gamma));
        }
        if (i < count) {
            const int rest = static_cast<int>(count - i);
            store_partial(values + i, focal_term<order, VectorMath>(load_partial(values + i, rest), gamma), rest);
        }
    } else {
        for (; i < count; ++i) {
            values[i] = focal_term<order, ScalarMath>(values[i], gamma);
        }
    }
}

// Call work(block, first_row, row_count, values) for blocks of rows; `values` are f or a derivative, unweighted.
template <int order, typename scalar_t, typename Work>
void for_each_block(
    const scalar_t* logits,  // (rows, classes)
    const int64_t* labels,   // (rows)
    int64_t rows, int64_t classes, int64_t block_rows, double gamma, const Work& work) {
    using real_t = accum_t<scalar_t>;
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    const int64_t grain = std::max<int64_t>(1, 8 * kBlockElements / (block_rows * classes));
    parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        const Scratch<real_t> buffer(block_rows * classes);
        real_t* values = buffer.get();
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * block_rows, count = std::min(block_rows, rows - first);
            const scalar_t* source = logits + first * classes;
            const int64_t total = count * classes;
            int64_t i = 0;
            for (; i + kLanes<real_t> <= total; i += kLanes<real_t>) {
                store_vector(values + i, load_vector(source + i));
            }
            for (; i < total; ++i) {
                values[i] = load(source[i]);
            }
            for (int64_t row = 0; row < count; ++row) {
                const int64_t label = labels[first + row];
                if (label >= 0 && label < classes) {
                    values[row * classes + label] = -values[row * classes + label];
                }
            }
            focal_terms<order>(values, count * classes, static_cast<real_t>(gamma));
            work(block, first, count, values);
        }
    });
}

int64_t rows_per_block(int64_t classes) { return std::max<int64_t>(1, kBlockElements / classes); }

// Compute output = factor * the weighted loss or derivative. factor_t is double, for one factor for all elements, or a
// pointer to one scalar_t per element.
template <int order, typename scalar_t, typename factor_t>
void focal_elementwise(
    const scalar_t* logits, const int64_t* labels, factor_t factor, scalar_t* output, int64_t rows, int64_t classes,
    const FocalOptions& options) {
    using real_t = accum_t<scalar_t>;
    constexpr bool per_element = std::is_pointer_v<factor_t>;
    const real_t negative = static_cast<real_t>(options.negative_weight);
    const real_t positive = static_cast<real_t>(order % 2 ? -options.positive_weight : options.positive_weight);
    const auto work = [&](int64_t, int64_t first, int64_t count, const real_t* values) {
        scalar_t* target = output + first * classes;
        const auto scale = [&] {
            if constexpr (per_element) {
                return factor + first * classes;
            } else {
                return factor;
            }
        }();
        const int64_t total = count * classes;
        int64_t i = 0;
        if constexpr (per_element) {
            for (; i + kLanes<real_t> <= total; i += kLanes<real_t>) {
                store_vector(target + i, load_vector(values + i) * negative * load_vector(scale + i));
            }
            for (; i < total; ++i) {
                store(target[i], values[i] * negative * load(scale[i]));
            }
        } else {
            const real_t weight = negative * static_cast<real_t>(scale);
            for (; i + kLanes<real_t> <= total; i += kLanes<real_t>) {
                store_vector(target + i, load_vector(values + i) * weight);
            }
            for (; i < total; ++i) {
                store(target[i], values[i] * weight);
            }
        }
        for (int64_t row = 0; row < count; ++row) {
            const int64_t label = labels[first + row], at = row * classes + label;
            if (label >= 0 && label < classes) {
                if constexpr (per_element) {
                    store(target[at], values[at] * positive * load(scale[at]));
                } else {
                    store(target[at], values[at] * positive * static_cast<real_t>(scale));
                }
            } else if (label != classes) {
                std::memset(static_cast<void*>(target + row * classes), 0, sizeof(scalar_t) * classes);
            }
        }
    };
    for_each_block<order>(logits, labels, rows, classes, rows_per_block(classes), options.gamma, work);
}

template <typename scalar_t>
double focal_sum(
    const scalar_t* logits, const int64_t* labels, int64_t rows, int64_t classes, const FocalOptions& options) {
    using real_t = accum_t<scalar_t>;
    const int64_t block_rows = rows_per_block(classes);
    std::vector<double> sums(static_cast<size_t>((rows + block_rows - 1) / block_rows));
    const auto work = [&](int64_t block, int64_t first, int64_t count, real_t* values) {
        double positive = 0;
        for (int64_t row = 0; row < count; ++row) {
            const int64_t label = labels[first + row];
            if (label >= 0 && label < classes) {
                positive += values[row * classes + label];
                values[row * classes + label] = 0;
            } else if (label != classes) {
                std::fill(values + row * classes, values + (row + 1) * classes, real_t(0));
            }
        }
        Vector<real_t> lanes = {};
        const int64_t total = count * classes;
        int64_t i = 0;
        for (; i + kLanes<real_t> <= total; i += kLanes<real_t>) {
            lanes += load_vector(values + i);
        }
        double negative = 0;
        for (int lane = 0; lane < kLanes<real_t>; ++lane) {
            negative += lanes[lane];
        }
        for (; i < total; ++i) {
            negative += values[i];
        }
        sums[static_cast<size_t>(block)] = positive * options.positive_weight + negative * options.negative_weight;
    };
    for_each_block<0>(logits, labels, rows, classes, block_rows, options.gamma, work);
    double total = 0;
    for (double sum : sums) {
        total += sum;
    }
    return total;
}

Tensor sigmoid_focal_loss_cpu(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
    check_sigmoid_focal_loss(logits, labels, gamma, alpha);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    Tensor output = empty_like_sized(source, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
    if (output.numel() != 0) {
        dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            focal_elementwise<0>(
                data<scalar_t>(source), data<int64_t>(classes_of_rows), 1.0, mutable_data<scalar_t>(output),
                labels.numel(), logits.size(logits.dim() - 1), FocalOptions(gamma, alpha));
        });
    }
    return output;
}

Tensor sigmoid_focal_loss_sum_cpu(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
    check_sigmoid_focal_loss(logits, labels, gamma, alpha);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    double total = 0;
    if (logits.numel() != 0) {
        dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            total = focal_sum(
                data<scalar_t>(source), data<int64_t>(classes_of_rows), labels.numel(), logits.size(logits.dim() - 1),
                FocalOptions(gamma, alpha));
        });
    }
    const bool is_double = logits.scalar_type() == ScalarType::Double;
    Tensor result = empty_like_sized(logits, {}, is_double ? ScalarType::Double : ScalarType::Float);
    if (is_double) {
        *mutable_data<double>(result) = total;
    } else {  // torch's fill_ rejects a sum outside the range of float32
        *mutable_data<float>(result) = static_cast<float>(total);
    }
    return result;
}

Tensor sigmoid_focal_loss_derivative_cpu(
    const Tensor& factor, const Tensor& logits, const Tensor& labels, double gamma, double alpha, int64_t order) {
    check_sigmoid_focal_loss_derivative(factor, logits, labels, gamma, alpha, order);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    Tensor output = empty_like_sized(source, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
    if (output.numel() == 0) {
        return output;
    }
    dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const auto run = [&](auto factors) {
            const auto kernel = order == 1 ? focal_elementwise<1, scalar_t, decltype(factors)>
                                           : focal_elementwise<2, scalar_t, decltype(factors)>;
            kernel(
                data<scalar_t>(source), data<int64_t>(classes_of_rows), factors, mutable_data<scalar_t>(output),
                labels.numel(), logits.size(logits.dim() - 1), FocalOptions(gamma, alpha));
        };
        if (factor.dim() == 0) {  // gradient of a sum, which is float32 or float64 and must not be rounded to 16 bits
            run(*data<double>(contiguous_as(factor, ScalarType::Double)));
        } else {
            const Tensor dense_factor = contiguous_as(factor, logits.scalar_type());
            run(data<scalar_t>(dense_factor));
        }
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("sigmoid_focal_loss", TORCH_BOX(&spatialflow::sigmoid_focal_loss_cpu));
    library.impl("_sigmoid_focal_loss_sum", TORCH_BOX(&spatialflow::sigmoid_focal_loss_sum_cpu));
    library.impl("_sigmoid_focal_loss_derivative", TORCH_BOX(&spatialflow::sigmoid_focal_loss_derivative_cpu));
}
