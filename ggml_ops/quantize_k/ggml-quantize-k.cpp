// The search for a block's scale (and minimum) tries about twenty candidates, each with sums over the block in a fixed
// order. Here 16 blocks are searched in parallel, one per vector lane: every lane does the operations of ggml's loop
// over one block, in the same order. Products and sums are not contracted (a build option of this file), as in ggml's
// own code, which is compiled for CPUs without FMA.

#include "ggml-quantize-k.h"

#include "ggml-impl.h"
#include "ggml-quants.h"

#include <cmath>
#include <cstring>

#if defined(__GNUC__) && defined(__x86_64__) && !defined(__FMA__)

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int   LANES      = 16;
constexpr float LEAST      = 1e-15f;      // a block of smaller magnitudes has no scale
constexpr float ROUNDS     = 12582912.f;  // 1.5 * 2^23: adding it to a small number rounds that to the nearest integer
constexpr int   MAX_VALUES = 32;          // per block

typedef float   floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

INLINE floats all(float x) {
    return floats{ x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x };
}

INLINE floats magnitude(floats x) {
    return (floats) ((ints) x & 0x7fffffff);
}

INLINE ints nearest(floats x) {
    return ((ints) (x + ROUNDS) & 0x007fffff) - 0x00400000;
}

INLINE ints clamp(ints x, int least, int most) {
    const ints raised = x > least ? x : ints{} + least;
    return raised < most ? raised : ints{} + most;
}

INLINE floats to_floats(ints x) {
    return __builtin_convertvector(x, floats);
}

INLINE void take_root(floats & x) {
    for (int i = 0; i < LANES; i++) {
        x[i] = sqrtf(x[i]);
    }
}

// Search parameters of a type of 32 values with scale and minimum.
struct Affine {
    int   most;   // largest quant
    float first;  // candidates: (first + 0.1 n + most) / range
    int   steps;
};

template <typename Block> constexpr Affine AFFINE             = {};
template <> inline constexpr Affine        AFFINE<block_q4_K> = { 15, -1.0f, 20 };
template <> inline constexpr Affine        AFFINE<block_q5_K> = { 31, -0.5f, 15 };

// 16 blocks, x[i]: value i of each. Least squares with weights |x| + rms(x).
INLINE void search(const Affine & type, const floats * x, floats & scale, floats & minus_min) {
    constexpr int N = 32;
    floats        weights[N], codes[N];
    floats        rms = {};
    for (int i = 0; i < N; i++) {
        rms += x[i] * x[i];
    }
    rms /= 32.0f;
    take_root(rms);
    for (int i = 0; i < N; i++) {
        weights[i] = rms + magnitude(x[i]);
    }
    floats min = x[0], max = x[0], sum_w = weights[0], sum_x = sum_w * x[0];
    for (int i = 1; i < N; i++) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        sum_w += weights[i];
        sum_x += weights[i] * x[i];
    }
    min                   = min > 0.0f ? floats{} : min;
    const ints   flat     = max == min;
    const floats flat_min = min;

    floats inverse     = all((float) type.most) / (max - min);
    scale              = 1.0f / inverse;
    floats least_error = {};
    for (int i = 0; i < N; i++) {
        const floats code       = to_floats(clamp(nearest(inverse * (x[i] - min)), 0, type.most));
        const floats difference = scale * code + min - x[i];
        least_error += weights[i] * (difference * difference);
    }
    for (int step = 0; step <= type.steps; step++) {
        inverse      = all(type.first + 0.1f * step + type.most) / (max - min);
        floats sum_l = {}, sum_l2 = {}, sum_xl = {};
        for (int i = 0; i < N; i++) {
            codes[i]              = to_floats(clamp(nearest(inverse * (x[i] - min)), 0, type.most));
            const floats weighted = weights[i] * codes[i];
            sum_l += weighted;
            sum_l2 += weighted * codes[i];
            sum_xl += weighted * x[i];
        }
        const floats determinant = sum_w * sum_l2 - sum_l * sum_l;
        floats       this_scale  = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        floats       this_min    = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const ints   above       = this_min > 0.0f;
        this_min                 = above ? floats{} : this_min;
        this_scale               = above ? sum_xl / sum_l2 : this_scale;
        floats error             = {};
        for (int i = 0; i < N; i++) {
            const floats difference = this_scale * codes[i] + this_min - x[i];
            error += weights[i] * (difference * difference);
        }
        const ints better = (determinant > 0.0f) & (error < least_error);
        least_error       = better ? error : least_error;
        scale             = better ? this_scale : scale;
        min               = better ? this_min : min;
    }
    scale     = flat ? floats{} : scale;
    minus_min = -(flat ? flat_min : min);
}

// 16 blocks of 16 values, quants -32..31 and no minimum: least squares with weights x^2.
INLINE void search_symmetric(const floats * x, floats & scale) {
    constexpr int N       = 16;
    floats        extreme = {}, largest = {};
    for (int i = 0; i < N; i++) {
        const floats size   = magnitude(x[i]);
        const ints   larger = size > largest;
        largest             = larger ? size : largest;
        extreme             = larger ? x[i] : extreme;
    }
    floats best = {};
    for (int n = 0; n < 19; n++) {
        const int    step    = n == 0 ? 0 : n <= 9 ? n - 10 : n - 9;  // 0, then -9 .. -1 and 1 .. 9
        const floats inverse = all(step == 0 ? -32.0f : -(32 + 0.1f * step)) / extreme;
        floats       sum_xl = {}, sum_l2 = {};
        for (int i = 0; i < N; i++) {
            const floats code   = to_floats(clamp(nearest(inverse * x[i]), -32, 31));
            const floats weight = x[i] * x[i];
            sum_xl += weight * x[i] * code;
            sum_l2 += weight * code * code;
        }
        const floats this_scale = sum_xl / sum_l2;
        if (step == 0) {
            scale = sum_l2 != 0.0f ? this_scale : floats{};
            best  = scale * sum_xl;
            continue;
        }
        const ints better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
        scale             = better ? this_scale : scale;
        best              = better ? this_scale * sum_xl : best;
    }
    scale = largest < LEAST ? floats{} : scale;
}

// x[i] of 16 contiguous blocks
template <int N> INLINE void transpose(const float * values, int n_blocks, floats * x) {
    float turned[N][LANES] = {};
    for (int lane = 0; lane < n_blocks; lane++) {
        for (int i = 0; i < N; i++) {
            turned[i][lane] = values[lane * N + i];
        }
    }
    memcpy(x, turned, sizeof(turned));
}

int nearest(float x) {
    const float moved = x + ROUNDS;
    int32_t     bits;
    memcpy(&bits, &moved, sizeof(bits));
    return (bits & 0x007fffff) - 0x00400000;
}

// The quants of 16 values.
INLINE void encode(const float * x, float plus, float scale, int least, int most, int added, uint8_t * codes) {
    floats v;
    memcpy(&v, x, sizeof(v));
    const bytes n = __builtin_convertvector(clamp(nearest((v + plus) / scale), least, most) + added, bytes);
    memcpy(codes, &n, sizeof(n));
}

// Common to Q4_K and Q5_K: scales, minima, and the quants of 256 values. Returns false if a block has no scale.
template <typename Block>
INLINE bool
finish(const Affine & type, const float * x, const float * scales, const float * minima, Block & y, uint8_t * codes) {
    float max_scale = 0.0f, max_min = 0.0f;
    for (int b = 0; b < 8; b++) {
        max_scale = scales[b] > max_scale ? scales[b] : max_scale;
        max_min   = minima[b] > max_min ? minima[b] : max_min;
    }
    const float to_scale = max_scale > 0.0f ? 63.0f / max_scale : 0.0f;
    const float to_min   = max_min > 0.0f ? 63.0f / max_min : 0.0f;
    y.d                  = GGML_FP32_TO_FP16(max_scale / 63.0f);
    y.dmin               = GGML_FP32_TO_FP16(max_min / 63.0f);
    uint8_t s[8], m[8];
    for (int b = 0; b < 8; b++) {
        s[b] = (uint8_t) nearest(to_scale * scales[b]);
        m[b] = (uint8_t) nearest(to_min * minima[b]);
        s[b] = s[b] < 63 ? s[b] : 63;
        m[b] = m[b] < 63 ? m[b] : 63;
    }
    for (int b = 0; b < 4; b++) {
        y.scales[b]     = (uint8_t) (s[b] | (s[b + 4] >> 4) << 6);
        y.scales[b + 4] = (uint8_t) (m[b] | (m[b + 4] >> 4) << 6);
        y.scales[b + 8] = (uint8_t) ((s[b + 4] & 15) | (m[b + 4] & 15) << 4);
    }
    for (int b = 0; b < 8; b++) {
        const float scale = GGML_FP16_TO_FP32(y.d) * s[b];
        const float min   = GGML_FP16_TO_FP32(y.dmin) * m[b];
        if (scale == 0.0f) {
            return false;
        }
        encode(x + 32 * b, min, scale, 0, type.most, 0, codes + 32 * b);
        encode(x + 32 * b + 16, min, scale, 0, type.most, 0, codes + 32 * b + 16);
    }
    return true;
}

INLINE void pack(const uint8_t * codes, block_q4_K & y) {
    for (int i = 0; i < 128; i++) {
        const uint8_t * c = codes + i / 32 * 64 + i % 32;
        y.qs[i]           = (uint8_t) (c[0] | c[32] << 4);
    }
}

INLINE void pack(const uint8_t * codes, block_q5_K & y) {
    memset(y.qh, 0, sizeof(y.qh));
    for (int i = 0; i < 128; i++) {
        const int       pair = i / 32;
        const uint8_t * c    = codes + pair * 64 + i % 32;
        y.qs[i]              = (uint8_t) ((c[0] & 15) | (c[32] & 15) << 4);
        y.qh[i % 32] |= (uint8_t) ((c[0] >> 4) << (2 * pair) | (c[32] >> 4) << (2 * pair + 1));
    }
}

INLINE void reference(const float * x, block_q4_K * y) {
    quantize_row_q4_K_ref(x, y, QK_K);
}

INLINE void reference(const float * x, block_q5_K * y) {
    quantize_row_q5_K_ref(x, y, QK_K);
}

template <typename Block> INLINE void quantise(const float * x, Block * y, int64_t n) {
    constexpr Affine type = AFFINE<Block>;
    for (int64_t i = 0; i < n; i += 2) {
        floats    values[MAX_VALUES], scales, minima;
        const int here = n - i < 2 ? 1 : 2;
        transpose<32>(x + i * QK_K, 8 * here, values);
        search(type, values, scales, minima);
        float scale[LANES], min[LANES];
        memcpy(scale, &scales, sizeof(scale));
        memcpy(min, &minima, sizeof(min));
        for (int j = 0; j < here; j++) {
            uint8_t       codes[QK_K];
            const float * from = x + (i + j) * QK_K;
            if (finish(type, from, scale + 8 * j, min + 8 * j, y[i + j], codes)) {
                pack(codes, y[i + j]);
            } else {
                reference(from, y + i + j);  // keeps the quants of its search, which are not available here
            }
        }
    }
}

INLINE bool finish(const float * x, const float * scales, block_q6_K & y, uint8_t * codes) {
    float max_scale = 0.0f, largest = 0.0f;
    for (int b = 0; b < 16; b++) {
        if (fabsf(scales[b]) > largest) {
            largest   = fabsf(scales[b]);
            max_scale = scales[b];
        }
    }
    if (largest < LEAST) {
        return false;
    }
    const float inverse = -128.0f / max_scale;
    y.d                 = GGML_FP32_TO_FP16(1 / inverse);
    for (int b = 0; b < 16; b++) {
        const int n       = nearest(inverse * scales[b]);
        y.scales[b]       = (int8_t) (n < 127 ? n : 127);
        const float scale = GGML_FP16_TO_FP32(y.d) * y.scales[b];
        if (scale == 0.0f) {
            return false;
        }
        encode(x + 16 * b, 0.0f, scale, -32, 31, 32, codes + 16 * b);
    }
    return true;
}

INLINE void quantise(const float * x, block_q6_K * y, int64_t n) {
    for (int64_t i = 0; i < n; i++, x += QK_K, y++) {
        floats values[MAX_VALUES], scales;
        transpose<16>(x, LANES, values);
        search_symmetric(values, scales);
        float   scale[LANES];
        uint8_t codes[QK_K];
        memcpy(scale, &scales, sizeof(scale));
        if (!finish(x, scale, *y, codes)) {
            quantize_row_q6_K_ref(x, y, QK_K);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            const uint8_t * c = codes + 128 * half;
            for (int j = 0; j < 32; j++) {
                y->ql[64 * half + j]      = (uint8_t) ((c[j] & 15) | (c[j + 64] & 15) << 4);
                y->ql[64 * half + 32 + j] = (uint8_t) ((c[j + 32] & 15) | (c[j + 96] & 15) << 4);
                y->qh[32 * half + j] =
                    (uint8_t) (c[j] >> 4 | (c[j + 32] >> 4) << 2 | (c[j + 64] >> 4) << 4 | (c[j + 96] >> 4) << 6);
            }
        }
    }
}

// ggml-base is compiled once for all CPUs, so the vector width is selected here.
template <typename Block> __attribute__((target("avx512f"))) void by_16(const float * x, Block * y, int64_t n) {
    quantise(x, y, n);
}

template <typename Block> __attribute__((target("avx2"))) void by_8(const float * x, Block * y, int64_t n) {
    quantise(x, y, n);
}

template <typename Block> void by_4(const float * x, Block * y, int64_t n) {
    quantise(x, y, n);
}

template <typename Block> bool quantise_blocks(const float * x, void * y, int64_t k) {
    const auto run = __builtin_cpu_supports("avx512f") ? by_16<Block>
                     : __builtin_cpu_supports("avx2")  ? by_8<Block>
                                                       : by_4<Block>;
    run(x, (Block *) y, k / QK_K);
    return true;
}

}  // namespace

bool ggml_quantise_k(ggml_type type, const float * x, void * y, int64_t k) {
    switch (type) {
    case GGML_TYPE_Q4_K:
        return quantise_blocks<block_q4_K>(x, y, k);
    case GGML_TYPE_Q5_K:
        return quantise_blocks<block_q5_K>(x, y, k);
    case GGML_TYPE_Q6_K:
        return quantise_blocks<block_q6_K>(x, y, k);
    default:
        return false;
    }
}

#else

bool ggml_quantise_k(ggml_type, const float *, void *, int64_t) {
    return false;
}

#endif
