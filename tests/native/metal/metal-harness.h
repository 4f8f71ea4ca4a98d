#pragma once

// For test programs: buffers of values, and dispatches of one kernel.

#include "commands.h"

#include <cstdio>

using namespace metal_emulator;

template <class T> class Values {
  public:
    explicit Values(size_t count) : memory(count * sizeof(T)), count(count) {}

    explicit Values(const std::vector<T> & values) : Values(values.size()) {
        memcpy(memory.begin, values.data(), values.size() * sizeof(T));
    }

    std::vector<T> values() const {
        const T * begin = reinterpret_cast<const T *>(memory.begin);
        return std::vector<T>(begin, begin + count);
    }

    DeviceBuffer memory;

  private:
    size_t count;
};

// Commands of one encoder, which run at the end of its life or with `run`.
class Commands {
  public:
    explicit Commands(bool concurrent = true) : encoder(*buffer, concurrent) {}

    Commands & kernel(const char * name, const std::vector<ConstantValue> & constants = {}) {
        pipelines.push_back(make_pipeline(name, name, constants));
        encoder.set_pipeline(pipelines.back().get());
        index = 0;
        return *this;
    }

    template <class T> Commands & with(const Values<T> & values, size_t offset = 0) {
        encoder.set_buffer(const_cast<DeviceBuffer *>(&values.memory), offset, index++);
        return *this;
    }

    template <class T> Commands & constant(const T & value) {
        encoder.set_bytes(&value, sizeof(value), index++);
        return *this;
    }

    Commands & threadgroup_memory(size_t bytes, unsigned at = 0) {
        encoder.set_threadgroup_memory(bytes, at);
        return *this;
    }

    Commands & dispatch(Size grid, Size threads) {
        encoder.dispatch(grid, threads);
        return *this;
    }

    Commands & barrier() {
        encoder.barrier();
        return *this;
    }

    void run() { Queue().commit(buffer); }

    std::shared_ptr<CommandBuffer> buffer = std::make_shared<CommandBuffer>();

  private:
    Encoder                                encoder;
    std::vector<std::unique_ptr<Pipeline>> pipelines;
    unsigned                               index = 0;
};
