// huge-pages-test MODEL: Linux is asked for huge pages for large buffers of the CPU backend and for the mapped MODEL,
// but neither for small buffers nor for a model that is larger than the memory. Exit status 1 if not.

#include "check.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>

// Takes the place of libc's for the libraries too.
static long memory_pages = 0;  // 0: the machine's

extern "C" long sysconf(int name) noexcept {
    static const auto real = (long (*)(int)) dlsym(RTLD_NEXT, "sysconf");
    return name == _SC_PHYS_PAGES && memory_pages > 0 ? memory_pages : real(name);
}

// The flags of the mappings in /proc/self/smaps whose first line is chosen, each with a space before and after it.
static std::string flags_of(const std::function<bool(const std::string &)> & chosen) {
    std::ifstream smaps("/proc/self/smaps");
    bool          inside = false;
    std::string   flags;
    for (std::string line; std::getline(smaps, line);) {
        uintptr_t begin, end;
        if (sscanf(line.c_str(), "%zx-%zx ", &begin, &end) == 2) {
            inside = chosen(line);
        } else if (inside && line.rfind("VmFlags:", 0) == 0) {
            flags += line.substr(strlen("VmFlags:")) + " ";
        }
    }
    return flags;
}

static bool advised(const std::string & flags) {
    return flags.find(" hg ") != std::string::npos;  // MADV_HUGEPAGE
}

static bool advised(const void * address) {
    return advised(flags_of([=](const std::string & line) {
        uintptr_t begin, end;
        return sscanf(line.c_str(), "%zx-%zx ", &begin, &end) == 2 && begin <= (uintptr_t) address &&
               (uintptr_t) address < end;
    }));
}

static void test_buffers() {
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
}

// The flags of the mapping of the file while the model is loaded; empty if it is not mapped.
static std::string flags_of_model(const char * path, llama_load_mode mode) {
    llama_model_params params = llama_model_default_params();
    params.load_mode          = mode;
    llama_model * model       = llama_model_load_from_file(path, params);
    CHECK(model != nullptr);
    const std::string flags = flags_of([=](const std::string & line) { return line.find(path) != std::string::npos; });
    llama_model_free(model);
    return flags;
}

static void test_mapped_model(const char * path) {
    const std::string mapped = flags_of_model(path, LLAMA_LOAD_MODE_MMAP);
    expect(advised(mapped), "mapped model: not advised");
    expect(flags_of_model(path, LLAMA_LOAD_MODE_NONE).empty(), "model in buffers: the file is mapped");
    memory_pages              = 1;
    const std::string crowded = flags_of_model(path, LLAMA_LOAD_MODE_MMAP);
    expect(!crowded.empty() && !advised(crowded), "model larger than the memory: advised, or not mapped");
    memory_pages = 0;
}

int main(int n_args, char ** args) {
    CHECK(n_args == 2);
    test_buffers();
    test_mapped_model(args[1]);
    return report();
}
