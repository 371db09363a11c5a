// SPDX-License-Identifier: Apache-2.0
// One binary, several instruction sets: the loader picks the best clone of a marked function at run time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define SPATIALFLOW_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPATIALFLOW_CLONES
#endif
