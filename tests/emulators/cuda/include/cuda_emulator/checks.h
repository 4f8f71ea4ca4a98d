#pragma once

// Where the compiler's checks of a kernel report.

#include "block.h"
#include "emulator/checks.h"

[[noreturn]] inline void emulator::fail_check(Place place, const std::string & text) {
    cuda_emulator::fail(text, place);
}
