#pragma once

// Command buffers: a list of commands, which run when the buffer is committed and those enqueued before it have run.

#include "emulator.h"

#include <deque>
#include <functional>

namespace metal_emulator {

struct CommandBuffer;

// A queue runs its command buffers in the order in which they were enqueued.
class Queue {
  public:
    void enqueue(const std::shared_ptr<CommandBuffer> & buffer);
    void commit(const std::shared_ptr<CommandBuffer> & buffer);  // throws Fault

  private:
    std::deque<std::shared_ptr<CommandBuffer>> waiting;
};

// MTLComputeCommandEncoder: dispatches of a concurrent encoder run concurrently up to the next barrier; others, and
// different encoders, run one after another.
class Encoder {
  public:
    Encoder(CommandBuffer & buffer, bool concurrent);

    void set_pipeline(const Pipeline * pipeline);
    void set_bytes(const void * data, size_t bytes, unsigned index);
    void set_buffer(DeviceBuffer * buffer, size_t offset, unsigned index);
    void set_threadgroup_memory(size_t bytes, unsigned index);
    void dispatch(Size grid, Size threads);
    void barrier();

  private:
    CommandBuffer & buffer;
    bool            concurrent;
    Dispatch        next;  // arguments stay set between dispatches

    Argument & argument(unsigned index);
};

struct CommandBuffer {
    using Work = std::function<void()>;  // of the host: a copy, a signal

    struct Command {
        std::unique_ptr<Dispatch> dispatch;
        Work                      work;
    };

    std::vector<Command> commands;
    bool                 enqueued = false, committed = false, completed = false;

    void add(Work work);
    // The dispatches from this number on belong to `label` and may access these ranges only.
    void mark(size_t from, const std::string & label, const std::vector<Range> & ranges);
    void run();  // throws Fault
};

}  // namespace metal_emulator
