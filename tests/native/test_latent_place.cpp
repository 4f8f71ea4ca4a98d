// Tests llama_latent_attn_obstacle on a LATENT_ATTN whose cache and weights are in various places.
// Devices and their buffers are fakes, except the CPU's own.

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-latent-attn.h"
#include "ggml.h"
#include "llama-latent-place.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

// A buffer on its own device, which supports LATENT_ATTN or not; the host may be able to read it in place.
struct Place {
    ggml_backend_device      device = {};
    ggml_backend_buffer_type type   = {};
    ggml_backend_buffer      buffer = {};

    Place(bool has_operator, bool is_host) {
        device.iface.get_name    = [](ggml_backend_dev_t) { return "GPU"; };
        device.iface.supports_op = has_operator ? [](ggml_backend_dev_t, const ggml_tensor *) { return true; }
                                                : [](ggml_backend_dev_t, const ggml_tensor *) { return false; };
        type.iface.get_name      = [](ggml_backend_buffer_type_t) { return "memory"; };
        type.iface.is_host       = is_host ? [](ggml_backend_buffer_type_t) { return true; }
                                           : [](ggml_backend_buffer_type_t) { return false; };
        type.device              = &device;
        buffer.buft              = &type;
    }
};

static std::string
obstacle(ggml_backend_buffer_t cache, ggml_backend_buffer_t with_k_b, ggml_backend_buffer_t with_v_b) {
    ggml_context * ctx  = ggml_init({ 1 << 16, nullptr, true });
    ggml_tensor *  all  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 96, 256);
    ggml_tensor *  q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, 200, 4);
    ggml_tensor *  k    = ggml_view_2d(ctx, all, 96, 200, all->nb[1], 0);
    ggml_tensor *  k_b  = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, 32, 64, 4);
    ggml_tensor *  v_b  = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, 64, 32, 4);
    ggml_tensor *  node = ggml_latent_attn(ctx, q, k, k_b, v_b, nullptr, 1.0f);
    all->buffer         = cache;
    k_b->buffer         = with_k_b;
    v_b->buffer         = with_v_b;
    ggml_set_name(k_b, "k_b");
    ggml_set_name(v_b, "v_b");
    const std::string why = llama_latent_attn_obstacle(node);
    ggml_free(ctx);
    return why;
}

static bool ask(bool (*question)(const ggml_tensor *), ggml_backend_buffer_t buffer) {
    ggml_context * ctx  = ggml_init({ 1 << 16, nullptr, true });
    ggml_tensor *  all  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 96, 256);
    ggml_tensor *  part = ggml_view_2d(ctx, all, 96, 200, all->nb[1], 0);
    all->buffer         = buffer;
    const bool yes      = question(part);
    ggml_free(ctx);
    return yes;
}

static bool on_cuda(ggml_backend_buffer_t buffer) {
    return ask(llama_latent_attn_on_cuda, buffer);
}

static bool fast_sums(ggml_backend_buffer_t buffer) {
    return ask(llama_latent_attn_fast_sums, buffer);
}

int main() {
    ggml_backend_buffer_t cpu = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 64);
    Place                 able(true, false);
    Place                 unable(false, false);
    Place                 pinned(false, true);  // host memory that a GPU's driver allocated

    // all in one place
    CHECK(obstacle(cpu, cpu, cpu).empty());
    CHECK(obstacle(&able.buffer, &able.buffer, &able.buffer).empty());
    CHECK(obstacle(&unable.buffer, &unable.buffer, &unable.buffer) == "GPU does not have LATENT_ATTN for f16 caches");

    // layers on a GPU, cache in host memory (-nkvo), and the reverse: weights kept in host memory
    CHECK(obstacle(cpu, &able.buffer, &able.buffer) == "its cache is on CPU and k_b on GPU");
    CHECK(obstacle(&able.buffer, cpu, cpu) == "its cache is on GPU and k_b on CPU");
    CHECK(obstacle(&able.buffer, &able.buffer, cpu) == "its cache is on GPU and v_b on CPU");

    // layers on the CPU, with a GPU present: the weights are in pinned memory
    CHECK(obstacle(cpu, &pinned.buffer, &pinned.buffer).empty());
    CHECK(obstacle(&able.buffer, &pinned.buffer, &pinned.buffer) == "its cache is on GPU and k_b on CPU");

    // memory without a device
    Place stray(true, false);
    stray.type.device = nullptr;
    CHECK(obstacle(&stray.buffer, &stray.buffer, &stray.buffer) == "no device is known for memory");

    // nothing is allocated yet
    CHECK(obstacle(nullptr, nullptr, nullptr).empty());

    // only CUDA has its own break-even point
    ggml_backend_reg cuda = {};
    ggml_backend_reg rocm = {};
    cuda.iface.get_name   = [](ggml_backend_reg_t) { return "CUDA"; };
    rocm.iface.get_name   = [](ggml_backend_reg_t) { return "ROCm"; };
    able.device.reg       = &cuda;
    unable.device.reg     = &rocm;
    CHECK(on_cuda(&able.buffer));
    CHECK(!on_cuda(&unable.buffer));
    pinned.device.reg = &cuda;
    CHECK(!on_cuda(&pinned.buffer));
    CHECK(!on_cuda(cpu));
    CHECK(!on_cuda(nullptr));

    // a device of a registry without the question counts as a GeForce
    CHECK(!fast_sums(&able.buffer));
    cuda.iface.get_proc_address = [](ggml_backend_reg_t, const char * name) {
        const ggml_backend_latent_fast_sums_t yes = [](ggml_backend_dev_t) { return true; };
        return strcmp(name, GGML_BACKEND_LATENT_FAST_SUMS) == 0 ? (void *) yes : nullptr;
    };
    CHECK(fast_sums(&able.buffer));
    CHECK(!fast_sums(cpu));
    CHECK(!fast_sums(nullptr));

    ggml_backend_buffer_free(cpu);
    return 0;
}
