// SPDX-License-Identifier: Apache-2.0
// DEFLATE (RFC 1951) into a buffer of known size.
//
// Panoptic PNGs compress a hundredfold, so nearly all time goes into long copies: matches are copied in wide steps
// past their end, into slack that the caller provides. Nothing is read outside `input` or written outside
// `output` and its slack, whatever the input says.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow::evaluation {

constexpr size_t kInflateSlack = 320;  // bytes behind the output that may be overwritten: one match and a wide store

// Returns nullptr after writing exactly `output_size` bytes, else what is wrong with the stream.
const char* inflate(
    const uint8_t* input, size_t input_size, uint8_t* output /* (output_size + kInflateSlack) */, size_t output_size);

}  // namespace spatialflow::evaluation
