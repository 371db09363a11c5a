// SPDX-License-Identifier: Apache-2.0
//
// cp.async, ldmatrix and mma.sync for interpreted kernels (PTX manual, "Data Movement" and "Warp Level Matrix").
//
// A cp.async is recorded as two writes: one at its start, and one when its thread waits for its group. In between, no
// thread may read the target, which keeps its previous contents. Unordered accesses by other threads are races.
#pragma once

#include "simt/intrinsics.h"

namespace spatialflow {

template <typename T>
inline void cp_async_16(
    const Shared<T>& target, const Global<const simt::same_t<T>>& source, bool valid,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    constexpr int kCount = static_cast<int>(16 / sizeof(T));
    simt::Thread::Copy copy;
    copy.target = target.checked(16, 16, location);
    copy.location = location;
    std::memset(copy.data, 0, sizeof(copy.data));
    if (valid) {
        std::memcpy(copy.data, source.checked(kCount, location), sizeof(copy.data));
    }
    simt::current_block().note_write(copy.target, 16, simt::Shadow::kPending, location);
    std::vector<std::vector<simt::Thread::Copy>>& copies = simt::current_thread->copies;
    if (copies.empty()) {
        copies.emplace_back();
    }
    copies.back().push_back(copy);
}

inline void cp_async_commit() {
    std::vector<std::vector<simt::Thread::Copy>>& copies = simt::current_thread->copies;
    if (copies.empty()) {
        copies.emplace_back();
    }
    copies.emplace_back();
}

template <int kGroups>
inline void cp_async_wait(simt::SourceLocation location = simt::SourceLocation::current()) {
    std::vector<std::vector<simt::Thread::Copy>>& copies = simt::current_thread->copies;
    simt::Block& block = simt::current_block();
    // The last entry is the open group: uncommitted copies are not waited for.
    while (copies.size() > kGroups + 1u) {
        for (const simt::Thread::Copy& copy : copies.front()) {
            block.note_write(copy.target, sizeof(copy.data), simt::Shadow::kPlain, location);
            std::memcpy(block.shared_memory(copy.target), copy.data, sizeof(copy.data));
        }
        copies.erase(copies.begin());
    }
}

namespace simt {

// Load four 8x8 matrices of 16-bit elements. Each lane passes the address of a row: eight lanes for each matrix. Lane l
// receives elements (l / 4, 2 * (l % 4)) and the next one of each matrix, or of its transpose. If a row of 16 bytes
// holds four 32-bit elements, lane l receives (l / 4, l % 4).
template <typename T>
inline void ldmatrix(
    const char* name, unsigned (&registers)[4], const Shared<T>& row, bool transposed, SourceLocation location) {
    struct Slot {
        size_t at;
        unsigned registers[4];
    } slot{row.checked(16, 16, location), {}};
    Block& block = current_block();
    block.note_read(slot.at, 16, Shadow::kPlain, location);
    block.collective(name, 0xffffffffu, slot, location, [&](Slot** slots) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t values[8][8];
            for (int r = 0; r < 8; ++r) {
                std::memcpy(values[r], block.shared_memory(slots[matrix * 8 + r]->at), 16);
            }
            for (int lane = 0; lane < kLanes; ++lane) {
                const int r = lane / 4, c = lane % 4 * 2;
                const uint16_t low = transposed ? values[c][r] : values[r][c];
                const uint16_t high = transposed ? values[c + 1][r] : values[r][c + 1];
                slots[lane]->registers[matrix] = low | static_cast<unsigned>(high) << 16;
            }
        }
    });
    std::memcpy(registers, slot.registers, sizeof(registers));
}

// Registers of a lane in a matrix product.
struct Fragments {
    float* d;
    const unsigned *a, *b;
};

template <typename T>
inline void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SourceLocation location) {
    Fragments slot{d, a, b};
    current_block().collective("mma.sync", 0xffffffffu, slot, location, [](Fragments** slots) {
        const auto half_of = [](unsigned packed, int which) {
            return load(T{static_cast<uint16_t>(packed >> (16 * which))});
        };
        float left[16][16], right[8][16];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int group = lane / 4, pair = lane % 4 * 2;
            // a_i: row group (+ 8 for i = 2, 3, 6, 7), column pair (+ 1 for odd i, + 8 for i >= 4)
            for (int i = 0; i < 8; ++i) {
                left[group + (i / 2 % 2) * 8][pair + i % 2 + (i / 4) * 8] = half_of(slots[lane]->a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i) {  // b_i: row pair (+ 1 for odd i, + 8 for i >= 2), column group
                right[group][pair + i % 2 + (i / 2) * 8] = half_of(slots[lane]->b[i / 2], i % 2);
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 4; ++i) {  // d_i: row group (+ 8 for i >= 2), column 2 * (lane % 4) (+ 1 for odd i)
                const float* row = left[lane / 4 + i / 2 * 8];
                const float* column = right[lane % 4 * 2 + i % 2];
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) {
                    sum += row[k] * column[k];
                }
                slots[lane]->d[i] += sum;
            }
        }
    });
}

// Add in float64, then round toward zero: the manual does not specify the rounding, and tensor cores truncate.
inline void mma_1688(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SourceLocation location) {
    Fragments slot{d, a, b};
    Block& block = current_block();
    block.collective("mma.sync", 0xffffffffu, slot, location, [&](Fragments** slots) {
        const auto number = [&](unsigned bits, const char* name, int lane, int i) {
            float value;
            std::memcpy(&value, &bits, sizeof(value));
            if ((bits & 0x1fffu) != 0 && value == value) {
                block.fail(
                    location, concatenate(
                                  "mma.sync: register ", i, " of ", name, " in lane ", lane, ", ", value,
                                  ", is not a TF32 number: the hardware ignores its low 13 bits"));
            }
            return static_cast<double>(value);
        };
        double left[16][8], right[8][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int group = lane / 4, k = lane % 4;
            for (int i = 0; i < 4; ++i) {  // a_i: row group (+ 8 for odd i), column k (+ 4 for i >= 2)
                left[group + i % 2 * 8][k + i / 2 * 4] = number(slots[lane]->a[i], "a", lane, i);
            }
            for (int i = 0; i < 2; ++i) {  // b_i: row k (+ 4 for i = 1), column group
                right[group][k + i * 4] = number(slots[lane]->b[i], "b", lane, i);
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 4; ++i) {  // d_i: as for mma_16816
                const double* row = left[lane / 4 + i / 2 * 8];
                const double* column = right[lane % 4 * 2 + i % 2];
                double sum = slots[lane]->d[i];
                for (int k = 0; k < 8; ++k) {
                    sum += row[k] * column[k];
                }
                float rounded = static_cast<float>(sum);
                if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) {
                    rounded = std::nextafter(rounded, 0.0f);
                }
                slots[lane]->d[i] = rounded;
            }
        }
    });
}

}  // namespace simt

template <typename T>
inline void ldmatrix_x4(
    unsigned (&registers)[4], const Shared<T>& row, simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::ldmatrix("ldmatrix", registers, row, false, location);
}
template <typename T>
inline void ldmatrix_x4_trans(
    unsigned (&registers)[4], const Shared<T>& row, simt::SourceLocation location = simt::SourceLocation::current()) {
    static_assert(sizeof(T) == 2, "ldmatrix transposes 16-bit elements");
    simt::ldmatrix("ldmatrix.trans", registers, row, true, location);
}

template <typename T>
inline void mma_16816(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T /* type of a and b */,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::mma_16816<T>(d, a, b, location);
}

inline void mma_1688(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    simt::SourceLocation location = simt::SourceLocation::current()) {
    simt::mma_1688(d, a, b, location);
}
inline void mma_1688_first(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    simt::SourceLocation location = simt::SourceLocation::current()) {
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    simt::mma_1688(d, a, b, location);
}

// Round to nearest, ties away from zero; any NaN becomes 0x7fffffff.
inline unsigned to_tf32(float value) {
    return value == value ? (__float_as_uint(value) + 0x1000u) & 0xffffe000u : 0x7fffffffu;
}

namespace simt {

// Return word `a` with both 16-bit values replaced by change(value, value of `b`).
template <typename T, typename Change>
inline unsigned change_pair(unsigned a, unsigned b, Change change) {
    T a_values[2], b_values[2];
    std::memcpy(static_cast<void*>(a_values), &a, sizeof(a));
    std::memcpy(static_cast<void*>(b_values), &b, sizeof(b));
    for (int i = 0; i < 2; ++i) {
        store(a_values[i], change(load(a_values[i]), load(b_values[i])));
    }
    std::memcpy(&a, a_values, sizeof(a));
    return a;
}

}  // namespace simt

template <typename T>
inline unsigned pack_pair(float low, float high, T /* type of the values */) {
    T values[2];
    store(values[0], low);
    store(values[1], high);
    unsigned word;
    std::memcpy(&word, values, sizeof(word));
    return word;
}
template <typename T>
inline unsigned add_pairs(unsigned a, unsigned b, T /* type of the values */) {
    return simt::change_pair<T>(a, b, [](float a_value, float b_value) { return a_value + b_value; });
}
template <typename T>
inline unsigned rectify_pairs(unsigned a, T /* type of the values */) {
    return simt::change_pair<T>(a, a, [](float value, float) { return value <= 0.0f ? 0.0f : value; });
}

}  // namespace spatialflow
