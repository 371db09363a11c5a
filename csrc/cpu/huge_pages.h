// SPDX-License-Identifier: Apache-2.0
//
// Huge pages for large results. A result of megabytes is newly mapped memory, with a page fault at the first write to
// each page of 4 KiB. With pages of 2 MiB there are 512 times fewer page faults. Measured for 1000 RoIs of 14x14x256
// (200 MB) in a virtual machine: 147 ms with small pages, 50 ms with huge pages.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spatialflow {

// Advise the system to use huge pages for memory that is about to be written. If the system refuses, nothing changes.
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
