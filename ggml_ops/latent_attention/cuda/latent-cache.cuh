#pragma once

// Tiles of the cache in shared memory, ready for tensor cores: TILE_KEYS rows of 16-bit values, used as keys and as
// values.
//
//   type        | element | planes        | factors | loading
//   f16, bf16   | same    | 1             | none    | asynchronous copy into one of two tiles
//   q8_0, q4_0  | half    | 1: the quants | scales  | asynchronous copy of the raw blocks, then unpacked
//   f32         | bf16    | 2: hi + lo    | none    | read and split
//
// Quants are divided by 2^QUANT_BITS, their bound, and are exact halves of magnitude at most 1. A key that is not visible becomes
// zeros, whatever its cell holds; in a 16-bit or 32-bit cache it is not even read.
//
// Scales are halves of any magnitude, so a weight times a scale can leave the range of halves. factors() are therefore
// the scales of a key divided by its key_unit(), a power of two. The scores of the key are multiplied with key_unit(), its
// weights with key_weight(), the unit divided by the largest unit so far. When the largest unit changes, earlier sums have
// to be multiplied with unit_change(). Final results have to be multiplied with inverse_unit().
//
// Use: fetch(first tile); then for each tile arrive(), fetch(next tile), and read. All threads of the block
// call both; arrive() is a barrier before and after.

#include "latent-cuda.cuh"
#include "latent-device.cuh"

namespace latent_cuda {

constexpr int THREADS     = 256;
constexpr int TILE_KEYS   = 32;
constexpr int TILE_STRIDE = N_CACHE + 8;  // values; avoids bank conflicts of ldmatrix between eight rows
constexpr int TILE_VALUES = TILE_KEYS * TILE_STRIDE;
constexpr int FACTOR_SPAN = 32;  // values per scale
constexpr int N_FACTORS   = N_CACHE / FACTOR_SPAN;

// f(i) for each i in [0, COUNT), distributed over the threads of the block. Unrolled by three to keep loads in flight;
// more would not fit in registers.
template <int COUNT, typename F> static __device__ __forceinline__ void share(const F & f) {
#pragma unroll 3
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; ++n) {
        const int i = n * THREADS + threadIdx.x;
        if (COUNT % THREADS == 0 || i < COUNT) {
            f(i);
        }
    }
}

// Keys [key, key + TILE_KEYS), with those visible to some query of the block. None visible: no tiles are left.
struct key_tile {
    int      key;
    uint32_t visible;

    __device__ bool sees(int i) const { return visible >> i & 1; }
};

// The rows of one stream.
struct cache_rows {
    const char * data;
    int64_t      row_bytes;
    int          n_keys;

    __device__ const char * at(int key) const { return data + key * row_bytes; }
};

// Values without scales.
struct no_factors {
    static constexpr bool FACTORS    = false;
    static constexpr int  QUANT_BITS = 0;

    __device__ float2 factors(int, int) const { return make_float2(1.0f, 1.0f); }

    __device__ float key_unit(int) const { return 1.0f; }

    __device__ float key_weight(int) const { return 1.0f; }

    __device__ float inverse_unit() const { return 1.0f; }

    __device__ float unit_change() const { return 1.0f; }
};

// 16-bit values: two tiles, double-buffered.
template <typename T> struct plain_tiles : no_factors {
    using element                  = T;
    static constexpr int PLANES    = 1;
    static constexpr int ROW_BYTES = N_CACHE * sizeof(T);
    static constexpr int SHARED    = 2 * TILE_VALUES * sizeof(T);

    cache_rows rows;
    T *        tiles;
    int        current = 1;

    __device__ plain_tiles(char * shared, const cache_rows & rows) : rows(rows), tiles(reinterpret_cast<T *>(shared)) {}

    // Eight lanes copy a key, with one address each: 64-bit products and divisions took a fifth of the kernel's time.
    __device__ void fetch(const key_tile & tile) {
        constexpr int CHUNK = 16;
        constexpr int LANES = THREADS / TILE_KEYS;
        static_assert(ROW_BYTES % (LANES * CHUNK) == 0);
        if (tile.visible == 0) {
            return;
        }
        const int    key  = threadIdx.x / LANES;
        const int    at   = threadIdx.x % LANES * CHUNK;
        const bool   sees = tile.sees(key);
        const char * from = (sees ? rows.at(tile.key + key) : rows.data) + at;
        char *       to   = reinterpret_cast<char *>(tiles + (1 - current) * TILE_VALUES + key * TILE_STRIDE) + at;
#pragma unroll
        for (int n = 0; n < ROW_BYTES; n += LANES * CHUNK) {
            copy_16_async(to + n, from + n, sees ? CHUNK : 0);
        }
    }

    __device__ void arrive(const key_tile &) {
        wait_copies();
        __syncthreads();
        current = 1 - current;
    }

    __device__ const T * plane(int) const { return tiles + current * TILE_VALUES; }
};

// Four bytes n as halves n / 2^BITS - 1, exactly: 2^10 + n has the bits 0x6400 + n, and 0x400 less halve a half.
template <int BITS> static __device__ __forceinline__ uint2 bytes_to_halves(uint32_t bytes) {
    constexpr uint32_t HIGH = 0x64 - 4 * BITS;
    const uint32_t     bits = 0x01000100 * HIGH + 0x00010001 * (1 << BITS);
    __half2            zero;
    memcpy(&zero, &bits, sizeof(zero));
    const auto two = [&](uint32_t order) {
        const uint32_t above = __byte_perm(bytes, 0x01010101 * HIGH, order);
        __half2        x;
        memcpy(&x, &above, sizeof(x));
        x = __hsub2(x, zero);
        uint32_t result;
        memcpy(&result, &x, sizeof(result));
        return result;
    };
    return make_uint2(two(0x4140), two(0x4342));
}

// Blocks of 32 quants after a half that is their scale.
template <cache_type TYPE> struct quantised_tiles {
    using element                      = __half;
    static constexpr int  PLANES       = 1;
    static constexpr bool FACTORS      = true;
    static constexpr int  QUANT_BITS   = TYPE == cache_type::q8_0 ? 7 : 3;
    static constexpr int  BLOCK_BYTES  = 2 + (TYPE == cache_type::q8_0 ? FACTOR_SPAN : FACTOR_SPAN / 2);
    static constexpr int  ROW_BYTES    = N_FACTORS * BLOCK_BYTES;
    static constexpr int  TILE_BYTES   = TILE_VALUES * sizeof(element);
    static constexpr int  FACTOR_BYTES = N_FACTORS * TILE_KEYS * sizeof(__half);
    static constexpr int  UNIT_BYTES   = TILE_KEYS * sizeof(float);
    static constexpr int  RAW_BYTES    = TILE_KEYS * ROW_BYTES;
    static constexpr int  N_WARPS      = THREADS / WARP;
    static constexpr int  SMALLEST     = 127 - 24;  // the exponent of the smallest half
    static constexpr int  SHARED       = TILE_BYTES + FACTOR_BYTES + UNIT_BYTES + RAW_BYTES + N_WARPS * sizeof(int);
    static_assert(RAW_BYTES % 16 == 0 && SHARED % 16 == 0, "vectors of 16 bytes");
    static_assert(ROW_BYTES % 4 == 0 && BLOCK_BYTES % 4 == 2, "quants of every second block are 4-byte aligned");

    cache_rows rows;
    element *  tile_values;
    __half *   tile_factors;         // [N_FACTORS][TILE_KEYS]
    float *    units;                // [TILE_KEYS]
    char *     raw;                  // the raw rows, contiguous
    int *      exponents;            // the largest exponent of the units that each warp saw
    int        exponent = SMALLEST;  // the largest so far
    float      change   = 1.0f;

    __device__ quantised_tiles(char * shared, const cache_rows & rows) :
        rows(rows), tile_values(reinterpret_cast<element *>(shared)),
        tile_factors(reinterpret_cast<__half *>(shared + TILE_BYTES)),
        units(reinterpret_cast<float *>(shared + TILE_BYTES + FACTOR_BYTES)),
        raw(shared + TILE_BYTES + FACTOR_BYTES + UNIT_BYTES),
        exponents(reinterpret_cast<int *>(shared + TILE_BYTES + FACTOR_BYTES + UNIT_BYTES + RAW_BYTES)) {}

    __device__ void fetch(const key_tile & tile) {
        if (tile.visible == 0) {
            return;
        }
        const char * from  = rows.at(tile.key);
        const int    bytes = min(TILE_KEYS, rows.n_keys - tile.key) * ROW_BYTES;
        if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            share<RAW_BYTES / 16>([&](int i) {
                const int given = max(0, min(16, bytes - i * 16));
                copy_16_async(raw + i * 16, given > 0 ? from + i * 16 : from, given);
            });
        } else {
            for (int at = threadIdx.x * 4; at < bytes; at += THREADS * 4) {
                copy_4_async(raw + at, from + at);
            }
        }
    }

    __device__ void arrive(const key_tile & tile) {
        wait_copies();
        __syncthreads();
        // Eight lanes share a key: each unpacks eight quants of every second block, and reads up to three scales.
        constexpr int PIECES = FACTOR_SPAN / 8;
        constexpr int LANES  = 2 * PIECES;
        constexpr int PAIRS  = N_FACTORS / 2;
        constexpr int TURNS  = (PAIRS + PIECES - 1) / PIECES;
        static_assert(LANES * TILE_KEYS == THREADS);
        const int    key    = threadIdx.x / LANES;
        const int    odd    = threadIdx.x % LANES / PIECES;
        const int    piece  = threadIdx.x % PIECES;
        const char * blocks = raw + key * ROW_BYTES + odd * BLOCK_BYTES;

        const bool sees = tile.sees(key);
        float      scales[TURNS];
        int        mine = SMALLEST;
#pragma unroll
        for (int n = 0; n < TURNS; ++n) {
            const int pair = n * PIECES + piece;
            scales[n]      = 0.0f;
            if (pair < PAIRS && sees) {
                scales[n] = __half2float(*reinterpret_cast<const __half *>(blocks + pair * 2 * BLOCK_BYTES));
            }
            // scales of blocks that are key only do not have to be below 2 after the division, only finite halves
            mine = max(mine, exponent_of(scales[n]) - (pair < N_LATENT / FACTOR_SPAN / 2 ? 0 : 14));
        }
#pragma unroll
        for (int mask = LANES / 2; mask > 0; mask /= 2) {
            mine = max(mine, __shfl_xor_sync(ALL_LANES, mine, mask));
        }
#pragma unroll
        for (int n = 0; n < TURNS; ++n) {
            const int pair = n * PIECES + piece;
            if (pair < PAIRS) {
                tile_factors[(2 * pair + odd) * TILE_KEYS + key] = __float2half(scales[n] * power_of_two(254 - mine));
            }
        }
        if (threadIdx.x % LANES == 0) {
            units[key] = power_of_two(mine);
        }
        const int greatest = __reduce_max_sync(ALL_LANES, mine);
        if (threadIdx.x % WARP == 0) {
            exponents[threadIdx.x / WARP] = greatest;
        }
        element * to = tile_values + key * TILE_STRIDE + odd * FACTOR_SPAN;
#pragma unroll 3  // more would need more registers
        for (int i = 0; i < PAIRS; ++i) {
            unpack_eight(blocks + i * 2 * BLOCK_BYTES + 2, odd, piece, to + i * 2 * FACTOR_SPAN);
        }
        __syncthreads();
        const int before = exponent;
#pragma unroll
        for (int i = 0; i < N_WARPS; ++i) {
            exponent = max(exponent, exponents[i]);
        }
        change = power_of_two(max(127 + before - exponent, 1));
    }

    // Unpacks part `piece` of a block's quants to its values. Only those of odd blocks are 4-byte aligned: words around
    // the quants are loaded, and `order` selects four bytes of two of them.
    static __device__ __forceinline__ void unpack_eight(const char * codes, int odd, int piece, element * to) {
        const uint32_t * words = reinterpret_cast<const uint32_t *>(codes - 2 - 2 * odd);
        const uint32_t   order = odd ? 0x7654 : 0x5432;
        if constexpr (TYPE == cache_type::q8_0) {
            words += 2 * piece;
            const uint32_t middle = words[1];
            // with the sign inverted, signed bytes are 128 too large
            const uint2 a = bytes_to_halves<QUANT_BITS>(__byte_perm(words[0], middle, order) ^ 0x80808080);
            const uint2 b = bytes_to_halves<QUANT_BITS>(__byte_perm(middle, words[2], order) ^ 0x80808080);
            *reinterpret_cast<uint4 *>(to + piece * 8) = make_uint4(a.x, a.y, b.x, b.y);
        } else {
            // value j in the low half of byte j, value j + 16 in the high half
            const uint32_t x = __byte_perm(words[piece], words[piece + 1], order);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                *reinterpret_cast<uint2 *>(to + half * FACTOR_SPAN / 2 + piece * 4) =
                    bytes_to_halves<QUANT_BITS>(x >> 4 * half & 0x0f0f0f0f);
            }
        }
    }

    __device__ const element * plane(int) const { return tile_values; }

    // Factors of keys i (even) and i + 1, as halves and as floats.
    __device__ uint32_t half_factors(int block, int i) const {
        return *reinterpret_cast<const uint32_t *>(tile_factors + block * TILE_KEYS + i);
    }

    __device__ float2 factors(int block, int i) const {
        const uint32_t two = half_factors(block, i);
        return make_float2(first_of<__half>(two), second_of<__half>(two));
    }

    __device__ float key_unit(int i) const { return units[i]; }

    __device__ float key_weight(int i) const { return units[i] * power_of_two(254 - exponent); }

    __device__ float inverse_unit() const { return power_of_two(exponent); }

    __device__ float unit_change() const { return change; }
};

// 32-bit values as sums of two bf16.
struct split_tiles : no_factors {
    using element               = __nv_bfloat16;
    static constexpr int PLANES = 2;
    static constexpr int SHARED = PLANES * TILE_VALUES * sizeof(element);

    cache_rows rows;
    element *  tile_values;

    __device__ split_tiles(char * shared, const cache_rows & rows) :
        rows(rows), tile_values(reinterpret_cast<element *>(shared)) {}

    __device__ void fetch(const key_tile &) {}

    __device__ void arrive(const key_tile & tile) {
        constexpr int CHUNKS = N_CACHE / 4;
        __syncthreads();
        share<TILE_KEYS * CHUNKS>([&](int i) {
            const int    key  = i / CHUNKS;
            const int    d    = i % CHUNKS * 4;
            const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const float4 x =
                tile.sees(key) ? *reinterpret_cast<const float4 *>(rows.at(tile.key + key) + d * sizeof(float)) : zero;
            const terms<2> xy = split<element, 2>(x.x, x.y);
            const terms<2> zw = split<element, 2>(x.z, x.w);
#pragma unroll
            for (int p = 0; p < PLANES; ++p) {
                *reinterpret_cast<uint2 *>(tile_values + p * TILE_VALUES + key * TILE_STRIDE + d) =
                    make_uint2(xy.term[p], zw.term[p]);
            }
        });
        __syncthreads();
    }

    __device__ const element * plane(int p) const { return tile_values + p * TILE_VALUES; }
};

template <cache_type TYPE> struct tiles_of {
    using type = quantised_tiles<TYPE>;
};

template <> struct tiles_of<cache_type::f32> {
    using type = split_tiles;
};

template <> struct tiles_of<cache_type::f16> {
    using type = plain_tiles<__half>;
};

template <> struct tiles_of<cache_type::bf16> {
    using type = plain_tiles<__nv_bfloat16>;
};

template <cache_type TYPE> using cache_tiles = typename tiles_of<TYPE>::type;

}  // namespace latent_cuda
