// SPDX-License-Identifier: Apache-2.0
//
// Typed pointers to the elements of a tensor. The SIMT interpreter has bounds-checked versions (cuda/launch.h).
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

template <typename scalar_t>
inline const scalar_t* data(const Tensor& tensor) {
    return static_cast<const scalar_t*>(tensor.const_data_ptr());
}

template <typename scalar_t>
inline scalar_t* mutable_data(const Tensor& tensor) {
    return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

}  // namespace spatialflow
