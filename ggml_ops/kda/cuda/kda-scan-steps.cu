// KDA scan token by token: decoding, short batches, and the last tokens of a long batch whose states are requested.
//
// A block keeps the state of one head (of 64 value channels if D = 256) in registers from its first token to its last.
// LANES neighbouring lanes share a row s[j], so that a warp reads contiguous memory and the sum of a row takes
// log2(LANES) shuffles. Tokens are processed in groups: the block computes decays and gates of a group in shared
// memory, then every warp steps through it independently, then the block normalizes the output. Both products with the
// old state are computed in one pass, o_j = m_j . (e q) + (k . q) d_j.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-device.cuh"
#include "kda-scan.cuh"
#include "kimi-launch.cuh"

namespace kda_cuda {

constexpr int GROUP = 8;  // tokens

// ROWS: value channels per thread. With two, one block of 512 threads fits a multiprocessor; with four, two blocks of
// 256 threads do, so that one loads its state while the other one computes.
template <int D, int ROWS> struct step_shape {
    static constexpr int LANES      = D == 256 ? 16 : 8;  // lanes per row of the state
    static constexpr int VECTORS    = D / (4 * LANES);    // of four key channels, per thread
    static constexpr int BLOCK_ROWS = D == 256 ? 64 : D;  // value channels per block
    static constexpr int THREADS    = BLOCK_ROWS / ROWS * LANES;
    static constexpr int APART      = D / BLOCK_ROWS;  // blocks per head
    static constexpr int BLOCKS     = ROWS / 2;        // per multiprocessor
};

// Data of a head for the tokens of a group.
template <int D, int ROWS> struct alignas(16) step_group {
    float q[GROUP][D];
    float k[GROUP][D];
    float decay[GROUP][D];
    float v[GROUP][step_shape<D, ROWS>::BLOCK_ROWS];
    float o[GROUP][step_shape<D, ROWS>::BLOCK_ROWS];
    float beta[GROUP];
};

// A thread's position: in the block's rows of the state, and within a row.
template <int D, int ROWS> struct step_place {
    using shape = step_shape<D, ROWS>;
    int row0    = blockIdx.x % shape::APART * shape::BLOCK_ROWS;  // first row of the block
    int row     = threadIdx.x / shape::LANES;                     // the next ones: + THREADS/LANES
    int lane    = threadIdx.x % shape::LANES;

    __device__ int block_row(int r) const { return row + r * (shape::THREADS / shape::LANES); }

    __device__ int key(int n) const { return 4 * (lane + n * shape::LANES); }

    __device__ int offset(int r, int n) const { return (row0 + block_row(r)) * D + key(n); }
};

template <int D, int ROWS>
static __device__ __forceinline__ void
keep_state(float * to, const step_place<D, ROWS> & at, const float4 (&m)[ROWS][step_shape<D, ROWS>::VECTORS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float * row = to + at.offset(r, 0);  // nvcc 13.0 splits stores to at.offset(r, n) into four
#pragma unroll
        for (int n = 0; n < step_shape<D, ROWS>::VECTORS; ++n) {
            store4(row + 4 * n * step_shape<D, ROWS>::LANES, m[r][n]);
        }
    }
}

// Loads n_group tokens from t on into shared memory.
template <int D, int ROWS>
static __device__ __forceinline__ void
load_group(step_group<D, ROWS> & group, const scan_args & args, int h, int s, int t, int n_group, int row0) {
    using shape = step_shape<D, ROWS>;
#pragma unroll 1  // the registers hold the state
    for (int x = threadIdx.x; x < n_group * D; x += shape::THREADS) {
        const int g    = x / D;
        const int i    = x % D;
        group.q[g][i]  = args.q.at(h, t + g, s)[i];
        group.k[g][i]  = args.k.at(h, t + g, s)[i];
        float decay[1] = { args.f.at(h, t + g, s)[i] + args.dt_bias[h * D + i] };
        decays_of(decay, args.a[h], args.kind);
        group.decay[g][i] = decay[0];
    }
#pragma unroll 1
    for (int x = threadIdx.x; x < n_group * shape::BLOCK_ROWS; x += shape::THREADS) {
        const int g   = x / shape::BLOCK_ROWS;
        const int j   = x % shape::BLOCK_ROWS;
        group.v[g][j] = args.v.at(h, t + g, s)[row0 + j];
    }
    const int g = threadIdx.x;
    if (g < n_group) {
        group.beta[g] = sigmoid(*args.beta.at(h, t + g, s));
    }
}

// One token: m becomes the new state, and the output of the thread's rows is written to group.o.
template <int D, int ROWS>
static __device__ __forceinline__ void step(step_group<D, ROWS> &       group,
                                            int                         g,
                                            const step_place<D, ROWS> & at,
                                            float4 (&m)[ROWS][step_shape<D, ROWS>::VECTORS]) {
    using shape = step_shape<D, ROWS>;

    float recalled[ROWS] = {};
    float o[ROWS]        = {};
    float kq             = 0.0f;
#pragma unroll
    for (int n = 0; n < shape::VECTORS; ++n) {
        const float4 e = load4(&group.decay[g][at.key(n)]);
        const float4 k = load4(&group.k[g][at.key(n)]);
        const float4 q = load4(&group.q[g][at.key(n)]);
        kq += dot4(k, q);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            m[r][n] = mul4(m[r][n], e);
            recalled[r] += dot4(m[r][n], k);
            o[r] += dot4(m[r][n], q);
        }
    }
    kq = sum_lanes<shape::LANES>(kq);

    float delta[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float found = sum_lanes<shape::LANES>(recalled[r]);
        delta[r]          = group.beta[g] * (group.v[g][at.block_row(r)] - found);
        const float out   = sum_lanes<shape::LANES>(o[r]) + kq * delta[r];
        if (at.lane == 0) {
            group.o[g][at.block_row(r)] = out;
        }
    }
#pragma unroll
    for (int n = 0; n < shape::VECTORS; ++n) {
        const float4 k = load4(&group.k[g][at.key(n)]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            m[r][n].x += k.x * delta[r];
            m[r][n].y += k.y * delta[r];
            m[r][n].z += k.z * delta[r];
            m[r][n].w += k.w * delta[r];
        }
    }
}

// What a warp multiplies a token's normalized output with: norm * sigmoid(gate). Loaded before the output is known.
template <int D> struct output_gate {
    float x[D / WARP];

    __device__ void load(const scan_args & args, int h, int t, int s) {
        const float * gate = args.gate.at(h, t, s);
        const int     lane = threadIdx.x % WARP;
#pragma unroll
        for (int n = 0; n < D / WARP; ++n) {
            x[n] = args.norm[lane + n * WARP] * sigmoid(gate[lane + n * WARP]);
        }
    }
};

// out = gate * rms_norm(o) of one token and head, by one warp
template <int D>
static __device__ __forceinline__ void
finish_token(const output_gate<D> & gate, float eps, const float * o, float * out) {
    const int lane   = threadIdx.x % WARP;
    float     square = 0.0f;
    float     x[D / WARP];
#pragma unroll
    for (int n = 0; n < D / WARP; ++n) {
        x[n] = o[lane + n * WARP];
        square += x[n] * x[n];
    }
    const float scale = 1.0f / sqrtf(sum_lanes<WARP>(square) / D + eps);
#pragma unroll
    for (int n = 0; n < D / WARP; ++n) {
        out[lane + n * WARP] = x[n] * scale * gate.x[n];
    }
}

// The tokens of the range of one head and sequence.
template <int D, int ROWS>
static __device__ __forceinline__ void steps_of(const scan_args &         args,
                                                const token_range &       range,
                                                bool                      conflict,
                                                step_group<D, ROWS> &     group,
                                                const step_place<D, ROWS> at,
                                                int                       h,
                                                int                       s) {
    using shape = step_shape<D, ROWS>;
    const int T = args.n_tokens;

    const float * found = range.begin > 0 ? dest_of(args.st, conflict).at(s, args.st.n_slots - 1)
                                          : state_found(args.st, s);  // of all heads; nullptr: zeros
    float4        m[ROWS][shape::VECTORS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int n = 0; n < shape::VECTORS; ++n) {
            m[r][n] =
                found ? load4(found + (int64_t) h * D * D + at.offset(r, n)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
    if (range.begin == 0 && T < args.st.n_slots) {
        keep_state<D>(dest_of(args.st, conflict).at(s, T) + (int64_t) h * D * D, at, m);
    }

    for (int t0 = range.begin; t0 < range.end; t0 += GROUP) {
        const int n_group = range.end - t0 < GROUP ? range.end - t0 : GROUP;
        load_group<D>(group, args, h, s, t0, n_group, at.row0);
        constexpr int  WARPS = shape::THREADS / WARP;
        output_gate<D> gates[(GROUP + WARPS - 1) / WARPS];  // of the tokens that this warp finishes
        if (shape::APART == 1) {
#pragma unroll
            for (int n = 0; n * WARPS < GROUP; ++n) {
                const int g = threadIdx.x / WARP + n * WARPS;
                if (g < n_group) {
                    gates[n].load(args, h, t0 + g, s);
                }
            }
        }
        __syncthreads();
        for (int g = 0; g < n_group; ++g) {
            step<D>(group, g, at, m);
            const int slot = T - 1 - (t0 + g);
            if (slot < args.st.n_slots) {
                keep_state<D>(dest_of(args.st, conflict).at(s, slot) + (int64_t) h * D * D, at, m);
            }
        }
        __syncthreads();
        if (shape::APART == 1) {
#pragma unroll
            for (int n = 0; n * WARPS < GROUP; ++n) {
                const int g = threadIdx.x / WARP + n * WARPS;
                if (g < n_group) {
                    finish_token<D>(gates[n], args.eps, group.o[g], args.out_at(h, t0 + g, s));
                }
            }
        } else {
            for (int x = threadIdx.x; x < n_group * shape::BLOCK_ROWS; x += shape::THREADS) {
                const int g = x / shape::BLOCK_ROWS;
                const int j = x % shape::BLOCK_ROWS;

                args.out_at(h, t0 + g, s)[at.row0 + j] = group.o[g][j];
            }
        }
        __syncthreads();
    }
}

template <int D, int ROWS>
static __global__ void __launch_bounds__((step_shape<D, ROWS>::THREADS), (step_shape<D, ROWS>::BLOCKS))
    steps_kernel(const scan_args args, const token_range range) {
    using shape = step_shape<D, ROWS>;
    __shared__ step_group<D, ROWS> group;

    wait_for_previous();
    let_next_begin();
    const step_place<D, ROWS> at;
    const int                 h    = blockIdx.x / shape::APART;
    const seqs_of_block       seqs = choose_seqs(args.st, blockIdx.y);
#pragma unroll 1
    for (int s = seqs.begin; s < seqs.end; ++s) {
        steps_of<D, ROWS>(args, range, seqs.conflict, group, at, h, s);
    }
    for (int x = 0; seqs.conflict && x < (seqs.end - seqs.begin) * args.st.n_slots; ++x) {
        const int s    = x / args.st.n_slots;
        const int slot = x % args.st.n_slots;
        if (slot <= args.n_tokens) {
            const float * from = args.st.result.at(s, slot) + (int64_t) h * D * D;
            float *       to   = args.st.in_cache.at(s, slot) + (int64_t) h * D * D;
            for (int i = 4 * threadIdx.x; i < shape::BLOCK_ROWS * D; i += 4 * shape::THREADS) {
                store4(to + at.row0 * D + i, load4(from + at.row0 * D + i));
            }
        }
    }
}

constexpr int FINISH_WARPS = 8;

template <int D>
static __global__ void __launch_bounds__(FINISH_WARPS * WARP)
    finish_kernel(const scan_args args, const token_range range) {
    wait_for_previous();
    const int h = blockIdx.y;
    const int s = blockIdx.z;
    const int t = range.begin + blockIdx.x * FINISH_WARPS + threadIdx.x / WARP;
    if (t >= range.end) {
        return;
    }
    float *        out = args.out_at(h, t, s);
    output_gate<D> gate;
    gate.load(args, h, t, s);
    finish_token<D>(gate, args.eps, out, out);
}

template <int D> static void launch_finish(const scan_args & args, const token_range & range, cudaStream_t stream) {
    const dim3 grid((range.end - range.begin + FINISH_WARPS - 1) / FINISH_WARPS, args.n_heads, args.n_seqs);
    launch_early<finish_kernel<D>>(grid, FINISH_WARPS * WARP, 0, stream, args, range);
}

template <int D, int ROWS>
static void launch_steps(const scan_args & args, const token_range & range, cudaStream_t stream) {
    using shape = step_shape<D, ROWS>;
    const dim3 grid(args.n_heads * shape::APART, args.n_seqs);
    launch_early<steps_kernel<D, ROWS>>(grid, shape::THREADS, 0, stream, args, range);
    if (shape::APART > 1) {
        launch_finish<D>(args, range, stream);
    }
}

// Two blocks per multiprocessor if there are more blocks than multiprocessors.
void scan_steps(const scan_args & args, const token_range & range, const device_limits & device, cudaStream_t stream) {
    with_head_size(head_sizes(), args.head_size, [&](auto D) {
        if (args.n_heads * step_shape<D, 2>::APART * args.n_seqs > device.n_sms) {
            launch_steps<D, 4>(args, range, stream);
        } else {
            launch_steps<D, 2>(args, range, stream);
        }
    });
}

void scan_finish(const scan_args & args, const token_range & range, cudaStream_t stream) {
    with_head_size(head_sizes(), args.head_size, [&](auto D) { launch_finish<D>(args, range, stream); });
}

}  // namespace kda_cuda

#endif
