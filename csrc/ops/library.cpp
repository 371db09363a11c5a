// SPDX-License-Identifier: Apache-2.0
//
// Operator namespaces. Each csrc/ops/<op>.cpp adds the schemas of its operator to `spatialflow`. It adds the argument
// checks under the same name to `spatialflow_checks`, for the fake kernels (spatialflow/ops/fake.py).
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY(spatialflow, library) { (void)library; }

STABLE_TORCH_LIBRARY(spatialflow_checks, library) { (void)library; }
