// SPDX-License-Identifier: Apache-2.0
//
// mbarriers and TMA copies for interpreted kernels (PTX manual, sections "mbarrier", "Tensors" and "Async proxy").
// docs/simt.md lists the reports.
#pragma once

#include "simt/intrinsics.h"

namespace spatialflow {
namespace simt {

// ---- mbarriers ---------------------------------------------------------------------------------------------------

constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;

// Begin the next phase if all arrivals and bytes of this phase are complete. Return an error text, or an empty string.
inline std::string advance(Block& block, MemoryBarrier& barrier) {
    if (barrier.bytes > kMaxPendingBytes || barrier.bytes < -kMaxPendingBytes) {
        return concatenate("mbarrier: ", barrier.bytes, " bytes pending, more than the maximum ", kMaxPendingBytes);
    }
    if (barrier.pending != 0 || barrier.bytes != 0) {
        return {};
    }
    for (const TensorCopy& copy : block.async.copies) {
        if (copy.barrier == &barrier) {
            return concatenate(
                "mbarrier at byte ", barrier.at, ": phase ", barrier.phase,
                " completes while a copy is in flight, started at ", copy.location.text(),
                ": too few bytes are expected");
        }
    }
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    barrier.arriving.known[block.clocks().memory_barrier(barrier.index)] = barrier.phase;
    barrier.completed = barrier.arriving;
    block.wake(&barrier);
    return {};
}

// Return the mbarrier at an address; its initialization must be visible to the running thread.
inline MemoryBarrier& memory_barrier(Block& block, const char* name, unsigned address, SourceLocation location) {
    const int64_t at = address - kSharedWindow;
    for (const std::unique_ptr<MemoryBarrier>& barrier : block.async.barriers) {
        if (static_cast<int64_t>(barrier->at) == at) {
            const unsigned self = current_thread->linear;
            if (self != barrier->initializer &&
                !block.clocks().knows(self, barrier->initializer, barrier->init_moment)) {
                block.fail(
                    location, concatenate(
                                  name, ": the mbarrier's initialization at ", barrier->location.text(),
                                  " is not visible to this thread: no barrier in between"));
            }
            return *barrier;
        }
    }
    block.fail(location, concatenate(name, ": there is no mbarrier at byte ", at, " of the block's shared memory"));
}

inline void arrive(const char* name, unsigned address, unsigned bytes, SourceLocation location) {
    Block& block = current_block();
    MemoryBarrier& barrier = memory_barrier(block, name, address, location);
    if (barrier.pending == 0) {
        block.fail(
            location, concatenate(
                          name, ": phase ", barrier.phase, " of the mbarrier already has all its ", barrier.arrivals,
                          " arrivals and waits for ", barrier.bytes, " bytes"));
    }
    if (barrier.phase > 0 && barrier.last_seen != barrier.phase + 1) {
        block.fail(
            location,
            concatenate(
                name, ": phase ", barrier.phase - 1, " of the mbarrier is complete, and no thread has waited for it"));
    }
    block.clocks().release(current_thread->linear, barrier.arriving);
    barrier.bytes += bytes;
    --barrier.pending;
    if (const std::string wrong = advance(block, barrier); !wrong.empty()) {
        block.fail(location, wrong);
    }
}

// ---- copies by TMA -----------------------------------------------------------------------------------------------

// Copy the box to shared memory, with zeros outside the tensor.
inline void move_box(Block& block, const TensorCopy& copy) {
    const TensorMap& map = copy.map;
    const size_t row_bytes = map.row_bytes();
    for (size_t row = 0; row < map.rows(); ++row) {
        const char* source = map.address;
        bool inside = true;
        size_t rest = row;
        for (int d = 1; d < map.dimensions; ++d) {
            const size_t side = static_cast<size_t>(map.box[d]);
            const int64_t coordinate = copy.coordinates[d] + static_cast<int64_t>(rest % side);
            rest /= side;
            inside = inside && coordinate >= 0 && coordinate < map.sizes[d];
            source += coordinate * map.strides[d];
        }
        for (size_t byte = 0; byte < row_bytes; byte += kChunk) {
            char chunk[kChunk] = {};
            for (size_t i = 0; inside && i < kChunk; i += map.element_bytes) {
                const int64_t column = copy.coordinates[0] + static_cast<int64_t>((byte + i) / map.element_bytes);
                if (column >= 0 && column < map.sizes[0]) {
                    std::memcpy(chunk + i, source + column * map.strides[0], map.element_bytes);
                }
            }
            const int64_t address = kSharedWindow + static_cast<int64_t>(copy.target + row * row_bytes + byte);
            std::memcpy(
                block.shared_memory(static_cast<size_t>(swizzled(address, map.swizzle) - kSharedWindow)), chunk,
                kChunk);
        }
    }
}

inline std::string deliver(Block& block, const TensorCopy& copy) {
    move_box(block, copy);
    copy.barrier->bytes -= static_cast<int64_t>(copy.map.rows() * copy.map.row_bytes());
    return advance(block, *copy.barrier);
}

inline bool AsyncUnits::deliver_latest(Block& block) {
    if (copies.empty()) {
        return false;
    }
    const TensorCopy copy = copies.back();
    copies.pop_back();
    if (const std::string wrong = deliver(block, copy); !wrong.empty()) {
        block.report(copy.thread, copy.location, wrong);
    }
    return true;
}

// Registers that ptxas can assign to a thread if its block is alone on a multiprocessor, as a multiple of 8.
inline int registers_at_launch(const Block& block) {
    return std::min(255, 65536 / static_cast<int>(block.num_threads())) / 8 * 8;
}

inline void AsyncUnits::check_end(Block& block) {
    for (const std::unique_ptr<MemoryBarrier>& barrier : barriers) {
        if (barrier->copy.phase > 0 && barrier->last_seen <= barrier->copy.phase) {
            block.report(
                barrier->copy.thread, barrier->copy.location, "the block ends, and no thread has waited for this copy");
        }
        if (barrier->bytes != 0) {
            block.report(
                barrier->initializer, barrier->location,
                concatenate(
                    "mbarrier at byte ", barrier->at, ": the block ends, and for phase ", barrier->phase, " ",
                    std::abs(barrier->bytes), " bytes ", barrier->bytes > 0 ? "too many" : "too few",
                    " were expected"));
        }
    }
    const int warpgroups = static_cast<int>(registers.size()), at_launch = registers_at_launch(block);
    int all = 0;
    for (const Registers& warpgroup : registers) {
        all += warpgroup.count > 0 ? warpgroup.count : at_launch;
    }
    if (all > at_launch * warpgroups) {
        block.report(
            registers.back().thread, registers.back().location,
            concatenate(
                "setmaxnreg: warpgroups use ", all, " registers of ", at_launch * warpgroups,
                " per thread of each: the last setmaxnreg never returns"));
    }
}

inline void start_copy(
    const TensorMap* map, std::initializer_list<int> coordinates, unsigned target, unsigned address,
    SourceLocation location) {
    Block& block = current_block();
    MemoryBarrier& barrier = memory_barrier(block, "TMA", address, location);
    const unsigned self = current_thread->linear;
    if (!block.clocks().knows_fenced(self, barrier.initializer, barrier.init_moment)) {
        block.fail(
            location, concatenate(
                          "TMA: the mbarrier's initialization at ", barrier.location.text(),
                          " is not visible to TMA: no fence in between"));
    }
    if (static_cast<int>(coordinates.size()) != map->dimensions) {
        block.fail(
            location,
            concatenate(
                "TMA: ", coordinates.size(), " coordinates for a tensor map of ", map->dimensions, " dimensions"));
    }
    if (target % 128 != 0) {
        block.fail(location, concatenate("TMA: target at address ", target, ", not a multiple of 128"));
    }
    const size_t bytes = map->rows() * map->row_bytes();
    TensorCopy copy;
    copy.map = *map;
    std::copy(coordinates.begin(), coordinates.end(), copy.coordinates);
    copy.target = block.locate(target, bytes, "target of TMA", location);
    copy.barrier = &barrier;
    copy.thread = self;
    copy.location = location;
    const uint32_t row_chunks = static_cast<uint32_t>(map->row_bytes() / kChunk);
    block.async.boxes.push_back({map->swizzle, row_chunks, static_cast<uint32_t>(bytes / kChunk), location});
    copy.number = static_cast<uint32_t>(block.async.boxes.size());
    const Accessor by = block.accessor(self);
    const unsigned actor = block.clocks().memory_barrier(barrier.index);
    barrier.copy = {barrier.phase + 1, self, location};
    for (uint32_t chunk = 0; chunk < bytes / kChunk; ++chunk) {
        const int64_t place = swizzled(int64_t{target} + chunk * kChunk, map->swizzle) - kSharedWindow;
        const size_t at = block.locate(place + kSharedWindow, kChunk, "target of TMA", location);
        block.report_conflict(
            block.shadow().write_by_copy(at, by, actor, barrier.phase + 1, {copy.number, chunk}, location), at,
            location);
        std::memset(block.shared_memory(at), 0xff, kChunk);
    }
    if (sm90() == Sm90::kLate) {
        block.async.copies.push_back(copy);
        return;
    }
    if (const std::string wrong = deliver(block, copy); !wrong.empty()) {
        block.fail(location, wrong);
    }
}

}  // namespace simt
}  // namespace spatialflow
