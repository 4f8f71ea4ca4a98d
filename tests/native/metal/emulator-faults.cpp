// Runs the kernels of emulator-faults.metal. Argument: a fault's name, or `none`. Prints the fault; exits with 1 if
// there was one.

#include "commands.h"

#include <cstdio>
#include <functional>
#include <map>
#include <numeric>

using namespace metal_emulator;

namespace {

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

struct Arguments {
    int count, shift;
};

const Size ONE, LANES{ 32, 1, 1 }, TWO_SIMDGROUPS{ 64, 1, 1 };

Values<float> counted(size_t count) {
    std::vector<float> values(count);
    std::iota(values.begin(), values.end(), 0.0f);
    return Values<float>(values);
}

void copy(const char * kernel, int shift) {
    const Values<float> x = counted(1024), y(1024);
    Commands().kernel(kernel).constant(Arguments{ 1024, shift }).with(x).with(y).dispatch({ 32, 1, 1 }, LANES).run();
}

void one(const char * kernel, Size threads = LANES) {
    const Values<float> y(1024);
    Commands().kernel(kernel).with(y).dispatch(ONE, threads).run();
}

void shifted(const char * kernel, int shift, size_t memory = 0) {
    const Values<float> y(1024);
    Commands            commands;
    commands.kernel(kernel).constant(Arguments{ 0, shift }).with(y);
    if (memory) {
        commands.threadgroup_memory(memory);
    }
    commands.dispatch(ONE, LANES).run();
}

void several(const char * kernel) {
    const Values<float> y(1024);
    Commands().kernel(kernel).with(y).dispatch({ 4, 1, 1 }, LANES).run();
}

// Two copies: the second one reads or writes what the first one writes or reads.
void two_copies(bool x_to_y_to_z, bool same_target, bool concurrent, bool barrier) {
    const Values<float> x = counted(1024), y(1024), z(1024);
    const Arguments     none{ 1024, 0 };
    Commands            commands(concurrent);
    commands.kernel("copy").constant(none).with(x).with(y).dispatch({ 32, 1, 1 }, LANES);
    if (barrier) {
        commands.barrier();
    }
    commands.kernel("copy_shifted")
        .constant(none)
        .with(x_to_y_to_z ? y : z)
        .with(same_target   ? y
              : x_to_y_to_z ? z
                            : x);
    commands.dispatch({ 32, 1, 1 }, LANES).run();
}

void outside_of_tensors(bool write) {
    const Values<float> x = counted(1024), y(1024);
    Commands            commands;
    commands.kernel(write ? "copy_shifted" : "copy").constant(Arguments{ 1024, 1 }).with(x).with(y);
    commands.dispatch({ 16, 1, 1 }, LANES);
    const char *const from = x.memory.begin, *const to = y.memory.begin;
    commands.buffer->mark(0, "COPY", { { to, to + 2048, true }, { from, from + 2048, false } });
    commands.run();
}

void scale(const std::vector<ConstantValue> & constants) {
    const Values<float> x = counted(32), y(32);
    Commands().kernel("scale", constants).with(x).with(y).dispatch(ONE, LANES).run();
    for (size_t i = 0; i < 32; i++) {
        if (y.values()[i] != 3.0f * float(i)) {
            throw std::runtime_error("a wrong value");
        }
    }
}

// Results of the order of lanes.
void order_of_lanes() {
    std::vector<float> results[2];
    for (int i = 0; i < 2; i++) {
        ordering.order = i ? Order::backwards : Order::forwards;
        const Values<float> y(32);
        Commands().kernel("order_of_lanes").with(y).dispatch(ONE, LANES).run();
        results[i] = y.values();
    }
    if (results[0] != results[1]) {
        throw Fault("the result depends on the order of lanes");
    }
}

const std::map<std::string, std::function<void()>> FAULTS = {
    { "none",
      [] {
          copy("copy", 0);
          copy("copy_shifted", 0);
          shifted("write_argument", 0, 128);
          shifted("write_array", 0);
          two_copies(true, false, true, true);
          two_copies(true, false, false, false);
          two_copies(false, false, true, true);
          two_copies(false, true, true, true);
          one("rewrite");
          several("count_atomically");
          scale({ { 7, ConstantType::int16, 3 } });
      } },
    { "read behind a buffer", [] { copy("copy", 1); } },
    { "read before a buffer", [] { copy("copy", -1); } },
    { "write behind a buffer", [] { copy("copy_shifted", 1); } },
    { "misaligned vectors", [] { copy("copy_vectors", 1); } },
    { "behind a table", [] { shifted("read_table", 1); } },
    { "behind constant memory",
      [] {
          const Values<float> y(32);
          const float         x[31] = {};
          Commands().kernel("read_constants").constant(x).constant(Arguments{}).with(y).dispatch(ONE, LANES).run();
      } },
    { "behind threadgroup memory", [] { shifted("write_argument", 1, 128); } },
    { "behind a threadgroup array", [] { shifted("write_array", 1); } },
    { "unwritten threadgroup memory", [] { one("read_unwritten"); } },
    { "a return before a barrier", [] { one("early_return", TWO_SIMDGROUPS); } },
    { "two barriers", [] { one("two_barriers", TWO_SIMDGROUPS); } },
    { "two sums", [] { one("two_sums"); } },
    { "a deadlock", [] { one("sum_or_barrier"); } },
    { "half a simdgroup's matrix", [] { one("half_a_matrix"); } },
    { "a matrix at several addresses", [] { one("matrices_of_lanes"); } },
    { "a race", [] { one("race", TWO_SIMDGROUPS); } },
    { "a race of lanes", [] { one("race_of_lanes"); } },
    { "overlapping writes of lanes", [] { one("overlap"); } },
    { "a barrier without device memory", [] { one("read_after_barrier", TWO_SIMDGROUPS); } },
    { "a barrier without memory", [] { one("barrier_without_memory", TWO_SIMDGROUPS); } },
    { "the order of lanes", order_of_lanes },
    { "a local array", [] { shifted("local_array", 4); } },
    { "a division by zero", [] { shifted("divide", 0); } },
    { "a shift too far", [] { shifted("shift", 32); } },
    { "no barrier before a read", [] { two_copies(true, false, true, false); } },
    { "no barrier before a write", [] { two_copies(false, false, true, false); } },
    { "no barrier between writes", [] { two_copies(false, true, true, false); } },
    { "writes of several threadgroups", [] { several("write_row"); } },
    { "a read of another threadgroup's bytes", [] { several("read_previous"); } },
    { "a read outside of the tensors", [] { outside_of_tensors(false); } },
    { "a write outside of the tensors", [] { outside_of_tensors(true); } },
    { "too many threads", [] { one("early_return", { 1025, 1, 1 }); } },
    { "too much threadgroup memory", [] { shifted("write_argument", 0, 32 * 1024 + 16); } },
    { "no threadgroup memory", [] { shifted("write_argument", 0); } },
    { "an argument that is not set",
      [] {
          const Values<float> x(32);
          Commands().kernel("copy").constant(Arguments{}).with(x).dispatch(ONE, LANES).run();
      } },
    { "a constant of another type", [] { scale({ { 7, ConstantType::int32, 3 } }); } },
    { "a constant that is not set", [] { scale({}); } },
};

}  // namespace

int main(int, char ** arguments) {
    try {
        FAULTS.at(arguments[1])();
    } catch (const Fault & fault) {
        printf("%s\n", fault.what());
        return 1;
    }
    printf("nothing found\n");
    return 0;
}
