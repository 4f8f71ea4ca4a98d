#include "common.h"
#ifndef GGML_METAL_KIMI_ARGS
#include "kimi_args.metal"
#endif

// Kimi Delta Attention. The specification of KDA_CONV and KDA_SCAN: ggml-kda-conv.h, ggml-kda-scan.h

constant bool FC_kda_elide [[function_constant(FC_KDA + 0)]];    // write the new states to the cache
constant bool FC_kda_bounded [[function_constant(FC_KDA + 1)]];  // the log-gate has a lower bound

// The new state of sequence s in slot k: in the cache, or after the output in dst. Old and new states of the cache are
// reached through one kernel argument, because the compiler may assume that two of them do not overlap.
static inline device float * kda_state(
    constant ggml_metal_kargs_kda_states & st, device float * dst, device float * cache, bool elide, int s, int k) {
    return elide ? cache + (st.first_row + k * st.slot_rows + s) * st.ns_row
                 : dst + st.offs + (k * st.n_seqs + s) * st.size;
}

// Whether a sequence continues a row of the cache that is written for another one. The same for all threads.
static inline bool
kda_rows_cross(constant ggml_metal_kargs_kda_states & st, device const int32_t * rows, ushort tiisg) {
    if (!FC_kda_elide || st.n_seqs == 1) {
        return false;
    }
    bool cross = false;
    for (int s = tiisg; s < st.n_seqs; s += N_SIMDWIDTH) {
        const int row = rows[s];
        const int to  = row - st.first_row;
        if (row != st.zero_row && to >= 0 && to < st.n_slots * st.slot_rows) {
            const int writer = to % st.slot_rows;
            cross            = cross || (writer < st.n_seqs && writer != s);
        }
    }
    return simd_any(cross);
}

template <typename T> static inline T kda_sigmoid(T x) {
    return 1.0f / (1.0f + exp(-x));
}

//
// KDA_CONV
//

// the last three inputs of a lane's channels, oldest first
template <short NC> struct kda_history {
    float3 x[NC];

    void load(device const float * state) {
        device const packed_float3 * p = (device const packed_float3 *) state;
        FOR_UNROLL(short c = 0; c < NC; ++c) {
            x[c] = p[c];
        }
    }

    void store(device float * state) const {
        device packed_float3 * p = (device packed_float3 *) state;
        FOR_UNROLL(short c = 0; c < NC; ++c) {
            p[c] = packed_float3(x[c]);
        }
    }

    void clear() {
        FOR_UNROLL(short c = 0; c < NC; ++c) {
            x[c] = float3(0.0f);
        }
    }

    void push(vec<float, NC> in) {
        FOR_UNROLL(short c = 0; c < NC; ++c) {
            x[c] = float3(x[c].y, x[c].z, in[c]);
        }
    }
};

// A simdgroup computes one head of q, k or v for OP_KDA_CONV_NT tokens. Only the simdgroup of the first tokens accesses
// the states. Each lane reads an old state before it writes the new one, which may have the same address.
template <short D>
kernel void kernel_kda_conv_f32(constant ggml_metal_kargs_kda_conv & args,
                                device const char *                  q,
                                device const char *                  k,
                                device const char *                  v,
                                device const float *                 wq,
                                device const float *                 wk,
                                device const float *                 wv,
                                device float *                       cache,
                                device const int32_t *               rows,
                                device float *                       dst,
                                uint3                                tgpig [[threadgroup_position_in_grid]],
                                ushort                               tiisg [[thread_index_in_simdgroup]],
                                ushort                               sgitg [[simdgroup_index_in_threadgroup]]) {
    constexpr short NC = D / N_SIMDWIDTH;  // channels of a lane

    typedef vec<float, NC> floatc;

    const int iu = tgpig.x * OP_KDA_CONV_NSG + sgitg;
    if (iu >= 3 * args.n_heads) {
        return;
    }

    // if rows cross, one simdgroup computes the first tokens of all sequences, and copies their states at the end
    const bool first = tgpig.y == 0;
    const bool cross = first && kda_rows_cross(args.st, rows, tiisg);
    if (cross && tgpig.z > 0) {
        return;
    }

    const int ip = iu / args.n_heads;  // q, k, v
    const int ih = iu % args.n_heads;

    const int ic = ih * D + tiisg * NC;               // channel
    const int is = 3 * (ip * args.n_heads * D + ic);  // of the state

    device const char *  x    = ip == 0 ? q : ip == 1 ? k : v;
    device const float * w    = ip == 0 ? wq : ip == 1 ? wk : wv;
    const uint64_t       nb_t = ip == 0 ? args.nb01 : ip == 1 ? args.nb11 : args.nb21;
    const uint64_t       nb_s = ip == 0 ? args.nb02 : ip == 1 ? args.nb12 : args.nb22;

    float4 taps[NC];
    FOR_UNROLL(short c = 0; c < NC; ++c) {
        taps[c] = ((device const float4 *) w)[ic + c];
    }

    const int t0 = tgpig.y * OP_KDA_CONV_NT;
    const int t1 = MIN(t0 + OP_KDA_CONV_NT, args.n_tokens);

    // all tokens are in one tile: the state after a token is the history after it
    const bool whole = args.n_tokens <= OP_KDA_CONV_NT;

    const float scale = ip == 0 ? rsqrt((float) D) : 1.0f;

    const int s0 = tgpig.z;
    const int s1 = cross ? args.st.n_seqs : s0 + 1;
    for (int s = s0; s < s1; ++s) {
        device const char * xs = x + s * nb_s + ic * sizeof(float);

        kda_history<NC> h;
        h.clear();
        if (first) {
            const int row = rows[s];
            if (row != args.st.zero_row) {
                h.load(cache + row * args.st.ns_row + is);
            }
            for (int slot = whole ? args.n_tokens : 0; slot < args.st.n_slots; ++slot) {
                kda_history<NC> h1 = h;
                for (int t = MAX(0, args.n_tokens - slot - 3); t < args.n_tokens - slot; ++t) {
                    h1.push(*(device const floatc *) (xs + t * nb_t));
                }
                h1.store(kda_state(args.st, dst, cache, FC_kda_elide && !cross, s, slot) + is);
            }
        } else {
            for (int t = t0 - 3; t < t0; ++t) {
                h.push(*(device const floatc *) (xs + t * nb_t));
            }
        }

        for (int t = t0; t < t1; ++t) {
            const floatc in = *(device const floatc *) (xs + t * nb_t);

            floatc y;
            FOR_UNROLL(short c = 0; c < NC; ++c) {
                y[c] = taps[c].x * h.x[c].x + taps[c].y * h.x[c].y + taps[c].z * h.x[c].z + taps[c].w * in[c];
            }
            y = y * kda_sigmoid(y);
            h.push(in);

            if (whole && args.n_tokens - 1 - t < args.st.n_slots) {
                h.store(kda_state(args.st, dst, cache, FC_kda_elide && !cross, s, args.n_tokens - 1 - t) + is);
            }

            if (ip < 2) {
                y = y * (scale * rsqrt(simd_sum(dot(y, y)) + args.eps));
            }
            *(device floatc *) (dst + ((s * args.n_tokens + t) * 3 + ip) * (int64_t) (args.n_heads * D) + ic) = y;
        }
    }

    if (cross) {
        for (int s = s0; s < s1; ++s) {
            for (int slot = 0; slot < args.st.n_slots; ++slot) {
                kda_history<NC> h;
                h.load(kda_state(args.st, dst, cache, false, s, slot) + is);
                h.store(kda_state(args.st, dst, cache, true, s, slot) + is);
            }
        }
    }
}

typedef decltype(kernel_kda_conv_f32<128>) kernel_kda_conv_t;

template [[host_name("kernel_kda_conv_f32_64")]] kernel kernel_kda_conv_t  kernel_kda_conv_f32<64>;
template [[host_name("kernel_kda_conv_f32_128")]] kernel kernel_kda_conv_t kernel_kda_conv_f32<128>;

//
// KDA_SCAN
//

// e^x for x <= 0, accurate to rounding near 0 also with fast math: a decay of nearly 1 is applied for thousands of tokens,
// and the error of exp would accumulate. The result is 0 where it would be subnormal.
static inline float4 kda_exp(float4 x) {
    x              = max(x, float4(-88.0f));
    const float4 n = rint(x * 1.44269504f);
    const float4 r = fma(n, float4(-1.42860677e-6f), fma(n, float4(-0.693145752f), x));  // x - n ln 2

    float4 p = fma(r, float4(1.0f / 720), float4(1.0f / 120));
    p        = fma(p, r, float4(1.0f / 24));
    p        = fma(p, r, float4(1.0f / 6));
    p        = fma(p, r, float4(0.5f));
    p        = fma(p, r, float4(1.0f));
    p        = fma(p, r, float4(1.0f));
    return p * as_type<float4>((int4(n) + 127) << 23);  // n = -127: p * 0
}

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|; log1p(u) = u + u^2 p(u) on [0, 1], p as in kimi-simd.h. MSL has no
// log1p, and the log of 1 + u loses u if it is small.
static inline float4 kda_softplus(float4 x) {
    const float4 u = exp(-fabs(x));

    float4 p = fma(u, float4(-0x1.a931f0p-9f), float4(0x1.453e3cp-6f));
    p        = fma(p, u, float4(-0x1.d29c04p-5f));
    p        = fma(p, u, float4(0x1.b252fcp-4f));
    p        = fma(p, u, float4(-0x1.397544p-3f));
    p        = fma(p, u, float4(0x1.92f68cp-3f));
    p        = fma(p, u, float4(-0x1.ff0f86p-3f));
    p        = fma(p, u, float4(0x1.554c80p-2f));
    p        = fma(p, u, float4(-0x1.ffffbep-2f));
    return fma(p * u, u, u) + max(x, float4(0.0f));
}

// e^(log-gate), at most 1; x: f + dt_bias
static inline float4 kda_decay(float4 x, float a, float lower_bound) {
    return kda_exp(FC_kda_bounded ? lower_bound * kda_sigmoid(-a * x) : a * kda_softplus(x));
}

// A threadgroup holds the state of one head in registers for all tokens. NL neighbouring lanes share a value channel, and
// each lane has every NL-th float4 of its key channels. The kernel takes NT tokens at a time. Each thread loads one float4
// of q, k, v or f into threadgroup memory (for f, the decay). Every simdgroup steps through these tokens without a
// barrier. Then one simdgroup per token computes the output norm and the output gate.
template <short D>
[[max_total_threads_per_threadgroup(OP_KDA_SCAN_NL * D)]]
kernel void kernel_kda_scan_f32(constant ggml_metal_kargs_kda_scan & args,
                                device const char *                  qkv,
                                device const char *                  f,
                                device const float *                 dt_bias,
                                device const float *                 a,
                                device const char *                  beta,
                                device const char *                  gate,
                                device const float *                 norm,
                                device float *                       cache,
                                device const int32_t *               rows,
                                device float *                       dst,
                                uint3                                tgpig [[threadgroup_position_in_grid]],
                                ushort                               tiitg [[thread_index_in_threadgroup]],
                                ushort                               tiisg [[thread_index_in_simdgroup]],
                                ushort                               sgitg [[simdgroup_index_in_threadgroup]]) {
    constexpr short NT = OP_KDA_SCAN_NT;
    constexpr short NL = OP_KDA_SCAN_NL;
    constexpr short D4 = D / 4;
    constexpr short NV = D4 / NL;          // float4 of the state per lane
    constexpr short NO = D / N_SIMDWIDTH;  // output channels of a lane

    static_assert(NL == NT, "q, k, v and f of NT tokens: one float4 for each of the NL*D threads");

    typedef vec<float, NO> floato;

    threadgroup float4 sx[4][NT][D4];  // q, k, v, decay
    threadgroup float4 so[NT][D4];
    threadgroup float4 snorm[D4];
    threadgroup float  sbeta[NT];

    const int ih = tgpig.x;

    // if rows cross, one threadgroup computes a head for all sequences, and copies their states at the end
    const bool cross = kda_rows_cross(args.st, rows, tiisg);
    if (cross && tgpig.y > 0) {
        return;
    }

    // of the state: value channel, and index of the lane's first float4
    const short    il = tiisg % NL;
    const short    iv = tiitg / NL;
    const uint64_t i0 = (ih * D + iv) * D4 + il;

    // of what the thread loads: channel, token, and which of q, k, v and f
    const short ic = tiitg % D4;
    const short it = tiitg / D4 % NT;
    const short ix = tiitg / (D4 * NT);

    const bool          is_f = ix == 3;
    device const char * x    = (is_f ? f + ih * args.nb11 : qkv + (ix * args.n_heads + ih) * args.nb01) + ic * 16;
    const uint64_t      nb_t = is_f ? args.nb12 : args.nb02;
    const uint64_t      nb_s = is_f ? args.nb13 : args.nb03;

    float  ah = 0.0f;
    float4 dt = float4(0.0f);
    if (is_f && it < args.n_tokens) {
        ah = a[ih];
        dt = ((device const float4 *) dt_bias)[ih * D4 + ic];
    }
    if (tiitg < D4) {
        snorm[tiitg] = ((device const float4 *) norm)[tiitg];
    }

    const int s0 = tgpig.y;
    const int s1 = cross ? args.st.n_seqs : s0 + 1;
    for (int s = s0; s < s1; ++s) {
        device const char * xs = x + s * nb_s;

        float4 next = float4(0.0f);
        if (it < args.n_tokens) {
            next = *(device const float4 *) (xs + it * nb_t);
        }

        float4 m[NV];
        FOR_UNROLL(short n = 0; n < NV; ++n) {
            m[n] = float4(0.0f);
        }
        const int row = rows[s];
        if (row != args.st.zero_row) {
            device const float4 * state = (device const float4 *) (cache + row * args.st.ns_row) + i0;
            FOR_UNROLL(short n = 0; n < NV; ++n) {
                m[n] = state[n * NL];
            }
        }

        // slot n_tokens: the state before the first token
        for (int t0 = 0, slot = args.n_tokens; t0 < args.n_tokens; t0 += NT) {
            if (it < args.n_tokens - t0) {
                sx[ix][it][ic] = is_f ? kda_decay(next + dt, ah, args.lower_bound) : next;
            }
            const short nt = MIN(NT, args.n_tokens - t0);
            if (tiitg < nt) {
                device const char * b = beta + (t0 + tiitg) * args.nb21 + s * args.nb22;
                sbeta[tiitg]          = kda_sigmoid(((device const float *) b)[ih]);
            }

            threadgroup_barrier(mem_flags::mem_threadgroup);

            // what is needed after the steps
            if (it + NT < args.n_tokens - t0) {
                next = *(device const float4 *) (xs + (t0 + NT + it) * nb_t);
            }
            floato z = floato(0.0f);
            if (sgitg < nt) {
                device const char * g = gate + ih * args.nb31 + (t0 + sgitg) * args.nb32 + s * args.nb33;
                z                     = ((device const floato *) g)[tiisg];
            }

            for (short i = 0; i < nt; ++i, --slot) {
                if (slot < args.st.n_slots) {
                    device float * to = kda_state(args.st, dst, cache, FC_kda_elide && !cross, s, slot);
                    FOR_UNROLL(short n = 0; n < NV; ++n) {
                        ((device float4 *) to)[i0 + n * NL] = m[n];
                    }
                }

                float r = 0.0f;
                FOR_UNROLL(short n = 0; n < NV; ++n) {
                    m[n] *= sx[3][i][il + n * NL];
                    r += dot(m[n], sx[1][i][il + n * NL]);
                }
                FOR_UNROLL(short mask = NL / 2; mask > 0; mask /= 2) {
                    r += simd_shuffle_xor(r, mask);
                }

                const float d = sbeta[i] * (((threadgroup const float *) sx[2][i])[iv] - r);

                float o = 0.0f;
                FOR_UNROLL(short n = 0; n < NV; ++n) {
                    m[n] += sx[1][i][il + n * NL] * d;
                    o += dot(m[n], sx[0][i][il + n * NL]);
                }
                FOR_UNROLL(short mask = NL / 2; mask > 0; mask /= 2) {
                    o += simd_shuffle_xor(o, mask);
                }
                if (il == 0) {
                    ((threadgroup float *) so[i])[iv] = o;
                }
            }

            threadgroup_barrier(mem_flags::mem_threadgroup);

            if (sgitg < nt) {
                const floato o     = ((threadgroup const floato *) so[sgitg])[tiisg];
                const float  scale = rsqrt(simd_sum(dot(o, o)) / D + args.eps);

                device float * out = dst + ((s * args.n_tokens + t0 + sgitg) * (int64_t) args.n_heads + ih) * D;

                ((device floato *) out)[tiisg] =
                    ((threadgroup const floato *) snorm)[tiisg] * (o * scale) * kda_sigmoid(z);
            }
        }

        device float * to = kda_state(args.st, dst, cache, FC_kda_elide && !cross, s, 0);
        FOR_UNROLL(short n = 0; n < NV; ++n) {
            ((device float4 *) to)[i0 + n * NL] = m[n];
        }
    }

    if (cross) {
        for (int s = s0; s < s1; ++s) {
            for (int slot = 0; slot < args.st.n_slots; ++slot) {
                device const float4 * from = (device const float4 *) kda_state(args.st, dst, cache, false, s, slot);
                device float4 *       to   = (device float4 *) kda_state(args.st, dst, cache, true, s, slot);
                FOR_UNROLL(short n = 0; n < NV; ++n) {
                    to[i0 + n * NL] = from[i0 + n * NL];
                }
            }
        }
    }
}

typedef decltype(kernel_kda_scan_f32<128>) kernel_kda_scan_t;

template [[host_name("kernel_kda_scan_f32_64")]] kernel kernel_kda_scan_t  kernel_kda_scan_f32<64>;
template [[host_name("kernel_kda_scan_f32_128")]] kernel kernel_kda_scan_t kernel_kda_scan_f32<128>;
