// Where the compiler's checks of a kernel report.

#include "emulator/checks.h"

#include "emulator.h"

[[noreturn]] void emulator::fail_check(Place place, const std::string & text) {
    metal_emulator::fail(text_of(place) + ": " + text);
}
