#pragma once

// Kernels for the devices of second_backend.cpp, where another source of the library has some (cuda/second_cuda.cu).

#include "ggml-impl.h"

struct SecondKernels {
    // Memory of whole pages that the kernels take for theirs.
    void * (*allocate)(size_t bytes);
    void (*release)(void * memory);

    // Whether devices claim a node: 1 yes, 0 no, -1 if the CPU's compute does.
    int (*claims)(const ggml_tensor * node);

    // Computes node i and those behind it that it takes over. Returns how many they are; 0: it is the CPU's.
    int (*compute)(ggml_cgraph * graph, int i);
};

inline const SecondKernels * second_kernels = nullptr;
