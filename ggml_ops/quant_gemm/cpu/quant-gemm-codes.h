#pragma once

// Taking stored codes apart, in vectors of bytes: what unpacking into panels and dot products of rows share.

#include "quant-gemm-panel.h"

namespace quant_gemm {

#if QUANT_GEMM_VNNI

inline __m512i bytes(int x) {
    return _mm512_set1_epi8((char) x);
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

#endif

}  // namespace quant_gemm
