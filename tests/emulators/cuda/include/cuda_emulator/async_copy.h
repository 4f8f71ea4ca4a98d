#pragma once

// cp.async: copies from global to shared memory that arrive only when the thread waits for their group. Until then
// their destination holds NaN, so that a read without a wait changes the result.

#include "block.h"
#include "races.h"
#include "shared.h"

namespace cuda_emulator {

// Bytes after `given` arrive as zeros.
inline void async_copy(char * to, const char * from, unsigned count, unsigned given, Place place) {
    if ((count != 4 && count != 8 && count != 16) || given > count) {
        fail(format("cp.async: %u bytes, %u of them given; a copy has 4, 8 or 16", count, given), place);
    }
    if (uintptr_t(to) % count || uintptr_t(from) % count) {
        fail(format("cp.async: source %p or destination %p is not aligned to the copy's %u bytes",
                    static_cast<const void *>(from), static_cast<void *>(to), count),
             place);
    }
    if (!shared_arena.contains(to)) {
        fail("cp.async: the destination is not in shared memory", place);
    }
    if (shared_arena.contains(from)) {
        fail("cp.async: the source is in shared memory; it must be in global memory", place);
    }
    Thread &  self = *block.current;
    AsyncCopy copy{ to, {}, count, self.groups, place };
    memcpy(copy.bytes, from, given);
    memset(to, POISON, count);
    see_access(to, count, true, place);
    self.copies.push_back(copy);
}

inline void cp_async_commit(Place) {
    block.current->groups++;
}

// Completes the copies of all groups except the newest `but`.
inline void cp_async_wait(Place, unsigned but) {
    Thread & self = *block.current;
    size_t   kept = 0;
    for (size_t i = 0; i < self.copies.size(); i++) {
        const AsyncCopy & copy = self.copies[i];
        if (copy.group + but < self.groups) {
            memcpy(copy.to, copy.bytes, copy.count);
            see_access(copy.to, copy.count, true, copy.place);
        } else {
            self.copies[kept++] = copy;
        }
    }
    self.copies.resize(kept);
}

}  // namespace cuda_emulator
