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

// Whether the emulator computes matmuls of one column, by our kernel or by upstream's; otherwise the CPU does, which is
// much faster.
static bool multiplies() {
    return getenv("SECOND_MATVEC") != nullptr;
}

static void * proc_address(const char * name) {
    if (strcmp(name, GGML_BACKEND_LATENT_FAST_SUMS) == 0) {
        const auto fast_sums = [](ggml_backend_dev_t) { return ggml_cuda_latent_fast_sums(0); };
        return (void *) (ggml_backend_latent_fast_sums_t) fast_sums;
    }
    if (strcmp(name, GGML_BACKEND_HAS_MATVEC) == 0) {
        const auto has_matvec = [](ggml_backend_dev_t) { return multiplies() && ggml_cuda_has_matvec(0); };
        return (void *) (ggml_backend_has_matvec_t) has_matvec;
    }
    return nullptr;
}

// SECOND_CAPABILITY: the devices' compute capability, as ggml writes it (860); 800 if unset.
static void set_capability() {
    if (const char * text = getenv("SECOND_CAPABILITY")) {
        const_cast<ggml_cuda_device_info &>(ggml_cuda_info()).devices[0].cc = atoi(text);
    }
}

// Whether the emulator multiplies the node's quantized matrices by one column.
static bool is_matvec(const ggml_tensor * node) {
    if ((node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) || !ggml_is_quantized(node->src[0]->type)) {
        return false;
    }
    const ggml_tensor * x = node->src[1];
    return x->ne[node->op == GGML_OP_MUL_MAT ? 1 : 2] == 1 && x->ne[3] == 1 && multiplies();
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
    ggml_tensor * node     = graph->nodes[i];
    const bool    multiply = is_matvec(node);
    const bool    on_cpu   = (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && !multiply;
    // in front of matmuls, upstream asks for other kernels that are missing here
    const auto n_calls = [&] { return upstream_launches + (multiply ? 0 : upstream_missing); };
    const int  before  = n_calls();
    const auto is_done = [&] { return !on_cpu && n_calls() == before; };
    try {
        cuda().begin_node(node);
        counts_only       = on_cpu;
        const int n_after = ggml_cuda_try_fuse(&cuda(), graph, i);
        counts_only       = false;
        if (n_after > 0) {
            return { 1 + n_after, is_done() };
        }
        if (multiply || is_ours(node) ||
            (node->op == GGML_OP_FLASH_ATTN_EXT && ggml_cuda_latent_attention_size(0, node) > 0)) {
            GGML_ASSERT(ggml_cuda_compute_forward(cuda(), node));
            return { 1, is_done() };
        }
    } catch (const std::exception & fault) {
        GGML_ABORT("%s: %s", node->name, fault.what());
    }
    return { 1, false };
}

static void finish() {
    cuda().begin_node(nullptr);
}

static void optimize(ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    static ggml_backend backend = { {}, {}, nullptr, &cuda() };
    ggml_backend_cuda_graph_optimize(&backend, graph, params);
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

static const SecondKernels KERNELS = { "CUDA", allocate, release,  alloc_size, claims,      step,
                                       finish, replays,  optimize, launches,   proc_address };

__attribute__((constructor)) static void give() {
    set_capability();
    second_kernels = &KERNELS;
}
