// SPDX-License-Identifier: Apache-2.0
//
// Winograd's minimal filtering F(4, 3) in one dimension, shared by CPU and CUDA: four outputs of a three-tap
// convolution from six products instead of twelve. Nested in two dimensions, it computes a 4x4 output tile of a 3x3
// convolution from a 6x6 input tile. This takes 36 products per pair of channels instead of 144:
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A        (Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, 2015)
//
// The interpolation points are 0, +-5/8, +-3/2 and infinity. All elements of B and A are exact in binary, and pairs +-p
// share their even and odd parts. The error is a quarter of that of the usual points 0, +-1, +-2: 2.5e-6 of the largest
// output instead of 9.4e-6 (256 channels, float32).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPATIALFLOW_INLINE __host__ __device__ __forceinline__
#else
#define SPATIALFLOW_INLINE __attribute__((always_inline)) inline
#endif

namespace spatialflow {

constexpr int kWinogradOutput = 4;  // output pixels per tile and axis
constexpr int kWinogradInput = 6;   // input pixels per tile and axis
constexpr int kWinogradProducts = kWinogradInput * kWinogradInput;

// Powers and sums of the points p and q in the transforms.
constexpr float kP = 0.625f, kP2 = kP * kP, kP3 = kP2 * kP;
constexpr float kQ = 1.5f, kQ2 = kQ * kQ, kQ3 = kQ2 * kQ;
constexpr float kP2PlusQ2 = kP2 + kQ2, kP2Q2 = kP2 * kQ2;

// to = B^T from. `value_t` is a scalar or a vector.
template <typename value_t>
SPATIALFLOW_INLINE void winograd_input(const value_t (&from)[6], value_t (&to)[6]) {
    const value_t even_p = from[4] - kQ2 * from[2], odd_p = kP * (from[3] - kQ2 * from[1]);
    const value_t even_q = from[4] - kP2 * from[2], odd_q = kQ * (from[3] - kP2 * from[1]);
    to[0] = kP2Q2 * from[0] - kP2PlusQ2 * from[2] + from[4];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = kP2Q2 * from[1] - kP2PlusQ2 * from[3] + from[5];
}

// to = A^T from.
template <typename value_t>
SPATIALFLOW_INLINE void winograd_output(const value_t (&from)[6], value_t (&to)[4]) {
    const value_t even_p = from[1] + from[2], odd_p = from[1] - from[2];
    const value_t even_q = from[3] + from[4], odd_q = from[3] - from[4];
    to[0] = from[0] + even_p + even_q;
    to[1] = kP * odd_p + kQ * odd_q;
    to[2] = kP2 * even_p + kQ2 * even_q;
    to[3] = kP3 * odd_p + kQ3 * odd_q + from[5];
}

// to = A from, the transpose of winograd_output: transforms a gradient of outputs to a gradient of products.
template <typename value_t>
SPATIALFLOW_INLINE void winograd_output_transposed(const value_t (&from)[4], value_t (&to)[6]) {
    const value_t even_p = from[0] + kP2 * from[2], odd_p = kP * from[1] + kP3 * from[3];
    const value_t even_q = from[0] + kQ2 * from[2], odd_q = kQ * from[1] + kQ3 * from[3];
    to[0] = from[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = from[3];
}

// Rows of G: 1 / (p^2 q^2); (1, +-p, p^2) / (2 p^2 (p^2 - q^2)); the same for q; and 1 for the point at infinity.
constexpr double kGZero = 1.0 / (double(kP2) * double(kQ2));
constexpr double kGP = 1.0 / (2.0 * double(kP2) * (double(kP2) - double(kQ2)));
constexpr double kGQ = 1.0 / (2.0 * double(kQ2) * (double(kQ2) - double(kP2)));

// to = G from.
template <typename value_t>
SPATIALFLOW_INLINE void winograd_weight(const value_t (&from)[3], value_t (&to)[6]) {
    const value_t even_p = kGP * from[0] + (kGP * double(kP2)) * from[2], odd_p = (kGP * double(kP)) * from[1];
    const value_t even_q = kGQ * from[0] + (kGQ * double(kQ2)) * from[2], odd_q = (kGQ * double(kQ)) * from[1];
    to[0] = kGZero * from[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = from[2];
}

// to = G^T from: transforms a gradient of transformed weights to a gradient of weights.
template <typename value_t>
SPATIALFLOW_INLINE void winograd_weight_transposed(const value_t (&from)[6], value_t (&to)[3]) {
    const value_t even_p = from[1] + from[2], odd_p = from[1] - from[2];
    const value_t even_q = from[3] + from[4], odd_q = from[3] - from[4];
    to[0] = kGZero * from[0] + kGP * even_p + kGQ * even_q;
    to[1] = (kGP * double(kP)) * odd_p + (kGQ * double(kQ)) * odd_q;
    to[2] = (kGP * double(kP2)) * even_p + (kGQ * double(kQ2)) * even_q + from[5];
}

}  // namespace spatialflow
