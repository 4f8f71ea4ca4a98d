#pragma once

// Operations of the lanes of a warp: shuffles, votes, reductions, __syncwarp.
//
// Lanes that have ended do not participate. A value read from a lane that does not participate is undefined on a
// device; in the emulator it is poison (NaN).

#include "block.h"
#include "memory.h"

#include <type_traits>

namespace cuda_emulator {

template <class T> struct Shuffled {
    T   value;
    int from;  // the source lane of this lane's value
    T   result;
};

template <class T> void give_shuffled(Shuffled<T> * const * lanes, uint32_t arrived) {
    for (uint32_t rest = arrived; rest; rest &= rest - 1) {
        Shuffled<T> & mine = *lanes[__builtin_ctz(rest)];
        if (arrived >> mine.from & 1) {
            mine.result = lanes[mine.from]->value;
        } else {
            memset(static_cast<void *>(&mine.result), POISON, sizeof(T));
        }
    }
}

inline int lane() {
    return int(block.current->lane);
}

template <class T> T shuffle(uint32_t mask, T value, int from, const char * what, Place place) {
    static_assert(std::is_trivially_copyable_v<T>, "a shuffle moves values, not objects");
    Shuffled<T> mine{ value, from, value };
    meet<Shuffled<T>, give_shuffled<T>>(mask, mine, what, place);
    return mine.result;
}

inline void check_width(int width, const char * what, Place place) {
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail(format("%s: the width is %d; it must be a power of two up to 32", what, width), place);
    }
}

struct Vote {
    uint32_t value;
    uint32_t result;
};

enum class Reduction { ballot, sum, maximum, signed_maximum, disjunction };

template <Reduction REDUCTION> void reduce(Vote * const * lanes, uint32_t arrived) {
    uint32_t result = 0;
    bool     first  = true;
    for (uint32_t rest = arrived; rest; rest &= rest - 1) {
        const unsigned lane  = __builtin_ctz(rest);
        const uint32_t value = lanes[lane]->value;
        if constexpr (REDUCTION == Reduction::ballot) {
            result |= uint32_t(value != 0) << lane;
        } else if (first) {
            result = value;
        } else if constexpr (REDUCTION == Reduction::sum) {
            result += value;
        } else if constexpr (REDUCTION == Reduction::maximum) {
            result = value > result ? value : result;
        } else if constexpr (REDUCTION == Reduction::signed_maximum) {
            result = int32_t(value) > int32_t(result) ? value : result;
        } else {
            result |= value;
        }
        first = false;
    }
    for (uint32_t rest = arrived; rest; rest &= rest - 1) {
        lanes[__builtin_ctz(rest)]->result = result;
    }
}

template <Reduction REDUCTION> uint32_t vote(uint32_t mask, uint32_t value, const char * what, Place place) {
    Vote mine{ value, 0 };
    meet<Vote, reduce<REDUCTION>>(mask, mine, what, place);
    return mine.result;
}

struct Nothing {};

inline void order_memory(Nothing * const *, uint32_t) {
    block.current->warp->time++;
}

inline void meet_warp(uint32_t mask, const char * what, Place place) {
    Nothing mine;
    meet<Nothing, order_memory>(mask, mine, what, place);
}

}  // namespace cuda_emulator

inline void __syncwarp(unsigned mask = ~0u, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::meet_warp(mask, "__syncwarp", place);
}

template <class T>
T __shfl_sync(
    unsigned mask, T value, int from, int width = 32, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::check_width(width, "__shfl_sync", place);
    const int first = cuda_emulator::lane() & ~(width - 1);
    return cuda_emulator::shuffle(mask, value, first | (from & (width - 1)), "__shfl_sync", place);
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int with, int width = 32, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::check_width(width, "__shfl_xor_sync", place);
    const int lane = cuda_emulator::lane(), other = lane ^ with;
    const int last = lane | (width - 1);
    return cuda_emulator::shuffle(mask, value, other > last ? lane : other & 31, "__shfl_xor_sync", place);
}

template <class T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned by, int width = 32, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::check_width(width, "__shfl_up_sync", place);
    const int lane = cuda_emulator::lane(), other = lane - int(by);
    return cuda_emulator::shuffle(mask, value, other < (lane & ~(width - 1)) ? lane : other, "__shfl_up_sync", place);
}

// __NAME_sync(mask, value): TYPE, one reduction.
#define CUDA_EMULATOR_VOTE(NAME, RESULT, TYPE, REDUCTION, FINISH)                                                      \
    inline RESULT NAME(unsigned mask, TYPE value, cuda_emulator::Place place = cuda_emulator::Place::here()) {         \
        return RESULT(cuda_emulator::vote<cuda_emulator::Reduction::REDUCTION>(mask, uint32_t(value), #NAME, place)    \
                          FINISH);                                                                                     \
    }

CUDA_EMULATOR_VOTE(__ballot_sync, unsigned, int, ballot, )
CUDA_EMULATOR_VOTE(__any_sync, int, int, ballot, != 0)
CUDA_EMULATOR_VOTE(__reduce_add_sync, unsigned, unsigned, sum, )
CUDA_EMULATOR_VOTE(__reduce_add_sync, int, int, sum, )
CUDA_EMULATOR_VOTE(__reduce_max_sync, unsigned, unsigned, maximum, )
CUDA_EMULATOR_VOTE(__reduce_max_sync, int, int, signed_maximum, )
CUDA_EMULATOR_VOTE(__reduce_or_sync, unsigned, unsigned, disjunction, )
#undef CUDA_EMULATOR_VOTE

inline int __all_sync(unsigned mask, int predicate, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    using namespace cuda_emulator;
    return vote<Reduction::ballot>(mask, predicate == 0, "__all_sync", place) == 0;
}

inline unsigned __activemask() {
    cuda_emulator::fail("__activemask is not emulated: which lanes run together is not defined; pass a mask");
}
