// SPDX-License-Identifier: Apache-2.0
//
// What runs beside the threads of a block (compute capability 9.0): mbarriers, copies of TMA, groups of wgmma. The
// instructions are in sm90.h; here is their state.
//
// Copies and products are done as late or as early as the hardware might do them (SPATIALFLOW_SIMT_SM90=late or early).
// Late, a copy arrives when no thread of the block can go on without it, the newest first, and a product is computed
// when it is waited for. Early, a copy arrives at once, and a product is computed when its group is committed.
#pragma once

#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/clocks.h"
#include "simt/fault.h"
#include "simt/shadow.h"
#include "simt/tensor_map.h"

namespace spatialflow {
namespace simt {

class Block;

// Address of the first byte of a block's shared memory. No multiple of 1024, as on a GPU, where static memory and what
// the system keeps come first.
constexpr int64_t kSharedWindow = 1024 + 128;

enum class Sm90 { kOff, kLate, kEarly };

// Whether kernels for compute capability 9.0 run, and in which order.
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
    size_t at;       // offset in the block's memory
    unsigned index;  // among the block's mbarriers
    uint32_t arrivals, pending;
    int64_t bytes = 0;   // that the phase still waits for
    uint32_t phase = 0;  // phases that are complete
    unsigned initializer;
    uint32_t init_moment;
    Site site;
    Clocks::Row arriving, completed;
    std::vector<uint32_t> seen;  // of each thread: one more than the phases complete when it last waited
    uint32_t last_seen = 0;      // the same of the thread that waited last
    // The last copy that completes here: after which phase it may be read, and who started it.
    struct Copy {
        uint32_t phase = 0;
        unsigned thread;
        Site site;
    };
    Copy copy;
};

struct TensorCopy {
    TensorMap map;  // the kernel's own lives as long as the thread that has started the copy
    int coordinates[kMaxTensorMapDimensions];
    size_t target;
    MemoryBarrier* barrier;
    uint32_t number;
    unsigned thread;
    Site site;
};

// Sums of one thread, as the units see them. `values` is what they will hold; the thread reads it once `running` is 0.
struct SumsState {
    uint32_t running = 0;  // products that have not been waited for
    uint32_t touched = 0;  // wgmma.fences of the thread when it last touched them
    Site site;             // of the last product
};

// The part of a product that one warp computes: 16 rows of d += a * b.
struct WarpProduct {
    float* sums[kLanes];
    SumsState* states[kLanes];
    uint64_t a, b;
    int outputs;
    bool adjacent_k;  // of b
    bool add;
    float (*number)(uint16_t bits);  // of an operand
};

struct WgmmaUnit {
    uint32_t group = 1;  // the one still open
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

    // Of the copies under way the newest arrives; false if there is none.
    bool deliver_latest(Block& block);
    // When all threads have exited.
    void check_end(Block& block);

    // States of all mbarriers, for a report.
    std::string describe() const {
        std::string text;
        for (const std::unique_ptr<MemoryBarrier>& barrier : barriers) {
            text += concatenate(
                "\n  mbarrier at byte ", barrier->at, " (", barrier->site.text(), "): phase ", barrier->phase,
                " of parity ", barrier->phase % 2, ", ", barrier->pending, " of ", barrier->arrivals, " arrivals and ",
                barrier->bytes, " bytes pending");
        }
        return text;
    }

    struct Box {
        Swizzle swizzle;
        uint32_t row_chunks, chunks;
        Site site;
    };

    std::vector<std::unique_ptr<MemoryBarrier>> barriers;
    std::vector<TensorCopy> copies;  // under way
    std::vector<Box> boxes;          // of all copies of the block, by number - 1
    std::vector<WgmmaUnit> units;    // of each warp
    uint64_t operands = 0;           // that wgmma has read, in earlier blocks too
    // Of each 16 bytes of shared memory: the last operand, by number.
    std::vector<uint64_t> operand_of = std::vector<uint64_t>(kMaxSharedBytes / kChunk);
    struct Registers {
        int count = 0;  // of each thread; zero until it is set
        unsigned thread;
        Site site;
    };
    std::vector<Registers> registers;  // of each warpgroup
};

}  // namespace simt
}  // namespace spatialflow
