// ggml's side of latent attention on CUDA: selects the nodes of FLASH_ATTN_EXT (absorbed) and LATENT_ATTN
// (decompressed) that the kernels compute, converts weights of any type to floats, and calls the kernels.
//
// Upstream's supports_op() of FLASH_ATTN_EXT is not widened: on its way to the device V may stop being a view of K, and
// then upstream's kernels have to compute the node.

#include "latent-ggml.cuh"

#include "fattn-common.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_latent_attention(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

bool ggml_cuda_latent_attn_supported(int, const ggml_tensor *) {
    return false;
}

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("LATENT_ATTN has kernels for NVIDIA devices only");
}

size_t ggml_cuda_latent_attention_size(int, const ggml_tensor *) {
    return 0;
}

bool ggml_cuda_latent_in_runs(ggml_backend_cuda_context &, ggml_tensor *, fattn_kernel_t, dim3, size_t, int, int, int) {
    return false;
}

size_t ggml_cuda_latent_attn_size(const ggml_tensor * dst) {
    return ggml_nbytes(dst);
}

bool ggml_cuda_latent_fast_sums(int) {
    return false;
}

#else

#include "convert.cuh"
#include "fattn.cuh"
#include "kimi-device.cuh"
#include "kimi-workspace.cuh"
#include "latent-node.cuh"
#include "latent-runs.cuh"

#include <algorithm>
#include <atomic>
#include <cstdint>

// Which nodes of the absorbed form the kernels compute. For others, upstream's are faster, or ours were not measured to be
// faster. Upstream converts caches other than F16 to F16 at each step and then multiplies in one pass: reading the cache
// directly is faster with one block of rows and a long cache. With F16 and one block of rows, splits of the keys and their
// join cost upstream more.
// On an H200, F16 and Q8_0 are faster at every measured size from 4096 keys on; BF16, Q4_0 and other data-centre devices
// have the same limit without a measurement. 12289 (GeForce) and 65536 (F32) keys are computed from multiply-adds and bytes,
// not measured (commit d90d8139).
struct limit {
    int rows;  // maximum number of pairs of query and head, per stream
    int keys;  // minimum
};

static constexpr limit limit_of(latent_cuda::cache_type type, bool fast_sums) {
    switch (type) {
    case latent_cuda::cache_type::q8_0:
    case latent_cuda::cache_type::q4_0:
        return { 32, fast_sums ? 4096 : 12289 };
    case latent_cuda::cache_type::f16:
    case latent_cuda::cache_type::bf16:
        return fast_sums ? limit{ 32, 4096 } : limit{};
    case latent_cuda::cache_type::f32:
        return fast_sums ? limit{ 32, 65536 } : limit{};
    default:
        return {};
    }
}

// Upstream's kernel needs an F16 copy of the cache. A quantized cache whose copy would be larger than this is not copied as
// a whole: from 116509 keys on, of all streams together.
constexpr int64_t MAX_COPY = 128 << 20;
constexpr int64_t F16_ROW  = latent_cuda::N_CACHE * sizeof(half);

// With more rows (pairs of query and head) than this, upstream's kernel takes less time than ours over such a cache, with
// the conversion of each run of keys to F16, if its blocks have 64 rows. Computed by a cycle model of the compiled kernels,
// not measured (commit d90d8139). The model favoured our kernel by 1.16 times on an H200 (8 queries, 65536 keys).
constexpr int64_t MOST_DIRECT = 320;

// Several streams are computed one after the other, which takes longer if they are short.
constexpr int64_t LONG_STREAM = 32768;

static bool has_wide_blocks(const latent_cuda::attention & args) {
    return args.n_queries > (args.n_heads % 16 == 0 ? 2 : 8);  // as fattn.cu chooses
}

// The largest number of keys, of all streams together, with which upstream's code alone computes a node of these sizes. It
// converts all of them to F16, except in F16 caches.
static int64_t rows_of_upstream(const latent_cuda::attention & args, bool exact, bool fast_sums) {
    const bool    quantized = args.type == latent_cuda::cache_type::q8_0 || args.type == latent_cuda::cache_type::q4_0;
    const int64_t n_copied  = quantized ? MAX_COPY / F16_ROW : INT64_MAX;
    const limit   most      = limit_of(args.type, fast_sums);
    if (exact) {
        return 0;
    }
    const bool is_wide = (int64_t) args.n_queries * args.n_heads > most.rows;
    return is_wide ? n_copied : std::min(n_copied, (int64_t) args.n_streams * (most.keys - 1));
}

// Checks the compiled code, which may be for an older architecture than the device.
static bool has_kernels(int device) {
    return ampere_mma_available(ggml_cuda_info().devices[device].cc);
}

bool ggml_cuda_latent_fast_sums(int device) {
    return kimi_cuda::is_data_centre(ggml_cuda_info().devices[device].cc);
}

static latent_cuda::run_limits limits_of(int device) {
    return ggml_cuda_latent_fast_sums(device) ? latent_cuda::DATA_CENTRE_RUNS : latent_cuda::GEFORCE_RUNS;
}

// Logs each reason once.
static void log_refusal(const char * reason) {
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(reason) != reason) {
        GGML_LOG_WARN("latent attention: FLASH_ATTN_EXT converts its cache to F16: %s\n", reason);
    }
}

// How a FLASH_ATTN_EXT node is computed: by upstream's code alone, by our kernels, which read the cache directly, or by
// upstream's kernel in runs of keys.
enum class way { UPSTREAM, DIRECT, RUNS };

// The answer is the same before and after allocation. n_upstream: rows_of_upstream.
static way way_of(int device, const ggml_tensor * dst, latent_cuda::attention & args, int64_t & n_upstream) {
    if (!has_kernels(device) || latent_cuda::misfit(dst)) {
        return way::UPSTREAM;
    }
    if (const char * reason = latent_cuda::read_node(dst, args)) {
        log_refusal(reason);
        return way::UPSTREAM;
    }
    const bool exact       = ggml_op_has_mark(dst, GGML_OP_MARK_EXACT);
    args.n_multiprocessors = ggml_cuda_info().devices[device].nsm;
    args.half_sums         = !exact && !ggml_cuda_latent_fast_sums(device);
    n_upstream             = rows_of_upstream(args, exact, ggml_cuda_latent_fast_sums(device));
    if ((int64_t) args.n_streams * args.n_keys <= n_upstream) {
        return way::UPSTREAM;
    }
    const bool is_many = (int64_t) args.n_queries * args.n_heads > MOST_DIRECT && has_wide_blocks(args);
    const bool is_long = args.n_streams == 1 || args.n_keys >= LONG_STREAM;
    return is_many && is_long && !exact && ggml_cuda_flash_attn_ext_supported(device, dst) ? way::RUNS : way::DIRECT;
}

size_t ggml_cuda_latent_attention_size(int device, const ggml_tensor * dst) {
    latent_cuda::attention args;
    int64_t                n_upstream = 0;
    const way              way        = way_of(device, dst, args, n_upstream);
    if (way == way::UPSTREAM) {
        return 0;
    }
    // llama.cpp reserves memory with a node that reads the whole cache. While fewer keys are in use, upstream's kernel
    // computes the node and copies up to so many rows. The size is not smaller than that, so the buffer does not grow.
    const size_t copy = args.type == latent_cuda::cache_type::f16 ? 0 : n_upstream * F16_ROW;
    const size_t work = way == way::RUNS ? latent_cuda::runs_workspace(dst, args.n_multiprocessors, limits_of(device))
                                         : latent_cuda::workspace(args);
    return kimi_cuda::after_result(dst) + std::max(work, copy);
}

static char * work_of(ggml_tensor * dst) {
    return static_cast<char *>(dst->data) + kimi_cuda::after_result(dst);
}

bool ggml_cuda_latent_in_runs(ggml_backend_cuda_context & ctx,
                              ggml_tensor *               dst,
                              fattn_kernel_t              kernel,
                              dim3                        block,
                              size_t                      shared,
                              int                         step_keys,
                              int                         tile_queries,
                              int                         tile_heads) {
    latent_cuda::attention args;
    int64_t                n_upstream = 0;
    if (way_of(ctx.device, dst, args, n_upstream) != way::RUNS) {
        return false;
    }
    latent_cuda::attend_in_runs(ctx, dst, { kernel, block, shared, step_keys, tile_queries, tile_heads }, work_of(dst),
                                limits_of(ctx.device));
    return true;
}

bool ggml_cuda_latent_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    latent_cuda::attention args;
    int64_t                n_upstream = 0;
    if (way_of(ctx.device, dst, args, n_upstream) != way::DIRECT) {
        return false;
    }
    GGML_ASSERT(latent_cuda::refused(args) == nullptr);
    latent_cuda::attend(args, work_of(dst), ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    return true;
}

static bool readable(const ggml_tensor * weights) {
    return weights->type == GGML_TYPE_F32 || ggml_get_to_fp32_cuda(weights->type) != nullptr;
}

bool ggml_cuda_latent_attn_supported(int device, const ggml_tensor * dst) {
    latent_cuda::decompressed args;
    return has_kernels(device) && latent_cuda::read_decompressed(dst, args) == nullptr && readable(dst->src[2]) &&
           readable(dst->src[3]);
}

// Bytes for the weights as floats, 0 if they are floats. Multiples of 128, as ggml's weights have whole blocks per row.
static size_t floats_size(const ggml_tensor * weights) {
    return weights->type == GGML_TYPE_F32 ? 0 : GGML_PAD(ggml_nelements(weights) * sizeof(float), 128);
}

// The tensor as floats: itself, or converted into `room`.
static const float * as_floats(const ggml_tensor * t, char * room, cudaStream_t stream) {
    if (t->type == GGML_TYPE_F32) {
        return static_cast<const float *>(t->data);
    }
    float * to = reinterpret_cast<float *>(room);
    ggml_get_to_fp32_cuda(t->type)(t->data, to, ggml_nelements(t), stream);
    return to;
}

size_t ggml_cuda_latent_attn_size(const ggml_tensor * dst) {
    latent_cuda::decompressed args;
    if (latent_cuda::read_decompressed(dst, args)) {
        return ggml_nbytes(dst);  // not supported
    }
    return kimi_cuda::after_result(dst) + floats_size(dst->src[2]) + floats_size(dst->src[3]) +
           latent_cuda::workspace(args);
}

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    latent_cuda::decompressed args;
    GGML_ASSERT(latent_cuda::read_decompressed(dst, args) == nullptr);

    char * const k_b  = work_of(dst);
    char * const v_b  = k_b + floats_size(dst->src[2]);
    char * const work = v_b + floats_size(dst->src[3]);
    args.k_b          = as_floats(dst->src[2], k_b, ctx.stream());
    args.v_b          = as_floats(dst->src[3], v_b, ctx.stream());
    latent_cuda::attend(args, work, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}

#endif
