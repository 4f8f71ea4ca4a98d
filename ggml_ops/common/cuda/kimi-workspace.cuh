#pragma once

// The workspace of a CUDA operator is stored after its result, so that it is part of llama.cpp's compute buffers and
// counted as they are.

#include "ggml.h"

namespace kimi_cuda {

// Bytes from the start of an operator's result to its workspace.
inline size_t after_result(const ggml_tensor * dst) {
    return GGML_PAD(ggml_nbytes(dst), 128);
}

}  // namespace kimi_cuda
