// SPDX-License-Identifier: Apache-2.0
//
// The SIMT interpreter: CUDA kernels as plain C++, run on a CPU and watched. Included by csrc/cuda/platform.h where
// there is no nvcc; docs/simt.md says what it reports and what it cannot.
#pragma once

#include "common/scalar.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/memory.h"
#include "simt/sm90.h"
