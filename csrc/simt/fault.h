// SPDX-License-Identifier: Apache-2.0
//
// Where in a kernel something happened, and what went wrong there.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace spatialflow {
namespace simt {

// A source line, in one word so that shadow memory stays small. Default arguments make it the caller's line.
struct Site {
    uint64_t packed = 0;

    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
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

// An index into watched memory together with the line that uses it: an implicit conversion takes the caller's line,
// which an operator[] could not ask for itself.
struct Index {
    int64_t value;
    Site site;

    template <typename Integer>
    Index(Integer value, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : value(static_cast<int64_t>(value)), site(Site::here(file, line)) {}
};

template <typename... Parts>
inline std::string concatenate(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

}  // namespace simt
}  // namespace spatialflow
