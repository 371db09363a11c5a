// SPDX-License-Identifier: Apache-2.0
//
// Channels as 32-bit words, unpacked at their use. The compiler would unpack vectors of 16-bit numbers right after each
// 16-byte load. It would then wait for each load before the next one is issued.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/platform.h"

namespace spatialflow {

// Vector of kWidth channels of a pixel.
template <typename scalar_t, int kWidth>
struct RawChannels {
    using Word = std::conditional_t<sizeof(scalar_t) * kWidth % sizeof(unsigned) == 0, unsigned, scalar_t>;
    static constexpr int kWords = static_cast<int>(sizeof(scalar_t) * kWidth / sizeof(Word));
    Vec<Word, kWords> words;

    // Value of channel i. After loops are unrolled, i is a compile-time constant in all calls.
    __device__ __forceinline__ auto value(int i) const {
        if constexpr (std::is_same_v<scalar_t, bfloat16> && kWidth > 1) {  // the upper half of a float32
            return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        } else {
            Vec<scalar_t, kWidth> values;
            memcpy(static_cast<void*>(&values), &words, sizeof(values));
            return load(values[i]);
        }
    }

    // Add weight * channel i to sums[i] for all channels.
    template <typename real_t>
    __device__ __forceinline__ void add_to(real_t (&sums)[kWidth], real_t weight) const {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sums[i] += weight * value(i);
        }
    }
};

template <typename scalar_t, int kWidth>
__device__ __forceinline__ RawChannels<scalar_t, kWidth> load_raw(Global<const unsigned char> source) {
    using Raw = RawChannels<scalar_t, kWidth>;
    return {load_vector<Raw::kWords>(pointer_cast<const typename Raw::Word>(source))};
}

template <int kWidth, typename scalar_t>
__device__ __forceinline__ RawChannels<std::remove_const_t<scalar_t>, kWidth> load_channels(Global<scalar_t> source) {
    return load_raw<std::remove_const_t<scalar_t>, kWidth>(pointer_cast<const unsigned char>(source));
}

}  // namespace spatialflow
