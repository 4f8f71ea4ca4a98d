#pragma once

// Few columns: weights are multiplied in their layout, one row (quant-gemm-dot.cpp) or one group of interleaved rows
// (quant-gemm-dot-groups.cpp) at a time, unpacked into registers once for up to DOT_COLUMNS columns.

#include "quant-gemm-panel.h"

namespace quant_gemm {

constexpr int DOT_COLUMNS = 4;

// Multiplies a row, or a group, of k weights with packed rows of activations: sums[column * PANEL_ROWS + row].
using DotColumns = void (*)(const char * weights, int64_t k, const char * const * columns, float * sums);

struct Dot {
    int        rows;                   // rows per call
    DotColumns multiply[DOT_COLUMNS];  // for 1, 2, ... columns
};

// The kernels for matrices with fewer columns than the format's min_columns; nullptr: upstream's path computes them, so
// a node is only computed here if its matrices have enough columns on average (experts: half as many, since most of the
// experts in use then have more).
const Dot * find_dot(const Format & format);

const Dot * find_dot_of_groups(ggml_type type);

struct TypedDot {
    ggml_type type;
    Dot       dot;
};

template <size_t N> const Dot * find_dot(const TypedDot (&dots)[N], ggml_type type) {
    for (const TypedDot & each : dots) {
        if (each.type == type) {
            return &each.dot;
        }
    }
    return nullptr;
}

// n_rows rows of k weights, stride bytes apart, times the columns: sums[column * PANEL_ROWS + row].
void dot_rows(
    const Dot & dot, const char * weights, size_t stride, int64_t n_rows, int64_t k, Columns columns, float * sums);

#if QUANT_GEMM_VNNI

// Prefetches the bytes after these n bytes: weights come from memory, and hardware prefetching is not far enough ahead.
inline void prefetch_behind(const void * p, size_t n) {
    constexpr size_t DISTANCE = 4096;
    for (size_t i = 0; i < n; i += CACHE_LINE) {
        __builtin_prefetch((const char *) p + DISTANCE + i);
    }
}

#endif

}  // namespace quant_gemm
