// The memory that attention needs on a device, asked of the device and of a worker that has the same one. The
// number of keys grows and falls from question to question, and V is the beginning of K or another tensor.
//
// Arguments: the backend's library, and the worker's HOST:PORT.

#include "check.h"
#include "ggml-backend.h"
#include "ggml.h"

static const int64_t N_CACHE = 576;
static const int64_t N_VALUE = 512;
static const int64_t N_HEADS = 32;

static ggml_backend_buffer_type_t buffer_type_of(ggml_backend_reg_t reg) {
    CHECK(reg != nullptr && ggml_backend_reg_dev_count(reg) == 1);
    return ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(reg, 0));
}

static ggml_backend_reg_t worker_at(const char * endpoint) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    CHECK(rpc != nullptr);
    using add_server_t    = ggml_backend_reg_t (*)(const char * endpoint);
    const auto add_server = (add_server_t) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    CHECK(add_server != nullptr);
    return add_server(endpoint);
}

static ggml_tensor * attention(ggml_context * ctx, ggml_type type, int64_t n_keys, bool v_in_k) {
    ggml_tensor * q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, N_CACHE, 1, N_HEADS);
    ggml_tensor * cache = ggml_new_tensor_2d(ctx, type, N_CACHE, 16384);
    ggml_tensor * other = v_in_k ? cache : ggml_new_tensor_2d(ctx, type, N_CACHE, 16384);
    ggml_tensor * k     = ggml_view_3d(ctx, cache, N_CACHE, n_keys, 1, cache->nb[1], cache->nb[1], 0);
    ggml_tensor * v     = ggml_view_3d(ctx, other, N_VALUE, n_keys, 1, cache->nb[1], cache->nb[1], 0);
    ggml_tensor * mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_keys, 1);
    return ggml_flash_attn_ext(ctx, q, k, v, mask, 0.1f, 0.0f, 0.0f);
}

int main(int, char ** argv) {
    ggml_backend_buffer_type_t local  = buffer_type_of(ggml_backend_load(argv[1]));
    ggml_backend_buffer_type_t remote = buffer_type_of(worker_at(argv[2]));

    bool v_matters = false;
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int64_t n_keys : { 4096, 256, 16384, 4352 }) {
            size_t sizes[2];
            for (const bool v_in_k : { true, false }) {
                ggml_context *      ctx  = ggml_init({ 16 * ggml_tensor_overhead(), nullptr, true });
                const ggml_tensor * node = attention(ctx, type, n_keys, v_in_k);
                sizes[v_in_k]            = ggml_backend_buft_get_alloc_size(local, node);
                const size_t found       = ggml_backend_buft_get_alloc_size(remote, node);
                expect(found == sizes[v_in_k],
                       text("%s, %d keys, V %s K: expected %zu bytes, found %zu", ggml_type_name(type), (int) n_keys,
                            v_in_k ? "in" : "beside", sizes[v_in_k], found));
                ggml_free(ctx);
            }
            v_matters |= sizes[0] != sizes[1];
        }
    }
    expect(v_matters, "some size depends on whether V is a part of K");
    return report();
}
