// SPDX-License-Identifier: Apache-2.0
//
// exp for the functions of common/ that take it as a parameter: the accurate one of the CUDA library.
#pragma once

#include <cmath>

#include "cuda/platform.h"

namespace spatialflow {

struct DeviceExp {
    template <typename real_t>
    static __device__ __forceinline__ real_t exp(real_t x) {
        return std::exp(x);
    }
};

}  // namespace spatialflow
