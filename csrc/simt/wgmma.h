// SPDX-License-Identifier: Apache-2.0
//
// wgmma for interpreted kernels (PTX manual, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate"). Operands are
// read from shared memory according to their descriptors; products are computed at commit or at wait (async.h).
#pragma once

#include "simt/intrinsics.h"

namespace spatialflow {
namespace simt {

// Reserved bits of a descriptor.
constexpr uint64_t kReservedBits = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;

// Operand in shared memory, decoded from its descriptor. `adjacent_k` means K-major: the values of a row of a, or of a
// column of b, are adjacent.
class Operand {
public:
    const uint64_t reserved_bits;
    const int base_offset;
    const Swizzle swizzle;

    Operand(uint64_t descriptor, bool adjacent_k)
        : reserved_bits(descriptor & kReservedBits),
          base_offset(static_cast<int>(descriptor >> 49 & 7)),
          swizzle(static_cast<Swizzle>(descriptor >> 62)),
          start_(static_cast<int64_t>(descriptor & 0x3fff) << 4),
          leading_(static_cast<int64_t>(descriptor >> 16 & 0x3fff) << 4),
          stride_(static_cast<int64_t>(descriptor >> 32 & 0x3fff) << 4),
          adjacent_k_(adjacent_k) {}

    // Return the address of 16 bytes, which are eight values. K-major: a line is a row of a or a column of b, with 16
    // values of k in two chunks. Otherwise: a line is one k, and a chunk has eight columns of b.
    int64_t address(int line, int chunk) const {
        const int64_t span = static_cast<int64_t>(swizzle_span(swizzle));
        const int64_t group = line / 8, within = line % 8 * span;
        if (swizzle == Swizzle::kNone) {
            return start_ + within +
                   (adjacent_k_ ? group * stride_ + chunk * leading_ : group * leading_ + chunk * stride_);
        }
        const int64_t chunks = span / kChunk;
        return swizzled(
            start_ + within + group * stride_ + chunk / chunks * leading_ + chunk % chunks * kChunk, swizzle);
    }

private:
    const int64_t start_, leading_, stride_;
    const bool adjacent_k_;
};

// Check that the thread of `by` may read lines [begin, end) of an operand through the asynchronous proxy. A line has
// `chunks` times 16 bytes. The reads are recorded for the wgmma unit of the thread's warp.
inline void note_operand(
    Block& block, const Accessor& by, uint32_t group, const char* name, const Operand& operand, bool adjacent_k,
    int begin, int end, int chunks, SourceLocation location) {
    const std::string what = concatenate("operand ", name, " of wgmma");
    if (operand.reserved_bits != 0) {
        block.fail(
            location, concatenate(
                          "wgmma: bit ", __builtin_ctzll(operand.reserved_bits), " of the descriptor of ", name,
                          " is reserved: start and offsets are 14 bits each, in units of 16 bytes"));
    }
    if (operand.base_offset != 0) {
        block.fail(
            location, concatenate(
                          "wgmma: base offset ", operand.base_offset, " in the descriptor of ", name,
                          ": the swizzle depends on the address, the field must be 0"));
    }
    const int line_group = static_cast<int>(swizzle_span(operand.swizzle)) / kChunk;
    std::vector<Shadow::BoxPosition> first(static_cast<size_t>(chunks));
    const uint64_t number = ++block.async.operands;
    for (int line = begin; line < end; ++line) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const size_t at = block.locate(operand.address(line, chunk), kChunk, what.c_str(), location);
            uint64_t& seen = block.async.operand_of[at / kChunk];
            if (seen == number) {
                block.fail(
                    location, concatenate(
                                  "wgmma: line ", line, ", 16 bytes ", chunk, " of operand ", name,
                                  " also belong to another line: the offsets of the descriptor are wrong"));
            }
            seen = number;
            block.report_conflict(block.shadow().read_by_unit(at, by, group, location), at, location);
            const Shadow::BoxPosition place = block.shadow().box_position(at);
            // Each group of line_group chunks of a line is contiguous in the box that TMA wrote. Consecutive lines are
            // consecutive rows of the box: eight at a time if K-major, else all lines.
            const int group_begin = chunk / line_group * line_group;
            const int first_line = adjacent_k ? line / 8 * 8 : begin;
            Shadow::BoxPosition& origin = first[static_cast<size_t>(group_begin)];
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
                block.fail(
                    location, concatenate(
                                  "wgmma reads operand ", name, " with ", name_of(operand.swizzle),
                                  ", and TMA wrote it with ", name_of(box.swizzle), " at ", box.location.text()));
            }
            if (place.copy != origin.copy && line != first_line && expected >= box.chunks) {
                continue;  // another copy wrote these lines
            }
            if (origin.copy != 0 && (place.copy != origin.copy || place.chunk != expected)) {
                block.fail(
                    location,
                    concatenate(
                        "wgmma: line ", line, ", 16 bytes ", chunk, " of operand ", name, " are not where the copy at ",
                        box.location.text(), " has put them: start, offsets or swizzle of the descriptor are wrong"));
            }
        }
    }
}

constexpr int kMaxOutputs = 256;

// Compute 16 rows of sums += a * b, or of sums = a * b, for one warp.
inline void add_product(Block& block, unsigned warp, const WarpProduct& product, float (&sums)[16][kMaxOutputs]) {
    const int outputs = product.outputs;
    const Operand a(product.a, true), b(product.b, product.adjacent_k);
    const auto load_values = [&](const Operand& operand, int line, int chunk, float* target) {
        uint16_t bits[8];
        const int64_t at = operand.address(line, chunk) - kSharedWindow;
        std::memcpy(bits, block.shared_memory(static_cast<size_t>(at)), sizeof(bits));
        for (int e = 0; e < 8; ++e) {
            target[e] = product.convert(bits[e]);
        }
    };
    float right[16][kMaxOutputs];
    for (int k = 0; k < 16 && !product.adjacent_k; ++k) {
        for (int chunk = 0; chunk < outputs / 8; ++chunk) {
            load_values(b, k, chunk, right[k] + chunk * 8);
        }
    }
    for (int o = 0; o < outputs && product.adjacent_k; ++o) {
        float column[16];
        for (int chunk = 0; chunk < 2; ++chunk) {
            load_values(b, o, chunk, column + chunk * 8);
        }
        for (int k = 0; k < 16; ++k) {
            right[k][o] = column[k];
        }
    }
    for (int row = 0; row < 16; ++row) {
        float left[16];
        for (int chunk = 0; chunk < 2; ++chunk) {
            load_values(a, static_cast<int>(warp % 4) * 16 + row, chunk, left + chunk * 8);
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

// Compute the products of a warp, in order for those with the same sums.
inline void run_products(Block& block, unsigned warp, const std::vector<WarpProduct>& products) {
    std::vector<bool> done(products.size(), false);
    for (size_t first = 0; first < products.size(); ++first) {
        if (done[first]) {
            continue;
        }
        float sums[16][kMaxOutputs];
        // d_i of a lane: row lane / 4 (+ 8 for i % 4 >= 2), column 2 * (lane % 4) + i / 4 * 8 (+ 1 for odd i)
        const auto each_sum = [&](auto body) {
            for (int lane = 0; lane < kLanes; ++lane) {
                float* lane_sums = products[first].sums[lane];
                for (int i = 0; i < products[first].outputs / 2; ++i) {
                    body(lane_sums[i], sums[lane / 4 + i % 4 / 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2]);
                }
            }
        };
        each_sum([](float lane_sum, float& sum) { sum = lane_sum; });
        for (size_t i = first; i < products.size(); ++i) {
            if (products[i].sums[0] == products[first].sums[0]) {
                done[i] = true;
                add_product(block, warp, products[i], sums);
            }
        }
        each_sum([](float& lane_sum, float sum) { lane_sum = sum; });
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

// Start d (+)= a (64x16, K-major) * b (16 x outputs, K-major or with outputs adjacent), for the 128 threads of a
// warpgroup.
inline void start_product(
    ProductSlot slot, int outputs, bool adjacent_k, float (*convert)(uint16_t), SourceLocation location) {
    Block& block = current_block();
    block.track_all();
    if (slot.state->running == 0 && current_thread->wgmma_fences <= slot.state->last_access) {
        block.fail(location, "wgmma without a wgmma.fence after the last access of this thread to the accumulators");
    }
    block.warpgroup_collective("wgmma.mma_async", slot, location, [&](ProductSlot** slots) {
        for (int i = 0; i < 4 * kLanes; ++i) {
            if (slots[i]->a != slot.a || slots[i]->b != slot.b || (slots[i]->add != 0) != (slot.add != 0)) {
                block.fail(location, "wgmma: threads of the warpgroup pass different descriptors or different scale-d");
            }
        }
        const unsigned first_warp = current_thread->linear / (4 * kLanes) * 4;
        for (unsigned warp = 0; warp < 4; ++warp) {
            WgmmaUnit& unit = wgmma_unit(block, first_warp + warp);
            const int row = static_cast<int>(warp) * 16;
            // Adjacent lanes with equal times in `clocks` need only one check. Times differ if one elected lane has
            // waited for an mbarrier.
            const unsigned last = (first_warp + warp) * kLanes + kLanes - 1;
            for (unsigned thread = last + 1 - kLanes; thread <= last; ++thread) {
                if (thread == last || !(block.clocks().have_equal_times(first_warp + warp) ||
                                        block.clocks().have_equal_times(thread, thread + 1))) {
                    const Accessor by = block.accessor(thread);
                    note_operand(block, by, unit.group, "a", Operand(slot.a, true), true, row, row + 16, 2, location);
                    note_operand(
                        block, by, unit.group, "b", Operand(slot.b, adjacent_k), adjacent_k, 0,
                        adjacent_k ? outputs : 16, adjacent_k ? 2 : outputs / 8, location);
                }
            }
            WarpProduct product;
            for (int lane = 0; lane < kLanes; ++lane) {
                const ProductSlot& lane_slot = *slots[warp * kLanes + static_cast<unsigned>(lane)];
                product.sums[lane] = lane_slot.sums;
                product.states[lane] = lane_slot.state;
                ++lane_slot.state->running;
                lane_slot.state->location = location;
            }
            product.a = slot.a;
            product.b = slot.b;
            product.outputs = outputs;
            product.adjacent_k = adjacent_k;
            product.add = slot.add != 0;
            product.convert = convert;
            unit.open.push_back(product);
        }
    });
}

// Run a collective instruction that all lanes of a warp execute at the same line (.sync.aligned).
template <typename Complete>
inline void aligned_collective(const char* name, SourceLocation location, Complete complete) {
    Block& block = current_block();
    block.track_all();
    block.collective(name, 0xffffffffu, location, location, [&](SourceLocation** locations) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (locations[lane]->packed != location.packed) {
                block.fail(
                    location, concatenate(name, ": lane ", lane, " of the warp is at ", locations[lane]->text()));
            }
        }
        complete();
    });
}

inline void commit_products(SourceLocation location) {
    Block& block = current_block();
    aligned_collective("wgmma.commit_group", location, [&] {
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

inline void wait_for_products(unsigned groups, SourceLocation location) {
    Block& block = current_block();
    aligned_collective("wgmma.wait_group", location, [&] {
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

}  // namespace simt
}  // namespace spatialflow
