// SPDX-License-Identifier: Apache-2.0
//
// Defines the namespaces; each csrc/ops/<op>.cpp adds the schemas of its op, and to spatialflow_checks under the same
// name what refuses its arguments: fake kernels, which have no kernel's code, ask that (spatialflow/ops/fake.py).
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY(spatialflow, library) { (void)library; }

STABLE_TORCH_LIBRARY(spatialflow_checks, library) { (void)library; }
