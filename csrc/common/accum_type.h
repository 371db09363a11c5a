// SPDX-License-Identifier: Apache-2.0
//
// Types of arithmetic on features, shared by CPU and CUDA: double for double, otherwise float.
#pragma once

namespace spatialflow {

template <typename scalar_t>
struct AccumType {
    using type = float;
};
template <>
struct AccumType<double> {
    using type = double;
};
template <typename scalar_t>
using accum_t = typename AccumType<scalar_t>::type;

}  // namespace spatialflow
