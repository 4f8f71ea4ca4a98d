#pragma once

// A line of a source.

#include <cstring>

namespace emulator {

// The line of a caller, as the default of a last parameter.
struct Place {
    const char * file = nullptr;
    int          line = 0;

    static constexpr Place here(const char * file = __builtin_FILE(), int line = __builtin_LINE()) {
        return Place{ file, line };
    }

    bool operator==(const Place & other) const {
        return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
    }
    bool operator!=(const Place & other) const { return !(*this == other); }
};

}  // namespace emulator
