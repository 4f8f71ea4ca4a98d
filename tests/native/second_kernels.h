#pragma once

// Kernels for the devices of second_backend.cpp, if another source of the library has them (cuda/second_cuda.cu).

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

// Nodes that a backend computes in one call.
struct SecondStep {
    int  n_nodes;
    bool done;  // computed by the kernels; false: the CPU has to compute the nodes
};

struct SecondKernels {
    // The name of the devices' registry, on which some decisions of llama.cpp depend.
    const char * registry;

    // Allocates whole pages of memory for the kernels.
    void * (*allocate)(size_t bytes);
    void (*release)(void * memory);

    // The memory that a tensor needs on the devices, with what its kernels need behind the result.
    size_t (*alloc_size)(const ggml_tensor * t);

    // Whether devices support a node: 1 yes, 0 no, -1 if the CPU backend decides.
    int (*claims)(const ggml_tensor * node);

    // The next step of a graph, at node i.
    SecondStep (*step)(ggml_cgraph * graph, int i);

    // Called after the last step.
    void (*finish)();

    // Whether the device would launch its captured version of this graph; called once per computed graph.
    bool (*replays)(ggml_cgraph * graph);

    // What the backend does with a graph before it is allocated (ggml_backend_i::graph_optimize).
    void (*optimize)(ggml_cgraph * graph, ggml_backend_graph_optimize_params * params);

    // How many kernels, copies and fills the real backend launches for this graph.
    int (*launches)(ggml_cgraph * graph);

    // A function of the devices' registry (ggml_backend_reg_get_proc_address), or nullptr.
    void * (*proc_address)(const char * name);
};

inline const SecondKernels * second_kernels = nullptr;
