#pragma once

// Launches of kernels that begin while the previous one of their stream ends, from compute capability 9.0 on
// (programmatic dependent launch), as ggml-cuda launches its own kernels (ggml_cuda_kernel_launch): the device schedules
// the blocks early, and they wait inside the kernel. Every thread of such a kernel calls wait_for_previous before it
// accesses memory that other kernels use.

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>

namespace kimi_cuda {

// Waits until the previous kernels of the stream have ended and their results are visible.
static __device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Lets the next kernel of the stream begin, as soon as all blocks have called this and where there is room. Kernels that
// leave most of the device idle call it at once; other kernels need the room for their own blocks.
static __device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// As in ggml-cuda's common.cuh: cudaLaunchKernelEx is usable from 12.3 on, and GGML_CUDA_PDL=0 turns it off.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12030
#define KIMI_CUDA_OVERLAPS
#endif

#if defined(KIMI_CUDA_OVERLAPS)

// Whether the code loaded for this device has the wait. Code compiled for an older architecture has not.
template <auto KERNEL> bool waits_for_previous() {
    constexpr int           DEVICES = 16;  // as GGML_CUDA_MAX_DEVICES
    static const char *     setting = getenv("GGML_CUDA_PDL");
    static std::atomic<int> known[DEVICES];  // 0: not yet, 1: no, 2: yes
    int                     device = 0;
    if ((setting != nullptr && atoi(setting) == 0) || cudaGetDevice(&device) != cudaSuccess || device >= DEVICES) {
        return false;
    }
    if (known[device] == 0) {
        cudaFuncAttributes attributes = {};
        known[device] =
            cudaFuncGetAttributes(&attributes, KERNEL) == cudaSuccess && attributes.ptxVersion >= 90 ? 2 : 1;
    }
    return known[device] == 2;
}
#endif

// Launches a kernel that calls wait_for_previous.
template <auto KERNEL, typename... ARGS>
void launch_early(const dim3 & grid, const dim3 & block, size_t shared, cudaStream_t stream, const ARGS &... args) {
#if defined(KIMI_CUDA_OVERLAPS)
    if (waits_for_previous<KERNEL>()) {
        cudaLaunchAttribute attribute                        = {};
        attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config                            = {};
        config.gridDim                                       = grid;
        config.blockDim                                      = block;
        config.dynamicSmemBytes                              = shared;
        config.stream                                        = stream;
        config.attrs                                         = &attribute;
        config.numAttrs                                      = 1;
        cudaLaunchKernelEx(&config, KERNEL, args...);
        return;
    }
#endif
    KERNEL<<<grid, block, shared, stream>>>(args...);
}

}  // namespace kimi_cuda
