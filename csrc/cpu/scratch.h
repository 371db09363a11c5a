// SPDX-License-Identifier: Apache-2.0
//
// Uninitialized scratch memory of kernels. It is aligned to cache lines, so that no vector crosses two lines. It is one
// line longer than requested, so that a whole vector can be read at the last element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace spatialflow {

template <typename value_t>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : memory_(
              static_cast<value_t*>(
                  ::operator new(sizeof(value_t) * static_cast<size_t>(count) + kLine, std::align_val_t(kLine)))) {}

    value_t* get() const { return memory_.get(); }

private:
    static constexpr size_t kLine = 64;
    struct Free {
        void operator()(value_t* memory) const { ::operator delete(memory, std::align_val_t(kLine)); }
    };
    std::unique_ptr<value_t, Free> memory_;
};

}  // namespace spatialflow
