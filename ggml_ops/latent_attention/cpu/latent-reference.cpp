#include "latent-reference.h"

#include "ggml-latent-attn.h"
#include "latent-tile.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>

namespace latent {

// Work buffer of a thread: a row of k_b or v_b, the query with k_b absorbed, a row of the cache, the weighted sum.
static int64_t thread_size(const ggml_latent_attn_shape & s) {
    return std::max(s.n_nope, s.n_latent) + 2 * s.n_cache + s.n_latent;
}

size_t reference_work_size(const ggml_tensor * dst, int n_tasks) {
    return n_tasks * thread_size(ggml_latent_attn_get_shape(dst)) * sizeof(float);
}

static double dot(const float * a, const float * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += (double) a[i] * b[i];
    }
    return sum;
}

static void attend(const ggml_tensor *            dst,
                   const ggml_latent_attn_shape & s,
                   int64_t                        stream,
                   int64_t                        query,
                   int64_t                        head,
                   float *                        scratch) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * k_b  = dst->src[2];
    const ggml_tensor * v_b  = dst->src[3];
    const ggml_tensor * mask = dst->src[4];

    float * weight   = scratch;
    float * absorbed = weight + std::max(s.n_nope, s.n_latent);
    float * cached   = absorbed + s.n_cache;
    float * total    = cached + s.n_cache;

    const float    scale  = ggml_get_op_params_f32(dst, 0);
    const float *  q_row  = (const float *) row_of(q, query, head, stream);
    const MaskRows masks  = mask_rows(mask, stream, query, 1);
    float *        result = (float *) row_of(dst, head, query, stream);

    for (int64_t j = 0; j < s.n_latent; ++j) {
        read_row(k_b->type, row_of(k_b, j, head), s.n_nope, weight);
        absorbed[j] = (float) dot(weight, q_row, s.n_nope);
    }
    std::copy(q_row + s.n_nope, q_row + s.n_key, absorbed + s.n_latent);

    std::fill(total, total + s.n_latent, 0.0f);
    float maximum = -INFINITY;
    float sum     = 0.0f;
    for (int64_t key = 0; key < s.n_keys; ++key) {
        const float m = masks.data ? GGML_CPU_FP16_TO_FP32(masks.row(0)[key]) : 0.0f;
        if (m == -INFINITY) {
            continue;
        }
        read_row(k->type, row_of(k, key, 0, stream), s.n_cache, cached);
        const float score = (float) dot(absorbed, cached, s.n_cache) * scale + m;
        if (score == -INFINITY) {
            continue;
        }
        const float larger = std::max(maximum, score);
        const float shrink = expf(maximum - larger);
        const float weigh  = expf(score - larger);
        for (int64_t j = 0; j < s.n_latent; ++j) {
            total[j] = total[j] * shrink + weigh * cached[j];
        }
        sum     = sum * shrink + weigh;
        maximum = larger;
    }

    for (int64_t i = 0; i < s.n_value; ++i) {
        read_row(v_b->type, row_of(v_b, i, head), s.n_latent, weight);
        result[i] = sum == 0.0f ? 0.0f : (float) (dot(weight, total, s.n_latent) / sum);
    }
}

void compute_reference(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_latent_attn_shape s       = ggml_latent_attn_get_shape(dst);
    float *                      scratch = (float *) params->wdata + params->ith * thread_size(s);
    for (int64_t row = params->ith; row < s.n_streams * s.n_queries * s.n_heads; row += params->nth) {
        attend(dst, s, row / (s.n_queries * s.n_heads), row / s.n_heads % s.n_queries, row % s.n_heads, scratch);
    }
}

}  // namespace latent
