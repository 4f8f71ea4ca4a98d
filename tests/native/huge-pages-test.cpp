// A large buffer of the CPU backend is aligned to huge pages, and Linux knows that they are wanted; a small one is not
// advised. Exit status 1 if not.

#include "check.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>

// Whether the mapping of an address is advised with MADV_HUGEPAGE: "hg" among the flags in /proc/self/smaps.
static bool advised(const void * address) {
    std::ifstream smaps("/proc/self/smaps");
    bool          inside = false;
    for (std::string line; std::getline(smaps, line);) {
        uintptr_t begin, end;
        if (sscanf(line.c_str(), "%zx-%zx ", &begin, &end) == 2) {
            inside = begin <= (uintptr_t) address && (uintptr_t) address < end;
        } else if (inside && line.rfind("VmFlags:", 0) == 0) {
            std::istringstream flags(line);
            for (std::string flag; flags >> flag;) {
                if (flag == "hg") {
                    return true;
                }
            }
        }
    }
    return false;
}

int main() {
    ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    for (size_t mib : { 1, 8, 9, 64 }) {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, mib << 20);
        char *                data   = (char *) ggml_backend_buffer_get_base(buffer);
        memset(data, 1, mib << 20);
        const bool large = mib >= 8;
        expect(advised(data) == large && advised(data + (mib << 20) - 1) == large,
               text("%zu MiB: %s", mib, large ? "not advised" : "advised"));
        expect(!large || (uintptr_t) data % (2 << 20) == 0, text("%zu MiB: not aligned", mib));
        ggml_backend_buffer_free(buffer);
    }
    return report();
}
