#pragma once

// For test programs: device buffers with RAII, and runs in every order and placement.

#include "runtime_api.h"

#include <functional>

namespace cuda_emulator {

// `count` values on the device.
template <class T> class DeviceArray {
  public:
    explicit DeviceArray(size_t count, Place place = Place::here()) :
        count(count), at(static_cast<T *>(device_memory.allocate(count * sizeof(T), place))) {}

    explicit DeviceArray(const std::vector<T> & values, Place place = Place::here()) :
        DeviceArray(values.size(), place) {
        std::copy(values.begin(), values.end(), at);
    }

    DeviceArray(const DeviceArray &)             = delete;
    DeviceArray & operator=(const DeviceArray &) = delete;

    ~DeviceArray() { device_memory.release(at); }

    T *            data() const { return at; }
    size_t         size() const { return count; }
    std::vector<T> values() const { return std::vector<T>(at, at + count); }

  private:
    size_t count;
    T *    at;
};

// A stream whose work waits until the host synchronizes (streams.h).
class Stream {
  public:
    Stream() { streams.push_back(&stream); }

    ~Stream() { streams.erase(std::find(streams.begin(), streams.end(), &stream)); }

    Stream(const Stream &)             = delete;
    Stream & operator=(const Stream &) = delete;

    cudaStream_t get() { return &stream; }

    // Runs the work. At its end, other streams may have no work left: a captured graph could not contain it.
    void finish() {
        synchronize(stream);
        for (const CUstream_st * other : streams) {
            if (!other->items.empty()) {
                throw Fault("a stream has work left that this stream does not wait for");
            }
        }
    }

  private:
    CUstream_st stream;
};

// Runs `run` forwards with buffers at the ends of their rooms, backwards with buffers at the starts, and shuffled.
// Create buffers inside of it.
inline void in_all_orders(const std::function<void(const char * name)> & run) {
    const Options before = options;
    const struct {
        const char * name;
        Order        order;
        Placement    placement;
    } setups[] = {
        { "forwards", Order::forwards, Placement::end },
        { "backwards", Order::backwards, Placement::start },
        { "shuffled", Order::shuffled, Placement::end },
    };
    for (const auto & setup : setups) {
        options.order     = setup.order;
        options.placement = setup.placement;
        run(setup.name);
    }
    options = before;
}

}  // namespace cuda_emulator
