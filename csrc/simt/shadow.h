// SPDX-License-Identifier: Apache-2.0
//
// What is known about every two bytes of a block's shared memory: who wrote them last, who has read them since, and
// when. From that follow the reports of races and of reads that nothing preceded by a write.
//
// Time has two hands. `epoch` counts the block's barriers and never restarts, so that what an earlier block left is
// simply old. Within an epoch, lanes of one warp are ordered by __syncwarp alone: each lane has a vector clock, with
// `clock[u][t]` the moment of lane t that lane u has last synchronised with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "simt/fault.h"

namespace spatialflow {
namespace simt {

constexpr int kGranule = 2;
constexpr int kLanes = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;

struct WarpClock {
    uint32_t clock[kLanes][kLanes];

    void reset() {
        std::memset(clock, 0, sizeof(clock));
        for (int lane = 0; lane < kLanes; ++lane) {
            clock[lane][lane] = 1;
        }
    }
    // The lanes of `mask` have met: each knows what any of them knew.
    void synchronise(uint32_t mask) {
        uint32_t joined[kLanes] = {};
        for (int lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                for (int t = 0; t < kLanes; ++t) {
                    joined[t] = std::max(joined[t], clock[lane][t]);
                }
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                std::memcpy(clock[lane], joined, sizeof(joined));
                ++clock[lane][lane];
            }
        }
    }
};

// Who touches shared memory, and when.
struct Toucher {
    uint32_t epoch;
    uint16_t warp;
    uint16_t lane;
    const WarpClock* clock;

    uint32_t now() const { return clock->clock[lane][lane]; }
    bool knows(int other_lane, uint32_t moment) const { return clock->clock[lane][other_lane] >= moment; }
};

class Shadow {
public:
    enum Kind : uint8_t { kPlain, kAtomic, kPending };  // kPending: a cp.async that has not been waited for

    struct Conflict {
        const char* what = nullptr;  // null: none
        Site other;
        unsigned other_thread = 0;
    };

    Shadow() : cells_(kMaxSharedBytes / kGranule) {}

    Conflict read(size_t begin, size_t bytes, uint32_t first_epoch, const Toucher& by, Kind kind, Site site) {
        for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) {
            Cell& cell = cells_[i];
            if (cell.write_epoch < first_epoch) {
                return {"reads shared memory that nobody wrote", {}, 0};
            }
            if (cell.write_kind == kPending) {
                return {"reads shared memory before the cp.async into it was waited for, started at", cell.write_site,
                        cell.writer()};
            }
            if (unordered_write(cell, by, kind)) {
                return {"races: reads what another thread writes without a barrier between, at", cell.write_site,
                        cell.writer()};
            }
            if (kind != kAtomic) {  // an atomic reads no older value than it replaces: its write stands for both
                note_read(cell, by, site);
            }
        }
        return {};
    }

    Conflict write(size_t begin, size_t bytes, const Toucher& by, Kind kind, Site site) {
        for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) {
            Cell& cell = cells_[i];
            if (unordered_write(cell, by, kind)) {
                return {"races: writes what another thread writes without a barrier between, at", cell.write_site,
                        cell.writer()};
            }
            if (cell.read_epoch == by.epoch && unordered_read(cell, by)) {
                return {"races: writes what another thread reads without a barrier between, at", cell.read_site,
                        cell.reader()};
            }
            cell.write_epoch = by.epoch;
            cell.write_moment = by.now();
            cell.write_warp = by.warp;
            cell.write_lane = static_cast<uint8_t>(by.lane);
            cell.write_kind = kind;
            cell.write_site = site;
        }
        return {};
    }

private:
    struct Cell {
        Site write_site, read_site;
        uint32_t write_epoch = 0, write_moment = 0;
        uint32_t read_epoch = 0, read_moment = 0;  // moment: the latest of all readers'
        uint32_t read_lanes = 0;                   // of read_warp, in this epoch, since the last read after all others
        uint16_t write_warp = 0, read_warp = 0;
        uint8_t write_lane = 0, read_lane = 0;
        Kind write_kind = kPlain;
        bool read_by_warps = false;                // by more than one warp

        unsigned writer() const { return write_warp * unsigned{kLanes} + write_lane; }
        unsigned reader() const { return read_warp * unsigned{kLanes} + read_lane; }
    };

    static bool unordered_write(const Cell& cell, const Toucher& by, Kind kind) {
        if (cell.write_epoch != by.epoch || (kind == kAtomic && cell.write_kind == kAtomic)) {
            return false;
        }
        return cell.write_warp != by.warp ||
               (cell.write_lane != by.lane && !by.knows(cell.write_lane, cell.write_moment));
    }

    static bool unordered_read(const Cell& cell, const Toucher& by) {
        if (cell.read_by_warps || cell.read_warp != by.warp) {
            return true;
        }
        for (uint32_t lanes = cell.read_lanes & ~(1u << by.lane); lanes != 0; lanes &= lanes - 1) {
            if (!by.knows(__builtin_ctz(lanes), cell.read_moment)) {
                return true;
            }
        }
        return false;
    }

    static void note_read(Cell& cell, const Toucher& by, Site site) {
        if (cell.read_epoch != by.epoch) {
            cell.read_epoch = by.epoch;
            cell.read_warp = by.warp;
            cell.read_lanes = 0;
            cell.read_moment = 0;
            cell.read_by_warps = false;
        }
        if (cell.read_warp != by.warp) {
            cell.read_by_warps = true;
            return;
        }
        if (!unordered_read(cell, by)) {  // whoever is ordered after this read is ordered after those before it
            cell.read_lanes = 0;
            cell.read_moment = 0;
        }
        cell.read_lanes |= 1u << by.lane;
        cell.read_moment = std::max(cell.read_moment, by.now());
        cell.read_lane = static_cast<uint8_t>(by.lane);
        cell.read_site = site;
    }

    std::vector<Cell> cells_;
};

}  // namespace simt
}  // namespace spatialflow
