// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory of kernels: uninitialised, aligned to cache lines so that no vector straddles two.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace spatialflow {

template <typename value_t>
class Buffer {
public:
    explicit Buffer(int64_t count)
        : memory_(static_cast<value_t*>(
              ::operator new(sizeof(value_t) * static_cast<size_t>(count), std::align_val_t(kAlignment)))) {}

    value_t* data() const { return memory_.get(); }

private:
    static constexpr size_t kAlignment = 64;
    struct Free {
        void operator()(value_t* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
    };
    std::unique_ptr<value_t, Free> memory_;
};

}  // namespace spatialflow
