// Matmuls of few columns in two steps, for adjacent nodes that share the packed activations and the barrier (node
// fusion). Results are equal to those of quant-gemm.cpp.

#include "packed-product.h"
#include "quant-gemm-dot.h"

#include <algorithm>
#include <cstring>

quant_gemm_layout ggml_quant_gemm_layout(const ggml_tensor * product) {
    if (product->src[0]->extra == nullptr) {
        return QUANT_GEMM_ROWS;
    }
    const ggml::cpu::packed_product * packed = ggml::cpu::repacked_product(product);
    return packed != nullptr ? packed->layout() : QUANT_GEMM_OTHER;
}

namespace quant_gemm {

static constexpr int MAX_COLUMNS = 16;

static const Format * format_of(const ggml_tensor * op) {
    return format_of(op, ggml_quant_gemm_layout(op));
}

namespace {

class Steps : public ggml::cpu::packed_product {
  public:
    ggml::cpu::packed_format format(const ggml_tensor * op) const override {
        const Format * format = format_of(op);
        return { ggml::cpu::packed_format::QUANT_GEMM, (int) format->scheme, format->offset };
    }

    int64_t row_step() const override { return DOT_ROWS; }

    size_t packed_size(const ggml_tensor * op) const override {
        return ggml_nrows(op->src[1]) * act_row_size(format_of(op)->scheme, op->src[1]->ne[0]);
    }

    void pack_activations(ggml_compute_params * params, ggml_tensor * op) override {
        pack_rows(*format_of(op), op->src[1], (char *) params->wdata, params->ith, params->nth);
    }

    void multiply_rows(ggml_compute_params * params, ggml_tensor * op, int64_t first, int64_t last) override {
        const Format &      format   = *format_of(op);
        const ggml_tensor * weights  = op->src[0];
        const size_t        act_size = act_row_size(format.scheme, weights->ne[0]);
        const int           n        = (int) op->ne[1];
        const char *        columns[MAX_COLUMNS];
        for (int c = 0; c < n; c++) {
            columns[c] = (const char *) params->wdata + c * act_size;
        }
        DotOperand few(format, weights->ne[0]);
        few.set_columns({ columns, n });
        // the next rows of this thread if all threads progress equally
        const int64_t next = first + params->nth * (last - first);
        const auto    at   = [&](int64_t row) { return (const char *) weights->data + row * weights->nb[1]; };
        for (int64_t row = first; row < last; row += PANEL_ROWS) {
            const int64_t n_rows = std::min<int64_t>(PANEL_ROWS, last - row);
            const int64_t after  = row + PANEL_ROWS < last ? row + PANEL_ROWS : next;
            float         sums[MAX_COLUMNS][PANEL_ROWS];
            few.multiply({ at(row), weights->nb[1], n_rows, at(after < weights->ne[1] ? after : row) }, *sums);
            for (int c = 0; c < n; c++) {
                memcpy((char *) op->data + c * op->nb[1] + row * sizeof(float), sums[c], n_rows * sizeof(float));
            }
        }
    }
};

}  // namespace

static ggml::cpu::packed_product * find_steps(const ggml_tensor * product) {
    static Steps   steps;
    const Format * format = format_of(product);
    if (format == nullptr || product->op != GGML_OP_MUL_MAT || ggml_nrows(product) != product->ne[1]) {
        return nullptr;
    }
    return product->ne[1] <= MAX_COLUMNS && uses_dots(*format, product, product->ne[1]) ? &steps : nullptr;
}

}  // namespace quant_gemm

ggml::cpu::packed_product * ggml::cpu::find_packed_product(const ggml_tensor * op) {
    packed_product * steps = quant_gemm::find_steps(op);
    return steps != nullptr ? steps : repacked_product(op);
}
