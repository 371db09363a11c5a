// SPDX-License-Identifier: Apache-2.0
//
// Function versions for several instruction sets in one binary. SPATIALFLOW_CLONES is for functions whose loops the
// compiler vectorizes: the loader selects the best clone. SPATIALFLOW_AVX512 is for functions with AVX-512 intrinsics,
// which may be called only if has_avx512().
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SPATIALFLOW_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPATIALFLOW_CLONES
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SPATIALFLOW_AVX512 __attribute__((target("avx512f,avx512bw,popcnt")))

namespace spatialflow {
inline bool has_avx512() {
    static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    return is_supported;
}
}  // namespace spatialflow
#endif
