#include "latent-int16.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cstring>

namespace latent {

#if LATENT_INT16

static float largest_magnitude(const float * x, int64_t n) {
    vf      largest = v_set(0.0f);
    vf      nothing = v_set(0.0f);  // NaN if a value is not finite
    int64_t i       = 0;
    for (; i + LANES <= n; i += LANES) {
        const vf value = v_load(x + i);
        largest        = v_max(largest, _mm512_abs_ps(value));
        nothing        = v_fma(value, v_set(0.0f), nothing);
    }
    float r    = _mm512_reduce_max_ps(largest);
    float rest = _mm512_reduce_add_ps(nothing);
    for (; i < n; ++i) {
        r = fabsf(x[i]) > r ? fabsf(x[i]) : r;
        rest += x[i] * 0.0f;
    }
    return r + rest;
}

float round_pairs(const float * x, int64_t n, int64_t d0, int64_t d1, int32_t * pairs, int64_t ldp) {
    const float largest = largest_magnitude(x, n);
    const float factor  = largest == 0.0f ? 0.0f : INT16_MAX / largest;
    int64_t     i       = 0;
    x += d0;
    n = d1 - d0;
    for (; i + LANES <= n; i += LANES) {
        const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v_mul(v_load(x + i), v_set(factor))));
        int32_t       pair[LANES / 2];
        _mm256_storeu_si256((__m256i *) pair, rounded);
        for (int j = 0; j < LANES / 2; ++j) {
            pairs[(i / 2 + j) * ldp] = pair[j];
        }
    }
    for (; i < n; i += 2) {
        const uint16_t low  = (uint16_t) (int16_t) lrintf(x[i] * factor);
        const uint16_t high = (uint16_t) (int16_t) lrintf(x[i + 1] * factor);
        pairs[i / 2 * ldp]  = (int32_t) (low | (uint32_t) high << 16);
    }
    return largest;
}

// The 32 quants of one block, and its scale.
static __m512i unpack(const block_q8_0 & block, float & scale) {
    scale = _cvtsh_ss(block.d);
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) block.qs));
}

static __m512i unpack(const block_q4_0 & block, float & scale) {
    scale               = _cvtsh_ss(block.d);
    const __m128i bytes = _mm_loadu_si128((const __m128i *) block.qs);
    const __m128i low   = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high  = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_set_m128i(high, low)), _mm512_set1_epi16(8));
}

// The quants of two keys interleaved: [d] of (first, second), in two vectors.
static void store_pairs(__m512i first, __m512i second, int32_t * pairs) {
    alignas(64) static const int16_t order[2][2 * LANES] = {
        { 0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47 },
        { 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
          24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63 },
    };
    for (int half = 0; half < 2; ++half) {
        _mm512_storeu_si512(pairs + half * LANES,
                            _mm512_permutex2var_epi16(first, _mm512_load_si512(order[half]), second));
    }
}

template <typename Block>
static void read_blocks(const KeyTile & tile, const char * src, size_t stride, const CodeTile & t) {
    const int64_t n_scales = t.n_scales();
    for (int i = 0; i < tile.n_keys; i += 2) {
        const bool    alone  = i + 1 == tile.n_keys;
        const Block * first  = (const Block *) (src + tile.key[i] * stride);
        const Block * second = alone ? first : (const Block *) (src + tile.key[i + 1] * stride);
        int16_t *     codes  = t.codes + i * t.n_dims;
        float *       scales = t.scales + i * n_scales;
        for (int64_t b = 0; b < n_scales; ++b) {
            float         unused;
            const __m512i one = unpack(first[b], scales[b]);
            const __m512i two = unpack(second[b], alone ? unused : scales[n_scales + b]);
            _mm512_storeu_si512(codes + b * CODES_A_SCALE, one);
            if (!alone) {
                _mm512_storeu_si512(codes + t.n_dims + b * CODES_A_SCALE, two);
            }
            if (b * CODES_A_SCALE < t.n_values) {
                store_pairs(one, alone ? _mm512_setzero_si512() : two,
                            t.pairs + b * CodeTile::PAIRS + i / 2 * CODES_A_SCALE);
            }
        }
    }
}

void read_codes(const KeyTile & tile, ggml_type type, const char * src, size_t stride, CodeTile & codes) {
    codes.n_keys = tile.n_keys;
    if (type == GGML_TYPE_Q8_0) {
        read_blocks<block_q8_0>(tile, src, stride, codes);
    } else {
        read_blocks<block_q4_0>(tile, src, stride, codes);
    }
}

// ROWS keys by COLUMNS vectors of queries.
template <int ROWS, int COLUMNS>
static void score_block(
    int64_t n_cols, const CodeTile & t, int64_t key, const int32_t * queries, const float * scale, float * scores) {
    const int16_t * codes              = t.codes + key * t.n_dims;
    const float *   scales             = t.scales + key * t.n_scales();
    vf              sum[ROWS][COLUMNS] = {};
    for (int64_t b = 0; b < t.n_scales(); ++b) {
        __m512i         acc[ROWS][COLUMNS] = {};
        const int16_t * code               = codes + b * CODES_A_SCALE;
        const int32_t * query              = queries + b * CODES_A_SCALE / 2 * n_cols;
        LATENT_UNROLL
        for (int step = 0; step < CODES_A_SCALE / 2; ++step) {
            __m512i q[COLUMNS];
            for (int j = 0; j < COLUMNS; ++j) {
                q[j] = _mm512_loadu_si512(query + step * n_cols + j * LANES);
            }
            for (int i = 0; i < ROWS; ++i) {
                int32_t pair;
                memcpy(&pair, code + i * t.n_dims + 2 * step, sizeof(pair));
                for (int j = 0; j < COLUMNS; ++j) {
                    acc[i][j] = _mm512_dpwssd_epi32(acc[i][j], q[j], _mm512_set1_epi32(pair));
                }
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            const vf key_scale = v_set(scales[i * t.n_scales() + b]);
            for (int j = 0; j < COLUMNS; ++j) {
                sum[i][j] = v_fma(_mm512_cvtepi32_ps(acc[i][j]), key_scale, sum[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            v_store(scores + (key + i) * n_cols + j * LANES, v_mul(sum[i][j], v_load(scale + j * LANES)));
        }
    }
}

// Keys from `key` on: ROWS at a time, then the rest.
template <int ROWS, int COLUMNS>
static void score_rows(
    int64_t n_cols, const CodeTile & t, int64_t key, const int32_t * queries, const float * scale, float * scores) {
    for (; key + ROWS <= t.n_keys; key += ROWS) {
        score_block<ROWS, COLUMNS>(n_cols, t, key, queries, scale, scores);
    }
    if constexpr (ROWS > 1) {
        score_rows<ROWS == 6 ? 4 : ROWS / 2, COLUMNS>(n_cols, t, key, queries, scale, scores);
    }
}

void score_int16(int64_t n_cols, const CodeTile & codes, const int32_t * queries, const float * scale, float * scores) {
    int64_t col = 0;
    for (; col + 2 * LANES <= n_cols; col += 2 * LANES) {
        score_rows<6, 2>(n_cols, codes, 0, queries + col, scale + col, scores + col);
    }
    if (col < n_cols) {
        score_rows<12, 1>(n_cols, codes, 0, queries + col, scale + col, scores + col);
    }
}

// Weights times the scales of block b, rounded, as pairs of neighbouring keys [n_keys/2][n_cols]; unit[col] is the
// value of one step.
static void
round_weights(const CodeTile & t, int64_t b, int64_t n_cols, const float * weights, int32_t * pairs, float * unit) {
    constexpr __mmask32 UPPER_HALVES = 0xaaaaaaaa;
    const int64_t       n_keys       = t.n_keys;
    const int64_t       n_scales     = t.n_scales();
    const float *       scales       = t.scales + b;
    for (int64_t col = 0; col < n_cols; col += LANES) {
        const float * w       = weights + col;
        vf            largest = v_set(0.0f);
        for (int64_t key = 0; key < n_keys; ++key) {
            largest = v_max(largest, _mm512_abs_ps(v_mul(v_load(w + key * n_cols), v_set(scales[key * n_scales]))));
        }
        const __mmask16 any    = _mm512_cmp_ps_mask(largest, v_set(0.0f), _CMP_GT_OQ);
        const vf        factor = _mm512_maskz_div_ps(any, v_set((float) INT16_MAX), largest);
        v_store(unit + col, v_mul(largest, v_set(1.0f / INT16_MAX)));
        for (int64_t key = 0; key < n_keys; key += 2) {
            const auto rounded = [&](int64_t k) {
                return _mm512_cvtps_epi32(v_mul(v_mul(v_load(w + k * n_cols), v_set(scales[k * n_scales])), factor));
            };
            const __m512i first  = rounded(key);
            const __m512i second = key + 1 < n_keys ? rounded(key + 1) : _mm512_setzero_si512();
            _mm512_storeu_si512(pairs + key / 2 * n_cols + col,
                                _mm512_mask_blend_epi16(UPPER_HALVES, first, _mm512_slli_epi32(second, 16)));
        }
    }
}

// One block of values; rows of weights, units and out start at row 0.
struct BlockOfValues {
    int64_t         n_pairs;
    int64_t         n_cols;
    const int32_t * weights;
    const int32_t * codes;
    const float *   unit;
    const float *   rescale;  // may be null
    int64_t         ldo;
    float *         out;
};

// Adds one block of values, times their weights, to ROWS rows of the result.
template <int ROWS> static void add_block(const BlockOfValues & v, int64_t row) {
    const int64_t   n_pairs            = v.n_pairs;
    const int64_t   n_cols             = v.n_cols;
    const int32_t * weights            = v.weights + row;
    const int32_t * codes              = v.codes;
    constexpr int   COLUMNS            = CODES_A_SCALE / LANES;
    __m512i         acc[ROWS][COLUMNS] = {};
    LATENT_UNROLL
    for (int64_t pair = 0; pair < n_pairs; ++pair) {
        __m512i c[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) {
            c[j] = _mm512_loadu_si512(codes + pair * CODES_A_SCALE + j * LANES);
        }
        for (int i = 0; i < ROWS; ++i) {
            const __m512i w = _mm512_set1_epi32(weights[pair * n_cols + i]);
            for (int j = 0; j < COLUMNS; ++j) {
                acc[i][j] = _mm512_dpwssd_epi32(acc[i][j], c[j], w);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            float *  o   = v.out + (row + i) * v.ldo + j * LANES;
            const vf old = v.rescale ? v_mul(v_load(o), v_set(v.rescale[row + i])) : v_set(0.0f);
            v_store(o, v_fma(_mm512_cvtepi32_ps(acc[i][j]), v_set(v.unit[row + i]), old));
        }
    }
}

template <int ROWS> static void add_rows(const BlockOfValues & v, int64_t row, int64_t n_rows, Ahead & ahead) {
    for (; row + ROWS <= n_rows; row += ROWS) {
        ahead.touch();
        add_block<ROWS>(v, row);
    }
    if constexpr (ROWS > 1) {
        add_rows<ROWS / 2>(v, row, n_rows, ahead);
    }
}

void add_values_int16(
    int64_t n_rows, const CodeTile & codes, const float * weights, const float * rescale, Ahead & ahead, float * out) {
    const int64_t n_cols  = pad_lanes(n_rows);
    const int64_t n_pairs = (codes.n_keys + 1) / 2;
    int32_t *     rounded = (int32_t *) codes.room;
    float *       unit    = codes.room + MAX_TILE_KEYS / 2 * n_cols;
    for (int64_t b = 0; b < codes.n_values / CODES_A_SCALE; ++b) {
        round_weights(codes, b, n_cols, weights, rounded, unit);
        const int32_t * pairs = codes.pairs + b * CodeTile::PAIRS;
        add_rows<8>({ n_pairs, n_cols, rounded, pairs, unit, rescale, codes.n_values, out + b * CODES_A_SCALE }, 0,
                    n_rows, ahead);
    }
}

#endif

}  // namespace latent
