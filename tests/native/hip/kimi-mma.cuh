#pragma once

// Replaces common/cuda/kimi-mma.cuh, whose PTX no AMD device has: the size of a warp remains.

#include <cuda_runtime.h>

namespace kimi_cuda {

constexpr int      WARP      = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

}  // namespace kimi_cuda
