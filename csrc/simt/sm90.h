// SPDX-License-Identifier: Apache-2.0
//
// mbarriers, TMA, wgmma and what goes with them under the interpreter (PTX manual, sections "mbarrier", "Tensors",
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate", "Async proxy"). csrc/cuda/sm90_instructions.h says what
// each does; docs/simt.md says what is reported. Under SPATIALFLOW_SIMT_SM90=late or early (async.h).
#pragma once

#include "simt/intrinsics.h"
#include "simt/launch.h"

namespace spatialflow {
namespace simt {

// ---- mbarriers ---------------------------------------------------------------------------------------------------

constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;

// If the phase has all it waits for, the next one begins. Returns what is wrong, or nothing.
inline std::string advance(Block& block, MemoryBarrier& barrier) {
    if (barrier.bytes > kMaxPendingBytes || barrier.bytes < -kMaxPendingBytes) {
        return concatenate("mbarrier: ", barrier.bytes, " bytes pending, it counts up to ", kMaxPendingBytes);
    }
    if (barrier.pending != 0 || barrier.bytes != 0) {
        return {};
    }
    for (const TensorCopy& copy : block.async.copies) {
        if (copy.barrier == &barrier) {
            return concatenate("mbarrier at byte ", barrier.at, ": phase ", barrier.phase,
                               " is complete while a copy is under way that was started at ", copy.site.text(),
                               ": too few bytes were expected");
        }
    }
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    barrier.arriving.known[block.clocks().memory_barrier(barrier.index)] = barrier.phase;
    barrier.completed = barrier.arriving;
    block.wake(&barrier);
    return {};
}

// The mbarrier at an address, which the running thread may use.
inline MemoryBarrier& memory_barrier(Block& block, const char* name, unsigned address, Site site) {
    const int64_t at = address - kSharedWindow;
    for (const std::unique_ptr<MemoryBarrier>& barrier : block.async.barriers) {
        if (static_cast<int64_t>(barrier->at) == at) {
            const unsigned self = current_thread->linear;
            if (self != barrier->initializer &&
                !block.clocks().knows(self, barrier->initializer, barrier->init_moment)) {
                block.fault(site, concatenate(name, ": the mbarrier's initialization at ", barrier->site.text(),
                                              " is not visible to this thread: no barrier between"));
            }
            return *barrier;
        }
    }
    block.fault(site, concatenate(name, ": there is no mbarrier at byte ", at, " of the block's shared memory"));
}

inline void arrive(const char* name, unsigned address, unsigned bytes, Site site) {
    Block& block = current_block();
    MemoryBarrier& barrier = memory_barrier(block, name, address, site);
    if (barrier.pending == 0) {
        block.fault(site, concatenate(name, ": phase ", barrier.phase, " of the mbarrier has had all its ",
                                      barrier.arrivals, " arrivals and waits for ", barrier.bytes, " bytes"));
    }
    if (barrier.phase > 0 && barrier.last_seen != barrier.phase + 1) {
        block.fault(site, concatenate(name, ": phase ", barrier.phase - 1,
                                      " of the mbarrier is complete, and no thread has waited for it yet"));
    }
    block.clocks().release(current_thread->linear, barrier.arriving);
    barrier.bytes += bytes;
    --barrier.pending;
    if (const std::string wrong = advance(block, barrier); !wrong.empty()) {
        block.fault(site, wrong);
    }
}

// ---- copies by TMA -----------------------------------------------------------------------------------------------

// The box of the copy, with zeros outside the tensor, to shared memory.
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
            std::memcpy(block.shared_memory(static_cast<size_t>(swizzled(address, map.swizzle) - kSharedWindow)),
                        chunk, kChunk);
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
        block.report(copy.thread, copy.site, wrong);
    }
    return true;
}

// What ptxas gives threads of a block that has a multiprocessor to itself.
inline int registers_at_launch(const Block& block) {
    return std::min(255, 65536 / static_cast<int>(block.num_threads())) / 8 * 8;
}

inline void AsyncUnits::check_end(Block& block) {
    for (const std::unique_ptr<MemoryBarrier>& barrier : barriers) {
        if (barrier->copy.phase > 0 && barrier->last_seen <= barrier->copy.phase) {
            block.report(barrier->copy.thread, barrier->copy.site,
                         "the block ends and no thread has waited for this copy");
        }
        if (barrier->bytes != 0) {
            block.report(barrier->initializer, barrier->site,
                         concatenate("mbarrier at byte ", barrier->at, ": the block ends, and for phase ",
                                     barrier->phase, " ", std::abs(barrier->bytes), " bytes ",
                                     barrier->bytes > 0 ? "too many" : "too few", " were expected"));
        }
    }
    const int warpgroups = static_cast<int>(registers.size()), at_launch = registers_at_launch(block);
    int all = 0;
    for (const Registers& one : registers) {
        all += one.count > 0 ? one.count : at_launch;
    }
    if (all > at_launch * warpgroups) {
        block.report(registers.back().thread, registers.back().site,
                     concatenate("setmaxnreg: warpgroups take ", all, " registers of ", at_launch * warpgroups,
                                 " for a thread of each: the last one waits for ever"));
    }
}

inline void start_copy(const TensorMap* map, std::initializer_list<int> coordinates, unsigned target, unsigned address,
                       Site site) {
    Block& block = current_block();
    MemoryBarrier& barrier = memory_barrier(block, "TMA", address, site);
    const unsigned self = current_thread->linear;
    if (!block.clocks().knows_fenced(self, barrier.initializer, barrier.init_moment)) {
        block.fault(site, concatenate("TMA: the mbarrier's initialization at ", barrier.site.text(),
                                      " is not visible to it: no fence between"));
    }
    if (static_cast<int>(coordinates.size()) != map->dimensions) {
        block.fault(site, concatenate("TMA: ", coordinates.size(), " coordinates for a tensor map of ",
                                      map->dimensions, " dimensions"));
    }
    if (target % 128 != 0) {
        block.fault(site, concatenate("TMA: target at address ", target, ", no multiple of 128"));
    }
    const size_t bytes = map->rows() * map->row_bytes();
    TensorCopy copy;
    copy.map = *map;
    std::copy(coordinates.begin(), coordinates.end(), copy.coordinates);
    copy.target = block.locate(target, bytes, "target of TMA", site);
    copy.barrier = &barrier;
    copy.thread = self;
    copy.site = site;
    const uint32_t row_chunks = static_cast<uint32_t>(map->row_bytes() / kChunk);
    block.async.boxes.push_back({map->swizzle, row_chunks, static_cast<uint32_t>(bytes / kChunk), site});
    copy.number = static_cast<uint32_t>(block.async.boxes.size());
    const Toucher by = block.toucher(self);
    const unsigned actor = block.clocks().memory_barrier(barrier.index);
    barrier.copy = {barrier.phase + 1, self, site};
    for (uint32_t chunk = 0; chunk < bytes / kChunk; ++chunk) {
        const int64_t place = swizzled(int64_t{target} + chunk * kChunk, map->swizzle) - kSharedWindow;
        const size_t at = block.locate(place + kSharedWindow, kChunk, "target of TMA", site);
        block.complain(
            block.shadow().write_by_copy(at, by, actor, barrier.phase + 1, {copy.number, chunk}, site), at, site);
        std::memset(block.shared_memory(at), 0xff, kChunk);
    }
    if (sm90() == Sm90::kLate) {
        block.async.copies.push_back(copy);
        return;
    }
    if (const std::string wrong = deliver(block, copy); !wrong.empty()) {
        block.fault(site, wrong);
    }
}

// ---- wgmma -------------------------------------------------------------------------------------------------------

// Bits of a descriptor that mean nothing.
constexpr uint64_t kReservedBits = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;

// An operand in shared memory, as its descriptor says. `adjacent_k`: K-major; rows are those of a, columns of b.
class Operand {
public:
    Operand(uint64_t descriptor, bool adjacent_k)
        : start_(static_cast<int64_t>(descriptor & 0x3fff) << 4),
          leading_(static_cast<int64_t>(descriptor >> 16 & 0x3fff) << 4),
          stride_(static_cast<int64_t>(descriptor >> 32 & 0x3fff) << 4),
          reserved_bits(descriptor & kReservedBits),
          base_offset(static_cast<int>(descriptor >> 49 & 7)),
          swizzle(static_cast<Swizzle>(descriptor >> 62)),
          adjacent_k_(adjacent_k) {}

    // Address of 16 bytes. K-major: chunk 0 or 1 of the 16 k of a row or column; else eight rows or columns of a k.
    int64_t address(int line, int chunk) const {
        const int64_t span = static_cast<int64_t>(swizzle_span(swizzle));
        const int64_t group = line / 8, within = line % 8 * span;
        if (swizzle == Swizzle::kNone) {
            return start_ + within +
                   (adjacent_k_ ? group * stride_ + chunk * leading_ : group * leading_ + chunk * stride_);
        }
        const int64_t chunks = span / kChunk;
        return swizzled(start_ + within + group * stride_ + chunk / chunks * leading_ + chunk % chunks * kChunk,
                        swizzle);
    }

private:
    int64_t start_, leading_, stride_;

public:
    const uint64_t reserved_bits;
    const int base_offset;
    const Swizzle swizzle;

private:
    bool adjacent_k_;
};

// Whether the running thread may read all of the operand through the asynchronous proxy: lines [begin, end) of `chunks`
// times 16 bytes. Notes that its warp's unit reads them.
inline void note_operand(
    Block& block, const Toucher& by, uint32_t group, const char* name, const Operand& operand, bool adjacent_k,
    int begin, int end, int chunks, Site site) {
    const std::string what = concatenate("operand ", name, " of wgmma");
    if (operand.reserved_bits != 0) {
        block.fault(site, concatenate("wgmma: bit ", __builtin_ctzll(operand.reserved_bits), " of the descriptor of ",
                                      name, " belongs to no field: start and offsets are 14 bits each, in 16 bytes"));
    }
    if (operand.base_offset != 0) {
        block.fault(site, concatenate("wgmma: base offset ", operand.base_offset, " in the descriptor of ", name,
                                      ": the swizzle goes by address, the field must be 0"));
    }
    const int line_group = static_cast<int>(swizzle_span(operand.swizzle)) / kChunk;
    std::vector<Shadow::Place> first(static_cast<size_t>(chunks));
    const uint64_t number = ++block.async.operands;
    for (int line = begin; line < end; ++line) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const size_t at = block.locate(operand.address(line, chunk), kChunk, what.c_str(), site);
            uint64_t& seen = block.async.operand_of[at / kChunk];
            if (seen == number) {
                block.fault(site, concatenate("wgmma: line ", line, ", 16 bytes ", chunk, " of operand ", name,
                                              " are those of another line too: offsets of the descriptor are wrong"));
            }
            seen = number;
            block.complain(block.shadow().read_by_unit(at, by, group, site), at, site);
            const Shadow::Place place = block.shadow().place(at);
            // Chunks of a line lie side by side in the box, and lines in its rows: those of a by eight, all of b.
            const int group_begin = chunk / line_group * line_group;
            const int first_line = adjacent_k ? line / 8 * 8 : begin;
            Shadow::Place& origin = first[static_cast<size_t>(group_begin)];
            if (chunk == group_begin && line == first_line) {
                origin = place;
            }
            if (place.copy == 0) {
                continue;
            }
            const AsyncUnits::Box& box = block.async.boxes[place.copy - 1];
            const uint32_t expected = origin.chunk + static_cast<uint32_t>(chunk - group_begin) +
                                      static_cast<uint32_t>(line - first_line) * box.row_chunks;
            if (box.swizzle != operand.swizzle) {
                block.fault(site, concatenate("wgmma reads operand ", name, " with ", name_of(operand.swizzle),
                                              ", and TMA has written it with ", name_of(box.swizzle), " at ",
                                              box.site.text()));
            }
            if (place.copy != origin.copy && line != first_line && expected >= box.chunks) {
                continue;  // another copy has brought these lines
            }
            if (origin.copy != 0 && (place.copy != origin.copy || place.chunk != expected)) {
                block.fault(site, concatenate("wgmma: line ", line, ", 16 bytes ", chunk, " of operand ", name,
                                              " are not where the copy at ", box.site.text(),
                                              " has put them: start, offsets or swizzle of the descriptor are wrong"));
            }
        }
    }
}

// d += a * b of those of the warp's products that go to the same sums, in their order.
inline void run_products(Block& block, unsigned warp, const std::vector<WarpProduct>& products) {
    std::vector<bool> done(products.size(), false);
    for (size_t first = 0; first < products.size(); ++first) {
        if (done[first]) {
            continue;
        }
        constexpr int kMaxOutputs = 256;
        float sums[16][kMaxOutputs], right[16][kMaxOutputs];
        const int outputs = products[first].outputs;
        // d_i of a lane: row lane / 4 (+ 8 for i % 4 >= 2), column 2 * (lane % 4) + i / 4 * 8 (+ 1 for odd i)
        const auto each_sum = [&](auto body) {
            for (int lane = 0; lane < kLanes; ++lane) {
                float* own = products[first].sums[lane];
                for (int i = 0; i < outputs / 2; ++i) {
                    body(own[i], sums[lane / 4 + i % 4 / 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2]);
                }
            }
        };
        each_sum([](float own, float& sum) { sum = own; });
        for (size_t i = first; i < products.size(); ++i) {
            const WarpProduct& product = products[i];
            if (product.sums[0] != products[first].sums[0]) {
                continue;
            }
            done[i] = true;
            const Operand a(product.a, true), b(product.b, product.adjacent_k);
            const auto numbers = [&](const Operand& operand, int line, int chunk, float* target) {
                uint16_t bits[8];
                const int64_t at = operand.address(line, chunk) - kSharedWindow;
                std::memcpy(bits, block.shared_memory(static_cast<size_t>(at)), sizeof(bits));
                for (int e = 0; e < 8; ++e) {
                    target[e] = product.number(bits[e]);
                }
            };
            for (int k = 0; k < 16 && !product.adjacent_k; ++k) {
                for (int chunk = 0; chunk < outputs / 8; ++chunk) {
                    numbers(b, k, chunk, right[k] + chunk * 8);
                }
            }
            for (int o = 0; o < outputs && product.adjacent_k; ++o) {
                float column[16];
                for (int chunk = 0; chunk < 2; ++chunk) {
                    numbers(b, o, chunk, column + chunk * 8);
                }
                for (int k = 0; k < 16; ++k) {
                    right[k][o] = column[k];
                }
            }
            for (int row = 0; row < 16; ++row) {
                float left[16];
                for (int chunk = 0; chunk < 2; ++chunk) {
                    numbers(a, static_cast<int>(warp % 4) * 16 + row, chunk, left + chunk * 8);
                }
                for (int o = 0; o < outputs; o += 8) {
                    float sum[8] = {};
                    for (int k = 0; k < 16; ++k) {
                        for (int e = 0; e < 8; ++e) {
                            sum[e] += left[k] * right[k][o + e];
                        }
                    }
                    for (int e = 0; e < 8; ++e) {
                        sums[row][o + e] = (product.add ? sums[row][o + e] : 0.0f) + sum[e];
                    }
                }
            }
        }
        each_sum([](float& own, float sum) { own = sum; });
    }
}

inline WgmmaUnit& wgmma_unit(Block& block, unsigned warp) {
    block.async.units.resize(std::max<size_t>(block.async.units.size(), warp + 1));
    return block.async.units[warp];
}

struct ProductSlot {
    float* sums;
    SumsState* state;
    uint64_t a, b;
    int add;
};

// d (+)= a (64x16, K-major) * b (16 x outputs, K-major or with outputs adjacent), by the 128 threads of a warpgroup.
inline void start_product(ProductSlot slot, int outputs, bool adjacent_k, float (*number)(uint16_t), Site site) {
    Block& block = current_block();
    block.track_all();
    if (slot.state->running == 0 && current_thread->wgmma_fences <= slot.state->touched) {
        block.fault(site, "wgmma without a wgmma.fence since this thread has last touched the sums");
    }
    block.warpgroup_collective("wgmma.mma_async", slot, site, [&](ProductSlot** slots) {
        for (int i = 0; i < 4 * kLanes; ++i) {
            if (slots[i]->a != slot.a || slots[i]->b != slot.b || (slots[i]->add != 0) != (slot.add != 0)) {
                block.fault(site, "wgmma: threads of the warpgroup differ in their descriptors or in whether to add");
            }
        }
        const unsigned first_warp = current_thread->linear / (4 * kLanes) * 4;
        for (unsigned warp = 0; warp < 4; ++warp) {
            WgmmaUnit& unit = wgmma_unit(block, first_warp + warp);
            const int row = static_cast<int>(warp) * 16;
            // One lane of those that know the same: an elected one may know what the others have not waited for.
            const unsigned last = (first_warp + warp) * kLanes + kLanes - 1;
            for (unsigned thread = last + 1 - kLanes; thread <= last; ++thread) {
                if (thread == last || !(block.clocks().know_alike(first_warp + warp) ||
                                        block.clocks().know_alike(thread, thread + 1))) {
                    const Toucher by = block.toucher(thread);
                    note_operand(block, by, unit.group, "a", Operand(slot.a, true), true, row, row + 16, 2, site);
                    note_operand(block, by, unit.group, "b", Operand(slot.b, adjacent_k), adjacent_k, 0,
                                 adjacent_k ? outputs : 16, adjacent_k ? 2 : outputs / 8, site);
                }
            }
            WarpProduct product;
            for (int lane = 0; lane < kLanes; ++lane) {
                const ProductSlot& own = *slots[warp * kLanes + static_cast<unsigned>(lane)];
                product.sums[lane] = own.sums;
                product.states[lane] = own.state;
                ++own.state->running;
                own.state->site = site;
            }
            product.a = slot.a;
            product.b = slot.b;
            product.outputs = outputs;
            product.adjacent_k = adjacent_k;
            product.add = slot.add != 0;
            product.number = number;
            unit.open.push_back(product);
        }
    });
}

// Of an instruction that all lanes of a warp execute together, at one line (.sync.aligned).
template <typename Complete>
inline void aligned_collective(const char* name, Site site, Complete complete) {
    Block& block = current_block();
    block.track_all();
    block.collective(name, 0xffffffffu, site, site, [&](Site** sites) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (sites[lane]->packed != site.packed) {
                block.fault(site, concatenate(name, ": lane ", lane, " of the warp is at ", sites[lane]->text()));
            }
        }
        complete();
    });
}

inline void commit_products(Site site) {
    Block& block = current_block();
    aligned_collective("wgmma.commit_group", site, [&] {
        const unsigned warp = current_thread->linear / kLanes;
        WgmmaUnit& unit = wgmma_unit(block, warp);
        if (sm90() == Sm90::kEarly) {
            run_products(block, warp, unit.open);
        }
        unit.committed.push_back(std::move(unit.open));
        unit.open.clear();
        ++unit.group;
    });
}

inline void wait_for_products(unsigned groups, Site site) {
    Block& block = current_block();
    aligned_collective("wgmma.wait_group", site, [&] {
        const unsigned warp = current_thread->linear / kLanes;
        WgmmaUnit& unit = wgmma_unit(block, warp);
        while (unit.committed.size() > groups) {
            if (sm90() == Sm90::kLate) {
                run_products(block, warp, unit.committed.front());
            }
            for (const WarpProduct& product : unit.committed.front()) {
                for (SumsState* state : product.states) {
                    --state->running;
                }
            }
            unit.committed.pop_front();
        }
        const uint32_t complete = unit.group - 1 - static_cast<uint32_t>(unit.committed.size());
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            block.clocks().acquire(warp * kLanes + lane, block.clocks().wgmma_unit(warp), complete);
        }
    });
}

inline void set_registers(const char* name, int count, bool fewer, Site site) {
    struct Slot {
    } slot;
    Block& block = current_block();
    if (count % 8 != 0 || count < 24 || count > 256) {
        block.fault(site, concatenate(name, ": ", count, " registers, it takes a multiple of 8 from 24 to 256"));
    }
    block.warpgroup_collective(name, slot, site, [&](Slot**) {
        block.async.registers.resize(block.num_threads() / (4 * kLanes));
        AsyncUnits::Registers& own = block.async.registers[current_thread->linear / (4 * kLanes)];
        const int before = own.count > 0 ? own.count : registers_at_launch(block);
        if (fewer ? count > before : count < before) {
            block.fault(site, concatenate(name, ": from ", before, " to ", count, " registers"));
        }
        own = {count, current_thread->linear, site};
    });
}

}  // namespace simt

// ---- the instructions, as csrc/cuda/sm90_instructions.h has them -------------------------------------------------

using TensorMap = simt::TensorMap;

template <typename T>
inline unsigned shared_address(const Shared<T>& pointer) {
    return static_cast<unsigned>(simt::kSharedWindow + pointer.offset());
}

inline void mbarrier_init(unsigned address, unsigned arrivals, simt::Site site = simt::Site::here()) {
    simt::Block& block = simt::current_block();
    block.track_all();
    const size_t at = block.locate(address, 8, "mbarrier", site);
    if (address % 8 != 0 || arrivals == 0 || arrivals >= 1u << 20) {
        block.fault(site, simt::concatenate("mbarrier.init: at address ", address, " for ", arrivals,
                                            " arrivals; a multiple of 8, and 1 to 1048575"));
    }
    for (const auto& other : block.async.barriers) {
        if (other->at == at) {
            block.fault(site, simt::concatenate("mbarrier.init: there is a live mbarrier, initialized at ",
                                                other->site.text()));
        }
    }
    if (block.async.barriers.size() == simt::kMaxMemoryBarriers) {
        block.fault(site, simt::concatenate("more than ", simt::kMaxMemoryBarriers, " mbarriers of a block"));
    }
    block.note_write(at, 8, simt::Shadow::kBarrier, site);
    auto barrier = std::make_unique<simt::MemoryBarrier>();
    barrier->at = at;
    barrier->index = static_cast<unsigned>(block.async.barriers.size());
    barrier->arrivals = barrier->pending = arrivals;
    barrier->initializer = simt::current_thread->linear;
    barrier->init_moment = block.clocks().now(barrier->initializer);
    barrier->site = site;
    barrier->arriving = barrier->completed = block.clocks().empty_row();
    barrier->seen.assign(block.num_threads(), 0);
    block.async.barriers.push_back(std::move(barrier));
}
inline void fence_async_proxy() {
    simt::current_block().track_all();
    simt::current_block().clocks().fence(simt::current_thread->linear);
}
inline void mbarrier_init_fence() { fence_async_proxy(); }
inline void mbarrier_expect(unsigned barrier, unsigned bytes, simt::Site site = simt::Site::here()) {
    simt::arrive("mbarrier.arrive.expect_tx", barrier, bytes, site);
}
inline void mbarrier_arrive(unsigned barrier, simt::Site site = simt::Site::here()) {
    simt::arrive("mbarrier.arrive", barrier, 0, site);
}
inline void mbarrier_wait(unsigned address, unsigned parity, simt::Site site = simt::Site::here()) {
    simt::Block& block = simt::current_block();
    simt::MemoryBarrier& barrier = simt::memory_barrier(block, "mbarrier.try_wait", address, site);
    if (parity > 1) {
        block.fault(site, simt::concatenate("mbarrier.try_wait: parity ", parity, ", it is 0 or 1"));
    }
    const unsigned self = simt::current_thread->linear;
    while (barrier.phase % 2 == parity) {
        block.wait("mbarrier.try_wait", &barrier, site);
    }
    if (barrier.seen[self] == barrier.phase + 1) {
        block.fault(site, simt::concatenate("mbarrier.try_wait: parity ", parity, " is that of phase ",
                                            static_cast<int64_t>(barrier.phase) - 1,
                                            ", which this thread has waited for already, not of the next one"));
    }
    barrier.seen[self] = barrier.last_seen = barrier.phase + 1;
    block.clocks().acquire(self, barrier.completed);
}

inline void tma_load_3d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, unsigned barrier,
    simt::Site site = simt::Site::here()) {
    simt::start_copy(map, {c0, c1, c2}, target, barrier, site);
}
inline void tma_load_4d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, int c3, unsigned barrier,
    simt::Site site = simt::Site::here()) {
    simt::start_copy(map, {c0, c1, c2, c3}, target, barrier, site);
}

template <int kId, int kThreads>
inline void named_barrier(simt::Site site = simt::Site::here()) {
    static_assert(kId > 0 && kId < 16, "barrier 0 is that of __syncthreads");
    simt::current_block().named_barrier(kId, kThreads, site);
}

template <int kRegisters>
inline void give_registers(simt::Site site = simt::Site::here()) {
    simt::set_registers("setmaxnreg.dec", kRegisters, true, site);
}
template <int kRegisters>
inline void take_registers(simt::Site site = simt::Site::here()) {
    simt::set_registers("setmaxnreg.inc", kRegisters, false, site);
}

inline void wgmma_fence(simt::Site site = simt::Site::here()) {
    simt::aligned_collective("wgmma.fence", site, [] {});
    ++simt::current_thread->wgmma_fences;
}
inline void wgmma_commit(simt::Site site = simt::Site::here()) { simt::commit_products(site); }
template <int kGroups>
inline void wgmma_wait(simt::Site site = simt::Site::here()) {
    simt::wait_for_products(kGroups, site);
}

template <int kCount>
class WgmmaSums {
public:
    WgmmaSums() { state_.touched = simt::current_thread->wgmma_fences; }
    WgmmaSums(const WgmmaSums&) = delete;
    ~WgmmaSums() {
        if (state_.running > 0) {
            simt::current_block().fault(state_.site, "sums of this wgmma end before it has been waited for");
        }
    }

    float operator[](const simt::Index& index) const {
        if (state_.running > 0) {
            simt::current_block().fault(
                index.site, simt::concatenate("touches sums of a wgmma that has not been waited for, started at ",
                                              state_.site.text()));
        }
        if (index.value < 0 || index.value >= kCount) {
            simt::current_block().fault(index.site, simt::concatenate("sum ", index.value, " of ", kCount));
        }
        state_.touched = simt::current_thread->wgmma_fences;
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
    static void multiply(WgmmaSums<kOutputs / 2>& d, uint64_t a, uint64_t b, int add, T /* type of a and b */,
                         simt::Site site = simt::Site::here()) {
        simt::start_product({d.values_, &d.state_, a, b, add}, kOutputs, !kOutputsAdjacent,
                            [](uint16_t bits) { return load(T{bits}); }, site);
    }
};

// ---- on the host -------------------------------------------------------------------------------------------------

template <auto kKernel>
inline bool runs_sm90(Stream) {
    return simt::sm90() != simt::Sm90::kOff;
}
inline void bind_context(Stream) {}

template <typename scalar_t, int kDimensions>
inline bool encode_map(TensorMap& map, const Global<const scalar_t>& tensor, const int64_t (&sizes)[kDimensions],
                       const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions],
                       simt::Swizzle swizzle = simt::Swizzle::k128, simt::Site site = simt::Site::here()) {
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
    simt::check_box(map, site);
    if (!tensor.holds(last + 1)) {
        throw std::runtime_error(simt::concatenate(
            "simt: ", site.text(), ": tensor map: it reaches ", last + 1, " elements, beyond the tensor"));
    }
    return simt::is_readable(map);
}

}  // namespace spatialflow
