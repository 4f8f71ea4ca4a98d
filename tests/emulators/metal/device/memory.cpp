// What kernels may access. The compiler inserts a call at each memory access of a kernel, as for its own thread
// sanitizer (no sanitizer runtime is linked); the functions at the end of this file check it:
//
// - device memory: the dispatch's buffers or, if the host names them, the tensors of the node; and whether another
//   thread or threadgroup, or another dispatch between the same two barriers, has accessed the same bytes, one of them
//   writing;
// - threadgroup memory: its size, bytes that nobody has written, and races of threads between two barriers;
// - constant memory: its size; it is read-only.

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>

namespace metal_emulator {

// One bit for each byte of a line.
struct Accesses {
    uint64_t read, written;

    void add(const Accesses & others) {
        read |= others.read;
        written |= others.written;
    }
};

// The accesses of one epoch to 64 bytes of a buffer.
struct Line {
    uint32_t epoch, dispatch, threadgroup;
    uint32_t reader, writer;      // the last of the other dispatches
    Accesses here;                // by `threadgroup` of `dispatch`
    Accesses other_threadgroups;  // of `dispatch`
    Accesses other_dispatches;
};

// The accesses of one threadgroup to 64 bytes of a buffer since its last barrier for device memory.
struct Users {
    uint32_t time;
    Accesses here;
    Actor    reader[64], writer[64];  // of the bytes in `here`
};

namespace {

constexpr uint8_t SEVERAL = 0xff;  // simdgroups, lanes

// Whether nothing orders what these two do.
bool unordered(Actor a, Actor b) {
    return a.simdgroup != b.simdgroup || (a.lane != b.lane && a.meetings == b.meetings);
}

// The readers of a byte after one more.
Actor joined(Actor readers, Actor one) {
    if (!unordered(readers, one)) {
        return one;
    }
    readers.lane      = SEVERAL;
    readers.simdgroup = readers.simdgroup == one.simdgroup ? one.simdgroup : SEVERAL;
    return readers;
}

constexpr size_t GUARD  = 1 << 20;
constexpr int    POISON = 0xff;  // with this byte every float, half and bfloat is NaN

void * map(size_t bytes) {
    void * memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        throw Fault(format("no memory for %zu bytes of the emulated device", bytes));
    }
    return memory;
}

// Threadgroup memory: each array alone, far from the next one.
struct Array {
    const void * key;  // of a declaration in a kernel; nullptr: an argument
    char *       begin;
    size_t       bytes;
    std::string  name;

    std::string where(const char * address) const {
        return format("%s of %zu bytes, byte %td", name.c_str(), bytes, address - begin);
    }
};

// Who accessed a byte of threadgroup memory.
struct Cell {
    uint32_t     written_time, read_time;
    Actor        writer, reader;
    bool         atomic;
    const void * written_at;
    const void * read_at;
};

struct ThreadgroupMemory {
    static constexpr size_t BYTES = 1 << 20, GAP = 4096;

    char *             memory = static_cast<char *>(map(BYTES));
    Cell *             cells  = static_cast<Cell *>(map(BYTES * sizeof(Cell)));
    std::vector<Array> arrays;
    size_t             last = 0, used = 0, total = 0;
    uint32_t           time = 0, begin = 0;  // increases with each barrier; time of the threadgroup's begin

    bool contains(const char * address) const { return size_t(address - memory) < BYTES; }

    Array & add(const void * key, size_t bytes, const char * name) {
        total += bytes;
        if (total > MAX_THREADGROUP_MEMORY) {
            fail(format("%zu bytes of threadgroup memory; the limit is %zu", total, MAX_THREADGROUP_MEMORY));
        }
        used = (used + GAP + 63) / 64 * 64;
        arrays.push_back({ key, memory + used, bytes, name });
        memset(memory + used, POISON, bytes);
        used += bytes;
        return arrays.back();
    }
};

ThreadgroupMemory group;

struct Constants {
    const char * begin;
    size_t       bytes;
};

// A write of memory that another thread has written: a race unless the values are the same, which the next event shows.
struct Rewrite {
    const char * address = nullptr;  // nullptr: none
    size_t       bytes;
    char         before[16];
    const void * code;
    Actor        other;
    const void * other_code;
};

Rewrite                         rewrite;
Dispatch *                      current = nullptr;
std::vector<DeviceBuffer *>     buffers;  // of the current dispatch
std::vector<Constants>          constants;
size_t                          last_buffer, last_read_range, last_write_range;
uint32_t                        threadgroup;      // its number in the dispatch, from 1
uint32_t                        device_time = 0;  // increases with each threadgroup and barrier for device memory
std::map<uint32_t, std::string> names;            // of the epoch's dispatches
uint32_t                        names_epoch = 0;

std::string what(bool write) {
    return write ? "a write" : "a read";
}

[[noreturn]] void fail_at(const void * code, const std::string & text) {
    const std::string place = place_of(code);
    fail((place.empty() ? "" : place + ": ") + text);
}

// other_code: nullptr for device memory.
std::string race_text(bool write, const char * did, Actor other, const void * other_code) {
    const bool lane = other.simdgroup == current_actor().simdgroup;
    return "a race: " + what(write) + " of " + (other_code ? "threadgroup" : "device") + " memory that another " +
           (lane ? "lane" : "simdgroup") + " of the threadgroup " + did +
           (other_code ? " at " + place_of(other_code) : "") + " without a barrier between";
}

// The write may be a race with that of `other`.
void note_rewrite(const char * address, size_t bytes, const void * code, Actor other, const void * other_code) {
    if (bytes > sizeof(rewrite.before)) {
        fail_at(code, race_text(true, "wrote", other, other_code));
    }
    rewrite = { address, bytes, {}, code, other, other_code };
    memcpy(rewrite.before, address, bytes);
}

// What others did with these bytes, if it excludes this access.
const char * conflict_of(const Accesses & others, uint64_t bytes, bool write) {
    return others.written & bytes ? "writes" : write && (others.read & bytes) ? "reads" : nullptr;
}

// Races of threads of one threadgroup for bytes of one line.
void see_users(Users & users, const char * address, size_t bytes, uint64_t mask, bool write, const void * code) {
    if (users.time != device_time) {
        users.time = device_time;
        users.here = {};
    }
    const Actor self = current_actor();
    for (uint64_t left = mask; left; left &= left - 1) {
        const int      i   = __builtin_ctzll(left);
        const uint64_t bit = left & -left;
        if ((users.here.written & bit) && unordered(users.writer[i], self)) {
            if (!write) {
                fail_at(code, race_text(false, "wrote", users.writer[i], nullptr));
            }
            note_rewrite(address, bytes, code, users.writer[i], nullptr);
        }
        if (write && (users.here.read & bit) && unordered(users.reader[i], self)) {
            fail_at(code, race_text(true, "read", users.reader[i], nullptr));
        }
        if (write) {
            users.writer[i] = self;
        } else {
            users.reader[i] = users.here.read & bit ? joined(users.reader[i], self) : self;
        }
    }
    (write ? users.here.written : users.here.read) |= mask;
}

// atomic: no race with other threads.
void see_device(DeviceBuffer & buffer, const char * address, size_t bytes, bool write, bool atomic, const void * code) {
    std::vector<Range> & ranges   = current->ranges;
    bool                 writable = true;
    if (!ranges.empty()) {
        size_t & last = write ? last_write_range : last_read_range;
        if (last >= ranges.size() || address < ranges[last].begin || address + bytes > ranges[last].end) {
            last = 0;
            while (last < ranges.size() && !(address >= ranges[last].begin && address + bytes <= ranges[last].end &&
                                             (ranges[last].writable || !write))) {
                last++;
            }
            if (last == ranges.size() && !write && current->pipeline->reads_outside) {
                return;
            }
            if (last == ranges.size()) {
                const Range * near = nullptr;
                for (const Range & range : ranges) {
                    if ((range.writable || !write) && address >= range.begin && (!near || range.begin > near->begin)) {
                        near = &range;
                    }
                }
                fail_at(code, what(write) + " outside of the node's tensors" +
                                  (near ? format(": %td bytes after the end of one of %td bytes", address - near->end,
                                                 near->end - near->begin)
                                        : ""));
            }
        }
        writable = ranges[last].writable;
    }
    (write ? current->bytes_written : current->bytes_read) += bytes;
    for (size_t at = size_t(address - buffer.begin), end = at + bytes; at < end;) {
        const size_t   count = std::min(end, (at / 64 + 1) * 64) - at;
        const uint64_t mask  = (count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1) << at % 64;
        Line &         line  = buffer.lines[at / 64];
        if (line.epoch != current->epoch) {
            line          = {};
            line.epoch    = current->epoch;
            line.dispatch = current->number;
        } else if (line.dispatch != current->number) {
            line.here.add(line.other_threadgroups);
            line.reader = line.here.read ? line.dispatch : line.reader;
            line.writer = line.here.written ? line.dispatch : line.writer;
            line.other_dispatches.add(line.here);
            line.here = line.other_threadgroups = {};
            line.dispatch                       = current->number;
        } else if (line.threadgroup != threadgroup) {
            line.other_threadgroups.add(line.here);
            line.here = {};
        }
        line.threadgroup = threadgroup;
        if (const char * conflict = conflict_of(line.other_dispatches, mask, write)) {
            const uint32_t other = strcmp(conflict, "writes") == 0 ? line.writer : line.reader;
            fail_at(code, what(write) + " of bytes that " + names[other] + " " + conflict +
                              " concurrently: no memory barrier between");
        }
        if (const char * conflict = atomic ? nullptr : conflict_of(line.other_threadgroups, mask, write)) {
            fail_at(code, what(write) + " of bytes that another threadgroup of the dispatch " + conflict);
        }
        (write ? line.here.written : line.here.read) |= mask;
        if (writable && !atomic) {
            see_users(buffer.users[at / 64], address, bytes, mask, write, code);
        }
        at += count;
    }
}

void see_threadgroup(const char * address, size_t bytes, bool write, bool atomic, const void * code) {
    const auto inside = [&](const Array & array) {
        return address >= array.begin && address + bytes <= array.begin + array.bytes;
    };
    if (group.last >= group.arrays.size() || !inside(group.arrays[group.last])) {
        const auto found = std::find_if(group.arrays.begin(), group.arrays.end(), inside);
        if (found == group.arrays.end()) {
            // arrays are GAP apart
            const auto near = std::find_if(group.arrays.begin(), group.arrays.end(), [&](const Array & array) {
                return address + ThreadgroupMemory::GAP / 2 >= array.begin &&
                       address < array.begin + array.bytes + ThreadgroupMemory::GAP / 2;
            });
            if (near != group.arrays.end() && current->pipeline->overruns && address >= near->begin &&
                address + bytes <= near->begin + near->bytes + OVERRUN) {
                return;
            }
            fail_at(code, what(write) + (near == group.arrays.end()
                                             ? " outside of all threadgroup memory"
                                             : " outside of the threadgroup memory " + near->where(address)));
        }
        group.last = size_t(found - group.arrays.begin());
    }
    const Array & array = group.arrays[group.last];
    const Actor   self  = current_actor();
    const bool    steps = current->pipeline->in_step;
    const auto    apart = [&](Actor other) {
        return unordered(other, self) && !(steps && other.simdgroup == self.simdgroup);
    };
    for (size_t i = 0; i < bytes; i++) {
        Cell &     cell        = group.cells[address + i - group.memory];
        const bool both_atomic = atomic && cell.atomic;
        if (cell.written_time < group.begin) {
            if (!write) {
                fail_at(code, "a read of threadgroup memory that no thread has written: " + array.where(address + i));
            }
        } else if (cell.written_time == group.time && !both_atomic && apart(cell.writer)) {
            if (!write) {
                fail_at(code,
                        race_text(false, "wrote", cell.writer, cell.written_at) + ": " + array.where(address + i));
            }
            note_rewrite(address, bytes, code, cell.writer, cell.written_at);
        }
        if (write) {
            if (cell.read_time == group.time && !both_atomic && apart(cell.reader)) {
                fail_at(code, race_text(true, "read", cell.reader, cell.read_at) + ": " + array.where(address + i));
            }
            cell.written_time = group.time;
            cell.writer       = self;
            cell.written_at   = code;
            cell.atomic       = atomic;
        } else {
            cell.reader    = cell.read_time == group.time ? joined(cell.reader, self) : self;
            cell.read_time = group.time;
            cell.read_at   = code;
        }
    }
}

void see(const void * pointer, size_t bytes, bool write, bool atomic, const void * code) {
    const char * address = static_cast<const char *>(pointer);
    if (is_stack(address) || !in_kernel()) {
        return;
    }
    check_rewrite();
    if (group.contains(address)) {
        if (write && current->pipeline->in_step) {
            wait_for_lanes();
        }
        see_threadgroup(address, bytes, write, atomic, code);
        return;
    }
    const auto inside = [&](const DeviceBuffer * buffer) { return size_t(address - buffer->begin) < buffer->bytes; };
    if (last_buffer >= buffers.size() || !inside(buffers[last_buffer])) {
        last_buffer = size_t(std::find_if(buffers.begin(), buffers.end(), inside) - buffers.begin());
    }
    if (last_buffer < buffers.size()) {
        DeviceBuffer & buffer = *buffers[last_buffer];
        if (address + bytes > buffer.begin + buffer.bytes) {
            fail_at(code, what(write) + format(" after the end of a buffer of %zu bytes", buffer.bytes));
        }
        see_device(buffer, address, bytes, write, atomic, code);
        return;
    }
    for (const Constants & each : constants) {
        if (size_t(address - each.begin) < each.bytes) {
            if (address + bytes > each.begin + each.bytes) {
                fail_at(code, what(write) + format(" after the end of constant memory of %zu bytes", each.bytes));
            }
            return;  // C++ does not let a kernel write constant memory
        }
    }
    if (is_data_of(*current->pipeline->object, address)) {
        for (const FunctionConstant * each : current->pipeline->not_set) {
            if (each->value == address) {
                fail_at(code, format("the function constant %u, %s, is not set", each->index, each->name));
            }
        }
        return;
    }
    for (const DeviceBuffer * buffer : buffers) {
        if (address >= buffer->begin - GUARD && address < buffer->begin + buffer->bytes + GUARD) {
            const ptrdiff_t after = address - (buffer->begin + buffer->bytes);
            fail_at(code, what(write) +
                              (after < 0 ? format(" %td bytes before the begin", buffer->begin - address)
                                         : format(" %td bytes after the end", after)) +
                              format(" of a buffer of %zu bytes", buffer->bytes));
        }
    }
    for (const Constants & each : constants) {
        const ptrdiff_t after = address - (each.begin + each.bytes);
        if (after >= 0 && after < 4096) {
            fail_at(code, what(write) +
                              format(" %td bytes after the end of constant memory of %zu bytes", after, each.bytes));
        }
    }
    fail_at(code, what(write) + format(" at the address %p, which is in none of the kernel's arguments", pointer));
}

}  // namespace

// No other buffer is near.
DeviceBuffer::DeviceBuffer(size_t bytes) :
    begin(static_cast<char *>(map(bytes + 2 * GUARD)) + GUARD), bytes(bytes), owned(true), line_count(bytes / 64 + 1) {
    lines = static_cast<Line *>(map(line_count * sizeof(Line)));
    users = static_cast<Users *>(map(line_count * sizeof(Users)));
    memset(begin, POISON, bytes);
}

DeviceBuffer::DeviceBuffer(void * memory, size_t bytes) :
    begin(static_cast<char *>(memory)), bytes(bytes), owned(false), line_count(bytes / 64 + 1) {
    lines = static_cast<Line *>(map(line_count * sizeof(Line)));
    users = static_cast<Users *>(map(line_count * sizeof(Users)));
}

DeviceBuffer::~DeviceBuffer() {
    munmap(lines, line_count * sizeof(Line));
    munmap(users, line_count * sizeof(Users));
    if (owned) {
        munmap(begin - GUARD, bytes + 2 * GUARD);
    }
}

void check_rewrite() {
    if (rewrite.address) {
        const Rewrite last = rewrite;
        rewrite            = Rewrite();
        if (memcmp(last.before, last.address, last.bytes) != 0) {
            fail_at(last.code, race_text(true, "wrote", last.other, last.other_code));
        }
    }
}

void begin_dispatch(Dispatch & dispatch) {
    if (names_epoch != dispatch.epoch) {
        names.clear();
        names_epoch = dispatch.epoch;
    }
    names[dispatch.number] = dispatch.name();
    current                = &dispatch;
    buffers.clear();
    constants.clear();
    last_buffer = last_read_range = last_write_range = threadgroup = 0;
    for (Argument & argument : dispatch.arguments) {
        if (!argument.bytes.empty()) {
            constants.push_back({ argument.bytes.data(), argument.bytes.size() });
        } else if (argument.buffer && std::find(buffers.begin(), buffers.end(), argument.buffer) == buffers.end()) {
            buffers.push_back(argument.buffer);
        }
    }
}

void end_dispatch() {
    current = nullptr;
}

void begin_threadgroup() {
    rewrite = Rewrite();
    threadgroup++;
    device_time++;
    group.arrays.clear();
    group.used = group.total = group.last = 0;
    group.begin                           = ++group.time;
    for (size_t i = 0; i < current->threadgroup_memory.size(); i++) {
        group.add(nullptr, current->threadgroup_memory[i], format("argument %zu", i).c_str());
    }
}

void order_threadgroup_memory() {
    group.time++;
}

void order_device_memory() {
    device_time++;
}

void * buffer_argument(unsigned index) {
    if (index >= current->arguments.size() || !current->arguments[index].given) {
        fail(format("the buffer argument %u is not set", index));
    }
    Argument & argument = current->arguments[index];
    return argument.buffer          ? argument.buffer->begin + argument.offset
           : argument.bytes.empty() ? nullptr
                                    : argument.bytes.data();
}

// Without a size it may be passed on, but not accessed.
void * threadgroup_argument(unsigned index) {
    const bool sized = index < current->threadgroup_memory.size() && current->threadgroup_memory[index];
    return sized ? group.arrays[index].begin : group.memory;
}

void * threadgroup_array(const void * key, size_t bytes, size_t, const char * name, Place) {
    for (const Array & array : group.arrays) {
        if (array.key == key) {
            return array.begin;
        }
    }
    return group.add(key, bytes, name).begin;
}

void see_atomic(const void * address, size_t bytes) {
    see(address, bytes, true, true, __builtin_return_address(0));
}

}  // namespace metal_emulator

// The compilers' names: __tsan_read4(address), …
#define METAL_EMULATOR_SEEN(NAME, BYTES, WRITE)                                                                        \
    extern "C" void NAME(void * address) {                                                                             \
        metal_emulator::see(address, BYTES, WRITE, false, __builtin_return_address(0));                                \
    }
#define METAL_EMULATOR_SEEN_BOTH(BYTES)                                                                                \
    METAL_EMULATOR_SEEN(__tsan_read##BYTES, BYTES, false)                                                              \
    METAL_EMULATOR_SEEN(__tsan_write##BYTES, BYTES, true)                                                              \
    METAL_EMULATOR_SEEN(__tsan_unaligned_read##BYTES, BYTES, false)                                                    \
    METAL_EMULATOR_SEEN(__tsan_unaligned_write##BYTES, BYTES, true)

METAL_EMULATOR_SEEN_BOTH(1)
METAL_EMULATOR_SEEN_BOTH(2)
METAL_EMULATOR_SEEN_BOTH(4)
METAL_EMULATOR_SEEN_BOTH(8)
METAL_EMULATOR_SEEN_BOTH(16)

extern "C" {

void __tsan_read_range(void * address, size_t count) {
    metal_emulator::see(address, count, false, false, __builtin_return_address(0));
}

void __tsan_write_range(void * address, size_t count) {
    metal_emulator::see(address, count, true, false, __builtin_return_address(0));
}

void __tsan_init() {}

}  // extern "C"
