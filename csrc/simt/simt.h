// SPDX-License-Identifier: Apache-2.0
//
// SIMT interpreter: CUDA kernels as plain C++, run on a CPU with checked accesses. csrc/cuda/platform.h includes it if
// the compiler is not nvcc. docs/simt.md lists the faults that it reports and those that it cannot detect.
#pragma once

#include "common/scalar.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/memory.h"
#include "simt/sm90.h"
