// One threadgroup: its threads as fibers, its simdgroups and barriers, and its scheduler.
//
// A thread runs until it waits: at a barrier, or for the other lanes of its simdgroup. The last one to arrive releases
// the others. KIMI_METAL_ORDER selects the next thread; the same simdgroup continues while one of its lanes can run.
// Threadgroups run one after another. An error of a thread returns to the host's stack, where `run` throws it.

#include "emulator.h"
#include "emulator/signals.h"
#include "stacks.h"

#include <ucontext.h>

#include <mutex>

namespace metal_emulator {

namespace {

struct Simdgroup;

struct Thread {
    void *       stack_pointer;
    Position     position;
    Simdgroup *  simdgroup;
    unsigned     lane;
    bool         ended;
    const char * waits_for;
    Place        waits_at;
};

struct Simdgroup {
    Thread * threads;
    unsigned number;
    uint32_t alive, ready, arrived, at_barrier;
    uint32_t in_step;  // wait until no other lane is ready
    uint32_t meetings;
    void **  lanes;  // the argument of each waiting lane
    Complete complete;
    Place    place;
};

struct Threadgroup {
    std::vector<Thread>    threads;
    std::vector<Simdgroup> simdgroups;
    Thread *               current = nullptr;  // nullptr: the host runs
    unsigned               ended = 0, arrived = 0;
    bool                   orders_threadgroup = false;
    bool                   orders_device      = false;
    bool                   barrier_orders     = false;    // of the kernel
    Thread *               first              = nullptr;  // at the barrier
    void *                 host_stack_pointer = nullptr;
    void *                 abandoned          = nullptr;  // receives a failed thread's stack pointer
    uint32_t               random             = 1;
    Stacks                 stacks;
    void (*run_thread)() = nullptr;
    std::string message;
    bool        failed = false;
};

Threadgroup group;

std::string name_of(const Thread & thread) {
    const Size & at = thread.position.thread_position_in_threadgroup;
    return format("thread (%u,%u,%u)", at.x, at.y, at.z);
}

// The next set bit in the order.
unsigned pick(uint32_t set) {
    return ordering.pick(set, group.random);
}

Simdgroup * next_simdgroup() {
    if (Simdgroup * simdgroup = group.current ? group.current->simdgroup : nullptr; simdgroup && !simdgroup->ready) {
        std::swap(simdgroup->ready, simdgroup->in_step);
    }
    if (ordering.order != Order::shuffled && group.current && group.current->simdgroup->ready) {
        return group.current->simdgroup;
    }
    uint32_t ready = 0;
    for (const Simdgroup & simdgroup : group.simdgroups) {
        ready |= uint32_t(simdgroup.ready != 0) << simdgroup.number;
    }
    return ready ? &group.simdgroups[pick(ready)] : nullptr;
}

[[noreturn]] void fail_deadlock() {
    std::string text = "divergent threads: no thread of the threadgroup can go on:";
    for (const Simdgroup & simdgroup : group.simdgroups) {
        // one line for each place at which lanes of this simdgroup wait
        uint32_t printed = ~simdgroup.alive;
        while (~printed) {
            const Thread & first = simdgroup.threads[__builtin_ctz(~printed)];
            uint32_t       here  = 0;
            for (unsigned lane = 0; lane < SIMDGROUP; lane++) {
                const bool alive = simdgroup.alive >> lane & 1;
                here |= uint32_t(alive && simdgroup.threads[lane].waits_at == first.waits_at) << lane;
            }
            printed |= here;
            text += format("\n  simdgroup %u, lanes 0x%08x (the first is %s) wait at %s, %s", simdgroup.number, here,
                           name_of(first).c_str(), first.waits_for, text_of(first.waits_at).c_str());
        }
    }
    fail(text);
}

// Yields to the next ready thread, which may be the same.
void go_on() {
    Simdgroup * simdgroup = next_simdgroup();
    if (!simdgroup) {
        fail_deadlock();
    }
    Thread & from = *group.current;
    Thread & to   = simdgroup->threads[pick(simdgroup->ready)];
    if (&from != &to) {
        group.current = &to;
        emulator_switch(&from.stack_pointer, to.stack_pointer);
    }
}

void complete(Simdgroup & simdgroup) {
    const uint32_t arrived = simdgroup.arrived;
    simdgroup.arrived      = 0;
    simdgroup.meetings++;
    simdgroup.complete(simdgroup.lanes, arrived);
    simdgroup.meetings++;
    simdgroup.ready |= arrived;
}

// Ends a thread.
[[noreturn]] void end_thread() {
    check_rewrite();
    Thread &    self      = *group.current;
    Simdgroup & simdgroup = *self.simdgroup;
    if (group.arrived) {
        fail(format("divergent barrier: this thread ended while %s waits for it at threadgroup_barrier, %s",
                    name_of(*group.first).c_str(), text_of(group.first->waits_at).c_str()));
    }
    self.ended = true;
    simdgroup.alive &= ~(1u << self.lane);
    simdgroup.ready &= ~(1u << self.lane);
    if (simdgroup.arrived && simdgroup.arrived == simdgroup.alive) {
        complete(simdgroup);
    }
    if (++group.ended == group.threads.size()) {
        emulator_switch(&group.abandoned, group.host_stack_pointer);
    }
    go_on();
    __builtin_unreachable();
}

void thread_main() {
    group.run_thread();
    end_thread();
}

// Runs one threadgroup; returns on the host's stack. group.failed: with an error.
void run_threadgroup(const Dispatch & dispatch, Size at) {
    const unsigned count = unsigned(dispatch.threads.count()), lanes = SIMDGROUP;
    group.threads.resize(count);
    group.simdgroups.resize((count + lanes - 1) / lanes);
    group.ended = group.arrived = 0;
    group.failed                = false;
    group.run_thread            = dispatch.pipeline->kernel->run_thread;
    group.barrier_orders        = dispatch.pipeline->barrier_orders;
    for (unsigned i = 0; i < group.simdgroups.size(); i++) {
        const unsigned living    = std::min(count - lanes * i, lanes);
        Simdgroup &    simdgroup = group.simdgroups[i] = Simdgroup();
        simdgroup.threads                              = &group.threads[lanes * i];
        simdgroup.number                               = i;
        simdgroup.alive = simdgroup.ready = ~0u >> (32 - living);
        simdgroup.lanes                   = group.stacks.lanes(i);
    }
    const Size & size = dispatch.threads;
    for (unsigned i = 0; i < count; i++) {
        Thread & thread  = group.threads[i];
        thread.position  = { size, dispatch.grid, at,       { i % size.x, i / size.x % size.y, i / (size.x * size.y) },
                             i,    i / lanes,     i % lanes };
        thread.simdgroup = &group.simdgroups[i / lanes];
        thread.lane      = i % lanes;
        thread.ended     = false;
        thread.stack_pointer = group.stacks.start(i, thread_main);
    }
    group.current         = nullptr;
    Simdgroup & simdgroup = *next_simdgroup();
    group.current         = &simdgroup.threads[pick(simdgroup.ready)];
    emulator_switch(&group.host_stack_pointer, group.current->stack_pointer);
}

void check(const Dispatch & dispatch) {
    const Kernel * kernel = dispatch.pipeline->kernel;
    const Size &   grid = dispatch.grid, &threads = dispatch.threads;
    if (threads.count() == 0 || threads.count() > dispatch.pipeline->max_threads) {
        throw Fault(format("a threadgroup is (%u,%u,%u); it must have 1 to %u threads", threads.x, threads.y, threads.z,
                           dispatch.pipeline->max_threads));
    }
    if (grid.count() == 0) {
        throw Fault(format("the grid is (%u,%u,%u)", grid.x, grid.y, grid.z));
    }
    size_t total = 0;
    for (size_t bytes : dispatch.threadgroup_memory) {
        total += bytes;
        if (bytes % 16) {
            throw Fault(format("%zu bytes of threadgroup memory; it must be a multiple of 16", bytes));
        }
    }
    if (total > MAX_THREADGROUP_MEMORY) {
        throw Fault(format("%zu bytes of threadgroup memory; the limit is %zu", total, MAX_THREADGROUP_MEMORY));
    }
    for (unsigned i = 0; i < MAX_BUFFER_ARGUMENTS; i++) {
        if (kernel && (kernel->buffers >> i & 1) && (i >= dispatch.arguments.size() || !dispatch.arguments[i].given)) {
            throw Fault(format("the buffer argument %u is not set", i));
        }
    }
}

#if defined(__x86_64__)
// Skips an integer division, whose result is then NaN's bits: by zero it has no value on a GPU, but no effect either.
// Only kernels that are compiled without the check get here.
bool skip_division(ucontext_t & context) {
    auto &                registers = context.uc_mcontext.gregs;
    const unsigned char * code      = reinterpret_cast<const unsigned char *>(registers[REG_RIP]);
    size_t                length    = (code[0] & 0xf0) == 0x40 || code[0] == 0x66;  // a prefix
    if ((code[length] & 0xfe) != 0xf6) {
        return false;
    }
    const unsigned mode = code[length + 1] >> 6, base = code[length + 1] & 7;
    const bool     scaled = mode != 3 && base == 4;
    const bool     wide   = mode == 2 || (mode == 0 && (base == 5 || (scaled && (code[length + 2] & 7) == 5)));
    length += 2 + scaled + (mode == 1 ? 1 : wide ? 4 : 0);
    registers[REG_RIP] += greg_t(length);
    registers[REG_RAX] = registers[REG_RDX] = -1;
    return true;
}
#endif

void on_signal(int signal, siginfo_t * info, [[maybe_unused]] void * context) {
    if (!group.current) {  // not ours
        ::signal(signal, SIG_DFL);
        return;
    }
#if defined(__x86_64__)
    if (signal == SIGFPE && skip_division(*static_cast<ucontext_t *>(context))) {
        return;
    }
#endif
    group.message = signal == SIGFPE                       ? "an integer division by zero"
                    : group.stacks.contains(info->si_addr) ? "local variables exceed the emulator's stack"
                                                           : format("an access of the address %p", info->si_addr);
    group.failed  = true;
    emulator_switch(&group.abandoned, group.host_stack_pointer);
}

}  // namespace

void fail(const std::string & text) {
    if (!group.current) {
        throw Fault(text);
    }
    group.message = text;
    group.failed  = true;
    emulator_switch(&group.abandoned, group.host_stack_pointer);
    __builtin_unreachable();
}

void fail_kernel(const char * text, Place place) {
    fail(text_of(place) + ": " + text);
}

bool in_kernel() {
    return group.current;
}

bool is_stack(const void * address) {
    return group.stacks.contains(address);
}

Actor current_actor() {
    const Thread & thread = *group.current;
    return { uint8_t(thread.simdgroup->number), uint8_t(thread.lane), uint16_t(thread.simdgroup->meetings) };
}

Position position() {
    return group.current->position;
}

unsigned lane_index() {
    return group.current->lane;
}

void wait_for_threadgroup(bool orders_threadgroup, bool orders_device, Place place) {
    check_rewrite();
    Thread & self = *group.current;
    if (group.ended) {
        for (const Thread & other : group.threads) {
            if (other.ended) {
                fail(text_of(place) + ": divergent barrier: threadgroup_barrier is not reached by " + name_of(other) +
                     ", which has ended");
            }
        }
    }
    self.waits_for = "threadgroup_barrier";
    self.waits_at  = place;
    if (group.arrived == 0) {
        group.first              = &self;
        group.orders_threadgroup = orders_threadgroup || group.barrier_orders;
        group.orders_device      = orders_device || group.barrier_orders;
    } else if (group.first->waits_at != place) {
        fail(text_of(place) + ": divergent barrier: " + name_of(self) + " waits here while " + name_of(*group.first) +
             " waits at " + text_of(group.first->waits_at));
    }
    self.simdgroup->at_barrier |= 1u << self.lane;
    self.simdgroup->ready &= ~(1u << self.lane);
    if (++group.arrived == group.threads.size()) {
        for (Simdgroup & simdgroup : group.simdgroups) {
            simdgroup.ready |= simdgroup.at_barrier;
            simdgroup.at_barrier = 0;
        }
        group.arrived = 0;
        if (group.orders_threadgroup) {
            order_threadgroup_memory();
        }
        if (group.orders_device) {
            order_device_memory();
        }
    }
    go_on();
}

void wait_for_lanes() {
    Thread &    self      = *group.current;
    Simdgroup & simdgroup = *self.simdgroup;
    simdgroup.in_step |= 1u << self.lane;
    simdgroup.ready &= ~(1u << self.lane);
    go_on();
}

void meet_simdgroup(void * mine, Complete completed, const char * what, Place place) {
    check_rewrite();
    Thread &    self      = *group.current;
    Simdgroup & simdgroup = *self.simdgroup;
    self.waits_for        = what;
    self.waits_at         = place;
    if (simdgroup.arrived == 0) {
        simdgroup.complete = completed;
        simdgroup.place    = place;
    } else if (simdgroup.place != place || simdgroup.complete != completed) {
        const Thread & other = simdgroup.threads[__builtin_ctz(simdgroup.arrived)];
        fail(text_of(place) + ": divergent lanes: " + name_of(self) + " is at " + what + " here while " +
             name_of(other) + " waits at " + other.waits_for + ", " + text_of(other.waits_at));
    }
    simdgroup.lanes[self.lane] = mine;
    simdgroup.arrived |= 1u << self.lane;
    simdgroup.ready &= ~(1u << self.lane);
    if (simdgroup.arrived == simdgroup.alive) {
        complete(simdgroup);
    }
    go_on();
}

void run(Dispatch & dispatch) {
    static std::mutex                 one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const std::string                 prefix = dispatch.name();
    try {
        check(dispatch);
    } catch (const Fault & fault) {
        throw Fault(prefix + " cannot be dispatched: " + fault.what());
    }
    if (!dispatch.pipeline->kernel) {
        return;
    }
    for (const Pipeline::Value & constant : dispatch.pipeline->constants) {
        memcpy(constant.at, &constant.value, constant.bytes);
    }
    begin_dispatch(dispatch);
    const emulator::CaughtSignals caught(on_signal);
    const Size &                  grid  = dispatch.grid;
    const uint64_t                count = grid.count();
    Size                          at;
    group.random = ordering.random(dispatch.number);
    for (uint64_t i = 0; i < count && !group.failed; i++) {
        const uint64_t n = ordering.group(i, count);
        at = { uint32_t(n % grid.x), uint32_t(n / grid.x % grid.y), uint32_t(n / (uint64_t(grid.x) * grid.y)) };
        try {
            begin_threadgroup();
        } catch (const Fault & fault) {
            end_dispatch();
            throw Fault(prefix + ": " + fault.what());
        }
        run_threadgroup(dispatch, at);
    }
    end_dispatch();
    const Thread * thread = group.current;
    group.current         = nullptr;
    if (group.failed) {
        group.failed = false;
        throw Fault(prefix + format(", threadgroup (%u,%u,%u), ", at.x, at.y, at.z) + name_of(*thread) + ": " +
                    group.message);
    }
}

}  // namespace metal_emulator
