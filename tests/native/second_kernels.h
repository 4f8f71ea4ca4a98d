#pragma once

// Kernels for the devices of second_backend.cpp, where another source of the library has some (cuda/second_cuda.cu).

#include "ggml-impl.h"

// Nodes that a backend computes by one call.
struct SecondStep {
    int  n_nodes;
    bool done;  // by the kernels; false: the CPU is to compute the nodes
};

struct SecondKernels {
    // The registry of the devices, by whose name llama.cpp chooses some things.
    const char * registry;

    // Memory of whole pages that the kernels take for theirs.
    void * (*allocate)(size_t bytes);
    void (*release)(void * memory);

    // Whether devices claim a node: 1 yes, 0 no, -1 if the CPU's compute does.
    int (*claims)(const ggml_tensor * node);

    // The next step of a graph, at node i.
    SecondStep (*step)(ggml_cgraph * graph, int i);

    // Whether the device would launch what it captured of this graph before, asked once for each that is computed.
    bool (*replays)(ggml_cgraph * graph);
};

inline const SecondKernels * second_kernels = nullptr;
