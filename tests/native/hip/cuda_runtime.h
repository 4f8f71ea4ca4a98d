#pragma once

// CUDA's names for HIP's, as far as the KDA kernels without tensor cores use them. Upstream's are in ggml-cuda/vendors.

#include <hip/hip_runtime.h>

#define cudaStream_t                           hipStream_t
#define __shfl_xor_sync(mask, value, distance) __shfl_xor(value, distance)
#define __all_sync(mask, predicate)            __all(predicate)
