// Kernels as shared objects, compiled when a pipeline first needs them. The folder kernels/ next to this library contains
// the rewritten sources, the list `kernels` (name, source, function, parameters, checks that are left out, flags), and the script `compile` (build.py).

#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

namespace metal_emulator {

class KernelObject {
  public:
    const Kernel * kernel = nullptr;

    explicit KernelObject(const std::string & path) {
        void * handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!handle) {
            throw Fault(dlerror());
        }
        kernel            = static_cast<const Kernel *>(dlsym(handle, "metal_emulator_kernel"));
        link_map * loaded = nullptr;
        dlinfo(handle, RTLD_DI_LINKMAP, &loaded);
        base = loaded->l_addr;
        dl_iterate_phdr(
            [](dl_phdr_info * info, size_t, void * self) {
                KernelObject & object = *static_cast<KernelObject *>(self);
                if (info->dlpi_addr == object.base) {
                    for (int i = 0; i < info->dlpi_phnum; i++) {
                        const auto & header = info->dlpi_phdr[i];
                        if (header.p_type == PT_LOAD) {
                            object.end = std::max(object.end, object.base + header.p_vaddr + header.p_memsz);
                        }
                    }
                }
                return 0;
            },
            this);
    }

    bool contains(const char * address) const { return uintptr_t(address) - base < end - base; }

  private:
    uintptr_t base = 0, end = 0;
};

namespace {

struct Entry {
    std::string                   source, function, parameters, unchecked, flags;
    std::unique_ptr<KernelObject> object;
};

std::string kernels_folder() {
    Dl_info info;
    dladdr(reinterpret_cast<const void *>(&kernels_folder), &info);
    const std::string library = info.dli_fname;
    return library.substr(0, library.rfind('/')) + "/kernels";
}

std::map<std::string, Entry> read_list() {
    std::map<std::string, Entry> entries;
    std::ifstream                list(kernels_folder() + "/kernels");
    std::string                  line;
    while (std::getline(list, line)) {
        std::istringstream fields(line);
        std::string        name;
        Entry              entry;
        std::getline(fields, name, '\t');
        std::getline(fields, entry.source, '\t');
        std::getline(fields, entry.function, '\t');
        std::getline(fields, entry.parameters, '\t');
        std::getline(fields, entry.unchecked, '\t');
        std::getline(fields, entry.flags, '\t');
        entries[name] = std::move(entry);
    }
    return entries;
}

std::map<std::string, Entry> & all_entries() {
    static std::map<std::string, Entry> entries = read_list();
    return entries;
}

// KIMI_METAL_MAX_THREADS=N or N:TEXT: as if the pipelines, or those with TEXT in their names, needed so many registers
// that a threadgroup can have no more than N threads.
unsigned max_threads(const std::string & pipeline) {
    const char * given = getenv("KIMI_METAL_MAX_THREADS");
    if (!given) {
        return MAX_THREADS;
    }
    const char * some = strchr(given, ':');
    return !some || pipeline.find(some + 1) != std::string::npos ? unsigned(atoi(given)) : MAX_THREADS;
}

std::string compile(const std::string & name, const Entry & entry) {
    const std::string path = kernels_folder() + "/" + name;
    if (access((path + ".so").c_str(), R_OK) != 0) {
        std::ofstream(path + ".cpp") << "#include \"" << entry.source << "\"\nMETAL_EMULATOR_EXPORT((" << entry.function
                                     << "), " << entry.parameters << ")\n";
        const std::string words  = name + " " + entry.source + " " + entry.unchecked;
        const int         status = system(("'" + kernels_folder() + "/compile' " + words).c_str());
        if (status != 0) {
            throw Fault("the kernel " + name + " does not compile: see " + path + ".log");
        }
    }
    return path + ".so";
}

}  // namespace

std::string file_of(const std::string & kernel) {
    const auto found = all_entries().find(kernel);
    return found == all_entries().end() ? "" : found->second.source.substr(0, found->second.source.find('.'));
}

bool is_data_of(const KernelObject & object, const char * address) {
    return object.contains(address);
}

std::unique_ptr<Pipeline>
make_pipeline(const std::string & kernel, const std::string & name, const std::vector<ConstantValue> & constants) {
    static std::mutex                 mutex;
    const std::lock_guard<std::mutex> lock(mutex);

    const auto found = all_entries().find(kernel);
    if (found == all_entries().end()) {
        throw Fault("there is no kernel '" + kernel + "' for the pipeline '" + name + "'");
    }
    auto pipeline         = std::make_unique<Pipeline>();
    pipeline->name        = name;
    pipeline->max_threads = max_threads(name);
    if (dry_run) {
        return pipeline;
    }
    Entry & entry = found->second;
    if (!entry.object) {
        entry.object = std::make_unique<KernelObject>(compile(kernel, entry));
    }
    pipeline->object         = entry.object.get();
    pipeline->kernel         = pipeline->object->kernel;
    pipeline->reads_outside  = entry.flags.find("outside") != std::string::npos;
    pipeline->overruns       = entry.flags.find("overrun") != std::string::npos;
    pipeline->in_step        = entry.flags.find("in-step") != std::string::npos;
    pipeline->barrier_orders = entry.flags.find("barrier-orders") != std::string::npos;
    for (const FunctionConstant * each = *pipeline->kernel->constants; each; each = each->next) {
        const size_t before = pipeline->constants.size();
        for (const ConstantValue & given : constants) {
            if (given.index == each->index) {
                static const size_t bytes[] = { sizeof(bool), sizeof(int16_t), sizeof(int32_t) };
                if (given.type != each->type) {
                    throw Fault(
                        format("the function constant %u, %s, of the pipeline '%s' has another type in the kernel",
                               each->index, each->name, name.c_str()));
                }
                pipeline->constants.push_back({ each->value, bytes[int(each->type)], given.value });
            }
        }
        if (pipeline->constants.size() == before) {
            pipeline->not_set.push_back(each);
        }
    }
    return pipeline;
}

std::string place_of(const void * code) {
    Dl_info info;
    if (!code || !dladdr(code, &info)) {
        return "";
    }
    const size_t      offset  = size_t(static_cast<const char *>(code) - static_cast<const char *>(info.dli_fbase)) - 1;
    const std::string command = format("addr2line -ie '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
    FILE *            pipe    = popen(command.c_str(), "r");
    char              text[4096];
    std::string       place;
    // Inlined functions first: the first line that is not the emulator's.
    while (pipe && fgets(text, sizeof(text), pipe)) {
        std::string line = text;
        line.erase(line.find_last_not_of("\n") + 1);
        line = line.substr(0, line.find(" (discriminator"));
        if (line.rfind("??", 0) != 0 && line.find("/metal_emulator/") == std::string::npos && place.empty()) {
            place = line;
        }
    }
    if (pipe) {
        pclose(pipe);
    }
    return place;
}

}  // namespace metal_emulator
