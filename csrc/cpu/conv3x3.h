// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions (stride 1, padding 1) over pyramids of channels-last maps, shared by flow_conv2d and fused_subnets.
// The interface consists of pointers and sizes; the two algorithms are conv3x3_winograd.h and conv3x3_direct.h.
//
//   out[n, y, x, o] = sum over taps (dy, dx), c of (x + flow)[n, y + dy, x + dx, c] * w[o, c, dy, dx] + bias[o]
//                     + residual[n, y, x, o],     then an optional ReLU
//
// A group is an input pyramid with one or more branches. A branch is a convolution of this pyramid; branches share the
// work that depends only on the input. There is one task list for all groups, levels and images, so that threads stay
// busy also on small levels.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace spatialflow {

template <typename scalar_t>
struct ConvLevel {
    int64_t batch, height, width;
    const scalar_t* x;     // (N, H, W, C_in)
    const scalar_t* flow;  // (N, H, W, C_in) or null
};

template <typename scalar_t>
struct ConvBranch {
    const accum_t<scalar_t>* packed;  // pack_conv3x3_* of (C_out, C_in, 3, 3)
    const accum_t<scalar_t>* bias;    // (C_out) or null
    int64_t channels;                 // C_out
    bool relu;
    std::vector<scalar_t*> out;             // (N, H, W, C_out) per level, of all or of the first levels of the group
    std::vector<const scalar_t*> residual;  // empty, or per level (N, H, W, C_out); may be `out` itself
};

template <typename scalar_t>
struct ConvGroup {
    int64_t channels;  // C_in
    std::vector<ConvLevel<scalar_t>> levels;
    std::vector<ConvBranch<scalar_t>> branches;
};

// Length of a padded row: a multiple of 16 values, plus 16 (one cache line of floats). Without the extra 16, rows at
// distances of a power of two would map to few cache sets.
inline int64_t padded_row(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

// Number of threads for `tasks` tasks with `work` multiply-adds in total.
inline int64_t num_workers(int64_t tasks, int64_t work) {
    constexpr int64_t kWorkPerThread = 1 << 19;  // about ten microseconds, the cost of a parallel region
    return std::max<int64_t>(1, std::min({tasks, num_threads(), work / kWorkPerThread}));
}

// Call body(task, worker) for every task; workers take tasks dynamically. `body` must not throw.
template <typename Body>
void run_tasks(int64_t tasks, int64_t work, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel_for(0, num_workers(tasks, work), 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t task = next++; task < tasks; task = next++) {
                body(task, worker);
            }
        }
    });
}

// Call body(c, load, store) for channels c, c + lanes, ... The functions load(pointer) and store(pointer, value) access
// whole vectors, or a partial one where fewer than `lanes` channels remain.
template <typename real_t, typename Body>
__attribute__((always_inline)) inline void for_channel_vectors(int64_t channels, const Body& body) {
    constexpr int64_t lanes = kLanes<real_t>;
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) {
        body(
            c, [](const auto* source) __attribute__((always_inline)) { return load_vector(source); },
            [](auto* target, Vector<real_t> value) __attribute__((always_inline)) { store_vector(target, value); });
    }
    if (c < channels) {
        const int count = static_cast<int>(channels - c);
        body(
            c, [count](const auto* source) { return load_partial(source, count); },
            [count](auto* target, Vector<real_t> value) { store_partial(target, value, count); });
    }
}

// ReLU; NaN stays NaN, as in torch.relu.
template <typename vector_t>
inline vector_t rectified(vector_t value) {
    return value < vector_t{} ? vector_t{} : value;
}

}  // namespace spatialflow
