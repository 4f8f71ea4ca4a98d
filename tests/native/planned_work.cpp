// Preloaded into a process with llama.cpp: no graph is computed. Instead, the number of threads and the bytes of the work
// buffer that ggml has planned for each are printed.

#include "ggml-cpu.h"

#include <cstdio>

extern "C" ggml_status ggml_graph_compute(ggml_cgraph *, ggml_cplan * plan) {
    fprintf(stderr, "planned work: %d threads, %zu bytes\n", plan->n_threads, plan->work_size);
    return GGML_STATUS_SUCCESS;
}
