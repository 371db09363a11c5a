// SPDX-License-Identifier: Apache-2.0
//
// Defines the namespace; each csrc/ops/<op>.cpp adds the schemas of its op.
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY(spatialflow, library) {
    (void)library;
}
