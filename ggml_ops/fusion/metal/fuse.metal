#include "common.h"
#ifndef GGML_METAL_KIMI_ARGS
#include "kimi_args.metal"
#endif

constant int FC_router_n_expert [[function_constant(FC_FUSE + 0)]];
constant int FC_router_top_k [[function_constant(FC_FUSE + 1)]];

// fused SIGMOID + ADD (bias) + ARGSORT + GET_ROWS + SUM_ROWS + CLAMP + DIV + SCALE for MoE routing, as kernel_topk_moe_f32
// for SOFT_MAX. One simdgroup handles one token row; the host limits n_expert to 1024 and top_k to 32.
kernel void kernel_router_f32(constant ggml_metal_kargs_router & args,
                              device const char *                src0,
                              device const float *               bias,
                              device float *                     weights,
                              device char *                      ids,
                              uint3                              tgpig [[threadgroup_position_in_grid]],
                              ushort                             tiisg [[thread_index_in_simdgroup]]) {
    const int row      = tgpig.x;
    const int n_expert = FC_router_n_expert;
    const int top_k    = FC_router_top_k;

    device const float * logits_row  = (device const float *) (src0 + row * args.nb01);
    device float *       weights_row = weights + row * top_k;
    device int32_t *     ids_row     = (device int32_t *) (ids + row * args.nb1_ids);

    // of experts tiisg, tiisg + 32, ...
    float probs[32];
    float scores[32];

    FOR_UNROLL(int i = 0; i < (n_expert + 31) / 32; ++i) {
        const int expert = i * 32 + tiisg;

        probs[i] = expert < n_expert ? 1.0f / (1.0f + exp(-logits_row[expert])) : 0.0f;
        // any expert is better than one that does not exist or was chosen, also NaN and -INFINITY, so the ids differ;
        // fast math may remove isnan()
        const float score  = expert < n_expert ? probs[i] + bias[expert] : 0.0f;
        const bool  is_nan = (as_type<uint>(score) & 0x7fffffff) > 0x7f800000;
        scores[i]          = expert < n_expert ? (is_nan ? -FLT_MAX : max(score, -FLT_MAX)) : -INFINITY;
    }

    float weight = 0.0f;  // of the tiisg-th choice
    float sum    = 0.0f;

    for (int k = 0; k < top_k; ++k) {
        float best_score  = -INFINITY;
        float best_prob   = probs[0];
        int   best_expert = tiisg;

        FOR_UNROLL(int i = 0; i < (n_expert + 31) / 32; ++i) {
            if (scores[i] > best_score) {
                best_score  = scores[i];
                best_prob   = probs[i];
                best_expert = i * 32 + tiisg;
            }
        }

        FOR_UNROLL(ushort mask = 16; mask > 0; mask >>= 1) {
            const float score  = simd_shuffle_xor(best_score, mask);
            const float prob   = simd_shuffle_xor(best_prob, mask);
            const int   expert = simd_shuffle_xor(best_expert, mask);

            if (score > best_score || (score == best_score && expert < best_expert)) {
                best_score  = score;
                best_prob   = prob;
                best_expert = expert;
            }
        }

        FOR_UNROLL(int i = 0; i < (n_expert + 31) / 32; ++i) {
            if (best_expert == i * 32 + tiisg) {
                scores[i] = -INFINITY;
            }
        }

        if (tiisg == k) {
            weight     = best_prob;
            ids_row[k] = best_expert;
        }

        sum += best_prob;
    }

    if (tiisg < top_k) {
        weights_row[tiisg] = weight / clamp(sum, args.min, args.max) * args.scale;
    }
}

// fused ADD (+ ADD) + RMS_NORM + MUL: sum = src0 + src1 (+ src2), dst = norm of sum. One threadgroup handles one row; the
// host guarantees contiguous rows of the same size, a multiple of 4.
template <short N_ADD>
kernel void kernel_add_rms_norm_mul_f32_4(constant ggml_metal_kargs_add_rms_norm & args,
                                          device const float4 *                    src0,
                                          device const float4 *                    src1,
                                          device const float4 *                    src2,
                                          device const float4 *                    weight,
                                          device float4 *                          sum,
                                          device float4 *                          dst,
                                          threadgroup float *                      shmem_f32 [[threadgroup(0)]],
                                          uint3   tgpig [[threadgroup_position_in_grid]],
                                          ushort3 tpitg [[thread_position_in_threadgroup]],
                                          ushort  sgitg [[simdgroup_index_in_threadgroup]],
                                          ushort  tiisg [[thread_index_in_simdgroup]],
                                          ushort3 ntg [[threads_per_threadgroup]]) {
    const int64_t offs = (int64_t) tgpig.x * args.ne00_4;

    if (sgitg == 0) {
        shmem_f32[tiisg] = 0.0f;
    }

    float sumf = 0.0f;

    for (int i00 = tpitg.x; i00 < args.ne00_4; i00 += ntg.x) {
        float4 x = src0[offs + i00] + src1[offs + i00];
        if (N_ADD == 2) {
            x = x + src2[offs + i00];
        }
        sum[offs + i00] = x;
        sumf += dot(x, x);
    }
    sumf = simd_sum(sumf);

    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tiisg == 0) {
        shmem_f32[sgitg] = sumf;
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);

    sumf = shmem_f32[tiisg];
    sumf = simd_sum(sumf);

    const float mean  = sumf / (4 * args.ne00_4);
    const float scale = 1.0f / sqrt(mean + args.eps);

    // each thread reads the sums that it has written
    for (int i00 = tpitg.x; i00 < args.ne00_4; i00 += ntg.x) {
        dst[offs + i00] = (sum[offs + i00] * scale) * weight[i00];
    }
}

typedef decltype(kernel_add_rms_norm_mul_f32_4<1>) kernel_add_rms_norm_mul_f32_4_t;

// clang-format off
template [[host_name("kernel_add_rms_norm_mul_f32_4_1")]] kernel kernel_add_rms_norm_mul_f32_4_t kernel_add_rms_norm_mul_f32_4<1>;
template [[host_name("kernel_add_rms_norm_mul_f32_4_2")]] kernel kernel_add_rms_norm_mul_f32_4_t kernel_add_rms_norm_mul_f32_4<2>;
// clang-format on
