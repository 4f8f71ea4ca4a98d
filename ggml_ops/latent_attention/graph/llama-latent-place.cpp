#include "llama-latent-place.h"

#include "ggml-backend.h"
#include "ggml-latent-attn.h"
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

ggml_backend_dev_t llama_latent_attn_holder(const ggml_tensor * node, std::string & why) {
    const ggml_tensor * const parts[] = { node->src[1], node->src[2], node->src[3] };
    ggml_backend_dev_t        holder  = nullptr;
    for (const ggml_tensor * t : parts) {
        const ggml_backend_buffer_type_t memory = memory_of(t);
        if (memory == nullptr) {
            continue;
        }
        const ggml_backend_dev_t dev = device_of(memory);
        if (dev == nullptr) {
            why = std::string("no device is known for ") + ggml_backend_buft_name(memory);
            return nullptr;
        }
        if (holder && dev != holder) {
            why = std::string("its cache is on ") + ggml_backend_dev_name(holder) + " and " + t->name + " on " +
                  ggml_backend_dev_name(dev);
            return nullptr;
        }
        holder = dev;
    }
    return holder;
}

std::string llama_latent_attn_obstacle(const ggml_tensor * node) {
    std::string              why;
    const ggml_backend_dev_t dev = llama_latent_attn_holder(node, why);
    if (dev && !ggml_backend_dev_supports_op(dev, node)) {
        const ggml_tensor * cache = node->src[1];
        why = std::string(ggml_backend_dev_name(dev)) + " does not have " + ggml_op_name(node->op) + " for " +
              ggml_type_name(cache->type) + " caches";
    }
    return why;
}

static ggml_backend_dev_t holder_of(const ggml_tensor * cache) {
    const ggml_backend_buffer_type_t memory = memory_of(cache);
    return memory ? device_of(memory) : nullptr;
}

static ggml_backend_reg_t registry_of(const ggml_tensor * cache) {
    const ggml_backend_dev_t dev = holder_of(cache);
    return dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
}

bool llama_latent_attn_on_cpu(const ggml_tensor * cache) {
    const ggml_backend_dev_t dev = holder_of(cache);
    return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool llama_latent_attn_on_cuda(const ggml_tensor * cache) {
    const ggml_backend_reg_t reg = registry_of(cache);
    return reg && strcmp(ggml_backend_reg_name(reg), "CUDA") == 0;
}

bool llama_latent_attn_fast_sums(const ggml_tensor * cache) {
    const ggml_backend_reg_t reg = registry_of(cache);
    const auto               ask =
        (ggml_backend_latent_fast_sums_t) (reg ? ggml_backend_reg_get_proc_address(reg, GGML_BACKEND_LATENT_FAST_SUMS)
                                               : nullptr);
    return ask && ask(holder_of(cache));
}
