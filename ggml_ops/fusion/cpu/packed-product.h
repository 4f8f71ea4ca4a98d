#pragma once

// A matrix product in two steps, which repacked weights and products of few columns offer beside the whole one: products
// of the same activations can then share the first step, and the barrier behind it.

#include "ggml-cpu-impl.h"

namespace ggml::cpu {

class packed_product {
  public:
    virtual ~packed_product() = default;

    // what the activations are packed into; equal numbers, equal bytes
    virtual int activations(const ggml_tensor * op) const = 0;

    // Is the whole product faster by itself than in these steps?
    virtual bool whole(const ggml_tensor *) const { return false; }

    // How the weights lie, as one of quant_gemm_layout, for kernels that read them by themselves; -1: as no other's do.
    virtual int layout() const { return -1; }

    // rows of the weights that go together
    virtual int64_t row_step() const = 0;

    // bytes that op->src[1] takes when packed
    virtual size_t packed_size(const ggml_tensor * op) const = 0;

    // Packs op->src[1] into the work buffer; each thread its part.
    virtual void pack_activations(ggml_compute_params * params, ggml_tensor * op) = 0;

    // Rows [first, last) of the weights, from a multiple of row_step to another or to the end, by all activations.
    virtual void multiply_rows(ggml_compute_params * params, ggml_tensor * op, int64_t first, int64_t last) = 0;
};

// The repacked weights of a product, or nullptr where they are none; repack.cpp.
packed_product * repacked_product(const ggml_tensor * op);

// What computes a product in two steps, or nullptr; repack.cpp.
packed_product * find_packed_product(const ggml_tensor * op);

}  // namespace ggml::cpu
