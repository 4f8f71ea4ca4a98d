// Latent attention on CUDA, decompressed: splits the keys into runs and computes the attention of a run.
//
// A block computes 128 queries of a head, a warp 16 of them, whose q and result stay in registers. Tiles of keys and
// values are double-buffered in shared memory, with one barrier per tile. Scores become weights in the accumulator
// registers.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "latent-decompressed.cuh"

namespace latent_cuda {

static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

namespace {

constexpr int KEY_STEPS     = N_KEY / 16;
constexpr int NOPE_STEPS    = N_NOPE / 16;
constexpr int TILE_COLUMNS  = TILE / 8;
constexpr int VALUE_COLUMNS = N_VALUE / 8;
constexpr int KEY_STRIDE    = N_KEY + 8;  // avoids bank conflicts between eight rows
constexpr int VALUE_STRIDE  = N_VALUE + 8;
constexpr int CHUNK         = 8;  // halves per asynchronous copy
// Softmax weights are scaled so that the largest is 2^WEIGHT_EXPONENT; small ones then stay normal halves.
constexpr int WEIGHT_EXPONENT = 14;

// For this many steps a thread keeps the second terms of q in shared memory, to save registers.
constexpr int LENT_STEPS = 2;

// Shared memory, in halves: two tiles and the terms of q that do not fit in registers.
template <typename MODE> struct tile_room {
    static constexpr int KEYS   = MODE::KEY * TILE * KEY_STRIDE;
    static constexpr int VALUES = MODE::VALUE * TILE * VALUE_STRIDE;
    static constexpr int SIZE   = KEYS + VALUES;
    static constexpr int TILES  = 2 * SIZE * sizeof(__half);
    static constexpr int LENT   = MODE::QUERY == 2 ? LENT_STEPS * BLOCK_THREADS * sizeof(uint4) : 0;
    static constexpr int BYTES  = TILES + LENT;
};

// The tiles of a run that a block of queries sees, in order; the same in all warps.
struct tile_walk {
    const sight * sights;
    int           n_tiles;
    int           base = -WARP;
    uint32_t      rest = 0;  // remaining tiles of [base, base + WARP)

    // Returns n_tiles if no tiles are left.
    __device__ int next() {
        while (rest == 0) {
            base += WARP;
            if (base >= n_tiles) {
                return n_tiles;
            }
            const int tile = base + threadIdx.x % WARP;
            rest           = __ballot_sync(ALL_LANES, tile < n_tiles && sights[tile].visible != 0);
        }
        const int tile = base + __ffs(rest) - 1;
        rest &= rest - 1;
        return tile;
    }
};

template <typename MODE>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attend_tiles(const decompressed args, const prefill p, const weights w, const run r) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    extern __shared__ __align__(16) char shared[];
    wait_for_previous();
    using room = tile_room<MODE>;

    const int lane   = threadIdx.x % WARP;
    const int warp   = threadIdx.x / WARP;
    const int g      = lane / 4;
    const int t      = lane % 4;
    const int block  = gridDim.x - 1 - blockIdx.x;  // the last queries see the most keys, so they start first
    const int head   = blockIdx.y;
    const int stream = r.stream0 + blockIdx.z;

    __half *      tiles   = reinterpret_cast<__half *>(shared);
    uint4 *       lent    = reinterpret_cast<uint4 *>(shared + room::TILES);
    const int     query0  = block * BLOCK_QUERIES + warp * 16;
    const bool    active  = query0 < args.n_queries;
    const int     mine[2] = { min(query0 + g, args.n_queries - 1), min(query0 + g + 8, args.n_queries - 1) };
    const int64_t slab    = static_cast<int64_t>(blockIdx.z) * args.n_heads + head;

    const sight * sights = p.sights_of(stream % args.mask_streams, block) + r.begin / TILE;
    const int *   shifts = r.shifts + static_cast<int64_t>(blockIdx.z) * r.room_tiles();

    const uint16_t * mask = args.mask == nullptr ? nullptr : args.mask + stream % args.mask_streams * args.mask_stream;

    const auto fetch = [&](int tile, int buffer) {
        __half * const to   = tiles + buffer * room::SIZE;
        const int64_t  key0 = tile * TILE;
        const auto     copy = [&](__half * at, int stride, const __half * from, int row_chunks) {
#pragma unroll 1
            for (int i = threadIdx.x; i < TILE * row_chunks; i += BLOCK_THREADS) {
                copy_16_async(at + i / row_chunks * stride + i % row_chunks * CHUNK, from + i * CHUNK);
            }
        };
#pragma unroll
        for (int term = 0; term < MODE::KEY; ++term) {
            copy(to + term * TILE * KEY_STRIDE, KEY_STRIDE,
                 r.keys + ((slab * MODE::KEY + term) * r.n_room + key0) * N_NOPE, N_NOPE / CHUNK);
        }
#pragma unroll
        for (int term = 0; term < MODE::CACHE; ++term) {
            copy(to + term * TILE * KEY_STRIDE + N_NOPE, KEY_STRIDE,
                 r.ropes + ((static_cast<int64_t>(blockIdx.z) * MODE::CACHE + term) * r.n_room + key0) * N_ROPE,
                 N_ROPE / CHUNK);
        }
#pragma unroll
        for (int term = 0; term < MODE::VALUE; ++term) {
            copy(to + room::KEYS + term * TILE * VALUE_STRIDE, VALUE_STRIDE,
                 r.values + ((slab * MODE::VALUE + term) * r.n_room + key0) * N_VALUE, N_VALUE / CHUNK);
        }
    };

    tile_walk walk   = { sights, r.n_tiles() };
    int       tile   = walk.next();
    int       buffer = 0;
    if (tile < walk.n_tiles) {
        fetch(tile, buffer);
    }

    // q of this warp's rows, each scaled to 2^8 by a power of two and multiplied with the unit of k_b.
    const float k_unit = w.units[head];
    uint32_t    q[KEY_STEPS][MODE::QUERY][4];
    float       row_scale[2];
    {
        const auto value = [&](int row, int d) {
            const float x = args.q[stream * args.q_stream + mine[row] * args.q_query + head * args.q_head + d];
            return d < N_NOPE ? x * k_unit : x;
        };
        float range[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < 4 * KEY_STEPS; ++i) {
                largest = fmaxf(largest, fabsf(value(row, i / 2 * 8 + 2 * t + i % 2)));
            }
            largest        = max_lanes<4>(largest);
            range[row]     = power_of_two(min(127 + 8 + 127 - exponent_of(largest), 253));
            row_scale[row] = args.scale * LOG2_E * power_of_two(254 - exponent_of(range[row]));
        }
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int  d = step * 16 + 2 * t + i / 2 * 8;
                const auto pair =
                    split<__half, MODE::QUERY>(value(i % 2, d) * range[i % 2], value(i % 2, d + 1) * range[i % 2]);
#pragma unroll
                for (int term = 0; term < MODE::QUERY; ++term) {
                    q[step][term][i] = pair.term[term];
                }
            }
            if (MODE::QUERY == 2 && step < LENT_STEPS) {
                const uint32_t (&x)[4]                   = q[step][1];
                lent[step * BLOCK_THREADS + threadIdx.x] = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }

    float      out[VALUE_COLUMNS][4] = {};
    float      maximum[2]            = { -INFINITY, -INFINITY };
    float      sum[2]                = { 0.0f, 0.0f };  // of this lane's keys
    int        shift                 = UNIT_SHIFT;
    float2 *   max_sum = p.max_sum + (static_cast<int64_t>(stream) * args.n_heads + head) * args.n_queries;
    const auto result  = [&](int row) {
        const int64_t query = static_cast<int64_t>(stream) * args.n_queries + mine[row];
        return args.out + (query * args.n_heads + head) * N_VALUE + 2 * t;
    };
    if (!p.first) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float2 before = max_sum[mine[row]];
            maximum[row]        = before.x;
            sum[row]            = t == 0 ? before.y : 0.0f;
#pragma unroll
            for (int column = 0; column < VALUE_COLUMNS; ++column) {
                const float2 x           = *reinterpret_cast<const float2 *>(result(row) + 8 * column);
                out[column][2 * row]     = x.x;
                out[column][2 * row + 1] = x.y;
            }
        }
    }

    for (; tile < walk.n_tiles; buffer = 1 - buffer) {
        wait_copies();
        __syncthreads();
        const int this_tile = tile;
        tile                = walk.next();
        if (tile < walk.n_tiles) {
            fetch(tile, 1 - buffer);
        }
        if (!active) {
            continue;
        }
        const __half * keys   = tiles + buffer * room::SIZE;
        const __half * values = keys + room::KEYS;

        float s[TILE_COLUMNS][4] = {};
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
            for (int plane = (step < NOPE_STEPS ? MODE::KEY : MODE::CACHE) - 1; plane >= 0; --plane) {
                if (MODE::QUERY == 2 && step < LENT_STEPS && plane == 0) {
                    const uint4 x = lent[step * BLOCK_THREADS + threadIdx.x];
                    q[step][1][0] = x.x;
                    q[step][1][1] = x.y;
                    q[step][1][2] = x.z;
                    q[step][1][3] = x.w;
                }
                uint32_t b[TILE_COLUMNS / 2][4];
#pragma unroll
                for (int pair = 0; pair < TILE_COLUMNS / 2; ++pair) {
                    load_matrices(b[pair], keys + (plane * TILE + 16 * pair + lane / 16 * 8 + lane % 8) * KEY_STRIDE +
                                               step * 16 + lane / 8 % 2 * 8);
                }
#pragma unroll
                for (int term = MODE::QUERY - 1 - plane; term >= 0; --term) {
#pragma unroll
                    for (int pair = 0; pair < TILE_COLUMNS / 2; ++pair) {
                        mma<__half>(s[2 * pair], q[step][term], { b[pair][0], b[pair][1] });
                        mma<__half>(s[2 * pair + 1], q[step][term], { b[pair][2], b[pair][3] });
                    }
                }
            }
        }

        // scale of the scores for exp2
        const int shift_before = shift;
        shift                  = shifts[this_tile];
        const float unit       = power_of_two(shift - UNIT_SHIFT + 127);
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS * 4; ++i) {
            s[i / 4][i % 4] *= row_scale[i / 2 % 2] * unit;
        }
        if (sights[this_tile].plain == 0) {
#pragma unroll
            for (int i = 0; i < TILE_COLUMNS * 4; ++i) {
                const int      key   = r.begin + this_tile * TILE + i / 4 * 8 + 2 * t + i % 2;
                const bool     there = key < r.end;
                const uint16_t added = there && mask != nullptr ? mask[mine[i / 2 % 2] * args.mask_query + key] : 0;
                s[i / 4][i % 4] = there ? s[i / 4][i % 4] + LOG2_E * __half2float(__ushort_as_half(added)) : -INFINITY;
            }
        }
        float largest[2] = { maximum[0], maximum[1] };
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS * 4; ++i) {
            largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i / 4][i % 4]);
        }
        float factor[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            largest[row] = max_lanes<4>(largest[row]);
            factor[row]  = largest[row] == maximum[row] ? 1.0f : exp2f(maximum[row] - largest[row]);
            maximum[row] = largest[row];
            sum[row] *= factor[row];
            factor[row] *= power_of_two(127 + shift_before - shift);
        }
        if (__any_sync(ALL_LANES, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < VALUE_COLUMNS * 4; ++i) {
                out[i / 4][i % 4] *= factor[i / 2 % 2];
            }
        }
        const float offset[2] = { maximum[0] == -INFINITY ? 0.0f : maximum[0] - WEIGHT_EXPONENT,
                                  maximum[1] == -INFINITY ? 0.0f : maximum[1] - WEIGHT_EXPONENT };
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS * 4; ++i) {
            const int row   = i / 2 % 2;
            s[i / 4][i % 4] = exp2f(s[i / 4][i % 4] - offset[row]);
            sum[row] += s[i / 4][i % 4];
        }

#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
            uint32_t a[MODE::P][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float * x    = s[2 * step + i / 2] + i % 2 * 2;
                const auto    pair = split<__half, MODE::P>(x[0], x[1]);
#pragma unroll
                for (int term = 0; term < MODE::P; ++term) {
                    a[term][i] = pair.term[term];
                }
            }
#pragma unroll
            for (int pair = 0; pair < VALUE_COLUMNS / 2; ++pair) {
#pragma unroll
                for (int plane = MODE::VALUE - 1; plane >= 0; --plane) {
                    uint32_t b[4];
                    load_matrices_transposed(b, values + (plane * TILE + 16 * step + lane % 16) * VALUE_STRIDE +
                                                    16 * pair + lane / 16 * 8);
#pragma unroll
                    for (int term = MODE::P - 1; term >= 0; --term) {
                        if (term + plane < 2) {
                            mma<__half>(out[2 * pair], a[term], { b[0], b[1] });
                            mma<__half>(out[2 * pair + 1], a[term], { b[2], b[3] });
                        }
                    }
                }
            }
        }
    }

    const float unit = power_of_two(shift - UNIT_SHIFT + 127);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float total  = quad_sum(sum[row]);
        const float factor = !p.last ? unit : total == 0.0f ? 0.0f : unit * w.units[args.n_heads + head] / total;
        if (query0 + g + 8 * row < args.n_queries) {
            if (!p.last && t == 0) {
                max_sum[mine[row]] = make_float2(maximum[row], total);
            }
#pragma unroll
            for (int column = 0; column < VALUE_COLUMNS; ++column) {
                *reinterpret_cast<float2 *>(result(row) + 8 * column) =
                    make_float2(out[column][2 * row] * factor, out[column][2 * row + 1] * factor);
            }
        }
    }
#else
    __trap();  // the caller rejects older devices
#endif
}

// Bump allocator; starting at nullptr it measures the required size.
class pieces {
  public:
    explicit pieces(void * begin) : begin(static_cast<char *>(begin)) {}

    template <typename T> T * take(int64_t count) {
        T * const piece = reinterpret_cast<T *>(begin + used);
        used += divide_up(count * sizeof(T), ALIGNMENT) * ALIGNMENT;
        return piece;
    }

    size_t size() const { return used; }

  private:
    static constexpr size_t ALIGNMENT = 128;
    char *                  begin;
    size_t                  used = 0;
};

struct plan {
    prefill all;
    sight * sights;
    weights w;
    run     first;
    size_t  size;
};

// Streams are processed together as long as there is room for this many keys of each.
constexpr int64_t LEAST_KEYS = 4 * EXPAND_KEYS;

// Plans the runs and the workspace. The plan depends on the shapes and the scratch size, not on the device.
template <typename MODE> plan make_plan(const decompressed & args, void * work) {
    constexpr int EXPANDED = MODE::KEY * N_NOPE + MODE::VALUE * N_VALUE;
    constexpr int SHARED   = MODE::CACHE * N_CACHE;

    const int64_t key_bytes = (static_cast<int64_t>(args.n_heads) * EXPANDED + SHARED) * sizeof(__half);
    const int64_t n_fit     = args.scratch / key_bytes;  // keys
    const int64_t n_keys    = divide_up(args.n_keys, EXPAND_KEYS) * EXPAND_KEYS;
    const int64_t least     = n_keys < LEAST_KEYS ? n_keys : LEAST_KEYS;
    const int64_t n_streams = n_fit / least < 1 ? 1 : n_fit / least < args.n_streams ? n_fit / least : args.n_streams;
    const int64_t n_share   = n_fit / n_streams / EXPAND_KEYS * EXPAND_KEYS;
    const int64_t n_room    = n_share < EXPAND_KEYS ? EXPAND_KEYS : n_share < n_keys ? n_share : n_keys;

    plan   made  = {};
    pieces taken = pieces(work);

    made.all.n_blocks = divide_up(args.n_queries, BLOCK_QUERIES);
    made.all.n_tiles  = divide_up(args.n_keys, TILE);
    made.sights     = taken.take<sight>(static_cast<int64_t>(args.mask_streams) * made.all.n_blocks * made.all.n_tiles);
    made.all.sights = made.sights;
    made.all.max_sum = taken.take<float2>(static_cast<int64_t>(args.n_streams) * args.n_heads * args.n_queries);
    made.w.values    = taken.take<__half>(static_cast<int64_t>(2) * args.n_heads * MODE::WEIGHT * N_WEIGHTS);
    made.w.units     = taken.take<float>(2 * args.n_heads);

    run & r     = made.first;
    r.n_streams = n_streams;
    r.n_room    = n_room;
    r.seen      = taken.take<uint32_t>(n_streams * r.room_tiles());
    r.shifts    = taken.take<int>(n_streams * r.room_tiles());
    r.factors   = taken.take<float>(n_streams * n_room);
    r.latents   = taken.take<__half>(n_streams * n_room * MODE::CACHE * N_LATENT);
    r.ropes     = taken.take<__half>(n_streams * n_room * MODE::CACHE * N_ROPE);
    r.keys      = taken.take<__half>(n_streams * args.n_heads * n_room * MODE::KEY * N_NOPE);
    r.values    = taken.take<__half>(n_streams * args.n_heads * n_room * MODE::VALUE * N_VALUE);
    made.size   = taken.size();
    return made;
}

template <typename MODE> void attend_in_runs(const decompressed & args, void * work, cudaStream_t stream) {
    static_assert(tile_room<MODE>::BYTES <= MAX_SHARED_BYTES);
    const plan made = make_plan<MODE>(args, work);
    prefill    all  = made.all;
    run        r    = made.first;
    look(args, all, made.sights, stream);
    weigh(args, MODE::WEIGHT, made.w, stream);
    // has to be set once per device of the process; setting it again is cheap
    cudaFuncSetAttribute(attend_tiles<MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, tile_room<MODE>::BYTES);
    for (r.stream0 = 0; r.stream0 < args.n_streams; r.stream0 += r.n_streams) {
        r.n_streams = min(made.first.n_streams, args.n_streams - r.stream0);
        for (r.begin = 0; r.begin < args.n_keys; r.begin = r.end) {
            r.end     = min(r.begin + r.n_room, args.n_keys);
            all.first = r.begin == 0;
            all.last  = r.end == args.n_keys;
            collect(args, all, r, stream);
            expand<MODE>(made.w, args.n_heads, r, stream);
            const dim3 grid(all.n_blocks, args.n_heads, r.n_streams);
            launch_early<attend_tiles<MODE>>(grid, BLOCK_THREADS, tile_room<MODE>::BYTES, stream, args, all, made.w, r);
        }
    }
}

// Calls f with the mode of the cache's type.
template <typename F> auto with_mode(const decompressed & args, const F & f) {
    switch (args.type) {
    case cache_type::f32:
        return f(modes::f32());
    case cache_type::f16:
    case cache_type::bf16:
        return args.exact ? f(modes::f16()) : f(modes::halves());
    default:
        return f(modes::halves());
    }
}

}  // namespace

size_t workspace(const decompressed & args) {
    return with_mode(args, [&](auto mode) { return make_plan<decltype(mode)>(args, nullptr).size; });
}

void attend(const decompressed & args, void * work, cudaStream_t stream) {
    with_mode(args, [&](auto mode) { attend_in_runs<decltype(mode)>(args, work, stream); });
}

}  // namespace latent_cuda

#endif
