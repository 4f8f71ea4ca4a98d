#include "commands.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace metal_emulator {

namespace {

std::atomic<uint32_t> last_epoch{ 0 }, last_dispatch{ 0 };

// KIMI_METAL_LOG: a file to which a line is appended for each dispatch.
FILE * open_log() {
    const char * path = getenv("KIMI_METAL_LOG");
    return path && *path ? fopen(path, "a") : nullptr;
}

void log(const char * text) {
    static FILE * const file = open_log();
    if (file) {
        fprintf(file, "%s\n", text);
        fflush(file);
    }
}

}  // namespace

emulator::Ordering ordering = emulator::ordering_from_environment("KIMI_METAL_ORDER");
const bool         dry_run  = getenv("KIMI_METAL_DRY") != nullptr;

std::string Dispatch::name() const {
    return "kernel " + pipeline->name + (label.empty() ? "" : " of " + label);
}

void Queue::enqueue(const std::shared_ptr<CommandBuffer> & buffer) {
    if (!buffer->enqueued) {
        buffer->enqueued = true;
        waiting.push_back(buffer);
    }
}

void Queue::commit(const std::shared_ptr<CommandBuffer> & buffer) {
    enqueue(buffer);
    buffer->committed = true;
    while (!waiting.empty() && waiting.front()->committed) {
        const std::shared_ptr<CommandBuffer> next = waiting.front();
        waiting.pop_front();
        next->run();
    }
}

Encoder::Encoder(CommandBuffer & buffer, bool concurrent) : buffer(buffer), concurrent(concurrent) {
    next.pipeline = nullptr;
    buffer.add([concurrent] { log(concurrent ? "encoder concurrent" : "encoder serial"); });
    barrier();
}

Argument & Encoder::argument(unsigned index) {
    if (index >= MAX_BUFFER_ARGUMENTS) {
        throw Fault(format("the buffer argument %u; there are %u", index, MAX_BUFFER_ARGUMENTS));
    }
    if (next.arguments.size() <= index) {
        next.arguments.resize(index + 1);
    }
    next.arguments[index]       = Argument();
    next.arguments[index].given = true;
    return next.arguments[index];
}

void Encoder::set_pipeline(const Pipeline * pipeline) {
    next.pipeline = pipeline;
}

void Encoder::set_bytes(const void * data, size_t bytes, unsigned index) {
    if (bytes > MAX_ARGUMENT_BYTES) {
        throw Fault(format("%zu bytes for the argument %u; the limit is %zu", bytes, index, MAX_ARGUMENT_BYTES));
    }
    argument(index).bytes.assign(static_cast<const char *>(data), static_cast<const char *>(data) + bytes);
}

void Encoder::set_buffer(DeviceBuffer * device_buffer, size_t offset, unsigned index) {
    if (device_buffer && offset > device_buffer->bytes) {
        throw Fault(format("the offset %zu is after the end of a buffer of %zu bytes", offset, device_buffer->bytes));
    }
    Argument & set = argument(index);
    set.buffer     = device_buffer;
    set.offset     = offset;
}

void Encoder::set_threadgroup_memory(size_t bytes, unsigned index) {
    if (next.threadgroup_memory.size() <= index) {
        next.threadgroup_memory.resize(index + 1, 0);
    }
    next.threadgroup_memory[index] = bytes;
}

void Encoder::dispatch(Size grid, Size threads) {
    if (!next.pipeline) {
        throw Fault("a dispatch without a pipeline");
    }
    if (!concurrent) {
        barrier();
    }
    next.grid    = grid;
    next.threads = threads;
    next.number  = ++last_dispatch;
    buffer.commands.push_back({ std::make_unique<Dispatch>(next), nullptr });
}

void Encoder::barrier() {
    if (concurrent && next.epoch) {
        buffer.add([] { log("barrier"); });
    }
    next.epoch = ++last_epoch;
}

void CommandBuffer::add(Work work) {
    commands.push_back({ nullptr, std::move(work) });
}

void CommandBuffer::mark(size_t from, const std::string & label, const std::vector<Range> & ranges) {
    for (size_t i = from; i < commands.size(); i++) {
        if (commands[i].dispatch) {
            commands[i].dispatch->label  = label;
            commands[i].dispatch->ranges = ranges;
        }
    }
}

void CommandBuffer::run() {
    for (Command & command : commands) {
        if (command.work) {
            command.work();
        } else {
            Dispatch & dispatch = *command.dispatch;
            metal_emulator::run(dispatch);
            log(format("dispatch %s of %s: grid (%u,%u,%u), threads (%u,%u,%u), read %llu, written %llu",
                       dispatch.pipeline->name.c_str(), dispatch.label.c_str(), dispatch.grid.x, dispatch.grid.y,
                       dispatch.grid.z, dispatch.threads.x, dispatch.threads.y, dispatch.threads.z,
                       static_cast<unsigned long long>(dispatch.bytes_read),
                       static_cast<unsigned long long>(dispatch.bytes_written))
                    .c_str());
        }
    }
    commands.clear();
    completed = true;
}

}  // namespace metal_emulator
