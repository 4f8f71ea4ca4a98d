#pragma once

// One thread block: its threads as fibers, its warps and barriers, and its scheduler.
//
// A thread runs until it waits: at a barrier of the block, or for other lanes of its warp (shuffles, votes, mma). The
// last one to arrive releases the others. Options::order selects the next thread; the same warp continues while one of
// its lanes can run. An error of a thread ends in `fail`, which leaves the block unchanged and returns to the host's
// stack, where the launch throws.

#include "stacks.h"
#include "vector_types.h"

#include <algorithm>
#include <array>
#include <vector>

inline uint3         threadIdx, blockIdx;
inline dim3          blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_emulator {

struct Warp;

struct AsyncCopy {
    char *        to;
    unsigned char bytes[16];
    unsigned      count;  // in bytes
    unsigned      group;
    Place         place;
};

struct Thread {
    void *   stack_pointer;
    uint3    index;
    Warp *   warp;
    unsigned lane;
    bool     ended;
    bool     waited;  // for the previous kernel

    // during a wait
    const char * waits_for;
    Place        waits_at;

    std::vector<AsyncCopy> copies;  // issued, not yet arrived
    unsigned               groups;  // committed groups of copies
};

// Lanes that wait for each other.
struct Meeting {
    uint32_t     mask, arrived;
    const char * what;
    Place        place;
    void (*complete)(void * const * lanes, uint32_t arrived);
};

struct Warp {
    Thread * threads;
    unsigned number;
    uint32_t alive, ready;
    uint32_t time;       // logical clock of memory ordering in the warp
    void *   lanes[32];  // the argument of each waiting lane
    unsigned meeting_count;
    Meeting  meetings[32];
};

struct Barrier {
    unsigned                 arrived = 0;
    Place                    place;
    Thread *                 first = nullptr;
    std::array<uint32_t, 32> waiting{};  // waiting lanes of each warp
    int                      sum = 0, result = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp>   warps;
    Barrier             barrier;
    Thread *            current            = nullptr;  // nullptr: the host runs
    unsigned            ended              = 0;
    void *              host_stack_pointer = nullptr;
    void *              abandoned          = nullptr;  // receives a failed thread's stack pointer
    uint64_t            number             = 0;        // number of blocks run so far
    uint32_t            time               = 1;        // logical clock of memory ordering, over all blocks
    uint32_t            random             = 1;
    Stacks              stacks;

    void (*invoke)(const void * closure) = nullptr;
    const void * closure                 = nullptr;

    // The error that ended the block.
    std::string message;
    bool        failed = false;

    bool early = false;  // the kernel is launched before the previous one has ended
};

inline Block block;

inline std::string name_of(const Thread & thread) {
    return format("thread (%u,%u,%u)", thread.index.x, thread.index.y, thread.index.z);
}

// Ends the launch with a Fault. In a kernel the message is prefixed with the block, the thread and the place.
[[noreturn]] inline void fail(const std::string & message, Place place = {}) {
    const std::string at = place.file ? text_of(place) + ": " : "";
    if (!block.current) {
        throw Fault(at + message);
    }
    block.message = at + message;
    block.failed  = true;
    emulator_switch(&block.abandoned, block.host_stack_pointer);
    __builtin_unreachable();
}

// The next set bit in the order.
inline unsigned pick(uint32_t set) {
    return options.pick(set, block.random);
}

inline Warp * next_warp() {
    if (options.order != Order::shuffled && block.current && block.current->warp->ready) {
        return block.current->warp;
    }
    uint32_t ready = 0;
    for (const Warp & warp : block.warps) {
        ready |= uint32_t(warp.ready != 0) << warp.number;
    }
    return ready ? &block.warps[pick(ready)] : nullptr;
}

[[noreturn]] inline void fail_deadlock() {
    std::string text = "no thread of the block can go on:";
    for (const Warp & warp : block.warps) {
        // one line for each place at which lanes of this warp wait
        uint32_t printed = ~warp.alive;
        while (~printed) {
            const Thread & first = warp.threads[__builtin_ctz(~printed)];
            uint32_t       same  = 0;
            for (unsigned lane = 0; lane < 32; lane++) {
                const bool alive = warp.alive >> lane & 1;
                same |= uint32_t(alive && warp.threads[lane].waits_at == first.waits_at) << lane;
            }
            printed |= same;
            text += format("\n  warp %u, lanes 0x%08x (the first is %s) wait at %s, %s", warp.number, same,
                           name_of(first).c_str(), first.waits_for, text_of(first.waits_at).c_str());
        }
    }
    fail(text);
}

// Yields to the next ready thread, which may be the same.
inline void go_on() {
    Warp * warp = next_warp();
    if (!warp) {
        fail_deadlock();
    }
    Thread & from = *block.current;
    Thread & to   = warp->threads[pick(warp->ready)];
    if (&from != &to) {
        block.current = &to;
        threadIdx     = to.index;
        emulator_switch(&from.stack_pointer, to.stack_pointer);
    }
}

// Waits for all threads of the block. Returns the sum of their values.
inline int wait_at_barrier(int value, const char * what, Place place) {
    Thread &  self    = *block.current;
    Barrier & barrier = block.barrier;
    if (block.ended) {
        const auto other = std::find_if(block.threads.begin(), block.threads.end(),
                                        [](const Thread & thread) { return thread.ended; });
        fail(format("divergent barrier: %s is not reached by %s, which has ended", what, name_of(*other).c_str()),
             place);
    }
    if (barrier.arrived && barrier.place != place) {
        fail(format("divergent barrier: %s waits at %s here while %s waits at %s", name_of(self).c_str(), what,
                    name_of(*barrier.first).c_str(), text_of(barrier.place).c_str()),
             place);
    }
    if (!barrier.arrived) {
        barrier.first = &self;
        barrier.place = place;
        barrier.sum   = 0;
    }
    barrier.arrived++;
    barrier.sum += value;
    barrier.waiting[self.warp->number] |= 1u << self.lane;
    if (barrier.arrived == block.threads.size()) {
        for (Warp & warp : block.warps) {
            warp.ready |= barrier.waiting[warp.number];
            barrier.waiting[warp.number] = 0;
        }
        barrier.arrived = 0;
        barrier.result  = barrier.sum;
        block.time++;
    } else {
        self.warp->ready &= ~(1u << self.lane);
        self.waits_for = what;
        self.waits_at  = place;
    }
    go_on();
    return barrier.result;
}

inline void complete(Warp & warp, unsigned at) {
    const Meeting meeting = warp.meetings[at];
    warp.meetings[at]     = warp.meetings[--warp.meeting_count];
    meeting.complete(warp.lanes, meeting.arrived);
    warp.ready |= meeting.arrived;
}

// Waits until all lanes of the mask that have not ended are here. The last one calls COMPLETE(lanes, arrived), where
// lanes[i] is lane i's `mine`, which it sets for all.
template <class Data, void (*COMPLETE)(Data * const * lanes, uint32_t arrived)>
void meet(uint32_t mask, Data & mine, const char * what, Place place) {
    Thread &       self = *block.current;
    Warp &         warp = *self.warp;
    const uint32_t bit  = 1u << self.lane;
    if (!(mask & bit)) {
        fail(format("%s: lane %u calls it with the mask 0x%08x, which leaves this lane out", what, self.lane, mask),
             place);
    }
    unsigned at = 0;
    while (at < warp.meeting_count && warp.meetings[at].mask != mask) {
        at++;
    }
    Meeting & meeting = warp.meetings[at];
    if (at == warp.meeting_count) {
        warp.meeting_count++;
        meeting = Meeting{ mask, 0, what, place, [](void * const * lanes, uint32_t arrived) {
                              COMPLETE(reinterpret_cast<Data * const *>(lanes), arrived);
                          } };
    } else if (meeting.place != place) {
        const Thread & other = warp.threads[__builtin_ctz(meeting.arrived)];
        fail(format("divergent lanes: %s is at %s here while %s waits at %s, %s, with the same mask 0x%08x",
                    name_of(self).c_str(), what, name_of(other).c_str(), meeting.what, text_of(meeting.place).c_str(),
                    mask),
             place);
    }
    warp.lanes[self.lane] = &mine;
    meeting.arrived |= bit;
    if (meeting.arrived == (mask & warp.alive)) {
        complete(warp, at);
    } else {
        warp.ready &= ~bit;
        self.waits_for = what;
        self.waits_at  = place;
    }
    go_on();
}

// Ends a thread.
[[noreturn]] inline void end_thread() {
    Thread & self = *block.current;
    Warp &   warp = *self.warp;
    if (!self.copies.empty()) {
        fail("cp.async: this copy is never waited for; end with cp.async.wait_all", self.copies.front().place);
    }
    if (!self.waited) {
        fail("this thread of a kernel that is launched early ends without griddepcontrol.wait");
    }
    const Barrier & all = block.barrier;
    if (all.arrived) {
        fail(format("divergent barrier: this thread ended while %s waits for it at %s", name_of(*all.first).c_str(),
                    text_of(all.place).c_str()));
    }
    self.ended = true;
    warp.alive &= ~(1u << self.lane);
    warp.ready &= ~(1u << self.lane);
    for (unsigned at = 0; at < warp.meeting_count;) {
        if (warp.meetings[at].arrived == (warp.meetings[at].mask & warp.alive)) {
            complete(warp, at);
        } else {
            at++;
        }
    }
    if (++block.ended == block.threads.size()) {
        emulator_switch(&block.abandoned, block.host_stack_pointer);
    }
    go_on();
    __builtin_unreachable();
}

inline void thread_main() {
    try {
        block.invoke(block.closure);
    } catch (const std::exception & exception) {
        fail(std::string("an exception in a kernel: ") + exception.what());
    }
    end_thread();
}

// Runs the block blockIdx of shape blockDim; returns on the host's stack. block.failed contains the error.
inline void run_block() {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    block.number++;
    block.time++;
    block.threads.resize(count);
    block.warps.resize((count + 31) / 32);
    block.barrier = {};
    block.ended   = 0;
    block.failed  = false;
    block.random  = options.random(unsigned(block.number));
    for (unsigned i = 0; i < block.warps.size(); i++) {
        const unsigned lanes = count - 32 * i < 32 ? count - 32 * i : 32;
        Warp &         warp  = block.warps[i];
        warp.threads         = &block.threads[32 * i];
        warp.number          = i;
        warp.alive = warp.ready = ~0u >> (32 - lanes);
        warp.meeting_count      = 0;
        warp.time               = 0;
    }
    for (unsigned i = 0; i < count; i++) {
        Thread & thread      = block.threads[i];
        thread.index         = uint3{ i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y) };
        thread.warp          = &block.warps[i / 32];
        thread.lane          = i % 32;
        thread.ended         = false;
        thread.waited        = !block.early;
        thread.groups        = 0;
        thread.stack_pointer = block.stacks.start(i, thread_main);
        thread.copies.clear();
    }
    block.current  = nullptr;
    Warp &   warp  = *next_warp();
    Thread & first = warp.threads[pick(warp.ready)];
    block.current  = &first;
    threadIdx      = first.index;
    emulator_switch(&block.host_stack_pointer, first.stack_pointer);
}

}  // namespace cuda_emulator

inline void __syncthreads(cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::wait_at_barrier(0, "__syncthreads", place);
}

inline int __syncthreads_or(int predicate, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    return cuda_emulator::wait_at_barrier(predicate != 0, "__syncthreads_or", place) != 0;
}
