#pragma once

// Streams and events. Work of the default stream runs at once. Work of a stream of the harness (Stream) waits until the
// host synchronizes. Then the next stream is selected in the order of the options: forwards the first one that can go
// on, backwards the last one. So work that does not wait for what it needs, or that overwrites what another stream still
// reads, gives another result in some order.

#include "options.h"

#include <deque>
#include <functional>
#include <memory>
#include <vector>

// Whether the work before the last record is done.
struct CUevent_st {
    std::shared_ptr<bool> done = std::make_shared<bool>(true);
};

struct CUstream_st {
    // Work, or a wait for an event.
    struct Item {
        std::function<void()> run;
        std::shared_ptr<bool> waits_for;
    };

    std::deque<Item> items;

    bool ready() const { return !items.empty() && (!items.front().waits_for || *items.front().waits_for); }
};

using cudaStream_t = CUstream_st *;
using cudaEvent_t  = CUevent_st *;

namespace cuda_emulator {

inline std::vector<CUstream_st *> streams;  // of the harness

inline int  n_submitted = 0;      // launches, copies and fills so far: what a captured graph has nodes for
inline bool counts_only = false;  // work is counted and not run

// Runs the work, or appends it to its stream.
inline void submit(CUstream_st * stream, std::function<void()> run) {
    n_submitted++;
    if (counts_only) {
        return;
    }
    if (stream) {
        stream->items.push_back({ std::move(run), nullptr });
    } else {
        run();
    }
}

// Runs work of all streams until this one has none left.
inline void synchronize(const CUstream_st & stream) {
    static uint32_t random = 1;
    while (!stream.items.empty()) {
        uint32_t ready = 0;
        for (size_t i = 0; i < streams.size(); i++) {
            ready |= uint32_t(streams[i]->ready()) << i;
        }
        if (!ready) {
            throw Fault("a stream waits for an event that is not recorded, or streams wait for each other");
        }
        CUstream_st &           next = *streams[options.pick(ready, random)];
        const CUstream_st::Item item = next.items.front();
        next.items.pop_front();
        if (item.run) {
            item.run();
        }
    }
}

}  // namespace cuda_emulator
