// SPDX-License-Identifier: Apache-2.0
//
// Large results on large pages. A result of megabytes is a fresh mapping, and the kernel is interrupted once for
// every 4 KiB that it writes first; with 2 MiB pages that is once in 512 times. Measured for 1000 RoIs of 14x14x256
// (200 MB) in a virtual machine: 147 ms with small pages, 50 ms with large ones.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spatialflow {

// Asks for large pages behind memory that is about to be written. Advice: where it is refused nothing changes.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kHugePage - 1);
    if (end > begin) {
        (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace spatialflow
