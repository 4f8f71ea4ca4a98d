#pragma once

// The cases that kimi-verify computes on a device and on the CPU: small inputs, ordinary and hostile.

#include "ggml-backend.h"
#include "ggml-verify.h"

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

using Floats = std::vector<float>;
using Shape  = std::array<int64_t, 4>;

// The inputs of a graph. The same seed makes the same inputs for every device.
class Inputs {
  public:
    ggml_context * const ctx;

    explicit Inputs(ggml_context * ctx) : ctx(ctx) {}

    Floats normal(size_t n, float mean = 0, float deviation = 1);

    ggml_tensor * tensor(ggml_type type, Shape shape, const Floats & values);

    // Quantizes the values once, and repeats the rows until the tensor is full.
    ggml_tensor * repeated(ggml_type type, Shape shape, const Floats & rows);
    ggml_tensor * indices(const std::vector<int32_t> & values);

    // Writes the values to the tensors, which have memory now.
    void write() const;

  private:
    struct Input {
        ggml_tensor *     tensor;
        std::vector<char> bytes;
    };

    uint64_t           state = 1;
    std::vector<Input> inputs;
};

// n_pieces times n floats of a tensor, from `first` on; the beginnings of the pieces are `step` floats apart.
struct Range {
    const ggml_tensor * tensor;
    int64_t             first;
    int64_t             n;
    int64_t             step;
    int64_t             n_pieces;
};

struct Built {
    std::vector<ggml_tensor *> nodes;     // in the order of the graph, which also gets their sources
    std::vector<Range>         results;   // compared with the CPU's, each by an NMSE of its own
    std::vector<Range>         not_kept;  // not computed if the device elides the copy of the states
};

struct Case {
    std::string                    name;
    double                         bound;  // of the NMSE
    std::function<Built(Inputs &)> build;
    bool                           weights = false;  // the tensors are in a buffer of weights
};

// KDA_CONV and KDA_SCAN, which store their new states, both forms of latent attention, nodes that Metal and CUDA fuse, and
// matmuls of one column.
std::vector<Case> cases_of(ggml_verify_part part);
