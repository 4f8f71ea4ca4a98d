// ggml-cuda's own host code, patched, for the devices of second_backend.cpp: it decides which nodes are supported,
// which nodes are computed in one call and whether a captured graph is launched again, and it calls our kernels, which
// the emulator runs. Upstream's kernels are not linked (upstream_missing, test_cuda_backend.py): the CPU replaces them.

#include "../second_kernels.h"
#include "ggml-cuda.cu"
#include "to-floats.cuh"

using namespace cuda_emulator;

// The number of calls of missing upstream functions: those that only answer a question, and those that launch.
extern "C" int upstream_missing, upstream_launches;
int            upstream_missing = 0, upstream_launches = 0;

static void * allocate(size_t bytes) {
    void * memory = nullptr;
    return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}

static void release(void * memory) {
    GGML_ASSERT(cudaFree(memory) == cudaSuccess);
}

// The memory of the real backend.
static size_t alloc_size(const ggml_tensor * t) {
    static ggml_backend_cuda_buffer_type_context context = { 0, "" };
    static ggml_backend_buffer_type              type    = { {}, nullptr, &context };
    return ggml_backend_cuda_buffer_type_get_alloc_size(&type, t);
}

static void * proc_address(const char * name) {
    const auto fast_sums = [](ggml_backend_dev_t) { return ggml_cuda_latent_fast_sums(0); };
    return strcmp(name, GGML_BACKEND_LATENT_FAST_SUMS) == 0 ? (void *) (ggml_backend_latent_fast_sums_t) fast_sums
                                                            : nullptr;
}

// SECOND_CAPABILITY: the devices' compute capability, as ggml writes it (860); 800 if unset.
static void set_capability() {
    if (const char * text = getenv("SECOND_CAPABILITY")) {
        const_cast<ggml_cuda_device_info &>(ggml_cuda_info()).devices[0].cc = atoi(text);
    }
}

static bool is_ours(const ggml_tensor * node) {
    return node->op == GGML_OP_KDA_CONV || node->op == GGML_OP_KDA_SCAN || node->op == GGML_OP_LATENT_ATTN;
}

static int claims(const ggml_tensor * node) {
    static ggml_backend_cuda_device_context context = { 0, "", "", "", 0 };
    static ggml_backend_device              device  = { {}, nullptr, &context };
    return !ggml_backend_cuda_device_supports_op(&device, node) ? 0 : is_ours(node) ? 1 : -1;
}

static ggml_backend_cuda_context & cuda() {
    static ggml_backend_cuda_context context(0);
    return context;
}

static SecondStep step(ggml_cgraph * graph, int i) {
    ggml_tensor * node    = graph->nodes[i];
    const int     before  = upstream_missing + upstream_launches;
    const auto    is_done = [&] { return upstream_missing + upstream_launches == before; };
    try {
        counts_only       = node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;  // the CPU multiplies
        const int n_after = ggml_cuda_try_fuse(&cuda(), graph, i);
        counts_only       = false;
        if (n_after > 0) {
            return { 1 + n_after, is_done() };
        }
        if (is_ours(node) || (node->op == GGML_OP_FLASH_ATTN_EXT && ggml_cuda_latent_attention_size(0, node) > 0)) {
            GGML_ASSERT(ggml_cuda_compute_forward(cuda(), node));
            return { 1, is_done() };
        }
    } catch (const std::exception & fault) {
        GGML_ABORT("%s: %s", node->name, fault.what());
    }
    return { 1, false };
}

// ggml-cuda's own loop over the nodes, with work that is only counted. Functions of upstream that are not linked count as
// one launch each. Most of them have one; attention on tensor cores has up to three.
static int launches(ggml_cgraph * graph) {
    const int before = n_submitted + upstream_launches;
    counts_only      = true;
    ggml_cuda_graph_evaluate_and_capture(&cuda(), graph, false, false, graph);
    counts_only = false;
    return n_submitted + upstream_launches - before;
}

static bool replays(ggml_cgraph * graph) {
    return ggml_cuda_graph_check_compability(graph) && !ggml_cuda_graph_update_required(&cuda(), graph);
}

static const SecondKernels KERNELS = { "CUDA", allocate, release,  alloc_size,  claims,
                                       step,   replays,  launches, proc_address };

__attribute__((constructor)) static void give() {
    set_capability();
    second_kernels = &KERNELS;
}
