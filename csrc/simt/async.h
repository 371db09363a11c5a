// SPDX-License-Identifier: Apache-2.0
//
// State of the asynchronous units of a block (compute capability 9.0): mbarriers, TMA copies, wgmma groups. The
// instructions are in sm90.h.
//
// Copies and products complete as late or as early as hardware may complete them (SPATIALFLOW_SIMT_SM90=late or early).
// Late: a copy arrives when no thread can continue without it, the newest copy first. A product is computed when a warp
// waits for it. Early: a copy arrives when it is issued, and a product is computed when its group is committed.
#pragma once

#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/clocks.h"
#include "simt/shadow.h"
#include "simt/source_location.h"
#include "simt/tensor_map.h"

namespace spatialflow {
namespace simt {

class Block;

// Address of a block's shared memory, which begins with the dynamic shared memory. The address is not a multiple of
// 1024, as on a GPU, where reserved and static memory precede the dynamic memory.
constexpr int64_t kSharedWindow = 1024 + 128;

enum class Sm90 { kOff, kLate, kEarly };

// Return whether kernels for compute capability 9.0 run, and when their asynchronous operations complete.
inline Sm90 sm90() {
    static const Sm90 chosen = [] {
        const char* variable = std::getenv("SPATIALFLOW_SIMT_SM90");
        const std::string name = variable ? variable : "off";
        if (name != "off" && name != "late" && name != "early") {
            throw std::runtime_error("SPATIALFLOW_SIMT_SM90 must be off, late or early, got '" + name + "'");
        }
        return name == "late" ? Sm90::kLate : name == "early" ? Sm90::kEarly : Sm90::kOff;
    }();
    return chosen;
}

struct MemoryBarrier {
    size_t at;       // offset in the block's shared memory
    unsigned index;  // among the block's mbarriers
    uint32_t arrivals, pending;
    int64_t bytes = 0;   // expected minus copied bytes of this phase
    uint32_t phase = 0;  // number of complete phases
    unsigned initializer;
    uint32_t init_moment;
    SourceLocation location;
    Clocks::Row arriving, completed;
    std::vector<uint32_t> seen;  // by thread: complete phases at its last wait, plus one
    uint32_t last_seen = 0;      // the same for the last wait of any thread
    // Last copy that signals this mbarrier.
    struct Copy {
        uint32_t phase = 0;  // the data may be read once this many phases are complete; 0: no copy
        unsigned thread;     // that started the copy
        SourceLocation location;
    };
    Copy copy;
};

struct TensorCopy {
    TensorMap map;  // a copy of the map, as the kernel's map may be destroyed earlier
    int coordinates[kMaxTensorMapDimensions];
    size_t target;
    MemoryBarrier* barrier;
    uint32_t number;
    unsigned thread;
    SourceLocation location;
};

// State of the accumulators (WgmmaSums) of one thread.
struct SumsState {
    uint32_t running = 0;      // products that have not been waited for
    uint32_t last_access = 0;  // Thread::wgmma_fences at the last access to the sums
    SourceLocation location;   // of the last product
};

// Part of a product that one warp computes: 16 rows of d += a * b.
struct WarpProduct {
    float* sums[kLanes];
    SumsState* states[kLanes];
    uint64_t a, b;
    int outputs;
    bool adjacent_k;  // whether b is K-major
    bool add;
    float (*convert)(uint16_t bits);  // from a 16-bit value of an operand
};

struct WgmmaUnit {
    uint32_t group = 1;  // number of the open group
    std::vector<WarpProduct> open;
    std::deque<std::vector<WarpProduct>> committed;
};

class AsyncUnits {
public:
    void reset() {
        barriers.clear();
        copies.clear();
        boxes.clear();
        units.clear();
        registers.clear();
    }

    // ---- defined in tensor_copy.h ----

    // Deliver the newest copy in flight; return false if no copy is in flight.
    bool deliver_latest(Block& block);
    // Check the state of the units when all threads have exited.
    void check_end(Block& block);

    // Return the states of all mbarriers, for a report.
    std::string describe() const {
        std::string text;
        for (const std::unique_ptr<MemoryBarrier>& barrier : barriers) {
            text += concatenate(
                "\n  mbarrier at byte ", barrier->at, " (", barrier->location.text(), "): phase ", barrier->phase,
                " of parity ", barrier->phase % 2, ", ", barrier->pending, " of ", barrier->arrivals, " arrivals and ",
                barrier->bytes, " bytes pending");
        }
        return text;
    }

    struct Box {
        Swizzle swizzle;
        uint32_t row_chunks, chunks;
        SourceLocation location;
    };

    std::vector<std::unique_ptr<MemoryBarrier>> barriers;
    std::vector<TensorCopy> copies;  // in flight
    std::vector<Box> boxes;          // of all copies of the block; index: TensorCopy::number - 1
    std::vector<WgmmaUnit> units;    // one per warp
    uint64_t operands = 0;           // number of operands that wgmma has read, including earlier blocks
    // For each 16 bytes of shared memory, the number of the last operand that contains them.
    std::vector<uint64_t> operand_of = std::vector<uint64_t>(kMaxSharedBytes / kChunk);
    struct Registers {
        int count = 0;  // of each thread; zero until it is set
        unsigned thread;
        SourceLocation location;
    };
    std::vector<Registers> registers;  // of each warpgroup
};

}  // namespace simt
}  // namespace spatialflow
