// Time and error of latent attention, absorbed (FLASH_ATTN_EXT), decompressed (LATENT_ATTN), or folded: absorbed with
// its products with k_b and v_b around it, which is what a graph has in the place of LATENT_ATTN.
// The same binary measures a pristine and a patched build: only the library path differs.
//
//   latent-attn-bench [key=value ...]     keys and defaults below
//
// Prints: smallest and median time and smallest processor time of all threads together, in ms; NMSE over `check` rows;
// a hash of the whole result.

#include "latent-attn-case.h"

#include <ctime>
#include <map>

int main(int argc, char ** argv) {
    std::map<std::string, std::string> opt = {
        { "form", "absorbed" },  // or decompressed, folded
        { "queries", "1" },     { "keys", "16384" }, { "heads", "32" },
        { "streams", "1" },     { "type", "f16" },                    // of the cache
        { "weights", "f16" },                                         // of k_b and v_b
        { "mask", "causal" },                                         // or none, mixed
        { "spread", "1" },                                            // standard deviation of the scores
        { "threads", "2" },     { "runs", "20" },    { "ref", "0" },  // 1: ggml's plain path
        { "plain", "0" },                                             // 1: as pristine llama.cpp computes it
        { "check", "16" },
    };
    for (int i = 1; i < argc; ++i) {
        const std::string a  = argv[i];
        const size_t      eq = a.find('=');
        if (eq == std::string::npos || !opt.count(a.substr(0, eq))) {
            fprintf(stderr, "unknown argument %s\n", argv[i]);
            return 2;
        }
        opt[a.substr(0, eq)] = a.substr(eq + 1);
    }
    const auto number = [&](const char * key) { return (int64_t) std::stoll(opt[key]); };

    LatentShape s;
    s.expand    = opt["form"] != "absorbed";
    s.fold      = opt["form"] == "folded";
    s.plain     = number("plain");
    s.n_queries = number("queries");
    s.n_keys    = number("keys");
    s.n_heads   = number("heads");
    s.n_streams = number("streams");
    s.cache     = type_of(opt["type"]);
    s.weights   = type_of(opt["weights"]);
    s.mask      = opt["mask"];
    s.spread    = std::stof(opt["spread"]);

    LatentCase          attention(s);
    std::vector<double> wall;
    std::vector<double> cpu;
    for (int64_t i = 0; i < number("runs"); ++i) {
        const int64_t t0 = ggml_time_us();
        const clock_t c0 = clock();
        attention.compute((int) number("threads"), number("ref"));
        wall.push_back((ggml_time_us() - t0) / 1000.0);
        cpu.push_back((clock() - c0) * 1000.0 / CLOCKS_PER_SEC);
    }
    std::sort(wall.begin(), wall.end());
    std::sort(cpu.begin(), cpu.end());

    uint64_t hash = 1469598103934665603ull;
    for (const float x : attention.result()) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        hash = (hash ^ bits) * 1099511628211ull;
    }
    printf(
        "%-12s %-5s queries %-4s keys %-6s threads %s  min %9.3f ms  median %9.3f ms  cpu %9.3f ms  nmse %.2e  hash "
        "%016llx\n",
        opt["form"].c_str(), opt["type"].c_str(), opt["queries"].c_str(), opt["keys"].c_str(), opt["threads"].c_str(),
        wall.front(), wall[wall.size() / 2], cpu.front(), attention.nmse(number("check")), (unsigned long long) hash);
    return 0;
}
