#pragma once

// AVX-VNNI's vpdpbusd and vpdpwssd in AVX2, so that a processor without AVX-VNNI can run the branches of ggml_ops for it:
// tests/platforms/test_other_processors.py. The compiler includes this file first (-include), with the flags of haswell.
// Semantics: VPDPBUSD and VPDPWSSD in Intel's Software Developer's Manual. Not tested: what compilers make of it, and speed.

#include <immintrin.h>

#define __AVXVNNI__ 1

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd_avx
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd_avx

// sums + the four products of unsigned bytes of a and signed bytes of b in each lane of 32 bits. The test looks for this
// name in the library.
__attribute__((noinline, unused)) static __m256i emulated_dpbusd_avx(__m256i sums, __m256i a, __m256i b) {
    const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
    const __m256i a_odd  = _mm256_srli_epi16(a, 8);
    const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
    const __m256i b_odd  = _mm256_srai_epi16(b, 8);
    const __m256i even   = _mm256_madd_epi16(a_even, b_even);
    const __m256i odd    = _mm256_madd_epi16(a_odd, b_odd);
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}

// sums + the two products of signed words of a and b in each lane of 32 bits.
__attribute__((noinline, unused)) static __m256i emulated_dpwssd_avx(__m256i sums, __m256i a, __m256i b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}
