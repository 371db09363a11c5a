// SPDX-License-Identifier: Apache-2.0
//
// exp and log1p on the ranges that losses need: polynomials for vectors of floats, the standard library for scalars.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace spatialflow {

struct ScalarMath {
    template <typename real_t>
    static real_t exp(real_t x) {
        return std::exp(x);
    }
    template <typename real_t>
    static real_t log1p(real_t x) {
        return std::log1p(x);
    }
};

struct VectorMath {
    // exp(x) for x <= 0, with an error of about one unit in the last place; 0 for x < -87.3. Let x = n ln 2 + r with
    // |r| <= ln 2 / 2. The polynomial is the Taylor series of exp(r) up to r^7, with an error below 6e-9.
    static Vector<float> exp(Vector<float> x) {
        typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
        const Vector<float> lowest = broadcast(-87.3f);
        const Vector<float> bounded = x > lowest ? x : lowest;
        // Adding and subtracting 1.5 * 2^23 rounds to an integer.
        const Vector<float> shifted = bounded * 1.44269504f + 12582912.0f;
        const Vector<float> n = shifted - 12582912.0f;
        const Vector<float> r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
        Vector<float> p = r * (1.0f / 5040) + 1.0f / 720;
        p = p * r + 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r + 1.0f / 6;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
        const Vector<float> result = p * bit_cast<Vector<float>>(exponent);
        return x < lowest ? Vector<float>{} : result;
    }

    // log1p(x) for 0 <= x <= 1, as 2 atanh(s) with s = x / (2 + x) <= 1/3, by its series up to s^15.
    static Vector<float> log1p(Vector<float> x) {
        const Vector<float> s = x / (x + 2.0f), q = s * s;
        Vector<float> p = q * (1.0f / 15) + 1.0f / 13;
        p = p * q + 1.0f / 11;
        p = p * q + 1.0f / 9;
        p = p * q + 1.0f / 7;
        p = p * q + 1.0f / 5;
        p = p * q + 1.0f / 3;
        return 2.0f * s + 2.0f * s * q * p;
    }
};

}  // namespace spatialflow
