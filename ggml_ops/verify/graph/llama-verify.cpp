#include "llama-verify.h"

#include "ggml-verify.h"
#include "kimi-ops.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

static bool holds_layers(const llama_model & model, ggml_backend_dev_t dev) {
    for (int il = 0; il < (int) model.hparams.n_layer(); ++il) {
        if (model.dev_layer(il) == dev) {
            return true;
        }
    }
    return false;
}

void llama_verify_operators(const llama_model & model, const llama_kimi_ops & ops, bool op_offload) {
    const bool kda = model.arch == LLM_ARCH_KIMI_LINEAR && ops.conv && ops.scan;
    const bool mla = model.hparams.is_mla() && ops.mla;
    if (!kda && !mla) {
        return;
    }
    const bool selected[GGML_VERIFY_N_PARTS] = { kda, kda, kda, mla, mla };
    for (const llama_device & each : model.devices) {
        if (!op_offload && !holds_layers(model, each.dev)) {
            continue;
        }
        const ggml_verify_report * report = ggml_verify_device(each.dev);
        for (int i = 0; report && ops.require && i < GGML_VERIFY_N_PARTS; ++i) {
            const auto        part   = (ggml_verify_part) i;
            const std::string reason = ggml_verify_reason(*report, part);
            if (selected[part] && !reason.empty()) {
                throw std::runtime_error(std::string("KIMI_OPS=require: ") + ggml_backend_dev_name(each.dev) + ": " +
                                         ggml_verify_part_name(part) + ": " + reason);
            }
        }
    }
}
