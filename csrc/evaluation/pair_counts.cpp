// SPDX-License-Identifier: Apache-2.0
#include "pair_counts.h"

#include <algorithm>
#include <cstring>

#include "clones.h"
#include "id_maps.h"

namespace spatialflow::evaluation {
namespace {

constexpr size_t kChunk = 2048;  // pixels: two int32 buffers and the marks fill less than half of a 48 KB cache

uint64_t pack(int32_t first, int32_t second) {
    return static_cast<uint64_t>(static_cast<uint32_t>(first)) << 32 | static_cast<uint32_t>(second);
}

// Open addressing with linear probing. At most a quarter is filled, so that most look-ups end at the first slot and
// the branch that says so is predicted.
class PairTable {
public:
    void add(uint64_t key, int64_t count) {
        size_t i = position(key);
        while (slots_[i].count != 0 && slots_[i].key != key) i = (i + 1) & mask_;
        used_ += slots_[i].count == 0;
        slots_[i].key = key;
        slots_[i].count += count;
        if (4 * used_ > slots_.size()) grow();
    }

    std::vector<PairCount> sorted() const {
        std::vector<PairCount> pairs;
        pairs.reserve(used_);
        for (const Slot& slot : slots_) {
            if (slot.count == 0) continue;
            pairs.push_back({static_cast<int32_t>(slot.key >> 32), static_cast<int32_t>(slot.key), slot.count});
        }
        std::sort(pairs.begin(), pairs.end(), [](const PairCount& a, const PairCount& b) {
            return a.first != b.first ? a.first < b.first : a.second < b.second;
        });
        return pairs;
    }

private:
    struct Slot {
        uint64_t key = 0;
        int64_t count = 0;  // 0 marks a free slot: a stored pair has at least one pixel
    };

    size_t position(uint64_t key) const {
        // Ids may differ in any byte, so both halves are folded over the whole word before the low bits are taken.
        key = (key ^ (key >> 32)) * 0x9E3779B97F4A7C15ull + (key >> 32);
        return ((key ^ (key >> 32)) * 0xD6E8FEB86659FD93ull >> 32) & mask_;
    }

    void grow() {
        std::vector<Slot> old(4 * slots_.size());
        old.swap(slots_);
        mask_ = slots_.size() - 1;
        for (const Slot& slot : old) {
            if (slot.count == 0) continue;
            size_t i = position(slot.key);
            while (slots_[i].count != 0) i = (i + 1) & mask_;
            slots_[i] = slot;
        }
    }

    std::vector<Slot> slots_ = std::vector<Slot>(2048);
    size_t mask_ = 2047;
    size_t used_ = 0;
};

// changed[i] = the pair of pixel i differs from that of pixel i - 1; index -1 is readable.
SPATIALFLOW_CLONES void mark_changes(
    const int32_t* __restrict__ first, const int32_t* __restrict__ second, size_t count, uint8_t* __restrict__ changed) {
    for (size_t i = 0; i < count; ++i) {
        const int32_t difference = (first[i] ^ first[static_cast<ptrdiff_t>(i) - 1]) |
                                   (second[i] ^ second[static_cast<ptrdiff_t>(i) - 1]);
        changed[i] = difference != 0;
    }
}

void load_chunk(const IdImage& image, size_t begin, size_t count, int32_t* ids) {
    if (image.kind == IdImage::Kind::kIds) {
        std::memcpy(ids, static_cast<const int32_t*>(image.data) + begin, count * sizeof(int32_t));
    } else {
        decode_ids(static_cast<const uint8_t*>(image.data) + 3 * begin, count, image.kind == IdImage::Kind::kBgr, ids);
    }
}

}  // namespace

std::vector<PairCount> count_pairs(const IdImage& first, const IdImage& second, size_t pixels) {
    PairTable table;
    int32_t first_ids[1 + kChunk];  // element 0 holds the last pixel of the chunk before
    int32_t second_ids[1 + kChunk];
    alignas(8) uint8_t changed[kChunk];
    size_t run_start = 0;
    uint64_t run_key = 0;
    for (size_t begin = 0; begin < pixels; begin += kChunk) {
        const size_t count = std::min(kChunk, pixels - begin);
        load_chunk(first, begin, count, first_ids + 1);
        load_chunk(second, begin, count, second_ids + 1);
        if (begin == 0) {
            first_ids[0] = first_ids[1];
            second_ids[0] = second_ids[1];
            run_key = pack(first_ids[1], second_ids[1]);
        }
        mark_changes(first_ids + 1, second_ids + 1, count, changed);
        std::memset(changed + count, 0, kChunk - count);
        for (size_t base = 0; base < count; base += 8) {
            uint64_t marks;
            std::memcpy(&marks, changed + base, sizeof marks);
            for (; marks != 0; marks &= marks - 1) {
                const size_t i = base + static_cast<size_t>(__builtin_ctzll(marks)) / 8;
                table.add(run_key, static_cast<int64_t>(begin + i - run_start));
                run_key = pack(first_ids[1 + i], second_ids[1 + i]);
                run_start = begin + i;
            }
        }
        first_ids[0] = first_ids[count];
        second_ids[0] = second_ids[count];
    }
    if (pixels != 0) table.add(run_key, static_cast<int64_t>(pixels - run_start));
    return table.sorted();
}

}  // namespace spatialflow::evaluation
