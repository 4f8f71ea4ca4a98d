#pragma once

// Device memory: each buffer is between two inaccessible guards, so that an out-of-bounds access of a kernel is a fault
// at that very access. New memory holds NaN. The rest of a page next to a buffer also holds NaN and is checked after
// each launch.
//
// A buffer ends at its guard or starts at it (Options::placement): one run with each detects errors on both sides.

#include "options.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <vector>

namespace cuda_emulator {

constexpr int POISON = 0xff;  // with this byte every float, half, bfloat16 and double is NaN

inline size_t page_bytes() {
    static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

inline size_t rounded_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

// A range of address space of which some pages are accessible; the rest is guard.
class Guarded {
  public:
    char * begin = nullptr;
    size_t bytes = 0;

    // `room` is address space of `room_bytes`; the buffer is placed in its middle.
    void open(char * room, size_t room_bytes, size_t needed, size_t alignment, Placement placement) {
        close();
        const size_t page = page_bytes();
        opened            = rounded_up(needed ? needed : 1, page);
        first             = room + (room_bytes - opened) / 2 / page * page;
        bytes             = needed;
        begin             = placement == Placement::start ? first : first + opened - rounded_up(needed, alignment);
        if (opened + 2 * page > room_bytes || mprotect(first, opened, PROT_READ | PROT_WRITE) != 0) {
            throw Fault(format("no memory for %zu bytes of the emulated device", needed));
        }
        memset(first, POISON, opened);
    }

    void close() {
        if (opened) {
            madvise(first, opened, MADV_DONTNEED);
            mprotect(first, opened, PROT_NONE);
            opened = 0;
        }
    }

    void poison() { memset(begin, POISON, bytes); }

    // "4 bytes after the end of NAME"
    std::string where(const char * address, const std::string & name) const {
        if (address < begin) {
            return format("%td bytes before the begin of %s", begin - address, name.c_str());
        }
        if (address >= begin + bytes) {
            return format("%td bytes after the end of %s", address - (begin + bytes), name.c_str());
        }
        return format("at byte %td of %s", address - begin, name.c_str());
    }

    // The first byte outside the buffer that was written, or nullptr; the next call does not find it again.
    const char * trespass() {
        const char * found = opened ? written(first, begin) : nullptr;
        found              = found || !opened ? found : written(begin + bytes, first + opened);
        if (found) {
            memset(first, POISON, size_t(begin - first));
            memset(begin + bytes, POISON, size_t(first + opened - (begin + bytes)));
        }
        return found;
    }

  private:
    char * first  = nullptr;
    size_t opened = 0;

    // The first byte from `at` to `end` that is no longer poison, or nullptr.
    static const char * written(const char * at, const char * end) {
        static const std::vector<char> poison(65536, char(POISON));
        while (at < end && memcmp(at, poison.data(), std::min(poison.size(), size_t(end - at))) == 0) {
            at += std::min(poison.size(), size_t(end - at));
        }
        while (at < end && *at == char(POISON)) {
            at++;
        }
        return at < end ? at : nullptr;
    }
};

struct Buffer {
    char * room;
    size_t room_bytes;
    Place  place;  // of the allocation
    bool   freed = false;

    Guarded memory = {};

    std::string where(const char * address) const {
        const std::string name =
            format("the buffer of %zu bytes allocated at %s", memory.bytes, text_of(place).c_str());
        return freed ? "in " + name + ", which is freed" : memory.where(address, name);
    }
};

class DeviceMemory {
  public:
    static constexpr size_t GUARD     = 16 << 20;
    static constexpr size_t ALIGNMENT = 16;  // that of the widest access; a real device's buffers are 256-byte aligned

    void * allocate(size_t bytes, Place place) {
        const size_t room_bytes = rounded_up(bytes, page_bytes()) + 2 * GUARD;
        void *       room = mmap(nullptr, room_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) {
            return nullptr;
        }
        Buffer & buffer = buffers[static_cast<char *>(room)] = Buffer{ static_cast<char *>(room), room_bytes, place };
        buffer.memory.open(buffer.room, room_bytes, bytes, ALIGNMENT, options.placement);
        return buffer.memory.begin;
    }

    // Returns false if the pointer is not from allocate. The addresses stay inaccessible, so that later use is a fault.
    bool release(void * pointer) {
        Buffer * buffer = find(pointer);
        if (!buffer || buffer->freed || buffer->memory.begin != pointer) {
            return false;
        }
        buffer->memory.close();
        buffer->freed = true;
        return true;
    }

    // The buffer whose room contains the address.
    Buffer * find(const void * pointer) {
        char * address = static_cast<char *>(const_cast<void *>(pointer));
        auto   next    = buffers.upper_bound(address);
        if (next == buffers.begin()) {
            return nullptr;
        }
        Buffer & buffer = std::prev(next)->second;
        return address < buffer.room + buffer.room_bytes ? &buffer : nullptr;
    }

    // Reports bytes that a kernel wrote outside its buffers without touching a guard; empty if none.
    std::string trespasses() {
        std::string text;
        for (auto & entry : buffers) {
            const char * byte = entry.second.memory.trespass();
            text              = byte ? "a write " + entry.second.where(byte) : text;
        }
        return text;
    }

  private:
    std::map<char *, Buffer> buffers;  // by the start of the room
};

inline DeviceMemory device_memory;

}  // namespace cuda_emulator
