// SPDX-License-Identifier: Apache-2.0
//
// Execution of a grid: blocks are distributed over OS threads, in order of their index.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "simt/memory.h"

namespace spatialflow {

struct Stream {};

namespace simt {

// Pool of blocks (stacks, shadow memory), which are expensive to create, for reuse by later launches.
class BlockPool {
public:
    static BlockPool& instance() {
        static BlockPool* pool = new BlockPool;  // never destroyed: launches may run after static destructors
        return *pool;
    }
    std::unique_ptr<Block> acquire() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) {
            return std::make_unique<Block>();
        }
        std::unique_ptr<Block> block = std::move(free_.back());
        free_.pop_back();
        return block;
    }
    void release(std::unique_ptr<Block> block) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(block));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Block>> free_;
};

inline void run_blocks(Launch& launch) {
    std::unique_ptr<Block> block = BlockPool::instance().acquire();
    const uint64_t total = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    while (!launch.failed) {
        const uint64_t i = launch.next_block++;
        if (i >= total) {
            break;
        }
        const uint3 index = {
            static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
            static_cast<unsigned>(i / (uint64_t(launch.grid.x) * launch.grid.y))};
        block->run(launch, index);
    }
    BlockPool::instance().release(std::move(block));
}

inline unsigned os_threads() {
    static const unsigned count = [] {
        const char* setting = std::getenv("SPATIALFLOW_SIMT_THREADS");
        const unsigned requested =
            setting ? static_cast<unsigned>(std::atoi(setting)) : std::thread::hardware_concurrency();
        return std::max(1u, requested);
    }();
    return count;
}

// Extract the kernel's name: "... [with auto kKernel = spatialflow::my_kernel<float>; ...]" ->
// "spatialflow::my_kernel<float>"
inline std::string kernel_name(const std::string& function) {
    const std::string key = "kKernel = ";
    const size_t begin = function.find(key);
    if (begin == std::string::npos) {
        return function;
    }
    const size_t end = function.find_first_of(";]", begin);
    return function.substr(begin + key.size(), end - begin - key.size());
}

inline void run_grid(Launch& launch) {
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    const unsigned block_threads = launch.block.x * launch.block.y * launch.block.z;
    if (blocks == 0) {
        return;
    }
    sm90();  // throws for an invalid SPATIALFLOW_SIMT_SM90 here, since a kernel cannot
    if (block_threads == 0 || block_threads > 1024 || launch.grid.y > 65535 || launch.grid.z > 65535 ||
        launch.grid.x > 0x7fffffffu || launch.dynamic_shared_bytes > kMaxSharedBytes) {
        throw std::runtime_error(concatenate(
            "simt: kernel ", launch.kernel, " cannot be launched with grid (", launch.grid.x, ", ", launch.grid.y, ", ",
            launch.grid.z, "), block (", launch.block.x, ", ", launch.block.y, ", ", launch.block.z, "), ",
            launch.dynamic_shared_bytes, " bytes of dynamic shared memory"));
    }
    if (std::getenv("SPATIALFLOW_SIMT_TRACE")) {
        std::fprintf(stderr, "launch: %s\n", launch.kernel.c_str());
    }
    // Start at most about one OS thread per 512 fibers, since it takes time to start a thread.
    const uint64_t useful = std::min<uint64_t>({os_threads(), blocks, blocks * block_threads / 512 + 1});
    std::vector<std::thread> workers;
    for (uint64_t i = 1; i < useful; ++i) {
        workers.emplace_back([&] { run_blocks(launch); });
    }
    run_blocks(launch);
    for (std::thread& worker : workers) {
        worker.join();
    }
    if (launch.failed) {
        throw std::runtime_error(launch.report_text);
    }
}

template <typename Kernel>
struct KernelArguments;
template <typename... Parameters>
struct KernelArguments<void (*)(Parameters...)> {
    template <void (*kKernel)(Parameters...)>
    static std::function<void()> bind(Parameters... arguments) {
        return [=] { kKernel(arguments...); };
    }
};

}  // namespace simt

template <typename T>
inline std::remove_const_t<T> read_back(const Global<T>& source, Stream) {
    return *source.checked(1, simt::SourceLocation::current());
}

// A small number, so that persistent blocks process several tiles in small problems too.
template <auto kKernel>
inline int resident_blocks(int, size_t, Stream) {
    return 3;
}

// A small number, for kernels that choose their tiles by the number of multiprocessors.
inline int multiprocessors(Stream) { return 3; }

// A small number, so that small problems use both code paths: with data in shared memory, and without.
inline int largest_shared_bytes(Stream) { return 2048; }

template <auto kKernel, typename... Arguments>
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream, const Arguments&... arguments) {
    simt::Launch run;
    run.kernel = simt::kernel_name(__PRETTY_FUNCTION__);
    run.grid = grid;
    run.block = block;
    run.dynamic_shared_bytes = shared_bytes;
    run.body = simt::KernelArguments<decltype(kKernel)>::template bind<kKernel>(arguments...);
    simt::run_grid(run);
}

}  // namespace spatialflow
