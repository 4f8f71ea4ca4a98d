#pragma once

// The emulated device: memory, threadgroups, kernels, commands. There is one device for the process; commands run in the
// thread that commits them, one at a time.

#include "emulator/order.h"
#include "metal_emulator/runtime.h"

#include <memory>
#include <string>
#include <vector>

namespace metal_emulator {

// Apple's limits, as in the Metal feature set tables for Apple7 and later.
constexpr unsigned  MAX_THREADS            = 1024;
constexpr size_t    MAX_THREADGROUP_MEMORY = 32 * 1024;
constexpr unsigned  MAX_BUFFER_ARGUMENTS   = 31;
constexpr size_t    MAX_ARGUMENT_BYTES     = 4 * 1024;  // of set_bytes
constexpr ptrdiff_t OVERRUN                = 512;
constexpr unsigned  SIMDGROUP              = 32;

using emulator::Fault;
using emulator::format;
using emulator::Order;
using emulator::text_of;

// From KIMI_METAL_ORDER.
extern emulator::Ordering ordering;

// KIMI_METAL_DRY: dispatches are logged, kernels are neither compiled nor run.
extern const bool dry_run;

//
// memory.cpp
//

struct Line;
struct Users;

// A MTLBuffer.
struct DeviceBuffer {
    char *  begin;
    size_t  bytes;
    bool    owned;
    Line *  lines;  // what dispatches have accessed: one for each 64 bytes
    Users * users;  // of 64 bytes: the threads

    DeviceBuffer(size_t bytes);                 // new memory, which holds NaN
    DeviceBuffer(void * memory, size_t bytes);  // the host's
    DeviceBuffer(const DeviceBuffer &) = delete;
    ~DeviceBuffer();

  private:
    size_t line_count;
};

// Bytes that a dispatch may access, more narrowly than its buffers.
struct Range {
    const char * begin;
    const char * end;
    bool         writable;
};

// setBytes, or a buffer and an offset.
struct Argument {
    DeviceBuffer *    buffer = nullptr;
    size_t            offset = 0;
    std::vector<char> bytes;
    bool              given = false;
};

//
// library.cpp
//

class KernelObject;

// A kernel with the values of its function constants.
struct Pipeline {
    std::string    name;
    const Kernel * kernel         = nullptr;  // in a dry run
    KernelObject * object         = nullptr;
    bool           reads_outside  = false;        // of tensors, and does not use what it reads
    bool           overruns       = false;        // threadgroup memory by up to OVERRUN bytes
    bool           in_step        = false;        // needs lanes that run in step
    bool           barrier_orders = false;        // threadgroup memory also with mem_none
    unsigned       max_threads    = MAX_THREADS;  // of a threadgroup

    struct Value {
        void *  at;
        size_t  bytes;
        int32_t value;
    };

    std::vector<Value>                    constants;
    std::vector<const FunctionConstant *> not_set;  // of the kernel's file
};

struct ConstantValue {
    unsigned     index;
    ConstantType type;
    int32_t      value;
};

// Compiles the kernel if necessary. Raises Fault if there is none, or if a constant has another type.
std::unique_ptr<Pipeline>
make_pipeline(const std::string & kernel, const std::string & name, const std::vector<ConstantValue> & constants);

// The .metal file of a kernel, without its folder and suffix. "": there is no such kernel.
std::string file_of(const std::string & kernel);

bool is_data_of(const KernelObject & object, const char * address);

// "file:line" of a code address, or "".
std::string place_of(const void * code);

//
// commands.cpp
//

struct Dispatch {
    const Pipeline *      pipeline;
    std::vector<Argument> arguments;
    std::vector<size_t>   threadgroup_memory;
    Size                  grid, threads;
    std::vector<Range>    ranges;  // empty: all bytes of its buffers
    std::string           label;   // what the host calls it

    uint32_t number     = 0;  // unique, from 1
    uint32_t epoch      = 0;  // dispatches of one epoch are concurrent
    uint64_t bytes_read = 0, bytes_written = 0;

    std::string name() const;
};

//
// threadgroup.cpp
//

// A lane between two meetings of its simdgroup: nothing orders what several lanes do in between.
struct Actor {
    uint8_t  simdgroup, lane;
    uint16_t meetings;
};

// Runs all threadgroups. Throws Fault.
void run(Dispatch & dispatch);

bool  in_kernel();
Actor current_actor();
void  wait_for_lanes();  // until the others of the simdgroup wait, too
bool  is_stack(const void * address);

[[noreturn]] void fail(const std::string & text);

//
// memory.cpp, called by the others
//

void begin_dispatch(Dispatch & dispatch);
void begin_threadgroup();  // places dynamic threadgroup memory
void end_dispatch();
void check_rewrite();             // after a write that may be a race
void order_threadgroup_memory();  // after a barrier
void order_device_memory();

}  // namespace metal_emulator
