#pragma once

// Errors in an emulated kernel.
//
// Input: a place in a source, a message. Output: a Fault, thrown in the host's thread; its text contains the kernel, the
// thread and the place.

#include "place.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace emulator {

class Fault : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

[[gnu::format(printf, 1, 2)]] inline std::string format(const char * text, ...) {
    va_list arguments, again;
    va_start(arguments, text);
    va_copy(again, arguments);
    std::string result(size_t(vsnprintf(nullptr, 0, text, arguments)), '\0');
    vsnprintf(&result[0], result.size() + 1, text, again);
    va_end(arguments);
    va_end(again);
    return result;
}

inline std::string text_of(Place place) {
    return place.file ? std::string(place.file) + ":" + std::to_string(place.line) : "?";
}

}  // namespace emulator
