#pragma once

// Taking stored codes apart, in vectors of bytes: what unpacking into panels and dot products of rows share.

#include "quant-gemm-panel.h"

namespace quant_gemm {

#if QUANT_GEMM_VNNI

inline __m512i bytes(int x) {
    return _mm512_set1_epi8((char) x);
}

inline __m512i halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m512i low_nibbles(__m512i x) {
    return _mm512_and_si512(x, bytes(0x0f));
}

inline __m512i high_nibbles(__m512i x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), bytes(0x0f));
}

// What the nibbles of IQ4_NL and IQ4_XS stand for, plus an offset of 128.
inline __m512i iq4_values(__m512i nibbles) {
    const __m128i values = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char) 129, (char) 141, (char) 153,
                                         (char) 166, (char) 181, (char) 197, (char) 217, (char) 241);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

// What the nibbles of MXFP4 stand for, twice, plus an offset of 12.
inline __m512i mxfp4_values(__m512i nibbles) {
    const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

// Values of Q3_K times their scales, -4 .. 3 times -32 .. 31, plus an offset of 124, which are 0 .. 252: the magnitude of the
// scale times c plus a rest, all of them bytes; c is value + 4, or 3 - value where the scale is negative.
struct ScalesQ3K {
    __m512i magnitudes;
    __m512i flips;  // 7 where the scale is negative
    __m512i rests;

    explicit ScalesQ3K(__m512i scales) {
        const __mmask64 negative = _mm512_movepi8_mask(scales);
        magnitudes               = _mm512_abs_epi8(scales);
        const __m512i three      = _mm512_add_epi8(magnitudes, _mm512_add_epi8(magnitudes, magnitudes));
        flips                    = _mm512_maskz_mov_epi8(negative, bytes(7));
        rests                    = _mm512_sub_epi8(bytes(124), three);
        rests                    = _mm512_mask_sub_epi8(rests, (__mmask64) ~negative, rests, magnitudes);
    }
};

// c of values whose lower two bits are those of pairs, whose third is that of thirds.
inline __m512i codes_q3_K(__m512i pairs, __m512i thirds, __m512i flips) {
    const __m512i three_bits = _mm512_ternarylogic_epi32(bytes(3), pairs, thirds, 0xca);  // the first chooses
    return _mm512_ternarylogic_epi32(three_bits, bytes(7), flips, 0x6a);                  // (first & second) ^ third
}

// Four blocks' scales and minima of 8 interleaved rows (Q4_K): 48 bytes become 8 bytes of scales and 8 of minima for each block.
inline __m512i six_bit_numbers(const char * p) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
    v         = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 12)), 1);
    v         = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 24)), 2);
    v         = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 36)), 3);
    // words 0, 1, 2 of 12 bytes: six bits of four scales, of four minima, and four bits of four more of both, whose
    // upper pairs of bits stand above the six of words 0 and 1
    const __m512i low   = _mm512_shuffle_epi32(v, (_MM_PERM_ENUM) 0x98);  // words 0 2 1 2
    const __m512i high  = _mm512_srli_epi16(v, 4);
    const __m512i parts = _mm512_mask_shuffle_epi32(low, 0x8888, high, (_MM_PERM_ENUM) 0x98);
    const __m512i kept  = _mm512_and_si512(parts, _mm512_set4_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
    const __m512i pairs = _mm512_shuffle_epi32(_mm512_srli_epi16(v, 2), (_MM_PERM_ENUM) 0x50);  // words 0 0 1 1
    return _mm512_or_si512(kept, _mm512_and_si512(pairs, _mm512_set4_epi32(0x30303030, 0, 0x30303030, 0)));
}

#endif

}  // namespace quant_gemm
