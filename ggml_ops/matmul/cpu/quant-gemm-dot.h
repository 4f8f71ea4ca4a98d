#pragma once

// Few columns: weights are multiplied in their layout, one row (quant-gemm-dot.cpp) or one group of interleaved rows
// (quant-gemm-dot-groups.cpp) at a time, unpacked into registers once for up to DOT_COLUMNS columns. The sums of
// quantized weights have the same bits as those of the tiles (quant-gemm-tile.cpp), for any number of columns.

#include "quant-gemm-panel.h"

#include <algorithm>

namespace quant_gemm {

constexpr int DOT_COLUMNS = 4;
constexpr int DOT_ROWS    = 16;  // rows that most kernels multiply at once, one per lane

// Multiplies up to Dot::rows of n_rows rows of k weights, stride bytes apart, with packed rows of activations:
// sums[column * PANEL_ROWS + row]. It may write sums of all Dot::rows rows.
using DotColumns =
    void (*)(const char * weights, size_t stride, int n_rows, int64_t k, const char * const * columns, float * sums);

struct Dot {
    int        rows;                   // rows per call
    DotColumns multiply[DOT_COLUMNS];  // for 1, 2, ... columns
};

// The kernels for matrices with fewer columns than the format's min_columns.
const Dot & dot_of(const Format & format);

const Dot & dot_of_groups(ggml_type type);

struct TypedDot {
    ggml_type type;
    Dot       dot;
};

template <size_t N> const Dot & dot_of(const TypedDot (&dots)[N], ggml_type type) {
    for (const TypedDot & each : dots) {
        if (each.type == type) {
            return each.dot;
        }
    }
    GGML_ABORT("no dot product for %s", ggml_type_name(type));
}

// n_rows rows of k weights, stride bytes apart, times the columns: sums[column * PANEL_ROWS + row].
void dot_rows(
    const Dot & dot, const char * weights, size_t stride, int64_t n_rows, int64_t k, Columns columns, float * sums);

#if QUANT_GEMM_VNNI

// Prefetches n bytes: weights come from memory, and hardware prefetching is not far enough ahead.
template <int LOCALITY> inline void prefetch(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += CACHE_LINE) {
        __builtin_prefetch((const char *) p + i, 0, LOCALITY);
    }
}

// The distance in bytes to the next 16 rows, which are prefetched into L2. 16 rows are multiplied at once, so the bytes
// that follow those of one row belong to the next of these rows.
inline size_t ahead_of(size_t stride) {
    return std::min<size_t>(DOT_ROWS * stride, 1 << 17);
}

// Prefetches the bytes one page after these n bytes into L1.
inline void prefetch_behind(const void * p, size_t n) {
    prefetch<3>((const char *) p + 4096, n);
}

#endif

}  // namespace quant_gemm
