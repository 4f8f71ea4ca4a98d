#pragma once

// Intel's AMX: eight tile registers of up to 16 rows of 64 bytes. One instruction multiplies a tile A (rows: columns of
// activations) by a tile B (in a row, four bytes or two BF16 numbers of each of 16 rows of weights) and adds the products
// to a tile C. The instructions are assembly, so every build for AVX-512 has them; has_tiles() asks the CPU.

#include "quant-gemm-vector.h"

#include <cstddef>
#include <cstdint>

namespace quant_gemm {

// Whether the CPU multiplies tiles of bytes and of BF16, Linux lets this process do it, and KIMI_AMX is not 0.
bool has_tiles();

#if QUANT_GEMM_AMX

// Registers: for sums, activations, weights; and two for keep_tiles_awake().
enum TileRegister { SUMS = 0, ACTS = 4, WEIGHTS = 5, ONE_SUM = 6, ONE_ROW = 7 };

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
    uint8_t  palette       = 1;
    uint8_t  start_row     = 0;
    uint8_t  reserved[14]  = {};
    uint16_t row_bytes[16] = {};
    uint8_t  rows[16]      = {};
};

static_assert(sizeof(TileShapes) == 64, "as LDTILECFG reads it");

#if defined(AMX_EMULATED)

inline void set_tile_shapes(const TileShapes & shapes) {
    _tile_loadconfig(&shapes);
}

inline void release_tiles() {
    _tile_release();
}

template <int T> inline void clear_tile() {
    _tile_zero(T);
}

template <int T> inline void load_tile(const void * from, size_t stride) {
    _tile_loadd(T, from, stride);
}

template <int T> inline void store_tile(void * to, size_t stride) {
    _tile_stored(T, to, stride);
}

template <int C, int A, int B> inline void add_signed() {
    _tile_dpbssd(C, A, B);
}

template <int C, int A, int B> inline void add_unsigned() {
    _tile_dpbsud(C, A, B);
}

template <int C, int A, int B> inline void add_bf16() {
    _tile_dpbf16ps(C, A, B);
}

#else

inline void set_tile_shapes(const TileShapes & shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}

inline void release_tiles() {
    asm volatile("tilerelease");
}

template <int T> inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int T> inline void load_tile(const void * from, size_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}

template <int T> inline void store_tile(void * to, size_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}

// C += A * B: signed bytes, ...
template <int C, int A, int B> inline void add_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// ... those of B unsigned, ...
template <int C, int A, int B> inline void add_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// ... or BF16 numbers and float32 sums.
template <int C, int A, int B> inline void add_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

// Executes a product of one row. On a Xeon "Emerald Rapids" the unit that multiplies tiles sleeps after about 0.3 us
// without a product, and the next one takes 0.25 us longer.
inline void keep_tiles_awake() {
    add_signed<ONE_SUM, ONE_ROW, WEIGHTS>();
}

#endif

}  // namespace quant_gemm
