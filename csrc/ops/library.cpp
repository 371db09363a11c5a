// SPDX-License-Identifier: Apache-2.0
//
// Defines the operator namespaces. Each csrc/ops/<op>.cpp adds the schemas of its op. It also adds the argument checks
// of the op to spatialflow_checks, under the same name, for the fake kernels (spatialflow/ops/fake.py).
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY(spatialflow, library) { (void)library; }

STABLE_TORCH_LIBRARY(spatialflow_checks, library) { (void)library; }
