// Upstream's attention in runs of keys (latent-runs.cu): upstream's own kernel and its launches, with a cache of several
// runs. The NMSE against float64 is at most 1.1 times that of upstream's kernel over the whole cache.

#include "../latent-attn-case.h"
#include "convert.cuh"
#include "fattn-mma-f16.cuh"
#include "ggml-cuda-standin.cuh"
#include "latent-cuda.cuh"
#include "latent-runs.cuh"
#include "on-device.cuh"
#include "to-floats.cuh"

template void ggml_cuda_flash_attn_ext_mma_f16_case<576, 512, 4, 16>(ggml_backend_cuda_context &, ggml_tensor *);
template void ggml_cuda_flash_attn_ext_mma_f16_case<576, 512, 16, 4>(ggml_backend_cuda_context &, ggml_tensor *);

static latent_cuda::run_limits limits = {};  // no keys: the cache as a whole

bool ggml_cuda_latent_in_runs(ggml_backend_cuda_context & cuda,
                              ggml_tensor *               dst,
                              fattn_kernel_t              kernel,
                              dim3                        block,
                              size_t                      shared,
                              int                         step_keys,
                              int                         tile_queries,
                              int                         tile_heads) {
    if (limits.keys == 0) {
        return false;
    }
    char * work = static_cast<char *>(dst->data) + GGML_PAD(ggml_nbytes(dst), 128);
    latent_cuda::attend_in_runs(cuda, dst, { kernel, block, shared, step_keys, tile_queries, tile_heads }, work,
                                limits);
    return true;
}

void ggml_cuda_flash_attn_ext_compact_mask(
    const ggml_tensor *, int32_t *, int32_t *, int32_t, int32_t, int32_t, cudaStream_t) {
    GGML_ABORT("no sparse mask");
}

to_fp16_nc_cuda_t ggml_get_to_fp16_nc_cuda(ggml_type) {
    GGML_ABORT("rows that are not contiguous");
}

// The node's error by upstream's kernel, in runs of keys or as a whole.
static double error_of(LatentCase & attention, const LatentShape & shape, const latent_cuda::run_limits & chosen) {
    limits              = chosen;
    ggml_tensor * node  = attention.node();
    const size_t  whole = ggml_cuda_flash_attn_ext_get_f16_extra_data(node, true, true).end - (uintptr_t) node->data;
    const size_t  after = GGML_PAD(ggml_nbytes(node), 128);
    OnDevice      device(
        node, limits.keys == 0 ? whole : after + latent_cuda::runs_workspace(node, standin_multiprocessors, limits));
    ggml_backend_cuda_context cuda(0);
    if (shape.n_heads % 16 == 0) {
        ggml_cuda_flash_attn_ext_mma_f16_case<576, 512, 4, 16>(cuda, device.node());
    } else {
        ggml_cuda_flash_attn_ext_mma_f16_case<576, 512, 16, 4>(cuda, device.node());
    }
    device.fetch();
    return attention.nmse(shape.n_rows());
}

static LatentShape shape_of(ggml_type type, const char * mask, int64_t n_queries, int64_t n_heads, int64_t n_streams) {
    LatentShape shape = LatentShape().with(n_queries, 1280);
    shape.n_heads     = n_heads;
    shape.n_streams   = n_streams;
    shape.mask        = mask;
    shape.one_mask    = n_streams == 3;
    shape.cache       = type;
    return shape;
}

// Limits of keys and rows: the last run, or the last group of queries, is shorter than the others; or there is only one run and one group.
constexpr latent_cuda::run_limits LIMITS[] = { { 256, 8192 }, { 512, 512 }, { 1280, 320 }, { 1280, 8192 } };

// Argument N (default 1): every Nth case.
int main(int argc, char ** argv) {
    const int every  = argc > 1 ? atoi(argv[1]) : 1;
    int       number = 0;
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const char * mask : { "causal", "mixed", "blind", "slots" }) {
            for (const auto & [n_queries, n_heads, n_streams] :
                 { std::tuple(9, 32, 1), std::tuple(18, 32, 1), std::tuple(35, 20, 1), std::tuple(10, 20, 2),
                   std::tuple(10, 48, 3) }) {
                for (const int n_multiprocessors : { 5, 8, 12, 108 }) {
                    for (const auto & chosen : LIMITS) {
                        if (++number % every != 0) {
                            continue;
                        }
                        standin_multiprocessors = n_multiprocessors;
                        const LatentShape shape = shape_of(type, mask, n_queries, n_heads, n_streams);
                        LatentCase        attention(shape);
                        const double      runs = error_of(attention, shape, chosen);
                        // with several streams, upstream reads past the end of the masks; if a row sees no key, it computes 0 / 0
                        const bool   compared = n_streams == 1 && shape.mask != "blind";
                        const double whole    = compared ? error_of(attention, shape, {}) : 1e-6;
                        printf("%s %d multiprocessors, %d keys, %d rows: %.2g, whole %.2g\n", name_of(shape).c_str(),
                               n_multiprocessors, (int) chosen.keys, (int) chosen.rows, runs, whole);
                        CHECK(runs <= 1.1 * whole);
                    }
                }
            }
        }
    }
    printf("all as it should be\n");
}
