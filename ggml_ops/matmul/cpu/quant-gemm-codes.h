#pragma once

// Unpacks quants in vectors of bytes: functions common to unpacking into panels and dot products of rows.

#include "quant-gemm-panel.h"

#include <type_traits>

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

template <typename T, typename... Others> constexpr bool IS_ONE_OF = (std::is_same_v<T, Others> || ...);

// The values of the nibbles of IQ4_NL and IQ4_XS, plus an offset of 128 where bytes are unsigned.
inline Ints iq4_values(Ints nibbles) {
    constexpr int     FLIP       = SIGNED_BYTES ? 0x80 : 0;
    constexpr uint8_t VALUES[16] = { 1 ^ FLIP,   24 ^ FLIP,  45 ^ FLIP,  63 ^ FLIP,  79 ^ FLIP,  93 ^ FLIP,
                                     106 ^ FLIP, 118 ^ FLIP, 129 ^ FLIP, 141 ^ FLIP, 153 ^ FLIP, 166 ^ FLIP,
                                     181 ^ FLIP, 197 ^ FLIP, 217 ^ FLIP, 241 ^ FLIP };
    return look_up(table_of_16(VALUES), nibbles);
}

// Twice the values of the nibbles of MXFP4, plus an offset of 12.
inline Ints mxfp4_values(Ints nibbles) {
    constexpr uint8_t VALUES[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };
    return look_up(table_of_16(VALUES), nibbles);
}

// Byte i of every lane, repeated in all of its bytes.
inline Ints spread_byte(Ints x, int i) {
    constexpr uint8_t FIRST[16] = { 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12 };
    return look_up(x, add_8(table_of_16(FIRST), bytes(i)));
}

#endif

#if QUANT_GEMM_AVX512

inline __m512i halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Half of the scales of MXFP4, which are powers of two, from their exponents.
inline __m512 half_powers(__m512i e) {
    const __m512i   normal    = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __m512i   subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    const __mmask16 small     = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, small, subnormal));
}

#endif

}  // namespace quant_gemm
