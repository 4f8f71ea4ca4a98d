#pragma once

// The part of CUDA's runtime that hosts call: memory, streams, events, attributes. There is one device. Every call is
// synchronous, except with streams of the harness (streams.h).

#include "launch.h"

enum cudaError_t {
    cudaSuccess                     = 0,
    cudaErrorInvalidValue           = 1,
    cudaErrorMemoryAllocation       = 2,
    cudaErrorNotSupported           = 801,
    cudaErrorGraphExecUpdateFailure = 910,
};

enum cudaMemcpyKind {
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
};

enum cudaDeviceAttr {
    cudaDevAttrCooperativeLaunch,
};

enum cudaDataType_t {
    CUDA_R_32F,
    CUDA_R_16F,
    CUDA_R_16BF,
};

enum cudaStreamCaptureMode {
    cudaStreamCaptureModeRelaxed,
};

struct CUgraph_st;
struct CUgraphExec_st;
struct CUgraphNode_st;
using cudaGraph_t     = CUgraph_st *;
using cudaGraphExec_t = CUgraphExec_st *;
using cudaGraphNode_t = CUgraphNode_st *;

using cudaHostFn_t = void (*)(void *);

enum cudaGraphExecUpdateResult {};

inline const cudaStream_t cudaStreamPerThread = nullptr;

enum cudaLaunchAttributeID {
    cudaLaunchAttributeProgrammaticStreamSerialization,
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;

    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3                  gridDim, blockDim;
    size_t                dynamicSmemBytes;
    cudaStream_t          stream;
    cudaLaunchAttribute * attrs;
    unsigned              numAttrs;
};

struct cudaFuncAttributes {
    int    ptxVersion, binaryVersion, numRegs, maxThreadsPerBlock;
    size_t sharedSizeBytes, localSizeBytes, maxDynamicSharedSizeBytes;
};

struct cudaDeviceProp {
    char   name[256];
    int    major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, integrated;
    size_t sharedMemPerBlock, sharedMemPerBlockOptin, totalGlobalMem;
};

constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1, cudaEventDefault = 0;
constexpr unsigned cudaHostRegisterPortable = 1, cudaHostRegisterReadOnly = 8, cudaDeviceScheduleSpin = 1;

#define CUDA_EMULATOR_ARCHITECTURE (__CUDA_ARCH__ / 10)

inline const char * cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory" : "invalid value";
}

// clang-format off
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int * device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int * count) { *count = 1; return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t * stream) { *stream = nullptr; return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) { return cudaStreamCreate(stream); }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t * event) { *event = new CUevent_st(); return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void * data) { f(data); return cudaSuccess; }
inline cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
inline cudaError_t cudaDeviceCanAccessPeer(int * can, int, int) { *can = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetPCIBusId(char * id, int size, int) { snprintf(id, size, "0000:00:00.0"); return cudaSuccess; }
inline cudaError_t cudaHostRegister(void *, size_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaHostUnregister(void *) { return cudaSuccess; }

// Capture is not supported and returns an error.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *) { return cudaErrorNotSupported; }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, cudaGraphNode_t *, char *, size_t) { return cudaErrorNotSupported; }
inline cudaError_t cudaGraphExecUpdate(cudaGraphExec_t, cudaGraph_t, cudaGraphNode_t *, cudaGraphExecUpdateResult *) { return cudaErrorNotSupported; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
// clang-format on

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream) {
        cuda_emulator::synchronize(*stream);
    }
    return cudaSuccess;
}

inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    event->done = std::make_shared<bool>(false);
    if (stream) {
        stream->items.push_back({ [done = event->done] { *done = true; }, nullptr });
    } else {
        *event->done = true;
    }
    return cudaSuccess;
}

inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    if (stream) {
        stream->items.push_back({ nullptr, event->done });
    }
    return cudaSuccess;
}

template <class T>
cudaError_t cudaMalloc(T ** pointer, size_t bytes, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    *pointer = static_cast<T *>(cuda_emulator::device_memory.allocate(bytes, place));
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

template <class T> cudaError_t cudaMallocManaged(T ** pointer, size_t bytes) {
    return cudaMalloc(pointer, bytes);
}

inline cudaError_t cudaFree(void * pointer) {
    if (pointer && !cuda_emulator::device_memory.release(pointer)) {
        throw cuda_emulator::Fault("cudaFree: invalid or already freed pointer");
    }
    return cudaSuccess;
}

template <class T> cudaError_t cudaMallocHost(T ** pointer, size_t bytes) {
    *pointer = static_cast<T *>(malloc(bytes));
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

inline cudaError_t cudaFreeHost(void * pointer) {
    free(pointer);
    return cudaSuccess;
}

namespace cuda_emulator {

// Checks that a copy by the host stays within its buffer.
inline void check_range(const void * pointer, size_t bytes, const char * what, Place place) {
    const Buffer * buffer = device_memory.find(pointer);
    const char *   begin  = static_cast<const char *>(pointer);
    if (buffer && bytes) {
        for (const char * byte : { begin, begin + bytes - 1 }) {
            if (buffer->freed || byte < buffer->memory.begin || byte >= buffer->memory.begin + buffer->memory.bytes) {
                fail(format("%s of %zu bytes: ", what, bytes) + buffer->where(byte), place);
            }
        }
    }
}

}  // namespace cuda_emulator

inline cudaError_t cudaMemcpy(void *       to,
                              const void * from,
                              size_t       bytes,
                              cudaMemcpyKind,
                              cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::check_range(to, bytes, "cudaMemcpy to a buffer", place);
    cuda_emulator::check_range(from, bytes, "cudaMemcpy from a buffer", place);
    memmove(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void *               to,
                                   const void *         from,
                                   size_t               bytes,
                                   cudaMemcpyKind       kind,
                                   cudaStream_t         stream = nullptr,
                                   cuda_emulator::Place place  = cuda_emulator::Place::here()) {
    cuda_emulator::submit(stream, [=] { cudaMemcpy(to, from, bytes, kind, place); });
    return cudaSuccess;
}

inline cudaError_t
cudaMemset(void * to, int value, size_t bytes, cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::check_range(to, bytes, "cudaMemset", place);
    memset(to, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void *               to,
                                   int                  value,
                                   size_t               bytes,
                                   cudaStream_t         stream = nullptr,
                                   cuda_emulator::Place place  = cuda_emulator::Place::here()) {
    cuda_emulator::submit(stream, [=] { cudaMemset(to, value, bytes, place); });
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyPeerAsync(void * to, int, const void * from, int, size_t bytes, cudaStream_t = nullptr) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

inline cudaError_t cudaMemcpy2DAsync(void *         to,
                                     size_t         to_pitch,
                                     const void *   from,
                                     size_t         from_pitch,
                                     size_t         width,
                                     size_t         height,
                                     cudaMemcpyKind kind,
                                     cudaStream_t               = nullptr,
                                     cuda_emulator::Place place = cuda_emulator::Place::here()) {
    for (size_t row = 0; row < height; ++row) {
        cudaMemcpy(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width,
                   kind, place);
    }
    return cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t * free, size_t * total) {
    *free = *total = size_t(16) << 30;
    return cudaSuccess;
}

template <class K> cudaError_t cudaFuncSetAttribute(K * kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || size_t(value) > cuda_emulator::options.shared_limit) {
            return cudaErrorInvalidValue;
        }
        cuda_emulator::shared_attributes()[reinterpret_cast<const void *>(kernel)] = size_t(value);
    }
    return cudaSuccess;
}

template <class K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, K *) {
    *attributes                           = {};
    attributes->ptxVersion                = CUDA_EMULATOR_ARCHITECTURE;
    attributes->binaryVersion             = CUDA_EMULATOR_ARCHITECTURE;
    attributes->maxThreadsPerBlock        = 1024;
    attributes->maxDynamicSharedSizeBytes = cuda_emulator::options.shared_limit;
    return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(P...), A &&... arguments) {
    const bool early = config->numAttrs > 0 && config->attrs[0].val.programmaticStreamSerializationAllowed != 0;
    cuda_emulator::Configured<P...>(
        kernel, "kernel",
        { config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, early })(arguments...);
    return cudaSuccess;
}

template <class K> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int * blocks, K *, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int) {
    *properties = {};
    strcpy(properties->name, "CUDA emulator");
    properties->major                  = CUDA_EMULATOR_ARCHITECTURE / 10;
    properties->minor                  = CUDA_EMULATOR_ARCHITECTURE % 10;
    properties->multiProcessorCount    = 8;
    properties->warpSize               = 32;
    properties->maxThreadsPerBlock     = 1024;
    properties->sharedMemPerBlock      = 48 * 1024;
    properties->sharedMemPerBlockOptin = cuda_emulator::options.shared_limit;
    properties->totalGlobalMem         = size_t(16) << 30;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) {
    *value = 0;
    return cudaSuccess;
}
