// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory of an operator: a single tensor of 32-bit words, divided into parts.
#pragma once

#include "cuda/launch.h"

namespace spatialflow {

// Part of a workspace: `count` elements from word `begin` on.
template <typename T>
struct WorkspacePart {
    int64_t begin, count;
};

// Layout of the parts, in the order of add(). Each part begins at a multiple of 128 bytes.
struct WorkspaceLayout {
    static constexpr int64_t kLineWords = 32;

    int64_t words = 0;

    template <typename T>
    WorkspacePart<T> add(int64_t count) {
        static_assert(sizeof(T) % sizeof(int) == 0, "parts consist of whole words");
        const WorkspacePart<T> part{words, count};
        words += ceil_div(count * static_cast<int64_t>(sizeof(T) / sizeof(int)), kLineWords) * kLineWords;
        return part;
    }
};

class Workspace {
public:
    Workspace(const WorkspaceLayout& layout, const Tensor& like)
        : tensor_(empty_like_sized(like, {layout.words}, ScalarType::Int)) {}

    template <typename T>
    Global<T> operator[](const WorkspacePart<T>& part) const {
        constexpr int64_t kWords = sizeof(T) / sizeof(int);
        return pointer_cast<T>(mutable_data<int>(tensor_, part.begin, part.count * kWords));
    }

private:
    Tensor tensor_;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) clear_words_kernel(Global<int> words, const int64_t count) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); i < count;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
        words[i] = 0;
    }
}

// Set the first `count` words to zero.
inline void clear_words(const Workspace& workspace, int64_t count, Stream stream) {
    constexpr int kThreads = 256;
    const int64_t blocks = ceil_div(count, kThreads);
    launch<clear_words_kernel<kThreads>>(
        dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024)), dim3(kThreads), 0, stream,
        workspace[WorkspacePart<int>{0, count}], count);
}

}  // namespace spatialflow
