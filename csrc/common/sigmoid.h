// SPDX-License-Identifier: Apache-2.0
//
// Logistic function of a scalar or of a vector.
#pragma once

#include "common/host_device.h"

namespace spatialflow {

// 1 / (1 + exp(-logit)); NaN gives NaN. value_t is a scalar or a vector; Math::exp(x) is called for x <= 0.
template <typename real_t, typename Math, typename value_t>
SPATIALFLOW_HOST_DEVICE value_t sigmoid(value_t logit) {
    const value_t zero = value_t{}, one = zero + real_t(1);
    const value_t small = Math::exp(logit > zero ? -logit : logit);
    const value_t result = (logit > zero ? one : small) / (one + small);
    return logit == logit ? result : logit;  // the vector version of exp does not propagate NaN
}

}  // namespace spatialflow
