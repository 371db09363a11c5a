// SPDX-License-Identifier: Apache-2.0
//
// Wrappers of the instructions that load operands and run the tensor cores, for nvcc and the interpreter (compute
// capability 8.0; semantics of the PTX manual):
//
//   cp_async_16(target, source, valid)    16 bytes from global to shared memory, zeros if not `valid`
//   cp_async_commit(), cp_async_wait<n>() closes a group of copies; waits until at most n groups are in flight
//   ldmatrix_x4, ldmatrix_x4_trans        loads four 8x8 matrices of 16-bit values; ldmatrix_x4 also 8x4 of 32-bit
//   mma_16816(d, a, b)                    d += a (16x16) * b (16x8), float16 or bfloat16 in, float32 sums
//   mma_1688(d, a, b), mma_1688_first     d += a (16x8) * b (8x8), TF32 in, float32 sums, truncated; first: d = a * b
//   to_tf32(value)                        the bits of the nearest TF32 number
//   pack_pair, add_pairs, rectify_pairs   two 16-bit values in a word: rounding from float32, sum, ReLU (NaN stays)
#pragma once

#include "cuda/platform.h"

#if defined(__CUDACC__)

namespace spatialflow {

template <typename T>
__device__ __forceinline__ unsigned shared_address(T* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

template <typename T>
__device__ __forceinline__ void cp_async_16(T* target, const T* source, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

template <typename T>
__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
}
template <typename T>
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void mma_16816(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16 /* type of a and b */) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16816(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float16 /* type of a and b */) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_1688(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_1688_first(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
__device__ __forceinline__ unsigned to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

// CUDA type of a pair of 16-bit values in a word. Pairs are loaded as words, because the compiler would wait for a
// vector of 16-bit values right after its load, in order to unpack it.
template <typename scalar_t>
struct PairOf {
    using type = __nv_bfloat162;
};
template <>
struct PairOf<float16> {
    using type = __half2;
};
template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& value) {
    static_assert(sizeof(To) == sizeof(From), "types of the same size");
    To result;
    memcpy(&result, &value, sizeof(result));
    return result;
}

__device__ __forceinline__ unsigned pack_pair(float low, float high, bfloat16 /* type of the values */) {
    return bits_as<unsigned>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ unsigned pack_pair(float low, float high, float16 /* type of the values */) {
    return bits_as<unsigned>(__floats2half2_rn(low, high));
}
template <typename scalar_t>
__device__ __forceinline__ unsigned add_pairs(unsigned a, unsigned b, scalar_t /* type of the values */) {
    using pair_t = typename PairOf<scalar_t>::type;
    return bits_as<unsigned>(__hadd2(bits_as<pair_t>(a), bits_as<pair_t>(b)));
}
template <typename scalar_t>
__device__ __forceinline__ unsigned rectify_pairs(unsigned a, scalar_t /* type of the values */) {
    using pair_t = typename PairOf<scalar_t>::type;
    return bits_as<unsigned>(__hmax2_nan(bits_as<pair_t>(a), bits_as<pair_t>(0u)));
}

}  // namespace spatialflow

#else
#include "simt/tensor_core.h"
#endif

namespace spatialflow {

// Operand types of tensor-core kernels: float16, bfloat16, or for float32 values Tf32 or Tf32x3.
struct Tf32 {};    // rounded to TF32
struct Tf32x3 {};  // split into two TF32 numbers and multiplied by three products: almost float32 precision

constexpr unsigned kTf32Bits = 0xffffe000u;  // mask of the bits of a float32 that TF32 keeps

template <typename operand_t>
struct ElementType {
    using type = operand_t;
};
template <>
struct ElementType<Tf32> {
    using type = float;
};
template <>
struct ElementType<Tf32x3> {
    using type = float;
};
// Type of an operand in memory.
template <typename operand_t>
using element_t = typename ElementType<operand_t>::type;

// True for types that are multiplied without tensor cores, by SIMT instructions.
template <typename operand_t>
constexpr bool kIsSimt = std::is_same_v<operand_t, float> || std::is_same_v<operand_t, double>;

// Return a value as an operand of many products: rounded to TF32 for Tf32, unchanged for other operand types.
template <typename value_t, typename operand_t>
__device__ __forceinline__ value_t prepared(value_t value, operand_t) {
    return value;
}
__device__ __forceinline__ unsigned prepared(unsigned word, Tf32) { return to_tf32(__uint_as_float(word)); }
__device__ __forceinline__ float prepared(float value, Tf32) { return __uint_as_float(to_tf32(value)); }
template <int kCount>
__device__ __forceinline__ Vec<float, kCount> prepared(Vec<float, kCount> values, Tf32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[i] = prepared(values[i], Tf32{});
    }
    return values;
}

// Part of a product's operand in a lane: two 16-bit values per word for mma_16816, one number for mma_1688.
template <typename operand_t, int kCount>
struct Fragment {
    unsigned words[kCount];

    __device__ __forceinline__ void set(int i, unsigned prepared) { words[i] = prepared; }
};

// `high` and `low` are truncated to TF32, not rounded. The difference of the value and `high` is exact before `low` is
// truncated. Truncation does not turn a finite number into infinity.
template <int kCount>
struct Fragment<Tf32x3, kCount> {
    unsigned high[kCount], low[kCount];

    __device__ __forceinline__ void set(int i, unsigned word) {
        high[i] = word & kTf32Bits;
        low[i] = __float_as_uint(__uint_as_float(word) - __uint_as_float(high[i])) & kTf32Bits;
    }
};

// Compute d += a * b, 16 rows by 8 columns; depth 16 in 16-bit types, 8 in float32.
template <typename scalar_t>
__device__ __forceinline__ void multiply_add(
    float (&d)[4], const Fragment<scalar_t, 4>& a, const Fragment<scalar_t, 2>& b) {
    mma_16816(d, a.words, b.words, scalar_t{});
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Fragment<Tf32, 4>& a, const Fragment<Tf32, 2>& b) {
    mma_1688(d, a.words, b.words);
}
// Compute d += a * b for Tf32x3. The product low * low is negligible. Tensor cores truncate sums. In a long sum this
// loses more precision than truncating the operands. So each call adds only its three products on tensor cores. Their
// sum is added to `d` in float32, rounded to nearest.
__device__ __forceinline__ void multiply_add(
    float (&d)[4], const Fragment<Tf32x3, 4>& a, const Fragment<Tf32x3, 2>& b) {
    float sum[4];
    mma_1688_first(sum, a.low, b.high);
    mma_1688(sum, a.high, b.low);
    mma_1688(sum, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        d[i] += sum[i];
    }
}

}  // namespace spatialflow
