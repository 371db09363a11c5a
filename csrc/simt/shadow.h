// SPDX-License-Identifier: Apache-2.0
//
// Shadow memory: for every two bytes of a block's shared memory, the last write and the reads after it. It detects
// races and reads of uninitialized memory.
//
// There are two logical clocks. `epoch` counts the starts of blocks and the barriers of all threads of a block. It is
// never reset, so accesses of a previous block are older than all accesses of the current one. Within an epoch, and for
// asynchronous operations, vector clocks order accesses (clocks.h).
#pragma once

#include <string>
#include <vector>

#include "simt/clocks.h"
#include "simt/source_location.h"

namespace spatialflow {
namespace simt {

constexpr int kGranularity = 2;
constexpr int kChunk = 16;  // bytes of the widest access, and unit of TMA and wgmma accesses
constexpr size_t kMaxSharedBytes = 227 * 1024;

// Thread that accesses shared memory, and the time of the access.
struct Accessor {
    uint32_t epoch, first_epoch;
    uint32_t readers_from;  // reads of earlier epochs are ordered before this access by a barrier of the block
    unsigned thread;
    const Clocks* clocks;

    bool knows(unsigned actor, uint32_t moment) const { return clocks->knows(thread, actor, moment); }
};

class Shadow {
public:
    // Kinds of accesses. Reads are kPlain or kAtomic. Other kinds of writes: kPending by a cp.async that has not been
    // waited for, kCopied by TMA, kBarrier by mbarrier.init.
    enum Kind : uint8_t { kPlain, kAtomic, kPending, kCopied, kBarrier };

    struct Conflict {
        const char* what = nullptr;  // null: no conflict
        SourceLocation location;     // of the earlier access
        unsigned thread = 0;         // of the earlier access
    };

    // Position of 16 bytes in the box of a TMA copy.
    struct BoxPosition {
        uint32_t copy = 0, chunk = 0;  // number of the copy, from 1; chunk of the box in row-major order
    };

    Shadow() : cells_(kMaxSharedBytes / kGranularity), whole_(kMaxSharedBytes / kChunk, 0) {}

    // Discard the lists of readers of the previous block. Call it before the first access of a block.
    void forget_readers() {
        readers_.clear();
        free_readers_.clear();
    }

    Conflict read(size_t begin, size_t bytes, const Accessor& by, Kind kind, SourceLocation location) {
        const Reader reader = {
            by.thread / kLanes, 1u << by.thread % kLanes, by.clocks->now(by.thread), by.thread, location};
        return visit(begin, bytes, by, [&](Cell& cell) -> Conflict {
            const Conflict conflict = check_read(cell, by, kind);
            // The write of an atomic represents its read too.
            if (!conflict.what && kind != kAtomic) {
                note_read(cell, by, reader);
            }
            return conflict;
        });
    }

    // Record a read of 16 bytes by the wgmma unit of the accessor's warp. The read ends when group `group` has been
    // waited for.
    Conflict read_by_unit(size_t begin, const Accessor& by, uint32_t group, SourceLocation location) {
        return visit(begin, kChunk, by, [&](Cell& cell) -> Conflict {
            if (const Conflict conflict = check_read(cell, by, kPlain); conflict.what) {
                return conflict;
            }
            if (cell.write_kind != kCopied && !by.clocks->knows_fenced(by.thread, cell.writer, cell.write_moment)) {
                return {
                    "wgmma reads an operand that was written without a fence.proxy.async in between, at",
                    cell.write_location, cell.write_thread};
            }
            const unsigned warp = by.thread / kLanes;
            note_read(cell, by, {by.clocks->num_warps() + warp, 1u, group, by.thread, location});
            return {};
        });
    }
    // Return the box position of 16 bytes that one TMA copy has written; {} for other bytes.
    BoxPosition box_position(size_t begin) const {
        const Cell& cell = cells_[begin / kGranularity];
        return whole_[begin / kChunk] && cell.write_kind == kCopied ? cell.box_position : BoxPosition{};
    }

    Conflict write(size_t begin, size_t bytes, const Accessor& by, Kind kind, SourceLocation location) {
        return write_as(begin, bytes, by, by.thread, by.clocks->now(by.thread), kind, {}, location);
    }
    // Record a write of 16 bytes by a TMA copy that a thread of the block has started. The copy is complete when the
    // mbarrier has completed `phase` phases.
    Conflict write_by_copy(
        size_t begin, const Accessor& by, unsigned barrier, uint32_t phase, const BoxPosition& position,
        SourceLocation location) {
        Conflict conflict;
        visit(begin, kChunk, by, [&](Cell& cell) -> Conflict {
            const bool generic = cell.write_epoch >= by.first_epoch && cell.write_kind != kCopied;
            if (generic && !by.clocks->knows_fenced(by.thread, cell.writer, cell.write_moment)) {
                conflict = {
                    "TMA writes where a thread has written, without a fence.proxy.async in between, at",
                    cell.write_location, cell.write_thread};
            }
            return conflict;
        });
        return conflict.what ? conflict : write_as(begin, kChunk, by, barrier, phase, kCopied, position, location);
    }

private:
    // Record of reads: by lanes of a warp at a moment, or by the wgmma unit of a warp. The slots of these units follow
    // those of all warps, and use lane 0.
    struct Reader {
        unsigned slot;
        uint32_t lanes;  // lanes of the recorded reads; a read that is ordered after all of them replaces them
        uint32_t moment;
        unsigned thread;  // last reader, for reports
        SourceLocation location;
    };
    static constexpr uint32_t kNone = 0xffffffffu;

    struct Cell {
        SourceLocation write_location;
        uint32_t write_epoch = 0, write_moment = 0;
        uint32_t read_epoch = 0;
        uint32_t more_readers = kNone;  // index into readers_, used instead of `reader`
        Reader reader = {0, 0, 0, 0, {}};
        BoxPosition box_position;
        uint16_t writer = 0, write_thread = 0;  // actor; thread for reports
        Kind write_kind = kPlain;
        bool read_by_warps = false;  // several warps have read; set only before clocks track all actors
    };

    // Call check(cell) for all cells until one has a conflict. One cell represents 16 bytes with the same history.
    template <typename Check>
    Conflict visit(size_t begin, size_t bytes, const Accessor& by, Check check) {
        const size_t end = begin + bytes;
        for (size_t chunk = begin / kChunk; chunk * kChunk < end; ++chunk) {
            constexpr size_t kCells = kChunk / kGranularity;
            Cell* cells = cells_.data() + chunk * kCells;
            const size_t from = std::max(begin, chunk * kChunk), to = std::min(end, (chunk + 1) * kChunk);
            if (whole_[chunk]) {
                if (to - from == kChunk) {
                    if (const Conflict conflict = check(cells[0]); conflict.what) {
                        return conflict;
                    }
                    continue;
                }
                split(chunk, by);
            }
            for (size_t i = from / kGranularity % kCells; i < from / kGranularity % kCells + (to - from) / kGranularity;
                 ++i) {
                if (const Conflict conflict = check(cells[i]); conflict.what) {
                    return conflict;
                }
            }
        }
        return {};
    }

    void split(size_t chunk, const Accessor& by) {
        Cell* cells = cells_.data() + chunk * (kChunk / kGranularity);
        if (!has_readers(cells[0], by)) {
            cells[0].more_readers = kNone;
        }
        for (int i = 1; i < kChunk / kGranularity; ++i) {
            cells[i] = cells[0];
            if (cells[0].more_readers != kNone) {
                const uint32_t entry = new_readers();
                readers_[entry] = readers_[cells[0].more_readers];
                cells[i].more_readers = entry;
            }
        }
        whole_[chunk] = 0;
    }

    static Conflict check_read(const Cell& cell, const Accessor& by, Kind kind) {
        if (cell.write_epoch < by.first_epoch) {
            return {"reads uninitialized shared memory", {}, 0};
        }
        if (cell.write_kind == kPending) {
            return {
                "reads the target of a cp.async without waiting for the copy, started at", cell.write_location,
                cell.write_thread};
        }
        if (unordered_write(cell, by, kind)) {
            if (cell.write_kind == kCopied) {
                return {
                    "reads the target of a TMA copy without waiting for its mbarrier, copy started at",
                    cell.write_location, cell.write_thread};
            }
            if (cell.write_kind == kBarrier) {
                return {"reads the memory of an mbarrier, initialized at", cell.write_location, cell.write_thread};
            }
            return {
                "race: reads what another thread writes, without a barrier in between, at", cell.write_location,
                cell.write_thread};
        }
        return {};
    }

    Conflict write_as(
        size_t begin, size_t bytes, const Accessor& by, unsigned writer, uint32_t moment, Kind kind,
        const BoxPosition& position, SourceLocation location) {
        const auto note = [&](Cell& cell) {
            cell.write_epoch = by.epoch;
            cell.write_moment = moment;
            cell.writer = static_cast<uint16_t>(writer);
            cell.write_thread = static_cast<uint16_t>(by.thread);
            cell.write_kind = kind;
            cell.write_location = location;
            cell.box_position = position;
            forget_readers_of(cell, by);  // an access ordered after this write is ordered after these reads
        };
        const Conflict conflict = visit(begin, bytes, by, [&](Cell& cell) -> Conflict {
            if (unordered_write(cell, by, kind)) {
                if (cell.write_kind == kCopied) {
                    return {
                        "writes to the target of a TMA copy without waiting for its mbarrier, copy started at",
                        cell.write_location, cell.write_thread};
                }
                if (cell.write_kind == kBarrier) {
                    return {
                        "writes to the memory of an mbarrier, initialized at", cell.write_location, cell.write_thread};
                }
                return {
                    "race: writes what another thread writes, without a barrier in between, at", cell.write_location,
                    cell.write_thread};
            }
            if (const Reader* reader = unordered_reader(cell, by)) {
                return {
                    reader->slot >= by.clocks->num_warps()
                        ? "writes to an operand of wgmma without waiting for its group, started at"
                        : "race: writes what another thread reads, without a barrier in between, at",
                    reader->location, reader->thread};
            }
            note(cell);
            return {};
        });
        if (begin % kChunk == 0 && bytes == kChunk) {
            whole_[begin / kChunk] = 1;
        }
        return conflict;
    }

    static bool unordered_write(const Cell& cell, const Accessor& by, Kind kind) {
        if (cell.write_epoch < by.first_epoch) {
            return false;
        }
        if (cell.write_kind == kCopied) {
            return !by.knows(cell.writer, cell.write_moment);
        }
        if (cell.write_kind == kBarrier) {
            return kind != kBarrier;
        }
        if (cell.write_epoch != by.epoch || (kind == kAtomic && cell.write_kind == kAtomic)) {
            return false;
        }
        return cell.writer != by.thread && !by.knows(cell.writer, cell.write_moment);
    }

    static bool knows_all_of(const Reader& reader, const Accessor& by) {
        const unsigned warps = by.clocks->num_warps();
        if (reader.slot >= warps) {
            return by.knows(by.clocks->wgmma_unit(reader.slot - warps), reader.moment);
        }
        for (uint32_t lanes = reader.lanes; lanes != 0; lanes &= lanes - 1) {
            const unsigned thread = reader.slot * kLanes + static_cast<unsigned>(__builtin_ctz(lanes));
            if (thread != by.thread && !by.knows(thread, reader.moment)) {
                return false;
            }
        }
        return true;
    }

    // Return whether reads of the cell are recorded. read_by_warps does not tell which warps have read, so these reads
    // are dropped once clocks track all actors.
    static bool has_readers(const Cell& cell, const Accessor& by) {
        return cell.read_epoch >= by.readers_from && !(cell.read_by_warps && by.clocks->tracks_all());
    }

    // Return a reader that is not ordered before the accessor, or null.
    const Reader* unordered_reader(const Cell& cell, const Accessor& by) const {
        if (!has_readers(cell, by)) {
            return nullptr;
        }
        if (cell.more_readers != kNone) {
            for (const Reader& reader : readers_[cell.more_readers]) {
                if (!knows_all_of(reader, by)) {
                    return &reader;
                }
            }
            return nullptr;
        }
        return cell.read_by_warps || !knows_all_of(cell.reader, by) ? &cell.reader : nullptr;
    }

    void note_read(Cell& cell, const Accessor& by, const Reader& reader) {
        const bool has_any = has_readers(cell, by);
        if (has_any && cell.read_by_warps) {
            cell.read_epoch = by.epoch;  // read_by_warps represents this reader too
            return;
        }
        if (!has_any) {
            cell.more_readers = kNone;  // of an earlier block or epoch; forget_readers() frees its entry
        }
        // An access ordered after this read is ordered after the previous ones.
        if (!has_any || (cell.more_readers == kNone && knows_all_of(cell.reader, by))) {
            cell.read_epoch = by.epoch;
            cell.read_by_warps = false;
            cell.reader = reader;
            return;
        }
        cell.read_epoch = by.epoch;
        if (cell.more_readers == kNone) {
            if (add_to(cell.reader, reader)) {
                return;
            }
            if (!by.clocks->tracks_all() && cell.reader.slot != reader.slot) {
                cell.read_by_warps = true;
                return;
            }
            cell.more_readers = new_readers();
            readers_[cell.more_readers].push_back(cell.reader);
        }
        std::vector<Reader>& all = readers_[cell.more_readers];
        for (size_t i = 0; i < all.size();) {
            if (add_to(all[i], reader)) {
                return;
            }
            if (all[i].slot == reader.slot) {
                all[i].lanes &= ~reader.lanes;  // the later read of these lanes replaces the earlier one
            }
            if (all[i].lanes == 0) {
                all[i] = all.back();
                all.pop_back();
            } else {
                ++i;
            }
        }
        all.push_back(reader);
    }
    // Merge `reader` into `target`; return false if one entry cannot represent both. Lanes of a warp that synchronize
    // separately have different times.
    static bool add_to(Reader& target, const Reader& reader) {
        if (target.slot != reader.slot || (target.moment != reader.moment && (target.lanes & ~reader.lanes) != 0)) {
            return false;
        }
        target.lanes |= reader.lanes;
        target.moment = reader.moment;
        target.thread = reader.thread;
        target.location = reader.location;
        return true;
    }

    void forget_readers_of(Cell& cell, const Accessor& by) {
        if (cell.more_readers != kNone && has_readers(cell, by)) {
            readers_[cell.more_readers].clear();
            free_readers_.push_back(cell.more_readers);
        }
        cell.more_readers = kNone;
        cell.read_epoch = 0;
        cell.read_by_warps = false;
    }
    uint32_t new_readers() {
        if (free_readers_.empty()) {
            readers_.emplace_back();
            return static_cast<uint32_t>(readers_.size() - 1);
        }
        const uint32_t entry = free_readers_.back();
        free_readers_.pop_back();
        return entry;
    }

    std::vector<Cell> cells_;
    std::vector<uint8_t> whole_;  // for each 16 bytes: whether the first cell represents all
    std::vector<std::vector<Reader>> readers_;
    std::vector<uint32_t> free_readers_;
};

}  // namespace simt
}  // namespace spatialflow
