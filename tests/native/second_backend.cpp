// A second backend on top of the CPU backend: devices that llama.cpp treats as GPUs, each with its own memory that
// nothing else may access. It makes the scheduler split graphs and copy tensors between devices on a machine without
// GPUs. Loaded as a shared library: ggml_backend_load, or GGML_BACKEND_PATH for llama.cpp's programs.
//
// Memory of a device is inaccessible (PROT_NONE) except while the device computes or copies, so that code that follows
// a pointer into it from elsewhere is killed by SIGSEGV. It is initially NaN. A graph with a tensor in the memory of
// another device ends the process with the tensor's name.
//
//   SECOND_DEVICES   number of devices, 1 if unset; named SECOND0, SECOND1, ...
//   SECOND_DESCRIPTION  of the devices
//   SECOND_REFUSES   names of operators that no device supports, comma separated
//   SECOND_TAKES     set: devices accept operations of 32 rows and more whose weights are in the CPU's memory
//   SECOND_MEMORY    MiB of memory per device, 4096 if unset
//   SECOND_SPOILS    names of operators that every device computes wrongly, comma separated; COPY: elided state copies
//   SECOND_SPOILS_NTH  only the Nth of these nodes, from 0, is wrong
//   SECOND_SPOILS_BY   what is wrong: add (default) adds 1 to the first value, last to the last one; nan and inf replace the
//                    first one; scale multiplies the first 256 by 1.02 and, with each node, by a little more
//   SECOND_HANGS     names of operators with which every device computes for ever
//   SECOND_CRASHES   names of operators with which every device ends the process
//   SECOND_REGISTERS set: the library registers itself when it is loaded, for LD_PRELOAD
//   SECOND_LOG       a file for a line "DEVICE OPERATOR" when a device first computes an operator; with kernels
//                    (second_kernels.h) also "DEVICE kernel OPERATOR", with "... and its copy" if the copy is elided
//   SECOND_GRAPHS    a file for a line per computed graph: the device, "again" if a captured graph would be launched, or
//                    "anew", and how many kernels, copies and fills the real backend launches for it

#include "common/ggml-op-marks.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kda/ggml-kda-state.h"
#include "second_kernels.h"
#include "verify/ggml-verify.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>

// The device is loaded by upstream's build too, which does not have this function.
#pragma weak ggml_kda_find_state_copy

namespace {

size_t memory_size() {
    const char * text = getenv("SECOND_MEMORY");
    return size_t(text ? atoll(text) : 4096) << 20;
}

std::set<std::string> named(const char * variable) {
    std::set<std::string> names;
    const char *          text = getenv(variable);
    std::istringstream    parts(text ? text : "");
    for (std::string name; std::getline(parts, name, ',');) {
        names.insert(name);
    }
    return names;
}

struct Memory {
    void * base;
    size_t size;
};

struct Device {
    std::string              name;
    ggml_backend_buffer_type buft = {};
    ggml_backend_device      dev  = {};
    std::vector<Memory *>    buffers;
    int                      opened = 0;
    std::set<std::string>    logged;

    void protect(int access) {
        for (const Memory * each : buffers) {
            GGML_ASSERT(mprotect(each->base, each->size, access) == 0);
        }
    }
};

// A device's memory is accessible while one of these exists.
class Open {
  public:
    explicit Open(Device & device) : device(device) {
        if (device.opened++ == 0) {
            device.protect(PROT_READ | PROT_WRITE);
        }
    }

    ~Open() {
        if (--device.opened == 0) {
            device.protect(PROT_NONE);
        }
    }

    Open(const Open &)             = delete;
    Open & operator=(const Open &) = delete;

  private:
    Device & device;
};

Device & device_of(ggml_backend_dev_t dev) {
    return *(Device *) dev->context;
}

Device & device_of(ggml_backend_buffer_t buffer) {
    return device_of(buffer->buft->device);
}

Memory & memory_of(ggml_backend_buffer_t buffer) {
    return *(Memory *) buffer->context;
}

size_t held(const Device & device) {
    size_t bytes = 0;
    for (const Memory * each : device.buffers) {
        bytes += each->size;
    }
    return bytes;
}

// buffers

void buffer_free(ggml_backend_buffer_t buffer) {
    Memory & memory  = memory_of(buffer);
    auto &   buffers = device_of(buffer).buffers;
    buffers.erase(std::find(buffers.begin(), buffers.end(), &memory));
    if (second_kernels) {
        second_kernels->release(memory.base);
    } else {
        munmap(memory.base, memory.size);
    }
    delete &memory;
}

ggml_backend_buffer_i buffer_interface() {
    ggml_backend_buffer_i i = {};
    i.free_buffer           = buffer_free;
    i.get_base              = [](ggml_backend_buffer_t buffer) { return memory_of(buffer).base; };
    i.memset_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
        Open open(device_of(buffer));
        memset((char *) t->data + offset, value, size);
    };
    i.set_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
        Open open(device_of(buffer));
        memcpy((char *) t->data + offset, data, size);
    };
    i.get_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t size) {
        Open open(device_of(buffer));
        memcpy(data, (const char *) t->data + offset, size);
    };
    i.clear = [](ggml_backend_buffer_t buffer, uint8_t value) {
        Open open(device_of(buffer));
        memset(memory_of(buffer).base, value, buffer->size);
    };
    return i;
}

ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    Device & device = device_of(buft->device);
    if (held(device) + size > memory_size()) {
        GGML_LOG_ERROR("%s: out of memory\n", device.name.c_str());
        return nullptr;
    }
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t room = std::max((size + page - 1) / page * page, page);
    void * base = second_kernels ? second_kernels->allocate(room)
                                 : mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == nullptr || base == MAP_FAILED) {
        return nullptr;
    }
    memset(base, 0xff, room);
    Memory * memory = new Memory{ base, room };
    device.buffers.push_back(memory);
    GGML_ASSERT(device.opened == 0 && mprotect(base, room, PROT_NONE) == 0);
    return ggml_backend_buffer_init(buft, buffer_interface(), memory, size);
}

ggml_backend_buffer_type_i buft_interface() {
    ggml_backend_buffer_type_i i = {};
    i.get_name                   = [](ggml_backend_buffer_type_t buft) { return device_of(buft->device).name.c_str(); };
    i.alloc_buffer               = buft_alloc;
    i.get_alignment              = [](ggml_backend_buffer_type_t) { return size_t(64); };
    i.get_alloc_size             = [](ggml_backend_buffer_type_t, const ggml_tensor * t) {
        return second_kernels ? second_kernels->alloc_size(t) : ggml_nbytes(t);
    };
    return i;
}

// backend

void expect_here(const Device & device, const ggml_tensor * node, const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (buffer == nullptr || buffer->buft != &device.buft) {
        GGML_ABORT("%s is to compute %s, and %s is in %s", device.name.c_str(), node->name, t->name,
                   buffer ? ggml_backend_buffer_name(buffer) : "no memory");
    }
}

// Appends a line to the file that the variable names.
void log_line(const char * variable, const Device & device, const std::string & what) {
    std::ofstream file(getenv(variable), std::ios::app);
    file << device.name << ' ' << what << '\n';
    GGML_ASSERT(file.flush());
}

void log_once(Device & device, const std::string & what) {
    if (getenv("SECOND_LOG") && device.logged.insert(what).second) {
        log_line("SECOND_LOG", device, what);
    }
}

bool computes(const ggml_tensor * node) {
    return !ggml_op_is_empty(node->op) && !ggml_is_empty(node) && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
}

// Runs step by step: the kernels, or the CPU for steps they do not support.
ggml_status compute_by_kernels(Device & device, ggml_backend_t cpu, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph);) {
        if (!computes(ggml_graph_node(graph, i))) {
            ++i;
            continue;
        }
        const SecondStep step = second_kernels->step(graph, i);
        if (step.done) {
            const std::string name = ggml_op_name(ggml_graph_node(graph, i)->op);
            const char *      more = name.rfind("KDA_", 0) == 0 ? " and its copy" : ", fused";
            log_once(device, "kernel " + name + (step.n_nodes > 1 ? more : ""));
        } else {
            ggml_cgraph       nodes  = ggml_graph_view(graph, i, i + step.n_nodes);
            const ggml_status status = ggml_backend_graph_compute(cpu, &nodes);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        i += step.n_nodes;
    }
    second_kernels->finish();
    return GGML_STATUS_SUCCESS;
}

void log_graph(const Device & device, ggml_cgraph * graph) {
    if (getenv("SECOND_GRAPHS")) {
        const bool again      = second_kernels && second_kernels->replays(graph);
        const int  n_launches = second_kernels ? second_kernels->launches(graph) : 0;
        log_line("SECOND_GRAPHS", device, (again ? "again " : "anew ") + std::to_string(n_launches));
    }
}

// Nodes that are marked for upstream's code are without faults.
bool has_fault(const std::set<std::string> & names, const ggml_tensor * node) {
    return names.count(ggml_op_name(node->op)) && !ggml_op_has_mark(node, GGML_OP_MARK_UPSTREAM);
}

bool has_fault(const char * variable, ggml_cgraph * graph) {
    const std::set<std::string> names = named(variable);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (has_fault(names, ggml_graph_node(graph, i))) {
            return true;
        }
    }
    return false;
}

// A result that a device gets wrong after it has computed n_nodes nodes.
struct Fault {
    int           n_nodes;
    ggml_tensor * result;
};

// Whether the next of the nodes that can be wrong is.
bool is_nth() {
    static const char * text  = getenv("SECOND_SPOILS_NTH");
    static int          count = 0;
    return !text || count++ == atoi(text);
}

// The first fault from node i on. An elided copy is wrong together with the operator before it.
Fault find_fault(ggml_cgraph * graph, int i) {
    static const std::set<std::string> names = named("SECOND_SPOILS");
    for (int n = i; n < ggml_graph_n_nodes(graph); ++n) {
        ggml_tensor * node = ggml_graph_node(graph, n);
        if (has_fault(names, node) && is_nth()) {
            return { n + 1 - i, node };
        }
        if (names.count("COPY") && strncmp(ggml_op_name(node->op), "KDA_", 4) == 0) {
            const ggml_kda_state_copy copy = ggml_kda_find_state_copy(graph, n);
            if (copy.to && is_nth()) {
                return { n + copy.n_nodes + 1 - i, copy.to };
            }
        }
    }
    return { ggml_graph_n_nodes(graph) - i, nullptr };
}

void spoil(ggml_tensor * result) {
    static const char * text   = getenv("SECOND_SPOILS_BY");
    static float        factor = 1.02f;
    const std::string   how    = text ? text : "add";
    float *             values = (float *) result->data;
    const int64_t       n      = ggml_nelements(result);
    if (how == "scale") {
        for (int64_t i = 0; i < std::min<int64_t>(n, 256); ++i) {
            values[i] *= factor;
        }
        factor += 1e-4f;
    } else if (how == "nan" || how == "inf") {
        values[0] = how == "nan" ? NAN : INFINITY;
    } else {
        values[how == "last" ? n - 1 : 0] += 1.0f;
    }
}

ggml_status compute_with_faults(Device & device, ggml_backend_t cpu, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph);) {
        const Fault       fault = find_fault(graph, i);
        ggml_cgraph       part  = ggml_graph_view(graph, i, i + fault.n_nodes);
        ggml_cgraph *     nodes = fault.n_nodes == ggml_graph_n_nodes(graph) ? graph : &part;
        const ggml_status status =
            second_kernels ? compute_by_kernels(device, cpu, nodes) : ggml_backend_graph_compute(cpu, nodes);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        if (fault.result) {
            spoil(fault.result);
        }
        i += fault.n_nodes;
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    Device & device = device_of(backend->device);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (ggml_op_is_empty(node->op)) {
            continue;  // a graph may contain a view of another device's tensor, but nothing reads it
        }
        expect_here(device, node, node);
        for (const ggml_tensor * source : node->src) {
            if (source) {
                expect_here(device, node, source);
            }
        }
        log_once(device, ggml_op_name(node->op));
    }
    while (has_fault("SECOND_HANGS", graph)) {
        pause();
    }
    if (has_fault("SECOND_CRASHES", graph)) {
        raise(SIGSEGV);
    }
    Open              open(device);
    ggml_backend_t    cpu    = (ggml_backend_t) backend->context;
    const ggml_status status = compute_with_faults(device, cpu, graph);
    log_graph(device, graph);
    return status;
}

ggml_backend_i backend_interface() {
    ggml_backend_i i = {};
    i.get_name       = [](ggml_backend_t backend) { return device_of(backend->device).name.c_str(); };
    i.free           = [](ggml_backend_t backend) {
        ggml_backend_free((ggml_backend_t) backend->context);
        delete backend;
    };
    i.graph_compute  = backend_compute;
    i.graph_optimize = [](ggml_backend_t, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
        if (second_kernels) {
            second_kernels->optimize(graph, params);
        }
    };
    return i;
}

// devices

void dev_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    *total = memory_size();
    *free  = *total - std::min(*total, held(device_of(dev)));
}

ggml_backend_t dev_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 's', 'e', 'c', 'o', 'n', 'd', 'b', 'a', 'c', 'k', 'e', 'n', 'd', 0, 0, 1 };
    ggml_backend_t   cpu  = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    return new ggml_backend{ &guid, backend_interface(), dev, cpu };
}

bool dev_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    static const std::set<std::string> names = named("SECOND_REFUSES");
    if (names.count(ggml_op_name(op->op))) {
        return false;
    }
    const int claimed = second_kernels ? second_kernels->claims(op) : -1;
    if (claimed >= 0) {
        return claimed;
    }
    // for tensors in its own memory, the CPU's answer depends on shapes and types only
    return ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), op);
}

bool dev_offload_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const int64_t rows = op->op == GGML_OP_MUL_MAT      ? op->ne[1]
                         : op->op == GGML_OP_MUL_MAT_ID ? op->ne[2]
                                                        : ggml_nrows(op);
    return getenv("SECOND_TAKES") && op->op != GGML_OP_GET_ROWS && rows >= 32;
}

ggml_backend_device_i device_interface() {
    ggml_backend_device_i i = {};
    i.get_name              = [](ggml_backend_dev_t dev) { return device_of(dev).name.c_str(); };
    i.get_description       = [](ggml_backend_dev_t) {
        const char * text = getenv("SECOND_DESCRIPTION");
        return text ? text : "the CPU with memory of its own";
    };
    i.get_memory = dev_memory;
    i.get_type   = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    i.get_props  = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props             = {};
        props->name        = dev->iface.get_name(dev);
        props->description = dev->iface.get_description(dev);
        props->type        = dev->iface.get_type(dev);
        dev_memory(dev, &props->memory_free, &props->memory_total);
    };
    i.init_backend    = dev_init;
    i.get_buffer_type = [](ggml_backend_dev_t dev) { return &device_of(dev).buft; };
    i.supports_op     = dev_supports_op;
    i.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
        return buft == &device_of(dev).buft;
    };
    i.offload_op = dev_offload_op;
    return i;
}

// registration

std::vector<std::unique_ptr<Device>> & devices() {
    static std::vector<std::unique_ptr<Device>> all;
    return all;
}

ggml_backend_reg_i registry_interface() {
    ggml_backend_reg_i i = {};
    i.get_name           = [](ggml_backend_reg_t) { return second_kernels ? second_kernels->registry : "SECOND"; };
    i.get_device_count   = [](ggml_backend_reg_t) { return devices().size(); };
    i.get_device         = [](ggml_backend_reg_t, size_t index) { return &devices().at(index)->dev; };
    i.get_proc_address   = [](ggml_backend_reg_t, const char * name) {
        if (second_kernels) {
            return second_kernels->proc_address(name);
        }
        // the CPU's kernels for quantized weights, which marks switch off
        const ggml_backend_has_matvec_t yes = [](ggml_backend_dev_t) { return true; };
        return strcmp(name, GGML_BACKEND_HAS_MATVEC) == 0 ? (void *) yes : nullptr;
    };
    return i;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    static ggml_backend_reg reg   = { GGML_BACKEND_API_VERSION, registry_interface(), nullptr };
    const char *            count = getenv("SECOND_DEVICES");
    for (int i = (int) devices().size(); i < (count ? atoi(count) : 1); ++i) {
        auto device  = std::make_unique<Device>();
        device->name = "SECOND" + std::to_string(i);
        device->dev  = { device_interface(), &reg, device.get() };
        device->buft = { buft_interface(), &device->dev, nullptr };
        devices().push_back(std::move(device));
    }
    return &reg;
}

__attribute__((constructor)) static void register_at_once() {
    if (getenv("SECOND_REGISTERS")) {
        ggml_backend_register(ggml_backend_init());
    }
}
