// SPDX-License-Identifier: Apache-2.0
#include "evaluation/pair_counts.h"

#include <algorithm>
#include <cstring>

#include "evaluation/clones.h"
#include "evaluation/id_maps.h"

namespace spatialflow {
namespace {

// Mean length of runs of equal pairs, in pixels, below which sorting all pixels is faster than hashing.
constexpr size_t kNoiseRun = 8;
constexpr size_t kNoiseAllowance = 4096;  // runs that are always allowed, e.g. for a few noisy lines at the top
constexpr size_t kChunk = 2048;           // pixels; the buffers use about half of a 48 KB L1 cache

uint64_t pack(int32_t first, int32_t second) {
    return static_cast<uint64_t>(static_cast<uint32_t>(first)) << 32 | static_cast<uint32_t>(second);
}

// Hash table of pairs: open addressing with linear probing. At most a quarter of the slots is used. So most look-ups
// end at the first slot, and the branch of their loop is predicted correctly.
class PairTable {
public:
    void add(uint64_t key, int64_t count) {
        size_t i = position(key);
        while (slots_[i].count != 0 && slots_[i].key != key) {
            i = (i + 1) & mask_;
        }
        used_ += slots_[i].count == 0;
        slots_[i].key = key;
        slots_[i].count += count;
        if (4 * used_ > slots_.size()) {
            grow();
        }
    }

    std::vector<PairCount> sorted() const {
        std::vector<PairCount> pairs;
        pairs.reserve(used_);
        for (const Slot& slot : slots_) {
            if (slot.count == 0) {
                continue;
            }
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

    // First slot of a key. Ids may differ in any byte. The products make the high bits, which select the slot, depend
    // on all bytes.
    size_t position(uint64_t key) const {
        const uint32_t hash = static_cast<uint32_t>(key >> 32) * 0x9E3779B1u + static_cast<uint32_t>(key) * 0x85EBCA77u;
        return hash >> shift_;
    }

    void grow() {
        std::vector<Slot> old(4 * slots_.size());
        old.swap(slots_);
        mask_ = slots_.size() - 1;
        shift_ -= 2;
        for (const Slot& slot : old) {
            if (slot.count == 0) {
                continue;
            }
            size_t i = position(slot.key);
            while (slots_[i].count != 0) {
                i = (i + 1) & mask_;
            }
            slots_[i] = slot;
        }
    }

    std::vector<Slot> slots_ = std::vector<Slot>(2048);
    size_t mask_ = 2047;
    int shift_ = 32 - 11;
    size_t used_ = 0;
};

// Set changed[i] if the pair of pixel i differs from the pair of pixel i - 1. Index -1 must be readable.
SPATIALFLOW_CLONES void mark_changes(
    const int32_t* __restrict__ first, const int32_t* __restrict__ second, size_t count,
    uint8_t* __restrict__ changed) {
    for (size_t i = 0; i < count; ++i) {
        const int32_t difference =
            (first[i] ^ first[static_cast<ptrdiff_t>(i) - 1]) | (second[i] ^ second[static_cast<ptrdiff_t>(i) - 1]);
        changed[i] = difference != 0;
    }
}

// Find the indices in [begin, count) at which the pair changes, and return their number. Index begin - 1 must be
// readable.
size_t find_changes_portable(
    const int32_t* first, const int32_t* second, size_t begin, size_t count, int32_t* changes) {
    alignas(8) uint8_t changed[kChunk];
    mark_changes(first + begin, second + begin, count - begin, changed);
    std::memset(changed + (count - begin), 0, kChunk - (count - begin));
    size_t size = 0;
    for (size_t base = 0; base < count - begin; base += 8) {
        uint64_t marks;
        std::memcpy(&marks, changed + base, sizeof marks);
        for (; marks != 0; marks &= marks - 1) {
            changes[size++] = static_cast<int32_t>(begin + base + static_cast<size_t>(__builtin_ctzll(marks)) / 8);
        }
    }
    return size;
}

#ifdef SPATIALFLOW_AVX512
// AVX-512 version of find_changes_portable. It compresses the indices of 16 pixels at a time, without a branch per
// change, which would be mispredicted.
SPATIALFLOW_AVX512 size_t
find_changes_avx512(const int32_t* first, const int32_t* second, size_t begin, size_t count, int32_t* changes) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i last_first = _mm512_set1_epi32(first[static_cast<ptrdiff_t>(begin) - 1]);
    __m512i last_second = _mm512_set1_epi32(second[static_cast<ptrdiff_t>(begin) - 1]);
    size_t size = 0;
    for (size_t i = begin; i < count; i += 16) {
        const size_t remaining = count - i;
        const auto valid = static_cast<__mmask16>(remaining >= 16 ? 0xFFFF : (1u << remaining) - 1);
        // Prefetch the next chunk: the hardware prefetcher stops at every page. Past the end a prefetch has no effect.
        _mm_prefetch(reinterpret_cast<const char*>(first + i + kChunk), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(second + i + kChunk), _MM_HINT_T0);
        const __m512i current_first = _mm512_maskz_loadu_epi32(valid, first + i);
        const __m512i current_second = _mm512_maskz_loadu_epi32(valid, second + i);
        const __mmask16 changed =
            _mm512_mask_cmpneq_epi32_mask(valid, current_first, _mm512_alignr_epi32(current_first, last_first, 15)) |
            _mm512_mask_cmpneq_epi32_mask(valid, current_second, _mm512_alignr_epi32(current_second, last_second, 15));
        const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
        _mm512_storeu_si512(changes + size, _mm512_maskz_compress_epi32(changed, indices));
        size += static_cast<size_t>(__builtin_popcount(changed));
        last_first = current_first;
        last_second = current_second;
    }
    return size;
}
#endif

size_t find_changes(const int32_t* first, const int32_t* second, size_t begin, size_t count, int32_t* changes) {
#ifdef SPATIALFLOW_AVX512
    if (has_avx512()) {
        return find_changes_avx512(first, second, begin, count, changes);
    }
#endif
    return find_changes_portable(first, second, begin, count, changes);
}

// Return the ids of pixels [begin, begin + count), readable at index -1 unless begin is 0. RGB pixels are decoded into
// `buffer`.
const int32_t* chunk_ids(const IdImage& image, size_t begin, size_t count, int32_t* buffer /* (1 + kChunk) */) {
    if (image.kind == IdImage::Kind::kIds) {
        return static_cast<const int32_t*>(image.data) + begin;
    }
    const size_t before = begin == 0 ? 0 : 1;
    decode_ids(
        static_cast<const uint8_t*>(image.data) + 3 * (begin - before), count + before, false, buffer + 1 - before);
    return buffer + 1;
}

}  // namespace

std::optional<std::vector<PairCount>> count_pairs(const IdImage& first, const IdImage& second, size_t pixels) {
    if (pixels == 0) {
        return std::vector<PairCount>();
    }
    PairTable table;
    int32_t first_buffer[1 + kChunk];
    int32_t second_buffer[1 + kChunk];
    int32_t changes[kChunk + 16];  // a whole vector is stored, also if only its first lanes are valid
    size_t run_start = 0;
    uint64_t run_key = 0;
    size_t runs = 0;
    for (size_t begin = 0; begin < pixels; begin += kChunk) {
        const size_t count = std::min(kChunk, pixels - begin);
        const int32_t* first_ids = chunk_ids(first, begin, count, first_buffer);
        const int32_t* second_ids = chunk_ids(second, begin, count, second_buffer);
        if (begin == 0) {
            run_key = pack(first_ids[0], second_ids[0]);
        }
        const size_t num_changes = find_changes(first_ids, second_ids, begin == 0 ? 1 : 0, count, changes);
        runs += num_changes;
        if (runs > kNoiseAllowance + (begin + count) / kNoiseRun) {
            return std::nullopt;
        }
        for (size_t c = 0; c < num_changes; ++c) {
            const size_t i = static_cast<size_t>(changes[c]);
            table.add(run_key, static_cast<int64_t>(begin + i - run_start));
            run_key = pack(first_ids[i], second_ids[i]);
            run_start = begin + i;
        }
    }
    table.add(run_key, static_cast<int64_t>(pixels - run_start));
    return table.sorted();
}

}  // namespace spatialflow
