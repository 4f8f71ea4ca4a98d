#include "common.h"
#include "dequantize.h"
#ifndef GGML_METAL_KIMI_ARGS
#include "kimi_args.metal"
#endif

// FLASH_ATTN_EXT with one KV head whose V is the beginning of K (MLA, absorbed): each row of the cache is read once for
// NR rows of q. A row is a (query, head) pair, so one query of 32 heads reads the cache once.
//
// A tile of C keys in threadgroup memory serves as K and as V. All 16 simdgroups work on it:
//
//   Q*K^T    simdgroup (rb, sl): 8 rows, a slice of the head size. Its part of q stays in registers.
//   softmax  lane (row, key): adds the partial scores of the slices; the weights replace those of the first slice.
//   P*V      each simdgroup: all rows, DV/16 columns. Its part of the result stays in registers.
//
// K and V keep the type of the cache (quantized: F32); q, the weights and all sums are F32.

constant bool FC_flash_attn_ext_latent_has_mask [[function_constant(FC_FLASH_ATTN_EXT_LATENT + 0)]];

// A row's running maximum changes only if a score is larger by more than this, so that the result is seldom rescaled.
#define LATENT_MAX_SLACK 8.0f

// Store the i-th group of values of a cache row in threadgroup memory, or zeros if no row of q sees the key. Each byte of
// the cache row is read by one lane only.

template <typename k4_t>
void latent_load_t4(device const k4_t * src, short i, bool seen, ushort tiisg, threadgroup k4_t * dst) {
    dst[i] = seen ? src[i] : (k4_t) 0.0f;
}

void latent_load_q8_0(device const block_q8_0 * src, short i, bool seen, ushort tiisg, threadgroup float4 * dst) {
    device const block_q8_0 * xb = src + i / 8;

    // 8 lanes share a block
    float d = 0.0f;
    if (seen && i % 8 == 0) {
        d = xb->d;
    }
    d = simd_shuffle(d, tiisg & 24);

    float4 v = 0.0f;
    if (seen) {
        v = float4(((device const packed_char4 *) xb->qs)[i % 8]) * d;
    }
    dst[i] = v;
}

void latent_load_q4_0(device const block_q4_0 * src, short i, bool seen, ushort tiisg, threadgroup float4 * dst) {
    device const block_q4_0 * xb = src + i / 4;

    // 4 lanes share a block
    float d = 0.0f;
    if (seen && i % 4 == 0) {
        d = xb->d;
    }
    d = simd_shuffle(d, tiisg & 28);

    // low nibbles: the first half of the block
    float4 lo = 0.0f;
    float4 hi = 0.0f;
    if (seen) {
        device const uchar * qs = xb->qs + 4 * (i % 4);
        for (short j = 0; j < 4; ++j) {
            const short b = qs[j];
            lo[j]         = d * ((b & 0x0F) - 8);
            hi[j]         = d * ((b >> 4) - 8);
        }
    }
    dst[8 * (i / 4) + i % 4]     = lo;
    dst[8 * (i / 4) + i % 4 + 4] = hi;
}

template <typename k_t,  // key and value type in threadgroup memory
          typename k4_t,
          typename k8x8_t,
          typename kd_t,  // cache type in device memory
          short NV,       // values per call of load
          void (*load)(device const kd_t *, short, bool, ushort, threadgroup k4_t *),
          short DK,  // K head size
          short DV,  // V head size
          short NR  = OP_FLASH_ATTN_EXT_LATENT_NR,
          short NSG = OP_FLASH_ATTN_EXT_LATENT_NSG>
[[max_total_threads_per_threadgroup(32 * OP_FLASH_ATTN_EXT_LATENT_NSG)]]
kernel void kernel_flash_attn_ext_latent(constant ggml_metal_kargs_flash_attn_ext_latent & args,
                                         device const char *                               q,
                                         device const char *                               k,
                                         device const char *                               mask,
                                         device char *                                     dst,
                                         threadgroup char *                                shmem [[threadgroup(0)]],
                                         uint3  tgpig [[threadgroup_position_in_grid]],
                                         ushort tiisg [[thread_index_in_simdgroup]],
                                         ushort sgitg [[simdgroup_index_in_threadgroup]]) {
    constexpr short NW = N_SIMDWIDTH;
    constexpr short NT = NSG * NW;
    constexpr short RB = NR / 8;            // blocks of 8 rows
    constexpr short SL = NSG / RB;          // slices of the K head size
    constexpr short KB = DK / (8 * SL);     // 8x8 matrices of a slice
    constexpr short VB = DV / (8 * NSG);    // 8x8 matrices of V per simdgroup
    constexpr short C  = 32 / sizeof(k_t);  // keys of a tile
    constexpr short NU = DK / NV;           // calls of load per key
    constexpr short PK = DK + 8;            // strides in threadgroup memory: no bank conflicts of 8 rows
    constexpr short PV = DV + 8;
    constexpr short PC = C + 4;

    static_assert(DK % (8 * SL) == 0 && DV % (8 * NSG) == 0, "the head sizes must be divisible among the simdgroups");
    static_assert(C * NU % NW == 0, "load must be called by whole simdgroups");

    threadgroup k_t *    sk  = (threadgroup k_t *) shmem;    // tile of keys
    threadgroup float *  sx  = (threadgroup float *) shmem;  // before and after: 8 rows of q or of the result
    threadgroup float4 * sx4 = (threadgroup float4 *) shmem;
    threadgroup float *  ss  = sx + 8 * PK;        // scores [SL][NR][PC], then weights [NR][PC]
    threadgroup float *  sd  = ss + SL * NR * PC;  // diagonal matrices [RB] that rescale the result

    const int   iq3 = tgpig[2];
    const int   is  = tgpig[1];
    const int   ir0 = tgpig[0] * NR;
    const short nr  = min((int) NR, args.ne01 * args.ne02 - ir0);
    const short tid = sgitg * NW + tiisg;

    const short rb = sgitg % RB;
    const short sl = sgitg / RB;

    simdgroup_float8x8 mq[KB];
    simdgroup_float8x8 mo[RB][VB];

    q += iq3 * args.nb03;
    k += iq3 * args.nb13;
    mask += (iq3 % args.ne33) * args.nb33;

    for (short b = 0; b < RB; ++b) {
        for (short i = tid; i < 8 * (DK / 4); i += NT) {
            const short ir = 8 * b + i / (DK / 4);
            const short i4 = i % (DK / 4);

            float4 v = 0.0f;
            if (ir < nr) {
                const int iq1 = (ir0 + ir) / args.ne02;
                const int iq2 = (ir0 + ir) % args.ne02;

                v = ((device const float4 *) (q + iq1 * args.nb01 + iq2 * args.nb02))[i4] * args.scale;
            }
            sx4[(ir % 8) * (PK / 4) + i4] = v;
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        if (b == rb) {
            FOR_UNROLL(short i = 0; i < KB; ++i) {
                simdgroup_load(mq[i], sx + 8 * (sl * KB + i), PK);
            }
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    FOR_UNROLL(short r = 0; r < RB; ++r) {
        FOR_UNROLL(short i = 0; i < VB; ++i) {
            mo[r][i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }

    for (short i = tid; i < 8 * NR; i += NT) {
        sd[i] = 0.0f;
    }

    // the row and the key of this lane's scores; simdgroups from C on have none
    const short sr = sgitg * (NW / C) + tiisg / C;
    const short sc = tiisg % C;

    float S = 0.0f;  // of this lane's keys
    float M = -FLT_MAX / 2;

    // queries of the rows
    const int iq1_0 = ir0 / args.ne02;
    const int iq1_1 = (ir0 + nr - 1) / args.ne02;

    device const half * pm = (device const half *) (mask + (ir0 + min(sr, (short) (nr - 1))) / args.ne02 * args.nb31);

    const int ic1 = min(args.ne11, (is + 1) * args.nkps);

    for (int ic = is * args.nkps; ic < ic1; ic += C) {
        // whether any row sees this lane's key; if not, the key is not read
        bool seen = ic + sc < ic1;

        // whether this lane's row sees it
        bool  visible = sgitg < C && sr < nr && seen;
        float bias    = 0.0f;

        if (FC_flash_attn_ext_latent_has_mask) {
            if (seen) {
                seen = false;
                for (int iq1 = iq1_0; iq1 <= iq1_1 && !seen; ++iq1) {
                    seen = ((device const half *) (mask + iq1 * args.nb31))[ic + sc] > -MAXHALF;
                }
            }

            if (visible) {
                bias    = pm[ic + sc];
                visible = bias > -MAXHALF;
            }
        }

        // the same in all simdgroups
        if (!simd_any(seen)) {
            continue;
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (short i = tid; i < C * NU; i += NT) {
            const short cc = i / NU;

            load((device const kd_t *) (k + (ic + cc) * args.nb11), i % NU, simd_shuffle((ushort) seen, cc), tiisg,
                 (threadgroup k4_t *) (sk + cc * PK));
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Q*K^T
        {
            simdgroup_float8x8 mqk[C / 8];

            FOR_UNROLL(short cc = 0; cc < C / 8; ++cc) {
                mqk[cc] = make_filled_simdgroup_matrix<float, 8>(0.0f);
            }

            FOR_UNROLL(short i = 0; i < KB; ++i) {
                FOR_UNROLL(short cc = 0; cc < C / 8; ++cc) {
                    k8x8_t mk;
                    simdgroup_load(mk, sk + 8 * cc * PK + 8 * (sl * KB + i), PK, 0, true);
                    simdgroup_multiply_accumulate(mqk[cc], mq[i], mk, mqk[cc]);
                }
            }

            FOR_UNROLL(short cc = 0; cc < C / 8; ++cc) {
                simdgroup_store(mqk[cc], ss + (sl * NR + 8 * rb) * PC + 8 * cc, PC);
            }
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        // online softmax
        if (sgitg < C) {
            float s = bias;
            FOR_UNROLL(short i = 0; i < SL; ++i) {
                s += ss[(i * NR + sr) * PC + sc];
            }

            float smax = visible ? s : -FLT_MAX / 2;
            FOR_UNROLL(short i = C / 2; i > 0; i /= 2) {
                smax = max(smax, simd_shuffle_xor(smax, i));
            }

            const float m = M;
            if (smax > M + LATENT_MAX_SLACK) {
                M = smax;
            }

            const float ms = exp(m - M);
            const float vs = visible ? exp(s - M) : 0.0f;

            S = S * ms + vs;

            ss[sr * PC + sc] = vs;
            if (sc == 0) {
                sd[64 * (sr / 8) + 9 * (sr % 8)] = ms;
            }
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        // O = diag(ms)*O
        if (simd_any(sd[64 * (tiisg / 8) + 9 * (tiisg % 8)] != 1.0f)) {
            FOR_UNROLL(short r = 0; r < RB; ++r) {
                simdgroup_float8x8 ms;
                simdgroup_load(ms, sd + 64 * r, 8);

                FOR_UNROLL(short i = 0; i < VB; ++i) {
                    simdgroup_multiply(mo[r][i], ms, mo[r][i]);
                }
            }
        }

        // O = O + P*V
        FOR_UNROLL(short cc = 0; cc < C / 8; ++cc) {
            simdgroup_float8x8 vs[RB];

            FOR_UNROLL(short r = 0; r < RB; ++r) {
                simdgroup_load(vs[r], ss + 8 * r * PC + 8 * cc, PC);
            }

            FOR_UNROLL(short i = 0; i < VB; ++i) {
                k8x8_t mv;
                simdgroup_load(mv, sk + 8 * cc * PK + 8 * (sgitg * VB + i), PK);

                FOR_UNROLL(short r = 0; r < RB; ++r) {
                    simdgroup_multiply_accumulate(mo[r][i], vs[r], mv, mo[r][i]);
                }
            }
        }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (sgitg < C) {
        FOR_UNROLL(short i = C / 2; i > 0; i /= 2) {
            S += simd_shuffle_xor(S, i);
        }

        if (sc == 0) {
            ss[2 * sr + 0] = S;
            ss[2 * sr + 1] = M;
        }
    }

    // with one split, dst is the result; with several, it holds their results, then their S and M, for the reduce kernel
    const int      nrows = args.ne01 * args.ne02 * args.ne03;
    const uint64_t row0  = (uint64_t) is * nrows + (uint64_t) iq3 * args.ne01 * args.ne02 + ir0;

    FOR_UNROLL(short r = 0; r < RB; ++r) {
        FOR_UNROLL(short i = 0; i < VB; ++i) {
            simdgroup_store(mo[r][i], sx + 8 * (sgitg * VB + i), PV);
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (short i = tid; i < 8 * (DV / 4); i += NT) {
            const short ir = 8 * r + i / (DV / 4);
            const short i4 = i % (DV / 4);

            if (ir < nr) {
                const float s = args.ns > 1 ? 1.0f : ss[2 * ir] == 0.0f ? 0.0f : 1.0f / ss[2 * ir];

                ((device float4 *) dst)[(row0 + ir) * (DV / 4) + i4] = sx4[(ir % 8) * (PV / 4) + i4] * s;
            }
        }

        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    if (args.ns > 1 && tid < 2 * nr) {
        ((device float *) dst)[(uint64_t) args.ns * nrows * DV + 2 * row0 + tid] = ss[tid];
    }
}

typedef decltype(kernel_flash_attn_ext_latent<float,
                                              float4,
                                              simdgroup_float8x8,
                                              float4,
                                              4,
                                              latent_load_t4<float4>,
                                              576,
                                              512>) flash_attn_ext_latent_t;

// clang-format off
template [[host_name("kernel_flash_attn_ext_latent_f32_dk576_dv512" )]] kernel flash_attn_ext_latent_t kernel_flash_attn_ext_latent<float,  float4,  simdgroup_float8x8,  float4,     4, latent_load_t4<float4>,  576, 512>;
template [[host_name("kernel_flash_attn_ext_latent_f16_dk576_dv512" )]] kernel flash_attn_ext_latent_t kernel_flash_attn_ext_latent<half,   half4,   simdgroup_half8x8,   half4,      4, latent_load_t4<half4>,   576, 512>;
#if defined(GGML_METAL_HAS_BF16)
template [[host_name("kernel_flash_attn_ext_latent_bf16_dk576_dv512")]] kernel flash_attn_ext_latent_t kernel_flash_attn_ext_latent<bfloat, bfloat4, simdgroup_bfloat8x8, bfloat4,    4, latent_load_t4<bfloat4>, 576, 512>;
#endif
template [[host_name("kernel_flash_attn_ext_latent_q8_0_dk576_dv512")]] kernel flash_attn_ext_latent_t kernel_flash_attn_ext_latent<float,  float4,  simdgroup_float8x8,  block_q8_0, 4, latent_load_q8_0,        576, 512>;
template [[host_name("kernel_flash_attn_ext_latent_q4_0_dk576_dv512")]] kernel flash_attn_ext_latent_t kernel_flash_attn_ext_latent<float,  float4,  simdgroup_float8x8,  block_q4_0, 8, latent_load_q4_0,        576, 512>;
// clang-format on

// Joins the splits of a row: one threadgroup of DV/4 threads.
kernel void kernel_flash_attn_ext_latent_reduce(constant ggml_metal_kargs_flash_attn_ext_latent_reduce & args,
                                                device const char *                                      htmp,
                                                device char *                                            dst,
                                                uint   tgpig [[threadgroup_position_in_grid]],
                                                ushort tpitg [[thread_position_in_threadgroup]],
                                                ushort ntg [[threads_per_threadgroup]]) {
    const uint64_t np = (uint64_t) args.ns * args.nrows * ntg;  // vectors of all parts

    device const float4 * parts = (device const float4 *) htmp + (uint64_t) tgpig * ntg + tpitg;
    device const float2 * ss    = (device const float2 *) ((device const float4 *) htmp + np) + tgpig;

    float m = -FLT_MAX / 2;
    for (int i = 0; i < args.ns; ++i) {
        m = max(m, ss[(uint64_t) i * args.nrows][1]);
    }

    float  s = 0.0f;
    float4 v = 0.0f;
    for (int i = 0; i < args.ns; ++i) {
        const float2 sm = ss[(uint64_t) i * args.nrows];
        const float  ms = exp(sm[1] - m);

        s += sm[0] * ms;
        v += parts[(uint64_t) i * args.nrows * ntg] * ms;
    }

    ((device float4 *) dst)[(uint64_t) tgpig * ntg + tpitg] = v * (s == 0.0f ? 0.0f : 1.0f / s);
}
