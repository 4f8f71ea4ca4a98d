#pragma once

// In place of cuBLAS's header, for compiling kernels only: the names that ggml-cuda's common.cuh mentions. Whoever calls
// one gets CUBLAS_STATUS_NOT_SUPPORTED.

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH,
    CUBLAS_STATUS_MAPPING_ERROR,
    CUBLAS_STATUS_EXECUTION_FAILED,
    CUBLAS_STATUS_INTERNAL_ERROR,
    CUBLAS_STATUS_NOT_SUPPORTED,
};

enum cublasMath_t {
    CUBLAS_DEFAULT_MATH,
    CUBLAS_TF32_TENSOR_OP_MATH,
};

enum cublasOperation_t {
    CUBLAS_OP_N,
    CUBLAS_OP_T,
};

enum cublasComputeType_t {
    CUBLAS_COMPUTE_16F,
    CUBLAS_COMPUTE_32F,
};

enum cublasGemmAlgo_t {
    CUBLAS_GEMM_DEFAULT_TENSOR_OP,
};

using cublasHandle_t = struct cublasContext *;

inline const char * cublasGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? "success" : "not supported: this is no cuBLAS";
}

#define CUBLAS_STUB(NAME)                                                                                              \
    template <class... Arguments> cublasStatus_t NAME(Arguments...) {                                                  \
        return CUBLAS_STATUS_NOT_SUPPORTED;                                                                            \
    }
CUBLAS_STUB(cublasCreate)
CUBLAS_STUB(cublasDestroy)
CUBLAS_STUB(cublasSetMathMode)
CUBLAS_STUB(cublasSetStream)
CUBLAS_STUB(cublasSetWorkspace)
CUBLAS_STUB(cublasSgemm)
CUBLAS_STUB(cublasGemmEx)
CUBLAS_STUB(cublasGemmBatchedEx)
CUBLAS_STUB(cublasGemmStridedBatchedEx)
#undef CUBLAS_STUB
