#pragma once

// The functions of ggml-cuda.cu that other sources of ggml-cuda need, for programs with only some of them: one device,
// a pool that allocates each buffer separately (so that out-of-bounds accesses are detected), errors as exceptions.

#include "common.cuh"

#include <memory>
#include <stdexcept>
#include <string>

static int standin_capability      = 800;  // compute capability of the device, in ggml's encoding
static int standin_multiprocessors = 108;

void ggml_cuda_error(const char * stmt, const char *, const char * file, int line, const char * msg) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + stmt + ": " + msg);
}

int ggml_cuda_get_device() {
    return 0;
}

void ggml_cuda_set_device(int) {}

const ggml_cuda_device_info & ggml_cuda_info() {
    static ggml_cuda_device_info info = {};
    info.device_count                 = 1;
    info.devices[0].cc                = standin_capability;
    info.devices[0].warp_size         = 32;
    info.devices[0].nsm               = standin_multiprocessors;
    info.devices[0].smpbo             = 99 << 10;
    return info;
}

static int standin_allocations = 0;  // from the pool

struct StandinPool : ggml_cuda_pool {
    void * alloc(size_t size, size_t * actual_size) override {
        ++standin_allocations;
        void * p     = nullptr;
        *actual_size = size;
        CUDA_CHECK(cudaMalloc(&p, size));
        return p;
    }

    void free(void * p, size_t) override { CUDA_CHECK(cudaFree(p)); }
};

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) {
    return std::make_unique<StandinPool>();
}

ggml_backend_cuda_context::~ggml_backend_cuda_context() = default;
