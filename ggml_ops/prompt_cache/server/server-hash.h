#pragma once

#include "../server-common.h"

#include "hash/xxhash/xxhash.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

// the 128-bit XXH3 hash of parts of files
class server_hasher {
  public:
    server_hasher() : state(XXH3_createState(), XXH3_freeState) { XXH3_128bits_reset(state.get()); }

    void add(const void * data, size_t size) { XXH3_128bits_update(state.get(), data, size); }

    // add the next `size` bytes of a file; false if it has fewer
    bool add(std::ifstream & file, uint64_t size) {
        std::vector<uint8_t> buffer(1 << 20);
        while (size > 0) {
            const size_t n = std::min<uint64_t>(size, buffer.size());
            if (!file.read((char *) buffer.data(), n)) {
                return false;
            }
            add(buffer.data(), n);
            size -= n;
        }
        return true;
    }

    XXH128_hash_t digest() const { return XXH3_128bits_digest(state.get()); }

  private:
    std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state;
};

// such as "00ff…", 32 digits
inline std::string server_hex(const XXH128_hash_t & hash) {
    return string_format("%016llx%016llx", (unsigned long long) hash.high64, (unsigned long long) hash.low64);
}
