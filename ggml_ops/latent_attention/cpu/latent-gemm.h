#pragma once

// Dense matmuls for latent attention.
//   C[m][n] = (term of the old C[m][n], see Accumulate) + unit[m] * sum over k of A[m*a_row + k*a_step] * B[k][n]
// A and B are float32 (without unit), or each element is a pair of 16-bit integers: k counts pairs, and a pair of A times a
// pair of B is the sum of two products, accumulated in 32 bits. C is float32. B and C are read and written in vectors, A is
// broadcast; with A's two strides the same kernel supports a matrix or its transpose. The order of summation depends on the
// shape only.

#include "latent-simd.h"

namespace latent {

enum class Accumulate {
    NONE,   // C is overwritten
    ADD,    // C + ...
    SCALE,  // C * scale[m] + ...
};

constexpr int64_t PANEL = MAX_COLUMNS * LANES;  // columns of a register block

constexpr int64_t pad_panel(int64_t n) {
    return (n + PANEL - 1) / PANEL * PANEL;
}

// B or C: the element [k][n] is at[n / PANEL * panel + k * ld + n % PANEL].
template <typename T> struct Matrix {
    T *     at;
    int64_t ld;
    int64_t panel;
};

// Row-major.
template <typename T> static inline Matrix<T> in_rows(T * at, int64_t ld) {
    return { at, ld, PANEL };
}

// Each group of PANEL columns is a block of its own, so the rows that a register block reads are adjacent. In a row-major
// matrix they are a multiple of 256 bytes apart, share few sets of the L1 cache, and evict each other.
template <typename T> static inline Matrix<T> in_panels(T * at, int64_t n_rows) {
    return { at, PANEL, n_rows * PANEL };
}

// T: float, or int32_t for a pair.
template <typename T> struct ProductOf {
    int64_t         n_rows;   // m
    int64_t         n_cols;   // n, a multiple of LANES
    int64_t         n_steps;  // k
    const T *       a;
    int64_t         a_row;
    int64_t         a_step;
    Matrix<const T> b;
    Matrix<float>   c;
    const float *   scale;           // one per row, for Accumulate::SCALE
    Ahead *         ahead;           // or null
    const float *   unit = nullptr;  // one per row, for pairs
};

using Product     = ProductOf<float>;
using PairProduct = ProductOf<int32_t>;

// A sum as float32; for pairs, times the unit of its row.
static inline vf in_units(const vf & sum, const float *, int64_t) {
    return sum;
}

#if LATENT_PAIRS
static inline vf in_units(const vi & sum, const float * unit, int64_t row) {
    return v_mul(v_float(sum), v_set(unit[row]));
}
#endif

// One register block: ROWS rows by COLUMNS vectors, at row m and column n.
template <int ROWS, int COLUMNS, Accumulate ACC, typename T>
static inline void multiply_block(const ProductOf<T> & p, int64_t m, int64_t n) {
    using vector = decltype(v_load((const T *) nullptr));

    const int64_t           n_steps            = p.n_steps;
    const int64_t           a_row              = p.a_row;
    const int64_t           a_step             = p.a_step;
    const int64_t           ldb                = p.b.ld;
    const int64_t           ldc                = p.c.ld;
    const T * GGML_RESTRICT a                  = p.a + m * a_row;
    const T * GGML_RESTRICT b                  = p.b.at + n / PANEL * p.b.panel;
    float * GGML_RESTRICT   c                  = p.c.at + n / PANEL * p.c.panel + m * ldc;
    vector                  acc[ROWS][COLUMNS] = {};
    for (int64_t k = 0; k < n_steps; ++k) {
        vector bk[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) {
            bk[j] = v_load(b + k * ldb + j * LANES);
        }
        for (int i = 0; i < ROWS; ++i) {
            const vector aik = v_set(a[i * a_row + k * a_step]);
            for (int j = 0; j < COLUMNS; ++j) {
                acc[i][j] = v_fma(aik, bk[j], acc[i][j]);
            }
        }
    }
    const float * GGML_RESTRICT unit  = p.unit;
    const float * GGML_RESTRICT scale = p.scale;
    LATENT_UNROLL  // otherwise the accumulators go through memory
        for (int i = 0; i < ROWS; ++i) {
        LATENT_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
            float * cij = c + i * ldc + j * LANES;
            vf      sum = in_units(acc[i][j], unit, m + i);
            if (ACC == Accumulate::ADD) {
                sum = v_add(v_load(cij), sum);
            } else if (ACC == Accumulate::SCALE) {
                sum = v_fma(v_load(cij), v_set(scale[m + i]), sum);
            }
            v_store(cij, sum);
        }
    }
}

// COLUMNS vectors from column n on, the start of a panel, for the rows from m on: ROWS at a time, then the rest.
template <int ROWS, int COLUMNS, Accumulate ACC, typename T>
static inline void multiply_rows(const ProductOf<T> & p, int64_t m, int64_t n) {
    for (; m + ROWS <= p.n_rows; m += ROWS) {
        if (p.ahead) {
            p.ahead->touch();
        }
        multiply_block<ROWS, COLUMNS, ACC>(p, m, n);
    }
    if constexpr (ROWS > 1) {
        multiply_rows<ROWS - 1, COLUMNS, ACC>(p, m, n);
    }
}

// All rows from column n on: COLUMNS vectors at a time, then the rest, which is less than a panel.
template <int COLUMNS, Accumulate ACC, typename T>
static inline void multiply_columns(const ProductOf<T> & p, int64_t n) {
    constexpr int ROWS = N_ACCUMULATORS / COLUMNS > 12 ? 12 : N_ACCUMULATORS / COLUMNS;
    for (; n + COLUMNS * LANES <= p.n_cols; n += COLUMNS * LANES) {
        multiply_rows<ROWS, COLUMNS, ACC>(p, 0, n);
    }
    if constexpr (COLUMNS > 1) {
        multiply_columns<COLUMNS - 1, ACC>(p, n);
    }
}

template <Accumulate ACC, typename T> static void multiply(const ProductOf<T> & p) {
    multiply_columns<MAX_COLUMNS, ACC>(p, 0);
}

// C = A * B in steps of `step` values of k, so that the part of B in use stays in the L1 cache.
static inline void multiply_in_steps(Product p, int64_t step) {
    const int64_t n_steps = p.n_steps;
    p.n_steps             = n_steps < step ? n_steps : step;
    multiply<Accumulate::NONE>(p);
    for (int64_t k = step; k < n_steps; k += step) {
        p.a += step * p.a_step;
        p.b.at += step * p.b.ld;
        p.n_steps = n_steps - k < step ? n_steps - k : step;
        multiply<Accumulate::ADD>(p);
    }
}

// Rows as matrix B: dst[d*ldd + i] = row(i)[d] * factor for d in [d0, d1) and i < n_rows; zero for the other
// i < n_cols, a multiple of LANES.
template <typename RowOf>
static void transpose_rows(
    const RowOf & row, int64_t n_rows, int64_t n_cols, int64_t d0, int64_t d1, float factor, float * dst, int64_t ldd) {
    for (int64_t col = 0; col < n_cols; col += LANES) {
        const float * src[LANES] = {};
        for (int i = 0; i < LANES && col + i < n_rows; ++i) {
            src[i] = row(col + i);
        }
        int64_t d = d0;
        for (; d + LANES <= d1; d += LANES) {
            vf r[LANES];
            for (int i = 0; i < LANES; ++i) {
                r[i] = src[i] ? v_mul(v_load(src[i] + d), v_set(factor)) : v_set(0.0f);
            }
            v_transpose(r);
            for (int i = 0; i < LANES; ++i) {
                v_store(dst + (d + i) * ldd + col, r[i]);
            }
        }
        for (; d < d1; ++d) {
            for (int i = 0; i < LANES; ++i) {
                dst[d * ldd + col + i] = src[i] ? src[i][d] * factor : 0.0f;
            }
        }
    }
}

}  // namespace latent
