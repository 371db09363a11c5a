// SPDX-License-Identifier: Apache-2.0
//
// Sigmoid focal loss on CUDA from class indices, without a one-hot target.
//
//   loss[r, c] = weight * f(z),  z = -logit for the label's class, +logit for the others (common/sigmoid_focal_loss.h)
//
// Logits (rows, classes), labels (rows). A vector of logits is in one row: 16 bytes if rows consist of aligned 16-byte
// vectors, else one logit. Every element is computed with z = +logit, as for a class other than the label's. Where a
// vector has the element of the label's class, a branch, which few warps take, replaces this element. For the sum, each
// block writes one double, and one more block adds these in a fixed order, so results are deterministic.
#include "ops/sigmoid_focal_loss.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "common/sigmoid_focal_loss.h"
#include "cuda/launch.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kTotalThreads = 1024;
// kSumVectors: vectors that a thread of the sum kernel loads before it uses the first. kSumBlocks: resident blocks of a
// multiprocessor. Registers limit both. A thread loads kSumVectors vectors kSumRounds times.
template <typename scalar_t>
constexpr int kSumVectors = sizeof(scalar_t) == sizeof(float) ? 4 : 2;
template <typename scalar_t>
constexpr int kSumBlocks = sizeof(scalar_t) == sizeof(double) ? 2 : 4;
constexpr int kSumRounds = 4, kElementwiseVectors = 2;

struct FocalOptions {
    int classes, row_vectors;  // row_vectors: vectors of a row
    int min_vectors;           // minimum number of vectors of a thread
    int64_t row_step;          // rows between vectors of a thread
    int64_t extra_rows;        // threads of the first `extra_rows` rows have one more vector
    double gamma, positive_weight, negative_weight;
};

// Factor of the results: none, one for all elements, or one for each element.
enum class Factor { kNone, kScalar, kElementwise };

// ---- device ------------------------------------------------------------------------------------------------------

// Fast functions for float. The relative error of exp is below 3e-7 + 8e-8 |x|, except that results below 2^-126 become
// zero. The relative error of log1p is below 4e-7.
struct DeviceMath {
    static __device__ __forceinline__ float exp(float x) {
        const float exponent = x * 1.44269504f;
#if defined(__CUDA_ARCH__)
        float result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
        return result;
#else
        return std::exp2(exponent);
#endif
    }
    // Evaluate the polynomial with the least maximum relative error on [0, 1].
    static __device__ __forceinline__ float log1p(float x) {
        constexpr float kCoefficients[] = {0.999999821f, -0.499974042f, 0.332754791f,  -0.244954631f,
                                           0.177452415f, -0.107681707f, 0.0440896265f, -0.00853920635f};
        float sum = kCoefficients[7];
#pragma unroll
        for (int power = 6; power >= 0; --power) {
            sum = sum * x + kCoefficients[power];
        }
        return sum * x;
    }
    static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
    static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
};

// Position of a thread's vectors: the same columns, in rows at a distance of row_step.
template <typename scalar_t, int kWidth>
struct FocalPlace {
    int64_t element, element_step;  // offset of the first element, and from one vector to the next
    int count, column;              // number of vectors; column of the first element
    Global<const int64_t> labels;   // from the first row on

    __device__ __forceinline__ FocalPlace(Global<const int64_t> all_labels, const FocalOptions& options)
        : labels(all_labels) {
        const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
        const int64_t row = index / options.row_vectors;
        element = index * kWidth;
        element_step = options.row_step * options.classes;
        count = row < options.row_step ? options.min_vectors + (row < options.extra_rows) : 0;
        column = static_cast<int>(index - row * options.row_vectors) * kWidth;
        labels = labels + row;
    }
};

template <typename scalar_t, int kWidth>
struct FocalVector {
    Vec<scalar_t, kWidth> logits;
    bool is_counted;  // the label is in [0, classes]; `classes` is background
    unsigned label;   // relative to the first element; at least kWidth if it is outside the vector

    __device__ __forceinline__ bool has_label() const { return label < kWidth; }
    // True if the row is counted and no element is of the label's class.
    __device__ __forceinline__ bool is_plain() const { return is_counted && !has_label(); }
};

// Load kVectors vectors of a thread, from its vector number `first` on. All loads are issued before the first use.
template <typename scalar_t, int kWidth, int kVectors>
__device__ __forceinline__ void load_focal_vectors(
    Global<const scalar_t> logits, const FocalPlace<scalar_t, kWidth>& place, const FocalOptions& options, int first,
    FocalVector<scalar_t, kWidth> (&vectors)[kVectors]) {
    Global<const scalar_t> vector_logits = logits + (place.element + first * place.element_step);
    Global<const int64_t> vector_labels = place.labels + first * options.row_step;
    int64_t labels[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        labels[v] = -1;
        if (first + v < place.count) {
            vectors[v].logits = load_vector<kWidth>(vector_logits);
            labels[v] = vector_labels[0];
        }
        vector_logits = vector_logits + place.element_step;
        vector_labels = vector_labels + options.row_step;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        vectors[v].is_counted = static_cast<uint64_t>(labels[v]) <= static_cast<uint64_t>(options.classes);
        vectors[v].label = static_cast<unsigned>(labels[v]) - static_cast<unsigned>(place.column);
    }
}

// Element at index `label` of a vector of logits or factors.
template <typename value_t, int kWidth>
__device__ __forceinline__ accum_t<value_t> at_label(const Vec<value_t, kWidth>& values, unsigned label) {
    value_t selected = values[0];
#pragma unroll
    for (unsigned i = 1; i < kWidth; ++i) {
        const value_t value = values[i];  // so that the next line selects a value, not an address
        selected = label == i ? value : selected;
    }
    return load(selected);
}

// output = factor * weight * focal_term
template <int order, typename scalar_t, typename factor_t, Factor kFactor, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) focal_elementwise_kernel(
    Global<const scalar_t> logits,   // (rows, classes)
    Global<const int64_t> labels,    // (rows)
    Global<const factor_t> factors,  // null, (1) or (rows, classes)
    Global<scalar_t> output,         // (rows, classes)
    const FocalOptions options) {
    using real_t = accum_t<scalar_t>;
    const FocalPlace<scalar_t, kWidth> place(labels, options);
    FocalVector<scalar_t, kWidth> vectors[kElementwiseVectors];
    load_focal_vectors(logits, place, options, 0, vectors);
    Vec<factor_t, kWidth> vector_factors[kElementwiseVectors];
    real_t positive_weight = static_cast<real_t>(order % 2 ? -options.positive_weight : options.positive_weight);
    real_t negative_weight = static_cast<real_t>(options.negative_weight);
    if constexpr (kFactor == Factor::kScalar) {
        const real_t factor = static_cast<real_t>(factors[0]);
        positive_weight *= factor;
        negative_weight *= factor;
    }
    if constexpr (kFactor == Factor::kElementwise) {
#pragma unroll
        for (int v = 0; v < kElementwiseVectors; ++v) {
            if (v < place.count) {
                vector_factors[v] = load_vector<kWidth>(factors + (place.element + v * place.element_step));
            }
        }
    }
    const auto compute = [&](int v, real_t gamma) {
        const FocalVector<scalar_t, kWidth>& vector = vectors[v];
        Vec<scalar_t, kWidth> results;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t z = load(vector.logits[i]);
            real_t result = negative_weight * focal_term<order, DeviceMath>(z, gamma);
            if constexpr (kFactor == Factor::kElementwise) {
                result *= load(vector_factors[v][i]);
            }
            store(results[i], result);
        }
        if (!vector.is_plain()) {
            real_t result = 0;
            if (vector.is_counted) {
                const real_t z = -at_label(vector.logits, vector.label);
                result = positive_weight * focal_term<order, DeviceMath>(z, gamma);
                if constexpr (kFactor == Factor::kElementwise) {
                    result *= at_label(vector_factors[v], vector.label);
                }
            }
            scalar_t stored;
            store(stored, result);
#pragma unroll
            for (unsigned i = 0; i < kWidth; ++i) {
                const scalar_t result_of_other = results[i];
                results[i] = !vector.is_counted || vector.label == i ? stored : result_of_other;
            }
        }
        return results;
    };
#pragma unroll
    for (int v = 0; v < kElementwiseVectors; ++v) {
        if (v < place.count) {
            store_vector(
                output + (place.element + v * place.element_step),
                options.gamma == 2 ? compute(v, real_t(2)) : compute(v, static_cast<real_t>(options.gamma)));
        }
    }
}

// Add the loss of some vectors, without weights: labels' classes to `positive`, other classes to `negative`.
template <typename scalar_t, int kWidth, int kVectors, typename real_t>
__device__ __forceinline__ void add_focal(
    FocalVector<scalar_t, kWidth> (&vectors)[kVectors], real_t gamma, real_t& positive, real_t& negative) {
    bool all_plain = true;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        all_plain &= vectors[v].is_plain();
    }
    if (!all_plain) {
        // Elements of the label's class and of vectors that are not counted become minus infinity, so they add zero.
        scalar_t excluded;
        store(excluded, -std::numeric_limits<real_t>::infinity());
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            FocalVector<scalar_t, kWidth>& vector = vectors[v];
            if (vector.is_counted && vector.has_label()) {
                positive += focal_term<0, DeviceMath>(-at_label(vector.logits, vector.label), gamma);
            }
#pragma unroll
            for (unsigned i = 0; i < kWidth; ++i) {
                const scalar_t logit = vector.logits[i];
                vector.logits[i] = !vector.is_counted || vector.label == i ? excluded : logit;
            }
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t z = load(vectors[v].logits[i]);
            negative += focal_term<0, DeviceMath>(z, gamma);
        }
    }
}

// Return the sum over the block, added in a fixed order, in all threads.
template <int kWarps>
__device__ __forceinline__ double block_sum(double value, Shared<double> of_warps) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value += __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(step));
    }
    if (threadIdx.x % kWarpSize == 0) {
        of_warps[threadIdx.x / kWarpSize] = value;
    }
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        total += of_warps[warp];
    }
    return total;
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, kSumBlocks<scalar_t>) focal_sum_kernel(
    Global<const scalar_t> logits, Global<const int64_t> labels,
    Global<double> sums,  // (blocks)
    const FocalOptions options) {
    using real_t = accum_t<scalar_t>;
    constexpr int kWarps = kThreads / kWarpSize;
    SPATIALFLOW_SHARED(double, of_warps, kWarps);
    const FocalPlace<scalar_t, kWidth> place(labels, options);
    double sum = 0;
    for (int first = 0; first < place.count; first += kSumVectors<scalar_t>) {
        FocalVector<scalar_t, kWidth> vectors[kSumVectors<scalar_t>];
        load_focal_vectors(logits, place, options, first, vectors);
        real_t positive = 0, negative = 0;
        if (options.gamma == 2) {
            add_focal(vectors, real_t(2), positive, negative);
        } else {
            add_focal(vectors, static_cast<real_t>(options.gamma), positive, negative);
        }
        sum += positive * options.positive_weight + negative * options.negative_weight;
    }
    const double total = block_sum<kWarps>(sum, of_warps);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = total;
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kTotalThreads)
    focal_total_kernel(Global<const double> sums, Global<real_t> result, const unsigned count) {
    constexpr int kWarps = kTotalThreads / kWarpSize;
    SPATIALFLOW_SHARED(double, of_warps, kWarps);
    double sum = 0;
    for (unsigned i = threadIdx.x; i < count; i += kTotalThreads) {
        sum += sums[i];
    }
    const double total = block_sum<kWarps>(sum, of_warps);
    if (threadIdx.x == 0) {
        result[0] = static_cast<real_t>(total);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Options for `vectors` vectors of `width` elements per thread.
FocalOptions options_of(const Tensor& logits, int64_t width, int64_t vectors, double gamma, double alpha) {
    const int64_t classes = logits.size(logits.dim() - 1), rows = logits.numel() / classes;
    check(classes <= 0x7fffffff, "sigmoid_focal_loss: at most 2147483647 classes on CUDA, got ", classes);
    const int64_t row_step = ceil_div(rows, vectors), min_vectors = rows / row_step;
    return {static_cast<int>(classes),     static_cast<int>(classes / width),
            static_cast<int>(min_vectors), row_step,
            rows - min_vectors * row_step, gamma,
            alpha < 0 ? 1 : alpha,         alpha < 0 ? 1 : 1 - alpha};
}

unsigned blocks_of(const FocalOptions& options) {
    return grid_size("sigmoid_focal_loss", ceil_div(options.row_step * options.row_vectors, kThreads));
}

// Call run(width) with the elements of a vector: 16 bytes if rows of all `tensors` consist of aligned 16-byte vectors,
// else one.
template <typename scalar_t, typename Run>
void dispatch_width(int64_t classes, std::initializer_list<const Tensor*> tensors, const Run& run) {
    constexpr int kWidth = kVectorElements<scalar_t>;
    const auto is_vectorizable = [](const Tensor* tensor) { return is_aligned(tensor->const_data_ptr(), 16); };
    if (classes % kWidth == 0 && std::all_of(tensors.begin(), tensors.end(), is_vectorizable)) {
        run(std::integral_constant<int, kWidth>{});
    } else {
        run(std::integral_constant<int, 1>{});
    }
}

template <int order, typename scalar_t, typename factor_t, Factor kFactor>
void launch_elementwise(
    const Tensor& logits, const Tensor& labels, const Tensor* factors, const Tensor& output, double gamma, double alpha,
    Stream stream) {
    const Tensor& each = kFactor == Factor::kElementwise ? *factors : logits;
    dispatch_width<scalar_t>(logits.size(logits.dim() - 1), {&logits, &each, &output}, [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const FocalOptions options = options_of(logits, kWidth, kElementwiseVectors, gamma, alpha);
        launch<focal_elementwise_kernel<order, scalar_t, factor_t, kFactor, kWidth>>(
            dim3(blocks_of(options)), dim3(kThreads), 0, stream, data<scalar_t>(logits), data<int64_t>(labels),
            factors ? data<factor_t>(*factors) : Global<const factor_t>(nullptr), mutable_data<scalar_t>(output),
            options);
    });
}

Tensor empty_like_logits(const Tensor& source) {
    return empty_like_sized(source, std::vector<int64_t>(source.sizes().begin(), source.sizes().end()));
}

Tensor sigmoid_focal_loss_cuda(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
    check_sigmoid_focal_loss(logits, labels, gamma, alpha);
    const DeviceScope device(logits);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    Tensor output = empty_like_logits(source);
    if (output.numel() != 0) {
        dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            launch_elementwise<0, scalar_t, scalar_t, Factor::kNone>(
                source, classes_of_rows, nullptr, output, gamma, alpha, device.stream());
        });
    }
    return output;
}

Tensor sigmoid_focal_loss_sum_cuda(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
    check_sigmoid_focal_loss(logits, labels, gamma, alpha);
    const DeviceScope device(logits);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    const bool is_double = logits.scalar_type() == ScalarType::Double;
    Tensor result = empty_like_sized(logits, {}, is_double ? ScalarType::Double : ScalarType::Float);
    if (logits.numel() == 0) {
        return torch::stable::zero_(result);
    }
    dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        dispatch_width<scalar_t>(source.size(source.dim() - 1), {&source}, [&](auto width) {
            constexpr int kWidth = decltype(width)::value;
            const FocalOptions options = options_of(source, kWidth, kSumRounds * kSumVectors<scalar_t>, gamma, alpha);
            const unsigned blocks = blocks_of(options);
            const Tensor sums = empty_like_sized(logits, {blocks}, ScalarType::Double);
            launch<focal_sum_kernel<scalar_t, kWidth>>(
                dim3(blocks), dim3(kThreads), 0, device.stream(), data<scalar_t>(source),
                data<int64_t>(classes_of_rows), mutable_data<double>(sums), options);
            launch<focal_total_kernel<accum_t<scalar_t>>>(
                dim3(1), dim3(kTotalThreads), 0, device.stream(), data<double>(sums),
                mutable_data<accum_t<scalar_t>>(result), blocks);
        });
    });
    return result;
}

Tensor sigmoid_focal_loss_derivative_cuda(
    const Tensor& factor, const Tensor& logits, const Tensor& labels, double gamma, double alpha, int64_t order) {
    check_sigmoid_focal_loss_derivative(factor, logits, labels, gamma, alpha, order);
    const DeviceScope device(logits);
    const Tensor source = to_contiguous(logits), classes_of_rows = contiguous_as(labels, ScalarType::Long);
    Tensor output = empty_like_logits(source);
    if (output.numel() == 0) {
        return output;
    }
    // A scalar factor is read as double, since 16-bit types would round it.
    const bool has_scalar_factor = factor.dim() == 0 && logits.dim() != 0;
    const Tensor factors = contiguous_as(factor, has_scalar_factor ? ScalarType::Double : logits.scalar_type());
    dispatch_floating("sigmoid_focal_loss", logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        const auto run = [&](auto order_constant) {
            constexpr int kOrder = decltype(order_constant)::value;
            const auto launch_derivative = has_scalar_factor
                                               ? launch_elementwise<kOrder, scalar_t, double, Factor::kScalar>
                                               : launch_elementwise<kOrder, scalar_t, scalar_t, Factor::kElementwise>;
            launch_derivative(source, classes_of_rows, &factors, output, gamma, alpha, device.stream());
        };
        order == 1 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("sigmoid_focal_loss", TORCH_BOX(&spatialflow::sigmoid_focal_loss_cuda));
    library.impl("_sigmoid_focal_loss_sum", TORCH_BOX(&spatialflow::sigmoid_focal_loss_sum_cuda));
    library.impl("_sigmoid_focal_loss_derivative", TORCH_BOX(&spatialflow::sigmoid_focal_loss_derivative_cuda));
}
