// SPDX-License-Identifier: Apache-2.0
//
// Accurate exp of the CUDA library, as a template argument for functions in csrc/common.
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
