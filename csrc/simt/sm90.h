// SPDX-License-Identifier: Apache-2.0
//
// Instructions of compute capability 9.0 for interpreted kernels (csrc/cuda/sm90_instructions.cuh), and the host
// functions of csrc/cuda/sm90_tensor_map.h. Operators run kernels with these instructions if SPATIALFLOW_SIMT_SM90 is
// late or early (async.h).
#pragma once

#include "simt/launch.h"
#include "simt/tensor_copy.h"
#include "simt/wgmma.h"

namespace spatialflow {
namespace simt {

inline void set_registers(const char* name, int count, bool fewer, SourceLocation location) {
    struct Slot {
    } slot;
    Block& block = current_block();
    if (count % 8 != 0 || count < 24 || count > 256) {
        block.fail(location, concatenate(name, ": ", count, " registers; must be a multiple of 8 from 24 to 256"));
    }
    block.warpgroup_collective(name, slot, location, [&](Slot**) {
        block.async.registers.resize(block.num_threads() / (4 * kLanes));
        AsyncUnits::Registers& current = block.async.registers[current_thread->linear / (4 * kLanes)];
        const int before = current.count > 0 ? current.count : registers_at_launch(block);
        if (fewer ? count > before : count < before) {
            block.fail(location, concatenate(name, ": from ", before, " to ", count, " registers"));
        }
        current = {count, current_thread->linear, location};
    });
}

}  // namespace simt

// ---- instructions ------------------------------------------------------------------------------------------------

using TensorMap = simt::TensorMap;

template <typename T>
inline unsigned shared_address(const Shared<T>& pointer) {
    return static_cast<unsigned>(simt::kSharedWindow + pointer.offset());
}

inline void mbarrier_init(
    unsigned address, unsigned arrivals, simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::Block& block = simt::current_block();
    block.track_all();
    const size_t at = block.locate(address, 8, "mbarrier", location);
    if (address % 8 != 0 || arrivals == 0 || arrivals >= 1u << 20) {
        block.fail(
            location, simt::concatenate(
                          "mbarrier.init: at address ", address, " for ", arrivals,
                          " arrivals; must be a multiple of 8, and 1 to 1048575"));
    }
    for (const auto& existing : block.async.barriers) {
        if (existing->at == at) {
            block.fail(
                location,
                simt::concatenate(
                    "mbarrier.init: an mbarrier exists there already, initialized at ", existing->location.text()));
        }
    }
    if (block.async.barriers.size() == simt::kMaxMemoryBarriers) {
        block.fail(location, simt::concatenate("more than ", simt::kMaxMemoryBarriers, " mbarriers in a block"));
    }
    block.note_write(at, 8, simt::Shadow::kBarrier, location);
    auto barrier = std::make_unique<simt::MemoryBarrier>();
    barrier->at = at;
    barrier->index = static_cast<unsigned>(block.async.barriers.size());
    barrier->arrivals = barrier->pending = arrivals;
    barrier->initializer = simt::current_thread->linear;
    barrier->init_moment = block.clocks().now(barrier->initializer);
    barrier->location = location;
    barrier->arriving = barrier->completed = block.clocks().empty_row();
    barrier->seen.assign(block.num_threads(), 0);
    block.async.barriers.push_back(std::move(barrier));
}
inline void fence_async_proxy() {
    simt::current_block().track_all();
    simt::current_block().clocks().fence(simt::current_thread->linear);
}
inline void mbarrier_init_fence() { fence_async_proxy(); }
inline void mbarrier_expect(
    unsigned barrier, unsigned bytes, simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::arrive("mbarrier.arrive.expect_tx", barrier, bytes, location);
}
inline void mbarrier_arrive(unsigned barrier, simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::arrive("mbarrier.arrive", barrier, 0, location);
}
inline void mbarrier_wait(
    unsigned address, unsigned parity, simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::Block& block = simt::current_block();
    simt::MemoryBarrier& barrier = simt::memory_barrier(block, "mbarrier.try_wait", address, location);
    if (parity > 1) {
        block.fail(location, simt::concatenate("mbarrier.try_wait: parity ", parity, "; must be 0 or 1"));
    }
    const unsigned self = simt::current_thread->linear;
    while (barrier.phase % 2 == parity) {
        block.wait("mbarrier.try_wait", &barrier, location);
    }
    if (barrier.seen[self] == barrier.phase + 1) {
        block.fail(
            location,
            simt::concatenate(
                "mbarrier.try_wait: parity ", parity, " is that of phase ", static_cast<int64_t>(barrier.phase) - 1,
                ", for which this thread has waited already, instead of the next phase"));
    }
    barrier.seen[self] = barrier.last_seen = barrier.phase + 1;
    block.clocks().acquire(self, barrier.completed);
}

inline void tma_load_3d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, unsigned barrier,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::start_copy(map, {c0, c1, c2}, target, barrier, location);
}
inline void tma_load_4d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, int c3, unsigned barrier,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::start_copy(map, {c0, c1, c2, c3}, target, barrier, location);
}

template <int kId, int kThreads>
inline void named_barrier(simt::SourceLocation location = simt::SourceLocation::current()) {
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of __syncthreads");
    simt::current_block().named_barrier(kId, kThreads, location);
}

template <int kRegisters>
inline void decrease_registers(simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::set_registers("setmaxnreg.dec", kRegisters, true, location);
}
template <int kRegisters>
inline void increase_registers(simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::set_registers("setmaxnreg.inc", kRegisters, false, location);
}

inline void wgmma_fence(simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::aligned_collective("wgmma.fence", location, [] {});
    ++simt::current_thread->wgmma_fences;
}
inline void wgmma_commit(simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::commit_products(location);
}
template <int kGroups>
inline void wgmma_wait(simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::wait_for_products(kGroups, location);
}

template <int kCount>
class WgmmaSums {
public:
    WgmmaSums() { state_.last_access = simt::current_thread->wgmma_fences; }
    WgmmaSums(const WgmmaSums&) = delete;
    ~WgmmaSums() {
        if (state_.running > 0) {
            simt::current_block().fail(
                state_.location, "accumulators of this wgmma go out of scope before a wgmma.wait_group");
        }
    }

    float operator[](const simt::Index& index) const {
        if (state_.running > 0) {
            simt::current_block().fail(
                index.location, simt::concatenate(
                                    "reads accumulators of a wgmma without waiting for its group, started at ",
                                    state_.location.text()));
        }
        if (index.value < 0 || index.value >= kCount) {
            simt::current_block().fail(
                index.location, simt::concatenate("index ", index.value, " of ", kCount, " accumulators"));
        }
        state_.last_access = simt::current_thread->wgmma_fences;
        return values_[index.value];
    }

private:
    template <int kOutputs, bool kOutputsAdjacent>
    friend struct Wgmma;

    float values_[kCount] = {};
    mutable simt::SumsState state_;
};

template <int kCount>
inline void pin(WgmmaSums<kCount>&) {}

template <int kOutputs, bool kOutputsAdjacent = true>
struct Wgmma {
    static_assert(kOutputs % 8 == 0 && kOutputs >= 8 && kOutputs <= 256, "n of wgmma");

    template <typename T>
    static void multiply(
        WgmmaSums<kOutputs / 2>& d, uint64_t a, uint64_t b, int add, T /* type of a and b */,
        simt::SourceLocation location = simt::SourceLocation::current()) {
        simt::start_product(
            {d.values_, &d.state_, a, b, add}, kOutputs, !kOutputsAdjacent, [](uint16_t bits) { return load(T{bits}); },
            location);
    }
};

// ---- on the host -------------------------------------------------------------------------------------------------

template <auto kKernel>
inline bool runs_sm90(Stream) {
    return simt::sm90() != simt::Sm90::kOff;
}
inline void bind_context(Stream) {}

template <typename scalar_t, int kDimensions>
inline bool encode_map(
    TensorMap& map, const Global<const scalar_t>& tensor, const int64_t (&sizes)[kDimensions],
    const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions],
    simt::Swizzle swizzle = simt::Swizzle::k128, simt::SourceLocation location = simt::SourceLocation::current()) {
    map = {};
    map.dimensions = kDimensions;
    map.element_bytes = sizeof(scalar_t);
    map.swizzle = swizzle;
    int64_t last = 0;
    for (int d = 0; d < kDimensions; ++d) {
        map.sizes[d] = sizes[d];
        map.strides[d] = (d == 0 ? 1 : strides[d - 1]) * static_cast<int64_t>(sizeof(scalar_t));
        map.box[d] = box[d];
        last += (sizes[d] - 1) * (d == 0 ? 1 : strides[d - 1]);
    }
    map.address = reinterpret_cast<const char*>(tensor.data());
    simt::check_box(map, location);
    if (!tensor.holds(last + 1)) {
        throw std::runtime_error(
            simt::concatenate(
                "simt: ", location.text(), ": tensor map: reaches ", last + 1, " elements, beyond the tensor"));
    }
    return simt::is_readable(map);
}

}  // namespace spatialflow
