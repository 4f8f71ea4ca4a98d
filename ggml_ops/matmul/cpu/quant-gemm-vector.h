#pragma once

// Vectors of 32-bit lanes, for the matmul of quantized weights. Each lane holds one row of weights. The rest of the
// folder is written in these names, so a new instruction set is one more branch here:
//   AVX-512 VNNI (16 lanes), AVX2 with or without AVX-VNNI (8 lanes), NEON with dot products, with or without i8mm
//   (4 lanes).
// Without any of them QUANT_GEMM_KERNELS is 0, and upstream's matmul runs.

#include "ggml-cpu-impl.h"

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) &&                 \
    defined(__AVX512VNNI__)
#define QUANT_GEMM_AVX512 1
#if defined(__AVX512BF16__)
#define QUANT_GEMM_BF16 1  // products of BF16 pairs
#endif
#if defined(AMX_EMULATED) ||                                                                                           \
    (defined(__linux__) && defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11))
#define QUANT_GEMM_AMX 1  // tile registers, on CPUs that have them
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__GNUC__)
#define QUANT_GEMM_AVX2 1
#if defined(__AVXVNNI__)
#define QUANT_GEMM_AVX_VNNI 1
#endif
#endif

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define QUANT_GEMM_NEON 1
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define QUANT_GEMM_I8MM 1  // products of two columns with two rows of 8 values
#endif
#endif

#if !defined(QUANT_GEMM_AVX512)
#define QUANT_GEMM_AVX512 0
#endif
#if !defined(QUANT_GEMM_AVX2)
#define QUANT_GEMM_AVX2 0
#endif
#if !defined(QUANT_GEMM_NEON)
#define QUANT_GEMM_NEON 0
#endif
#if !defined(QUANT_GEMM_I8MM)
#define QUANT_GEMM_I8MM 0
#endif
#if !defined(QUANT_GEMM_AMX)
#define QUANT_GEMM_AMX 0
#endif
#if !defined(QUANT_GEMM_BF16)
#define QUANT_GEMM_BF16 0
#endif
#if QUANT_GEMM_AVX512 || QUANT_GEMM_AVX2 || QUANT_GEMM_NEON
#define QUANT_GEMM_KERNELS 1
// GCC before 13 warns about the undefined registers in its own AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if QUANT_GEMM_NEON
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#endif

namespace quant_gemm {

// What the quants of a type can be. It decides how many of their products with activations (at most 127) are summed in
// 16 bits where the instruction set multiplies bytes to 16 bits (AVX2).
enum class Codes {
    below_8,
    below_16,
    below_32,
    below_64,
    bytes,  // unsigned, or signed where SIGNED_BYTES
};

#if QUANT_GEMM_AVX512

using Ints   = __m512i;
using Floats = __m512;

constexpr int LANES = 16;

inline Ints in_order(Ints x) {
    return x;
}

// clang-format off

inline Ints   ints(int32_t x)                    { return _mm512_set1_epi32(x); }
inline Ints   bytes(int x)                       { return _mm512_set1_epi8((char) x); }
inline Floats floats(float x)                    { return _mm512_set1_ps(x); }
inline Ints   load_ints(const void * p)          { return _mm512_load_si512(p); }
inline void   store_ints(void * p, Ints x)       { _mm512_store_si512(p, x); }
inline Floats load_floats(const float * p)       { return _mm512_loadu_ps(p); }
inline void   store_floats(float * p, Floats x)  { _mm512_storeu_ps(p, x); }

// integers of 32, 16 or 8 bits
inline Ints add_32(Ints a, Ints b)               { return _mm512_add_epi32(a, b); }
inline Ints sub_32(Ints a, Ints b)               { return _mm512_sub_epi32(a, b); }
inline Ints mul_32(Ints a, Ints b)               { return _mm512_mullo_epi32(a, b); }
inline Ints add_8(Ints a, Ints b)                { return _mm512_add_epi8(a, b); }
inline Ints sub_8(Ints a, Ints b)                { return _mm512_sub_epi8(a, b); }
inline Ints left_32(Ints x, int n)               { return _mm512_slli_epi32(x, n); }
inline Ints right_32(Ints x, int n)              { return _mm512_srli_epi32(x, n); }
inline Ints right_signed_32(Ints x, int n)       { return _mm512_srai_epi32(x, n); }
inline Ints left_16(Ints x, int n)               { return _mm512_slli_epi16(x, n); }
inline Ints right_16(Ints x, int n)              { return _mm512_srli_epi16(x, n); }
inline Ints right_signed_16(Ints x, int n)       { return _mm512_srai_epi16(x, n); }

// the lower or upper two words of a and b in turns, or their lower or upper pairs of words: in each 128 bits for itself
inline Ints lower_words(Ints a, Ints b)          { return _mm512_unpacklo_epi32(a, b); }
inline Ints upper_words(Ints a, Ints b)          { return _mm512_unpackhi_epi32(a, b); }
inline Ints lower_pairs(Ints a, Ints b)          { return _mm512_unpacklo_epi64(a, b); }
inline Ints upper_pairs(Ints a, Ints b)          { return _mm512_unpackhi_epi64(a, b); }

// bytes of a table of 16, or of each 16 bytes
inline Ints table_of_16(const uint8_t (&t)[16])  { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) t)); }
inline Ints look_up(Ints table, Ints indices)    { return _mm512_shuffle_epi8(table, indices); }

// those bytes of `value` where the bits are set in x
inline Ints where_set(Ints x, Ints bits, Ints value) {
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(x, bits), value);
}

// sums of pairs of 16-bit products
inline Ints add_pairs(Ints sum, Ints a, Ints b)  { return _mm512_dpwssd_epi32(sum, a, b); }

inline Floats to_floats(Ints x)                  { return _mm512_cvtepi32_ps(x); }
inline Ints   to_ints(Floats x)                  { return _mm512_cvtps_epi32(x); }
inline Floats add(Floats a, Floats b)            { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b)            { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c)  { return _mm512_fmadd_ps(a, b, c); }
inline Floats abs(Floats x)                      { return _mm512_abs_ps(x); }
inline Floats max(Floats a, Floats b)            { return _mm512_max_ps(a, b); }
inline float  max_lane(Floats x)                 { return _mm512_reduce_max_ps(x); }
inline float  sum_lanes(Floats x)                { return _mm512_reduce_add_ps(x); }
inline int    sum_lanes(Ints x)                  { return _mm512_reduce_add_epi32(x); }
inline unsigned lanes_equal(Floats a, Floats b)  { return _mm512_cmpeq_ps_mask(a, b); }

inline Floats from_halves(const void * p)        { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline Floats rounded_to_half(Floats x)          { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void   store_bytes(int8_t * p, Ints x)    { _mm_storeu_si128((__m128i *) p, _mm512_cvtsepi32_epi8(x)); }

// clang-format on

// sum + (a * b - c) * d, rounded twice
inline Floats add_difference(Floats sum, Floats a, Floats b, Floats c, Floats d) {
    return _mm512_fmadd_ps(_mm512_fmsub_ps(a, b, c), d, sum);
}

// two 16-bit numbers in each lane: all first ones, then all second ones
inline Ints halves_apart(Ints x) {
    alignas(64) static const uint16_t order[32] = { 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31 };
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), x);
}

// BF16 numbers in a row
inline Floats from_bf16(const void * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}

// the F16 number in the lower half of each lane
inline Floats lower_half(Ints x) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
}

#elif QUANT_GEMM_AVX2

using Ints   = __m256i;
using Floats = __m256;

constexpr int LANES = 8;

// GCC reorders additions of integers, here to compute all products first, which do not fit in 16 registers. It also reads
// what it has loaded again for each use.
inline Ints in_order(Ints x) {
    asm("" : "+x"(x));
    return x;
}

// clang-format off

inline Ints   ints(int32_t x)                    { return _mm256_set1_epi32(x); }
inline Ints   bytes(int x)                       { return _mm256_set1_epi8((char) x); }
inline Floats floats(float x)                    { return _mm256_set1_ps(x); }
inline Ints   load_ints(const void * p)          { return _mm256_load_si256((const __m256i *) p); }
inline void   store_ints(void * p, Ints x)       { _mm256_store_si256((__m256i *) p, x); }
inline Floats load_floats(const float * p)       { return _mm256_loadu_ps(p); }
inline void   store_floats(float * p, Floats x)  { _mm256_storeu_ps(p, x); }

inline Ints add_32(Ints a, Ints b)               { return _mm256_add_epi32(a, b); }
inline Ints sub_32(Ints a, Ints b)               { return _mm256_sub_epi32(a, b); }
inline Ints mul_32(Ints a, Ints b)               { return _mm256_mullo_epi32(a, b); }
inline Ints add_8(Ints a, Ints b)                { return _mm256_add_epi8(a, b); }
inline Ints sub_8(Ints a, Ints b)                { return _mm256_sub_epi8(a, b); }
inline Ints left_32(Ints x, int n)               { return _mm256_slli_epi32(x, n); }
inline Ints right_32(Ints x, int n)              { return _mm256_srli_epi32(x, n); }
inline Ints right_signed_32(Ints x, int n)       { return _mm256_srai_epi32(x, n); }
inline Ints left_16(Ints x, int n)               { return _mm256_slli_epi16(x, n); }
inline Ints right_16(Ints x, int n)              { return _mm256_srli_epi16(x, n); }
inline Ints right_signed_16(Ints x, int n)       { return _mm256_srai_epi16(x, n); }

inline Ints lower_words(Ints a, Ints b)          { return _mm256_unpacklo_epi32(a, b); }
inline Ints upper_words(Ints a, Ints b)          { return _mm256_unpackhi_epi32(a, b); }
inline Ints lower_pairs(Ints a, Ints b)          { return _mm256_unpacklo_epi64(a, b); }
inline Ints upper_pairs(Ints a, Ints b)          { return _mm256_unpackhi_epi64(a, b); }

inline Ints table_of_16(const uint8_t (&t)[16])  { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) t)); }
inline Ints look_up(Ints table, Ints indices)    { return _mm256_shuffle_epi8(table, indices); }

inline Ints where_set(Ints x, Ints bits, Ints value) {
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(x, bits), bits), value);
}

inline Ints add_pairs(Ints sum, Ints a, Ints b)  { return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b))); }

inline Floats to_floats(Ints x)                  { return _mm256_cvtepi32_ps(x); }
inline Ints   to_ints(Floats x)                  { return _mm256_cvtps_epi32(x); }
inline Floats add(Floats a, Floats b)            { return _mm256_add_ps(a, b); }
inline Floats mul(Floats a, Floats b)            { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c)  { return _mm256_fmadd_ps(a, b, c); }
inline Floats abs(Floats x)                      { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats max(Floats a, Floats b)            { return _mm256_max_ps(a, b); }
inline unsigned lanes_equal(Floats a, Floats b)  { return (unsigned) _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }

inline Floats from_halves(const void * p)        { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline Floats rounded_to_half(Floats x)          { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

// clang-format on

// sum + (a * b - c) * d, rounded twice
inline Floats add_difference(Floats sum, Floats a, Floats b, Floats c, Floats d) {
    return _mm256_fmadd_ps(_mm256_fmsub_ps(a, b, c), d, sum);
}

inline float max_lane(Floats x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two  = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline float sum_lanes(Floats x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline int sum_lanes(Ints x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two  = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

inline void store_bytes(int8_t * p, Ints x) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(halves, halves));
}

inline Ints halves_apart(Ints x) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12,
                                           13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, order), 0xd8);
}

inline Floats from_bf16(const void * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}

inline Floats lower_half(Ints x) {
    const __m256i low    = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_packus_epi32(low, low);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

#elif QUANT_GEMM_NEON

using Ints   = int32x4_t;
using Floats = float32x4_t;

constexpr int LANES = 4;

inline Ints in_order(Ints x) {
    asm volatile("" : "+w"(x));
    return x;
}

// Zero in a register of its own. Otherwise GCC 12 sets one register to zero and copies it to each sum.
inline Ints zero() {
    Ints x;
    asm volatile("movi %0.4s, #0" : "=w"(x));
    return x;
}

// Makes x depend on y. Otherwise GCC copies x before it adds to it.
inline void keep_until(Ints (&x)[4], Ints y) {
    asm("" : "+w"(x[0]), "+w"(x[1]), "+w"(x[2]), "+w"(x[3]) : "w"(y));
}

inline Ints from_8(int8x16_t x) {
    return vreinterpretq_s32_s8(x);
}

inline Ints from_16(uint16x8_t x) {
    return vreinterpretq_s32_u16(x);
}

inline Ints from_32(uint32x4_t x) {
    return vreinterpretq_s32_u32(x);
}

inline Ints from_64(uint64_t x) {  // twice
    return vreinterpretq_s32_u64(vdupq_n_u64(x));
}

inline int8x16_t to_8(Ints x) {
    return vreinterpretq_s8_s32(x);
}

inline uint8x16_t to_unsigned_8(Ints x) {
    return vreinterpretq_u8_s32(x);
}

inline uint16x8_t to_16(Ints x) {
    return vreinterpretq_u16_s32(x);
}

inline uint32x4_t to_32(Ints x) {
    return vreinterpretq_u32_s32(x);
}

// clang-format off

inline Ints   ints(int32_t x)                    { return vdupq_n_s32(x); }
inline Ints   bytes(int x)                       { return from_8(vdupq_n_s8((int8_t) x)); }
inline Floats floats(float x)                    { return vdupq_n_f32(x); }
inline Ints   load_ints(const void * p)          { return vld1q_s32((const int32_t *) p); }
inline void   store_ints(void * p, Ints x)       { vst1q_s32((int32_t *) p, x); }
inline Floats load_floats(const float * p)       { return vld1q_f32(p); }
inline void   store_floats(float * p, Floats x)  { vst1q_f32(p, x); }

inline Ints add_32(Ints a, Ints b)               { return vaddq_s32(a, b); }
inline Ints sub_32(Ints a, Ints b)               { return vsubq_s32(a, b); }
inline Ints mul_32(Ints a, Ints b)               { return vmulq_s32(a, b); }
inline Ints add_8(Ints a, Ints b)                { return from_8(vaddq_s8(to_8(a), to_8(b))); }
inline Ints add_16(Ints x, int n)                { return from_16(vaddq_u16(to_16(x), vdupq_n_u16((uint16_t) n))); }
inline Ints sub_8(Ints a, Ints b)                { return from_8(vsubq_s8(to_8(a), to_8(b))); }
inline Ints left_32(Ints x, int n)               { return vshlq_s32(x, vdupq_n_s32(n)); }
inline Ints right_32(Ints x, int n)              { return from_32(vshlq_u32(to_32(x), vdupq_n_s32(-n))); }
inline Ints right_signed_32(Ints x, int n)       { return vshlq_s32(x, vdupq_n_s32(-n)); }
inline Ints left_16(Ints x, int n)               { return from_16(vshlq_u16(to_16(x), vdupq_n_s16((int16_t) n))); }
inline Ints right_16(Ints x, int n)              { return from_16(vshlq_u16(to_16(x), vdupq_n_s16((int16_t) -n))); }
inline Ints right_signed_16(Ints x, int n)       { return vreinterpretq_s32_s16(vshlq_s16(vreinterpretq_s16_s32(x), vdupq_n_s16((int16_t) -n))); }

inline Ints table_of_16(const uint8_t (&t)[16])  { return vreinterpretq_s32_u8(vld1q_u8(t)); }
inline Ints look_up(Ints table, Ints indices)    { return from_8(vqtbl1q_s8(to_8(table), to_unsigned_8(indices))); }

inline Ints where_set(Ints x, Ints bits, Ints value) {
    return vreinterpretq_s32_u8(vtstq_u8(to_unsigned_8(x), to_unsigned_8(bits))) & value;
}

inline Floats to_floats(Ints x)                  { return vcvtq_f32_s32(x); }
inline Ints   to_ints(Floats x)                  { return vcvtnq_s32_f32(x); }
inline Floats add(Floats a, Floats b)            { return vaddq_f32(a, b); }
inline Floats mul(Floats a, Floats b)            { return vmulq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c)  { return vfmaq_f32(c, a, b); }
inline Floats abs(Floats x)                      { return vabsq_f32(x); }
inline Floats max(Floats a, Floats b)            { return vmaxnmq_f32(a, b); }
inline float  max_lane(Floats x)                 { return vmaxnmvq_f32(x); }
inline float  sum_lanes(Floats x)                { return vaddvq_f32(x); }
inline int    sum_lanes(Ints x)                  { return vaddvq_s32(x); }

inline Floats from_halves(const void * p)        { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p))); }
inline Floats rounded_to_half(Floats x)          { return vcvt_f32_f16(vcvt_f16_f32(x)); }

// clang-format on

// sum + (a * b - c) * d, rounded twice
inline Floats add_difference(Floats sum, Floats a, Floats b, Floats c, Floats d) {
    return vfmsq_f32(sum, vfmsq_f32(c, a, b), d);
}

// Each vector has the sums of two rows; the two numbers of a pair are added in different lanes.
struct PairSums {
    Ints low;
    Ints high;
};

inline PairSums add_pairs(const PairSums & sums, Ints a, Ints b) {
    const int16x8_t x = vreinterpretq_s16_s32(a);
    const int16x8_t y = vreinterpretq_s16_s32(b);
    return { vmlal_s16(sums.low, vget_low_s16(x), vget_low_s16(y)), vmlal_high_s16(sums.high, x, y) };
}

inline Ints total_of_pairs(const PairSums & sums) {
    return vpaddq_s32(sums.low, sums.high);
}

inline unsigned lanes_equal(Floats a, Floats b) {
    const uint32x4_t bit = { 1, 2, 4, 8 };
    return vaddvq_u32(vandq_u32(vceqq_f32(a, b), bit));
}

inline void store_bytes(int8_t * p, Ints x) {
    const int16x4_t halves = vqmovn_s32(x);
    const int8x8_t  quants = vqmovn_s16(vcombine_s16(halves, halves));
    vst1_lane_s32((int32_t *) p, vreinterpret_s32_s8(quants), 0);
}

inline Ints halves_apart(Ints x) {
    return from_16(vuzp1q_u16(to_16(x), vextq_u16(to_16(x), to_16(x), 1)));
}

// The low nibbles of x, below the low nibbles of `upper`, ...
inline Ints join_low_nibbles(Ints x, Ints upper) {
    return vreinterpretq_s32_u8(vsliq_n_u8(to_unsigned_8(x), to_unsigned_8(upper), 4));
}

// ... and the high nibbles of x, below the high nibbles of `upper`.
inline Ints join_high_nibbles(Ints x, Ints upper) {
    return vreinterpretq_s32_u8(vsriq_n_u8(to_unsigned_8(upper), to_unsigned_8(x), 4));
}

// Shifts bytes to the left by `even` and `odd` in turns, to the right if negative.
inline Ints shifted_bytes(Ints x, int even, int odd) {
    const int16x8_t both = vdupq_n_s16((int16_t) ((even & 0xff) | odd * 256));
    return vreinterpretq_s32_u8(vshlq_u8(to_unsigned_8(x), vreinterpretq_s8_s16(both)));
}

inline Floats from_bf16(const void * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}

inline Floats lower_half(Ints x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(to_32(x))));
}

// the lower halves of two vectors, and the upper ones
inline Ints lower_halves(Ints a, Ints b) {
    return vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

inline Ints upper_halves(Ints a, Ints b) {
    return vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// x, 0, 0, 0
inline Ints first_lane(int32_t x) {
    return vcombine_s32(vcreate_s32((uint32_t) x), vcreate_s32(0));
}

// The lower bytes of the 16-bit numbers of two vectors, and the upper ones.
inline Ints lower_bytes(Ints a, Ints b) {
    return from_8(vuzp1q_s8(to_8(a), to_8(b)));
}

inline Ints upper_bytes(Ints a, Ints b) {
    return from_8(vuzp2q_s8(to_8(a), to_8(b)));
}

// the sum of the lanes of each vector
inline Ints sums_of_lanes(const Ints (&x)[4]) {
    return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3]));
}

// Two numbers of 16 bits of each row, as bytes, every N bytes.
template <int N> inline void store_pairs(int8_t * p, Ints x) {
    const int16x4_t pairs = vreinterpret_s16_s8(vmovn_s16(vreinterpretq_s16_s32(x)));
    vst1_lane_s16((int16_t *) p, pairs, 0);
    vst1_lane_s16((int16_t *) (p + N), pairs, 1);
    vst1_lane_s16((int16_t *) (p + 2 * N), pairs, 2);
    vst1_lane_s16((int16_t *) (p + 3 * N), pairs, 3);
}

#if QUANT_GEMM_I8MM

// Adds the products of 8 values of two columns with those of two rows. Sums: column 0 with rows 0 and 1, then column 1.
// In assembly, as the products of a group of activations (below).
inline Ints add_products_of_two(Ints sums, Ints columns, Ints rows) {
    asm volatile("smmla %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(columns), "w"(rows));
    return sums;
}

// The same for columns of unsigned bytes.
inline Ints add_products_of_unsigned(Ints sums, Ints columns, Ints rows) {
    return vusmmlaq_s32(sums, to_unsigned_8(columns), to_8(rows));
}

// Four values of four rows, and the next four of each, as 8 values of the first two rows and of the last two.
inline void eight_values(Ints first, Ints second, Ints (&x)[2]) {
    x[0] = vzip1q_s32(first, second);
    x[1] = vzip2q_s32(first, second);
}

// Numbers of rows, in the order of such sums: those of rows 0 and 1 twice, then those of rows 2 and 3 twice.
inline void store_twice(int32_t * p, Ints x) {
    store_ints(p, lower_halves(x, x));
    store_ints(p + LANES, upper_halves(x, x));
}

inline void store_twice(float * p, Floats x) {
    store_twice((int32_t *) p, vreinterpretq_s32_f32(x));
}

#endif

#endif

#if QUANT_GEMM_KERNELS

#if !QUANT_GEMM_NEON

inline Ints zero() {
    return ints(0);
}

using PairSums = Ints;

inline Ints total_of_pairs(Ints x) {
    return x;
}

#endif

inline Floats upper_half(Ints x) {
    return lower_half(right_32(x, 16));
}

inline Ints low_nibbles(Ints x) {
    return x & bytes(0x0f);
}

inline Ints high_nibbles(Ints x) {
#if QUANT_GEMM_NEON
    return vreinterpretq_s32_u8(vshrq_n_u8(to_unsigned_8(x), 4));
#else
    return right_16(x, 4) & bytes(0x0f);
#endif
}

#if QUANT_GEMM_AVX512 || QUANT_GEMM_AVX2

// Word j of each of four vectors, in vector j: in each 128 bits for itself.
inline void transpose(Ints (&x)[4]) {
    const Ints a = lower_words(x[0], x[1]);
    const Ints b = lower_words(x[2], x[3]);
    const Ints c = upper_words(x[0], x[1]);
    const Ints d = upper_words(x[2], x[3]);
    x[0]         = lower_pairs(a, b);
    x[1]         = upper_pairs(a, b);
    x[2]         = lower_pairs(c, d);
    x[3]         = upper_pairs(c, d);
}

#endif

// the lower halves of a's lanes, the upper halves of b's
inline Ints join_halves(Ints a, Ints b) {
#if QUANT_GEMM_AVX512
    return _mm512_mask_blend_epi16(0xaaaaaaaa, a, b);
#elif QUANT_GEMM_AVX2
    return _mm256_blend_epi16(a, b, 0xaa);
#else
    return (a & ints(0xffff)) | left_32(right_32(b, 16), 16);
#endif
}

inline Ints broadcast_ints(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return ints(x);
}

inline Floats broadcast_floats(const void * p) {
    float x;
    memcpy(&x, p, sizeof(x));
    return floats(x);
}

// Whether stream_floats writes past the caches. If so, p is aligned, and whole cache lines have to be written. Other threads
// see them after finish_streams and a barrier.
constexpr bool STREAMS = !QUANT_GEMM_NEON;

inline void stream_floats(float * p, Floats x) {
#if QUANT_GEMM_AVX512
    _mm512_stream_ps(p, x);
#elif QUANT_GEMM_AVX2
    _mm256_stream_ps(p, x);
#else
    store_floats(p, x);
#endif
}

inline void finish_streams() {
#if !QUANT_GEMM_NEON
    _mm_sfence();
#endif
}

// AVX2: products of four values are two 16-bit sums. Others: one sum of 32 bits.
#if QUANT_GEMM_AVX2 && !QUANT_GEMM_AVX_VNNI

constexpr bool SUMS_OF_16_BITS = true;
constexpr bool SIGNED_BYTES    = true;

// Groups of four values whose products fit: 2 * 127 * the largest quant * the number of groups is less than 32768.
constexpr int groups_together(Codes codes) {
    return codes == Codes::bytes ? 1 : codes == Codes::below_64 ? 2 : codes == Codes::below_32 ? 4 : 8;
}

// Adds the products of four values to the sums. The largest product of signed bytes is 128 * 127.
template <Codes CODES> inline Ints add_products(Ints sums, Ints codes, Ints acts) {
    if constexpr (CODES == Codes::bytes) {
        return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(acts, codes));
    } else {
        return in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, acts)));
    }
}

inline Ints total_of(Ints sums) {
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// total_of(sums) times a factor of 16 bits, given twice in each lane
inline Ints total_times(Ints sums, Ints factors) {
    return _mm256_madd_epi16(sums, factors);
}

#else

constexpr bool SUMS_OF_16_BITS = false;
constexpr bool SIGNED_BYTES    = QUANT_GEMM_NEON;

constexpr int groups_together(Codes) {
    return 8;
}

template <Codes> inline Ints add_products(Ints sums, Ints codes, Ints acts) {
#if QUANT_GEMM_AVX512
    return _mm512_dpbusd_epi32(sums, codes, acts);
#elif QUANT_GEMM_AVX2
    return _mm256_dpbusd_avx_epi32(sums, codes, acts);
#else
    return vdotq_s32(sums, to_8(codes), to_8(acts));
#endif
}

inline Ints total_of(Ints sums) {
    return sums;
}

inline Ints total_times(Ints sums, Ints factors) {
    return mul_32(sums, factors);
}

#endif

// 16 activations in four groups of four. group_of<I> returns group I as an operand of add_products; NEON's sdot selects
// it by lane.
#if QUANT_GEMM_NEON

template <int I> struct Group {
    int8x16_t four;
};

using FourGroups = int8x16_t;

inline FourGroups load_groups(const void * p) {
    return vld1q_s8((const int8_t *) p);
}

template <int I> inline Group<I> group_of(FourGroups x) {
    return { x };
}

// In assembly, so that GCC 12 does not copy sums from register to register, and executed in this order.
template <Codes, int I> inline Ints add_products(Ints sums, Ints codes, Group<I> acts) {
    asm volatile("sdot %0.4s, %1.16b, %2.4b[%c3]" : "+w"(sums) : "w"(codes), "w"(acts.four), "i"(I));
    return sums;
}

#else

using FourGroups = const char *;

inline FourGroups load_groups(const void * p) {
    return (const char *) p;
}

template <int I> inline Ints group_of(FourGroups x) {
    return broadcast_ints(x + 4 * I);
}

#endif

#endif

}  // namespace quant_gemm
