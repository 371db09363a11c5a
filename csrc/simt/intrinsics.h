// SPDX-License-Identifier: Apache-2.0
//
// CUDA's built-in variables and functions for interpreted kernels.
#pragma once

#include <cmath>
#include <limits>

#include "simt/memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// __shared__ is not defined: kernels declare shared memory with SPATIALFLOW_SHARED, so that accesses are checked.

#define threadIdx (::spatialflow::simt::current_thread->index)
#define blockIdx (::spatialflow::simt::current_block().index)
#define blockDim (::spatialflow::simt::current_block().launch().block)
#define gridDim (::spatialflow::simt::current_block().launch().grid)

// ---- barriers ----------------------------------------------------------------------------------------------------

inline void __syncthreads(spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    spatialflow::simt::current_block().barrier("__syncthreads", 0, location);
}
inline int __syncthreads_count(
    int predicate, spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::current_block().barrier("__syncthreads_count", predicate, location);
}
inline int __syncthreads_or(
    int predicate, spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::current_block().barrier("__syncthreads_or", predicate, location) != 0;
}
inline int __syncthreads_and(
    int predicate, spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::current_block().barrier("__syncthreads_and", !predicate, location) == 0;
}
inline void __syncwarp(
    unsigned mask = 0xffffffffu,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    struct Slot {
    } slot;
    spatialflow::simt::Block& block = spatialflow::simt::current_block();
    block.collective("__syncwarp", mask, slot, location, [&](Slot**) { block.synchronize_warp(mask); });
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}

// ---- warp collectives --------------------------------------------------------------------------------------------

namespace spatialflow {
namespace simt {

// Function that returns the source lane of lane `lane` in a shuffle, or -1 for the value of the lane itself.
using ShuffleSource = int (*)(int lane, int argument, int width);

template <typename T>
inline T shuffle(
    const char* name, unsigned mask, T value, int argument, int width, SourceLocation location, ShuffleSource source) {
    static_assert(std::is_trivially_copyable_v<T>, "shuffles move bits");
    struct Slot {
        T value, result;
        int argument, width;
    } slot{value, value, argument, width};
    Block& block = current_block();
    if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
        block.fail(location, concatenate(name, ": width must be a power of two up to 32, got ", width));
    }
    block.collective(name, mask, slot, location, [&](Slot** slots) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (!slots[lane]) {
                continue;
            }
            const int from = source(lane, slots[lane]->argument, slots[lane]->width);
            if (from >= 0 && !slots[from]) {
                block.fail(
                    location, concatenate(
                                  name, ": lane ", lane, " reads from lane ", from, ", which is not in the mask ",
                                  Block::hexadecimal(mask)));
            }
            slots[lane]->result = slots[from >= 0 ? from : lane]->value;
        }
    });
    return slot.result;
}

// Return reduce(values, lane) to each lane of the mask. values[lane] is null for lanes outside the mask.
template <typename In, typename Reduce>
inline auto vote(const char* name, unsigned mask, In value, SourceLocation location, Reduce reduce) {
    struct Slot {
        In value;
        decltype(reduce(nullptr, 0)) result;
    } slot{value, {}};
    current_block().collective(name, mask, slot, location, [&](Slot** slots) {
        const In* values[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            values[lane] = slots[lane] ? &slots[lane]->value : nullptr;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            if (slots[lane]) {
                slots[lane]->result = reduce(values, lane);
            }
        }
    });
    return slot.result;
}

template <typename In, typename Combine>
inline In reduce_lanes(const char* name, unsigned mask, In value, SourceLocation location, Combine combine) {
    return vote(name, mask, value, location, [=](const In* const* values, int) {
        In result{};
        bool first = true;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (values[lane]) {
                result = first ? *values[lane] : combine(result, *values[lane]);
                first = false;
            }
        }
        return result;
    });
}

}  // namespace simt
}  // namespace spatialflow

template <typename T>
inline T __shfl_sync(
    unsigned mask, T value, int lane, int width = 32,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::shuffle(
        "__shfl_sync", mask, value, lane, width, location,
        [](int self, int from, int size) { return (self & -size) + (from & (size - 1)); });
}
template <typename T>
inline T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = 32,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::shuffle(
        "__shfl_up_sync", mask, value, static_cast<int>(delta), width, location,
        [](int self, int by, int size) { return self % size >= by ? self - by : -1; });
}
template <typename T>
inline T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::shuffle(
        "__shfl_down_sync", mask, value, static_cast<int>(delta), width, location,
        [](int self, int by, int size) { return self % size + by < size ? self + by : -1; });
}
template <typename T>
inline T __shfl_xor_sync(
    unsigned mask, T value, int lanes, int width = 32,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::shuffle(
        "__shfl_xor_sync", mask, value, lanes, width, location, [](int self, int by, int size) {
            // Reading from a later group of `size` lanes returns the value of the lane itself.
            return (self ^ by) / size <= self / size ? self ^ by : -1;
        });
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::vote("__ballot_sync", mask, predicate, location, [](const int* const* values, int) {
        unsigned result = 0;
        for (int lane = 0; lane < 32; ++lane) {
            result |= values[lane] && *values[lane] ? 1u << lane : 0u;
        }
        return result;
    });
}
inline int __any_sync(
    unsigned mask, int predicate,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::reduce_lanes(
        "__any_sync", mask, static_cast<int>(predicate != 0), location, [](int a, int b) { return a | b; });
}
inline int __all_sync(
    unsigned mask, int predicate,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::reduce_lanes(
        "__all_sync", mask, static_cast<int>(predicate != 0), location, [](int a, int b) { return a & b; });
}
template <typename T>
inline unsigned __match_any_sync(
    unsigned mask, T value, spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::vote("__match_any_sync", mask, value, location, [](const T* const* values, int self) {
        unsigned result = 0;
        for (int lane = 0; lane < 32; ++lane) {
            result |= values[lane] && *values[lane] == *values[self] ? 1u << lane : 0u;
        }
        return result;
    });
}
inline unsigned __reduce_add_sync(
    unsigned mask, unsigned value,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::reduce_lanes(
        "__reduce_add_sync", mask, value, location, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(
    unsigned mask, unsigned value,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::reduce_lanes(
        "__reduce_max_sync", mask, value, location, [](unsigned a, unsigned b) { return a < b ? b : a; });
}
inline unsigned __reduce_min_sync(
    unsigned mask, unsigned value,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::reduce_lanes(
        "__reduce_min_sync", mask, value, location, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
// CUDA guarantees only a snapshot of the active lanes; a mask of only this lane is always valid.
inline unsigned __activemask() { return 1u << (spatialflow::simt::current_thread->linear % 32); }

// ---- atomics -----------------------------------------------------------------------------------------------------

namespace spatialflow {
namespace simt {

// Compute old = *target; *target = change(old) by compare-and-swap of the bits, and return old.
template <typename T, typename Change>
inline T exchange(T* target, Change change) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    static_assert(sizeof(T) == sizeof(Bits), "atomics take 2, 4 or 8 bytes");
    Bits* place = reinterpret_cast<Bits*>(target);
    Bits old_bits = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (true) {
        T old_value;
        std::memcpy(&old_value, &old_bits, sizeof(T));
        const T new_value = change(old_value);
        Bits new_bits;
        std::memcpy(&new_bits, &new_value, sizeof(T));
        if (__atomic_compare_exchange_n(place, &old_bits, new_bits, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            return old_value;
        }
    }
}

template <typename T, typename Change>
inline T atomic(const Global<T>& target, SourceLocation location, Change change) {
    return exchange(target.checked(1, location), change);
}
template <typename T, typename Change>
inline T atomic(const Shared<T>& target, SourceLocation location, Change change) {
    const size_t at = target.checked(sizeof(T), alignof(T), location);
    current_block().note_read(at, sizeof(T), Shadow::kAtomic, location);
    current_block().note_write(at, sizeof(T), Shadow::kAtomic, location);
    return exchange(reinterpret_cast<T*>(current_block().shared_memory(at)), change);
}

template <typename T>
struct Same {
    using type = T;
};
template <typename T>
using same_t = typename Same<T>::type;  // not deduced: the pointer determines the type

}  // namespace simt
}  // namespace spatialflow

#define SPATIALFLOW_SIMT_ATOMIC(name, expression)                                                                   \
    template <template <typename> class Pointer, typename T>                                                        \
    inline T name(                                                                                                  \
        Pointer<T> target, spatialflow::simt::same_t<T> value,                                                      \
        spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {                \
        return spatialflow::simt::atomic(target, location, [=](T old) -> T { return static_cast<T>(expression); }); \
    }
SPATIALFLOW_SIMT_ATOMIC(atomicAdd, old + value)
SPATIALFLOW_SIMT_ATOMIC(atomicSub, old - value)
SPATIALFLOW_SIMT_ATOMIC(atomicMax, old < value ? value : old)
SPATIALFLOW_SIMT_ATOMIC(atomicMin, value < old ? value : old)
SPATIALFLOW_SIMT_ATOMIC(atomicOr, old | value)
SPATIALFLOW_SIMT_ATOMIC(atomicAnd, old& value)
SPATIALFLOW_SIMT_ATOMIC(atomicXor, old ^ value)
SPATIALFLOW_SIMT_ATOMIC(atomicExch, ((void)old, value))
#undef SPATIALFLOW_SIMT_ATOMIC

template <template <typename> class Pointer, typename T>
inline T atomicCAS(
    Pointer<T> target, spatialflow::simt::same_t<T> expected, spatialflow::simt::same_t<T> value,
    spatialflow::simt::SourceLocation location = spatialflow::simt::SourceLocation::current()) {
    return spatialflow::simt::atomic(target, location, [=](T old) -> T { return old == expected ? value : old; });
}

namespace spatialflow {

template <typename real_t, int kWidth>
inline void reduce_add(
    const Global<real_t>& target, const Vec<real_t, kWidth>& values,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    real_t* place = target.checked(kWidth, location);
    for (int i = 0; i < kWidth; ++i) {
        simt::exchange(place + i, [&](real_t old) { return old + values[i]; });
    }
}

}  // namespace spatialflow

// ---- bits and mathematics ----------------------------------------------------------------------------------------

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64; }
inline unsigned __brev(unsigned value) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) {
        result |= (value >> i & 1u) << (31 - i);
    }
    return result;
}

namespace spatialflow {
namespace simt {
template <typename To, typename From>
inline To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From), "the bits of one type as another of its size");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}
}  // namespace simt
}  // namespace spatialflow

inline int __float_as_int(float value) { return spatialflow::simt::reinterpret<int>(value); }
inline unsigned __float_as_uint(float value) { return spatialflow::simt::reinterpret<unsigned>(value); }
inline float __int_as_float(int value) { return spatialflow::simt::reinterpret<float>(value); }
inline float __uint_as_float(unsigned value) { return spatialflow::simt::reinterpret<float>(value); }
inline long long __double_as_longlong(double value) { return spatialflow::simt::reinterpret<long long>(value); }
inline double __longlong_as_double(long long value) { return spatialflow::simt::reinterpret<double>(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
// Operations that the compiler never fuses into a multiply-add: each result is rounded. Kernels use them where a
// comparison must not depend on the compiler.
inline float __fadd_rn(float a, float b) {
    volatile float result = a + b;
    return result;
}
inline float __fsub_rn(float a, float b) {
    volatile float result = a - b;
    return result;
}
inline float __fmul_rn(float a, float b) {
    volatile float result = a * b;
    return result;
}
inline double __dmul_rn(double a, double b) {
    volatile double result = a * b;
    return result;
}
