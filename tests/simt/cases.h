// SPDX-License-Identifier: Apache-2.0
//
// Command line and helpers of the interpreter's test programs, each with several small kernels (tests/test_simt.py).
// Usage: `<program> list-clean`, `<program> list-faults`, or `<program> <name>`. The last one prints "ok" and exits
// with 0, or prints the report and exits with 1.
#pragma once

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/tensor_core.cuh"

namespace spatialflow {

template <typename T>
inline Global<T> buffer(std::vector<T>& values) {
    return Global<T>(values.data(), static_cast<int64_t>(values.size()));
}

inline void expect(bool condition, const char* what) {
    if (!condition) {
        throw std::runtime_error(std::string("wrong result: ") + what);
    }
}

using Cases = std::map<std::string, void (*)()>;

inline int run_case(const Cases& clean, const Cases& faults, int count, char** arguments) {
    const std::string name = count > 1 ? arguments[1] : "";
    if (name == "list-clean" || name == "list-faults") {
        for (const auto& named_case : name == "list-clean" ? clean : faults) {
            std::puts(named_case.first.c_str());
        }
        return 0;
    }
    const Cases& cases = clean.count(name) > 0 ? clean : faults;
    const auto entry = cases.find(name);
    if (entry == cases.end()) {
        std::printf("unknown case '%s'\n", name.c_str());
        return 2;
    }
    try {
        entry->second();
    } catch (const std::exception& error) {
        std::puts(error.what());
        return 1;
    }
    std::puts("ok");
    return 0;
}

}  // namespace spatialflow
