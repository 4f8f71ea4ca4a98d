#pragma once

// A matmul in two steps, packing the activations and multiplying rows of weights, so that matmuls of the same
// activations can share the first step and the barrier after it. Implemented by repacked weights, and by quant-gemm for
// few columns.

#include "ggml-cpu-impl.h"
#include "quant-gemm.h"

namespace ggml::cpu {

// The format of packed activations: equal formats of the same activations have the same bytes.
struct packed_format {
    enum { REPACK, QUANT_GEMM } writer;

    int     type;    // REPACK: a ggml_type; QUANT_GEMM: a Scheme
    int64_t detail;  // REPACK: adjacent elements of a row; QUANT_GEMM: the offset of the quants

    bool operator==(const packed_format & o) const {
        return writer == o.writer && type == o.type && detail == o.detail;
    }
};

class packed_product {
  public:
    virtual ~packed_product() = default;

    virtual packed_format format(const ggml_tensor * op) const = 0;

    // Whether the whole matmul is faster than these steps.
    virtual bool whole(const ggml_tensor *) const { return false; }

    // The layout of the weights, for quant-gemm.
    virtual quant_gemm_layout layout() const { return QUANT_GEMM_OTHER; }

    // rows of the weights that are multiplied together
    virtual int64_t row_step() const = 0;

    // size of the packed op->src[1] in bytes
    virtual size_t packed_size(const ggml_tensor * op) const = 0;

    // Packs this thread's part of op->src[1] into the work buffer.
    virtual void pack_activations(ggml_compute_params * params, ggml_tensor * op) = 0;

    // Multiplies rows [first, last) of the weights by all activations. `first` is a multiple of row_step, and so is
    // `last` unless it is the number of rows.
    virtual void multiply_rows(ggml_compute_params * params, ggml_tensor * op, int64_t first, int64_t last) = 0;
};

// The repacked weights of a matmul, or nullptr if they are not repacked. Defined in repack.cpp.
packed_product * repacked_product(const ggml_tensor * op);

// The two-step implementation of a MUL_MAT: quant-gemm, if it has so few columns that it computes rows as dot products
// in the layout of the file; otherwise repacked_product.
packed_product * find_packed_product(const ggml_tensor * op);

}  // namespace ggml::cpu
