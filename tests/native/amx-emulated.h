#pragma once

// Intel's AMX in plain C++, so that a processor without it can run the code for it in ggml_ops
// (tests/platforms/test_other_processors.py) and in upstream (amx-test.cpp). Each intrinsic takes the place of the one in
// immintrin.h, which is included here.
//
// Semantics: TILELOADD, TDPBSSD, TDPBSUD and TDPBF16PS in Intel's "Architecture Instruction Set Extensions". What a processor
// refuses ends the program: shapes that do not fit, and registers that are used twice.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define AMX_EMULATED 1

namespace amx {

// A float without its subnormal values.
inline float flushed(float x) {
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t) x << 16;
    float          result;
    memcpy(&result, &bits, sizeof(result));
    return flushed(result);
}

struct Tile {
    int    rows, bytes;
    int8_t data[16][64];

    template <typename T> T get(int row, int i) const {
        T x;
        memcpy(&x, data[row] + i * sizeof(x), sizeof(x));
        return x;
    }

    template <typename T> void set(int row, int i, T x) { memcpy(data[row] + i * sizeof(x), &x, sizeof(x)); }
};

inline thread_local Tile tiles[8];

inline void configure(const void * config) {  // 64 bytes: at 16 the tiles' bytes per row, at 48 their rows
    for (int i = 0; i < 8; i++) {
        uint16_t bytes;
        memcpy(&bytes, (const char *) config + 16 + 2 * i, 2);
        tiles[i] = { ((const uint8_t *) config)[48 + i], bytes, {} };
    }
}

inline void release() {
    memset(tiles, 0, sizeof(tiles));
}

inline Tile & used(int tile) {
    if (tiles[tile].rows == 0) {
        abort();
    }
    return tiles[tile];
}

inline void load(int tile, const void * from, size_t stride) {
    Tile & to = used(tile);
    for (int row = 0; row < to.rows; row++) {
        memcpy(to.data[row], (const char *) from + row * stride, to.bytes);
    }
}

inline void store(int tile, void * to, size_t stride) {
    const Tile & from = used(tile);
    for (int row = 0; row < from.rows; row++) {
        memcpy((char *) to + row * stride, from.data[row], from.bytes);
    }
}

inline void clear(int tile) {
    memset(used(tile).data, 0, sizeof(tiles[tile].data));
}

inline void check_shapes(int sums, int a, int b) {
    const Tile &s = used(sums), &x = used(a), &y = used(b);
    const bool  distinct = sums != a && sums != b && a != b;
    if (!distinct || s.rows != x.rows || x.bytes / 4 != y.rows || s.bytes != y.bytes || s.bytes % 4 != 0) {
        abort();
    }
}

// Sums of products of bytes, those of b of type B.
template <typename B> inline void add_bytes(int sums, int a, int b) {
    check_shapes(sums, a, b);
    for (int row = 0; row < tiles[sums].rows; row++) {
        for (int column = 0; column < tiles[sums].bytes / 4; column++) {
            uint32_t sum = tiles[sums].get<uint32_t>(row, column);
            for (int k = 0; k < tiles[a].bytes; k++) {
                sum += tiles[a].get<int8_t>(row, k) * (B) tiles[b].data[k / 4][4 * column + k % 4];
            }
            tiles[sums].set(row, column, sum);
        }
    }
}

inline void add_bf16(int sums, int a, int b) {
    check_shapes(sums, a, b);
    for (int row = 0; row < tiles[sums].rows; row++) {
        for (int column = 0; column < tiles[sums].bytes / 4; column++) {
            float parts[2] = {};  // of even and odd numbers
            for (int k = 0; k < tiles[a].bytes / 2; k++) {
                const float x = from_bf16(tiles[a].get<uint16_t>(row, k));
                const float y = from_bf16(tiles[b].get<uint16_t>(k / 2, 2 * column + k % 2));
                parts[k % 2]  = flushed(std::fma(x, y, parts[k % 2]));
            }
            const float sum = flushed(parts[0] + parts[1]);
            tiles[sums].set(row, column, flushed(flushed(tiles[sums].get<float>(row, column)) + sum));
        }
    }
}

}  // namespace amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config)        amx::configure(config)
#define _tile_release()                 amx::release()
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride)  amx::store(tile, to, stride)
#define _tile_zero(tile)                amx::clear(tile)
#define _tile_dpbssd(sums, a, b)        amx::add_bytes<int8_t>(sums, a, b)
#define _tile_dpbsud(sums, a, b)        amx::add_bytes<uint8_t>(sums, a, b)
#define _tile_dpbf16ps(sums, a, b)      amx::add_bf16(sums, a, b)
