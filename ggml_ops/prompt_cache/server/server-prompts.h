#pragma once

// What server-context.cpp needs of the prompt cache.

#include "server-file-lock.h"
#include "server-slot-file.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

// Give the memory of removed states back to the system.
void server_return_memory();

// "checkpoints" of /slots
json server_checkpoints_json(const server_checkpoints & checkpoints);

// Size of the sub-batch at off: the tokens of one slot stay together, unless they are more than n_batch.
template <typename T> int32_t server_n_view(const std::vector<T> & tokens, int32_t off, int32_t n_batch) {
    const int32_t size = int32_t(tokens.size());
    int32_t       end  = off;
    while (end < size) {
        int32_t next = end + 1;
        while (next < size && tokens[next].id_slot == tokens[end].id_slot) {
            next++;
        }
        if (next - off > n_batch) {
            break;
        }
        end = next;
    }
    return end > off ? end - off : std::min(n_batch, size - off);
}
