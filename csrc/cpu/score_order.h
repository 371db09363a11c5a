// SPDX-License-Identifier: Apache-2.0
//
// Stable sorting by descending score: a least-significant-digit radix sort of (key, row) entries, and a selection of
// the best entries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/nms.h"

namespace spatialflow {

template <typename Key>
struct KeyedRow {
    Key key;
    uint32_t row;

    bool operator<(const KeyedRow& entry) const { return key != entry.key ? key < entry.key : row < entry.row; }
};

template <typename real_t>
using ScoreEntry = KeyedRow<decltype(descending_key(real_t{}))>;

constexpr int64_t kMaxRows = int64_t(1) << 32;  // limit of KeyedRow::row

// Sort entries[0 .. count), which are in ascending row order, by (key, row). No key may exceed `largest`. `scratch`
// keeps its memory between calls.
template <typename Key>
void radix_sort(KeyedRow<Key>* entries, int64_t count, Key largest, std::vector<KeyedRow<Key>>& scratch) {
    constexpr int kDigitBits = 11;
    constexpr uint32_t kBuckets = 1u << kDigitBits;
    if (count < 256) {  // for few entries a comparison sort is faster than the histograms
        std::sort(entries, entries + count);
        return;
    }
    int digits = 0;
    for (Key rest = largest; rest != 0; rest >>= kDigitBits) {
        ++digits;
    }
    scratch.resize(static_cast<size_t>(count));
    std::vector<uint32_t> histogram(static_cast<size_t>(digits) * kBuckets, 0);
    for (int64_t i = 0; i < count; ++i) {
        Key rest = entries[i].key;
        for (int digit = 0; digit < digits; ++digit, rest >>= kDigitBits) {
            ++histogram[digit * kBuckets + (rest & (kBuckets - 1))];
        }
    }
    KeyedRow<Key>* source = entries;
    KeyedRow<Key>* target = scratch.data();
    for (int digit = 0; digit < digits; ++digit) {
        uint32_t* starts = histogram.data() + digit * kBuckets;
        const int shift = digit * kDigitBits;
        if (starts[(source[0].key >> shift) & (kBuckets - 1)] == count) {
            continue;  // all entries share this digit
        }
        uint32_t next = 0;
        for (uint32_t bucket = 0; bucket < kBuckets; ++bucket) {
            const uint32_t size = starts[bucket];
            starts[bucket] = next;
            next += size;
        }
        for (int64_t i = 0; i < count; ++i) {
            target[starts[(source[i].key >> shift) & (kBuckets - 1)]++] = source[i];
        }
        std::swap(source, target);
    }
    if (source != entries) {
        std::copy(source, source + count, entries);
    }
}

// Move the best entries of `pending` to `chunk`: at least `min_count` entries, or all if there are fewer. Entries with
// equal keys stay together. Both vectors stay in row order.
template <typename Key>
void take_best(std::vector<KeyedRow<Key>>& pending, size_t min_count, std::vector<KeyedRow<Key>>& chunk) {
    chunk.clear();
    if (pending.size() <= 2 * min_count) {
        chunk.swap(pending);
        return;
    }
    Key lowest = pending[0].key, highest = pending[0].key;
    for (const auto& entry : pending) {
        lowest = std::min(lowest, entry.key);
        highest = std::max(highest, entry.key);
    }
    constexpr size_t kBins = 4096;
    int shift = 0;
    while (((highest - lowest) >> shift) >= kBins) {
        ++shift;
    }
    std::vector<size_t> histogram(kBins, 0);
    for (const auto& entry : pending) {
        ++histogram[(entry.key - lowest) >> shift];
    }
    size_t bins = 0;
    for (size_t taken = 0; taken < min_count; ++bins) {
        taken += histogram[bins];
    }
    size_t remaining = 0;
    for (const auto& entry : pending) {
        if (((entry.key - lowest) >> shift) < bins) {
            chunk.push_back(entry);
        } else {
            pending[remaining++] = entry;
        }
    }
    pending.resize(remaining);
}

}  // namespace spatialflow
