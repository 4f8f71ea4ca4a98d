#include "llama-verify.h"

#include "ggml-verify.h"
#include "kimi-ops.h"
#include "llama-hparams.h"
#include "llama-kda.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// Whether the device has layers, or tensors of other layers (--override-tensor).
static bool holds_tensors(const llama_model & model, ggml_backend_dev_t dev) {
    for (int il = 0; il < (int) model.hparams.n_layer(); ++il) {
        if (model.dev_layer(il) == dev) {
            return true;
        }
    }
    for (const auto & [buft, size] : model.memory_breakdown()) {
        if (ggml_backend_buft_get_device(buft) == dev && !ggml_backend_buft_is_host(buft)) {
            return true;
        }
    }
    return false;
}

// ggml-metal-fuse.cpp, and on CUDA norm.cu
static bool fuses_nodes(ggml_backend_dev_t dev) {
    const char * registry = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
    return strcmp(registry, "MTL") == 0 || strcmp(registry, "CUDA") == 0;
}

// The devices that may compute nodes of the model.
static std::vector<ggml_backend_dev_t> devices_of(const llama_model & model, bool op_offload) {
    std::vector<ggml_backend_dev_t> devices;
    for (const llama_device & device : model.devices) {
        if (device.is_meta) {  // it stands for several of them
            for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
                devices.push_back(ggml_backend_dev_get(i));
            }
        } else if (op_offload || holds_tensors(model, device.dev)) {
            devices.push_back(device.dev);
        }
    }
    return devices;
}

void llama_verify_operators(const llama_model & model, const llama_kimi_ops & ops, bool op_offload) {
    const bool kda = llama_kda_is_family(model) && ops.conv && ops.scan;
    const bool mla = model.hparams.is_mla() && ops.mla;
    for (ggml_backend_dev_t dev : devices_of(model, op_offload)) {
        const bool fuse                          = ops.fuse && fuses_nodes(dev);
        const bool matvec                        = ops.matmul && ggml_verify_has_matvec(dev);
        const bool selected[GGML_VERIFY_N_PARTS] = { kda, kda, kda, mla, mla, fuse, matvec };
        if (std::find(std::begin(selected), std::end(selected), true) == std::end(selected)) {
            continue;
        }
        const ggml_verify_report * report = ggml_verify_device(dev);
        for (int i = 0; report && ops.require && i < GGML_VERIFY_N_PARTS; ++i) {
            const auto        part   = (ggml_verify_part) i;
            const std::string reason = ggml_verify_reason(*report, part);
            if (selected[part] && !reason.empty()) {
                throw std::runtime_error(std::string("KIMI_OPS=require: ") + ggml_backend_dev_name(dev) + ": " +
                                         ggml_verify_part_name(part) + ": " + reason);
            }
        }
    }
}
