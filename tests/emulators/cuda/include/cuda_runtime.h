#pragma once

// The emulator's replacement for CUDA's header of this name: everything available to a .cu without includes.

// The architecture of the emulated device: sm_80 unless the compiler defines another.
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#ifndef CUDART_VERSION
#define CUDART_VERSION 11070
#endif

#include "cuda_emulator/runtime_api.h"

#include "cuda_emulator/checks.h"
#include "cuda_emulator/harness.h"
#include "cuda_emulator/ptx.h"

#define __global__
#define __device__
#define __host__
#define __constant__     static
#define __forceinline__  inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(...)
