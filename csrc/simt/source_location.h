// SPDX-License-Identifier: Apache-2.0
//
// Source locations of kernel code, and the text of reports.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace spatialflow {
namespace simt {

// Source line, packed in one word to keep the shadow memory small. As a default argument, current() is the line of the
// caller.
struct SourceLocation {
    uint64_t packed = 0;

    static SourceLocation current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {
            (static_cast<uint64_t>(reinterpret_cast<uintptr_t>(file)) << 16) | (static_cast<uint64_t>(line) & 0xffffu)};
    }
    std::string text() const {
        if (packed == 0) {
            return "an unknown line";
        }
        const std::string file = reinterpret_cast<const char*>(static_cast<uintptr_t>(packed >> 16));
        return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(packed & 0xffffu);
    }
};

// Index into checked memory, with the line that uses it. The implicit conversion records the line of the caller,
// because operator[] cannot have default arguments.
struct Index {
    int64_t value;
    SourceLocation location;

    template <typename Integer>
    Index(Integer value, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : value(static_cast<int64_t>(value)), location(SourceLocation::current(file, line)) {}
};

template <typename... Parts>
inline std::string concatenate(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

}  // namespace simt
}  // namespace spatialflow
