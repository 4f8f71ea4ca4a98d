// KDA conv: q, k and v projections -> convolution, SiLU, L2 norm of q and k, scale of q, and the new states.
//
// A warp processes one head of one projection over a tile of tokens; a lane holds four neighbouring channels, their
// taps and their last three inputs. Only the warp of the first tile accesses the sequence's state. It reads the old
// state before it writes the new one, so both may be at the same address.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-conv.cuh"
#include "kda-device.cuh"
#include "kimi-launch.cuh"

namespace kda_cuda {

constexpr int CONV_WARPS  = 4;
constexpr int CONV_TOKENS = 16;  // tokens per tile
constexpr int TAPS        = 4;
constexpr int LANE_VALUES = 4;  // channels per lane

// The last three inputs of each of a lane's channels, oldest first, in the layout of the state.
struct history {
    float x[LANE_VALUES][TAPS - 1];
};

static __device__ __forceinline__ void push(history & h, const float4 & x) {
    const float in[LANE_VALUES] = { x.x, x.y, x.z, x.w };
#pragma unroll
    for (int c = 0; c < LANE_VALUES; ++c) {
        h.x[c][0] = h.x[c][1];
        h.x[c][1] = h.x[c][2];
        h.x[c][2] = in[c];
    }
}

// state: of this lane's first channel; nullptr: zeros
static __device__ __forceinline__ history load_history(const float * state) {
    history h;
    float * flat = &h.x[0][0];
#pragma unroll
    for (int i = 0; i < TAPS - 1; ++i) {
        const float4 x  = state ? load4(state + 4 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        flat[4 * i]     = x.x;
        flat[4 * i + 1] = x.y;
        flat[4 * i + 2] = x.z;
        flat[4 * i + 3] = x.w;
    }
    return h;
}

static __device__ __forceinline__ void store_history(float * state, const history & h) {
    const float * flat = &h.x[0][0];
#pragma unroll
    for (int i = 0; i < TAPS - 1; ++i) {
        store4(state + 4 * i, make_float4(flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]));
    }
}

// The inputs of the tokens before token t; found: those before token 0.
static __device__ __forceinline__ history
history_before(const conv_args & args, int p, int64_t h, int s, int channel, int t, const history & found) {
    history now = found;
    for (int i = t < TAPS - 1 ? 0 : t - (TAPS - 1); i < t; ++i) {
        push(now, load4(args.x[p].at(h, i, s) + channel));
    }
    return now;
}

static __device__ __forceinline__ float4 convolve(const history & h, const float4 & x, const float4 * taps) {
    const float in[LANE_VALUES] = { x.x, x.y, x.z, x.w };
    float       y[LANE_VALUES];
#pragma unroll
    for (int c = 0; c < LANE_VALUES; ++c) {
        const float z = taps[c].x * h.x[c][0] + taps[c].y * h.x[c][1] + taps[c].z * h.x[c][2] + taps[c].w * in[c];
        y[c]          = z * sigmoid(z);
    }
    return make_float4(y[0], y[1], y[2], y[3]);
}

// A tile of tokens of head h of projection p and sequence s, from token t0 on. The first tile writes the states.
template <int D>
static __device__ __forceinline__ void
conv_tile(const conv_args & args, bool conflict, int p, int h, int s, int t0, int lane) {
    constexpr int VECTORS = (D + WARP * LANE_VALUES - 1) / (WARP * LANE_VALUES);  // per lane

    const int     t1 = t0 + CONV_TOKENS < args.n_tokens ? t0 + CONV_TOKENS : args.n_tokens;
    const int64_t C  = (int64_t) D * args.n_heads;

    const float * state = t0 == 0 ? state_found(args.st, s) : nullptr;

    history now[VECTORS];
    float4  taps[VECTORS][LANE_VALUES];
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int channel = LANE_VALUES * (lane + n * WARP);
        if (channel >= D) {
            continue;
        }
        const int64_t at = p * C + h * D + channel;
        if (t0 == 0) {
            const history found = load_history(state ? state + at * (TAPS - 1) : nullptr);
            for (int slot = 0; slot < args.st.n_slots && slot <= args.n_tokens; ++slot) {
                store_history(dest_of(args.st, conflict).at(s, slot) + at * (TAPS - 1),
                              history_before(args, p, h, s, channel, args.n_tokens - slot, found));
            }
            now[n] = found;
        } else {
            now[n] = history_before(args, p, h, s, channel, t0, history());
        }
#pragma unroll
        for (int c = 0; c < LANE_VALUES; ++c) {
            taps[n][c] = load4(args.w[p] + (h * D + channel + c) * TAPS);
        }
    }

    const float scale = p == 0 ? rsqrtf((float) D) : 1.0f;
#pragma unroll 4
    for (int t = t0; t < t1; ++t) {
        const float * x   = args.x[p].at(h, t, s);
        float *       out = args.out + (s * (int64_t) args.n_tokens + t) * 3 * C + p * C + h * D;
        float4        y[VECTORS];
        float         square = 0.0f;
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int channel = LANE_VALUES * (lane + n * WARP);
            if (channel < D) {
                const float4 in = load4(x + channel);
                y[n]            = convolve(now[n], in, taps[n]);
                push(now[n], in);
                square += dot4(y[n], y[n]);
            }
        }
        const float norm = p == 2 ? 1.0f : scale * rsqrtf(sum_lanes<WARP>(square) + args.eps);
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int channel = LANE_VALUES * (lane + n * WARP);
            if (channel < D) {
                store4(out + channel, mul4(y[n], make_float4(norm, norm, norm, norm)));
            }
        }
    }
}

// If rows conflict, the first tile's warp of the first sequence computes the first tiles of all. A lane then copies the
// states that it has written.
template <int D> static __global__ void __launch_bounds__(CONV_WARPS * WARP, 4) conv_kernel(const conv_args args) {
    wait_for_previous();
    let_next_begin();
    const int lane = threadIdx.x % WARP;
    const int unit = blockIdx.x * CONV_WARPS + threadIdx.x / WARP;
    if (unit >= 3 * args.n_heads) {
        return;
    }
    const int p  = unit / args.n_heads;
    const int h  = unit % args.n_heads;
    const int t0 = blockIdx.y * CONV_TOKENS;

    seqs_of_block seqs = { (int) blockIdx.z, (int) blockIdx.z + 1, false };
    if (t0 == 0) {
        seqs = choose_seqs(args.st, blockIdx.z);
    }
#pragma unroll 1
    for (int s = seqs.begin; s < seqs.end; ++s) {
        conv_tile<D>(args, seqs.conflict, p, h, s, t0, lane);
    }
    for (int x = 0; seqs.conflict && x < (seqs.end - seqs.begin) * args.st.n_slots; ++x) {
        const int s    = x / args.st.n_slots;
        const int slot = x % args.st.n_slots;
        for (int channel = LANE_VALUES * lane; slot <= args.n_tokens && channel < D; channel += LANE_VALUES * WARP) {
            const int64_t at = ((int64_t) (p * args.n_heads + h) * D + channel) * (TAPS - 1);
            store_history(args.st.in_cache.at(s, slot) + at, load_history(args.st.result.at(s, slot) + at));
        }
    }
}

template <int D> static void launch_conv(const conv_args & args, cudaStream_t stream) {
    const dim3 grid((3 * args.n_heads + CONV_WARPS - 1) / CONV_WARPS, (args.n_tokens + CONV_TOKENS - 1) / CONV_TOKENS,
                    args.n_seqs);
    launch_early<conv_kernel<D>>(grid, CONV_WARPS * WARP, 0, stream, args);
}

void conv(const conv_args & args, cudaStream_t stream) {
    with_head_size(head_sizes(), args.head_size, [&](auto D) { launch_conv<D>(args, stream); });
}

}  // namespace kda_cuda

#endif
