// SPDX-License-Identifier: Apache-2.0
//
// Dtype dispatch and parallel loops of the CPU kernels.
#pragma once

#include <atomic>

#include "common/scalar.h"
#include "ops/dispatch.h"
#include "ops/tensor_data.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace spatialflow {

// Call body(scalar_t{}) with the C++ type of `dtype`: `[&](auto zero) { using scalar_t = decltype(zero); ... }`.
template <typename Body>
inline void dispatch_floating(const char* op, ScalarType dtype, Body&& body) {
    dispatch_floating_types<float16, bfloat16>(op, dtype, body);
}

// Annotations for ThreadSanitizer: all parts of a loop run after the code before the loop, and before the code after
// the loop. ThreadSanitizer cannot detect this order, because torch and its OpenMP are compiled without
// ThreadSanitizer. The parts of one loop stay unordered, so races between them are detected.
#if defined(__SANITIZE_THREAD__)
template <typename Body>
class Ordered {
public:
    explicit Ordered(const Body& body) : body_(body) { __tsan_release(&start_); }
    ~Ordered() { __tsan_acquire(&end_); }
    void operator()(int64_t begin, int64_t end) const {
        __tsan_acquire(&start_);
        const Part part{&end_};
        body_(begin, end);
    }

private:
    struct Part {
        void* end;
        ~Part() { __tsan_release(end); }  // also if the body throws
    };
    const Body& body_;
    mutable char start_ = 0, end_ = 0;
};
#else
template <typename Body>
using Ordered = const Body&;
#endif

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Whether this process, or one that it was forked from, has run a kernel on several threads. spatialflow/_library.py
// reads it after a fork.
extern "C" {
__attribute__((visibility("default"))) inline std::atomic<bool> spatialflow_threads_were_used{false};
}

// Call body(begin, end) for parts of [begin, end) on the threads of torch. A range of at most `grain` indices is one
// part, which runs in the calling thread. `body` may throw only if it runs out of memory.
template <typename Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    if (begin < end) {
        if (end - begin > grain && num_threads() > 1) {
            spatialflow_threads_were_used = true;
        }
        try {
            torch::stable::parallel_for(begin, end, grain, Ordered<Body>(body));
        } catch (const std::exception&) {  // the stable ABI does not preserve the exception
            check(false, "spatialflow: out of memory in a thread of a kernel");
        }
    }
}

}  // namespace spatialflow
