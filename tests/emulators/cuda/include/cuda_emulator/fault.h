#pragma once

// Errors in an emulated kernel, and the options of a run.
//
// Input: a place in a source, a message. Output: a Fault, thrown by the launch in the host's thread; its text contains
// the kernel, the block, the thread and the place. The options come from the environment and may be changed between
// launches.

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cuda_emulator {

class Fault : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

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

    std::string text() const { return file ? std::string(file) + ":" + std::to_string(line) : "?"; }
};

[[gnu::format(printf, 1, 2)]] inline std::string format(const char * text, ...) {
    va_list arguments, again;
    va_start(arguments, text);
    va_copy(again, arguments);
    std::string result(vsnprintf(nullptr, 0, text, arguments), '\0');
    vsnprintf(&result[0], result.size() + 1, text, again);
    va_end(arguments);
    va_end(again);
    return result;
}

// The order in which ready threads, warps and blocks run. A correct kernel has the same result in each.
enum class Order { forwards, backwards, shuffled };

// Position of a buffer or a shared array between its two guards.
enum class Placement { end, start };

struct Options {
    Order     order     = Order::forwards;
    uint32_t  seed      = 1;  // of Order::shuffled
    Placement placement = Placement::end;

    // Subnormal floats are zero, as with nvcc's -use_fast_math, with which ggml compiles its kernels.
#if defined(CUDA_EMULATOR_EXACT_MATH)
    bool flush_subnormals = false;
#else
    bool flush_subnormals = true;
#endif

    // Maximum per block: that of sm_86, sm_89 and sm_120, the smallest of our targets except sm_75.
    size_t shared_limit = 99 * 1024;
};

// KIMI_CUDA_ORDER: forwards, backwards or a number, the seed of a shuffled order. KIMI_CUDA_PLACEMENT: end or start.
inline Options options_from_environment() {
    Options      result;
    const char * order     = getenv("KIMI_CUDA_ORDER");
    const char * placement = getenv("KIMI_CUDA_PLACEMENT");
    if (order && *order >= '0' && *order <= '9') {
        result.order = Order::shuffled;
        result.seed  = uint32_t(strtoul(order, nullptr, 10));
    } else if (order && strcmp(order, "backwards") == 0) {
        result.order = Order::backwards;
    } else if (order && strcmp(order, "forwards") != 0) {
        throw Fault(format("KIMI_CUDA_ORDER is '%s'; known: forwards, backwards, a number (a shuffled order)", order));
    }
    if (placement && strcmp(placement, "start") == 0) {
        result.placement = Placement::start;
    } else if (placement && strcmp(placement, "end") != 0) {
        throw Fault(format("KIMI_CUDA_PLACEMENT is '%s'; known: end, start", placement));
    }
    return result;
}

inline Options options = options_from_environment();

}  // namespace cuda_emulator
