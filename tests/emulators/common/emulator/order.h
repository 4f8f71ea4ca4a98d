#pragma once

// The order in which ready threads, groups of 32 lanes and groups of threads run. A correct kernel has the same result
// in each.

#include "fault.h"

#include <cstdint>
#include <cstdlib>

namespace emulator {

enum class Order { forwards, backwards, shuffled };

struct Ordering {
    Order    order = Order::forwards;
    uint32_t seed  = 1;  // of Order::shuffled

    // The i-th of `count` groups.
    uint64_t group(uint64_t i, uint64_t count) const {
        const uint64_t stride = count % 7919 ? 7919 : 7907;  // prime: visits all groups out of order
        return order == Order::forwards ? i : order == Order::backwards ? count - 1 - i : (i * stride + seed) % count;
    }

    // The state for `pick` at the start of a group or launch of that number.
    uint32_t random(uint32_t number) const { return (seed + number * 2654435761u) | 1; }

    // The next set bit.
    unsigned pick(uint32_t set, uint32_t & random) const {
        switch (order) {
        case Order::forwards:
            return unsigned(__builtin_ctz(set));
        case Order::backwards:
            return 31 - unsigned(__builtin_clz(set));
        default:
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            for (unsigned skip = random % unsigned(__builtin_popcount(set)); skip > 0; skip--) {
                set &= set - 1;
            }
            return unsigned(__builtin_ctz(set));
        }
    }
};

// The variable is forwards, backwards, or a number: the seed of a shuffled order.
inline Ordering ordering_from_environment(const char * variable) {
    Ordering     result;
    const char * order = getenv(variable);
    if (order && *order >= '0' && *order <= '9') {
        result.order = Order::shuffled;
        result.seed  = uint32_t(strtoul(order, nullptr, 10));
    } else if (order && strcmp(order, "backwards") == 0) {
        result.order = Order::backwards;
    } else if (order && strcmp(order, "forwards") != 0) {
        throw Fault(format("%s is '%s'; known: forwards, backwards, a number (a shuffled order)", variable, order));
    }
    return result;
}

}  // namespace emulator
