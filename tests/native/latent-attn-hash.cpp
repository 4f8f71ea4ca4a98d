// Prints a hash of the result of latent attention, absorbed (FLASH_ATTN_EXT), to compare two builds bit by bit.
//
//   latent-attn-hash QUERIES TYPE PLAIN     TYPE: of the cache; PLAIN: 1 selects upstream's paths

#include "latent-attn-case.h"

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "latent-attn-hash QUERIES TYPE PLAIN\n");
        return 2;
    }
    LatentShape s;
    s.n_queries = std::stoll(argv[1]);
    s.n_keys    = 600;
    s.n_heads   = 4;
    s.cache     = type_of(argv[2]);
    s.plain     = argv[3] == std::string("1");

    LatentCase attention(s);
    attention.compute(2);
    uint64_t hash = 1469598103934665603ull;  // FNV-1a
    for (const float x : attention.result()) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        hash = (hash ^ bits) * 1099511628211ull;
    }
    printf("%016llx\n", (unsigned long long) hash);
    return 0;
}
