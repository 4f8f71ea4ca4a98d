#pragma once

// Launches. Input: a kernel, its shape and arguments, from the rewritten <<<…>>>. Output: nothing, or a Fault with the
// error, the kernel, block and thread, and the line.
//
// Blocks run one after another, in the order of the options. Signals of a running kernel (an access to a guard, an
// integer division by zero) become Faults; addr2line finds their source lines.

#include "block.h"
#include "emulator/signals.h"
#include "memory.h"
#include "shared.h"
#include "streams.h"

#include <dlfcn.h>
#include <link.h>
#include <ucontext.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <map>
#include <tuple>

namespace cuda_emulator {

// The data of a signal, kept until the host's stack is reached.
struct Trap {
    int          signal  = 0;
    const char * address = nullptr;
    const void * at      = nullptr;  // the instruction
    const char * access  = "an access";
};

inline Trap trap;

inline const void * instruction(const ucontext_t & context) {
#if defined(__x86_64__)
    return reinterpret_cast<const void *>(context.uc_mcontext.gregs[REG_RIP]);
#else
    return reinterpret_cast<const void *>(context.uc_mcontext.pc);
#endif
}

inline const char * kind_of_access(const ucontext_t & context) {
#if defined(__x86_64__)
    return context.uc_mcontext.gregs[REG_ERR] & 2 ? "a write" : "a read";
#else
    (void) context;
    return "an access";
#endif
}

inline void on_signal(int signal, siginfo_t * info, void * context) {
    if (!block.current) {  // not ours
        ::signal(signal, SIG_DFL);
        return;
    }
    const ucontext_t & machine = *static_cast<const ucontext_t *>(context);
    trap         = { signal, static_cast<const char *>(info->si_addr), instruction(machine), kind_of_access(machine) };
    block.failed = true;
    emulator_switch(&block.abandoned, block.host_stack_pointer);
}

// addr2line's result for a code address: {function, file:line}, each empty if unknown.
inline std::pair<std::string, std::string> symbol(const void * address) {
    Dl_info info;
    if (!dladdr(address, &info)) {
        return {};
    }
    const auto * header = static_cast<const ElfW(Ehdr) *>(info.dli_fbase);
    const auto   offset = uintptr_t(address) - (header->e_type == ET_DYN ? uintptr_t(info.dli_fbase) : 0);
    char         program[4096];
    const auto   length              = readlink("/proc/self/exe", program, sizeof(program) - 1);
    program[length < 0 ? 0 : length] = '\0';
    const std::string command        = format("addr2line -Cfe '%s' 0x%zx 2>/dev/null", program, size_t(offset));
    FILE *            pipe           = popen(command.c_str(), "r");
    std::string       lines[2];
    for (std::string & line : lines) {
        char text[4096];
        if (pipe && fgets(text, sizeof(text), pipe)) {
            line = text;
            line.erase(line.find_last_not_of("\n") + 1);
            line = line.substr(0, line.find(" (discriminator"));
        }
        if (line.rfind("??", 0) == 0) {
            line.clear();
        }
    }
    if (pipe) {
        pclose(pipe);
    }
    return { lines[0], lines[1] };
}

// "float kernel<64>(int)" -> "kernel<64>"
inline std::string bare(std::string name) {
    int depth = 0;
    for (size_t i = 0; i < name.size(); i++) {
        depth += (name[i] == '<') - (name[i] == '>');
        if (name[i] == '(' && depth == 0) {
            name.resize(i);
        } else if (name[i] == ' ' && depth == 0) {
            name.erase(0, i + 1);
            i = size_t(-1);
        }
    }
    return name;
}

inline std::string trap_text() {
    std::string text;
    if (trap.signal == SIGFPE) {
        text = "an integer division by zero";
    } else if (block.stacks.is_guard(trap.address)) {
        text = format("the thread's local variables exceed the emulator's stack of %zu bytes", Stacks::BYTES);
    } else if (SharedArray * array = SharedArray::find(trap.address)) {
        text = std::string(trap.access) + " " + array->where(trap.address);
    } else if (shared_arena.contains(trap.address)) {
        text = std::string(trap.access) + " beyond shared memory";
    } else if (Buffer * buffer = device_memory.find(trap.address)) {
        text = std::string(trap.access) + " " + buffer->where(trap.address);
    } else {
        text = format("%s at the address %p, in no buffer of the device", trap.access,
                      static_cast<const void *>(trap.address));
    }
    const std::string place = symbol(trap.at).second;
    return (place.empty() ? "" : place + ": ") + text;
}

// The maximum dynamic shared memory that cudaFuncSetAttribute has set for a kernel.
inline std::map<const void *, size_t> & shared_attributes() {
    static std::map<const void *, size_t> attributes;
    return attributes;
}

struct Shape {
    dim3          grid, block;
    size_t        shared = 0;
    CUstream_st * stream = nullptr;
    bool          early  = false;  // before the previous kernel has ended
};

inline std::string check(const Shape & shape, const void * kernel) {
    const dim3 & g = shape.grid, &b = shape.block;
    const auto   allowed = shared_attributes().find(kernel);
    const size_t limit   = allowed == shared_attributes().end() ? 48 * 1024 : allowed->second;
    if (uint64_t(g.x) * g.y * g.z == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) {
        return format("the grid is (%u,%u,%u); it must be within (2147483647,65535,65535) and not empty", g.x, g.y,
                      g.z);
    }
    if (uint64_t(b.x) * b.y * b.z == 0 || uint64_t(b.x) * b.y * b.z > 1024 || b.z > 64) {
        return format("a block is (%u,%u,%u); it must have 1 to 1024 threads, 64 at most in z", b.x, b.y, b.z);
    }
    if (shape.shared > limit) {
        return format("%zu bytes of dynamic shared memory; %zu are allowed without (another) cudaFuncSetAttribute",
                      shape.shared, limit);
    }
    return "";
}

// A pointer argument outside all device buffers is a host pointer, or was freed.
template <class T> std::string check_argument(unsigned number, const T & argument) {
    if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>) {
        const void * const pointer = (const void *) argument;
        const Buffer *     buffer  = device_memory.find(pointer);
        if (pointer && (!buffer || buffer->freed)) {
            return format("argument %u is %p, which is %s", number, pointer,
                          buffer ? "in a freed buffer" : "no address of the device");
        }
    }
    return "";
}

// During its lifetime the CPU treats subnormal floats as zero, as with nvcc's -use_fast_math, with which ggml compiles
// its kernels.
class Flushing {
  public:
#if defined(__x86_64__)
    Flushing() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }

    ~Flushing() { _mm_setcsr(before); }

  private:
    unsigned before;
#else
    Flushing() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
    }

    ~Flushing() { asm volatile("msr fpcr, %0" : : "r"(before)); }

  private:
    uint64_t before;
#endif
};

inline void run_grid(const Shape & shape) {
    static const emulator::CaughtSignals caught(on_signal);
    const Flushing                       flushing;
    gridDim                     = shape.grid;
    blockDim                    = shape.block;
    block.early                 = shape.early;
    dynamic_shared_memory.bytes = shape.shared;
    const uint64_t blocks       = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks && !block.failed; i++) {
        const uint64_t at = options.group(i, blocks);
        blockIdx          = uint3{ unsigned(at % gridDim.x), unsigned(at / gridDim.x % gridDim.y),
                                   unsigned(at / (uint64_t(gridDim.x) * gridDim.y)) };
        run_block();
    }
}

// Throws the Fault of the last launch, if it failed.
inline void report(const char * name, const void * kernel) {
    const std::string outside_buffers = device_memory.trespasses(), outside_arrays = shared_trespasses();
    std::string       text = outside_buffers.empty() ? outside_arrays : outside_buffers;
    if (block.failed) {
        text         = trap.signal ? trap_text() : block.message;
        block.failed = false;
        trap         = {};
        text = format("block (%u,%u,%u), %s: ", blockIdx.x, blockIdx.y, blockIdx.z, name_of(*block.current).c_str()) +
               text;
    }
    block.current = nullptr;
    if (!text.empty()) {
        const std::string known = bare(symbol(kernel).first);
        throw Fault("kernel " + (known.empty() ? name : known) + ", " + text);
    }
}

template <class... P> class Configured {
  public:
    Configured(void (*kernel)(P...), const char * name, const Shape & shape) :
        kernel(kernel), name(name), shape(shape) {}

    void operator()(P... arguments) const {
        const void * const address = reinterpret_cast<const void *>(kernel);
        unsigned           number  = 0;
        std::string        wrong   = check(shape, address);
        ((wrong = wrong.empty() ? check_argument(++number, arguments) : wrong), ...);
        if (!wrong.empty()) {
            throw Fault("kernel " + std::string(name) + " cannot be launched: " + wrong);
        }
        submit(shape.stream, [=, *this] { run(arguments...); });
    }

  private:
    void (*kernel)(P...);
    const char * name;
    Shape        shape;

    void run(P... arguments) const {
        const auto closure = [&] { kernel(arguments...); };
        block.closure      = &closure;
        block.invoke       = [](const void * of) { (*static_cast<decltype(closure) *>(of))(); };
        run_grid(shape);
        report(name, reinterpret_cast<const void *>(kernel));
    }
};

// KERNEL<<<grid, block, shared, stream>>>
template <class... P>
Configured<P...> configure(
    const char * name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared = 0, CUstream_st * stream = nullptr) {
    return { kernel, name, { grid, block, shared, stream } };
}

}  // namespace cuda_emulator
