#pragma once

// The options of a run: from the environment; they may be changed between launches.

#include "emulator/order.h"

namespace cuda_emulator {

using emulator::Fault;
using emulator::format;
using emulator::Order;
using emulator::Place;
using emulator::text_of;

// Position of a buffer or a shared array between its two guards.
enum class Placement { end, start };

struct Options : emulator::Ordering {
    Placement placement = Placement::end;

    // Maximum per block: that of sm_86, sm_89 and sm_120, the smallest of our targets except sm_75.
    size_t shared_limit = 99 * 1024;
};

// KIMI_CUDA_ORDER: forwards, backwards or a number, the seed of a shuffled order. KIMI_CUDA_PLACEMENT: end or start.
inline Options options_from_environment() {
    Options result;
    static_cast<emulator::Ordering &>(result) = emulator::ordering_from_environment("KIMI_CUDA_ORDER");
    const char * placement                    = getenv("KIMI_CUDA_PLACEMENT");
    if (placement && strcmp(placement, "start") == 0) {
        result.placement = Placement::start;
    } else if (placement && strcmp(placement, "end") != 0) {
        throw Fault(format("KIMI_CUDA_PLACEMENT is '%s'; known: end, start", placement));
    }
    return result;
}

inline Options options = options_from_environment();

}  // namespace cuda_emulator
