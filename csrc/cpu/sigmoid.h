// SPDX-License-Identifier: Apache-2.0
//
// Logistic function of an array.
#pragma once

#include "common/sigmoid.h"
#include "cpu/vector_math.h"

namespace spatialflow {

template <typename scalar_t>
inline void write_sigmoid(const scalar_t* logits, accum_t<scalar_t>* result, int64_t count) {
    int64_t i = 0;
    if constexpr (sizeof(accum_t<scalar_t>) == sizeof(float)) {
        for (; i + kLanes<float> <= count; i += kLanes<float>) {
            store_vector(result + i, sigmoid<float, VectorMath>(load_vector(logits + i)));
        }
        if (i < count) {
            const int rest = static_cast<int>(count - i);
            store_partial(result + i, sigmoid<float, VectorMath>(load_partial(logits + i, rest)), rest);
        }
    } else {
        for (; i < count; ++i) {
            result[i] = sigmoid<double, ScalarMath>(logits[i]);
        }
    }
}

}  // namespace spatialflow
