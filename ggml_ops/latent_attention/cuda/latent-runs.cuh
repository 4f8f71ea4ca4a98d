#pragma once

// Upstream's attention over a long quantized cache, in runs of keys. Its kernel reads F16, and the F16 copy of a whole
// cache would take 1.2 GB for a million keys. Here the copy has the keys of one run.

#include "fattn-common.cuh"

#include <cstddef>
#include <cstdint>

namespace latent_cuda {

// What fattn.cu chose for a node: a kernel of fattn-mma-f16.cuh and its launch.
struct upstream_kernel {
    fattn_kernel_t kernel;
    dim3           block;
    size_t         shared;                    // bytes
    int            step_keys;                 // keys that a block reads at a time
    int            tile_queries, tile_heads;  // a block computes tiles of so many queries and heads
};

// What a launch computes at most; computed, not measured. Keys: their F16 copy takes 38 MiB on data-centre devices (L2 of an
// A100: 40 MiB, of an H200: 50) and 64 MiB on a GeForce (L2 of an RTX 4090: 72 MiB, of a 5090: 96, of a 3090: 6). Rows
// (queries x heads): their results take memory.
struct run_limits {
    int64_t keys;
    int64_t rows;
};

constexpr run_limits DATA_CENTRE_RUNS = { 34816, 8192 };
constexpr run_limits GEFORCE_RUNS     = { 58112, 8192 };

// Bytes of `work` for the node, on a device with so many multiprocessors.
size_t runs_workspace(const ggml_tensor * dst, int n_multiprocessors, const run_limits & limits);

// work: aligned to 128 bytes. One launch, and for each run of each stream a conversion, and two launches for each group of
// queries.
void attend_in_runs(ggml_backend_cuda_context & ctx,
                    ggml_tensor *               dst,
                    const upstream_kernel &     upstream,
                    char *                      work,
                    const run_limits &          limits);

}  // namespace latent_cuda
