#include "llama-latent-place.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstring>

static ggml_backend_buffer_type_t memory_of(const ggml_tensor * t) {
    const ggml_tensor * base = t->view_src ? t->view_src : t;
    return base->buffer ? ggml_backend_buffer_get_type(base->buffer) : nullptr;
}

static ggml_backend_dev_t device_of(ggml_backend_buffer_type_t memory) {
    return ggml_backend_buft_is_host(memory) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)
                                             : ggml_backend_buft_get_device(memory);
}

std::string llama_latent_attn_obstacle(const ggml_tensor * node) {
    const ggml_tensor * const cache   = node->src[1];
    const ggml_tensor * const parts[] = { cache, node->src[2], node->src[3] };
    ggml_backend_dev_t        holder  = nullptr;
    for (const ggml_tensor * t : parts) {
        const ggml_backend_buffer_type_t memory = memory_of(t);
        if (memory == nullptr) {
            continue;
        }
        const ggml_backend_dev_t dev = device_of(memory);
        if (dev == nullptr) {
            return std::string("no device is known for ") + ggml_backend_buft_name(memory);
        }
        if (holder && dev != holder) {
            return std::string("its cache is on ") + ggml_backend_dev_name(holder) + " and " + t->name + " on " +
                   ggml_backend_dev_name(dev);
        }
        holder = dev;
        if (!ggml_backend_dev_supports_op(dev, node)) {
            return std::string(ggml_backend_dev_name(dev)) + " does not have " + ggml_op_name(node->op) + " for " +
                   ggml_type_name(cache->type) + " caches and " + (t == cache ? "cache" : t->name) + " in " +
                   ggml_backend_buft_name(memory);
        }
    }
    return "";
}

bool llama_latent_attn_on_cpu(const ggml_tensor * cache) {
    const ggml_backend_buffer_type_t memory = memory_of(cache);
    const ggml_backend_dev_t         dev    = memory ? device_of(memory) : nullptr;
    return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool llama_latent_attn_on_cuda(const ggml_tensor * cache) {
    const ggml_backend_buffer_type_t memory = memory_of(cache);
    const ggml_backend_dev_t         dev    = memory ? device_of(memory) : nullptr;
    const ggml_backend_reg_t         reg    = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg && strcmp(ggml_backend_reg_name(reg), "CUDA") == 0;
}
